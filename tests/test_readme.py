"""The commands that the documents show: their settings load, and name clips to evaluate on."""

import re
from pathlib import Path

import pytest

from helpers import load_recipe
from inflate.config import load

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("datasets/*.md"), *ROOT.glob("adapters/*.md"), *ROOT.glob("recipes/*.yaml")]
COMMAND = re.compile(r"accelerate launch (?:--quiet )?(recipes/\w+\.py)(.*)")


def commands() -> list[tuple[str, str, list[str]]]:
    found = []
    for document in DOCUMENTS:
        for recipe, rest in COMMAND.findall(document.read_text(encoding="utf-8")):
            found.append((document.name, recipe, rest.split("`")[0].split("#")[0].split()))
    return found


def test_the_documents_show_commands() -> None:
    assert {"README.md", "svd_decoder.yaml", "svd_image_to_video.yaml"} <= {document for document, _, _ in commands()}


@pytest.mark.parametrize(("document", "recipe", "arguments"), commands())
def test_a_shown_command_loads(
    document: str, recipe: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load(load_recipe(ROOT / recipe).Config, arguments)
    if config.stage != "demo":
        assert config.data.split == "train", document
        assert config.data.evaluation().split == "held_out", document


@pytest.mark.parametrize("picture", re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()))
def test_a_shown_picture_exists(picture: str) -> None:
    assert (ROOT / picture).is_file()
