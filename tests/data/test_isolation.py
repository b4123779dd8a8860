"""Helper processes: what ends them is named, and the next call goes on."""

from __future__ import annotations

import os

import pytest
from clip_files import numbered

from inflate.data.clips import ClipDataset
from inflate.data.isolation import Helpers
from inflate.data.settings import Data
from inflate.data.video import Embedded, probe
from inflate.errors import DataError

HANGS, CRASHES = "__import__('time').sleep(60)", "__import__('os').abort()"


def test_a_helper_survives_what_its_calls_do_not():
    with Helpers(0.5, count=1) as helpers:
        with pytest.raises(DataError, match=r"sleep\(60\): not decoded within data\.seconds_per_clip=0\.5 s"):
            helpers.call(HANGS, eval)
        with pytest.raises(DataError, match=r"abort\(\): crashes the decoder \(SIGABRT\)"):
            helpers.call(CRASHES, eval)
        [helper] = helpers._all
        assert helpers.call("good.mp4", os.fspath) == "good.mp4"
        process = helper._process
        with pytest.raises(DataError, match=r"absent\.mp4: no such file"):
            helpers.call("absent.mp4", probe)
        assert helper._process is process  # an error that is told ends nothing
    assert process.poll() is not None


def test_rows_of_a_table_travel_without_the_table(make_clip):
    path = make_clip("a.mp4", numbered(6))
    table = [{"video": {"bytes": path.read_bytes()}, "heavy": lambda: "not to be pickled"}]
    with Helpers(60.0, count=1) as helpers:
        assert helpers.call(Embedded(table, 0, "video", "set[0]"), probe) == probe(path)


def test_without_a_limit_nothing_is_started():
    with Helpers(None) as helpers:
        assert helpers.call("x", os.fspath) == "x"
        assert helpers._all == []


def test_clips_are_checked_alike_with_and_without_helpers(make_clip, tmp_path):
    for number in range(3):
        make_clip(f"clips/{number}.mp4", numbered(8 + number, 32, 32))
    (tmp_path / "clips" / "bad.mp4").write_bytes(b"no video")
    settings = {"path": str(tmp_path / "clips"), "frames": 4, "height": 32, "width": 32, "captions": "optional"}
    guarded, plain = (ClipDataset(Data(**settings, max_dropped=0.5, seconds_per_clip=limit)) for limit in (60.0, None))
    assert guarded.preflight.table() == plain.preflight.table()
    assert guarded._decoded.frames.keys() == plain._decoded.frames.keys()
    assert all((guarded._decoded.frames[name] == plain._decoded.frames[name]).all() for name in plain._decoded.frames)
