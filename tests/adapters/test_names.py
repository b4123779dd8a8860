from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNetMotionModel, UNetSpatioTemporalConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import comfyui
from helpers import randomise, tiny_unet, tiny_unet_sdxl, unet_inputs, write_image_model
from inflate.adapters import attach, file, foreign, names, outlines
from inflate.adapters.file import Adapter
from inflate.adapters.names import Network
from inflate.cli import app
from inflate.errors import CheckpointError
from inflate.families import animatediff, svd_files, svd_keys
from inflate.formats import ADAPTERS
from inflate.layers.image_context import ImageContext
from inflate.models import original_names
from inflate.models.unet import ANIMATEDIFF_V2, MODELSCOPE, VIDEO_LDM, TemporalSpec, VideoUNet
from inflate.surgery import inflate_unet

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEMPORAL_Q = "down_blocks.0.attentions.0.transformer_blocks.1.temporal.attn1.to_q"
CONV = "up_blocks.1.resnets.1.conv1"
TEMPORAL_CONV = "mid_block.resnets.0.temporal.conv1"
LAYERS = (Q, TEMPORAL_Q, CONV, TEMPORAL_CONV, "mid_block.attentions.0.temporal.position.linear_1")
SPATIAL = (Q, CONV, "down_blocks.0.attentions.0.proj_in", "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0")
GOLDEN = {
    "svd": {
        Q: f"unet.{Q}",
        TEMPORAL_Q: "unet.down_blocks.0.attentions.0.temporal_transformer_blocks.1.attn1.to_q",
        CONV: "unet.up_blocks.1.resnets.1.spatial_res_block.conv1",
        TEMPORAL_CONV: "unet.mid_block.resnets.0.temporal_res_block.conv1",
        LAYERS[4]: "unet.mid_block.attentions.0.time_pos_embed.linear_1",
    },
    "comfyui": {
        Q: "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        TEMPORAL_Q: "diffusion_model.input_blocks.1.1.time_stack.1.attn1.to_q",
        CONV: "diffusion_model.output_blocks.3.0.in_layers.2",
        TEMPORAL_CONV: "diffusion_model.middle_block.0.time_stack.in_layers.2",
        LAYERS[4]: "diffusion_model.middle_block.1.time_pos_embed.0",
    },
    "kohya": {
        Q: "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        TEMPORAL_Q: "lora_unet_input_blocks_1_1_time_stack_1_attn1_to_q",
        CONV: "lora_unet_up_blocks_1_resnets_1_conv1",
        TEMPORAL_CONV: "lora_unet_middle_block_0_time_stack_in_layers_2",
        LAYERS[4]: "lora_unet_middle_block_1_time_pos_embed_0",
    },
}
FACTORS = {"svd": ("lora_A.weight", "lora_B.weight"), "comfyui": ("lora_A.weight", "lora_B.weight")}
FACTORS["kohya"] = ("lora_down.weight", "lora_up.weight")


SVD = TemporalSpec(cross_attention_resnet_eps=1e-6)


@cache
def unet(spec: TemporalSpec = SVD, linear: bool = True) -> VideoUNet:
    parent = tiny_unet(linear, norm_num_groups=32, transformer_layers_per_block=(2, 1) if spec.block else 1)
    video, _ = inflate_unet(parent, spec, in_channels=8 if spec.added_ids else None)
    randomise(video)
    return video


def network(spec: TemporalSpec = SVD, linear: bool = True) -> Network:
    return Network.of(unet(spec, linear))


def adapter(shapes: Network, layers: tuple[str, ...] = LAYERS, kind: str = "lora", alpha: float = 3.0) -> Adapter:
    """Random weights of an adapter, of another rank in each layer, as PEFT makes them."""
    made: dict[str, Tensor] = {}
    ranks = {layer: 2 + number for number, layer in enumerate(layers)}
    torch.manual_seed(0)
    for layer, rank in ranks.items():
        weight = shapes.shapes[layer]
        ones = [1] * (len(weight) - 2)
        made[f"unet.{layer}.lora_A.weight"] = torch.randn(rank, *weight[1:])
        made[f"unet.{layer}.lora_B.weight"] = torch.randn(weight[0], rank, *ones)
        if kind == "dora":
            made[f"unet.{layer}.lora_magnitude_vector"] = torch.rand((1, weight[0], *ones) if ones else (weight[0],))
    return Adapter(made, kind, ranks, dict.fromkeys(ranks, alpha), {"licence": "none", "targets": ["x"]})


