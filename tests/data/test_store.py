"""Shards and their indexes: what is written is read, what changed is noticed, what was cut short is not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from inflate.data import store
from inflate.data.store import Store
from inflate.errors import DataError


def filled(folder: Path, *keys: str) -> Store:
    made = Store(folder)
    for number, key in enumerate(keys):
        latents = torch.arange(24.0).reshape(6, 4) + 100 * number
        made.put(key, {"latents": latents, "motion": torch.ones(2, dtype=torch.float64)}, {"clip": f"{key}.mp4"})
    made.flush()
    return made


def test_rows_come_back_as_they_were_put(tmp_path: Path) -> None:
    filled(tmp_path, "a", "b")
    found = Store(tmp_path)
    assert torch.equal(found.rows("b", "latents", [1, 2, 2, 5]), (torch.arange(24.0).reshape(6, 4) + 100)[[1, 2, 2, 5]])
    assert found.rows("a", "motion", [1]).tolist() == [1.0]
    assert found.entries["a"].facts == {"clip": "a.mp4"}
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".parquet", ".safetensors"]
    assert found.damaged() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_precision_is_kept_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    made = Store(tmp_path)
    made.put("a", {"latents": values, "none": torch.empty(3, 0)}, {})
    made.flush()
    assert torch.equal(Store(tmp_path).rows("a", "latents", range(3)), values)


def test_a_flipped_byte_is_noticed_in_its_row_and_in_no_other(tmp_path: Path) -> None:
    made = filled(tmp_path, "a", "b")
    shard = made.entries["a"].shard
    content = bytearray(shard.read_bytes())
    place = content.index((torch.arange(24.0).reshape(6, 4) + 100)[3].numpy().tobytes())
    content[place] ^= 1
    shard.write_bytes(bytes(content))
    found = Store(tmp_path)
    assert torch.equal(found.rows("b", "latents", [2, 4]), (torch.arange(24.0).reshape(6, 4) + 100)[[2, 4]])
    with pytest.raises(DataError, match=rf"{shard.name}: damaged: row 3 of latents of b changed; `inflate data cache"):
        found.rows("b", "latents", [2, 3])
    assert list(found.damaged()) == ["b"]


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_damaged_shard_is_named(damage: str, tmp_path: Path) -> None:
    shard = filled(tmp_path, "a").entries["a"].shard
    content = shard.read_bytes()
    shard.write_bytes(content[:-40] if damage == "cut" else b"\xff" + content[1:])
    with pytest.raises(DataError, match=f"{shard.name}: damaged"):
        Store(tmp_path).rows("a", "latents", [0])


def test_a_damaged_index_is_named_and_one_without_its_shard_counts_for_nothing(tmp_path: Path) -> None:
    made = filled(tmp_path, "a")
    index = made.entries["a"].shard.with_suffix(".parquet")
    content = index.read_bytes()
    made.entries["a"].shard.unlink()
    assert "a" not in Store(tmp_path)
    index.write_bytes(content[:50])
    made.entries["a"].shard.touch()
    with pytest.raises(DataError, match=rf"{index.name}: damaged: .*delete it"):
        Store(tmp_path)


def test_no_flipped_byte_of_an_index_changes_what_was_noted(tmp_path: Path) -> None:
    """What decoding a file showed is noted there alone: no row of a shard would tell that it changed."""
    index = filled(tmp_path, "a").entries["a"].shard.with_suffix(".parquet")
    content, read = index.read_bytes(), []
    for place in range(0, len(content), 3):
        index.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with suppress(DataError):
            read += [entry.facts for entry in Store(tmp_path).entries.values()]
    assert 0 < len(read) < len(content), "some bytes of the footer say nothing that is read"
    assert [facts for facts in read if facts != {"clip": "a.mp4"}] == []


def test_a_shard_is_written_when_it_is_full_or_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", 200)
    made = Store(tmp_path)
    for key in "abc":
        made.put(key, {"latents": torch.zeros(6, 4)}, {})  # 96 bytes
    assert sorted(Store(tmp_path).entries) == ["a", "b", "c"]
    monkeypatch.setattr(store, "SHARD_SECONDS", 0.0)
    made.put("d", {"latents": torch.zeros(1, 1)}, {})
    assert "d" in Store(tmp_path)


def test_what_is_not_kept_goes_and_the_rest_stays_whole(tmp_path: Path) -> None:
    made = filled(tmp_path, "a", "b", "c")
    old = made.entries["a"].shard
    filled(tmp_path, "d")
    everything = Store(tmp_path)
    assert everything.keep(["b", "d", "other"]) == 2
    assert not old.exists()
    left = Store(tmp_path)
    assert sorted(left.entries) == ["b", "d"]
    assert left.damaged() == {}
    assert torch.equal(left.rows("b", "latents", [0]), torch.arange(4.0)[None] + 100)
    assert left.keep(["b", "d"]) == 0
    assert left.keep([]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_second_copy_and_a_shard_without_an_index_go_with_what_is_not_kept(tmp_path: Path) -> None:
    filled(tmp_path, "a", "b")
    filled(tmp_path, "a", "c")
    (tmp_path / "shard-0.safetensors").write_bytes(b"killed before its index")
    assert len(Store(tmp_path).entries) == 3
    assert Store(tmp_path).keep(["b"]) == 3
    left = Store(tmp_path)
    assert list(left.entries) == ["b"]
    assert left.damaged() == {}
    assert len(list(tmp_path.iterdir())) == 2


def test_only_so_many_shards_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", 1)
    monkeypatch.setattr(store, "MOST_OPEN", 2)
    made = Store(tmp_path)
    for number in range(4):
        made.put(str(number), {"latents": torch.full((1, 2), float(number))}, {})
    for number in (0, 1, 2, 3, 0):
        assert made.rows(str(number), "latents", [0]).tolist() == [[number, number]]
        assert len(made._open) <= 2


WRITER = """
import sys, torch
from pathlib import Path
from inflate.data import store
store.SHARD_BYTES = 1
made = store.Store(Path(sys.argv[1]))
for number in range(10**6):
    made.put(str(number), {"latents": torch.full((4, 1000), float(number))}, {})
    print(number, flush=True)
"""


def test_a_writer_killed_at_any_time_loses_only_what_it_had_not_written(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = [int(process.stdout.readline()) for _ in range(20)][-1]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = Store(tmp_path)
    assert {str(number) for number in range(last)} <= found.entries.keys()
    assert found.damaged() == {}
    found.tidy()
    assert not list(tmp_path.glob(".*"))


def test_what_another_machine_is_writing_is_left_alone(tmp_path: Path) -> None:
    """Its process has a number that nobody has here."""
    aside = tmp_path / ".shard-0.safetensors.99999999.partial"
    aside.touch()
    filled(tmp_path, "a")
    assert aside.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: cannot be written: .*data\.cache"):
        filled(tmp_path / "file", "a")
