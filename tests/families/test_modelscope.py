import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import I2VGenXLUNet, UNet3DConditionModel
from parity_cases import RECORDED, WEIGHTS, difference, weights_of
from parity_i2vgenxl_unets import arguments_of, called_diffusers
from safetensors.torch import load_file, save_file

from helpers import CROSS, randomise, tiny_unet_sd1, tiny_unet_sd2, tiny_unet_sdxl, unet_inputs
from inflate.errors import CheckpointError
from inflate.families import modelscope
from inflate.families.modelscope import DOUBLED, REFINEMENT
from inflate.layers.hierarchy import Hierarchy
from inflate.layers.image_context import ImageContext
from inflate.models.folders import plain, read_json
from inflate.models.unet import ANIMATEDIFF_V2, MODELSCOPE, VIDEO_LDM, VideoUNet

HEADS = {"attention_head_dim": (2, 4)}
"""Heads of one width, 16, as in Stable Diffusion 2."""
FPS = replace(MODELSCOPE, added_ids=1, added_id_dim=32)
FILE = "diffusion_pytorch_model.safetensors"
FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "i2vgenxl"
"""Recordings of the original implementation, which are not part of the repository."""
PUBLISHED = Hierarchy(embedding=CROSS)
HIERARCHIES = {
    "i2vgen_xl": PUBLISHED,
    "image-to-video": Hierarchy(embedding=20, detail_encoder=False, global_encoder=False),
    "details alone": Hierarchy(clip_tokens=0, global_encoder=False),
    "global alone": Hierarchy(clip_tokens=0, detail_encoder=False),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(spec=MODELSCOPE, build=tiny_unet_sd2, **settings):
    unet = VideoUNet.from_2d(build(**{**HEADS, **settings}), spec).eval()
    randomise(unet)
    return unet


def diffusers_unet():
    unet = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=CROSS,
        attention_head_dim=16,
    ).eval()
    randomise(unet)
    return unet


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def predicted(unet, inputs):
    """The prediction of diffusers' class for a clip (B,F,C,h,w), likewise."""
    others = (inputs["timestep"], inputs["encoder_hidden_states"])
    return unet(inputs["sample"].transpose(1, 2), *others).sample.transpose(1, 2)


@torch.no_grad()
def test_a_diffusers_folder_gives_its_outputs_and_goes_back_bit_for_bit(tmp_path):
    theirs = diffusers_unet()
    theirs.save_pretrained(tmp_path)
    ours = modelscope.load_diffusers(tmp_path)
    inputs = unet_inputs()
    expected = predicted(theirs, inputs)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(**inputs).sample, expected, atol=2e-5, rtol=0)
    back = modelscope.to_diffusers(ours)
    assert equal(back.state_dict(), theirs.state_dict())
    assert json.loads(json.dumps(plain(back.config))) == json.loads(json.dumps(plain(theirs.config)))
    assert torch.equal(predicted(back, inputs), expected)


@torch.no_grad()
def test_an_inflated_model_goes_to_diffusers_and_back(tmp_path):
    ours = trained()
    theirs = modelscope.to_diffusers(ours)
    inputs = unet_inputs()
    torch.testing.assert_close(predicted(theirs, inputs), ours(**inputs).sample, atol=2e-5, rtol=0)
    theirs.save_pretrained(tmp_path)
    again = modelscope.load_diffusers(tmp_path)
    assert equal(again.state_dict(), ours.state_dict())
    assert torch.equal(again(**inputs).sample, ours(**inputs).sample)


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_tensors_that_do_not_match_are_listed(change, tmp_path):
    diffusers_unet().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        tensors.pop("transformer_in.proj_in.weight")
    else:
        tensors["transformer_in.odd"] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"1 {change} \(transformer_in\."):
        modelscope.load_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: trained(FPS), "class_embed_type projection.*temporal added_ids 1"),
        (lambda: trained(build=tiny_unet_sd1), "use_linear_projection False"),
        (lambda: trained(attention_head_dim=2), "heads of different widths \\(16, 32\\)"),
        (lambda: trained(build=tiny_unet_sdxl), "addition_embed_type text_time.*more than one block per transformer"),
    ],
)
def test_what_diffusers_class_cannot_represent_is_refused(build, message):
    with pytest.raises(CheckpointError, match=f"UNet3DConditionModel has no place for.*{message}"):
        modelscope.to_diffusers(build())


@pytest.mark.parametrize(("spec", "whose"), [(ANIMATEDIFF_V2, "AnimateDiff's"), (VIDEO_LDM, "Video LDM's")])
def test_temporal_layers_of_another_kind_are_called_that(spec, whose):
    told = rf"is for models whose temporal layers are ModelScope's, and this one's are {whose}: keep its folder, which"
    for write, target in (
        (modelscope.to_diffusers, "UNet3DConditionModel"),
        (modelscope.to_i2vgen, "I2VGenXLUNet"),
        (modelscope.to_vgen, "VGen's file"),
    ):
        with pytest.raises(CheckpointError, match=f"{target} {told}"):
            write(trained(spec))


