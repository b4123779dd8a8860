"""Compares this implementation with recorded outputs of the original ones.

    python tests/parity.py DIR [NAME ...]

prints one line per case of the folder and of the folders in it, `name difference tolerance`, and at the end `N cases`.
A file that it does not recognise, that of a model which is not built here included, a case that it cannot run, an empty
folder, or no case at all is a failure (exit status 1). With names, only the recordings that begin with one of them are
compared, and a name that fits none is a failure; those of a folder within begin with its name, as in `tiny_a/unet`.
Everything about a model is read from the configuration beside its recording, so that recordings of other sizes run as
they are.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import parity_dynamicrafter
import parity_i2vgenxl
import parity_i2vgenxl_unets
import parity_modelscope
import parity_svd
from parity_cases import EXACT, RECORDED, RECORDED64, WEIGHTS, Case, Runner
from safetensors import SafetensorError

from inflate.errors import InflateError

DAMAGED = (
    InflateError, SafetensorError, AssertionError, LookupError, RuntimeError, OSError, ValueError, TypeError,
)  # fmt: skip
"""What comparing a recording that is cut short, or of another form than described, raises."""


def cases(folder: Path, names: Sequence[str] = ()) -> Iterator[Case]:
    """All cases of a folder, or those of recordings that begin with one of `names`.

    A file of no known kind, a kind that cannot be run, or a name of no file is a case that fails.
    """
    found = stems(folder)
    for name in names:
        if not any(stem.startswith(name) for stem in found):
            yield Case(f"{name}: no such recording", math.inf, EXACT)
    for stem in found:
        if not names or stem.startswith(tuple(names)):
            yield from cases_of(folder, stem)


def cases_of(folder: Path, stem: str) -> Iterator[Case]:
    """The cases of one recording of a folder, or of a folder in it."""
    file = folder / stem
    above, found = stem.removesuffix(file.name), False
    try:
        runner = runner_of(file.parent, file.name)
        if runner is None:
            yield Case(f"{stem}: unknown file", math.inf, EXACT)
            return
        for case in runner(file.parent, file.name):
            found = True
            yield case._replace(name=f"{above}{case.name}")
        if not found:
            yield Case(f"{stem}: no case", math.inf, EXACT)
    except DAMAGED as error:
        yield Case(f"{stem}: {type(error).__name__} {error}".replace("\n", " "), math.inf, EXACT)


def stems(folder: Path) -> list[str]:
    """The recordings of a folder and of those in it, each under one name whatever the number of its files.

    Other files, and folders with nothing in them, go by their whole name.
    """
    found: dict[str, None] = {}
    for file in sorted(folder.iterdir()):
        if file.is_dir():
            found.update(dict.fromkeys([f"{file.name}/{stem}" for stem in stems(file)] or [f"{file.name}/"]))
        elif file.name != "README.md":
            found[_stem(file.name)] = None
    return list(found)


def _stem(name: str) -> str:
    ending = next((ending for ending in (RECORDED64, RECORDED, WEIGHTS, ".json") if name.endswith(ending)), "")
    return name.removesuffix(ending)


def runner_of(folder: Path, stem: str) -> Runner | None:
    """What compares a recording of a folder; None where there is nothing that knows it."""
    own = parity_dynamicrafter.runner_of(folder, stem)
    if own is not None or not (folder / f"{stem}.json").is_file():
        return own
    exact: dict[str, Runner] = {
        "state_keys_svd_sgm": parity_svd.sgm_key_cases,
        "state_keys_svd_diffusers": parity_svd.diffusers_key_cases,
        "key_map_svd_sgm_to_diffusers": parity_svd.key_map_cases,
        "schedules": parity_i2vgenxl.schedule_cases,
        "state_keys_modelscope_i2v": parity_modelscope.vgen_key_cases,
        "state_keys_modelscope_v2v": parity_modelscope.vgen_key_cases,
        "state_keys_vgen_sr600": parity_modelscope.vgen_key_cases,
        "state_keys_vgen": parity_modelscope.vgen_key_cases,
        "state_keys_diffusers": parity_i2vgenxl_unets.diffusers_key_cases,
        "state_map_vgen_to_diffusers": parity_i2vgenxl_unets.key_map_cases,
    }
    by_prefix: dict[str, Runner] = {
        "unet": parity_svd.unet_cases,
        "decoder": parity_svd.decoder_cases,
        "edm": parity_svd.edm_cases,
        "disc": parity_svd.discriminator_cases,
        "msbase": parity_modelscope.modelscope_cases,
        "base": parity_i2vgenxl.model_cases,
        "refine": parity_i2vgenxl.model_cases,
    }
    return exact.get(stem) or by_prefix.get(stem.split("_")[0])


def main(arguments: list[str]) -> int:
    """Prints every case and their number; 1 where one failed, none was found, or the folder is missing."""
    if not arguments or not Path(arguments[0]).is_dir():
        print("usage: python tests/parity.py DIR [NAME ...]", file=sys.stderr)
        return 1
    failed = number = 0
    for case in cases(Path(arguments[0]), arguments[1:]):
        number += 1
        failed += not case.passed
        print(f"{case.name} {case.difference:.3g} {case.tolerance:g}{'' if case.passed else '  FAILED'}", flush=True)
    print(f"{number} cases")
    return int(failed > 0 or number == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
