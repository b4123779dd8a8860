"""Weights spread over the processes of a run, a share for each: FSDP2, by torch's own `fully_shard`.

accelerate's launcher asks for it (recipes/accelerate/fsdp2.yaml, zero2.yaml and two_machines_fsdp2.yaml) by variables
that are read here and kept from accelerate, which would shard on GPUs and silently not on CPUs; the same code runs on
both.

What is trained is a twin of the player's module, made of the same layers over shares of the weights. The module itself,
which the task knows, stays a plain one: empty while the twin trains, and filled with whole weights, by all processes
together, whenever somebody looks at it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from inflate.errors import TrainingError

FSDP = "ACCELERATE_USE_FSDP"
GROUPS = "ACCELERATE_USE_PARALLELISM_CONFIG"
REPLICAS, SHARES = "PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE"
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "FSDP_OFFLOAD_PARAMS": "keeping weights on the CPU",
    "FSDP_ACTIVATION_CHECKPOINTING": "recomputing by the launcher, in place of memory.recompute=units,",
}
"""What accelerate's launcher sets for what is not done here."""

REMEDY = (
    "launch with --config_file recipes/accelerate/fsdp2.yaml (weights gathered layer by layer, as ZeRO-3 does) or "
    "recipes/accelerate/zero2.yaml (the memory of ZeRO-2), or ddp.yaml for whole weights in every process"
)
REMEDY_OF_GROUPS = (
    "set parallelism_config_dp_replicate_size to the number of machines, as recipes/accelerate/two_machines_fsdp2.yaml "
    "does, and leave the rest of parallelism_config out"
)


@dataclass(frozen=True)
class Sharding:
    """How weights are spread over the processes."""

    per_layer: bool
    """Gathered by each layer, in its forward and again in its backward pass; else once for both passes of the model."""
    replicas: int = 1
    """How often all weights are there: each of so many groups of processes, such as machines, shares them out."""

    def __str__(self) -> str:
        groups = f" within each of {self.replicas} groups" if self.replicas > 1 else ""
        return f"gathered per {'layer' if self.per_layer else 'forward and backward pass'}{groups}"


def holding(sharding: Sharding | None) -> str:
    """In words, how processes hold the weights."""
    return f"sharded weights, {sharding}" if sharding else "whole weights in every process"


# --- what the launcher asks for ---------------------------------------------------------------------------------------


def asked(environment: Mapping[str, str]) -> Sharding | None:
    """What a launcher's environment asks for; None = whole weights in every process.

    The units are those that the network names, whatever wrapping policy is configured. Raises TrainingError for another
    kind of sharding, and for settings of FSDP2 that change more than where weights lie.
    """
    sharded, groups = _is_on(environment, FSDP), _is_on(environment, GROUPS)
    for variable, name in REFUSED.items():
        if _is_on(environment, variable) and (sharded or variable.startswith("ACCELERATE")):
            raise TrainingError(f"{name} ({variable}) is not supported; {REMEDY}")
    if groups and not sharded:
        raise TrainingError(f"accelerate's parallelism config ({GROUPS}) is supported beside FSDP2 alone; {REMEDY}")
    if not sharded:
        return None
    _one_of(environment, "FSDP_VERSION", "1", ["2"])
    per_layer = _one_of(environment, "FSDP_RESHARD_AFTER_FORWARD", "true", ["true", "false"]) == "true"
    return Sharding(per_layer, _replicas(environment) if groups else 1)


def _replicas(environment: Mapping[str, str]) -> int:
    """How many groups of processes are to hold all weights each; TrainingError where the processes cannot form them."""
    for kind in ("TP", "CP", "SP"):
        _one_of(environment, f"PARALLELISM_CONFIG_{kind}_SIZE", "1", ["1"], REMEDY_OF_GROUPS)
    replicas, shares = (int(environment.get(variable, "1")) for variable in (REPLICAS, SHARES))
    processes = int(environment.get("WORLD_SIZE", "1"))
    if replicas < 1 or processes % replicas or (shares > 1 and replicas * shares != processes):
        wrong = f"{REPLICAS}={replicas} and {SHARES}={shares} do not divide {processes} processes"
        raise TrainingError(f"{wrong} into groups; {REMEDY_OF_GROUPS}")
    return replicas


def keep_from_accelerate(environment: MutableMapping[str, str]) -> None:
    """Take the wish for sharding out of an environment: accelerate and transformers would act on it as well."""
    for variable in (FSDP, GROUPS):
        environment.pop(variable, None)


def _one_of(environment: Mapping[str, str], variable: str, default: str, known: list[str], remedy: str = REMEDY) -> str:
    value = environment.get(variable, default).lower()
    if value not in known:
        raise TrainingError(f"{variable}={value} is not supported, only {' and '.join(known)}; {remedy}")
    return value


