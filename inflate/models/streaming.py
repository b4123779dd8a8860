"""A video decoder run exactly in a small working set, forward and backward.

What acts on each frame alone runs frame by frame. The temporal convolutions have no extent in height and width, so they
run on strips of pixel rows, all frames of a strip together. Only the group norms between them see a whole clip, and of
it no more than a mean and a variance per group: one pass over the strips finds those, another one uses them. A map of a
clip is a list of frames (1, C, H, W), so that each frame's memory is given back as soon as the next layer has read it.

With gradients a unit keeps its input and four vectors. In its backward pass mean and variance are treated as inputs of
their own: their gradients are summed over strips, and what they owe to each pixel is added afterwards. 2D layers are
computed once more there, temporal ones three times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from inflate.layers.temporal import TemporalResnet, VideoConvOut, VideoResnet, VideoUpsample, mix
from inflate.objectives import at_least_float32

Frames = list[Tensor]
Inflated = VideoResnet | VideoUpsample | VideoConvOut


class Moments(NamedTuple):
    """Mean and biased variance of each group of channels over a clip, (G,) each, at least float32; or gradients."""

    mean: Tensor
    variance: Tensor

    def leaves(self) -> Moments:
        """The same without history, to take gradients at."""
        return Moments(*(value.detach().requires_grad_() for value in self))


class Known(NamedTuple):
    """The moments before both norms of a temporal block."""

    first: Moments
    second: Moments


def moments(parts: Iterable[Tensor], groups: int) -> Moments:
    """Those of a clip that consists of parts (1, C, ...).

    Each part's own are combined, so that no small variance is the difference of large squares.
    """
    found, sizes = [], []
    for part in parts:
        found.append(torch.var_mean(at_least_float32(part).reshape(groups, -1), dim=1, correction=0))
        sizes.append(part.numel())
    variances, means = (torch.stack(each) for each in zip(*found, strict=True))  # (parts, G) each
    share = torch.tensor(sizes, dtype=means.dtype, device=means.device).unsqueeze(1) / sum(sizes)  # (parts, 1)
    mean = (share * means).sum(0)  # (G,)
    return Moments(mean, (share * (variances + (means - mean).square())).sum(0))


def normalise(norm: nn.GroupNorm, x: Tensor, known: Moments) -> Tensor:
    """The group norm of a part (1, C, ...) of a clip whose moments are known; at least float32."""
    deviation = (known.variance + norm.eps).rsqrt().unsqueeze(1)  # (G, 1)
    scale = deviation * norm.weight.unflatten(0, (norm.num_groups, -1))  # (G, C/G)
    shift = norm.bias.unflatten(0, (norm.num_groups, -1)) - known.mean.unsqueeze(1) * scale  # (G, C/G)
    return _scaled(x, scale, shift)


def _scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """A part (1, C, ...) times one factor for each of its channels, plus another."""
    shape = (-1, *(1 for _ in x.shape[2:]))
    return (x * scale.reshape(shape)).add_(shift.reshape(shape))


def _owed(x: Tensor, known: Moments, gradients: Moments, count: int) -> Tensor:
    """What reaches a part (1, C, ...) by mean and variance of its groups, of `count` values each: as the part."""
    width = x.shape[1] // len(known.mean)
    slope = 2 * gradients.variance / count  # (G,)
    start = gradients.mean / count - slope * known.mean  # (G,)
    return _scaled(x, slope.repeat_interleave(width), start.repeat_interleave(width)).to(x.dtype)


# --- strips of pixel rows ---------------------------------------------------------------------------------------------


def _strips(frames: Sequence[Tensor], rows: int) -> Iterator[slice]:
    height = frames[0].shape[2]
    for start in range(0, height, rows):
        yield slice(start, min(start + rows, height))


def _strip(frames: Sequence[Tensor], place: slice) -> Tensor:
    """Some rows of all frames (1, C, H, W): (1, C, F, rows, W)."""
    return torch.stack([frame[:, :, place] for frame in frames], dim=2)


def _put(frames: Sequence[Tensor], place: slice, strip: Tensor) -> None:
    for frame, rows in zip(frames, strip.unbind(2), strict=True):
        frame[:, :, place] = rows


def _enter(layer: TemporalResnet, strip: Tensor, first: Moments) -> Tensor:
    """The first half of a temporal block: (1, C, F, rows, W), as its input."""
    hidden: Tensor = layer.conv1(functional.silu(normalise(layer.norm1, strip, first)).to(strip.dtype))
    return hidden


def _leave(layer: TemporalResnet, strip: Tensor, hidden: Tensor, second: Moments) -> Tensor:
    """The second half, mixed with the block's input: (1, C, F, rows, W)."""
    change = layer.conv2(functional.silu(normalise(layer.norm2, hidden, second)).to(strip.dtype))
    return mix(strip, strip + change, layer.share, None)


