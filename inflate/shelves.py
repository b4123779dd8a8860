"""The shelves that a user edits (recipes, adapters, datasets): where they are, and a copy of them to work in.

They travel beside the package, never in it: a package called `datasets` would hide Hugging Face's.
"""

import shutil
import sysconfig
from pathlib import Path

from inflate.errors import ConfigError

SHELVES = ("recipes", "adapters", "datasets")
PATTERNS = ("*.py", "*.yaml", "*.md", "*.safetensors", "accelerate/*.yaml", "accelerate/*.md")
"""What belongs to a shelf; a checkout's may hold rendered clips and caches too. pyproject.toml repeats the list."""


def find() -> Path:
    """Return the folder that holds the shelves: the source checkout, else the environment's share/inflate.

    Raises `ConfigError` where neither has them.
    """
    for folder in _candidates():
        if all((folder / shelf).is_dir() for shelf in SHELVES):
            return folder
    raise ConfigError("the recipes were not installed with the package: install it again, or use a source checkout")


def copy(into: Path) -> list[Path]:
    """Copy the shelves into the folder `into`, made if need be, and return the new folders.

    Raises `ConfigError`, before anything is written, where one of them exists already or `into` cannot be written.
    """
    source = find()
    targets = [into / shelf for shelf in SHELVES]
    for target in targets:
        if target.exists():
            raise ConfigError(f"{target} exists already; choose another folder, or move it away")
    try:
        for target in targets:
            _copy_files(source / target.name, target)
    except OSError as error:
        raise ConfigError(f"{into}: cannot be written ({error.strerror or error})") from None
    return targets


def _copy_files(source: Path, target: Path) -> None:
    for file in (file for pattern in PATTERNS for file in source.glob(pattern)):
        copied = target / file.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copied)


def _candidates() -> list[Path]:
    package = Path(__file__).parent
    data = [Path(sysconfig.get_path("data")), Path(sysconfig.get_path("data", sysconfig.get_preferred_scheme("user")))]
    # pip install --target puts share/ beside the package
    installed = [folder / "share" / "inflate" for folder in (*data, package.parent)]
    return [package.parent, *installed] if (package.parent / "pyproject.toml").is_file() else installed
