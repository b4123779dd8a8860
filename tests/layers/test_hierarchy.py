"""A first frame in three parts: what the encoders make of it, what is left out, and how much its tokens weigh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLTransformerTemporalEncoder
from torch import Tensor

from helpers import randomise, tiny_unet
from inflate.errors import ConfigError, InflateError, SurgeryError
from inflate.layers.hierarchy import FirstFrame, Hierarchy, with_places
from inflate.layers.image_context import ImageContext
from inflate.models.unet import DYNAMICRAFTER, VIDEO_LDM, TemporalSpec, VideoUNet

HIERARCHY = Hierarchy(embedding=6, clip_tokens=2)
WIDTH = 16
"""Of the context."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SAMPLE, TEXT, LATENTS, EMBEDDINGS = noise(2, 3, 4, 8, 8), noise(2, 5, WIDTH), noise(2, 4, 8, 8), noise(2, 1, 6)
IDS = torch.tensor([[8.0], [3.0]], dtype=torch.float64)


def told(spec: TemporalSpec = DYNAMICRAFTER, hierarchy: Hierarchy = HIERARCHY, born: bool = False) -> VideoUNet:
    """A model that is told first frames; all its layers do something, unless it is newborn."""
    torch.manual_seed(0)
    unet = VideoUNet.from_2d(tiny_unet(cross_attention_dim=WIDTH), spec)
    unet.add_hierarchy(hierarchy)
    if not born:
        randomise(unet)
    return unet.double().eval()


def predict(unet: VideoUNet, text: Tensor = TEXT, sample: Tensor = SAMPLE, **given: Any) -> Tensor:
    first = {"image_latents": LATENTS, "image_embeddings": EMBEDDINGS} if unet.hierarchy else {}
    ids = IDS if unet.spec.added_ids else None
    output: Tensor = unet(sample, torch.tensor([10, 900]), text, ids, **{**first, **given}).sample
    return output


# --- the encoders -----------------------------------------------------------------------------------------------------


