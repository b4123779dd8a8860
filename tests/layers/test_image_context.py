"""An image in cross-attention: the tokens that queries make of it, for clips of any length, and how they are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from torch import Tensor, nn

from inflate.errors import ConfigError, InflateError
from inflate.layers.clip import Clip, ClipState
from inflate.layers.image_context import (
    DualAttention,
    ImageAttention,
    ImageContext,
    QueryTransformer,
    attend_to_image,
)
from inflate.layers.temporal import SpatialBlock, constant_when_single

CONTEXT = ImageContext(embedding=6, width=8, depth=2, heads=3, head_width=4, queries=2, frames=3)
WIDTH = 10
"""Of the tokens."""
FEATURES = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def trained(seed: int = 0, **changes: Any) -> QueryTransformer:
    """A query transformer whose groups of queries have become different."""
    torch.manual_seed(seed)
    made = QueryTransformer(replace(CONTEXT, **changes), WIDTH).double()
    nn.init.normal_(made.latents)
    return made


def test_settings_are_kept_as_json_values() -> None:
    assert ImageContext.from_dict(CONTEXT.to_dict()) == CONTEXT
    assert ImageContext(embedding=1280, width=1024, depth=4, heads=12, head_width=64, queries=16, frames=16) == (
        ImageContext()
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 0, "depth": -1}, "image_context: depth, queries must be at least 1"),
        ({"other_lengths": "repeat"}, "image_context.other_lengths=repeat: interpolate or share"),
        ({"gates": True}, "image_context: unknown setting gates; known: embedding, width"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageContext.from_dict(settings)


def like_diffusers(theirs: IPAdapterPlusImageProjection) -> dict[str, Tensor]:
    """The weights of diffusers' counterpart by our names."""
    names = {
        "ln0": "attention.norm_image",
        "ln1": "attention.norm_latents",
        "attn.to_q": "attention.to_q",
        "attn.to_out.0": "attention.to_out",
        "ff.0": "feed_forward.norm",
        "ff.1.net.0.proj": "feed_forward.linear_1",
        "ff.1.net.2": "feed_forward.linear_2",
    }
    state, found = theirs.state_dict(), {}
    for key, value in state.items():
        layer = ".".join(key.split(".")[:2])
        part = key.removeprefix(f"{layer}.").rsplit(".", 1)[0]
        if part in names:
            found[f"{layer}.{names[part]}.{key.rsplit('.', 1)[1]}"] = value
        elif part == "attn.to_k":
            values = state[key.replace("to_k", "to_v")]
            found[f"{layer}.attention.to_kv.weight"] = torch.cat([value, values])
        elif part != "attn.to_v":
            found[key] = value
    return found


def test_it_is_diffusers_perceiver_of_the_same_weights() -> None:
    theirs = IPAdapterPlusImageProjection(6, WIDTH, 8, depth=2, dim_head=4, heads=3, num_queries=6).double()
    ours = trained()
    ours.load_state_dict(like_diffusers(theirs))
    found, expected = ours(FEATURES, 3), theirs(FEATURES)
    assert found.shape == (2, 3, 2, WIDTH)
    torch.testing.assert_close(found.flatten(1, 2), expected, atol=1e-10, rtol=0)
    weight = torch.randn_like(expected)
    (found.flatten(1, 2) * weight).sum().backward()
    (expected * weight).sum().backward()
    assert theirs.latents.grad is not None
    torch.testing.assert_close(ours.latents.grad, theirs.latents.grad, atol=1e-10, rtol=0)
    torch.testing.assert_close(ours.proj_in.weight.grad, theirs.proj_in.weight.grad, atol=1e-10, rtol=0)


def test_all_frames_begin_with_the_same_queries() -> None:
    groups = QueryTransformer(CONTEXT, WIDTH).queries_of(3).unflatten(1, (3, 2))
    assert torch.equal(groups, groups[:, :1].expand_as(groups))
    assert not torch.equal(groups[:, :, 0], groups[:, :, 1])


@pytest.mark.parametrize("frames", [1, 5, 16])
@pytest.mark.parametrize("groups", [1, 3])
def test_more_groups_make_the_tokens_that_fewer_make(groups: int, frames: int) -> None:
    made = trained(frames=groups)
    more = made.with_groups(frames)
    assert more.context == replace(CONTEXT, frames=frames, counted=None if frames == groups else groups)
    assert more.latents.shape == (1, 2 * frames, 8)
    assert torch.equal(more(FEATURES, frames), made(FEATURES, frames))
    assert more.latents.data_ptr() != made.latents.data_ptr()


def test_one_group_learns_what_as_many_as_it_counts_for_will_make() -> None:
    made = trained(frames=1, counted=5)
    more = made.with_groups(5)
    assert more.context == replace(CONTEXT, frames=5)
    alone = made(FEATURES, 1)
    torch.testing.assert_close(more(FEATURES, 5), alone.expand(-1, 5, -1, -1), atol=1e-12, rtol=0)
    uncounted = QueryTransformer(replace(CONTEXT, frames=1), WIDTH).double()
    uncounted.load_state_dict(made.state_dict())
    assert (uncounted(FEATURES, 1) - alone).abs().max() > 1e-3


def test_interpolated_queries_weigh_as_the_learned_ones() -> None:
    made = trained(frames=1).with_groups(4)
    torch.testing.assert_close(made(FEATURES, 9), made(FEATURES, 4)[:, :1].expand(-1, 9, -1, -1), atol=1e-12, rtol=0)


