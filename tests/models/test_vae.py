import json

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from safetensors.torch import load_file, save_file

from helpers import randomise, tiny_vae
from inflate.errors import CheckpointError, ConfigError, InflateError, SurgeryError
from inflate.models.precision import cast
from inflate.models.vae import VideoVAE, decode_clips, encode_at_most, encode_clips, encode_frames, frame_by_frame
from inflate.surgery import verify_identity


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained_vae(**settings):
    vae = VideoVAE.from_2d(tiny_vae(**settings))
    randomise(vae)
    return vae


def from_diffusers(state):
    """Names of diffusers' temporal decoder in ours."""
    changes = ((".spatial_res_block.", "."), (".temporal_res_block.", ".temporal."))
    changes += ((".time_mixer.mix_factor", ".temporal.mix"), ("time_conv_out.", "conv_out.temporal."))
    renamed = {}
    for name, value in state.items():
        for old, new in changes:
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


def test_newborn_equals_its_parent():
    parent = tiny_vae()
    assert verify_identity(VideoVAE.from_2d(parent), parent) == 0.0


@pytest.mark.parametrize("batch", [1, 2])
def test_decoder_equals_diffusers(batch):
    widths = {"block_out_channels": (32, 64), "norm_num_groups": 32, "layers_per_block": 2}
    theirs = TemporalDecoder(block_out_channels=(32, 64), layers_per_block=2).eval()
    randomise(theirs)
    vae = VideoVAE.from_2d(tiny_vae(use_post_quant_conv=False, **widths))
    vae.decoder.load_state_dict(from_diffusers(theirs.state_dict()))
    latent = torch.randn(batch, 3, 4, 4, 6)
    expected = theirs(latent.flatten(0, 1), torch.zeros(batch, 3), num_frames=3)
    torch.testing.assert_close(vae.decode(latent).sample.flatten(0, 1), expected, atol=2e-5, rtol=0)


def test_frames_are_coupled_only_within_their_clip():
    vae = trained_vae()
    latent = torch.randn(2, 3, 4, 4, 4)
    before = vae.decode(latent).sample
    latent[0, 2] += 1
    change = (vae.decode(latent).sample - before).abs().amax((2, 3, 4))
    assert (change[0] > 1e-5).all()
    assert (change[1] == 0).all()


def test_images_and_image_only_clips_leave_the_temporal_layers_out():
    parent = tiny_vae()
    vae = VideoVAE.from_2d(parent)
    for name, parameter in vae.temporal_parameters().items():
        parameter.data.add_(1 if name.endswith("mix") else 0.1)
    latent = torch.randn(2, 3, 4, 4, 4)
    expected = parent.decode(latent.flatten(0, 1)).sample
    assert torch.equal(vae.decode(latent.flatten(0, 1)).sample, expected)
    assert torch.equal(vae.decode(latent, image_only=True).sample.flatten(0, 1), expected)
    assert (vae.decode(latent).sample.flatten(0, 1) - expected).abs().max() > 1e-3


def test_encoding_is_the_parents():
    parent = tiny_vae()
    image = torch.randn(2, 3, 16, 16)
    expected = parent.encode(image).latent_dist.mode()
    assert torch.equal(VideoVAE.from_2d(parent).encode(image).latent_dist.mode(), expected)


def test_round_trip_is_bit_equal(tmp_path):
    vae = trained_vae()
    vae.save_pretrained(tmp_path)
    again = VideoVAE.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "VideoVAE"
    assert again.config.scaling_factor == vae.config.scaling_factor
    assert again.state_dict().keys() == vae.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in vae.state_dict().items())


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_other_tensors_are_refused(tmp_path, change):
    trained_vae().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    if change == "missing":
        state.pop("decoder.conv_out.temporal.weight")
    else:
        state["decoder.conv_out.temporal.odd"] = torch.zeros(1)
    save_file(state, file)
    with pytest.raises(CheckpointError, match=rf"{change}: decoder\.conv_out\.temporal\."):
        VideoVAE.from_pretrained(tmp_path)


