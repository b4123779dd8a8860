"""How many kernels does a LoRA step of Stable Video Diffusion launch, as it is and with its blocks compiled?

    python benchmarks/launches.py benchmarks/results/launches.json      two minutes of a core

Launches depend on a model's layers and not on their widths, so a narrow model of SVD-XT's structure is run on the CPU:
its base in bf16, adapters of rank 16 in float32, one clip, without recomputation, gradients clipped, fused AdamW. What
is counted:

- outside compiled blocks, every call of an operator that a device would have to do something for: not of views, nor
  of empty tensors. A call over a list of tensors counts once per 30 of them, the least that PyTorch's kernels take;
- of a compiled block, once per run of its graph, forward or backward: each product, convolution and attention, and each
  connected group of elementwise operations, copies and reductions with none of these between them, nor a reduction over
  more than the last dimension, whose result the rest must wait for. That is what a compiler such as Inductor fuses.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import train_step
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from record import command, record, write

LISTED = 30
"""Tensors that PyTorch's kernels over lists take at once, at the least."""
NOTHING = (
    "empty empty_like empty_strided new_empty new_empty_strided detach lift_fresh alias view _unsafe_view reshape "
    "_reshape_alias expand permute transpose t select slice split split_with_sizes chunk unbind unsqueeze squeeze "
    "as_strided unfold diagonal getitem sym_size _local_scalar_dense"
).split()
"""Operators that launch nothing."""
FRAMES, SIDE = 4, 128
RANK = 16
LAYERS = {"": "all attention", ".temporal.attn1.": "attention between frames"}
"""Parts of the names of the layers that carry the adapter."""
MOST = 3000
"""Launches that a compiled step with a LoRA on the attention between frames, as adapters/camera_lora.yaml, may need."""


def name_of(target: Any) -> str:
    """An operator's name without its overload."""
    return str(getattr(getattr(target, "_overloadpacket", target), "__name__", target))


