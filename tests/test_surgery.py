import copy

import pytest
import torch
from peft import LoraConfig

from helpers import CROSS, tiny_unet, tiny_unet_sd1, tiny_unet_sd2, tiny_vae
from inflate.errors import SurgeryError
from inflate.models.unet import TemporalSpec
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


def test_a_newborn_sdxl_equals_its_parent():
    settings = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
        "transformer_layers_per_block": (1, 2),
    }
    parent = tiny_unet_sd2(**settings)
    with pytest.raises(SurgeryError, match="added_ids=0"):
        inflate_unet(parent, TemporalSpec())
    video, _ = inflate_unet(parent, TemporalSpec(added_ids=0))
    assert verify_identity(video, parent) == 0.0


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