def test_slicing_and_tiling_are_refused():
    vae = trained_vae()
    for enable in (vae.enable_slicing, vae.enable_tiling):
        with pytest.raises(ConfigError, match=r"stream\(rows\)"):
            enable()
    vae.use_tiling = True
    with pytest.raises(ConfigError, match="tiles"):
        vae.decode(torch.randn(1, 2, 4, 4, 4))


def test_a_parent_that_slices_gives_a_child_that_does_not():
    parent = tiny_vae()
    parent.enable_slicing()
    assert VideoVAE.from_2d(parent).decode(torch.randn(1, 2, 4, 4, 4)).sample.shape == (1, 2, 3, 8, 8)
    assert parent.use_slicing


def test_a_latent_of_other_dimensions_is_refused():
    with pytest.raises(InflateError, match="z must be"):
        trained_vae().decode(torch.randn(4, 4, 4))


def gradients(vae, calls):
    vae.zero_grad()
    sum(vae.decode(latent, **settings).sample.square().sum() for latent, settings in calls).backward()
    return {name: value.grad.clone() for name, value in vae.named_parameters() if value.grad is not None}


def test_checkpointing_leaves_gradients_equal_over_two_different_clips():
    vae = trained_vae().train()
    calls = [(torch.randn(1, 3, 4, 4, 4), {}), (torch.randn(2, 2, 4, 4, 4), {"image_only": True})]
    plain = gradients(vae, calls)
    vae.enable_gradient_checkpointing()
    assert vae.is_gradient_checkpointing
    checkpointed = gradients(vae, calls)
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, atol=1e-5, rtol=1e-5, msg=name)
    vae.disable_gradient_checkpointing()
    assert not vae.is_gradient_checkpointing


def test_checkpointing_keeps_little():
    vae = trained_vae().train()

    def kept():
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            vae.decode(torch.randn(1, 4, 4, 8, 8)).sample.sum()
        return sum(sizes.values())

    plain = kept()
    vae.enable_gradient_checkpointing()
    assert kept() < plain / 3


def test_surgery_refuses_what_it_does_not_know():
    with pytest.raises(SurgeryError, match="inflated already"):
        VideoVAE.from_2d(trained_vae())
    with pytest.raises(SurgeryError, match="Linear"):
        VideoVAE.from_2d(torch.nn.Linear(2, 2))
    with pytest.raises(SurgeryError, match="AttnUpDecoderBlock2D"):
        VideoVAE.from_2d(tiny_vae(up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D")))


@pytest.mark.parametrize("video", [True, False])
@pytest.mark.parametrize(("limit", "sizes"), [(0, [5, 5]), (1, [1] * 10), (2, [2, 2, 2, 2, 2]), (8, [5, 5])])
def test_frames_are_encoded_alike_however_many_go_together(video, limit, sizes):
    vae = (trained_vae() if video else tiny_vae()).double()
    clips, seen = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64), []
    expected = encode_clips(vae, clips)
    encode_at_most(vae, limit)
    vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    torch.testing.assert_close(encode_clips(vae, clips), expected, atol=1e-12, rtol=1e-12)
    assert seen == sizes
    unscaled = encode_frames(vae, clips[:, 0])
    torch.testing.assert_close(vae.config.scaling_factor * unscaled, expected[:, 0], atol=1e-12, rtol=1e-12)


def test_an_autoencoder_that_overflows_stays_as_it_is_in_float16():
    one, other = tiny_vae(), tiny_vae(force_upcast=False)
    cast([one, other], "float16")
    assert [vae.dtype for vae in (one, other)] == [torch.float32, torch.float16]
    cast([one], "bfloat16")
    assert one.dtype == torch.bfloat16


@pytest.mark.parametrize("video", [True, False])
def test_frame_by_frame_decodes_the_same_and_is_taken_back(video):
    vae = (trained_vae() if video else tiny_vae()).double()
    latents, seen = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64), []
    vae.decoder.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        expected = decode_clips(vae, latents, temporal=video)
        with frame_by_frame(vae, True):
            found = decode_clips(vae, latents, temporal=video)
        with frame_by_frame(vae, False):
            decode_clips(vae, latents, temporal=video)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert seen == [6, *[1] * 6, 6]
