"""What runs measure: which direction of a number is better, how time is shared out, and what a run's numbers tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Rows = Sequence[Mapping[str, float]]
"""Entries of a log, each with the key `step`; a name is missing where it was not measured."""

Share = Literal["data_wait", "encode", "forward", "backward", "update", "other"]
"""What the time of training goes into: `inflate.training.clock` defines each."""
SHARES: tuple[Share, ...] = get_args(Share)

BETTER = {
    "parent/": "", "bypassed": "", "without ": "", "held still": "", "static copy": "", "autoencoder": "",  # to compare
    "real/": "", "enlarged": "",
    "loss": "lower", "flicker": "lower", "spectrum_distance": "lower", "lpips": "lower", "fvd": "lower", "kvd": "lower",
    "psnr": "higher", "ssim": "higher", "frame 0": "higher", "frames 1-3": "higher",
    "direction": "higher", "prompt agreement": "higher", "frame consistency": "higher",
    "sharpness": "nearer 1", "frame change": "nearer real", "motion": "nearer real",
}  # fmt: skip
"""Which direction is better, by what a measure's name holds; the first that fits decides."""

TRAINING = {f"{kind}/psnr": f"training-clip {kind}/psnr" for kind in ("clean", "noisy")} | {
    "held-out loss": "training-clip loss"
}
"""Held-out measures, and the names of the same on training clips."""
RISE, EVALUATIONS = 0.02, 2
"""A held-out error is rising when so many measurements in a row, the last ones, exceed its least one by this share."""


def better(name: str) -> str:
    """Which direction of a measure is better: `lower`, `higher`, `nearer 1`, `nearer real`, or nothing."""
    return next((direction for words, direction in BETTER.items() if words in name), "")


def remark(name: str) -> str:
    """The same, in brackets behind a number."""
    return f"({better(name)} is better)" if better(name) else ""


@dataclass(frozen=True)
class Overfitting:
    """A held-out measure that gets worse while the same measure on training clips gets better."""

    measure: str
    step: int
    """where the held-out measure was best"""
    best: float
    last: float
    training_then: float
    """the measure on training clips at that step, and at the last one"""
    training_last: float
    checkpoint: str = ""
    """name of the checkpoint that is nearest to that step; empty where there is none"""

    def __str__(self) -> str:
        near = f"the nearest checkpoint is {self.checkpoint}" if self.checkpoint else "no checkpoint is kept"
        held_out = f"{self.measure} was best at step {self.step} and went from {self.best:.4g} to {self.last:.4g}"
        training = f"{TRAINING[self.measure]} from {self.training_then:.4g} to {self.training_last:.4g}"
        return f"overfitting: {held_out}, {training}; {near}"


def overfitting(rows: Rows) -> list[Overfitting]:
    """The measures that overfit at the end of a run's held-out rows: see RISE; on training clips the error fell.

    PSNR counts by the squared error that it stands for.
    """
    found = [_overfitting(rows, name) for name in TRAINING]
    return [one for one in found if one]


def _overfitting(every: Rows, name: str) -> Overfitting | None:
    training = TRAINING[name]
    rows = [row for row in every if name in row and training in row]
    errors, training_errors = ([_error(which, row[which]) for row in rows] for which in (name, training))
    place = errors.index(min(errors)) if errors else 0
    late = range(max(place + 1, len(rows) - EVALUATIONS), len(rows))
    rising = [errors[n] > (1 + RISE) * errors[place] and training_errors[n] < training_errors[place] for n in late]
    if len(rising) < EVALUATIONS or not all(rising):
        return None
    then, last = rows[place], rows[-1]
    return Overfitting(name, int(then["step"]), then[name], last[name], then[training], last[training])


def _error(name: str, value: float) -> float:
    """A measure as an error, which is better when lower."""
    return 10 ** (-value / 10) if better(name) == "higher" else value