def _find(layer: TemporalResnet, frames: Sequence[Tensor], rows: int) -> Known:
    """The moments before the norms of a temporal block, whose input the frames are."""
    first = moments(frames, layer.norm1.num_groups)
    halfway = (_enter(layer, _strip(frames, place), first) for place in _strips(frames, rows))
    return Known(first, moments(halfway, layer.norm2.num_groups))


def _fill(layer: TemporalResnet, frames: Sequence[Tensor], rows: int, known: Known, into: Frames) -> Frames:
    """What a temporal block makes of frames, put `into` others, which may be the same."""
    for place in _strips(frames, rows):
        strip = _strip(frames, place)
        _put(into, place, _leave(layer, strip, _enter(layer, strip, known.first), known.second))
    return into


# --- units ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unit:
    """The temporal layer of a residual block, if any, and the 2D layers up to the next block's or to the pixels."""

    temporal: TemporalResnet | None
    layers: tuple[nn.Module, ...]

    def __call__(self, frames: Frames, rows: int) -> Frames:
        """Frames (1, C, H, W) to frames (1, C', H', W'); without gradients those given are used up."""
        if torch.is_grad_enabled():
            learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return list(_Recomputed.apply(self, rows, learning, len(frames), *frames, *learning))
        if self.temporal is not None:
            _fill(self.temporal, frames, rows, _find(self.temporal, frames, rows), into=frames)
        return self.images(frames)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those that the unit computes with."""
        for layer in self.layers:
            yield from (value for name, value in layer.named_parameters() if not name.startswith("temporal."))
        if self.temporal is not None:
            yield from self.temporal.parameters()

    def images(self, frames: Frames) -> Frames:
        """Put what the 2D layers make of each frame in its place in the list."""
        for number, frame in enumerate(frames):
            frames[number] = self.image(frame)
        return frames

    def image(self, frame: Tensor) -> Tensor:
        """What the 2D layers make of one frame."""
        for layer in self.layers:
            frame = layer.image(frame) if isinstance(layer, Inflated) else layer(frame)
        return frame


def units(decoder: Decoder) -> list[Unit]:
    """All of a video decoder but the temporal convolution over its pixels."""
    found: list[Unit] = []
    temporal: TemporalResnet | None = None
    before: list[nn.Module] = []
    for layer in _layers(decoder):
        before.append(layer)
        if isinstance(layer, VideoResnet) and isinstance(layer.temporal, TemporalResnet):
            found.append(Unit(temporal, tuple(before)))
            temporal, before = layer.temporal, []
    return [*found, Unit(temporal, tuple(before))]


def _layers(decoder: Decoder) -> Iterator[nn.Module]:
    """In the order of computation."""
    middle = decoder.mid_block
    yield from (decoder.conv_in, middle.resnets[0])
    for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
        yield from (resnet,) if attention is None else (attention, resnet)
    for block in decoder.up_blocks:
        yield from (*block.resnets, *(block.upsamplers or ()))
    yield from (decoder.conv_norm_out, decoder.conv_act, decoder.conv_out)


def decode(decoder: Decoder, latents: Tensor, rows: int) -> Tensor:
    """Latents (F, C, h, w) of one clip to pixels (F, 3, H, W); `rows` pixel rows at a time in temporal layers."""
    frames = list(latents.split(1))
    for unit in units(decoder):
        frames = unit(frames, rows)  # after the last (1, 3, H, W) each
    pixels: Tensor = decoder.conv_out.over_time(torch.cat(frames), len(frames))  # (F, 3, H, W)
    return pixels


# --- gradients --------------------------------------------------------------------------------------------------------


class _Recomputed(torch.autograd.Function):
    """A unit that keeps its input alone."""

    @staticmethod
    def forward(
        ctx: Any, unit: Unit, rows: int, learning: list[nn.Parameter], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.unit, ctx.rows, ctx.learning, ctx.count = unit, rows, learning, count
        ctx.precision = _precision(tensors[0].device.type)
        frames = list(tensors[:count])
        found: tuple[Tensor, ...] = ()
        if unit.temporal is not None:
            known = _find(unit.temporal, frames, rows)
            found = (*known.first, *known.second)
            frames = _fill(unit.temporal, frames, rows, known, into=[torch.empty_like(frame) for frame in frames])
        ctx.save_for_backward(*tensors[:count], *found)
        return tuple(unit.images(frames))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        unit, rows, sums = ctx.unit, ctx.rows, _Sums(ctx.learning)
        frames, values = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        wanted = any(ctx.needs_input_grad[4 : 4 + ctx.count])
        with ctx.precision(), requiring_gradient(ctx.learning):
            if unit.temporal is None:
                leaving = _images_backward(unit, list(frames), gradients, wanted, sums)
            else:
                known = Known(Moments(*values[:2]), Moments(*values[2:]))
                between = _fill(unit.temporal, frames, rows, known, into=[torch.empty_like(frame) for frame in frames])
                arriving = _images_backward(unit, between, gradients, True, sums)
                leaving = _Strips(unit.temporal, frames, arriving, rows, known).backward(sums)
        return None, None, None, None, *leaving, *sums.gradients()


def _precision(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Autocast as it is now, for later; without its cache, which would keep weights cast where no gradient is taken."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, dtype, enabled, cache_enabled=False)


@contextmanager
def requiring_gradient(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let what is computed inside depend on parameters that may be frozen; they are as before afterwards."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)


class _Sums:
    """Gradients of parameters, summed in float32 at least."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.sums: list[Tensor | None] = [None for _ in parameters]

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Of some part of the clip; None where the part does not depend on the parameter."""
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                before = self.sums[number]
                wide = at_least_float32(gradient)
                self.sums[number] = wide if before is None else before + wide

    def gradients(self) -> list[Tensor | None]:
        """In the parameters' types."""
        pairs = zip(self.sums, self.parameters, strict=True)
        return [None if total is None else total.to(parameter.dtype) for total, parameter in pairs]


