"""Decoding in helper processes: a file that crashes or hangs a decoder ends its helper, not the run.

A helper is a fresh interpreter that imports what it is asked to call, never the caller's script; it ends with the
process that started it. Requests and answers are pickled between processes of this package alone.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any, Self, TypeVar

from inflate.data.video import Embedded, Media
from inflate.errors import DataError

T = TypeVar("T")
START_SECONDS = 120.0
"""How long a helper may take to start; importing the codecs takes seconds on a busy machine."""


class Helpers:
    """As many helper processes as there are processors, for threads that each need one at a time."""

    def __init__(self, seconds: float | None, count: int | None = None) -> None:
        """seconds: how long one file may take; None calls in this process, without any guard."""
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # training processes on this machine
        self.seconds, self.count = seconds, count or min(8, max(1, (os.cpu_count() or 1) // beside))
        self._idle: queue.SimpleQueue[Helper] = queue.SimpleQueue()
        self._all = [Helper() for _ in range(self.count)] if seconds is not None else []
        for helper in self._all:
            self._idle.put(helper)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for helper in self._all:
            helper.stop()

    def call(self, media: Media, function: Callable[..., T], *args: Any) -> T:
        """`function(media, *args)`, a module's function; DataError naming the media if it crashes or takes too long.

        Called by no more threads than there are helpers.
        """
        if self.seconds is None:
            return function(media, *args)
        helper = self._idle.get()
        try:
            return helper.call(self.seconds, media, function, *args)
        finally:
            self._idle.put(helper)


class Helper:
    """One helper process, started at the first call, and again after a file has ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None

    def call(self, seconds: float, media: Media, function: Callable[..., T], *args: Any) -> T:
        """As `Helpers.call`."""
        line = self._line or self._start()
        try:
            line.send((function, (_portable(media), *args)))
            if not line.poll(seconds):
                self.stop()
                raise DataError(
                    f"{media}: not decoded within data.seconds_per_clip={seconds:g} s; raise it if the clip is sound"
                )
            answer = line.recv()
        except (EOFError, ConnectionError):
            raise DataError(f"{media}: crashes the decoder ({self._end()})") from None
        if isinstance(answer, DataError):
            raise answer
        return answer[0]

    def stop(self) -> None:
        """End the process, whatever it is at."""
        if self._process is not None and self._line is not None:
            self._process.kill()
            self._end()

    def _start(self) -> Connection:
        line, theirs = Pipe()
        script = "import sys; from inflate.data.isolation import serve; serve(int(sys.argv[1]))"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, "-c", script, str(number)]
            self._process = subprocess.Popen(command, env=environment, pass_fds=[number], stdin=subprocess.DEVNULL)
        self._line = line
        try:
            ready = line.poll(START_SECONDS) and line.recv()
        except (EOFError, ConnectionError):
            ready = False
        if not ready:
            self.stop()
            raise DataError(
                "the process that decodes clips does not start (its error stands above); "
                "data.seconds_per_clip=null decodes in this one, unguarded"
            )
        return line

    def _end(self) -> str:
        """Wait for the process and forget it; how it ended, in words."""
        assert self._process is not None
        assert self._line is not None
        status = self._process.wait()
        self._line.close()
        self._process = self._line = None
        return signal.Signals(-status).name if status < 0 else f"status {status}"


def serve(number: int) -> None:
    """Answer requests over the connection of this file number until its other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who asked will close the line
    from inflate.data import preflight  # noqa: F401 -- what is asked for: imported before the clock runs

    with Connection(number) as line:
        line.send(True)
        while True:
            try:
                function, args = line.recv()
            except EOFError:
                return
            line.send(_answer(function, args))


def _answer(function: Callable[..., T], args: tuple[Any, ...]) -> tuple[T] | DataError:
    """What the function returns, in a tuple, or the error that the caller is to raise; any other ends the helper."""
    try:
        return (function(*args),)
    except DataError as error:
        return error


def _portable(media: Media) -> Media:
    """The media without the table that it is a row of."""
    if not isinstance(media, Embedded):
        return media
    return Embedded([{media.column: {"bytes": media.load()}}], 0, media.column, media.name)