def test_settings_are_kept_as_json_values() -> None:
    assert Hierarchy.from_dict(HIERARCHY.to_dict()) == HIERARCHY
    assert HIERARCHY.parts == ("detail", "global", "clip")
    assert Hierarchy(clip_tokens=0, global_encoder=False).parts == ("detail",)
    assert not Hierarchy(detail_encoder=False, global_encoder=False).takes_latents


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_tokens": -1}, r"channels \(4\) and embedding \(1024\) must be at least 1, clip_tokens \(-1\)"),
        ({"dropout": 1.0}, "hierarchy.dropout=1.0: a share from 0 to below 1"),
        ({"clip_tokens": 0, "detail_encoder": False, "global_encoder": False}, "all of .* are off: set one"),
        ({"gates": True}, "hierarchy: unknown setting gates; known: channels, embedding"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Hierarchy.from_dict(settings)


def test_other_frames_are_told_their_place() -> None:
    placed = with_places(LATENTS, 5)
    assert torch.equal(placed[:, 0], LATENTS)
    for frame, place in enumerate((0.25, 0.5, 0.75, 1.0), 1):
        assert torch.equal(placed[:, frame], torch.full_like(LATENTS, place))
    assert torch.equal(with_places(LATENTS, 1), LATENTS[:, None])


def test_frames_are_encoded_as_by_diffusers() -> None:
    theirs = I2VGenXLTransformerTemporalEncoder(4, 2, 4, "gelu", ff_inner_dim=16).double().eval()
    ours = FirstFrame(HIERARCHY, WIDTH, 8).double().eval().detail
    assert ours is not None
    state = theirs.state_dict()
    names = {"norm": "norm1", "to_out": "attn1.to_out.0", "linear_1": "ff.net.0.proj", "linear_2": "ff.net.2"}
    taken = {f"{own}.{kind}": state[f"{name}.{kind}"] for own, name in names.items() for kind in ("weight", "bias")}
    fused = torch.cat([state[f"attn1.to_{part}.weight"] for part in "qkv"])
    ours.frames.load_state_dict({**taken, "to_qkv.weight": fused})
    pixels = noise(7, 3, 4).requires_grad_()
    torch.testing.assert_close(ours.frames(pixels), theirs(pixels), atol=1e-10, rtol=0)
    weight = noise(7, 3, 4, seed=1)
    grads = [torch.autograd.grad((each(pixels) * weight).sum(), pixels)[0] for each in (ours.frames, theirs)]
    torch.testing.assert_close(*grads, atol=1e-10, rtol=0)


def test_dropout_is_within_the_encoder_of_frames_and_not_behind_it() -> None:
    """As in VGen: behind the attention, and between the two layers of the feed-forward."""
    frames = FirstFrame(Hierarchy(embedding=6, dropout=0.5), WIDTH, 8).double().train().detail.frames
    with torch.no_grad():
        frames.linear_2.weight.zero_()
        frames.linear_2.bias.fill_(1.0)
        frames.to_out.weight.zero_()
        frames.to_out.bias.fill_(1.0)
    added = frames(torch.zeros(64, 3, 4, dtype=torch.float64))
    assert sorted(added.unique().tolist()) == [1.0, 3.0], "1 of the feed-forward, and 0 or 1 / 0.5 of the attention"


def test_a_frame_of_any_size_has_as_many_tokens() -> None:
    first = FirstFrame(HIERARCHY, WIDTH, 8).double()
    for height, width in ((4, 6), (64, 40), (90, 160)):
        tokens = first(noise(1, 4, height, width), None, 2).tokens
        assert tokens.shape == (1, 64, WIDTH)


def test_what_is_told_and_what_is_left_out() -> None:
    first = FirstFrame(HIERARCHY, WIDTH, 8).double().eval()
    detail, tokens = first(LATENTS, EMBEDDINGS, 3)
    assert detail.shape == (2, 3, 4, 8, 8)
    assert tokens.shape == (2, 64 + 2, WIDTH)
    less = first(LATENTS, EMBEDDINGS, 3, ("detail", "global"))
    assert torch.equal(less.detail, torch.zeros_like(detail))
    assert torch.equal(less.tokens, tokens[:, 64:])
    assert torch.equal(first(LATENTS, EMBEDDINGS, 3, ("clip",)).tokens, tokens[:, :64])
    assert torch.equal(first(LATENTS, None, 3).tokens, tokens[:, :64])
    assert first(LATENTS, None, 3, ("global",)).tokens is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, EMBEDDINGS, 3), "this UNet takes the latents of first frames: give image_latents"),
        ((SAMPLE, EMBEDDINGS, 3), r"image_latents must be \(batch, 4, height, width\), got \(2, 3, 4, 8, 8\)"),
        ((LATENTS, EMBEDDINGS[..., :5], 3), r"image_embeddings must be \(batch, 1, 6\), got \(2, 1, 5\)"),
        ((LATENTS, EMBEDDINGS, 3, ("text",)), "left_out: text is no part of a first frame: detail, global, clip"),
    ],
)
def test_what_it_cannot_take_is_said(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InflateError, match=message):
        FirstFrame(HIERARCHY, WIDTH, 8).double()(*given)


def test_what_it_does_not_take_is_said() -> None:
    clip = FirstFrame(Hierarchy(embedding=6, detail_encoder=False, global_encoder=False), WIDTH, 8).double()
    with pytest.raises(InflateError, match="this UNet takes no latents: leave out image_latents"):
        clip(LATENTS, EMBEDDINGS, 3)
    latent = FirstFrame(Hierarchy(clip_tokens=0), WIDTH, 8).double()
    with pytest.raises(InflateError, match="image_embeddings are not taken by this UNet"):
        latent(LATENTS, EMBEDDINGS, 3)