def _images_backward(
    unit: Unit, frames: list[Any], gradients: Sequence[Tensor], wanted: bool, sums: _Sums
) -> list[Any]:
    """Gradients of the frames, which are used up, if `wanted`, of those of what the 2D layers made of them."""
    for number, gradient in enumerate(gradients):
        leaf = frames[number].detach().requires_grad_(wanted)
        with torch.enable_grad():
            made = unit.image(leaf)
        inputs = [*([leaf] if wanted else []), *sums.parameters]
        found = torch.autograd.grad(made, inputs, gradient, allow_unused=True)
        frames[number] = found[0] if wanted else None
        sums.add(found[len(found) - len(sums.parameters) :])
    return frames


@dataclass(frozen=True)
class _Strips:
    """The backward pass of a temporal block. `frames`: its input; `gradients`: those of its output, to be changed."""

    layer: TemporalResnet
    frames: Sequence[Tensor]
    gradients: Frames
    rows: int
    known: Known

    def backward(self, sums: _Sums) -> Frames:
        """Put gradients of the block's input in the place of its output's; those of its parameters go to `sums`."""
        of_second, of_first = self._second_moments(), _nothing(self.known.first)
        for place in _strips(self.frames, self.rows):
            of_strip, of_moments = self._one(place, of_second, sums)
            _put(self.gradients, place, of_strip)
            of_first = _added(of_first, of_moments)
        for frame, gradient in zip(self.frames, self.gradients, strict=True):
            gradient += _owed(frame, self.known.first, of_first, self._count())
        return self.gradients

    def _second_moments(self) -> Moments:
        """Gradients of the moments before the second norm."""
        total = _nothing(self.known.second)
        for place in _strips(self.frames, self.rows):
            strip, second = _strip(self.frames, place), self.known.second.leaves()
            entered = _enter(self.layer, strip, self.known.first)
            with torch.enable_grad():
                left = _leave(self.layer, strip, entered, second)
            total = _added(total, torch.autograd.grad(left, second, _strip(self.gradients, place)))
        return total

    def _one(self, place: slice, of_second: Moments, sums: _Sums) -> tuple[Tensor, Sequence[Tensor]]:
        """Gradient of a strip, but for what it owes to the first moments; and gradients of those."""
        strip, first = _strip(self.frames, place).requires_grad_(), self.known.first.leaves()
        with torch.enable_grad():
            entered = _enter(self.layer, strip, first)
            left = _leave(self.layer, strip, entered, self.known.second)
        owed = _owed(entered.detach(), self.known.second, of_second, self._count())
        given = (_strip(self.gradients, place), owed)
        found = torch.autograd.grad((left, entered), (strip, *first, *sums.parameters), given, allow_unused=True)
        sums.add(found[3:])
        return found[0], found[1:3]

    def _count(self) -> int:
        """Values that a mean of a group is over."""
        return len(self.frames) * self.frames[0].numel() // self.layer.norm1.num_groups


def _nothing(like: Moments) -> Moments:
    return Moments(*(torch.zeros_like(value) for value in like))


def _added(total: Moments, found: Sequence[Tensor]) -> Moments:
    return Moments(total.mean + found[0], total.variance + found[1])
