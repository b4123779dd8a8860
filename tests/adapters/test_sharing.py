"""Adapters go to a hub and come back the same; a stand-in on this machine takes its place."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub import TOKEN, Hub, running
from huggingface_hub import constants
from safetensors.torch import save_file
from test_cli import inflate, refused
from tiny_adapter import trained

from inflate.adapters import card, file, sharing

NAME = "me/pan"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running() as served:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, served.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        yield served


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared") / "pan.safetensors"
    made = trained().adapter
    file.write(path, replace(made, about={**made.about, "licence": "mit", "trigger": "pan"}))
    return path


def test_what_is_pushed_is_pulled(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    adapter.with_name(card.SAMPLES).write_bytes(b"\x89PNG")
    pushed = inflate("adapter", "push", adapter, NAME)
    assert pushed.exit_code == 0, pushed.output
    assert pushed.stdout == f"pushed {adapter}: {hub.endpoint}/{NAME}/commit/{hub.commit(NAME)}\n"
    held = hub.repositories[NAME]
    assert held.keys() == {file.NAME, card.NAME, card.SAMPLES}
    text = held[card.NAME].decode()
    assert all(each in text for each in ("license: mit", "- trigger: pan", f"]({card.SAMPLES})", "attach.load("))
    held["evil.py"] = b"raise SystemExit"
    pulled = inflate("adapter", "pull", NAME, tmp_path / "pulled")
    assert pulled.exit_code == 0, pulled.output
    assert f"note: of commit {hub.commit(NAME)}" in pulled.stderr
    assert {path.name for path in (tmp_path / "pulled").iterdir()} == {file.NAME, card.NAME, card.SAMPLES}
    back, sent = file.read(tmp_path / "pulled" / file.NAME), file.read(adapter)
    assert back.about == sent.about
    assert all(torch.equal(tensor, sent.tensors[name]) for name, tensor in back.tensors.items())
    assert "exists already" in refused("adapter", "pull", NAME, tmp_path / "pulled")


@pytest.mark.parametrize("family", sorted(card.COMMANDS))
def test_the_command_of_a_card_is_one_that_there_is(family: str) -> None:
    written = card.use({"family": family, "base": {"name": "./nowhere"}}).split("\n")[1]
    said = refused(*shlex.split(written)[1:])
    assert "nowhere" in said or "no such file" in said


def test_what_is_no_adapter_or_too_large_is_not_kept(
    hub: Hub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"unet.conv.weight": torch.zeros(2)}, tmp_path / "cut.safetensors")
    hub.repositories["me/cut"] = {"any.safetensors": (tmp_path / "cut.safetensors").read_bytes()[:-4]}
    hub.repositories["me/none"] = {"pytorch_model.bin": b"cos\nsystem\n"}
    hub.repositories["me/large"] = {file.NAME: adapter.read_bytes(), card.NAME: b"#" * 99}
    out = tmp_path / "out"
    assert "cut short" in refused("adapter", "pull", "me/cut", out)
    assert "holds no pytorch_lora_weights.safetensors" in refused("adapter", "pull", "me/none", out)
    monkeypatch.setattr(sharing, "LARGEST_BESIDE", 98)
    assert [path.name for path in sharing.pull("me/large", tmp_path / "alone").files] == [file.NAME]
    monkeypatch.setattr(file, "LARGEST_FILE", 99)
    assert "an adapter at most 99: not pulled" in refused("adapter", "pull", "me/large", out)
    assert not out.exists()


def test_no_token_no_network_and_no_repository_are_told(
    hub: Hub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert "me/absent cannot be pulled from: " in refused("adapter", "pull", "me/absent", out)
    assert "cannot be pulled from: " in refused("adapter", "pull", "no name", out)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert f"{NAME} cannot be pushed to: " in refused("adapter", "push", adapter, NAME)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "needs a token of the Hub: `hf auth login` once, or set HF_TOKEN" in refused(
        "adapter", "push", adapter, NAME
    )
    assert hub.repositories == {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert f"{NAME} cannot be pulled from: " in refused("adapter", "pull", NAME, out)
    assert not out.exists()