def test_another_class_is_refused(tmp_path):
    tiny_unet_sd2().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="class UNet2DConditionModel; give .* a UNet3DConditionModel"):
        modelscope.load_diffusers(tmp_path)


def told_first_frames(hierarchy=PUBLISHED):
    """A model of VGen's kind, all of whose layers do something."""
    unet = trained(FPS, norm_num_groups=32)
    unet.add_hierarchy(hierarchy)
    randomise(unet, seed=1)
    return unet.eval()


def padded():
    unet = trained(norm_num_groups=32)
    unet.pad_rows()
    return unet


KINDS = {
    "text-to-video": lambda: trained(norm_num_groups=32),
    "text-to-video, told the frame rate": lambda: trained(FPS, norm_num_groups=32),
    "refinement": padded,
    **{name: lambda hierarchy=hierarchy: told_first_frames(hierarchy) for name, hierarchy in HIERARCHIES.items()},
}


@pytest.mark.parametrize("kind", KINDS)
def test_vgens_names_go_there_and_back_bit_for_bit(kind, tmp_path):
    ours = KINDS[kind]()
    there = modelscope.to_vgen(ours)
    assert there["input_blocks.0.1.proj_in.weight"].shape == (128, 32, 1)
    assert there["input_blocks.1.2.proj_out.weight"].shape == (32, 32, 1)
    assert "input_blocks.2.op.weight" in there
    assert "middle_block.3.temopral_conv.conv4.3.weight" in there
    assert "output_blocks.1.1.conv.weight" in there
    modelscope.save_vgen(ours, tmp_path / "unet.safetensors")
    again = modelscope.load_vgen(tmp_path / "unet.safetensors")
    assert (again.spec, again.hierarchy) == (ours.spec, ours.hierarchy)
    assert again.config.attention_head_dim == (2, 4)
    assert again.config.downsample_padding == ours.config.downsample_padding
    assert equal(again.state_dict(), ours.state_dict())
    assert equal(modelscope.to_vgen(again), there)


def test_vgens_file_has_half_of_what_ours_gives_the_detail():
    ours = told_first_frames()
    there = modelscope.to_vgen(ours)
    own = ours.conv_in.weight.detach()
    assert torch.equal(there["input_blocks.0.0.weight"][:, :4], own[:, :4])
    assert torch.equal(2 * there["input_blocks.0.0.weight"][:, 4:], own[:, 4:])
    assert there["local_image_concat.0.weight"] is not None
    assert there["local_temporal_encoder.layers.0.0.fn.to_qkv.weight"].shape == (24, 4)
    assert there["local_image_embedding.5.weight"].shape == (CROSS, 64, 3, 3)
    assert there["context_embedding.2.weight"].shape == (4 * CROSS, 128)


def test_refinement_is_told_and_by_no_tensor(tmp_path):
    unet = padded()
    save_file(modelscope.to_vgen(unet), tmp_path / "published.safetensors")
    assert modelscope.load_vgen(tmp_path / "published.safetensors").config.downsample_padding == 1
    told = modelscope.load_vgen(tmp_path / "published.safetensors", refinement=True)
    assert told.config.downsample_padding == REFINEMENT
    inputs = unet_inputs(side=10)
    with torch.no_grad():
        assert torch.equal(told(**inputs).sample, unet(**inputs).sample)
    with pytest.raises(CheckpointError, match=r"downsample_padding \[2, 1\], whose spare rows .* VGen's format"):
        modelscope.to_diffusers(unet)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_blocks.0.0.odd": torch.zeros(1)}, r"1 left over \(output_blocks\.0\.0\.odd"),
        ({"context_embedding.2.weight": torch.zeros(32, 4)}, r"context_embedding\.0\.weight is missing"),
        ({"local_image_embedding.0.weight": torch.zeros(32, 4, 3, 3)}, r"5 missing \(local_image_embedding\.0\.bias"),
    ],
)
def test_vgens_tensors_that_do_not_match_are_listed(change, message):
    there = modelscope.to_vgen(trained(norm_num_groups=32))
    with pytest.raises(CheckpointError, match=message):
        modelscope.from_vgen({**there, **change}, "the file")


def test_what_is_no_unet_of_vgens_is_refused():
    with pytest.raises(CheckpointError, match=r"not a UNet in VGen's format: input_blocks\.0\.1\.proj_in\.weight"):
        modelscope.from_vgen({"a": torch.zeros(1)}, "the file")
    with pytest.raises(CheckpointError, match="VGen has no place for: unet norm_num_groups 16$"):
        modelscope.to_vgen(trained())
    seeing = trained(norm_num_groups=32)
    seeing.add_image_context(ImageContext(embedding=8, width=8, depth=1, heads=2, head_width=4))
    with pytest.raises(CheckpointError, match="VGen has no place for: an image context"):
        modelscope.to_vgen(seeing)
    both = told_first_frames()
    both.pad_rows()
    with pytest.raises(CheckpointError, match=r"VGen has no place for: unet downsample_padding \[2, 1\]"):
        modelscope.to_vgen(both)


