"""A video decoder run exactly in a small working set, forward and backward.

What acts on each frame alone runs frame by frame. The temporal convolutions have no extent in height and width, so they
run on strips of pixel rows, all frames of a strip together. Only the group norms between them see a whole clip, and of
it no more than a mean and a variance per group: one pass over the strips finds those, another one uses them. A map of a
clip is a list of frames (1, C, H, W), so that each frame's memory is given back as soon as the next layer has read it.

With gradients a unit keeps its input and four vectors. In its backward pass mean and variance are treated as inputs of
their own: their gradients are summed over strips, and what they owe to each pixel is added afterwards. It computes a
unit's 2D layers twice more and its temporal ones up to three times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from inflate.layers.temporal import TemporalResnet, VideoResnet, VideoUpsample, mix
from inflate.objectives import at_least_float32

Frames = list[Tensor]


class Moments(NamedTuple):
    """Mean and biased variance of each group of channels over a clip, (G,) each, at least float32; or gradients."""

    mean: Tensor
    variance: Tensor

    def leaves(self) -> Moments:
        """The same without history, to take gradients at."""
        return Moments(*(value.detach().requires_grad_() for value in self))


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


def _over_time(layer: TemporalResnet, frames: Sequence[Tensor], rows: int) -> tuple[Moments, Moments]:
    """Put what a temporal block makes of frames in their place; the moments before its two norms."""
    first = moments(frames, layer.norm1.num_groups)
    halfway = (_enter(layer, _strip(frames, place), first) for place in _strips(frames, rows))
    second = moments(halfway, layer.norm2.num_groups)
    for place in _strips(frames, rows):
        strip = _strip(frames, place)
        _put(frames, place, _leave(layer, strip, _enter(layer, strip, first), second))
    return first, second


# --- units ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unit:
    """2D layers that act on each frame alone, the last of them a residual block, and its temporal layer."""

    layers: tuple[nn.Module, ...]
    temporal: TemporalResnet

    def __call__(self, frames: Frames, rows: int) -> Frames:
        """Frames (1, C, H, W) to frames (1, C', H', W'); without gradients the list given is used up."""
        if torch.is_grad_enabled():
            learning = [parameter for layer in self.layers for parameter in layer.parameters()]
            learning = [parameter for parameter in learning if parameter.requires_grad]
            return list(_Recomputed.apply(self, rows, learning, len(frames), *frames, *learning))
        _over_time(self.temporal, self.images(frames), rows)
        return frames

    def images(self, frames: Frames) -> Frames:
        """Put what the 2D layers make of each frame in its place in the list."""
        for number, frame in enumerate(frames):
            frames[number] = self.image(frame)
        return frames

    def image(self, frame: Tensor) -> Tensor:
        """What the 2D layers make of one frame."""
        for layer in self.layers:
            frame = layer.image(frame) if isinstance(layer, VideoResnet | VideoUpsample) else layer(frame)
        return frame


def units(decoder: Decoder) -> list[Unit]:
    """All of a video decoder but its head; upsampling belongs to the residual block after it."""
    middle = decoder.mid_block
    layers: list[Any] = [decoder.conv_in, middle.resnets[0]]
    for pair in zip(middle.attentions, middle.resnets[1:], strict=True):
        layers += pair
    for block in decoder.up_blocks:
        layers += [*block.resnets, *(block.upsamplers or ())]
    found: list[Unit] = []
    before: list[nn.Module] = []
    for layer in (layer for layer in layers if layer is not None):
        before.append(layer)
        if isinstance(layer, VideoResnet) and isinstance(layer.temporal, TemporalResnet):
            found.append(Unit(tuple(before), layer.temporal))
            before = []
    return found


def decode(decoder: Any, latents: Tensor, rows: int) -> Tensor:
    """Latents (F, C, h, w) of one clip to pixels (F, 3, H, W); `rows` pixel rows at a time in temporal layers."""
    frames = list(latents.split(1))
    for unit in units(decoder):
        frames = unit(frames, rows)
    head: Callable[[Tensor], Tensor] = decoder.image_head
    if torch.is_grad_enabled():
        head = partial(checkpoint, decoder.image_head, use_reentrant=False, preserve_rng_state=False)
    for number, frame in enumerate(frames):
        frames[number] = head(frame)  # (1, 3, H, W)
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
        frames = unit.images(list(tensors[:count]))
        first, second = _over_time(unit.temporal, frames, rows)
        ctx.save_for_backward(*tensors[:count], *first, *second)
        return tuple(frames)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        frames, first, second = saved[: ctx.count], Moments(*saved[-4:-2]), Moments(*saved[-2:])
        sums = _Sums(ctx.learning)
        with ctx.precision():
            hidden = ctx.unit.images(list(frames))
            strips = _Strips(ctx.unit.temporal, hidden, gradients, ctx.rows, first, second)
            arriving = strips.backward(sums)
            del hidden, strips
            wanted = any(ctx.needs_input_grad[4 : 4 + ctx.count])
            leaving = _images_backward(ctx.unit, frames, arriving, wanted, sums)
        return None, None, None, None, *leaving, *sums.gradients()


def _precision(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Autocast as it is now, for later; without its cache, which would keep weights cast where no gradient is taken."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, dtype, enabled, cache_enabled=False)


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


@dataclass
class _Strips:
    """The backward pass of a temporal block. `hidden`: its input; `gradients`: those of its output."""

    layer: TemporalResnet
    hidden: Frames
    gradients: Sequence[Tensor]
    rows: int
    first: Moments
    second: Moments

    def backward(self, sums: _Sums) -> Frames:
        """Gradients of the block's input; those of its parameters go to `sums`. `hidden` is used up."""
        of_first, of_second = self._zeros(self.first), self._second_moments()
        arriving = [torch.empty_like(frame) for frame in self.hidden]
        for place in _strips(self.hidden, self.rows):
            strip, of_strip = self._one(place, of_second, of_first, sums)
            _put(arriving, place, strip)
            of_first = of_strip
        for gradient in arriving:
            gradient += _owed(self.hidden.pop(0), self.first, of_first, self._count())
        return arriving

    def _second_moments(self) -> Moments:
        """Gradients of the moments before the second norm."""
        total = self._zeros(self.second)
        for place in _strips(self.hidden, self.rows):
            strip = _strip(self.hidden, place)
            entered, second = _enter(self.layer, strip, self.first), self.second.leaves()
            with torch.enable_grad():
                left = _leave(self.layer, strip, entered, second)
            found = torch.autograd.grad(left, second, _strip(self.gradients, place))
            total = _added(total, found)
        return total

    def _one(self, place: slice, of_second: Moments, of_first: Moments, sums: _Sums) -> tuple[Tensor, Moments]:
        """Gradient of a strip, but for what it owes to the first moments; and `of_first` with theirs added."""
        strip, first = _strip(self.hidden, place).requires_grad_(), self.first.leaves()
        with torch.enable_grad():
            entered = _enter(self.layer, strip, first)
            left = _leave(self.layer, strip, entered, self.second)
        given = (_strip(self.gradients, place), _owed(entered.detach(), self.second, of_second, self._count()))
        found = torch.autograd.grad((left, entered), (strip, *first, *sums.parameters), given, allow_unused=True)
        sums.add(found[3:])
        return found[0], _added(of_first, found[1:3])

    def _count(self) -> int:
        """Values that a mean of a group is over."""
        return len(self.gradients) * self.gradients[0].numel() // self.layer.norm1.num_groups

    @staticmethod
    def _zeros(like: Moments) -> Moments:
        return Moments(torch.zeros_like(like.mean), torch.zeros_like(like.variance))


def _added(total: Moments, found: Sequence[Tensor]) -> Moments:
    return Moments(total.mean + found[0], total.variance + found[1])


def _images_backward(
    unit: Unit, frames: Sequence[Tensor], arriving: Frames, wanted: bool, sums: _Sums
) -> list[Tensor | None]:
    """Gradients of a unit's frames, if `wanted`, of those after its 2D layers, which are used up."""
    leaving: list[Tensor | None] = [None for _ in frames]
    temporal = {id(parameter) for parameter in unit.temporal.parameters()}
    if not wanted and all(id(parameter) in temporal for parameter in sums.parameters):
        return leaving
    for number, frame in enumerate(frames):
        leaf = frame.detach().requires_grad_(wanted)
        with torch.enable_grad():
            made = unit.image(leaf)
        inputs = [*([leaf] if wanted else []), *sums.parameters]
        found = torch.autograd.grad(made, inputs, arriving.pop(0), allow_unused=True)
        leaving[number] = found[0] if wanted else None
        sums.add(found[len(found) - len(sums.parameters) :])
    return leaving
