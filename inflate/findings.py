"""What the checks of a machine or a cluster find: one line each, and whether all passed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from inflate.errors import InflateError

Verdict = Literal["ok", "warning", "FAILED"]


@dataclass(frozen=True)
class Finding:
    """What one check found, and what mends it."""

    found: str
    remedy: str = ""
    verdict: Verdict = "ok"

    def line(self, name: str) -> str:
        """`verdict  name: found (remedy)`, on one line."""
        remedy = f" ({self.remedy})" if self.remedy else ""
        return " ".join([f"{self.verdict:8}", *f"{name}: {self.found}{remedy}".split()])


Checks = Mapping[str, Callable[[], Finding]]


def warning(found: str, remedy: str) -> Finding:
    """A finding that slows or limits training."""
    return Finding(found, remedy, "warning")


def failed(found: str, remedy: str = "") -> Finding:
    """A finding that training cannot do with."""
    return Finding(found, remedy, "FAILED")


def all_pass(checks: Checks, caught: tuple[type[Exception], ...], say: Callable[[str], None]) -> bool:
    """Make the checks in turn and `say` a line for each; whether none failed. An exception that is caught is a failure.

    Raises what is not `caught`.
    """
    verdicts = []
    for name, check in checks.items():
        try:
            finding = check()
        except caught as error:
            finding = failed(str(error) if isinstance(error, InflateError) else f"{type(error).__name__}: {error}")
        say(finding.line(name))
        verdicts.append(finding.verdict)
    return "FAILED" not in verdicts


def quieten() -> None:
    """Keep the bars and notes of diffusers and transformers off the terminal; call it before models are imported."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    for logging in (diffusers, transformers):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
