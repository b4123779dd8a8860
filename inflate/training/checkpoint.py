"""Checkpoints that are whole or do not exist.

    checkpoint-100/
        unet.safetensors             trainable parameters and buffers of the player `unet`
        unet.average.safetensors     its averaged weights, if the run keeps them
        unet.optimizer.pt            its optimiser's state
        state.json                   step, fingerprint of what fixes the data order, settings, history
        manifest.json                SHA-256 of every other file; written last

Of weights that are spread over N processes there may be, in place of each of the first three, as many files as shares
(training.sharded_checkpoints): unet.1-of-N.safetensors holds the rows of process 0, and so on; joined, they are the
whole one's. Any number of processes goes on with either.
`inflate.files` writes them aside: a process killed at any time leaves the last one whole.
"""

from __future__ import annotations

import glob
import json
import logging
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from inflate.errors import CheckpointError, DiskError, InflateError
from inflate.files import discard, flush, new_folder, remove_leftovers, sha256
from inflate.training.player import Trainee
from inflate.training.processes import together
from inflate.training.sharding import place_of, share, whole

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
    """What a checkpoint holds of one trainee: whole tensors, or one process's shares of them."""

    name: str
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    optimizer: Mapping[int, Mapping[str, Any]]
    share: str = ""
    """Which share of how many it is, as its files are called."""


def own_contents(one: Trainee) -> Contents | None:
    """What this process holds of a trainee whose weights are spread; None where another group's process writes it.

    What is whole in every process the first one writes.
    """
    like = next(iter(one.spread.values()))
    place, count = place_of(like)
    if like.device_mesh.get_rank() != place:
        return None
    weights = one.parameters | (one.buffers() if place == 0 else {})
    return Contents(one.player.name, weights, one.average, one.states(), f".{place + 1}-of-{count}")


