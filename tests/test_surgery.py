import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from helpers import CROSS, tiny_unet, tiny_unet_sd1, tiny_unet_sd2, tiny_unet_sdxl, tiny_vae
from inflate.errors import SurgeryError
from inflate.models.unet import ANIMATEDIFF_V1, ANIMATEDIFF_V2, MODELSCOPE, VIDEO_LDM, TemporalSpec
from inflate.surgery import inflate_unet, inflate_vae, verify_identity

SPECS = [
    TemporalSpec(),
    TemporalSpec(added_ids=0),
    TemporalSpec(resnet=False, added_id_dim=8),
    TemporalSpec(block=False, added_ids=1),
]


@pytest.mark.parametrize("build", [tiny_unet_sd1, tiny_unet_sd2])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("in_channels", [None, 8])
def test_a_newborn_equals_its_parent(build, spec, in_channels):
    parent = build()
    video, _ = inflate_unet(parent, spec, in_channels)
    assert verify_identity(video, parent) <= 1e-5
    if in_channels is None:
        assert verify_identity(video, parent) == 0.0


PRESETS = {
    "svd": TemporalSpec(added_ids=0),
    "video_ldm": VIDEO_LDM,
    "video_ldm, a block each": replace(VIDEO_LDM, each_up_to=9),
    "modelscope": MODELSCOPE,
    "modelscope with ids": replace(MODELSCOPE, added_ids=1),
    "animatediff 1": ANIMATEDIFF_V1,
    "animatediff 2": ANIMATEDIFF_V2,
    "animatediff over the clip": replace(ANIMATEDIFF_V2, motion_norm="clip"),
}
CREATED_BY = {
    "svd": {"frame positions", "temporal residual blocks", "temporal transformer blocks", "mixes"},
    "modelscope": {"temporal convolutions", "transformers over frames"},
    "animatediff 2": {"frame positions", "transformers over frames"},
}


@pytest.mark.parametrize("build", [tiny_unet_sd1, tiny_unet_sd2, tiny_unet_sdxl])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_born_equal_to_every_parent_and_keeps_its_tensors(build, preset):
    parent, spec = build(), PRESETS[preset]
    if build is tiny_unet_sdxl and spec.added_ids:
        with pytest.raises(SurgeryError, match="added_ids=0"):
            inflate_unet(parent, spec)
        return
    video, report = inflate_unet(parent, spec)
    assert verify_identity(video, parent) == 0.0  # text and sizes of Stable Diffusion XL are given frame by frame
    state, kept = video.state_dict(), parent.state_dict()
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    created = state.keys() - kept.keys()
    assert all(".temporal." in name or (spec.added_ids and "class_embedding." in name) for name in created)
    assert {row.name for row in report.rows if row.action == "created"} == created
    groups = {row.group for row in report.rows if row.action == "created"}
    assert CREATED_BY.get(preset, groups) == groups
    assert "other" not in groups


XL = {
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}


def created(parent, spec):
    with torch.device("meta"):
        return sum(value.numel() for value in inflate_unet(parent, spec)[0].created_parameters().values())


def test_parameters_that_each_preset_adds_at_full_size():
    with torch.device("meta"):
        sdxl = tiny_unet_sdxl(**XL, addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)
        sd1 = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    assert sum(value.numel() for value in sdxl.parameters()) == 2_567_463_684
    blocks = replace(VIDEO_LDM, resnet=False)
    assert created(sdxl, blocks) == 570_939_531
    assert created(sdxl, replace(blocks, each_up_to=10)) == 3_510_198_411
    assert created(sd1, ANIMATEDIFF_V1) == 417_137_600
    assert created(sd1, ANIMATEDIFF_V2) == 453_209_280


def test_identity_notices_a_difference_and_leaves_the_modes_alone():
    parent = tiny_unet()
    video, _ = inflate_unet(parent, TemporalSpec())
    video.train()
    video.mid_block.eval()
    video.mid_block.resnets[0].temporal.conv2.weight.data.add_(0.1)
    assert verify_identity(video, parent) > 1e-4
    assert video.training
    assert not video.mid_block.training
    assert not parent.training


def test_identity_of_a_decoder():
    parent = tiny_vae()
    video, report = inflate_vae(parent)
    assert verify_identity(video, parent) == 0.0
    video.decoder.conv_out.temporal.bias.data.add_(0.5)
    assert verify_identity(video, parent) == pytest.approx(0.5)
    assert report.count("created") == sum(value.numel() for value in video.temporal_parameters().values())


