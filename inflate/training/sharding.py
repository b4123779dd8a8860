"""Weights spread over the processes of a run, a share for each: FSDP2, by torch's own `fully_shard`.

accelerate's launcher asks for it (recipes/accelerate/fsdp2.yaml and zero2.yaml) by variables that are read here and
kept from accelerate, which would shard on GPUs and silently not on CPUs; the same code runs on both.

What is trained is a twin of the player's module, made of the same layers over shares of the weights. The module itself,
which the task knows, stays a plain one: empty while the twin trains, and filled with whole weights, by all processes
together, whenever somebody looks at it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from inflate.errors import TrainingError

FSDP = "ACCELERATE_USE_FSDP"
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism config",
    "FSDP_OFFLOAD_PARAMS": "keeping weights on the CPU",
    "FSDP_ACTIVATION_CHECKPOINTING": "recomputing by the launcher, in place of memory.recompute=units,",
}
"""What accelerate's launcher sets for what is not done here."""

REMEDY = (
    "launch with --config_file recipes/accelerate/fsdp2.yaml (weights gathered layer by layer, as ZeRO-3 does) or "
    "recipes/accelerate/zero2.yaml (the memory of ZeRO-2), or ddp.yaml for whole weights in every process"
)


@dataclass(frozen=True)
class Sharding:
    """How weights are spread over the processes."""

    per_layer: bool
    """Gathered by each layer, in its forward and again in its backward pass; else once for both passes of the model."""

    def __str__(self) -> str:
        return f"gathered per {'layer' if self.per_layer else 'forward and backward pass'}"


# --- what the launcher asks for ---------------------------------------------------------------------------------------


def asked(environment: Mapping[str, str]) -> Sharding | None:
    """What a launcher's environment asks for; None = whole weights in every process.

    The units are those that the network names, whatever wrapping policy is configured. Raises TrainingError for another
    kind of sharding, and for settings of FSDP2 that change more than where weights lie.
    """
    sharded = _is_on(environment, FSDP)
    for variable, name in REFUSED.items():
        if _is_on(environment, variable) and (sharded or variable.startswith("ACCELERATE")):
            raise TrainingError(f"{name} ({variable}) is not supported; {REMEDY}")
    if not sharded:
        return None
    _one_of(environment, "FSDP_VERSION", "1", ["2"])
    return Sharding(_one_of(environment, "FSDP_RESHARD_AFTER_FORWARD", "true", ["true", "false"]) == "true")


def keep_from_accelerate(environment: MutableMapping[str, str]) -> None:
    """Take the wish for FSDP out of an environment: accelerate and transformers would act on it as well."""
    environment.pop(FSDP, None)


def _one_of(environment: Mapping[str, str], variable: str, default: str, known: list[str]) -> str:
    value = environment.get(variable, default).lower()
    if value not in known:
        raise TrainingError(f"{variable}={value} is not supported, only {' and '.join(known)}; {REMEDY}")
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
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Video layers end in a flatten, and nothing changes what a layer gave back in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for unit in units(network):
        # None: each layer gives its weights up after its forward pass, but the root, whose backward pass begins at once
        fully_shard(unit, mesh=mesh, reshard_after_forward=None if sharding.per_layer else False)
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
    return network


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


def share(full: Tensor, like: DTensor | None) -> Tensor:
    """A copy of what of a whole tensor this process holds where `like` is spread; all of it with no `like`."""
    if like is None:
        return full
    parts = full.chunk(like.device_mesh.size())  # as torch shards: by rows, the last processes may get none
    rank = like.device_mesh.get_local_rank()
    return parts[rank].clone() if rank < len(parts) else full[:0]