def product(shapes: Network, config: LoKrConfig | LoHaConfig) -> Adapter:
    """Random weights of a LoKr or LoHa, as PEFT makes them."""
    model = nn.ModuleDict({"0": nn.Linear(*reversed(shapes.shapes[Q])), "1": nn.Conv2d(*conv_sides(shapes), 3)})
    inject_adapter_in_model(config, model)
    randomise(model)
    layer = {"0": Q, "1": CONV}
    tensors = {f"unet.{layer[key[0]]}.{key[2:]}": value for key, value in get_peft_model_state_dict(model).items()}
    kind = "lokr" if isinstance(config, LoKrConfig) else "loha"
    return Adapter(
        tensors, kind, dict.fromkeys(layer.values(), config.r), dict.fromkeys(layer.values(), config.alpha), {}
    )


PRODUCTS = {
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=["0", "1"]),
    "loha": LoHaConfig(r=2, alpha=3, target_modules=["0", "1"]),
}


def conv_sides(shapes: Network) -> tuple[int, int]:
    out, inner = shapes.shapes[CONV][:2]
    return inner, out


def same(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters are equal to the bit."""
    equal = one.tensors.keys() == other.tensors.keys() and all(
        value.dtype == other.tensors[name].dtype and torch.equal(value, other.tensors[name])
        for name, value in one.tensors.items()
    )
    return equal and replace(one, tensors={}) == replace(other, tensors={})


def there_and_back(made: Adapter, format: str, over: Network, folder: Path) -> Adapter:
    foreign.write(folder / "there.safetensors", made, format, over, overwrite=True)
    found = foreign.read(folder / "there.safetensors", over)
    assert found.format == format
    return found.adapter


@pytest.mark.parametrize("format", GOLDEN)
def test_files_hold_the_names_that_others_look_for(format: str, tmp_path: Path) -> None:
    foreign.write(tmp_path / "a.safetensors", adapter(network()), format, network())
    scales = [] if format == "svd" else ["alpha"]
    wanted = {f"{name}.{end}" for name in GOLDEN[format].values() for end in [*FACTORS[format], *scales]}
    assert load_file(tmp_path / "a.safetensors").keys() == wanted


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("format", ["inflate", "svd", "comfyui", "kohya"])
def test_there_and_back_is_equal_to_the_bit(kind: str, format: str, tmp_path: Path) -> None:
    made = adapter(network(), kind=kind, alpha=0.1)
    if (kind, format) == ("dora", "comfyui"):
        with pytest.raises(CheckpointError, match="comfyui has no place for a dora: ComfyUI divides"):
            there_and_back(made, format, network(), tmp_path)
    else:
        assert same(there_and_back(made, format, network(), tmp_path), made)


@pytest.mark.parametrize("format", ["inflate", "svd", "comfyui", "kohya"])
@pytest.mark.parametrize("config", [LoKrConfig(r=2, alpha=2), LoKrConfig(r=8, alpha=8), LoHaConfig(r=2, alpha=3)])
def test_products_go_there_and_back(config: LoKrConfig | LoHaConfig, format: str, tmp_path: Path) -> None:
    config.target_modules = {"0", "1"}
    made = product(network(), config)
    assert same(there_and_back(made, format, network(), tmp_path), made)


def test_a_lokr_of_whole_factors_is_not_scaled_by_others(tmp_path: Path) -> None:
    made = product(network(), LoKrConfig(r=8, alpha=3, target_modules=["0", "1"]))
    with pytest.raises(CheckpointError, match="kohya has no place for an alpha other than the rank in 2 layers"):
        foreign.write(tmp_path / "a.safetensors", made, "kohya", network())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("format", ["inflate", "unet-motion", "attention-processors", "kohya", "comfyui"])
def test_motion_modules_have_a_place_where_diffusers_has_them(format: str, linear: bool, tmp_path: Path) -> None:
    over = network(replace(ANIMATEDIFF_V2, motion_norm="clip"), linear)
    temporal = "down_blocks.0.attentions.0.temporal.transformer_blocks.0.attn1.to_out.0"
    made = adapter(over, (*SPATIAL, temporal))
    made = replace(made, alpha={layer: float(rank) for layer, rank in made.rank.items()})
    if format in ("kohya", "comfyui"):
        with pytest.raises(CheckpointError, match=f"{format} has no place for 1 layers: {temporal}"):
            there_and_back(made, format, over, tmp_path)
    else:
        back = there_and_back(made, format, over, tmp_path)
        assert same(back, made)
        names_ = load_file(tmp_path / "there.safetensors").keys()
        moved = "unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_out.0.lora"
        assert any(name.startswith(moved) for name in names_) == (format != "inflate")


def test_modelscopes_layers_have_their_names_in_diffusers(tmp_path: Path) -> None:
    over = network(MODELSCOPE)
    layers = ("conv_in.temporal.proj_in", "down_blocks.0.resnets.0.temporal.conv2.3", f"{Q}")
    made = adapter(over, (*layers, "down_blocks.0.attentions.0.temporal.transformer_blocks.0.attn1.to_q"))
    assert same(there_and_back(made, "unet3d", over, tmp_path), made)
    found = {name.removesuffix(".lora_A.weight") for name in load_file(tmp_path / "there.safetensors")}
    assert {"unet.transformer_in.proj_in", "unet.down_blocks.0.temp_convs.0.conv2.3"} < found
    assert "unet.down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1.to_q" in found


@pytest.mark.parametrize(
    ("format", "spec"),
    [(format, spec) for spec in (MODELSCOPE, VIDEO_LDM) for format in ("unet3d", "svd", "comfyui", "kohya")
     if (format, spec) not in (("unet3d", VIDEO_LDM), ("svd", MODELSCOPE))],
)  # fmt: skip
def test_what_attends_to_an_image_has_no_name_elsewhere(format: str, spec: TemporalSpec, tmp_path: Path) -> None:
    video, _ = inflate_unet(tiny_unet(True, norm_num_groups=32), spec)
    video.add_image_context(ImageContext(embedding=8, width=8, depth=1, heads=1, head_width=8))
    video.add_ids(1, video.config.block_out_channels[0])
    layers = "query_transformer.layers.0.attention.to_q", "mid_block.attentions.0.transformer_blocks.0.attn2.image.to_v"
    shapes = Network.of(video)
    assert set(layers) < set(names.names("inflate", shapes))
    with pytest.raises(CheckpointError, match=rf"{format} has no place for 2 layers: query_transformer\.layers"):
        foreign.write(tmp_path / "out.safetensors", adapter(shapes, layers), format, shapes)
    assert Q in names.names(format, shapes)


@pytest.mark.parametrize("spec", [TemporalSpec(), MODELSCOPE, ANIMATEDIFF_V2])
def test_no_two_layers_share_a_name(spec: TemporalSpec) -> None:
    over = network(spec)
    for format in ADAPTERS:
        if format in names.CLASSES and not over.has(*names.CLASSES[format][1]):
            continue
        found = names.names(format, over)
        assert len(set(found.values())) == len(found) > 40


def test_another_familys_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="unet3d is for other temporal layers than this UNet has"):
        foreign.write(tmp_path / "a.safetensors", adapter(network()), "unet3d", network())


def lora(model: nn.Module, made: Adapter) -> nn.Module:
    """The model with an adapter on it, by PEFT alone."""
    settings = file.peft_settings(made)
    inject_adapter_in_model(LoraConfig(**settings), model)
    state = {name.removeprefix("unet."): value for name, value in made.tensors.items()}
    found = set_peft_model_state_dict(model, state)
    assert not found.unexpected_keys
    assert not [name for name in found.missing_keys if "lora" in name]
    return model


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_diffusers_own_unet_computes_the_same_through_peft(kind: str, tmp_path: Path) -> None:
    ours, theirs = bare(unet()), svd_files.diffusers_unet(unet(), 2)
    assert isinstance(theirs, UNetSpatioTemporalConditionModel)
    made = adapter(network(), kind=kind)
    foreign.write(tmp_path / "a.safetensors", made, "svd", network())
    inputs = unet_inputs(frames=2, channels=8, tokens=1)
    ids = torch.tensor([[6.0, 127.0, 0.02]]).expand(2, 3)
    with torch.no_grad():
        plain = ours(**inputs, added_time_ids=ids).sample
        adapted = lora(ours, made)(**inputs, added_time_ids=ids).sample
        other = lora(theirs, file.read(tmp_path / "a.safetensors"))(**inputs, added_time_ids=ids).sample
    assert (adapted - plain).abs().max() > 1e-2
    assert (adapted - other).abs().max() <= 1e-5


def bare(model: VideoUNet) -> VideoUNet:
    """A copy that may be changed."""
    copy: VideoUNet = VideoUNet.from_config(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


def test_diffusers_loads_motion_adapters_by_its_own_loader(tmp_path: Path) -> None:
    model = unet(replace(ANIMATEDIFF_V2, motion_norm="clip", cross_attention_resnet_eps=1e-5))
    over = Network.of(model)
    made = adapter(over, ("down_blocks.0.attentions.0.temporal.transformer_blocks.0.attn1.to_q", Q))
    foreign.write(tmp_path / "pytorch_lora_weights.safetensors", made, "unet-motion", over)
    theirs: UNetMotionModel = animatediff.to_diffusers(bare(model))
    theirs.load_lora_adapter(tmp_path, prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    config = theirs.peft_config["default_0"]
    assert sorted({config.r, *config.rank_pattern.values()}) == [2, 3]
    assert config.lora_alpha == 3.0
    inputs = unet_inputs(frames=2)
    with torch.no_grad():
        ours = lora(bare(model), made)(**inputs).sample
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].repeat_interleave(2, 0)
        other = theirs(inputs["sample"].transpose(1, 2), *list(inputs.values())[1:]).sample.transpose(1, 2)
    assert (ours - other).abs().max() <= 1e-5


@pytest.mark.parametrize("format", ["comfyui", "kohya"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "lokr", "loha"])
def test_comfyuis_rule_gives_the_weights_that_peft_gives(kind: str, format: str, tmp_path: Path) -> None:
    over, ours = network(), nn.Module.double(bare(unet()))
    made = adapter(over, kind=kind) if kind in file.LORA_KINDS else product(over, PRODUCTS[kind])
    foreign.write(tmp_path / "a.safetensors", made, format, over)
    tensors, born = load_file(tmp_path / "a.safetensors"), unet().state_dict()
    original = svd_keys.unet_to_sgm(born, original_names.UNetLayout.of(unet().config))
    weights = {f"{comfyui.PREFIX}{original[key]}": value.double() for key, value in born.items()}
    flat = {name.removesuffix(".weight"): key.removesuffix(".weight") for key, name in original.items()}
    assert comfyui.apply(weights, flat, tensors) == len(tensors)
    attach.load(ours, made)
    for _, layer in attach.layers(ours):
        layer.merge()
    attach.detach(ours)
    for key, value in ours.state_dict().items():
        assert (value - weights[f"{comfyui.PREFIX}{original[key]}"]).abs().max() < 1e-6
    moved = {
        key.removesuffix(".weight") for key, value in ours.state_dict().items() if not value.equal(born[key].double())
    }
    assert moved == made.rank.keys()


# --- files of other programs ------------------------------------------------------------------------------------------


def image_lora(parent: UNet2DConditionModel) -> dict[str, Tensor]:
    """What kohya's scripts write of an image model, flat and with alphas, pointwise convolutions as such."""
    made = adapter(Network.of(parent), SPATIAL)
    tensors = {}
    for name, value in made.tensors.items():
        layer = file.module_of(name)
        end = "lora_down" if "lora_A" in name else "lora_up"
        tensors[f"lora_unet_{layer.replace('.', '_')}.{end}.weight"] = value
        tensors[f"lora_unet_{layer.replace('.', '_')}.alpha"] = torch.tensor(3.0)
    return tensors


@pytest.mark.parametrize("linear", [False, True])
def test_an_image_models_lora_becomes_one_of_every_inflation(linear: bool, tmp_path: Path) -> None:
    tensors = image_lora(tiny_unet(linear, norm_num_groups=32))
    proj = "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"
    tensors[proj] = tensors[proj].reshape(4, 32, 1, 1)  # a pointwise convolution, whatever ours is
    save_file(tensors, tmp_path / "kohya.safetensors")
    for spec in (SVD, MODELSCOPE):
        over = Network.of(unet(spec, linear))
        found, format = foreign.read(tmp_path / "kohya.safetensors", over)
        assert format == "kohya"
        assert found.alpha == dict.fromkeys(SPATIAL, 3.0)
        assert found.tensors["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"].ndim == (2 if linear else 4)
        assert set(found.rank) == set(SPATIAL)


def test_an_image_models_lora_acts_alike_on_each_frame(tmp_path: Path) -> None:
    parent = tiny_unet()
    save_file(image_lora(parent), tmp_path / "kohya.safetensors")
    video, _ = inflate_unet(parent, replace(MODELSCOPE, dropout=0.0))
    made = foreign.read(tmp_path / "kohya.safetensors", Network.of(video)).adapter
    inputs = unet_inputs(batch=1, frames=2)
    with torch.no_grad():
        ours = lora(video, made)(**inputs).sample[0]
        context = inputs["encoder_hidden_states"].expand(2, -1, -1)
        other = lora(parent, made)(inputs["sample"][0], inputs["timestep"], context).sample
    assert (ours - other).abs().max() <= 1e-5


def test_diffusers_reads_the_kohya_files_that_are_written(tmp_path: Path) -> None:
    parent = tiny_unet(norm_num_groups=32)
    made = adapter(Network.of(parent), SPATIAL)
    foreign.write(tmp_path / "kohya.safetensors", made, "kohya", Network.of(parent))
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(tmp_path / "kohya.safetensors")
    theirs = tiny_unet(norm_num_groups=32)
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, theirs, "kohya")
    inputs = unet_inputs(batch=2)
    arguments = (inputs["sample"][:, 0], inputs["timestep"], inputs["encoder_hidden_states"])
    with torch.no_grad():
        plain, other = parent(*arguments).sample, theirs(*arguments).sample
        ours = lora(parent, made)(*arguments).sample
    assert (ours - plain).abs().max() > 1e-2
    assert (ours - other).abs().max() <= 1e-5


