"""AdamW in bfloat16 and 8 bits: equal to PyTorch's where it can be, right on average where it rounds."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inflate.training import adamw
from inflate.training.adamw import AdamW, rounded_
from inflate.training.settings import Training

BETAS = (0.9, 0.99)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """A matrix, a convolution, a vector and a mix."""
    generator, shapes = (
        torch.Generator().manual_seed(1),
        {"matrix": (80, 70), "conv": (6, 4, 3, 3), "bias": (9,), "mix": (1,)},
    )
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def groups(named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]


def ours(named: dict[str, nn.Parameter], lr: float = 1e-2, eight_bits: bool = False, seed: int = 0) -> AdamW:
    return AdamW(groups(named), named, lr, BETAS, eight_bits, seed)


def run(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        optimizer.step()


def test_what_is_small_is_decided_by_the_whole_of_a_share() -> None:
    whole, share = torch.zeros(16, 512), nn.Parameter(torch.zeros(5, 512))
    share.grad = torch.ones_like(share)
    for wholes, kept in (({"weight": whole}, "root"), (None, "exp_avg")):
        optimizer = AdamW([{"params": [share], "weight_decay": 0.0}], {"weight": share}, 1e-4, BETAS, True, 0, wholes)
        optimizer.step()
        assert kept in optimizer.state[share]


def test_in_float32_it_is_pytorchs_to_the_bit_and_so_is_its_state() -> None:
    named, theirs = parameters(), parameters()
    first, second = ours(named), torch.optim.AdamW(groups(theirs), lr=1e-2, betas=BETAS)
    run(first, named, 3)
    run(second, theirs, 3)
    assert all(torch.equal(named[name], theirs[name]) for name in named)
    states = [one.state_dict()["state"] for one in (first, second)]
    assert [state.keys() for state in states[0].values()] == [state.keys() for state in states[1].values()]
    first.load_state_dict(copy.deepcopy(second.state_dict()))  # either goes on from the other
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(first, named, 2, 3)
    run(second, theirs, 2, 3)
    assert all(torch.equal(named[name], theirs[name]) for name in named)


@pytest.mark.parametrize("eight", [False, True])
def test_pieces_are_the_whole(eight: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = parameters(), parameters()
    run(ours(whole, eight_bits=eight), whole, 3)
    monkeypatch.setattr(adamw, "PIECE", 200)
    run(ours(parts, eight_bits=eight), parts, 3)
    for name in whole:  # the last elements of a piece are computed without fused operations
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-6, atol=1e-6)


def test_strides_do_not_matter() -> None:
    named, last = parameters(), parameters()
    last["conv"].data = last["conv"].data.to(memory_format=torch.channels_last)
    run(ours(named), named, 2)
    run(ours(last), last, 2)
    assert torch.equal(named["conv"], last["conv"])


def test_rounding_takes_a_neighbour_and_is_right_on_average() -> None:
    values = torch.tensor([1.003, -1.003, 3e-5, 1.9999, 1.0, 0.0, -7.0])
    many = values.repeat(40_000, 1)
    rounded = rounded_(many.clone(), torch.Generator().manual_seed(2))
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert len(rounded[:, 0].unique()) == 2
    spacing = 2.0**-7 * values.abs()
    assert bool(((rounded - values).abs() <= spacing).all())
    assert bool(((rounded.double().mean(0) - values).abs() <= 0.012 * spacing + 1e-12).all())  # 4 deviations of 40,000
    assert torch.equal(rounded[:, 4:], many[:, 4:])


def test_updates_below_the_spacing_add_up_only_where_they_are_rounded_at_random(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def moved(steps: int = 40) -> float:
        named = {"w": nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))}
        optimizer = AdamW([{"params": [*named.values()], "weight_decay": 0.0}], named, 1e-4, BETAS, False, 0)
        for _ in range(steps):
            named["w"].grad = torch.ones_like(named["w"])
            optimizer.step()
        return float((1 - named["w"].detach().double()).mean())

    assert moved() == pytest.approx(40 * 1e-4, rel=0.05)
    monkeypatch.setattr(adamw, "rounded_", lambda wide, generator: wide)
    assert moved() == 0.0


def test_what_is_small_has_a_float32_copy() -> None:
    named, wide = parameters(torch.bfloat16), parameters()
    for name, parameter in wide.items():
        parameter.data.copy_(named[name].data)
    optimizer, reference = ours(named, lr=1e-4), ours(wide, lr=1e-4)
    for step in range(20):
        for name, parameter in named.items():
            parameter.grad = torch.full_like(parameter, 1.0 + step)
            wide[name].grad = parameter.grad.float()
        optimizer.step()
        reference.step()
    for name in ("conv", "bias", "mix"):
        assert torch.equal(optimizer.state[named[name]]["copy"], wide[name])
        assert torch.equal(named[name], wide[name].bfloat16())
    assert "copy" not in optimizer.state[named["matrix"]]


@pytest.mark.parametrize("eight", [False, True])
def test_rounding_depends_on_seed_name_and_step_and_leaves_other_numbers_alone(eight: bool) -> None:
    results = []
    for seed, drawn in ((0, 0), (0, 3), (1, 0)):
        torch.manual_seed(drawn)
        before = torch.get_rng_state()
        named = parameters(torch.bfloat16)
        run(ours(named, eight_bits=eight, seed=seed), named, 3)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(named["matrix"].detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_from_a_saved_state_to_the_bit(dtype: torch.dtype, tmp_path: Any) -> None:
    whole, parts = parameters(dtype), parameters(dtype)
    run(ours(whole, eight_bits=True), whole, 6)
    first = ours(parts, eight_bits=True)
    run(first, parts, 3)
    torch.save(first.state_dict()["state"], tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = ours(parts, eight_bits=True)
    second.load_state_dict({"state": state, "param_groups": second.state_dict()["param_groups"]})
    run(second, parts, 3, 3)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_eight_bits_take_a_quarter_and_learn_the_same() -> None:
    def learnt(eight: bool) -> tuple[Tensor, AdamW]:
        torch.manual_seed(0)
        named = {"w": nn.Parameter(torch.zeros(64, 300))}
        optimizer = ours(named, lr=3e-2, eight_bits=eight)
        truth, inputs = torch.randn(64, 300) * torch.logspace(-2, 0, 300), torch.randn(900, 300)
        for step in range(200):
            x = inputs[step % 3 * 300 :][:300]
            ((x @ (named["w"] - truth).T).square().mean() + named["w"].abs().mean() * 1e-3).backward()
            optimizer.step()
            optimizer.zero_grad()
        return (named["w"].detach() - truth).square().mean(), optimizer

    (full, _), (coded, optimizer) = learnt(False), learnt(True)
    assert max(float(coded), float(full)) < 0.005 * float(torch.logspace(-2, 0, 300).square().mean())
    assert float(coded) == pytest.approx(float(full), rel=0.3)
    (state,) = optimizer.state.values()
    kept = {name: tensor for name, tensor in state.items() if name != "step"}
    assert {name: tensor.dtype for name, tensor in kept.items()} == {
        "average": torch.uint8, "root": torch.uint8, "average_scales": torch.float32, "root_scales": torch.float32,
    }  # fmt: skip
    assert sum(tensor.nbytes for tensor in kept.values()) == 2 * (64 * 300 + 64 * 2 * 4)


def test_one_parameter_can_be_stepped_alone() -> None:
    named, together = parameters(), parameters()
    alone = ours(named)
    run(ours(together), together, 1)
    generator = torch.Generator().manual_seed(0)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    alone.step_alone(named["bias"])
    assert torch.equal(named["bias"], together["bias"])
    assert torch.equal(named["matrix"], parameters()["matrix"])


def test_the_defaults_are_pytorchs() -> None:
    assert torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).defaults["eps"] == ours(parameters()).defaults["eps"]
    assert Training().optimizer == "adamw"
