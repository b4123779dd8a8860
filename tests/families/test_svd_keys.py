import pytest
import torch

from inflate.errors import CheckpointError
from inflate.families import svd_files, svd_keys
from inflate.models import exchange, original_names
from inflate.models.unet import TemporalSpec

UNET = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "in_channels": 8,
    "out_channels": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": (4, 8, 8),
    "transformer_layers_per_block": (2, 1, 1),
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 2,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def unet() -> torch.nn.Module:
    return exchange.build_unet(UNET, TemporalSpec(added_id_dim=16))


def filled(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    return {key: torch.full(shape, float(number)) for number, (key, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize(
    ("ours", "sgm", "diffusers"),
    [
        ("conv_in.bias", "input_blocks.0.0.bias", "conv_in.bias"),
        ("class_embedding.linear_2.bias", "label_emb.0.2.bias", "add_embedding.linear_2.bias"),
        (
            "down_blocks.1.resnets.0.conv1.bias",
            "input_blocks.3.0.in_layers.2.bias",
            "down_blocks.1.resnets.0.spatial_res_block.conv1.bias",
        ),
        (
            "up_blocks.1.resnets.1.temporal.mix",
            "output_blocks.3.0.time_mixer.mix_factor",
            "up_blocks.1.resnets.1.time_mixer.mix_factor",
        ),
        (
            "mid_block.attentions.0.transformer_blocks.0.temporal.ff_in.net.2.bias",
            "middle_block.1.time_stack.0.ff_in.net.2.bias",
            "mid_block.attentions.0.temporal_transformer_blocks.0.ff_in.net.2.bias",
        ),
        ("up_blocks.0.upsamplers.0.conv.bias", "output_blocks.1.2.conv.bias", "up_blocks.0.upsamplers.0.conv.bias"),
        ("up_blocks.1.upsamplers.0.conv.bias", "output_blocks.3.1.conv.bias", "up_blocks.1.upsamplers.0.conv.bias"),
        ("down_blocks.0.downsamplers.0.conv.w", "input_blocks.2.0.op.w", "down_blocks.0.downsamplers.0.conv.w"),
    ],
)
def test_unet_names(ours: str, sgm: str, diffusers: str) -> None:
    layout = original_names.UNetLayout.of(UNET)
    assert svd_keys.unet_to_sgm([ours], layout) == {ours: sgm}
    assert svd_keys.unet_to_diffusers([ours]) == {ours: diffusers}


@pytest.mark.parametrize(
    ("ours", "sgm", "diffusers"),
    [
        ("encoder.conv_norm_out.bias", "encoder.norm_out.bias", "encoder.conv_norm_out.bias"),
        ("decoder.conv_out.temporal.bias", "decoder.conv_out.time_mix_conv.bias", "decoder.time_conv_out.bias"),
        (
            "decoder.up_blocks.0.resnets.2.temporal.conv2.bias",
            "decoder.up.1.block.2.time_stack.out_layers.3.bias",
            "decoder.up_blocks.0.resnets.2.temporal_res_block.conv2.bias",
        ),
        (
            "decoder.mid_block.resnets.1.temporal.mix",
            "decoder.mid.block_2.mix_factor",
            "decoder.mid_block.resnets.1.time_mixer.mix_factor",
        ),
        (
            "decoder.mid_block.attentions.0.to_out.0.bias",
            "decoder.mid.attn_1.proj_out.bias",
            "decoder.mid_block.attentions.0.to_out.0.bias",
        ),
        (
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
            "encoder.down.1.block.0.nin_shortcut.bias",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
        ),
    ],
)
def test_vae_names(ours: str, sgm: str, diffusers: str) -> None:
    assert svd_keys.vae_to_sgm([ours], 2) == {ours: sgm}
    assert svd_keys.vae_to_diffusers([ours]) == {ours: diffusers}


def test_round_trip_over_both_namings_is_bit_equal() -> None:
    shapes = exchange.shapes(unet())
    start = filled(shapes)
    for names in (svd_keys.unet_to_sgm(shapes, original_names.UNetLayout.of(UNET)), svd_keys.unet_to_diffusers(shapes)):
        there = {names[key]: tensor for key, tensor in start.items()}
        assert len(there) == len(start)
        back = exchange.convert(there, exchange.inverse(names), shapes, "test")
        assert list(back) == list(start)
        assert all(torch.equal(back[key], start[key]) for key in start)


def test_unet_configuration_is_read_off_the_tensors() -> None:
    model = unet()
    names = svd_keys.unet_to_sgm(exchange.shapes(model), original_names.UNetLayout.of(UNET))
    config = original_names.unet_config({names[key]: t for key, t in model.state_dict().items()}, head_channels=8)
    assert config == UNET


def test_vae_configuration_is_read_off_the_tensors() -> None:
    model = svd_files.build_vae(VAE)
    names = svd_keys.vae_to_sgm(exchange.shapes(model), 2)
    assert original_names.vae_config({names[key]: t for key, t in model.state_dict().items()}) == VAE


def test_pointwise_convolution_fits_a_linear_layer_both_ways() -> None:
    weight = torch.arange(6.0).reshape(3, 2)
    linear = exchange.convert({"a": weight[:, :, None, None]}, {"a": "b"}, {"b": torch.Size((3, 2))}, "test")["b"]
    conv = exchange.convert({"b": linear}, {"b": "a"}, {"a": torch.Size((3, 2, 1, 1))}, "test")["a"]
    assert torch.equal(linear, weight)
    assert torch.equal(conv[:, :, 0, 0], weight)


def test_missing_and_left_over_tensors_are_listed() -> None:
    with pytest.raises(CheckpointError, match=r"the file.*1 missing \(kept\); 1 left over \(stray\); nothing"):
        exchange.convert({"stray": torch.zeros(1)}, {"kept": "ours"}, {"ours": torch.Size((1,))}, "the file")


def test_misshapen_tensors_are_listed() -> None:
    with pytest.raises(CheckpointError, match=r"theirs \(3,\) instead of \(2,\)"):
        exchange.convert({"theirs": torch.zeros(3)}, {"theirs": "ours"}, {"ours": torch.Size((2,))}, "the file")


def test_two_keys_with_one_name_are_refused() -> None:
    with pytest.raises(CheckpointError, match="share a name"):
        exchange.inverse({"a": "x", "b": "x"})


def test_foreign_tensors_are_refused() -> None:
    with pytest.raises(CheckpointError, match="under its original names"):
        original_names.unet_config({"lora.weight": torch.zeros(1)})


def test_unequal_levels_have_no_sgm_name() -> None:
    with pytest.raises(CheckpointError, match="layers_per_block"):
        original_names.UNetLayout.of({**UNET, "layers_per_block": (1, 2, 2)})
