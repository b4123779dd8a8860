"""Tensors under keys, on disk: safetensors shards, each beside a Parquet index of its own.

    shard-<name>.safetensors     tensors, named <key>/<name>
    shard-<name>.parquet         what they are and the CRC-32 of each of their rows; written last

Both are written aside and renamed, so that a process killed at any time leaves what was there, and several processes
may write into one folder: none changes another's files. A shard without its index is not read.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from inflate.errors import DataError
from inflate.files import new_file, remove_leftovers

if TYPE_CHECKING:  # torch takes seconds to import, and an index alone needs none of it
    from torch import Tensor

SHARD_BYTES = 2**28
"""A shard is written as soon as it holds so many bytes."""
SHARD_SECONDS = 60.0
"""A shard is written at the latest when so long has passed since the last: what a killed process loses."""

MOST_OPEN = 256
"""Shards that one process has open: systems allow a process about a thousand files."""


Checks = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Entry:
    """What the index says of one key."""

    shard: Path
    facts: Mapping[str, Any]
    """what the writer noted, as in JSON"""
    checks: Mapping[str, Checks]
    """CRC-32 of each row, along the first axis, of each tensor"""


class Store:
    """Entries by key. Reading checks every row that it returns; `put` keeps new entries until `flush` writes them."""

    def __init__(self, folder: Path) -> None:
        """Read the indexes of a folder, which need not exist yet; DataError for one that cannot be read."""
        self.folder, self.entries = folder, _read_indexes(folder)
        self._tensors: dict[str, Tensor] = {}
        self._new: dict[str, tuple[Mapping[str, Any], dict[str, Checks]]] = {}
        self._bytes, self._flushed = 0, time.monotonic()
        self._open: dict[Path, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.entries or key in self._new

    def facts(self, key: str) -> Mapping[str, Any] | None:
        """What is noted of a key, if it is known."""
        if key in self._new:
            return self._new[key][0]
        return self.entries[key].facts if key in self.entries else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def rows(self, key: str, name: str, numbers: Sequence[int]) -> Tensor:
        """Rows of a tensor, stacked; DataError for a row that is not what was written."""
        import torch
        from safetensors import SafetensorError

        entry = self.entries[key]
        try:
            held = self._shard(entry.shard).get_slice(f"{key}/{name}")
            found = torch.cat([held[run.start : run.stop] for run in _runs(numbers)])
        except (SafetensorError, OSError) as error:
            raise DataError(f"{entry.shard}: damaged: {error}; {_REMEDY}") from error
        for number, check in zip(numbers, row_checks(found), strict=True):
            if check != entry.checks[name][number]:
                raise DataError(f"{entry.shard}: damaged: row {number} of {name} of {key} changed; {_REMEDY}")
        return found

    def put(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Add an entry: tensors with a first axis of rows, and what to note of them. DataError where a write fails."""
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._new[key] = facts, {name: row_checks(tensor) for name, tensor in kept.items()}
        self._tensors |= {f"{key}/{name}": tensor for name, tensor in kept.items()}
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._flushed >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was put since the last time, the shard first; DataError where that fails."""
        if self._new:
            name = hashlib.blake2b("\n".join(sorted(self._new)).encode(), digest_size=12).hexdigest()
            shard = self.folder / f"shard-{name}.safetensors"
            _write(shard, self._tensors, self._new)
            self.entries |= {key: Entry(shard, facts, checks) for key, (facts, checks) in self._new.items()}
        self._tensors, self._new, self._bytes, self._flushed = {}, {}, 0, time.monotonic()

    def tidy(self) -> None:
        """Remove what killed processes left. Nobody may be writing: those of other machines look dead from here."""
        remove_leftovers(self.folder, "shard-*")

    def damaged(self) -> dict[str, str]:
        """The keys of all entries that do not read as they were written, with the reason."""
        found = {}
        for key, entry in self.entries.items():
            try:
                for name, checks in entry.checks.items():
                    for part in _parts(len(checks)):
                        self.rows(key, name, part)
            except DataError as error:
                found[key] = str(error)
        return found

    def keep(self, keys: Iterable[str]) -> int:
        """Remove all entries but these, second copies, and shards without an index; the number of entries removed.

        What is kept of a shard that loses some is checked and written anew.
        """
        wanted, gone = set(keys), 0
        for shard in sorted(self.folder.glob("shard-*.safetensors")):
            held = _read_index(_index_of(shard)) if _index_of(shard).is_file() else {}
            kept = [key for key in held if key in wanted and self.entries[key].shard == shard]
            lost = [key for key in held if key not in wanted]
            if not held or len(kept) < len(held):
                gone += len(lost)
                self._rewrite(shard, kept, lost)
        return gone

    def _rewrite(self, shard: Path, kept: Sequence[str], lost: Sequence[str]) -> None:
        """Move the entries that are kept to a new shard, then remove the old one, its index first."""
        for key in kept:
            entry = self.entries[key]
            tensors = {name: self.rows(key, name, range(len(checks))) for name, checks in entry.checks.items()}
            self.put(key, tensors, entry.facts)
        self.flush()
        for key in lost:
            self.entries.pop(key, None)
        self._open.pop(shard, None)
        for file in (_index_of(shard), shard):
            file.unlink(missing_ok=True)

    def _shard(self, shard: Path) -> Any:
        from safetensors import safe_open

        if shard not in self._open:
            while len(self._open) >= MOST_OPEN:
                del self._open[next(iter(self._open))]
            self._open[shard] = safe_open(shard, framework="pt")
        return self._open[shard]


_REMEDY = "`inflate data cache ... --verify` with the same settings encodes what is damaged anew"
_ROWS_TOGETHER = 64


def row_checks(tensor: Tensor) -> Checks:
    """The CRC-32 of each row along the first axis."""
    import torch

    rows = tensor.contiguous().reshape(len(tensor), -1)
    if not rows.numel():
        return np.zeros(len(tensor), np.uint32)
    return np.array([zlib.crc32(row) for row in rows.view(torch.uint8).numpy()], np.uint32)


def _checks(columns: Iterable[tuple[str, Sequence[int]]]) -> dict[str, Checks]:
    """A row's checks by name, as arrays: Python's own numbers take nine times the memory, in an index of many clips."""
    return {name: np.array(values, np.uint32) for name, values in columns}


def _runs(numbers: Sequence[int]) -> Iterator[range]:
    """The numbers as ranges of neighbours."""
    cuts = [0, *(place for place, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1), len(numbers)]
    return (range(numbers[start], numbers[stop - 1] + 1) for start, stop in pairwise(cuts))


def _parts(count: int) -> Iterator[range]:
    return (range(start, min(count, start + _ROWS_TOGETHER)) for start in range(0, count, _ROWS_TOGETHER))


def _index_of(shard: Path) -> Path:
    return shard.with_suffix(".parquet")


def _write(shard: Path, tensors: dict[str, Tensor], entries: Mapping[str, tuple[Mapping[str, Any], Any]]) -> None:
    import pyarrow
    import pyarrow.parquet
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    rows = [
        {"key": key, "facts": json.dumps(facts), "checks": list(checks.items())}
        for key, (facts, checks) in entries.items()
    ]
    checks = pyarrow.map_(pyarrow.string(), pyarrow.list_(pyarrow.uint32()))
    schema = pyarrow.schema([("key", pyarrow.string()), ("facts", pyarrow.string()), ("checks", checks)])
    try:
        with new_file(shard) as aside:
            save_file(tensors, aside)
        with new_file(_index_of(shard)) as aside:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), aside, write_page_checksum=True)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{shard.parent}: cannot be written: {error}; what was cached before is whole; free space or name another "
            "folder (data.cache), and start again"
        ) from error


def _read_indexes(folder: Path) -> dict[str, Entry]:
    """The entries of all indexes of a folder whose shards are there."""
    entries: dict[str, Entry] = {}
    for file in sorted(folder.glob("shard-*.parquet")):
        if file.with_suffix(".safetensors").is_file():
            entries |= _read_index(file)
    return entries


def _read_index(file: Path) -> dict[str, Entry]:
    """The entries of one index; DataError where it is damaged."""
    import pyarrow
    import pyarrow.parquet

    shard = file.with_suffix(".safetensors")
    try:
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True).read().to_pylist()
        return {row["key"]: Entry(shard, json.loads(row["facts"]), _checks(row["checks"])) for row in table}
    except (pyarrow.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{file}: damaged: {error}; delete it and start `inflate data cache` again") from error
