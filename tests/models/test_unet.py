import copy
import json
from dataclasses import replace

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from helpers import CROSS, randomise, tiny_unet, tiny_unet_sd1, tiny_unet_sd2, tiny_unet_sdxl, unet_inputs
from inflate.errors import CheckpointError, ConfigError, InflateError
from inflate.models.unet import ANIMATEDIFF_V1, ANIMATEDIFF_V2, MODELSCOPE, TemporalSpec, VideoUNet

SPEC = TemporalSpec(added_ids=0)
SMALL = TemporalSpec(added_id_dim=8)
PRESETS = [SPEC, MODELSCOPE, ANIMATEDIFF_V2]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(spec=SPEC, build=tiny_unet_sd2, **settings):
    unet = VideoUNet.from_2d(build(**settings), spec)
    randomise(unet)
    return unet


def frame_by_frame(parent, inputs):
    """The 2D model's prediction for each frame: (B,F,C,h,w)."""
    sample = inputs["sample"]
    frames = sample.shape[1]
    steps = inputs["timestep"].repeat_interleave(frames)
    context = inputs["encoder_hidden_states"].repeat_interleave(frames, 0)
    return parent(sample.flatten(0, 1), steps, context).sample.unflatten(0, sample.shape[:2])


def diffusers_svd():
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=CROSS,
        num_attention_heads=(2, 4),
        layers_per_block=1,
        transformer_layers_per_block=2,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    ).eval()
    randomise(unet)
    return unet


def from_diffusers(state):
    """Names of diffusers' video UNet in ours."""
    renamed = {}
    for name, value in state.items():
        name = name.replace(".spatial_res_block.", ".").replace(".temporal_res_block.", ".temporal.")
        name = name.replace(".time_mixer.mix_factor", ".temporal.mix").replace(
            ".time_pos_embed.", ".temporal.position."
        )
        name = name.replace("add_embedding.", "class_embedding.")
        if ".temporal_transformer_blocks." in name:
            before, after = name.split(".temporal_transformer_blocks.")
            depth, rest = after.split(".", 1)
            name = f"{before}.transformer_blocks.{depth}.temporal.{rest}"
        renamed[name] = value
    return renamed


def ours_like_diffusers(theirs, eps):
    heads = {"attention_head_dim": (2, 4), "norm_num_groups": 32, "transformer_layers_per_block": 2}
    spec = TemporalSpec(added_id_dim=8, cross_attention_resnet_eps=eps)
    ours = VideoUNet.from_2d(tiny_unet_sd2(**heads), spec, in_channels=8)
    ours.load_state_dict(from_diffusers(theirs.state_dict()))
    return ours


@pytest.mark.parametrize("tokens", [1, 3])
def test_equals_diffusers(tokens):
    theirs = diffusers_svd()
    ours = ours_like_diffusers(theirs, 1e-6)
    inputs = unet_inputs(channels=8, tokens=tokens)
    inputs["timestep"] = inputs["timestep"] / 900
    ids = torch.rand(2, 3) * 100
    expected = theirs(**inputs, added_time_ids=ids).sample
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours(**inputs, added_time_ids=ids).sample, expected, atol=2e-5, rtol=0)


def test_epsilon_mode_matters():
    theirs = diffusers_svd().double()
    inputs = {name: value.double() for name, value in unet_inputs(channels=8, tokens=1).items()}
    ids = torch.rand(2, 3).double()
    expected = theirs(**inputs, added_time_ids=ids).sample
    found = {
        eps: ours_like_diffusers(theirs, eps).double()(**inputs, added_time_ids=ids).sample for eps in (1e-6, 1e-5)
    }
    assert (found[1e-6] - expected).abs().max() < 1e-9
    assert (found[1e-5] - expected).abs().max() > 1e-8


def test_every_2d_key_is_kept_and_every_other_is_temporal():
    parent = tiny_unet_sd1()
    unet = VideoUNet.from_2d(parent, SPEC)
    added = unet.state_dict().keys() - parent.state_dict().keys()
    assert parent.state_dict().keys() <= unet.state_dict().keys()
    assert added == unet.temporal_parameters().keys()
    assert all(".temporal." in name for name in added)
    assert "down_blocks.0.resnets.0.temporal.mix" in added
    assert "down_blocks.0.attentions.0.temporal.position.linear_1.weight" in added
    assert "down_blocks.0.attentions.0.transformer_blocks.0.temporal.attn1.to_q.weight" in added


