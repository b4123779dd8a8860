"""Checkpoints that are whole or do not exist.

    checkpoint-100/
        unet.safetensors             trainable parameters and buffers of the player `unet`
        unet.average.safetensors     its averaged weights, if the run keeps them
        unet.optimizer.pt            its optimiser's state
        state.json                   step, fingerprint of what fixes the data order, settings, history
        manifest.json                SHA-256 of every other file; written last

`inflate.files` writes them aside: a process killed at any time leaves the last one whole.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from inflate.errors import CheckpointError, DiskError, InflateError
from inflate.files import discard, new_folder, remove_leftovers, sha256
from inflate.training.player import Trainee
from inflate.training.sharding import share, whole

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)")

CLIPS_PER_STEP = "training.batch x training.accumulate x processes"
"""What fixes which clips an optimiser step sees; a run may go on with other factors of the same product."""


@dataclass
class State:
    """Where a run stands."""

    step: int = 0
    fingerprint: dict[str, int | str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """All that the run was started with, by dotted name."""
    directory: str = ""
    """The folder that relative paths among them start from."""
    history: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)
    scaler: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds of one trainee, in whole tensors."""

    name: str
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    optimizer: Mapping[int, Mapping[str, Any]]


def contents(one: Trainee) -> Contents:
    """What of a trainee is to be saved. Every process calls it; the main one may then save alone.

    Spread tensors are gathered one by one into the main process's memory: trained in fp32, a weight takes 12 bytes
    there, 16 with an average, until they are written. All is gathered before anything is written, so that a full disk
    leaves no process waiting for a tensor.
    """
    state = one.optimizer.state_dict()["state"]
    return Contents(
        one.player.name,
        {name: whole(tensor, one.spread.get(name)) for name, tensor in (one.parameters | one.buffers()).items()},
        {name: whole(tensor, one.spread.get(name)) for name, tensor in one.average.items()},
        {
            place: _whole_state(values, one, name)
            for place, name in enumerate(one.places())
            if (values := state.get(place))
        },
    )


def _whole_state(values: Mapping[str, Any], one: Trainee, name: str) -> dict[str, Any]:
    """What the optimiser keeps for a parameter: tensors of as many rows as its share are shares, others are whole."""
    like, share = one.spread.get(name), one.parameters[name]
    return {key: whole(value, like) if _is_share(value, share) else value for key, value in values.items()}


def _own_state(values: Mapping[str, Any], like: DTensor) -> dict[str, Any]:
    """The reverse of `_whole_state` for a parameter that is spread."""
    return {key: share(value, like) if _is_share(value, like) else value for key, value in values.items()}