def _is_on(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "").lower() == "true"


# --- spreading and gathering ------------------------------------------------------------------------------------------


def units(network: nn.Module) -> list[nn.Module]:
    """The modules whose weights are gathered together, inner ones first; the network itself is the last."""
    names = set(getattr(network, "_no_split_modules", None) or ())
    return [module for module in reversed([*network.modules()]) if type(module).__name__ in names or module is network]


def twin(module: nn.Module, accelerator: Any, sharding: Sharding) -> nn.Module:
    """A copy of `module` on the device whose weights, trained or frozen, are spread; `module` is left empty.

    All processes start from the main one's weights. The two share their buffers, and run at the run's precision.
    """
    module.to(accelerator.device)
    tensors = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        torch.distributed.broadcast(tensor.detach(), 0)
    network = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    for one in (module, network):  # evaluation mode: autocast, but no distributed data parallel
        accelerator.prepare_model(one, evaluation_mode=True)
    axes = {"replicas": sharding.replicas, "shares": accelerator.num_processes // sharding.replicas}
    if sharding.replicas == 1:
        del axes["replicas"]
    mesh = init_device_mesh(accelerator.device.type, (*axes.values(),), mesh_dim_names=(*axes,))
    # Video layers end in a flatten, and nothing changes what a layer gave back in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for unit in units(network):
        # None: each layer gives its weights up after its forward pass, but the root, whose backward pass begins at once
        fully_shard(unit, mesh=mesh, reshard_after_forward=None if sharding.per_layer else False)
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
    network.no_sync = partial(within_groups, network)  # type: ignore[assignment]  # accelerate looks for it
    return network


@contextmanager
def within_groups(network: Any) -> Iterator[None]:
    """Leave gradients of the passes inside, which only accumulate, to the group of processes that share the weights.

    There they are summed in every pass all the same: kept whole until the last one, they would take the memory that
    sharding saves. Between groups the last pass exchanges all.
    """
    network.set_requires_all_reduce(False)
    try:
        yield
    finally:
        network.set_requires_all_reduce(True)


def spread(network: nn.Module) -> dict[str, DTensor]:
    """The weights of which each process holds a share, by name; none of a network that is not sharded."""
    return {name: parameter for name, parameter in network.named_parameters() if isinstance(parameter, DTensor)}


def own(tensor: DTensor) -> Tensor:
    """This process's share of a spread tensor, in the same memory; there may be nothing in it."""
    local: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]  # torch calls what detach() gives a Tensor
    return local


def take_gradients(shares: Mapping[str, nn.Parameter], weights: Mapping[str, DTensor]) -> None:
    """Move the gradients of spread weights to the plain parameters that optimisers know this process's shares by.

    The memory of a share is looked up anew: torch moves it in the first forward pass.
    """
    for name, weight in weights.items():
        if name in shares:
            shares[name].data = own(weight)
            shares[name].grad = own(weight.grad) if isinstance(weight.grad, DTensor) else None
            weight.grad = None


def whole(tensor: Tensor, like: DTensor | None, device: torch.device | str = "cpu", everywhere: bool = False) -> Tensor:
    """What the processes hold of a tensor that is spread as `like`, joined, on `device` of the main process or of all.

    Every process calls it, for the same tensors in the same order, and holds this one whole for a moment; processes
    that are not to keep it get an empty one. With no `like` to be spread as, the tensor as it is.
    """
    if like is None:
        return tensor
    joined = as_spread(tensor, like).full_tensor()
    return joined.to(device) if everywhere or like.device_mesh.get_rank() == 0 else joined.new_empty(0)


def as_spread(tensor: Tensor, like: DTensor) -> DTensor:
    """A share as part of what is spread as `like` is: by rows, whatever those of the share hold."""
    full = torch.empty(like.shape[0], *tensor.shape[1:], device="meta")
    stride = like.stride() if full.shape == like.shape else full.stride()
    return DTensor.from_local(tensor, like.device_mesh, like.placements, shape=full.shape, stride=stride)


def place_of(like: DTensor) -> tuple[int, int]:
    """Which share of what is spread as `like` this process holds, and of how many; groups hold the same ones."""
    dimension = like.device_mesh.ndim - 1
    return like.device_mesh.get_local_rank(dimension), like.device_mesh.size(dimension)


def share(full: Tensor, like: DTensor | None) -> Tensor:
    """A copy of what of a whole tensor this process holds where `like` is spread; all of it with no `like`."""
    if like is None:
        return full
    place, count = place_of(like)
    parts = full.chunk(count)  # as torch shards: by rows, the last processes may get none
    return parts[place].clone() if place < len(parts) else full[:0]
