import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import MotionAdapter, UNetMotionModel
from safetensors.torch import load_file, save_file

from helpers import CROSS, randomise, tiny_unet_sd1, tiny_unet_sd2, tiny_unet_sdxl, unet_inputs
from inflate.errors import CheckpointError
from inflate.families import animatediff
from inflate.models.folders import plain
from inflate.models.unet import ANIMATEDIFF_V1, ANIMATEDIFF_V2, MODELSCOPE, VideoUNet

CLIP = replace(ANIMATEDIFF_V2, motion_norm="clip")
V1 = replace(ANIMATEDIFF_V1, motion_norm="clip")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(spec=CLIP, build=tiny_unet_sd1, **settings):
    unet = VideoUNet.from_2d(build(**settings), spec).eval()
    randomise(unet)
    return unet


def diffusers_unet():
    unet = UNetMotionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=CROSS,
        num_attention_heads=2,
        motion_max_seq_length=24,
        motion_num_attention_heads=4,
    ).eval()
    randomise(unet)
    return unet


def sizes(rows):
    """Conditions that Stable Diffusion XL is given besides the prompt, for that many clips or frames."""
    return {"text_embeds": torch.ones(rows, 16), "time_ids": torch.full((rows, 6), 32.0)}


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def predicted(unet, inputs, **more):
    """The prediction of diffusers' class for a clip (B,F,C,h,w), likewise; its context is per frame."""
    context = inputs["encoder_hidden_states"].repeat_interleave(inputs["sample"].shape[1], 0)
    return unet(inputs["sample"].transpose(1, 2), inputs["timestep"], context, **more).sample.transpose(1, 2)


@torch.no_grad()
def test_a_diffusers_folder_gives_its_outputs_and_goes_back_bit_for_bit(tmp_path):
    theirs = diffusers_unet()
    theirs.save_pretrained(tmp_path)
    ours = animatediff.load_diffusers(tmp_path)
    inputs = unet_inputs()
    expected = predicted(theirs, inputs)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(**inputs).sample, expected, atol=2e-5, rtol=0)
    back = animatediff.to_diffusers(ours)
    assert equal(back.state_dict(), theirs.state_dict())
    assert torch.equal(predicted(back, inputs), expected)
    as_trained = animatediff.load_diffusers(tmp_path, norm_over="frame")
    assert (as_trained(**inputs).sample - expected).abs().max() > 1e-3
    with pytest.raises(CheckpointError, match="UNetMotionModel has no place for: temporal motion_norm frame"):
        animatediff.to_diffusers(as_trained)


@torch.no_grad()
@pytest.mark.parametrize(("build", "spec"), [(tiny_unet_sd1, V1), (tiny_unet_sd2, CLIP), (tiny_unet_sdxl, V1)])
def test_an_inflated_model_goes_to_diffusers_and_back(build, spec, tmp_path):
    ours = trained(spec, build)
    theirs = animatediff.to_diffusers(ours)
    inputs = unet_inputs()
    xl = build is tiny_unet_sdxl
    expected = ours(**inputs, added_cond_kwargs=sizes(6) if xl else None).sample
    found = predicted(theirs, inputs, added_cond_kwargs=sizes(2) if xl else None)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    theirs.save_pretrained(tmp_path)
    again = animatediff.load_diffusers(tmp_path)
    assert again.spec == ours.spec
    assert equal(again.state_dict(), ours.state_dict())
    assert torch.equal(again(**inputs, added_cond_kwargs=sizes(6) if xl else None).sample, expected)


@torch.no_grad()
def test_motion_modules_alone_go_to_diffusers_and_onto_another_unet(tmp_path):
    ours, other = trained(CLIP), tiny_unet_sd1(seed=5)
    animatediff.save_adapter(ours, tmp_path / "adapter")
    moved = animatediff.load_adapter(other, tmp_path / "adapter")
    assert moved.spec == CLIP
    assert equal(animatediff.motion_modules(moved), animatediff.motion_modules(ours))
    assert all(torch.equal(moved.state_dict()[key], value) for key, value in other.state_dict().items())
    theirs = UNetMotionModel.from_unet2d(other, MotionAdapter.from_pretrained(tmp_path / "adapter")).eval()
    inputs = unet_inputs()
    expected = predicted(theirs, inputs)
    assert (expected - ours(**inputs).sample).abs().max() > 1e-2
    torch.testing.assert_close(moved(**inputs).sample, expected, atol=2e-5, rtol=0)
    animatediff.save_adapter(moved, tmp_path / "adapter")
    theirs.save_motion_modules(tmp_path / "theirs")
    files = [load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("adapter", "theirs")]
    assert equal(*files)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("adapter", "theirs")]
    assert plain(configs[0]) == plain(configs[1])