def test_one_group_makes_the_same_tokens_for_every_frame() -> None:
    tokens = trained(frames=1)(FEATURES, 4)
    torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens), atol=1e-12, rtol=0)


def test_queries_between_the_learned_ones_are_interpolated() -> None:
    made = trained()
    learned = made.queries_of(3).unflatten(1, (3, 2))
    longer = made.queries_of(5).unflatten(1, (5, 2))
    torch.testing.assert_close(longer[:, ::2], learned)
    torch.testing.assert_close(longer[:, 1], (learned[:, 0] + learned[:, 1]) / 2)
    torch.testing.assert_close(made.queries_of(2).unflatten(1, (2, 2)), learned[:, [0, 2]])


def test_shared_tokens_are_those_of_all_learned_frames() -> None:
    interpolated, shared = (trained(other_lengths=policy) for policy in ("interpolate", "share"))
    own = shared(FEATURES, 3)
    assert torch.equal(own, interpolated(FEATURES, 3))
    assert torch.equal(shared(FEATURES, 7), own.flatten(1, 2))
    assert interpolated(FEATURES, 7).shape == (2, 7, 2, WIDTH)


@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 7)])
def test_features_of_another_shape_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(InflateError, match=rf"must be \(batch, patches, 6\), got \({', '.join(map(str, shape))}\)"):
        trained()(torch.zeros(shape, dtype=torch.float64), 3)


# --- reading them -----------------------------------------------------------------------------------------------------


def test_the_gate_is_born_as_one_and_ranges_from_none_to_twice() -> None:
    torch.manual_seed(0)
    gated, plain = ImageAttention(WIDTH, 8, gate=True), ImageAttention(WIDTH, 8, gate=False)
    plain.load_state_dict({name: value for name, value in gated.state_dict().items() if name != "gate"})
    queries, tokens = torch.randn(2, 7, 8), torch.randn(2, 3, WIDTH)
    expected = plain(queries, tokens, 2)
    assert gated.gate is not None
    assert gated.gate.shape == (1,)  # sharded training refuses 0-dimensional parameters
    assert torch.equal(gated(queries, tokens, 2), expected)
    for value, share in ((-50.0, 0.0), (50.0, 2.0), (0.5, 1.0 + torch.tensor(0.5).tanh())):
        nn.init.constant_(gated.gate, value)
        torch.testing.assert_close(gated(queries, tokens, 2), share * expected)


def block(clip: Clip, gate: bool = False, born: bool = False) -> SpatialBlock:
    """A 2D transformer block that attends to an image."""
    torch.manual_seed(0)
    made: Any = BasicTransformerBlock(8, 2, 4, cross_attention_dim=WIDTH)
    constant_when_single(made)
    made.__class__ = SpatialBlock
    attend_to_image(made.double(), clip, gate)
    if not born:
        nn.init.normal_(made.attn2.image.to_v.weight)
        nn.init.normal_(made.attn2.image.to_k.weight)
    return made


def by_hand(attention: DualAttention, hidden: Tensor, text: Tensor, image: Tensor) -> Tensor:
    """Two softmaxes, whose results are added before the one projection."""
    queries = attention.to_q(hidden).unflatten(2, (2, 4)).transpose(1, 2)
    total = torch.zeros_like(queries)
    for tokens, part in ((text, attention), (image, attention.image)):
        keys, values = (each(tokens).unflatten(2, (2, 4)).transpose(1, 2) for each in (part.to_k, part.to_v))
        total = total + torch.softmax(queries @ keys.transpose(2, 3) / 2.0, dim=-1) @ values
    return attention.to_out[0](total.transpose(1, 2).flatten(2))


def contexts(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a text of four tokens and an image of three."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2, 6, 8), (2, 4, WIDTH), (2, 3, WIDTH))
    hidden, text, image = (torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes)
    return hidden, text, image


def test_both_parts_are_added_before_the_projection_gradients_included() -> None:
    clip = Clip()
    attention, (hidden, text, image) = block(clip).attn2, contexts()
    image.requires_grad_(True)
    with clip.during(ClipState(1, image_tokens=3)):
        found = attention(hidden, torch.cat([text, image], 1))
    expected = by_hand(attention, hidden, text, image)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    learned = [image, attention.to_q.weight, attention.image.to_k.weight, attention.image.to_v.weight]
    pairs = zip(*(torch.autograd.grad(each.square().sum(), learned) for each in (found, expected)), strict=True)
    for ours, theirs in pairs:
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("gate", [False, True])
def test_born_attending_to_an_image_changes_nothing(gate: bool) -> None:
    clip = Clip()
    made, (hidden, text, image) = block(clip, gate, born=True), contexts()
    assert torch.equal(made.attn2.image.to_k.weight, made.attn2.to_k.weight)
    with clip.during(ClipState(1)):
        expected = made(hidden, encoder_hidden_states=text)
    with clip.during(ClipState(1, image_tokens=3)):
        found = made(hidden, encoder_hidden_states=torch.cat([text, image], 1))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_what_cannot_be_used_together_is_named() -> None:
    clip = Clip()
    attention, (hidden, text, image) = block(clip).attn2, contexts()
    both = torch.cat([text, image], 1)
    with clip.during(ClipState(1, image_tokens=3)):
        with pytest.raises(InflateError, match="attention_mask cannot be used together with image tokens"):
            attention(hidden, both, attention_mask=torch.ones(2, 1, 7))
        attention.set_processor(nn.Module())
        with pytest.raises(InflateError, match="another processor of attention cannot be used together"):
            attention(hidden, both)