def _is_share(value: Any, parameter: Tensor) -> bool:
    """Whether a part of a parameter's state has its rows."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(parameter)


def save(
    output: Path, state: State, trained: Sequence[Contents], keep: int = 0, known: set[Path] | None = None
) -> Path:
    """Write `checkpoint-<step>` into the output folder, then remove all but the newest whole ones, `keep` (0 = all).

    `known` are folders that need no reading to be called whole; those found whole join them.
    Raises DiskError if the folder cannot be written; an older checkpoint is then untouched.
    """
    folder, known = output / f"checkpoint-{state.step}", set() if known is None else known
    with writing(folder, output):
        remove_leftovers(output, "checkpoint-*")
        with new_folder(folder) as aside:
            for one in trained:
                _write(aside, one)
            (aside / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
            manifest = {path.name: sha256(path) for path in sorted(aside.iterdir())}
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        known.add(folder)
        for stale in superseded(folder, keep, known) if keep else []:
            discard(stale)
    return folder


def superseded(folder: Path, keep: int, known: set[Path]) -> list[Path]:
    """What `keep` whole checkpoints up to the one just written make needless; nothing while there are fewer of them.

    Later ones are needless, too: a run passes over them only where they are damaged.
    """
    every = numbered(folder.parent)
    kept: list[Path] = []
    for one in reversed(every[: every.index(folder) + 1]):
        if len(kept) < keep and (one in known or is_whole(one)):
            known.add(one)
            kept.append(one)
    return [one for one in every if one not in kept] if len(kept) == keep else []


def size(trainees: Sequence[Trainee]) -> int:
    """Bytes of a checkpoint, about: weights, buffers and averages, and the two moments that AdamW keeps of a weight."""
    return sum(
        _bytes(one.parameters, one) + _moments(one) + _bytes(one.buffers(), one) + _bytes(one.average, one)
        for one in trainees
    )


def _moments(one: Trainee) -> int:
    least = 1 if one.settings.optimizer == "adamw8bit" else 4  # bytes of each
    sizes = [(one.spread.get(name, p).numel(), p.element_size()) for name, p in one.parameters.items()]
    return sum(2 * count * (least if least == 1 else max(least, width)) for count, width in sizes)


def _bytes(tensors: Mapping[str, Tensor], one: Trainee) -> int:
    """Bytes of tensors, those of which this process holds a share counted whole."""
    return sum(one.spread.get(name, tensor).numel() * tensor.element_size() for name, tensor in tensors.items())


def _write(folder: Path, one: Contents) -> None:
    save_file(_portable(one.weights), folder / f"{one.name}.safetensors")
    if one.average:
        save_file(_portable(one.average), folder / f"{one.name}.average.safetensors")
    with (folder / f"{one.name}.optimizer.pt").open("wb") as file:  # by name, torch would not say why it cannot write
        torch.save(one.optimizer, file)


def _portable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def numbered(output: Path) -> list[Path]:
    """Folders `checkpoint-<number>` in order of steps, whole or not; a file of such a name is something else."""
    found = [(NAME.fullmatch(path.name), path) for path in output.iterdir()] if output.is_dir() else []
    return [path for _, path in sorted((int(name[1]), path) for name, path in found if name and path.is_dir())]


def nearest(output: Path, step: int) -> Path | None:
    """The checkpoint whose step is nearest to one, of two equally near the earlier; None where there is none."""
    return min(
        numbered(output), key=lambda folder: abs(int(folder.name.removeprefix("checkpoint-")) - step), default=None
    )


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file of the manifest is there with its recorded digest."""
    if not folder.is_dir() or not any(folder.iterdir()):
        raise CheckpointError(f"{folder} is no checkpoint; name a folder checkpoint-N of a run, or latest")
    try:
        manifest: dict[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        damaged = [name for name, digest in manifest.items() if sha256(folder / name) != digest]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {error}; resume from another one") from error
    if damaged:
        raise CheckpointError(f"{folder} is damaged: {', '.join(damaged)} changed; resume from another one")


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is as it was written."""
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True


def latest(output: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None if it has none at all.

    Damaged ones are passed over with a warning in the log; CheckpointError if all are damaged.
    """
    faults = []
    for folder in reversed(numbered(output)):
        try:
            verify(folder)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
            faults.append(error)
        else:
            return folder
    if faults:
        raise faults[0]
    return None


def to_go_on_from(output: Path) -> str:
    """In words for an error: the last whole checkpoint of a run and how to go on from it, or that there is none."""
    try:
        found = latest(output)
    except CheckpointError:
        return f"none of the checkpoints in {output} is whole"
    if found is None:
        return f"there is no checkpoint in {output}"
    return f"the last whole checkpoint is {found}: training.resume=latest goes on from it"


@contextmanager
def writing(path: Path, output: Path) -> Iterator[None]:
    """Turn a refusal of the disk into a DiskError that names `path`, which the block writes, and what is safe.

    `output` is the run's folder. What else goes wrong inside is left as it is.
    """
    try:
        yield
    except (OSError, SafetensorError, InflateError, RuntimeError) as error:
        reason = _refusal(error)
        if reason is None:
            raise
        remedy = "free space, or make it writable, or name another training.output"
        raise DiskError(f"{path} cannot be written: {reason}; {remedy}\n{to_go_on_from(output)}") from error


def _refusal(error: BaseException | None) -> str | None:
    """What the system said, where it is why an error came about: torch and the encoders raise errors of their own."""
    while error is not None:
        if isinstance(error, OSError | SafetensorError):
            return (isinstance(error, OSError) and error.strerror) or str(error)
        error = error.__cause__ or error.__context__
    return None


def read_state(folder: Path) -> State:
    """Where the run stood when a checkpoint, already verified, was written."""
    try:
        return State(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'state.json'} cannot be read: {error}") from error


def check_fingerprint(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming every fact whose change would alter what the resumed run sees or holds."""
    changed = [name for name in [*now, *(then.keys() - now.keys())] if then.get(name) != now.get(name)]
    if CLIPS_PER_STEP in changed:
        raise CheckpointError(
            f"{folder}: {CLIPS_PER_STEP} was {then.get(CLIPS_PER_STEP)}, is {now.get(CLIPS_PER_STEP)}: set "
            f"training.batch and training.accumulate so that it is {then.get(CLIPS_PER_STEP)} again, such as half the "
            "processes with twice the accumulation, or start a new output"
        )
    if changed:
        changes = "; ".join(f"{name} was {then.get(name, 'absent')}, is {now.get(name, 'absent')}" for name in changed)
        raise CheckpointError(f"{folder} was made with other settings: {changes}; put them back, or start a new output")


def load(folder: Path, trainees: Sequence[Trainee]) -> None:
    """Put a verified checkpoint's weights, averages and optimiser states into the trainees; check all, then change.

    Raises CheckpointError listing missing, surplus and misshapen tensors, or naming the file that cannot be read.
    """
    steps = [step for one in trainees for step in _load_trainee(folder, one)]
    for step in steps:
        step()


def _load_trainee(folder: Path, one: Trainee) -> list[Callable[[], None]]:
    name = one.player.name
    steps = [_copier(folder / f"{name}.safetensors", one.parameters | one.buffers(), one.spread)]
    if one.average:
        steps.append(_copier(folder / f"{name}.average.safetensors", one.average, one.spread))
    path = folder / f"{name}.optimizer.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=bool(one.spread))
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    # the groups hold settings, and those are the present run's
    groups = one.optimizer.state_dict()["param_groups"]
    for place, name in enumerate(one.places()):
        if place in state and name in one.spread:
            state[place] = _own_state(state[place], one.spread[name])
    return [*steps, lambda: one.optimizer.load_state_dict({"state": state, "param_groups": groups})]


def _copier(path: Path, targets: Mapping[str, Tensor], spread: Mapping[str, DTensor]) -> Callable[[], None]:
    shapes = {name: spread.get(name, target).shape for name, target in targets.items()}
    try:
        tensors = load_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    faults = [f"missing {name}" for name in targets.keys() - tensors.keys()]
    faults += [f"surplus {name}" for name in tensors.keys() - targets.keys()]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if faults:
        raise CheckpointError(f"{path} does not fit the network: {'; '.join(sorted(faults))}")

    def copy() -> None:
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(share(tensors[name], spread.get(name)))

    return copy
