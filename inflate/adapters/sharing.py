"""Adapters on the Hugging Face Hub: pushed with their card, pulled as safetensors and text alone.

Of a repository the adapter's file, its card and its sheet of samples are taken, each up to a size; the file is checked
as any stranger's before it gets its name.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.errors import HFValidationError, HTTPError  # of whichever library the Hub's speaks HTTP by

from inflate.adapters import card, file, foreign
from inflate.errors import CheckpointError
from inflate.files import new_folder

LARGEST_BESIDE = 16 * 2**20
"""Bytes of a card or a sheet of samples; a larger one is left where it is."""


@dataclass(frozen=True)
class Pulled:
    """What came from the Hub."""

    revision: str
    """the commit"""
    files: list[Path]


def push(path: Path, name: str, private: bool = False) -> str:
    """Upload an adapter to owner/name, which is made if need be; the address of what was committed.

    The card and the samples beside the file go with it; a file without a card gets one made of what it tells.
    CheckpointError for a file that is no adapter or tells too little for a card, without a token of the Hub, without
    network, and where the Hub refuses.
    """
    adapter, text = file.read(path), path.with_name(card.NAME)
    samples = path.with_name(card.SAMPLES)
    written: Path | bytes = text if text.is_file() else card.text(adapter, samples.is_file()).encode()
    if get_token() is None:
        raise CheckpointError(f"pushing to {name} needs a token of the Hub: `hf auth login` once, or set HF_TOKEN")
    operations = [CommitOperationAdd(file.NAME, path), CommitOperationAdd(card.NAME, written)]
    operations += [CommitOperationAdd(card.SAMPLES, samples)] if samples.is_file() else []
    api = HfApi()
    with _telling(name, "pushed to"):
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.create_commit(name, operations, commit_message=f"Add {adapter.kind} adapter").commit_url)


def pull(name: str, folder: Path, revision: str | None = None) -> Pulled:
    """Download the adapter of owner/name, its card and its samples into a new folder.

    CheckpointError for a folder that exists, without network, for a repository that does not exist, holds no adapter
    or several, and for a file that is too large or no adapter.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; choose another name")
    with tempfile.TemporaryDirectory() as cache:
        with _telling(name, "pulled from"):
            found = HfApi().model_info(name, revision=revision)
            commit, held = str(found.sha), [one.rfilename for one in found.siblings or ()]
            weights = _weights(name, held)
            beside = [one for one in (card.NAME, card.SAMPLES) if one in held]
            taken = {weights: file.LARGEST_FILE, **dict.fromkeys(beside, LARGEST_BESIDE)}
            kept = [each for each, most in taken.items() if _is_small(name, each, commit, most, each == weights)]
            got = {each: Path(hf_hub_download(name, each, revision=commit, cache_dir=cache)) for each in kept}
        file.read_tensors(got[weights], foreign.ANY_NAME)
        names = {weights: file.NAME}
        with new_folder(folder) as aside:
            for each, where in got.items():
                shutil.copyfile(where, aside / names.get(each, each))
    return Pulled(commit, [folder / names.get(each, each) for each in got])


def _weights(name: str, held: Sequence[str]) -> str:
    """The adapter's file among those of a repository."""
    found = [one for one in held if one.endswith(".safetensors")]
    if file.NAME in found:
        return file.NAME
    if len(found) != 1:
        raise CheckpointError(
            f"{name} holds no {file.NAME} and {len(found)} other .safetensors files ({', '.join(found[:3])}): it is no "
            "adapter's repository"
        )
    return found[0]


def _is_small(name: str, each: str, commit: str, most: int, needed: bool) -> bool:
    """Whether a file is no larger than `most`; CheckpointError where it is, and is needed."""
    size = get_hf_file_metadata(hf_hub_url(name, each, revision=commit)).size
    fits = size is not None and size <= most
    if needed and not fits:
        raise CheckpointError(f"{name}: {each} has {size or 'unknown'} bytes, an adapter at most {most:,}: not pulled")
    return fits


@contextmanager
def _telling(name: str, done: str) -> Iterator[None]:
    """Turn what the Hub or the network refuses into a CheckpointError that says so in a line."""
    try:
        yield
    except (HTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{name} cannot be {done}: {reason}") from error