@pytest.mark.parametrize("spec", [TemporalSpec(resnet=False, added_ids=0), TemporalSpec(block=False, added_ids=0)])
def test_the_spec_chooses_the_layers(spec):
    unet = trained(spec)
    names = unet.temporal_parameters()
    assert any("resnets." in name for name in names) == spec.resnet
    assert any("attentions." in name for name in names) == spec.block
    inputs = unet_inputs()
    flipped = {**inputs, "sample": inputs["sample"].flip(1)}
    assert (unet(**flipped).sample.flip(1) - unet(**inputs).sample).abs().max() > 1e-5


def test_frames_see_their_own_clip_only():
    unet = trained()
    inputs = unet_inputs()
    before = unet(**inputs).sample
    inputs["sample"][0, 2] += 1
    change = (unet(**inputs).sample - before).abs().amax((2, 3, 4))
    assert (change[0] > 1e-5).all()
    assert (change[1] < 1e-6).all()


def test_timesteps_may_be_scalar_per_clip_or_per_frame():
    unet = trained()
    inputs = unet_inputs()
    outputs = [
        unet(**{**inputs, "timestep": steps}).sample
        for steps in (7, 7.0, torch.tensor(7.0), torch.full((2,), 7.0), torch.full((2, 3), 7.0), torch.tensor([7.0]))
    ]
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])
    steps = torch.full((2, 3), 7.0)
    steps[0, 1] = 500
    assert (unet(**{**inputs, "timestep": steps}).sample - outputs[0])[0].abs().max() > 1e-4


def test_per_frame_context_equals_the_repeated_one_and_its_first_frame_rules_time():
    unet = trained()
    inputs = unet_inputs()
    context = inputs["encoder_hidden_states"]
    repeated = context.unsqueeze(1).repeat(1, 3, 1, 1)
    assert torch.equal(unet(**{**inputs, "encoder_hidden_states": repeated}).sample, unet(**inputs).sample)


@pytest.mark.parametrize("spec", PRESETS)
def test_image_frames_are_the_2d_models_prediction(spec):
    parent = tiny_unet_sd2()
    unet = VideoUNet.from_2d(parent, spec).eval()
    for parameter in unet.temporal_parameters().values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    inputs = unet_inputs()
    images = torch.tensor([[True, True, True], [False, False, False]])
    output, expected = unet(**inputs, image_only=images).sample, frame_by_frame(parent, inputs)
    torch.testing.assert_close(output[0], expected[0], atol=1e-6, rtol=0)
    assert (output[1] - expected[1]).abs().max() > 1e-4
    assert torch.equal(output[1], unet(**inputs, image_only=torch.zeros(2, 3)).sample[1])


