"""A device on paper: its tensors have a shape and a type but no memory, so that a GPU need not be there.

What a training step does there is what PyTorch would do, autocast included: it is its own dispatch, over its fake
tensors. They call themselves the CPU's, for a build without CUDA knows no other; where a GPU would do otherwise
(attention, the norms of autocast), `Paper` does as the GPU. Values are unknown: code that asks for one is told 0.
What is on the meta device is away, as in the CPU's memory: a network that visits the paper takes its place there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.nn import functional
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inflate.models.visits import waiting_on
from inflate.objectives import Schedule, schedule_signal
from inflate.training.memory import fused_attention

DEVICE = torch.device("cpu")
"""What the tensors say of where they are."""
ATEN = torch.ops.aten
PLAIN = {
    **dict.fromkeys((
        ATEN.detach.default, ATEN.expand.default, ATEN.permute.default, ATEN.select.int, ATEN.slice.Tensor,
        ATEN.split.Tensor, ATEN.squeeze.dim, ATEN.t.default, ATEN.transpose.int, ATEN.unbind.int,
        ATEN.unsqueeze.default, ATEN.view.default, ATEN._unsafe_view.default,
    ), 1),
    ATEN.copy_.default: 2,
}  # fmt: skip
"""Operations that give a view of what they are given, or that itself, and how many tensors they take."""


@dataclass
class Paper:
    """A device that need not be there: a GPU, or else the CPU, for comparison with what can be measured there."""

    gpu: bool = True
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let networks on paper be used; tensors that have nothing to do with them keep their values."""
        for each in product((False, True), get_args(Schedule)):
            schedule_signal(*each)  # kept for good by whoever asks first: not without values
        with ExitStack() as stack:
            if self.gpu:
                stack.enter_context(fused_attention(on_paper))
                stack.enter_context(float32_norms())
                stack.enter_context(waiting_on(torch.device("meta")))
            stack.enter_context(self._moving())
            stack.enter_context(self.mode)
            stack.enter_context(_Routes(self.mode))
            yield

    def adopt(self, network: nn.Module) -> None:
        """Give a network, which may be without memory (on the meta device), parameters and buffers on paper."""
        _replace(network, self.like)

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Let networks be moved: PyTorch would exchange the contents of parameters, which those on paper refuse."""
        plain = nn.Module._apply

        def move(network: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
            goals: dict[torch.dtype, Tensor] = {}
            return _replace(network, lambda tensor: self._moved(tensor, function, goals), recurse)

        nn.Module._apply = move  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module._apply = plain  # type: ignore[method-assign]

    def _moved(self, tensor: Tensor, function: Callable[[Tensor], Tensor], goals: dict[torch.dtype, Tensor]) -> Tensor:
        """What a move makes of a tensor, also of one that comes from the meta device or goes there.

        `goals` keeps what it makes of an empty tensor of each type.
        """
        if tensor.dtype not in goals:
            goals[tensor.dtype] = function(torch.empty(0, dtype=tensor.dtype))
        goal, here = goals[tensor.dtype], on_paper(tensor)
        if here and goal.is_meta:
            return torch.empty(tensor.shape, dtype=goal.dtype, device="meta")
        if not here and tensor.is_meta and not goal.is_meta:
            return self._nothing.new_empty(tensor.shape, dtype=goal.dtype)
        return function(tensor)

    @cached_property
    def _nothing(self) -> Tensor:
        return self.empty(0)

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape and type on paper."""
        return tensor if on_paper(tensor) else self.empty(*tensor.shape, dtype=tensor.dtype)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor on paper."""
        return FakeTensor(self.mode, torch.empty(shape, dtype=dtype, device="meta"), DEVICE)


def on_paper(tensor: Tensor) -> bool:
    """Whether a tensor has no values."""
    return isinstance(tensor, FakeTensor)


class _Routes(TorchDispatchMode):
    """Sends to the paper what concerns it, and everything else to where values are known."""

    known: ClassVar[dict[tuple[Any, ...], list[tuple[Any, ...]]]] = {}
    """shape, strides and type of what operations make of arguments"""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled on paper, and to say so costs as much as the call itself."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if FakeTensor not in types:
            with unset_fake_temporarily():
                return func(*args, **given)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        if func in PLAIN and all(_is_here(args[place]) for place in range(PLAIN[func])):
            return self._plainly(func, args, given)
        return self._anew(func, args, given) if _makes_anew(func) else func(*args, **given)

    def _plainly(self, func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """What an operation makes of tensors on paper, by its own rule for shapes: in a quarter of the time."""
        with in_kernel_invocation_manager(self.mode):
            made = func(*args, **given)
        return [self._wrapped(one) for one in made] if isinstance(made, list | tuple) else self._wrapped(made)

    def _anew(self, func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        """The same of an operation that makes new tensors: those that it made of others of these shapes before.

        PyTorch's fake tensors keep such a table, too; but to look something up in theirs takes several times as long.
        """
        key: list[Any] = [func]
        if not (_tell(args, key) and _tell(given.items(), key)):
            return func(*args, **given)
        asked = tuple(key)
        if asked in self.known:
            with no_dispatch():
                made = [torch.empty_strided(*size, dtype=dtype, device="meta") for *size, dtype in self.known[asked]]
            return self._wrapped(made[0]) if _is_single(func) else tuple(map(self._wrapped, made))
        result = func(*args, **given)
        made = [result] if _is_single(func) else list(result)
        if all(_is_whole(one) for one in made) and not _storages(made) & _storages([*args, *given.values()]):
            self.known[asked] = [(one.shape, one.stride(), one.dtype) for one in made]
        return result

    def _wrapped(self, made: Tensor) -> Tensor:
        return made if on_paper(made) else FakeTensor(self.mode, made, DEVICE)


@cache
def _makes_anew(func: Any) -> bool:
    """Whether all that an operation gives are tensors that are neither its arguments nor views of them."""
    schema = func._schema
    plain = all(str(one.type) == "Tensor" and one.alias_info is None for one in schema.returns)
    return bool(schema.returns) and plain and not schema.is_mutable


@cache
def _is_single(func: Any) -> bool:
    return len(func._schema.returns) == 1


def _tell(values: Iterable[Any], into: list[Any]) -> bool:
    """Put what a result depends on, but for values, into a list.

    False where a tensor has values, which its shape may hang on, or is away, where the result then is, too.
    """
    for value in values:
        if _is_here(value):
            into += (value.shape, value.stride(), value.dtype)
        elif isinstance(value, list | tuple):
            into.append(len(value))
            if not _tell(value, into):
                return False
        elif isinstance(value, Tensor):
            return False
        else:
            into += (type(value), value)
    return True


def _is_here(value: Any) -> bool:
    """Whether a value is a tensor on paper that is not away."""
    return isinstance(value, FakeTensor) and value.fake_device == DEVICE


def _is_whole(made: Any) -> bool:
    """Whether a result is a tensor on paper with a storage of just its own size."""
    if not _is_here(made):
        return False
    reach = 1 + sum((size - 1) * step for size, step in zip(made.shape, made.stride(), strict=True))
    return made.untyped_storage().nbytes() == (made.element_size() * reach if made.numel() else 0)


def _storages(values: Iterable[Any]) -> set[int]:
    return {each.untyped_storage()._cdata for each in tree_leaves(list(values)) if isinstance(each, Tensor)}


@contextmanager
def float32_norms() -> Iterator[None]:
    """Let autocast compute norms in float32, as it does on a GPU and not on a CPU.

    The functions are exchanged, for a function mode is switched off in a backward pass and would miss recomputation.
    """
    plain = functional.group_norm, functional.layer_norm
    functional.group_norm, functional.layer_norm = _widened(plain[0]), _widened(plain[1])
    try:
        yield
    finally:
        functional.group_norm, functional.layer_norm = plain


def _widened(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wide(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_autocast_enabled(DEVICE.type):
            return norm(*args, **kwargs)
        return norm(*map(_float32, args), **{name: _float32(value) for name, value in kwargs.items()})

    return wide


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _replace(network: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Put what `function` makes of every parameter and buffer in its place."""
    for module in network.modules() if recurse else [network]:
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None:
                    with torch.no_grad():
                        tensors[name] = _replaced(tensor, function(tensor))
    return network


def _replaced(tensor: Tensor, made: Tensor) -> Tensor:
    if made.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
        return tensor
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