def test_older_spellings_of_diffusers_are_known(tmp_path: Path) -> None:
    over = network()
    first = adapter(over, (Q,)).tensors
    out = Q.replace("to_q", "to_out.0")
    tensors = {
        f"unet.{Q.replace('.to_q', '.processor.to_q_lora')}.down.weight": first[f"unet.{Q}.lora_A.weight"],
        f"unet.{Q.replace('.to_q', '.processor.to_q_lora')}.up.weight": first[f"unet.{Q}.lora_B.weight"],
        f"unet.{Q.replace('.to_q', '.processor.to_out_lora')}.down.weight": first[f"unet.{Q}.lora_A.weight"].clone(),
        f"unet.{Q.replace('.to_q', '.processor.to_out_lora')}.up.weight": first[f"unet.{Q}.lora_B.weight"].clone(),
    }
    save_file(tensors, tmp_path / "old.safetensors")
    found, format = foreign.read(tmp_path / "old.safetensors", over)
    assert format == "attention-processors"
    assert found.alpha == {Q: 2.0, out: 2.0}


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "unet."])
def test_spellings_of_peft_are_known(prefix: str, tmp_path: Path) -> None:
    made = adapter(network(), kind="dora")
    ends = {"A.weight": "A.default.weight", "B.weight": "B.default.weight", "vector": "vector.default.weight"}
    tensors = {}
    for name, value in made.tensors.items():
        end = next(end for end in ends if name.endswith(end))
        tensors[f"{prefix}{name.removeprefix('unet.').removesuffix(end)}{ends[end]}"] = value
    save_file(tensors, tmp_path / "a.safetensors")
    found = foreign.read(tmp_path / "a.safetensors", network(), alpha=3.0)
    assert found.format == "inflate"
    assert same(replace(found.adapter, about=made.about), made)


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    made = adapter(network(), (Q,))
    save_file({**made.tensors, f"{Q}.lora_A.weight": torch.ones(2, 32)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="twice, under another name too"):
        foreign.read(tmp_path / "a.safetensors", network(), alpha=3.0)


def test_motion_loras_of_animatediff_are_known(tmp_path: Path) -> None:
    over = network(ANIMATEDIFF_V2)
    layer = "down_blocks.0.attentions.0.temporal.transformer_blocks.0.attn2.to_v"
    made = adapter(over, (layer,)).tensors
    theirs = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1"
    ends = {"lora_A": "processor.to_v_lora.down", "lora_B": "processor.to_v_lora.up"}
    tensors = {f"module.{theirs}.{new}.weight": made[f"unet.{layer}.{old}.weight"] for old, new in ends.items()}
    save_file(tensors, tmp_path / "zoom.safetensors")
    found = foreign.read(tmp_path / "zoom.safetensors", over)
    assert found.format == "attention-processors"
    assert found.adapter.tensors.keys() == made.keys()


def test_xl_files_of_kohya_have_the_original_names(tmp_path: Path) -> None:
    over = Network.of(tiny_unet_sdxl())
    layer = "down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_q"
    made = adapter(over, (layer,))
    foreign.write(tmp_path / "a.safetensors", made, "kohya", over)
    assert {name.split(".")[0] for name in load_file(tmp_path / "a.safetensors")} == {
        "lora_unet_input_blocks_3_1_transformer_blocks_2_attn1_to_q"
    }
    assert same(foreign.read(tmp_path / "a.safetensors", over).adapter, made)


def broken(folder: Path, **changes: Tensor | None) -> Path:
    """A file of kohya's with tensors added, replaced or (None) left out; __ in a name is a dot."""
    tensors = image_lora(tiny_unet(True, norm_num_groups=32))
    for name, value in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if value is not None:
            tensors[name.replace("__", ".")] = value
    save_file(tensors, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


FLAT_Q = f"lora_unet_{Q.replace('.', '_')}"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_te_x__lora_down__weight": torch.ones(2, 2)}, "1 tensors for text encoders.*--without-text"),
        ({"lora_unet_x__lora_down__weight": torch.ones(2, 2)}, "kohya comes nearest and lacks x;"),
        ({f"{FLAT_Q}__diff": torch.ones(2, 2)}, f"no known kind of adapter: {FLAT_Q}.diff"),
        ({f"{FLAT_Q}__lora_up__weight": None}, f"does not hold whole adapters.*: {Q} \\(lora_A.weight\\)"),
        ({f"{FLAT_Q}__dora_scale": torch.ones(32, 1)}, "mixes dora and lora"),
        ({f"{FLAT_Q}__dora_scale": torch.ones(1, 32)}, f"other shapes than this UNet's: {Q}.dora_scale \\(1, 32\\)"),
        ({f"{FLAT_Q}__lora_down__weight": torch.ones(2, 9)}, f"{Q}.lora_A.weight \\(2, 9\\) over \\(32, 32\\)"),
        ({f"{FLAT_Q}__lora_up__weight": torch.ones(32, 5)}, "not of the rank 2"),
        ({f"{FLAT_Q}__lora_down__weight": torch.full((2, 32), torch.nan)}, "is not finite"),
    ],
    ids=["text", "layer", "kind", "half", "mixed", "columns", "shape", "rank", "nan"],
)
def test_what_does_not_fit_is_listed(changes: dict[str, Tensor | None], told: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=told):
        foreign.read(broken(tmp_path, **changes), network())