def test_added_ids_change_the_output_once_trained():
    unet = trained(SMALL)
    inputs = unet_inputs()
    one = unet(**inputs, added_time_ids=torch.tensor([[6.0, 127, 0.02]] * 2)).sample
    two = unet(**inputs, added_time_ids=torch.tensor([[6.0, 127, 0.02], [6.0, 30, 0.02]])).sample
    torch.testing.assert_close(one[0], two[0], atol=1e-6, rtol=0)
    assert (one[1] - two[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(2, 4, 8, 8)}, "sample must be"),
        ({"timestep": torch.zeros(5)}, "timestep must be"),
        ({"encoder_hidden_states": torch.zeros(6, 5, CROSS)}, "encoder_hidden_states must be"),
        ({"image_only": torch.zeros(2, 4)}, "image_only must be"),
        ({"added_time_ids": None}, "takes 3 added ids"),
        ({"added_time_ids": torch.zeros(2, 4)}, "added_time_ids must be"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    inputs = {**unet_inputs(), "added_time_ids": torch.zeros(2, 3), **change}
    with pytest.raises(InflateError, match=message):
        trained(SMALL)(**inputs)


def test_controlnet_residuals_pass_through():
    parent = tiny_unet_sd2()
    unet = VideoUNet.from_2d(parent, SPEC)
    inputs = unet_inputs()
    shapes = [(32, 8), (32, 8), (32, 4), (64, 4)]
    extra = {
        "down_block_additional_residuals": tuple(torch.randn(6, width, side, side) for width, side in shapes),
        "mid_block_additional_residual": torch.randn(6, 64, 4, 4),
    }
    steps, context = inputs["timestep"].repeat_interleave(3), inputs["encoder_hidden_states"].repeat_interleave(3, 0)
    expected = parent(inputs["sample"].flatten(0, 1), steps, context, **extra).sample
    assert torch.equal(unet(**inputs, **extra).sample.flatten(0, 1), expected)
    assert isinstance(unet(**inputs, return_dict=False), tuple)


@pytest.mark.parametrize(("build", "spec"), [(tiny_unet_sd1, SPEC), *((tiny_unet_sd2, spec) for spec in PRESETS)])
def test_a_lora_of_the_parent_shifts_each_frame_as_it_shifts_the_parent(build, spec, tmp_path):
    parent = build()
    unet = VideoUNet.from_2d(parent, spec)
    inputs = unet_inputs()
    plain = frame_by_frame(parent, inputs)
    parent.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, parameter in parent.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    parent.save_lora_adapter(tmp_path)
    weights = {"weight_name": "pytorch_lora_weights.safetensors", "use_safetensors": True}
    # The parent's short target names ("to_q") also fit temporal layers; peft says so, and follows the file.
    with pytest.warns(RuntimeWarning, match=r"additional target modules: \['[^']*\.temporal\."):
        unet.load_lora_adapter(tmp_path, prefix=None, **weights)
    expected = frame_by_frame(parent, inputs)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(unet(**inputs).sample, expected, atol=1e-5, rtol=0)
    loaded = [name for name, _ in unet.named_parameters() if "lora_" in name]
    assert loaded
    assert not any(".temporal." in name for name in loaded)


@pytest.mark.parametrize("spec", PRESETS)
def test_a_temporal_lora_learns_by_peft(spec):
    unet = trained(spec)
    unet.add_adapter(LoraConfig(r=2, target_modules=r".*\.temporal\.(transformer_blocks\.0\.)?attn1\.to_[qkv]"))
    unet(**unet_inputs()).sample.square().sum().backward()
    trainable = {name: value for name, value in unet.named_parameters() if value.requires_grad}
    assert trainable
    assert all(".temporal." in name and ".attn1." in name and "lora_" in name for name in trainable)
    assert all(value.grad is not None for value in trainable.values())
    assert any(value.grad.abs().max() > 0 for value in trainable.values())


@pytest.mark.parametrize("build", [tiny_unet_sd1, tiny_unet_sd2])
def test_round_trip_is_bit_equal(build, tmp_path):
    unet = VideoUNet.from_2d(build(), SMALL, in_channels=8)
    randomise(unet)
    unet.save_pretrained(tmp_path)
    again = VideoUNet.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["temporal"] == SMALL.to_dict()
    assert again.spec == unet.spec == SMALL
    assert again.state_dict().keys() == unet.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in unet.state_dict().items())
    inputs = {**unet_inputs(channels=8), "added_time_ids": torch.ones(2, 3)}
    assert torch.equal(again(**inputs).sample, unet(**inputs).sample)
    assert VideoUNet.from_config(unet.config).state_dict().keys() == unet.state_dict().keys()


def test_loading_info_and_precision_are_passed_on(tmp_path):
    trained().save_pretrained(tmp_path)
    again, info = VideoUNet.from_pretrained(tmp_path, output_loading_info=True, torch_dtype=torch.bfloat16)
    assert info["missing_keys"] == []
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_other_tensors_are_refused(tmp_path, change):
    trained().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    if change == "missing":
        state.pop("mid_block.resnets.1.temporal.mix")
    else:
        state["mid_block.resnets.1.temporal.odd"] = torch.zeros(1)
    save_file(state, file)
    with pytest.raises(CheckpointError, match=rf"{change}: mid_block\.resnets\.1\.temporal\."):
        VideoUNet.from_pretrained(tmp_path)


