"""The rules of the layout: what is a package, what imports what, and that every card holds known settings."""

from __future__ import annotations

import ast
import importlib.machinery
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file

from helpers import load_recipe
from inflate import shelves
from inflate.config import check, help_text, load

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(ROOT.glob("recipes/*_finetune.py"))
DATASETS = sorted(ROOT.glob("datasets/*.yaml"))
ADAPTERS = sorted(ROOT.glob("adapters/*.yaml"))
LAUNCHES = sorted(ROOT.glob("recipes/accelerate/*.yaml"))
RECIPE_SETTINGS = sorted(ROOT.glob("recipes/*.yaml"))

BASE = {"config", "errors", "files", "tables"}
MIDDLE = {"models", "surgery", "objectives", "data", "metrics", "layers"} | BASE
ARROWS = {
    "__init__": set(),
    "errors": set(),
    "files": set(),
    "config": {"errors", "aliases"},
    "shelves": {"errors"},
    "layers": {"layers"} | BASE,
    "models": MIDDLE,
    "surgery": MIDDLE,
    "objectives": MIDDLE,
    "data": MIDDLE,
    "metrics": MIDDLE | {"measures"},
    "families": MIDDLE | {"families"},
    "sampling": MIDDLE | {"families", "sampling"},
    "adapters": MIDDLE | {"families", "adapters", "catalogue", "formats", "shelves", "__init__"},
    "training": MIDDLE | {"families", "sampling", "training", "adapters", "curves", "measures", "shelves", "__init__"},
    "options": {"errors"},
    "adapter_cli": {"adapters", "formats", "options", "training"} | BASE,
    "pages": set(),
    "story": {"options", "pages"} | BASE,
    "animation": MIDDLE | {"catalogue", "families", "formats", "options", "sampling"},
    "shooting": MIDDLE | {"animation", "story"},
    "sample_options": {"options"},
    "drawing": MIDDLE | {"adapters", "animation", "families", "options"},
    "refining": MIDDLE | {"animation", "families", "sampling"},
    "refine_cli": MIDDLE | {"adapters", "animation", "drawing", "options", "refining", "sampling"},
    "sample_cli": MIDDLE
    | {
        "adapters",
        "animation",
        "comparison",
        "drawing",
        "families",
        "options",
        "refining",
        "sample_options",
        "sampling",
        "shooting",
        "story",
    },
    "aliases": {"errors"},
    "curves": {"files", "measures"},
    "measures": set(),
    "tables": set(),
    "__main__": {"cli"},
    "runs": {"config", "errors", "measures", "tables"},
    "sweep": {"runs"} | BASE,
    "planning": MIDDLE | {"families", "training", "sweep"},
    "fitting": {"planning", "tables", "training", "errors"},
    "findings": {"errors"},
    "installation": MIDDLE | {"families", "training", "findings"},
    "doctor": {"models", "training", "installation", "findings"} | BASE,
    "formats": set(),
    "catalogue": MIDDLE | {"families", "formats"},
    "conversion": MIDDLE | {"families", "catalogue", "formats"},
    "comparison": {"adapters", "data", "errors", "files", "models", "pages"},
    "cli": MIDDLE
    | {
        "adapters",
        "adapter_cli",
        "catalogue",
        "conversion",
        "formats",
        "families",
        "options",
        "refine_cli",
        "sample_cli",
        "training",
        "shelves",
        "curves",
        "fitting",
        "planning",
        "runs",
        "sweep",
        "findings",
        "installation",
        "__init__",
    },
}
"""What each part of the package may import from the package."""


