"""The repeated blocks of trained networks, compiled one by one: minutes less to wait than for a whole network.

What is compiled are the inflated residual blocks and transformers, each with its temporal layers. Blocks of one kind
share a graph, of which Stable Video Diffusion needs 19; Dynamo's own limit is 8, beyond which it would run the rest
uncompiled without a word. Here it says why it cannot compile, and the run ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from inflate.errors import TrainingError
from inflate.layers.clip import ClipState
from inflate.layers.recompute import sub_blocks
from inflate.layers.temporal import VideoResnet, VideoTransformer

REPEATED = (VideoResnet, VideoTransformer)
GRAPHS = 256
"""Graphs that the blocks of one class may need: their kinds times the sizes of clips."""
PLAIN = (bool, int, float, str, tuple, type(None))
"""Types of a layer's attributes for whose values graphs are made."""

logger = logging.getLogger(__name__)
Kind = tuple[Any, ...]
Backend = Callable[..., Any]


class Compilation:
    """The compiled blocks of a run's networks, with the graphs that were made and the kinds of blocks that ran.

    TrainingError where there is no block to compile, or one that is recomputed in two levels.
    """

    def __init__(self, networks: Iterable[nn.Module], backend: str | Backend = "inductor") -> None:
        self.units = [m for network in networks for m in network.modules() if isinstance(m, REPEATED)]
        if not self.units:
            raise TrainingError("training.compile=true: there is no inflated block to compile; set it to false")
        if any(inner.recompute is not None for unit in self.units for inner in sub_blocks(unit)):
            raise TrainingError(
                "training.compile=true cannot compile what memory.recompute=nested recomputes within a block: set "
                "memory.recompute=units, or training.compile=false"
            )
        self.graphs = 0
        self.kinds: set[Kind] = set()
        self._told = 0
        self._backend = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, GRAPHS)
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, GRAPHS * len(REPEATED))
        counted = self._counted  # one object: blocks share the graphs of one backend
        for unit in self.units:
            unit.compiled = self._compiled(unit, counted)

    def check(self) -> None:
        """Tell how many graphs there are when there are more; warn of more than the blocks and clips have kinds."""
        if self.graphs == self._told:
            return
        self._told = self.graphs
        logger.info("compiled %d graphs for %d blocks of %d kinds", self.graphs, len(self.units), len(self.kinds))
        if self.graphs > len(self.kinds):
            logger.warning(
                "training.compile=true: blocks were compiled again (%d graphs for %d kinds), which costs time; "
                "TORCH_LOGS=recompiles says why",
                self.graphs,
                len(self.kinds),
            )

    def release(self) -> None:
        """Let the blocks run uncompiled."""
        for unit in self.units:
            unit.compiled = None

    def _compiled(self, unit: VideoResnet | VideoTransformer, backend: Backend) -> Callable[..., Any]:
        # fullgraph: what cannot be compiled, and a limit that is reached, is an error instead of slow.
        function = torch.compile(unit._both, backend=backend, fullgraph=True, dynamic=False)
        kind = kind_of(unit)

        def call(*given: Any) -> Any:
            self.kinds.add((kind, *_shapes(given, unit.clip.state)))
            try:
                return function(*given)
            except torch._dynamo.exc.TorchDynamoException as error:
                raise TrainingError(
                    f"training.compile=true: a {type(unit).__name__} cannot be compiled: {_reason(error)}; "
                    "set training.compile=false"
                ) from error

        return call

    def _counted(self, graph: Any, inputs: list[Tensor], **options: Any) -> Any:
        self.graphs += 1
        return self._backend(graph, inputs, **options)


def kind_of(unit: nn.Module) -> Kind:
    """What tells blocks apart that need a graph each: their layers' types, plain attributes and parameters."""
    return tuple(
        (
            type(module),
            *((n, type(v), repr(v)) for n, v in sorted(vars(module).items()) if isinstance(v, PLAIN)),
            *((n, p.shape, p.dtype, p.requires_grad) for n, p in module.named_parameters(recurse=False)),
        )
        for module in unit.modules()
    )


def _shapes(given: Sequence[Any], state: ClipState) -> Kind:
    tensors = [value for value in tree_leaves((given, state.image_only, state.image_bias)) if isinstance(value, Tensor)]
    return (state.frames, state.bypass, *((each.shape, each.dtype, each.requires_grad) for each in tensors))


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