# --- in a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [DYNAMICRAFTER, VIDEO_LDM])
def test_newborn_it_is_its_parent_where_the_tokens_weigh_nothing(spec: TemporalSpec) -> None:
    parent = tiny_unet(cross_attention_dim=WIDTH).double().eval()
    torch.manual_seed(0)
    unet = VideoUNet.from_2d(parent, spec)
    unet.add_hierarchy(HIERARCHY)
    with torch.no_grad():
        output = predict(unet.double().eval(), image_share=0.0)
        steps, context = torch.tensor([10, 900]).repeat_interleave(3), TEXT.repeat_interleave(3, 0)
        frames = parent(SAMPLE.flatten(0, 1), steps, context).sample.unflatten(0, (2, 3))
    assert (output - frames).abs().max() <= 1e-12
    assert (predict(unet) - frames).abs().max() > 1e-4


def test_tokens_fade_in() -> None:
    unet = told()
    with torch.no_grad():
        silent, whole = predict(unet, image_share=0.0), predict(unet)
        assert (predict(unet, image_share=1e-9) - silent).abs().max() < 1e-6
        assert (predict(unet, image_share=1 - 1e-9) - whole).abs().max() < 1e-6
        assert torch.equal(silent, predict(unet, left_out=("global", "clip")))
        half = predict(unet, image_share=0.5)
    assert min((half - silent).abs().max(), (half - whole).abs().max()) > 1e-4
    with pytest.raises(InflateError, match="image_share is 1.5: it must be 0 to 1"):
        predict(unet, image_share=1.5)


def test_a_share_is_a_weight_in_the_softmax() -> None:
    """Tokens twice in the context weigh as those of half the share once, all twice but the text."""
    unet = told(hierarchy=Hierarchy(embedding=6, clip_tokens=2, global_encoder=False))
    with torch.no_grad():
        once = predict(unet, image_share=0.5)
        twice = predict(unet, text=TEXT.repeat(1, 2, 1))
    torch.testing.assert_close(once, twice, atol=1e-10, rtol=0)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_recomputed_it_learns_the_same(share: float) -> None:
    gradients = []
    for recompute in (False, True):
        unet = told().train()
        if recompute:
            unet.enable_gradient_checkpointing()
        torch.manual_seed(3)
        predict(unet, image_share=share).square().mean().backward()
        gradients.append([value.grad for value in unet.image_parameters().values()])
    for plain, again in zip(*gradients, strict=True):
        assert plain is not None
        assert plain.abs().max() > 0
        torch.testing.assert_close(again, plain, atol=1e-10, rtol=0)


def test_without_text_it_attends_to_the_image_alone() -> None:
    for spec in (DYNAMICRAFTER, VIDEO_LDM):
        unet = told(spec)
        output = predict(unet, text=TEXT[:, :0])
        assert torch.isfinite(output).all()
        with pytest.raises(InflateError, match="nothing to attend to"):
            predict(unet, text=TEXT[:, :0], left_out=("global", "clip"))


def test_a_saved_model_is_told_the_same(tmp_path: Any) -> None:
    unet = told()
    unet.save_pretrained(tmp_path)
    again = VideoUNet.from_pretrained(tmp_path).double().eval()
    assert again.hierarchy == HIERARCHY
    assert again.config.in_channels == 8
    assert torch.equal(predict(again), predict(unet))


def test_a_model_is_told_one_image_in_one_way() -> None:
    unet = told()
    for add in (unet.add_hierarchy, unet.add_image_context):
        with pytest.raises(SurgeryError, match="attends to an image already"):
            add(HIERARCHY if add == unet.add_hierarchy else ImageContext())
    plain = VideoUNet.from_2d(tiny_unet(cross_attention_dim=WIDTH), DYNAMICRAFTER).double()
    with pytest.raises(InflateError, match="told no first frames: leave out image_latents and image_embeddings"):
        predict(plain, image_latents=LATENTS)
    with pytest.raises(InflateError, match="image_latents must be of 2 clips, got"):
        predict(unet, image_latents=LATENTS[:1])
