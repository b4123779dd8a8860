"""The exceptions a user can meet, as a tree.

    InflateError
        ConfigError       a setting is unknown, missing, of the wrong type, or contradicts another
        SurgeryError      a 2D model cannot be inflated as asked
        DataError         a clip, caption file or dataset cannot be used
        CheckpointError   weights or a run's state cannot be read or written
            DiskError     the disk does not take what a run writes
        TrainingError     a run cannot start or go on
            NotFiniteError  a loss, a gradient or a weight is not finite

Each message names the file or setting and the remedy. Commands print it, with the notes that were added to it on its
way, and exit with status 1.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit status of a command stopped by Ctrl-C: 128 + SIGINT."""


class InflateError(Exception):
    """Base of every error that a user can mend."""


class ConfigError(InflateError):
    """A setting is unknown, missing, of the wrong type, or contradicts another."""


class SurgeryError(InflateError):
    """A 2D model cannot be inflated as asked; it is left untouched."""


class DataError(InflateError):
    """A clip, caption file or dataset cannot be used."""


class CheckpointError(InflateError):
    """Weights or a run's state cannot be read or written."""


class DiskError(CheckpointError):
    """The disk does not take what a run writes; the message names the last whole checkpoint."""


class TrainingError(InflateError):
    """A run cannot start or go on."""


class NotFiniteError(TrainingError):
    """A loss, a gradient or a weight is not finite: whoever repeats the step meets it again."""


class Interrupted(KeyboardInterrupt):
    """A second signal has given up the running step of a run."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name} again: stopped at once")
        self.status = 128 + number


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn an `InflateError` into its text on standard error and exit status 1, Ctrl-C into status 130.

    Use it as a decorator of a command's function, or around a block.
    """
    try:
        yield
    except InflateError as error:
        sys.stderr.write(f"error: {text_of(error)}\n")
        sys.exit(1)
    except KeyboardInterrupt as error:
        sys.stderr.write(f"{text_of(error) or 'interrupted'}\n")
        sys.exit(error.status if isinstance(error, Interrupted) else INTERRUPTED)


def text_of(error: BaseException) -> str:
    """The message and the notes of an error, line by line, indented from the second line on."""
    texts = [str(error), *getattr(error, "__notes__", ())]
    return "\n  ".join(line.strip() for text in texts for line in text.splitlines() if line.strip())
