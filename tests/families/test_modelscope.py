import json
from dataclasses import replace

import pytest
import torch
from diffusers import UNet3DConditionModel
from safetensors.torch import load_file, save_file

from helpers import CROSS, randomise, tiny_unet_sd1, tiny_unet_sd2, tiny_unet_sdxl, unet_inputs
from inflate.errors import CheckpointError
from inflate.families import modelscope
from inflate.families.modelscope import ImageToVideo
from inflate.layers.conditioning import ImageTokens
from inflate.models.folders import plain
from inflate.models.unet import ANIMATEDIFF_V2, MODELSCOPE, VideoUNet

HEADS = {"attention_head_dim": (2, 4)}
"""Heads of one width, 16, as in Stable Diffusion 2."""
FPS = replace(MODELSCOPE, added_ids=1, added_id_dim=32)


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
        (lambda: trained(ANIMATEDIFF_V2), "temporal conv False; temporal transformer False; .*temporal motion True"),
        (lambda: trained(FPS), "class_embed_type projection.*temporal added_ids 1"),
        (lambda: trained(build=tiny_unet_sd1), "use_linear_projection False"),
        (lambda: trained(attention_head_dim=2), "heads of different widths \\(16, 32\\)"),
        (lambda: trained(build=tiny_unet_sdxl), "addition_embed_type text_time.*more than one block per transformer"),
    ],
)
def test_what_diffusers_class_cannot_represent_is_refused(build, message):
    with pytest.raises(CheckpointError, match=f"UNet3DConditionModel has no place for.*{message}"):
        modelscope.to_diffusers(build())


def test_another_class_is_refused(tmp_path):
    tiny_unet_sd2().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="class UNet2DConditionModel; give .* a UNet3DConditionModel"):
        modelscope.load_diffusers(tmp_path)


@pytest.mark.parametrize("spec", [MODELSCOPE, FPS])
def test_vgens_names_go_there_and_back_bit_for_bit(spec, tmp_path):
    tokens = ImageTokens(20, 24, 4, CROSS)
    ours = ImageToVideo(trained(spec, norm_num_groups=32), tokens if spec.added_ids else None)
    there = modelscope.to_vgen(ours)
    assert there["input_blocks.0.1.proj_in.weight"].shape == (128, 32, 1)
    assert there["input_blocks.1.2.proj_out.weight"].shape == (32, 32, 1)
    assert "input_blocks.2.op.weight" in there
    assert "middle_block.3.temopral_conv.conv4.3.weight" in there
    assert "output_blocks.1.1.conv.weight" in there
    modelscope.save_vgen(ours, tmp_path / "unet.safetensors")
    again = modelscope.load_vgen(tmp_path / "unet.safetensors")
    assert again.unet.spec == spec
    assert again.unet.config.attention_head_dim == (2, 4)
    assert equal(again.unet.state_dict(), ours.unet.state_dict())
    assert (again.tokens is None) == (ours.tokens is None)
    if again.tokens is not None:
        images = torch.randn(2, 1, 20)
        assert torch.equal(again.tokens(images), tokens(images))
        assert tokens(images).shape == (2, 4, CROSS)
    assert equal(modelscope.to_vgen(again), there)


def test_vgens_tensors_that_do_not_match_are_listed():
    there = modelscope.to_vgen(ImageToVideo(trained(norm_num_groups=32), None))
    for change, message in (
        ({"output_blocks.0.0.odd": torch.zeros(1)}, r"1 left over \(output_blocks\.0\.0\.odd"),
        ({"context_embedding.0.weight": torch.zeros(4, 4)}, "image tokens are made by two linear layers"),
    ):
        with pytest.raises(CheckpointError, match=message):
            modelscope.from_vgen({**there, **change}, "the file")
    with pytest.raises(CheckpointError, match=r"not a UNet in VGen's format: input_blocks\.0\.1\.proj_in\.weight"):
        modelscope.from_vgen({"a": torch.zeros(1)}, "the file")
    with pytest.raises(
        CheckpointError, match=r"VGen has no place for: unet norm_num_groups 16; .*temporal motion True"
    ):
        modelscope.to_vgen(ImageToVideo(trained(ANIMATEDIFF_V2), None))