# --- diffusers' class of I2VGen-XL ------------------------------------------------------------------------------------


def diffusers_i2vgen():
    unet = I2VGenXLUNet(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        cross_attention_dim=CROSS,
        attention_head_dim=16,
    ).eval()
    randomise(unet)
    return unet


def first_frames():
    inputs = unet_inputs()
    generator = torch.Generator().manual_seed(7)
    return {
        **inputs,
        "added_time_ids": torch.tensor([[8.0], [16.0]]),
        "image_latents": torch.randn(2, 4, 8, 8, generator=generator),
        "image_embeddings": torch.randn(2, 1, CROSS, generator=generator),
    }


@torch.no_grad()
def by_diffusers(unet, inputs):
    """What diffusers' class makes of the arguments of ours."""
    call = {
        "x": inputs["sample"].transpose(1, 2),
        "t": inputs["timestep"],
        "y": inputs["encoder_hidden_states"],
        "fps": inputs["added_time_ids"][:, 0],
        "image": inputs["image_embeddings"],
        "local_image": inputs["image_latents"],
    }
    return called_diffusers(unet, call).transpose(1, 2)


@torch.no_grad()
def test_diffusers_i2vgen_gives_its_outputs_and_goes_back_bit_for_bit(tmp_path):
    theirs = diffusers_i2vgen()
    theirs.save_pretrained(tmp_path)
    ours = modelscope.load_diffusers(tmp_path)
    expected = by_diffusers(theirs, first_frames())
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(**first_frames()).sample, expected, atol=2e-5, rtol=0)
    back = modelscope.to_i2vgen(ours)
    assert equal(back.state_dict(), theirs.state_dict())
    assert json.loads(json.dumps(plain(back.config))) == json.loads(json.dumps(plain(theirs.config)))
    assert modelscope.is_halved(tmp_path)
    doubled = modelscope.load_diffusers(tmp_path, double_detail=True)
    assert torch.equal(doubled.conv_in.weight[:, 4:], 2 * ours.conv_in.weight[:, 4:])
    assert torch.equal(doubled.conv_in.weight[:, :4], ours.conv_in.weight[:, :4])


@torch.no_grad()
def test_our_i2vgen_is_marked_for_good(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    ours = told_first_frames()
    modelscope.to_i2vgen(ours).save_pretrained(tmp_path / "ours")
    loaded = I2VGenXLUNet.from_pretrained(tmp_path / "ours")
    assert caplog.messages == []
    torch.testing.assert_close(by_diffusers(loaded, first_frames()), ours(**first_frames()).sample, atol=2e-5, rtol=0)
    loaded.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        assert read_json(folder / "config.json")[DOUBLED] is True
        assert not modelscope.is_halved(folder)
        assert equal(modelscope.load_diffusers(folder).state_dict(), ours.state_dict())


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_i2vgens_tensors_that_do_not_match_are_listed(change, tmp_path):
    diffusers_i2vgen().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    if change == "missing":
        tensors.pop("image_latents_temporal_encoder.attn1.to_k.weight")
    else:
        tensors["fps_embedding.4.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=rf"1 {change} \((image_latents_temporal_encoder|fps_embedding)\."):
        modelscope.load_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: told_first_frames(replace(PUBLISHED, clip_tokens=2)), "hierarchy clip_tokens 2"),
        (lambda: told_first_frames(replace(PUBLISHED, embedding=20)), "hierarchy embedding 20"),
        (lambda: told_first_frames(replace(PUBLISHED, global_encoder=False)), "hierarchy global_encoder False"),
        (lambda: told_first_frames(HIERARCHIES["image-to-video"]), "unet in_channels 4"),
    ],
)
def test_what_diffusers_i2vgen_cannot_represent_is_refused(build, message):
    with pytest.raises(CheckpointError, match=f"I2VGenXLUNet has no place for: {message}"):
        modelscope.to_i2vgen(build())


@torch.no_grad()
@pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no recordings in {FIXTURES}")
def test_our_export_mends_what_renaming_alone_gets_wrong():
    recorded = load_file(FIXTURES / f"base_a{RECORDED}")
    call = arguments_of(recorded, "full", torch.float32)
    theirs = modelscope.to_i2vgen(modelscope.from_vgen(weights_of(FIXTURES / f"base_a{WEIGHTS}"), "base_a"))
    assert difference(called_diffusers(theirs, call), call["out"]) < 1e-5
    theirs.conv_in.weight[:, 4:] /= 2  # as in VGen's file
    assert difference(called_diffusers(theirs, call), call["out"]) > 0.5
