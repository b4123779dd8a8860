"""What a task brings to the loop, and what the loop keeps for each network that it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from inflate.errors import TrainingError
from inflate.layers.quantised import kind_of
from inflate.training.adamw import AdamW
from inflate.training.bfloat16 import Narrow
from inflate.training.in_backward import InBackward
from inflate.training.noise import Noise
from inflate.training.settings import Training, rate
from inflate.training.sharding import Sharding, own, spread, take_gradients, twin, units, whole

Batch = dict[str, Any]


class Selected(NamedTuple):
    """A logged tensor of which only some samples count in the mean: values (B,), and whether each one counts (B,)."""

    values: Tensor
    chosen: Tensor


def selected(logged: Tensor | Selected) -> Selected:
    """A logged tensor without its graph; of a plain one every element counts."""
    values, chosen = logged if isinstance(logged, Selected) else (logged, torch.ones_like(logged, dtype=torch.bool))
    return Selected(values.detach(), chosen)


@dataclass(eq=False)
class Player:
    """A network with its own loss and optimiser. One player is ordinary training, two are adversarial training.

    `loss(batch, noise, step)` returns per-sample losses (B,) and tensors to log, whose means are shown: of all their
    elements, or of those `Selected`, so that a mean may be over some of the samples.
    The loop replaces `network` by accelerate's wrapper of it: the loss calls `player.network(...)`, by its `forward`,
    so that precision and gradient synchronisation take part. Another player's network is called as the bare module
    that the task holds; its parameters are frozen meanwhile. Parameters that require a gradient when `fit` begins are
    trained. A network that can be sharded names its layers in `_no_split_modules`, as diffusers' models do.
    """

    name: str
    network: nn.Module
    loss: Callable[[Batch, Noise, int], tuple[Tensor, Mapping[str, Tensor | Selected]]]
    lr: float | None = None
    """Its learning rate; None = the run's."""
    start: int = 0
    """First step at which it acts."""
    remedy: str = ""
    """What to do where much time goes into its loss outside the trained networks, or into waiting for its clips."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """By the name of a parameter in `network`, what its learning rate is multiplied by; 1 for those without a name."""


class Task(Protocol):
    """What is trained and how it is looked at.

    `evaluate`, `preview` and `export` run on the main process, without gradients, in eval mode, with the averaged
    weights if the run keeps an average; players' networks are then the bare modules, at the run's precision in the
    first two, at full precision in `export`. Where weights are sharded, the main process's device holds them whole
    meanwhile, beside its share of weights, average and optimiser state.
    """

    @property
    def players(self) -> Sequence[Player]:
        """In the order in which they act on a batch, so that one can leave its output for the next."""

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """Networks that are used but not trained: moved to the device and put into eval mode by the loop."""

    def evaluate(self) -> dict[str, float]:
        """Held-out measurements on fixed data and noise, by name."""

    def preview(self, folder: Path) -> None:
        """Write what a person should look at, from fixed seeds and inputs, into an existing empty folder."""

    def export(self, folder: Path) -> None:
        """Write the result into an existing empty folder."""


@runtime_checkable
class Founded(Protocol):
    """A task whose trained weights rest on files that no checkpoint holds."""

    def fingerprint(self) -> Mapping[str, str]:
        """What a run that goes on must find unchanged, by name."""


class Trainee:
    """One player's bare module, trainable parameters, optimiser and averaged weights.

    Where weights are sharded, `parameters`, the optimiser's state and `average` are this process's shares, as plain
    tensors; `spread` tells of what, trained or frozen.
    """

    def __init__(self, player: Player, settings: Training) -> None:
        self.player, self.settings, self.module = player, settings, player.network
        self.narrow = Narrow(self.module) if settings.precision == "pure_bf16" else None
        self.in_backward: InBackward | None = None
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise TrainingError(f"player '{player.name}' has no trainable parameter: nothing requires a gradient")
        self.lr = settings.lr if player.lr is None else player.lr
        self.average: dict[str, Tensor] = {}
        self.spread: dict[str, DTensor] = {}
        self.optimizer: Any = self._adamw()
        self.resting = False
        """Whether the averaged weights stand, or may stand, in place of the trained ones; see `at_rest`."""

    def _adamw(self) -> torch.optim.Optimizer:
        """PyTorch's AdamW, fused on a GPU, or our own for what PyTorch's has not."""
        settings, parameters, groups = self.settings, self.parameters.values(), self._groups()
        cuda = any(p.is_cuda for p in parameters)
        eight_bits, narrow = settings.optimizer == "adamw8bit", any(p.dtype == torch.bfloat16 for p in parameters)
        if eight_bits or narrow or settings.step_in_backward:
            return AdamW(groups, self.parameters, self.lr, settings.betas, eight_bits, settings.seed, self.spread)
        return torch.optim.AdamW(groups, lr=self.lr, betas=settings.betas, fused=cuda or None)

    def _groups(self) -> list[dict[str, Any]]:
        """The parameters apart by their weight decay and by what multiplies their learning rate."""
        found: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name in self.places():
            parameter, rate = self.parameters[name], self.player.rates.get(name, 1.0)
            found.setdefault((self.settings.weight_decay if parameter.ndim >= 2 else 0.0, rate), []).append(parameter)
        return [{"params": group, "weight_decay": decay, "multiplier": rate} for (decay, rate), group in found.items()]

    def prepare(self, accelerator: Any) -> None:
        """Move to the device, wrap for precision and processes, and start the average at the present weights."""
        self.module.train()
        if accelerator.state.sharding:
            self.player.network = twin(self.module, accelerator, accelerator.state.sharding)
            self.spread = spread(self.player.network)
            self.parameters = {name: nn.Parameter(own(self.spread[name])) for name in self.parameters}
        else:
            self.player.network = accelerator.prepare_model(self.module)
        if not accelerator.is_main_process:  # which alone exports, and whose weights are the run's
            self.forget_frozen()
        optimizer = self._adamw()  # where the parameters lie now
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        if self.settings.step_in_backward and isinstance(optimizer, AdamW):
            self.in_backward = InBackward(self.parameters.values(), optimizer)
        if self.settings.ema:  # in float32 at least: a 16-bit average would not move
            wide = {name: torch.promote_types(p.dtype, torch.float32) for name, p in self.parameters.items()}
            self.average = {name: p.detach().to(wide[name], copy=True) for name, p in self.parameters.items()}

    def forget_frozen(self) -> None:
        """Let go of what the CPU's memory keeps for the export, where none is to be."""
        if self.narrow is not None:
            self.narrow.frozen.clear()

    def buffers(self) -> dict[str, Tensor]:
        """The persistent buffers: spectral norms' vectors, running statistics."""
        kept = self.module.state_dict().keys()
        return {name: buffer for name, buffer in self.module.named_buffers() if name in kept}

    def places(self) -> list[str]:
        """The names of the parameters, by their places in a checkpoint of the optimiser's state: matrices and
        convolutions first, whatever groups the optimiser has.
        """
        return sorted(self.parameters, key=lambda name: self.parameters[name].ndim < 2)

    def states(self) -> dict[int, Mapping[str, Any]]:
        """What the optimiser keeps for each parameter that it has updated, by the places of `places`."""
        states = self.optimizer.state
        return {n: states[p] for n, p in enumerate(map(self.parameters.__getitem__, self.places())) if states.get(p)}

    def load_states(self, states: Mapping[int, Any]) -> None:
        """Take such over; the groups, which hold settings, remain the present run's."""
        present = {id(self.parameters[name]): place for place, name in enumerate(self.places())}
        order = [present[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]
        state = {number: states[place] for number, place in enumerate(order) if place in states}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def gradient_norm(self, accelerator: Any) -> Tensor:
        """Norm of all gradients as one vector, unscaled; the gradients stay as they are.

        Raises TrainingError where there are none, and, under several processes, where one is missing: they exchange
        gradients in fixed groups, and would wait for it or leave its group out.
        """
        if self.in_backward is not None and (norm := self.in_backward.norm()) is not None:
            return norm
        take_gradients(self.parameters, self.spread)
        accelerator.unscale_gradients(self.optimizer)
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        missing = sorted(self.parameters.keys() - gradients.keys())
        if not gradients:
            raise TrainingError(f"player '{self.player.name}': its loss does not depend on its trainable parameters")
        if missing and accelerator.num_processes > 1:
            names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise TrainingError(
                f"player '{self.player.name}': no gradient reached {names}, for which other processes would wait; "
                "freeze what the loss does not depend on, or multiply it by 0 instead of leaving it out"
            )
        norm = total_norm(list(gradients.values()))
        if not self.spread:
            return norm
        squares = accelerator.reduce(norm.square(), reduction="sum")
        return (squares / accelerator.state.sharding.replicas).sqrt()

    def begin(self, step: int) -> None:
        """Let the optimiser's next steps be of this step's learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["multiplier"] * self.rate(step)

    def update(self, step: int, norm: Tensor) -> None:
        """Clip, step the optimiser and forget the gradients, unless the backward pass did; move the average."""
        if self.in_backward is None:
            if self.settings.gradient_clip:
                clip_grads_with_norm_(self.parameters.values(), self.settings.gradient_clip, norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        acted = step - self.player.start
        decay = min(self.settings.ema, (1 + acted) / (10 + acted))  # early on, the average follows quickly
        for name, average in self.average.items():
            average.lerp_(self.parameters[name].detach().to(average.dtype), 1 - decay)

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        return self.lr * rate(self.settings, step, self.player.start)

    def rates(self, step: int) -> dict[str, float]:
        """The learning rate at a step, by the player's name, and the multiplied ones of some of its parameters."""
        multipliers = sorted({group["multiplier"] for group in self.optimizer.param_groups} - {1.0})
        named = {f"{self.player.name} x{each:g}": each * self.rate(step) for each in multipliers}
        return {self.player.name: self.rate(step), **named}

    def shown(self) -> dict[str, Tensor]:
        """What the bare module lacks when it is looked at: sharded weights, averages in place of trained ones."""
        return {name: own(weight) for name, weight in self.spread.items()} | self.average

    def release(self, accelerator: Any) -> None:
        """Give the player back its bare module, with whole weights, in full precision and eval mode, after the run."""
        parameters = dict(self.module.named_parameters())
        for name, weight in self.spread.items():
            parameters[name].data = whole(own(weight), weight, accelerator.device, everywhere=True)
        self.player.network = accelerator.unwrap_model(self.module, keep_fp32_wrapper=False).eval()
        if self.narrow is not None:  # in the memory of the CPU: a GPU may have no room for float32
            self.module.cpu()
            self.narrow.widen()
        if self.in_backward is not None:
            self.in_backward.end()


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Norm of tensors as one vector, at least in float32; PyTorch would give that of bfloat16 to 3 digits."""
    if all(gradient.dtype != torch.bfloat16 for gradient in gradients):
        return get_total_norm(gradients)
    return torch.stack([torch.linalg.vector_norm(each, dtype=torch.float32) for each in gradients]).norm()


@contextmanager
def turn(one: Trainee, trainees: Sequence[Trainee]) -> Iterator[None]:
    """One player's turn: the others' parameters take no gradient, though gradients flow through their networks."""
    others = [p for other in trainees if other is not one for p in other.parameters.values()]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


@contextmanager
def at_rest(trainees: Sequence[Trainee], exact: bool = False) -> Iterator[None]:
    """Bare networks in eval mode, with averaged weights if there are any, and no gradients; put back afterwards.

    Every process enters it; where weights are sharded, the main process alone then has them, whole. `exact` leaves the
    averages of bfloat16 weights in float32.
    """
    wrapped = [one.player.network for one in trainees]
    held: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for one in trainees:
            one.resting = True
            _show(one, held, exact)
            one.player.network = one.module.eval()
        with torch.no_grad():
            yield
    finally:
        for one, network in zip(trainees, wrapped, strict=True):
            one.player.network = network
            one.module.train()
        for parameter, data in held:
            parameter.data = data
        for one in trainees:
            one.resting = False


def _show(one: Trainee, held: list[tuple[nn.Parameter, Tensor]], exact: bool) -> None:
    """Give the bare module what it lacks when it is looked at; what that replaces goes to `held`."""
    parameters = dict(one.module.named_parameters())
    for name, tensor in one.shown().items():
        parameter = parameters[name]
        held.append((parameter, parameter.data))
        full = whole(tensor, one.spread.get(name), parameter.device)
        parameter.data = full if exact and one.narrow else full.to(parameter.dtype)


@contextmanager
def in_full_precision(trainees: Sequence[Trainee]) -> Iterator[None]:
    """The bare networks in float32: without the autocast that accelerate puts around their `forward`, or with float32
    weights in place of bfloat16 ones; put back afterwards.
    """
    wrapped = [one.module.__dict__.pop("forward", None) for one in trainees]
    try:
        with ExitStack() as stack:
            for one in trainees:
                if one.narrow is not None:
                    stack.enter_context(one.narrow.widened())
            yield
    finally:
        for one, forward in zip(trainees, wrapped, strict=True):
            if forward is not None:
                one.module.__dict__["forward"] = forward


def check_players(players: Sequence[Player], settings: Training) -> None:
    """Raise TrainingError unless the players can be told apart, train separate weights and fit the precision."""
    names = [player.name for player in players]
    if not names or len(set(names)) < len(names):
        raise TrainingError(f"players {names}: a task needs at least one player, each with its own name")
    for player in players:
        check_rates(player)
    if settings.precision == "fp16" and len(names) > 1:
        raise TrainingError("training.precision=fp16 cannot scale the losses of several players; use bf16 or no")
    if settings.step_in_backward and len(names) > 1:
        raise TrainingError(f"training.step_in_backward=true: players {names} step in turn; set it to false")
    if settings.channels_last and any(kind_of(player.network) for player in players):
        raise TrainingError("training.channels_last=true cannot reorder stored weights; set it or memory.base back")
    trained = [p for player in players for p in player.network.parameters() if p.requires_grad]
    if len({id(p) for p in trained}) < len(trained):
        raise TrainingError(f"players {names} train the same weights; freeze them in all but one")


def check_rates(player: Player) -> None:
    """Raise TrainingError for a rate of what is no parameter of the player's network, or one that nothing learns at."""
    unknown = sorted(player.rates.keys() - {name for name, _ in player.network.named_parameters()})
    if unknown:
        raise TrainingError(f"player '{player.name}' has a rate for {unknown[0]}, which is no parameter of its network")
    for name, multiplier in player.rates.items():
        if not (math.isfinite(multiplier) and multiplier > 0):
            raise TrainingError(
                f"player '{player.name}': {name} cannot learn at {multiplier} times the rate; freeze what is to stay"
            )


def check_shardable(players: Sequence[Player], settings: Training, sharding: Sharding | None) -> None:
    """Raise TrainingError if weights are to be sharded that cannot be."""
    if sharding is None:
        return
    remedy = "launch with --config_file recipes/accelerate/ddp.yaml for whole weights in every process"
    if settings.precision == "fp16":
        raise TrainingError(
            f"training.precision=fp16 cannot scale the losses of sharded weights; use bf16, or {remedy}"
        )
    if settings.compile:
        raise TrainingError(f"training.compile=true cannot compile layers whose weights are gathered; {remedy}")
    base = next((stored for player in players if (stored := kind_of(player.network))), None)
    if base:
        raise TrainingError(
            f"memory.base={base} keeps the weights that do not learn whole in every process, and sharding is to spread "
            f"them; set memory.base=as_loaded, or {remedy}"
        )
    if settings.channels_last:
        raise TrainingError(f"training.channels_last=true: weights in another order cannot be sharded; {remedy}")
    names = [player.name for player in players]
    if len(names) > 1:
        raise TrainingError(f"players {names} call each other's networks, which cannot be sharded; {remedy}")
    if len(units(players[0].network)) == 1:
        kind = type(players[0].network).__name__
        raise TrainingError(f"player '{names[0]}': {kind} names no layers (_no_split_modules) to shard by; {remedy}")
    types = sorted({str(p.dtype) for p in players[0].network.parameters() if p.requires_grad})
    if len(types) > 1:  # torch exchanges the gradients of a layer as one tensor
        raise TrainingError(f"player '{names[0]}' trains weights of several types: {', '.join(types)}; {remedy}")