def test_text_encoders_are_left_out_where_asked(tmp_path: Path) -> None:
    path = broken(tmp_path, lora_te_x__lora_down__weight=torch.ones(2, 2))
    assert set(foreign.read(path, network(), without_text=True).adapter.rank) == set(SPATIAL)


def test_an_alpha_that_nobody_tells_must_be_given(tmp_path: Path) -> None:
    save_file(adapter(network()).tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="does not say its alpha"):
        foreign.read(tmp_path / "a.safetensors", network())
    assert foreign.read(tmp_path / "a.safetensors", network(), alpha=4).adapter.alpha[Q] == 4.0


def test_what_another_program_changed_is_read_as_it_is_now(tmp_path: Path) -> None:
    made = adapter(network(), kind="rslora")
    foreign.write(tmp_path / "a.safetensors", made, "kohya", network())
    tensors, told = file.read_tensors(tmp_path / "a.safetensors", foreign.ANY_NAME)
    tensors = {name: value * 2 if name.endswith(".alpha") else value for name, value in tensors.items()}
    file.write_tensors(tmp_path / "b.safetensors", tensors, told)
    found = foreign.read(tmp_path / "b.safetensors", network()).adapter
    assert (found.kind, found.about) == ("lora", {})
    assert found.alpha[Q] == pytest.approx(2 * 3 * 2**0.5)


