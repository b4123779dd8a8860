"""The exceptions a user can meet, as a tree.

    InflateError
        ConfigError       a setting is unknown, missing, of the wrong type, or contradicts another
        SurgeryError      a 2D model cannot be inflated as asked
        DataError         a clip, caption file or dataset cannot be used
        CheckpointError   weights or a run's state cannot be read or written
        TrainingError     a run cannot start or go on

Each message names the file or setting and the remedy. Commands print it as one line and exit with status 1.
"""

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


class TrainingError(InflateError):
    """A run cannot start or go on."""


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn an `InflateError` into one line on standard error and exit status 1, Ctrl-C into status 130.

    Use it as a decorator of a command's function, or around a block.
    """
    try:
        yield
    except InflateError as error:
        sys.stderr.write(f"error: {_one_line(error)}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)


def _one_line(error: InflateError) -> str:
    return " ".join(str(error).split())