def test_the_original_names_go_there_and_back_and_mean_a_norm_per_frame(tmp_path):
    ours = trained(ANIMATEDIFF_V2)
    file = tmp_path / "motion.safetensors"
    animatediff.save_original(ours, file)
    written = load_file(file)
    module = "down_blocks.1.motion_modules.0.temporal_transformer."
    block = f"{module}transformer_blocks.0."
    expected = {f"{module}{part}.{kind}" for part in ("norm", "proj_in", "proj_out") for kind in ("weight", "bias")}
    expected |= {f"{block}{part}.{kind}" for part in ("norms.0", "norms.1", "ff_norm") for kind in ("weight", "bias")}
    expected |= {f"{block}ff.{part}.{kind}" for part in ("net.0.proj", "net.2") for kind in ("weight", "bias")}
    for attention in (f"{block}attention_blocks.0.", f"{block}attention_blocks.1."):
        expected |= {f"{attention}{part}.weight" for part in ("to_q", "to_k", "to_v", "to_out.0")}
        expected |= {f"{attention}to_out.0.bias", f"{attention}pos_encoder.pe"}
    assert {key for key in written if key.startswith(module)} == expected
    again = animatediff.load_original(tiny_unet_sd1(), file)
    assert again.spec == ANIMATEDIFF_V2
    assert equal(animatediff.motion_modules(again), animatediff.motion_modules(ours))
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in written.items()}}, tmp_path / "motion.ckpt")
    prefixed = animatediff.load_original(tiny_unet_sd1(), tmp_path / "motion.ckpt")
    assert equal(animatediff.motion_modules(prefixed), animatediff.motion_modules(ours))
    animatediff.save_original(again, file)
    assert equal(load_file(file), written)


def test_original_files_that_do_not_hold_motion_modules_are_refused(tmp_path):
    file = tmp_path / "motion.safetensors"
    animatediff.save_original(trained(ANIMATEDIFF_V2), file)
    written = load_file(file)
    written[next(key for key in written if key.endswith("attention_blocks.1.pos_encoder.pe"))] += 1
    save_file(written, file)
    with pytest.raises(CheckpointError, match="two attentions of a block other positions"):
        animatediff.load_original(tiny_unet_sd1(), file)
    file.write_bytes(file.read_bytes()[:100])
    torch.save(written, tmp_path / "cut.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:100])
    torch.save(Path("."), tmp_path / "object.ckpt")
    for unreadable in (file, tmp_path / "cut.ckpt", tmp_path / "object.ckpt"):
        with pytest.raises(CheckpointError, match=f"{unreadable.name} cannot be read"):
            animatediff.load_original(tiny_unet_sd1(), unreadable)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="no motion modules of AnimateDiff"):
        animatediff.load_original(tiny_unet_sd1(), file)


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_tensors_that_do_not_match_are_listed(change, tmp_path):
    animatediff.save_adapter(trained(), tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        tensors.pop("mid_block.motion_modules.0.proj_in.weight")
    else:
        tensors["mid_block.motion_modules.1.odd"] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"1 {change} \(mid_block\.motion_modules"):
        animatediff.load_adapter(tiny_unet_sd1(), tmp_path)


def write_adapter(folder, **settings):
    defaults = {"block_out_channels": (32, 64), "motion_layers_per_block": 1, "motion_norm_num_groups": 16}
    MotionAdapter(**{**defaults, **settings}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_out_channels": (32, 32)}, r"another UNet: block_out_channels \[32, 32\] instead of"),
        ({"motion_norm_num_groups": 8}, "another UNet: motion_norm_num_groups 8 instead of 16"),
        ({"motion_layers_per_block": 2}, "left over"),
        ({"motion_transformer_layers_per_block": 2}, r"motion modules of \[1, 2\] blocks"),
        ({"motion_num_attention_heads": (4, 8)}, "same heads throughout"),
        ({"conv_in_channels": 9}, "PIA"),
    ],
)
def test_adapters_of_another_shape_are_refused(settings, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        animatediff.load_adapter(tiny_unet_sd1(), write_adapter(tmp_path, **settings))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (MODELSCOPE, "temporal conv True; .*temporal motion False"),
        (ANIMATEDIFF_V2, "temporal motion_norm frame"),
        (replace(CLIP, added_ids=1), "temporal added_ids 1"),
        (replace(CLIP, input=True), "temporal input True"),
    ],
)
def test_what_diffusers_cannot_represent_is_refused(spec, message, tmp_path):
    unet = trained(spec)
    with pytest.raises(CheckpointError, match=f"UNetMotionModel has no place for: {message}"):
        animatediff.to_diffusers(unet)
    with pytest.raises(CheckpointError, match=f"MotionAdapter has no place for: {message}"):
        animatediff.save_adapter(unet, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_original_cannot_represent_is_refused_and_other_folders_are_kept(tmp_path):
    for spec, message in ((CLIP, "motion_norm clip"), (replace(ANIMATEDIFF_V2, motion_heads=4), "motion_heads 4")):
        with pytest.raises(CheckpointError, match=f"AnimateDiff's files have no place for: temporal {message}"):
            animatediff.save_original(trained(spec), tmp_path / "motion.safetensors")
    tiny_unet_sd1().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="class UNet2DConditionModel; give .* a MotionAdapter"):
        animatediff.save_adapter(trained(), tmp_path)
    with pytest.raises(CheckpointError, match="class UNet2DConditionModel; give .* a UNetMotionModel"):
        animatediff.load_diffusers(tmp_path)
