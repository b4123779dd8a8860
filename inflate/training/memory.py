"""What one training step costs, in bytes and floating point operations, worked out on the meta device without a GPU.

Every tensor that a step makes is followed from birth to death, so the figures are those of a caching allocator that
never fragments. Left out: workspaces of kernels but for those of convolutions, where they are asked for, allocator
rounding and the CUDA context; leave a tenth of head-room.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from inflate.errors import TrainingError
from inflate.layers.offload import is_resting

FLASH_HEAD_LIMIT = 256  # channels per head; wider heads take the memory-efficient kernel
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Holding:
    """One live storage: its size in bytes, first shape and dtype, and the operation and module that made it."""

    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    operation: str
    module: str


@dataclass(frozen=True)
class Estimate:
    """The cost of one training step; sizes in bytes, FLOPs counting a multiply-add as two."""

    parameters: int  # all of the network's, trained or frozen
    trained: int  # number (not bytes) of trained parameters
    gradients: int
    optimizer: int  # the optimiser's state
    inputs: int
    held: int  # activations kept from the forward pass for the backward pass
    activation_peak: int  # highest use of the step, less parameters, buffers and inputs; it includes gradients
    peak: int  # highest use of the step, optimiser state included
    forward_flops: int
    flops: int  # forward, recomputation and backward
    holdings: tuple[Holding, ...]  # what `held` consists of, the largest first


class Ledger(TorchDispatchMode):
    """Counts the bytes of live storages and the FLOPs of every operation while it is active.

    Only tensors of one kind of device count, and of those not what rests elsewhere (`inflate.layers.offload`). What is
    counted is told apart by phases, which `begin` names. With `workspaces` it counts what a GPU's convolutions take for
    themselves, too (`workspace`).
    """

    def __init__(self, device: str = "meta", workspaces: bool = False) -> None:
        super().__init__()
        self.device, self.workspaces = device, workspaces
        self.current = self.peak = self.flops = 0
        self.phase = ""
        self.peaks: dict[str, int] = {}
        self.work: dict[tuple[str, bool], int] = {}
        """FLOPs by phase, and whether they were done in half precision"""
        self.modules: list[str] = [""]
        self._live: dict[int, tuple[Holding, Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing that is counted is compiled, and to say so costs as much as the counting."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # asked of every tensor by autocast: half of all calls
            return device_of(args[0])
        result = func(*args, **(kwargs or {}))
        values = (result,) if isinstance(result, Tensor) else tree_leaves(result)
        self.record(values, func)
        if self.workspaces and func is torch.ops.aten.convolution.default:
            self._reach(self.current + workspace(args[0], args[1], result))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self._count(int(formula(*args, **(kwargs or {}), out_val=result)), values)
        return result

    def _count(self, flops: int, made: Sequence[Any]) -> None:
        half = any(isinstance(value, Tensor) and value.dtype in HALVES for value in made)
        self.flops += flops
        self.work[self.phase, half] = self.work.get((self.phase, half), 0) + flops

    def begin(self, phase: str) -> None:
        """Count towards a phase from here on."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.current)

    def record(self, values: Iterable[Any], operation: object = "given") -> None:
        """Enter the storages of the tensors among `values` that are not entered yet."""
        for value in values:
            if isinstance(value, Tensor):
                self._enter(value, operation)

    def _enter(self, tensor: Tensor, operation: object) -> None:
        if device_of(tensor).type != self.device or is_resting():
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        holding = Holding(storage.nbytes(), tuple(tensor.shape), tensor.dtype, str(operation), self.modules[-1])
        self._live[key] = (holding, weakref.ref(storage, lambda _: self._leave(key)))
        self.current += holding.bytes
        self._reach(self.current)

    def _reach(self, height: int) -> None:
        self.peak = max(self.peak, height)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), height)

    def _leave(self, key: int) -> None:
        holding, _ = self._live.pop(key)
        self.current -= holding.bytes

    def holdings(self, apart_from: set[int]) -> tuple[Holding, ...]:
        """Live storages, the largest first, without those whose keys are in `apart_from`."""
        live = [holding for key, (holding, _) in self._live.items() if key not in apart_from]
        return tuple(sorted(live, key=lambda holding: -holding.bytes))

    def keys(self) -> set[int]:
        """The keys of the live storages."""
        return set(self._live)

    @contextmanager
    def named(self, network: nn.Module) -> Iterator[None]:
        """Note the module of `network` in which each tensor is born."""
        hooks = []
        for name, module in network.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.modules.append(name)))
            # A recomputation stops early by an exception, so the name must go whether or not the forward ends.
            hooks.append(module.register_forward_hook(self._pop, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _pop(self, *_: Any) -> None:
        self.modules.pop()


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor is; one on paper tells it without a call of PyTorch's dispatcher."""
    told: torch.device | None = getattr(tensor, "fake_device", None)
    return tensor.device if told is None else told


def workspace(given: Tensor, weight: Tensor, made: Tensor) -> int:
    """Bytes that cuDNN takes for a convolution while it runs: what goes in and comes out, in its own order of memory.

    It does so in float32, and in half precision for kernels over frames, (n, 1); not for others, nor for single pixels.
    Read off an H100's allocator with PyTorch 2.11 and cuDNN 9.19 (benchmarks/README.md, gpu.py).
    """
    *_, height, width = weight.shape
    over_frames = height > 1 and width == 1
    if over_frames or (height * width > 1 and given.dtype == torch.float32):
        return bytes_of((given, made))
    return 0


@contextmanager
def fused_attention(fusible: Callable[[Tensor], bool] = lambda query: query.is_meta) -> Iterator[None]:
    """Send unmasked attention, where queries are `fusible`, to the fused kernel that a GPU would choose.

    Without a GPU in sight the dispatcher picks the plain one, whose score matrix would dominate every figure. The
    function itself is exchanged, for a function mode is switched off in a backward pass and would miss recomputation.
    """
    plain = functional.scaled_dot_product_attention

    def choose(*args: Any, **kwargs: Any) -> Tensor:
        return _fused(*args, **kwargs) if _unmasked(*args, **kwargs) and fusible(args[0]) else plain(*args, **kwargs)

    functional.scaled_dot_product_attention = choose
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def _unmasked(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> bool:
    return attn_mask is None


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    aten, given = torch.ops.aten, (dropout_p, is_causal)
    attended: Tensor
    if query.shape[-1] <= FLASH_HEAD_LIMIT:
        attended = aten._scaled_dot_product_flash_attention(query, key, value, *given, False, scale=scale)[0]
    else:
        learns = torch.is_grad_enabled() and query.requires_grad
        attended = aten._scaled_dot_product_efficient_attention(query, key, value, None, learns, *given, scale=scale)[0]
    return attended


def tensors_of(network: nn.Module) -> list[Tensor]:
    """All that a network holds."""
    return [*network.parameters(), *network.buffers()]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of the elements of `tensors`, shared storage counted once per tensor."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def simulate(
    network: nn.Module,
    inputs: Callable[[], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    optimizer_bytes: int = 8,
) -> Estimate:
    """The cost of `loss(network, inputs()).backward()`, from one run with the network on the meta device.

    `optimizer_bytes` is the optimiser's state per trained parameter: 8 for AdamW in fp32. The network's gradients are
    cleared before and after. Raises TrainingError if a parameter is not on the meta device or none is trained.
    """
    trained = _check(network)
    network.zero_grad(set_to_none=True)
    gc.collect()  # a dead cycle that is collected in mid-run would count as memory that the step gave back
    ledger = Ledger()
    ledger.record([*network.parameters(), *network.buffers()])
    start = ledger.current
    with fused_attention(), ledger:
        batch = inputs()
        ledger.record(tree_leaves(batch))
        given, before = ledger.current, ledger.keys()
        with ledger.named(network):
            value = loss(network, batch)
        held, holdings, forward_flops = ledger.current - given, ledger.holdings(before), ledger.flops
        value.backward()
    gradients = bytes_of(parameter.grad for parameter in trained if parameter.grad is not None)
    network.zero_grad(set_to_none=True)
    count = sum(parameter.numel() for parameter in trained)
    return Estimate(
        parameters=bytes_of(network.parameters()),
        trained=count,
        gradients=gradients,
        optimizer=count * optimizer_bytes,
        inputs=given - start,
        held=held,
        activation_peak=ledger.peak - given,
        peak=ledger.peak + count * optimizer_bytes,
        forward_flops=forward_flops,
        flops=ledger.flops,
        holdings=holdings,
    )


def _check(network: nn.Module) -> list[nn.Parameter]:
    for name, parameter in network.named_parameters():
        if parameter.device.type != "meta":
            raise TrainingError(f"{name} is on {parameter.device}: build the network under torch.device('meta')")
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not trained:
        raise TrainingError("no parameter requires a gradient: there is no training step to simulate")
    return trained


def held_table(estimate: Estimate, rows: int = 20) -> str:
    """The largest groups of held tensors (same shape, operation and module) as text, sizes in GB (1e9 bytes)."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for holding in estimate.holdings:
        key = (holding.module, holding.operation, f"{tuple(holding.shape)} {str(holding.dtype).split('.')[-1]}")
        groups.setdefault(key, []).append(holding.bytes)
    largest = sorted(groups.items(), key=lambda group: -sum(group[1]))[:rows]
    lines = [
        f"{sum(sizes) / 1e9:8.3f} GB {len(sizes):4d} x {tensor:36s} {operation:44s} {module}"
        for (module, operation, tensor), sizes in largest
    ]
    return "\n".join([f"{estimate.held / 1e9:8.3f} GB held in all", *lines])