def test_the_report_accounts_for_every_parameter():
    parent = tiny_unet()
    video, report = inflate_unet(parent, TemporalSpec(), in_channels=8)
    total = sum(report.count(action) for action in ("copied", "widened", "created"))
    assert total == sum(value.numel() for value in video.parameters())
    assert report.count("created") == sum(value.numel() for value in video.created_parameters().values())
    assert [row.name for row in report.rows if row.action == "widened"] == ["conv_in.weight"]
    assert not any(row.group == "other" for row in report.rows)
    table = report.table().splitlines()
    assert len(table) < 12
    assert any(line.startswith("copied") and line.endswith("2D model") for line in table)
    assert any("temporal residual blocks" in line for line in table)


def test_the_report_warns_of_another_epsilon():
    _, report = inflate_unet(tiny_unet(), TemporalSpec(cross_attention_resnet_eps=1e-6))
    assert "cross_attention_resnet_eps=1e-06" in report.table()
    assert inflate_unet(tiny_unet(), TemporalSpec())[1].notes == ()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_children_follow_their_parents_mode_and_precision(training, dtype):
    parent = tiny_unet_sd2(dropout=0.5).to(dtype).train(training)
    video, _ = inflate_unet(parent, TemporalSpec(), in_channels=5)
    assert {module.training for module in video.modules()} == {training}
    assert {value.dtype for value in video.parameters()} == {dtype}
    vae, _ = inflate_vae(tiny_vae().to(dtype).train(training))
    assert {module.training for module in vae.modules()} == {training}
    assert {value.dtype for value in vae.parameters()} == {dtype}


def test_children_follow_their_parents_device():
    with torch.device("meta"):
        parent, decoder = tiny_unet(), tiny_vae()
    assert {value.device.type for value in inflate_unet(parent, TemporalSpec())[0].parameters()} == {"meta"}
    assert {value.device.type for value in inflate_vae(decoder)[0].parameters()} == {"meta"}


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}, [type(m) for m in model.modules()]


def unchanged(model, before):
    state, kinds = before
    same = all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return same and model.state_dict().keys() == state.keys() and kinds == [type(m) for m in model.modules()]


def test_inflation_leaves_the_parent_as_it_was():
    parent, decoder = tiny_unet(), tiny_vae()
    before, config = snapshot(parent), dict(parent.config)
    video, _ = inflate_unet(parent, TemporalSpec(), in_channels=8)
    for value in video.parameters():
        value.data.add_(1)
    assert unchanged(parent, before)
    assert dict(parent.config) == config
    before = snapshot(decoder)
    inflate_vae(decoder)
    assert unchanged(decoder, before)


def with_adapter():
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    return unet


def no_attention():
    types = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return tiny_unet(mid_block_type="UNetMidBlock2D", **types)


REFUSED = [
    (lambda: torch.nn.Linear(2, 2), {}, "cannot inflate a Linear"),
    (tiny_vae, {}, "cannot inflate a AutoencoderKL"),
    (lambda: inflate_unet(tiny_unet(), TemporalSpec())[0], {}, "inflated already"),
    (lambda: tiny_unet(down_block_types=("CrossAttnDownBlock2D", "AttnDownBlock2D")), {}, "AttnDownBlock2D"),
    (lambda: tiny_unet(dual_cross_attention=True), {}, "DualTransformer2DModel"),
    (lambda: tiny_unet(class_embed_type="timestep"), {}, "added_ids=0"),
    (with_adapter, {}, "unload or merge"),
    (tiny_unet, {"in_channels": 3}, "in_channels=3 would cut"),
    (tiny_unet, {"spec": TemporalSpec(added_id_dim=7)}, "even width"),
    (tiny_unet, {"spec": replace(ANIMATEDIFF_V2, motion_heads=7)}, "motion_heads=7 does not divide the 32 channels"),
    (no_attention, {"spec": MODELSCOPE}, "there is none"),
]


@pytest.mark.parametrize(("build", "settings", "message"), REFUSED)
def test_what_cannot_be_inflated_is_refused_and_left_alone(build, settings, message):
    parent = build()
    before = snapshot(parent)
    with pytest.raises(SurgeryError, match=message):
        inflate_unet(parent, **{"spec": TemporalSpec(), **settings})
    assert unchanged(parent, before)


def test_context_width_of_the_tiny_models():
    assert copy.copy(tiny_unet().config).cross_attention_dim == CROSS