def test_a_tensor_of_another_shape_or_a_folder_without_weights_is_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["mid_block.resnets.1.temporal.mix"] = torch.zeros(3)
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"mid_block\.resnets\.1\.temporal\.mix"):
        VideoUNet.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="diffusion_pytorch_model"):
        VideoUNet.from_pretrained(tmp_path)


def test_a_2d_folder_is_refused(tmp_path):
    tiny_unet().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not hold this model's tensors; missing"):
        VideoUNet.from_pretrained(tmp_path)


def test_spec_round_trip_and_unknown_setting():
    assert TemporalSpec.from_dict(SMALL.to_dict()) == SMALL
    with pytest.raises(ConfigError, match="unknown setting resnets; known: resnet, block"):
        TemporalSpec.from_dict({"resnets": True})
    with pytest.raises(ConfigError, match="block and motion would share the place at the transformers"):
        TemporalSpec(resnet=False, motion=True)
    with pytest.raises(ConfigError, match="motion_norm=frames is neither clip nor frame"):
        TemporalSpec(motion_norm="frames")


def test_a_model_saved_before_the_slots_loads_as_before(tmp_path):
    unet = trained(replace(SPEC, each_up_to=9), tiny_unet_sdxl)
    unet.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    then = ("resnet", "block", "added_ids", "added_id_dim", "cross_attention_resnet_eps")
    config["temporal"] = {name: config["temporal"][name] for name in then}
    file.write_text(json.dumps(config))
    again = VideoUNet.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in unet.state_dict().items())


def blocks_with_time(unet):
    return [n for n, m in unet.named_modules() if n.endswith(".temporal") and ".transformer_blocks." in n]


def test_deep_transformers_get_one_temporal_block_after_their_last():
    middle = "mid_block.attentions.0.transformer_blocks"
    found = [n for n in blocks_with_time(trained(SPEC, tiny_unet_sdxl)) if n.startswith("mid_block")]
    assert found == [f"{middle}.2.temporal"]
    each = blocks_with_time(trained(replace(SPEC, each_up_to=3), tiny_unet_sdxl))
    assert [n for n in each if n.startswith("mid_block")] == [f"{middle}.{i}.temporal" for i in range(3)]


def owners(spec, build=tiny_unet_sd2):
    return {n.removesuffix(".temporal") for n, _ in trained(spec, build).named_modules() if n.endswith(".temporal")}


def test_where_the_slots_are():
    resnets = {n for n, m in tiny_unet_sd2().named_modules() if type(m).__name__ == "ResnetBlock2D"}
    attentions = {n for n, m in tiny_unet_sd2().named_modules() if type(m).__name__ == "Transformer2DModel"}
    assert owners(MODELSCOPE) == resnets | attentions | {"conv_in"}
    pairs = {n for n in resnets if n.startswith(("down_blocks.1", "up_blocks.0"))} | attentions
    assert owners(ANIMATEDIFF_V2) == pairs
    assert owners(ANIMATEDIFF_V1) == pairs - {"mid_block.attentions.0"}


@pytest.mark.parametrize("spec", [MODELSCOPE, ANIMATEDIFF_V2])
def test_saved_slots_round_trip(spec, tmp_path):
    unet = trained(spec)
    unet.save_pretrained(tmp_path)
    again = VideoUNet.from_pretrained(tmp_path)
    assert again.spec == spec
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in unet.state_dict().items())
    assert torch.equal(again(**unet_inputs()).sample, unet(**unet_inputs()).sample)


def test_a_clip_longer_than_the_positions_is_refused():
    unet = trained(replace(ANIMATEDIFF_V2, motion_frames=3))
    assert unet(**unet_inputs(frames=3)).sample.isfinite().all()
    with pytest.raises(InflateError, match="4 frames is longer than the 3 positions"):
        unet(**unet_inputs(frames=4))


def gradients(unet, calls):
    unet.zero_grad()
    torch.manual_seed(0)  # of dropout
    sum(unet(**call).sample.square().sum() for call in calls).backward()
    return {name: value.grad.clone() for name, value in unet.named_parameters() if value.grad is not None}


