"""The commands of adapters and the option that samples with them: answers, files, one line for each mistake."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from test_cli import inflate, refused
from tiny_adapter import settings, train

from helpers import randomise, write_image_model
from inflate.adapters import attach, bases, card, file, targets, verify
from inflate.adapters.settings import AdapterSettings
from inflate.errors import CheckpointError
from inflate.families import svd
from inflate.families.svd import SVD
from inflate.training.adapting import Adapting


@dataclass(frozen=True)
class Made:
    """A base, and an adapter of it."""

    base: Path
    adapter: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("made")
    family, wanted = SVD.load(write_image_model(root / "image")), settings()
    randomise(family.unet)
    family.save_pretrained(root / "base")
    about = {"family": "svd", "base": {"name": str(root / "base"), "sha256": bases.sha256(family.unet)}}
    attach.create(family.unet, wanted, targets.resolve(family.unet, wanted))
    train(family.unet)
    adapter = attach.carried(family.unet, wanted, {**about, "reference": verify.reference(family.unet)})
    file.write(root / "a.safetensors", adapter)
    return Made(root / "base", root / "a.safetensors")


def told(result: object) -> str:
    assert result.exit_code == 0, result.output  # type: ignore[attr-defined]
    return result.stdout  # type: ignore[attr-defined]


def test_show_tells_what_the_file_tells(made: Made) -> None:
    lines = told(inflate("adapter", "show", made.adapter)).splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines)
    assert facts["kind"] == "lora"
    assert facts["base"].startswith(f"{made.base} (SHA-256 ")
    assert facts["verified"].startswith("not yet")


def test_show_of_a_model_knows_adapters_too(made: Made, tmp_path: Path) -> None:
    assert told(inflate("show", made.adapter)) == told(inflate("adapter", "show", made.adapter))
    made_anew = tmp_path / "small.safetensors"
    told(inflate("adapter", "resize", made.adapter, "-o", made_anew, "--rank", 1))
    line = next(each for each in told(inflate("show", made_anew)).splitlines() if each.startswith("made "))
    assert line.split(maxsplit=1)[1].startswith(f'by "resize", of "{made.adapter.name}", rank 1, lost 0.')
    told(inflate("adapter", "convert", made.adapter, tmp_path / "kohya.safetensors", "--to", "kohya"))
    assert "`inflate adapter convert` knows the spellings" in refused("show", tmp_path / "kohya.safetensors")


def test_show_prints_no_strangers_control_characters(made: Made, tmp_path: Path) -> None:
    adapter = file.read(made.adapter)
    base = {"name": "x\x1b[2J\x07\nverified  yes", "sha256": "0"}
    file.write(tmp_path / "a.safetensors", replace(adapter, about={"base": base, "licence": "MIT\r"}))
    text = told(inflate("adapter", "show", tmp_path / "a.safetensors"))
    assert text.replace("\n", "").isprintable()
    assert not any(line.startswith("verified  yes") for line in text.splitlines())


def test_verify_repeats_the_proof(made: Made, tmp_path: Path) -> None:
    assert "from what was trained" in told(inflate("adapter", "verify", made.adapter))
    assert "which is not on this disk: name it by --base" in refused(
        "adapter", "verify", moved(made, tmp_path / "a.safetensors", {"name": "owner/name", "sha256": "0"})
    )
    other = moved(made, tmp_path / "b.safetensors", {"name": str(made.base), "sha256": "0" * 64})
    assert "add --any-base" in refused("adapter", "verify", other)
    assert inflate("adapter", "verify", other, "--any-base").exit_code == 0


def moved(made: Made, path: Path, base: dict[str, str]) -> Path:
    adapter = file.read(made.adapter)
    file.write(path, replace(adapter, about={**adapter.about, "base": base}))
    return path


def test_a_base_over_another_image_model_is_named_whole(tmp_path: Path) -> None:
    image, other, layers = (tmp_path / name for name in ("image", "other", "layers"))
    SVD.load(write_image_model(image)).save_temporal(layers, str(image))
    look = UNet2DConditionModel.from_pretrained(write_image_model(other) / "unet")
    look.conv_out.bias.data.add_(1)
    look.save_pretrained(other / "unet")
    unet, wanted = SVD.load(layers, image_model=other).unet, AdapterSettings("lora", rank=1, targets=["attn1.to_q"])
    adapter = Adapting.on(unet, wanted, svd.FAMILY, str(layers), seed=0, image_model=str(other))
    assert adapter
    for tensor in attach.tensors(unet).values():
        tensor.fill_(0.1)
    adapter.export(unet, tmp_path)

    assert f" on {layers} over {other}: 0.0e+00 from" in told(inflate("adapter", "verify", tmp_path / file.NAME))
    assert f"made on {layers} over {other} (" in refused("adapter", "verify", tmp_path / file.NAME, "--base", layers)
    use = card.use(adapter.about)
    assert use.splitlines()[1].endswith(f" -o out.mp4 --image-model {other}")
    assert f'SVD.load("{layers}", image_model="{other}")' in use
    base = {**adapter.about["base"], "image_model": "owner/name"}
    adapter = file.Adapter({}, "lora", {}, {}, {"base": base})
    with pytest.raises(CheckpointError, match=r"owner/name, which is not on .*convert .* OUT --image-model owner/name"):
        bases.settings_of(adapter, "a stranger's file", None)


def test_merged_and_unmerged_models_are_written(made: Made, tmp_path: Path) -> None:
    merged, again = tmp_path / "merged", tmp_path / "again"
    told(inflate("adapter", "merge", made.base, made.adapter, "-o", merged))
    beside = SVD.load(made.base)
    attach.load(beside.unet, file.read(made.adapter))
    apart = verify.output(SVD.load(merged).unet) - verify.output(beside.unet)
    assert float(apart.abs().max()) <= 1e-4
    told(inflate("adapter", "unmerge", merged, made.adapter, "-o", again))
    torch.testing.assert_close(
        SVD.load(again).unet.state_dict(), SVD.load(made.base).unet.state_dict(), atol=1e-6, rtol=0
    )
    assert "does not hold" in refused("adapter", "unmerge", made.base, made.adapter, "-o", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert "exists already" in refused("adapter", "merge", made.base, made.adapter, "-o", merged)
    assert "add --any-base" in refused("adapter", "merge", merged, made.adapter, "-o", tmp_path / "none")


def test_sampling_takes_adapters_in_weights(made: Made, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(photo)
    common = ("sample", made.base, photo, "--steps", 2, "--frames", 2, "--height", 16, "--width", 16)
    weights = {"none": (), "zero": (":0",), "whole": ("",), "two": (":0.5", ":0.5")}
    for name, each in weights.items():
        named = [option for weight in each for option in ("--adapter", f"{made.adapter}{weight}")]
        told(inflate(*common, "-o", tmp_path / f"{name}.mp4", *named))
    sheets = {name: (tmp_path / f"{name}.png").read_bytes() for name in weights}
    assert sheets["zero"] == sheets["none"] != sheets["whole"]
    levels = {name: np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in weights}
    assert np.abs(levels["two"] - levels["whole"]).max() <= 1 < np.abs(levels["none"] - levels["whole"]).max()
    file.write(tmp_path / "run" / "export" / file.NAME, file.read(made.adapter))
    told(inflate(*common, "-o", tmp_path / "named.mp4", "--adapter", f"{tmp_path / 'run'}:1"))
    assert (tmp_path / "named.png").read_bytes() == sheets["whole"]
    assert "no adapter dolly_left: there is none of" in refused(
        *common, "-o", tmp_path / "x.mp4", "--adapter", "dolly_left:0.8"
    )
    assert "write FILE or FILE:WEIGHT" in refused(*common, "-o", tmp_path / "x.mp4", "--adapter", f"{made.adapter}:big")
    other = moved(made, tmp_path / "b.safetensors", {"name": "other", "sha256": "0" * 64})
    assert "was made on other" in refused(*common, "-o", tmp_path / "x.mp4", "--adapter", other)
    told(inflate(*common, "-o", tmp_path / "x.mp4", "--adapter", other, "--any-base"))