def test_what_another_program_took_out_is_not_missed(tmp_path: Path) -> None:
    foreign.write(tmp_path / "a.safetensors", adapter(network()), "kohya", network())
    tensors, told = file.read_tensors(tmp_path / "a.safetensors", foreign.ANY_NAME)
    kept = {name: value for name, value in tensors.items() if name.startswith(f"{FLAT_Q}.")}
    file.write_tensors(tmp_path / "b.safetensors", kept, told)
    assert foreign.read(tmp_path / "b.safetensors", network()).adapter.rank == {Q: 2}


def test_a_format_without_alpha_refuses_one(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="attention-processors has no place for an alpha other than the rank in 1"
    ):
        foreign.write(tmp_path / "a.safetensors", adapter(network(), (Q,)), "attention-processors", network())
    with pytest.raises(CheckpointError, match=f"attention-processors has no place for 1 layers: {TEMPORAL_Q}"):
        foreign.write(
            tmp_path / "a.safetensors", adapter(network(), (Q, TEMPORAL_Q)), "attention-processors", network()
        )


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["adapter", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_temporal_adapters_go_over_every_image_model_of_one_shape(tmp_path: Path) -> None:
    one, other = write_image_model(tmp_path / "one"), write_image_model(tmp_path / "other")
    over = Network.of(outlines.outline(str(one), "svd"))
    made = adapter(over, (TEMPORAL_Q, TEMPORAL_CONV))
    made = replace(made, about={"family": "svd", "base": {"name": str(one), "sha256": "a"}})
    file.write(tmp_path / "motion.safetensors", made)
    run("convert", tmp_path / "motion.safetensors", tmp_path / "comfy.safetensors", "--to", "comfyui")
    output = run("convert", tmp_path / "comfy.safetensors", tmp_path / "back.safetensors", "--model", other)
    assert "comfyui, a lora of 2 layers, rank 2, 3" in output
    assert same(file.read(tmp_path / "back.safetensors"), made)


def test_who_reads_a_dora_otherwise_is_told(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", write_image_model(tmp_path / "model")
    over = Network.of(outlines.outline(str(model), "svd"))
    file.write(
        path, replace(adapter(over, kind="dora"), about={"family": "svd", "base": {"name": str(model), "sha256": "a"}})
    )
    output = run("convert", path, tmp_path / "b.safetensors", "--to", "kohya")
    assert "ComfyUI computes another model of a DoRA" in output


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ('{"base": [1], "family": [2]}', "name it as --model"),
        ('{"base": {"name": "a/b"}}', "a/b, which is not on this disk"),
        ("[" * 100_000, "the header's entry inflate is damaged"),
    ],
)
def test_headers_of_strangers_are_believed_in_nothing(entry: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(adapter(network(), (Q,)).tensors, path, {file.OWN_KEY: entry})
    result = CliRunner().invoke(app, ["adapter", "convert", str(path), str(tmp_path / "b.safetensors")])
    assert result.exit_code == 1
    assert told in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_that_does_not_tell_its_model_needs_one(tmp_path: Path) -> None:
    save_file(image_lora(tiny_unet(True, norm_num_groups=32)), tmp_path / "kohya.safetensors")
    result = CliRunner().invoke(
        app, ["adapter", "convert", str(tmp_path / "kohya.safetensors"), str(tmp_path / "a.safetensors")]
    )
    assert result.exit_code == 1
    assert "name it as --model" in result.output
    model = write_image_model(tmp_path / "model")
    run("convert", tmp_path / "kohya.safetensors", tmp_path / "a.safetensors", "--model", model)
    assert set(file.read(tmp_path / "a.safetensors").rank) == set(SPATIAL)