def two_clips():
    images = torch.tensor([[True, False, False, True]])
    return [unet_inputs(), {**unet_inputs(batch=1, frames=4, tokens=1, seed=1), "image_only": images}]


@pytest.mark.parametrize(
    ("build", "spec"),
    [(tiny_unet_sd1, SPEC), (tiny_unet_sd2, SPEC), (tiny_unet_sd1, MODELSCOPE), (tiny_unet_sd2, ANIMATEDIFF_V2)],
)
def test_checkpointing_leaves_gradients_equal_over_two_different_clips(build, spec):
    unet = trained(spec, build=build).double().train()
    calls = [
        {name: value.double() if value.is_floating_point() else value for name, value in call.items()}
        for call in two_clips()
    ]
    plain = gradients(unet, calls)
    unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing
    checkpointed = gradients(unet, calls)
    assert plain.keys() == checkpointed.keys() == dict(unet.named_parameters()).keys()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, atol=1e-10, rtol=1e-8, msg=name)
    unet.disable_gradient_checkpointing()
    assert not unet.is_gradient_checkpointing


def kept(unet, inputs):
    """Bytes that the graph of one forward pass keeps, parameters left out."""
    own = {parameter.data_ptr() for parameter in unet.parameters()}
    sizes = {}

    def note(tensor):
        if tensor.data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        unet(**inputs).sample.sum()
    return sum(sizes.values())


def test_checkpointing_keeps_the_inputs_of_units_only():
    unet = trained().train()
    inputs = unet_inputs(batch=1, frames=8)
    plain = kept(unet, inputs)
    unet.enable_gradient_checkpointing()
    assert kept(unet, inputs) < plain / 8


def test_a_given_checkpoint_function_is_used():
    unet = trained().train()
    called = []

    def own(function, *tensors):
        called.append(len(tensors))
        return function(*tensors)

    unet.enable_gradient_checkpointing(own)
    unet(**unet_inputs())
    units = len(unet.down_blocks) + sum(len(block.resnets) for block in unet.up_blocks) + 2
    assert len(called) >= units


def test_one_token_contexts_skip_frozen_queries():
    unet = trained().train()
    inputs = unet_inputs(tokens=1)
    plain = unet(**inputs).sample
    for parameter in unet.inert_parameters().values():
        parameter.requires_grad_(False)
    output = unet(**inputs).sample
    torch.testing.assert_close(output, plain, atol=5e-6, rtol=0)
    output.square().sum().backward()
    assert all(value.grad is not None for value in unet.parameters() if value.requires_grad)
    names = unet.inert_parameters()
    assert "mid_block.attentions.0.transformer_blocks.0.temporal.attn2.to_q.weight" in names
    assert "mid_block.attentions.0.transformer_blocks.0.norm2.weight" in names
    assert not any("resnets" in name for name in names)
    assert not any(".temporal." in name for name in trained(MODELSCOPE).inert_parameters())


def test_a_copy_has_a_clip_state_of_its_own():
    unet = trained()
    twin = copy.deepcopy(unet)
    assert twin.clip is not unet.clip
    assert twin.mid_block.resnets[0].clip is twin.clip
    block = twin.mid_block.attentions[0]
    assert block.transformer_blocks[0].shared is block.temporal
    assert torch.equal(twin(**unet_inputs()).sample, unet(**unet_inputs()).sample)


def test_a_layer_called_on_its_own_is_an_error():
    with pytest.raises(InflateError, match="call the whole model"):
        trained().mid_block.resnets[0](torch.randn(3, 64, 4, 4), torch.randn(3, 128))


def test_bfloat16_runs_and_stays_bfloat16():
    unet = trained(SMALL).to(torch.bfloat16)
    inputs = {name: value.bfloat16() for name, value in unet_inputs().items()}
    assert unet(**inputs, added_time_ids=torch.ones(2, 3)).sample.dtype == torch.bfloat16


def test_autocast_runs():
    unet = trained(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        output = unet(**unet_inputs(), added_time_ids=torch.ones(2, 3)).sample
    assert output.isfinite().all()