def imports(file: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def part(name: str) -> str:
    """Return the part of the package that `inflate.part...` names; `__init__` for what the package itself holds."""
    words = [*name.split("."), "", ""]
    return (
        words[1]
        if (ROOT / "inflate" / words[1]).is_dir() or (ROOT / "inflate" / f"{words[1]}.py").is_file()
        else "__init__"
    )


def family(name: str) -> str:
    """Return the family that a module of `inflate.families` belongs to: svd for svd, svd_keys, svd_files."""
    families = ROOT / "inflate" / "families"
    words = name.split("_")
    stems = ["_".join(words[:count]) for count in range(1, len(words) + 1)]
    return next(stem for stem in stems if (families / f"{stem}.py").is_file())


def run(script: str) -> str:
    """Return what a fresh interpreter in the root prints."""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_only_inflate_is_a_package() -> None:
    packages = {file.relative_to(ROOT).parts[0] for file in ROOT.glob("*/**/__init__.py") if ".venv" not in file.parts}
    ours = packages & {"inflate", "recipes", "adapters", "datasets", "benchmarks", "tests"}
    assert ours == {"inflate"}


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {file.parent for file in (ROOT / "inflate").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_a_scripts_name_is_no_modules_name() -> None:
    stems = [script.stem for shelf in shelves.SHELVES for script in (ROOT / shelf).glob("*.py")]
    assert stems
    own = {str(ROOT / shelf) for shelf in shelves.SHELVES}  # benchmarks put the recipes' in the path
    others = [place for place in sys.path if str(Path(place).resolve()) not in own]
    assert [stem for stem in stems if importlib.machinery.PathFinder.find_spec(stem, others) is not None] == []


def test_datasets_is_hugging_faces_from_the_root_too() -> None:
    found = run("import importlib.util; print(importlib.util.find_spec('datasets').origin)")
    assert Path(found).is_file()
    assert not Path(found).is_relative_to(ROOT / "datasets")


@pytest.mark.parametrize(
    "statement", ["import inflate", "from inflate.cli import app; app(['--help'], standalone_mode=False)"]
)
def test_the_package_and_its_help_import_nothing_heavy(statement: str) -> None:
    printed = run(
        f"{statement}\nimport sys; print('heavy:', sorted({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    )
    assert printed.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize("file", sorted((ROOT / "inflate").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_downwards(file: Path) -> None:
    own = file.relative_to(ROOT / "inflate").parts[0].removesuffix(".py")
    for name in imports(file):
        top = name.split(".")[0]
        assert top not in {"recipes", "adapters", "benchmarks", "tests"}, f"{file} imports {name}"
        if top != "inflate":
            continue
        assert part(name) in ARROWS[own], f"{own} must not import {name}"
        if own == part(name) == "families" and file.stem != "__init__" and name.count(".") > 1:
            other = next(word for word in name.split(".")[2:])
            assert family(other) == family(file.stem), f"family {file.stem} imports {name}"


def test_each_recipe_explains_its_settings() -> None:
    assert RECIPES
    for recipe in RECIPES:
        text = help_text(load_recipe(recipe).Config)
        lines = [line for line in text.splitlines() if line.strip().endswith(":")]
        assert "training:" in lines


@pytest.mark.parametrize("file", RECIPE_SETTINGS, ids=lambda file: file.name)
def test_every_recipe_yaml_holds_settings_of_its_recipe(file: Path) -> None:
    recipes = [recipe for recipe in RECIPES if file.stem.startswith(recipe.stem.removesuffix("finetune"))]
    assert len(recipes) == 1, f"{file.name}: the name begins like no recipe's"
    schema = load_recipe(recipes[0]).Config
    assert load(schema, [str(file)]) is not None


def check_card(file: Path, recipe: Path) -> None:
    check(load_recipe(recipe).Config, [str(file)])
    assert file.read_text().startswith("#"), "a card begins with a comment that says what it does"


@pytest.mark.parametrize("file", DATASETS, ids=lambda file: file.name)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_every_dataset_fits_every_recipe(file: Path, recipe: Path) -> None:
    check_card(file, recipe)


@pytest.mark.parametrize("file", ADAPTERS, ids=lambda file: file.name)
def test_every_adapter_fits_the_recipes_that_have_its_groups(file: Path) -> None:
    groups = yaml.safe_load(file.read_text()).keys()
    fitting = [recipe for recipe in RECIPES if groups <= load_recipe(recipe).Config.__dataclass_fields__.keys()]
    assert fitting
    for recipe in fitting:
        check_card(file, recipe)


@pytest.mark.parametrize("file", LAUNCHES, ids=lambda file: file.name)
def test_every_launch_configuration_is_understood_by_accelerate_and_listed(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.num_processes >= 1
    assert file.read_text().startswith("#"), "it begins with a comment that says what it starts"
    assert f"| `{file.name}` |" in (file.parent / "README.md").read_text()


def test_the_launch_configurations_start_what_they_are_called() -> None:
    kinds = {file.stem: load_config_from_file(str(file)).distributed_type for file in LAUNCHES}
    assert kinds["one_gpu"] == DistributedType.NO
    assert kinds["ddp"] == DistributedType.MULTI_GPU


def test_the_wheel_carries_every_file_of_the_shelves() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = [pattern for group in project["tool"]["setuptools"]["data-files"].values() for pattern in group]
    ours = [f"{shelf}/{pattern}" for shelf in shelves.SHELVES for pattern in shelves.PATTERNS]
    for shelf in shelves.SHELVES:
        files = [file for pattern in shelves.PATTERNS for file in (ROOT / shelf).glob(pattern)]
        assert files
        for file in files:
            name = file.relative_to(ROOT).as_posix()
            assert any(fnmatch(name, pattern) for pattern in patterns), f"{name}: in no data-files line"
    assert set(patterns) <= set(ours)