def contents(one: Trainee) -> Contents:
    """What of a trainee is to be saved. Every process calls it; the main one may then save alone.

    Spread tensors are gathered one by one into the main process's memory: trained in fp32, a weight takes 12 bytes
    there, 16 with an average, until they are written. All is gathered before anything is written, so that a full disk
    leaves no process waiting for a tensor.
    """
    names = one.places()
    return Contents(
        one.player.name,
        {name: whole(tensor, one.spread.get(name)) for name, tensor in (one.parameters | one.buffers()).items()},
        {name: whole(tensor, one.spread.get(name)) for name, tensor in one.average.items()},
        {place: _whole_state(values, one, names[place]) for place, values in one.states().items()},
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
    with _new_checkpoint(output, state, keep, set() if known is None else known) as (aside, digests):
        for one in trained:
            digests |= _write(aside, one)
    return output / f"checkpoint-{state.step}"


def save_shares(
    output: Path, state: State, own: Sequence[Contents], main: bool, keep: int = 0, known: set[Path] | None = None
) -> None:
    """The same of weights that are spread: every process calls it, and writes its `own` into the one folder.

    The `main` one makes the folder, and puts it into its place when all have written. Where a process cannot write, or
    is lost, no new checkpoint comes about.
    """
    with ExitStack() as stack:
        with together():
            new = _new_checkpoint(output, state, keep, set() if known is None else known)
            aside, digests = stack.enter_context(new) if main else (output, {})
        [name] = broadcast_object_list([aside.name])
        with together(), writing(output / name, output):
            found = [_write(output / name, one) for one in own]
        for written in gather_object(found):
            digests |= written


@contextmanager
def _new_checkpoint(output: Path, state: State, keep: int, known: set[Path]) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield a folder to write to, and a place for the digests of what is written; on success it is a checkpoint."""
    folder = output / f"checkpoint-{state.step}"
    with writing(folder, output):
        remove_leftovers(output, "checkpoint-*")
        with new_folder(folder) as aside:
            manifest: dict[str, str] = {}
            yield aside, manifest
            (aside / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
            manifest["state.json"] = sha256(aside / "state.json")
            (aside / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
        known.add(folder)
        for stale in superseded(folder, keep, known) if keep else []:
            discard(stale)


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


def _write(folder: Path, one: Contents) -> dict[str, str]:
    """Write a trainee's files, force them to the disk, and give their digests by name."""
    paths = [folder / f"{one.name}{one.share}.safetensors", folder / f"{one.name}.optimizer{one.share}.pt"]
    save_file(_portable(one.weights), paths[0])
    with paths[1].open("wb") as file:  # by name, torch would not say why it cannot write
        torch.save(one.optimizer, file)
    if one.average:
        paths.append(folder / f"{one.name}.average{one.share}.safetensors")
        save_file(_portable(one.average), paths[-1])
    for path in paths:
        flush(path)
    return {path.name: sha256(path) for path in paths}


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
    steps = [_copier(_files(folder, name, "safetensors"), one.parameters | one.buffers(), one.spread)]
    if one.average:
        steps.append(_copier(_files(folder, f"{name}.average", "safetensors"), one.average, one.spread))
    saved = _read_states(_files(folder, f"{name}.optimizer", "pt"), mapped=bool(one.spread))
    state = {}
    for place, name in enumerate(one.places()):
        if place in saved[0]:
            values = _joined_state([each[place] for each in saved])
            state[place] = _own_state(values, one.spread[name]) if name in one.spread else values
    return [*steps, lambda: one.load_states(state)]


def _files(folder: Path, name: str, kind: str) -> list[Path]:
    """The file `name.kind`, or those of the processes that wrote a share each, in their order."""
    shares = [*folder.glob(f"{glob.escape(name)}.1-of-*.{kind}")]
    if not shares:
        return [folder / f"{name}.{kind}"]
    count = int(shares[0].stem.rpartition("-")[2])
    return [folder / f"{name}.{place + 1}-of-{count}.{kind}" for place in range(count)]


def _read_states(paths: Sequence[Path], mapped: bool) -> list[dict[int, dict[str, Any]]]:
    """The optimiser's state of each file, `mapped` into memory rather than read."""
    states = []
    for path in paths:
        try:
            states.append(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    return states


def _joined_state(shares: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an optimiser keeps for a parameter: single numbers are the same in every share."""
    first = shares[0]
    return {
        key: _joined([each[key] for each in shares]) if isinstance(value, Tensor) and value.ndim else value
        for key, value in first.items()
    }


def _joined(shares: Sequence[Tensor]) -> Tensor:
    """The whole of a tensor that was saved in shares of its rows."""
    return torch.cat([*shares]) if len(shares) > 1 else shares[0]


def _copier(paths: Sequence[Path], targets: Mapping[str, Tensor], spread: Mapping[str, DTensor]) -> Callable[[], None]:
    saved: dict[str, list[Tensor]] = {}
    for path in paths:
        try:
            tensors = load_file(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        for name, tensor in tensors.items():
            saved.setdefault(name, []).append(tensor)
    shapes = {name: spread.get(name, target).shape for name, target in targets.items()}
    faults = [f"missing {name}" for name in targets.keys() - saved.keys()]
    faults += [f"surplus {name}" for name in saved.keys() - targets.keys()]
    faults += [
        f"{name} is {found}, not {tuple(shape)}"
        for name, shape in shapes.items()
        if name in saved and (found := _shape(saved[name])) != tuple(shape)
    ]
    if faults:
        raise CheckpointError(f"{paths[0]} does not fit the network: {'; '.join(sorted(faults))}")

    def copy() -> None:
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(share(_joined(saved[name]), spread.get(name)))

    return copy


def _shape(shares: Sequence[Tensor]) -> tuple[int, ...]:
    """The shape of the whole of a tensor that was saved in shares of its rows."""
    if len(shares) == 1:
        return tuple(shares[0].shape)
    return sum(len(each) for each in shares), *shares[0].shape[1:]
