"""Files of adapters: what is written is read, and what a stranger may send is refused with its reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_adapter import output, trained, video_unet

from inflate.adapters import attach, file
from inflate.adapters.settings import KINDS
from inflate.errors import CheckpointError

MODULE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
UP, DOWN = f"unet.{MODULE}.lora_B.weight", f"unet.{MODULE}.lora_A.weight"


def small(**changes: Any) -> file.Adapter:
    tensors = {DOWN: torch.ones(2, 4), UP: torch.ones(3, 2)}
    return replace(file.Adapter(tensors, "lora", {MODULE: 2}, {MODULE: 1.5}, {"licence": "MIT"}), **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(kind: str, path: Path) -> None:
    adapter = trained(kind).adapter
    file.write(path, adapter)
    read = file.read(path)
    assert (read.kind, read.rank, read.alpha, read.about) == (kind, adapter.rank, adapter.alpha, adapter.about)
    assert read.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(value, adapter.tensors[name]) for name, value in read.tensors.items())


def test_diffusers_learns_of_rank_and_alpha(path: Path) -> None:
    adapter = trained("rslora").adapter
    file.write(path, adapter)
    with safe_open(path, "pt") as opened:
        told = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (told["unet.r"], told["unet.lora_alpha"], told["unet.use_rslora"]) == (2, 3.0, True)
    unet = video_unet()
    unet.load_lora_adapter(path.parent, weight_name=path.name, prefix="unet")  # without, it looks at no header
    ours = video_unet()
    attach.load(ours, file.read(path))
    assert float((output(unet) - output(ours)).abs().max()) <= 1e-5


def test_what_stands_there_is_not_overwritten_unless_told(path: Path) -> None:
    file.write(path, small())
    with pytest.raises(CheckpointError, match="exists already"):
        file.write(path, small())
    file.write(path, small(about={}), overwrite=True)
    assert file.read(path).about == {}
    with pytest.raises(CheckpointError, match=r"ends in \.safetensors"):
        file.write(path.with_suffix(".bin"), small())
    with pytest.raises(CheckpointError, match="cannot be written"):
        file.write(path / "below.safetensors", small())
    assert [each.name for each in path.parent.iterdir()] == [path.name]


# --- files of others --------------------------------------------------------------------------------------------------


def test_a_file_without_alpha_is_refused_unless_it_is_given(path: Path) -> None:
    save_file(small().tensors, path)
    with pytest.raises(CheckpointError, match="does not say its alpha, without which its strength is a guess"):
        file.read(path)
    read = file.read(path, alpha=4)
    assert (read.kind, read.rank, read.alpha) == ("lora", {MODULE: 2}, {MODULE: 4.0})


def test_alphas_in_diffusers_words_are_honoured(path: Path) -> None:
    other = f"{MODULE[:-1]}k"
    tensors = small().tensors | {name.replace("to_q", "to_k"): value for name, value in small().tensors.items()}
    told = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_k": 2}, "unet.use_rslora": True}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(told)})
    read = file.read(path)
    assert (read.kind, read.alpha) == ("rslora", {MODULE: 8.0, other: 2.0})


def entries(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put(path: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def in_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def tamper(path: Path) -> None:
        header, data = entries(path)
        changed = change(header)
        put(path, header if changed is None else changed, data)

    return tamper


def in_words(**changes: Any) -> Callable[[Path], None]:
    def change(header: dict[str, Any]) -> None:
        told = json.loads(header["__metadata__"]["inflate"]) | changes
        header["__metadata__"]["inflate"] = json.dumps(told)

    return in_header(change)


def renamed(name: str) -> Callable[[Path], None]:
    return in_header(lambda header: header.update({name: header.pop(UP)}))


def entry(**changes: Any) -> Callable[[Path], None]:
    return in_header(lambda header: header[UP].update(changes))


def cut(by: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, path.stat().st_size - by)


def put_bytes(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def weights(**changes: torch.Tensor) -> Callable[[Path], None]:
    def tamper(path: Path) -> None:
        with safe_open(path, "pt") as opened:
            told = opened.metadata()
        save_file({**load_file(path), UP: changes["up"]}, path, told)

    return tamper


HUGE = 2**62
HOSTILE = {
    "cut short": (cut(4), "lies beyond the end of the file, which is cut short"),
    "cut in its header": (lambda path: os.truncate(path, 40), "cut short within its header"),
    "empty": (put_bytes(b""), "has 0 bytes and is no .safetensors file"),
    "a pickle": (put_bytes(b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix"), "its header claims"),
    "noise": (put_bytes((16).to_bytes(8, "little") + b"\xff" * 16), "its header is damaged"),
    "a header beyond all bounds": (put_bytes(HUGE.to_bytes(8, "little") + b"{}"), r"claims .* bytes, more than"),
    "a deep header": (put_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000), "its header is damaged"),
    "a list for a header": (in_header(lambda _: []), "its header is damaged"),
    "no tensor": (lambda path: put(path, {}, b""), "holds no tensors"),
    "a tensor of petabytes": (entry(shape=[2**40, 2**20]), "does not fill its place"),
    "a tensor elsewhere": (entry(data_offsets=[HUGE, HUGE + 24]), "lies beyond the end"),
    "a tensor before the file": (entry(data_offsets=[-24, 0]), "no proper shape and place"),
    "a shape below zero": (entry(shape=[-3, -2]), "no proper shape and place"),
    "a shape of fractions": (entry(shape=[3.0, 2]), "no proper shape and place"),
    "overlapping tensors": (entry(data_offsets=[0, 24]), "overlaps another tensor"),
    "bytes of nobody": (lambda path: path.write_bytes(path.read_bytes() + b"xx") and None, "belong to none"),
    "integers": (entry(dtype="I32"), "is of type I32; weights are F64, F32"),
    "a path for a name": (renamed("unet.../../../etc/passwd.lora_B.weight"), "is no name of a UNet's adapter"),
    "an absolute name": (renamed("/etc/passwd"), "'/etc/passwd' is no name"),
    "a name with a null": (renamed(f"unet.{MODULE}\0.lora_B.weight"), r"x00.* is no name"),
    "a name without end": (renamed("unet." + "a." * 999 + "lora_B.weight"), "is no name"),
    "another program's names": (renamed("lora_unet_mid_block_attn1_to_q.lora_up.weight"), "inflate adapter convert"),
    "words that are no text": (in_header(lambda header: header["__metadata__"].update(inflate=5)), "is not text by"),
    "words that are no JSON": (in_header(lambda h: h["__metadata__"].update(inflate="{")), "not of format 1"),
    "words of tomorrow": (in_words(format=2), "not of format 1; .*update it"),
    "an unknown kind": (in_words(kind="eval"), "is of kind eval"),
    "another rank": (in_words(rank={MODULE: 4}), r"is \(\d, \d\), not of the rank 4 that it tells"),
    "no rank": (in_words(rank={MODULE: "2"}), "does not say its ranks"),
    "no alpha": (in_words(alpha={}), "does not say its alphas"),
    "an alpha that is no number": (in_words(alpha={MODULE: float("nan")}), "does not say its alphas"),
    "another module": (in_words(rank={"a.b": 2}, alpha={"a.b": 1.0}), "tells of other modules than it holds"),
    "a damaged base": (in_words(base={"name": ["x"]}), "what it says of its base is damaged"),
    "a damaged curve": (in_words(held_out=[1]), "what it says of its held_out is damaged"),
    "a value that is not finite": (weights(up=torch.full((3, 2), float("nan"))), "lora_B.weight is not finite"),
    "a factor without sides": (weights(up=torch.ones(6)), r"is \(6,\), not of the rank 2"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_strange_file_is_refused_with_its_reason(name: str, path: Path) -> None:
    tamper, message = HOSTILE[name]
    file.write(path, small())
    tamper(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        file.read(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(path: Path) -> None:
    file.write(path, small())
    os.truncate(path, file.LARGEST_FILE + 1)  # a hole, which takes no room
    with pytest.raises(CheckpointError, match="this is something else"):
        file.read(path)


def test_other_formats_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="other formats can execute code"):
        file.read(tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="No such file"):
        file.read(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        file.read(tmp_path / "b.safetensors")