def launches(target: Any, arguments: Any) -> int:
    """Kernels that one call of an operator launches."""
    name = name_of(target)
    if name in NOTHING or getattr(target, "is_view", False):
        return 0
    if name.startswith(("_foreach", "_fused")):
        return -(-len(arguments[0]) // LISTED)
    return 1


class Calls(TorchDispatchMode):
    """Counts what is launched while it is active, by operator; what a compiled graph does counts by the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.within = False

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Let Dynamo run compiled graphs beneath it."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.within and (number := launches(func, args)):
            self.counts[name_of(func)] += number
        return func(*args, **(kwargs or {}))

    @contextmanager
    def as_graph(self, number: int, name: str) -> Iterator[None]:
        """Count a graph's own number of calls in place of what it does."""
        self.counts[name] += number
        self.within = True
        try:
            yield
        finally:
            self.within = False

    @property
    def total(self) -> int:
        """All launches."""
        return self.counts.total()


# ---- what is left of a graph


FUSIBLE = (
    "sum mean var_mean amax _to_copy clone constant_pad_nd full full_like ones_like zeros_like scalar_tensor arange "
    "iota cat convert_element_type fill copy"
).split()
"""Operators beside the elementwise ones that a compiler does in passing."""
REDUCTIONS = ("sum", "mean", "var_mean", "amax")


def left(graph: fx.GraphModule) -> int:
    """The kernels that are left of a graph after fusion, by the rule above."""
    level: dict[fx.Node, int] = {}
    group: dict[fx.Node, fx.Node] = {}
    heavy = 0
    for node in graph.graph.nodes:
        level[node] = max((level[given] + _ends(given) for given in node.all_input_nodes), default=0)
        if node.op != "call_function":
            continue
        if launches(node.target, node.args) and not _fusible(node):
            heavy += 1
            continue
        group[node] = node
        for given in node.all_input_nodes:
            if given in group and level[given] == level[node] and not _ends(given):
                group[_first(group, given)] = _first(group, node)
    does = (node for node in group if launches(node.target, node.args))
    return heavy + len({_first(group, node) for node in does})


def _fusible(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or name_of(node.target) in FUSIBLE


def _ends(node: fx.Node) -> bool:
    """Whether what reads a value must wait for all of it."""
    if node.op != "call_function" or not launches(node.target, node.args):
        return False
    if name_of(node.target) in REDUCTIONS:
        given = node.args[0].meta["val"]
        over = node.args[1] if len(node.args) > 1 else None
        return over is None or [axis % given.ndim for axis in over] != [given.ndim - 1]
    return not _fusible(node)


def _first(group: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    while group[node] is not node:
        node = group[node]
    return node


def counting(calls: Calls, found: dict[str, list[int]]) -> Callable[..., Any]:
    """A backend of torch.compile whose graphs, split as for Inductor, count as what is left of them."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def compiler(direction: str, graph: fx.GraphModule, _: Any) -> Any:
        number = left(graph)
        found.setdefault(direction, []).append(number)

        def run(*given: Any) -> Any:
            with calls.as_graph(number, f"compiled, {direction}"):
                return graph(*given)

        return make_boxed_func(run)

    return aot_autograd(
        fw_compiler=partial(compiler, "forward"),
        bw_compiler=partial(compiler, "backward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )


# ---- the step


def narrow() -> train_step.Size:
    """SVD-XT's structure in small widths."""
    full = train_step.FULL
    vae, clip = {}, {}
    return train_step.Size((32, 64, 128, 128), (1, 2, 4, 4), full.attends, full.layers, 32, 32, vae, clip)


def network(fused: bool, size: train_step.Size, layers: str = "") -> nn.Module:
    """A UNet with LoRA on its attention, or on part of it, in training mode."""
    torch.manual_seed(0)
    side = train_step.Side("inflate", train_step.our_unet(size), train_step.our_loss)
    train_step.choose_parameters(side.unet, "lora", RANK, torch.bfloat16, torch.float32, fused, layers)
    train_step.freeze_inert(side)
    return side.unet.train()


def step(unet: nn.Module, optimizer: torch.optim.Optimizer, batch: train_step.Batch) -> None:
    """One training step on encoded clips."""
    train_step.our_loss(unet, batch).backward()
    nn.utils.clip_grad_norm_(train_step.trained(unet), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad()


def count(fused: bool, compiled: bool, layers: str = "") -> dict[str, Any]:
    """The launches of the second step: by then the optimiser has its state and the graphs are there."""
    from inflate.training.compiling import Compilation

    size = narrow()
    unet, calls, found = network(fused, size, layers), Calls(), {}
    optimizer = torch.optim.AdamW(train_step.trained(unet), fused=True)
    latents = partial(torch.randn, 1, FRAMES, 4, SIDE // 8, SIDE // 8)
    batch = train_step.Batch(latents(), latents(), latents(), torch.zeros(1), torch.randn(1, 1, 32), torch.ones(1, 3))
    compilation = Compilation([unet], counting(calls, found)) if compiled else None
    step(unet, optimizer, batch)
    calls.counts.clear()
    with calls:
        step(unet, optimizer, batch)
    graphs = {"graphs": compilation.graphs, "left in each": found} if compilation else {}
    return {"launches": calls.total, "most": dict(calls.counts.most_common(12)), **graphs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train_step.quiet()
    cases = {}
    for layers, where in LAYERS.items():
        for fused, compiled in product((False, True), (False, True)):
            how = f"{'fused' if fused else 'of PEFT'}, {'compiled' if compiled else 'not compiled'}"
            found = cases[f"LoRA on {where}, {how}"] = count(fused, compiled, layers)
            print(f"LoRA on {where}, {how}: {found['launches']} launches", flush=True)
    most = cases[f"LoRA on {LAYERS['.temporal.attn1.']}, fused, compiled"]["launches"]
    if most > MOST:
        raise SystemExit(f"{most} launches with a LoRA between frames: more than {MOST}")
    write(args.output, record(command("OUT"), {"cases": cases}))


if __name__ == "__main__":
    main()
