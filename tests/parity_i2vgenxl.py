"""I2VGen-XL compared with recordings of VGen: its noise schedules, its models, and what its samplers make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from parity_cases import EXACT, LOSS, RECORDED, SAMPLE, WEIGHTS, Case, Tensors, difference, read_json, relative
from parity_i2vgenxl_unets import called, load_unet, unet_cases
from safetensors.torch import load_file
from torch import Tensor, nn

from inflate.layers.freeu import PUBLISHED
from inflate.models.unet import VideoUNet
from inflate.objectives import DDPM, Predict
from inflate.sampling.ddim import DDIM, Inversion
from inflate.sampling.dpm_solver import DPMSolver
from inflate.sampling.steps import guided

PRECISE = 1e-12
STOCHASTIC = 5e-4  # guidance by 9 in float32, over steps with fresh noise
BASE, REFINEMENT = DDPM("v_prediction", True, schedule="cosine"), DDPM("v_prediction", schedule="shifted_cosine")
CONDITION = ("y", "image", "local_image", "fps")
"""What a network is told, by its names in the recordings."""

Told = Callable[[Tensors, bool], Predict]
"""A network, on clips (B, F, C, h, w), that is told a condition; with FreeU or without."""


# ---- tables


def schedule_cases(folder: Path, stem: str) -> Iterator[Case]:
    """The recorded noise schedules, in the precision that they are recorded in; KeyError for one of no known name."""
    ours = {
        "linear_sd.alphas_cumprod": DDPM().signal,
        "cosine_ztsnr.alphas_cumprod": BASE.signal,
        "cosine.sigmas": (1.0 - Inversion().objective.signal).sqrt(),
        "logsnr_cosine_interp_2_4.sigmas": (1.0 - REFINEMENT.signal).sqrt(),
    }
    for key, theirs in load_file(folder / f"{stem}{WEIGHTS}").items():
        tolerance = PRECISE if theirs.dtype == torch.float64 else LOSS
        yield Case(f"{stem}.{key}", difference(ours[key], theirs), tolerance)


# ---- traces


def model_cases(folder: Path, stem: str) -> Iterator[Case]:
    """The UNet by itself, and what samplers make of it in float64."""
    yield from unet_cases(folder, stem)
    unet = load_unet(folder, stem)
    nn.Module.to(unet, torch.float64)
    yield from sampling_cases(folder, stem, _network(unet))


def _network(unet: VideoUNet) -> Told:
    def told(condition: Tensors, freed: bool) -> Predict:
        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            unet.set_freeu(PUBLISHED if freed else ())
            return called(unet, noisy.transpose(1, 2), {**condition, "t": timestep}).transpose(1, 2)

        return predict

    return told


@torch.no_grad()
def sampling_cases(folder: Path, stem: str, told: Told) -> Iterator[Case]:
    """All recorded traces of a model, by a network in float64."""
    described, recorded = read_json(folder / f"{stem}.json")["cases"], _recorded(folder, stem)
    for case in ("sample", "sdedit"):
        given = {key.removeprefix(f"{case}."): each for key, each in recorded.items() if key.startswith(f"{case}.")}
        runner = _kind_of(given)
        if runner is not None:
            yield from runner(f"{stem}.{case}", described[case], given, told)


Traced = Callable[[str, dict[str, Any], Tensors, Told], Iterator[Case]]


def _kind_of(given: Tensors) -> Traced | None:
    """What compares a trace; None where nothing is recorded."""
    if not given:
        return None
    return sdedit_cases if "eps" in given else refinement_cases if "inverted" in given else sample_cases


def sample_cases(name: str, asked: dict[str, Any], recorded: Tensors, told: Told) -> Iterator[Case]:
    """DDIM of the base model: each step from the recorded latents before it, and all of them from the noise."""
    sampler = DDIM(BASE, asked["ddim_timesteps"], asked["eta"], "leading")
    yield Case(f"{name}.timesteps", difference(sampler.timesteps(), torch.tensor(asked["timesteps"])), EXACT)
    full = {key: recorded[key] for key in CONDITION}
    nothing = {**full, "y": recorded["neg_y"], "image": torch.zeros_like(full["image"])}
    predict = guided([told(nothing, False), told(full, False)], [asked["guide_scale"]])
    before = recorded["noise"]
    for number, (row, theirs) in enumerate(zip(sampler.rows(), recorded["traj"], strict=True)):
        ours = sampler.step(row, before, predict(before, row.timestep[None]), iter(()))
        yield Case(f"{name}.{number}", difference(ours, theirs), SAMPLE)
        before = theirs
    yield Case(f"{name}.final", difference(sampler.draw(predict, recorded["noise"], iter(())), before), SAMPLE)


def refinement_cases(name: str, asked: dict[str, Any], recorded: Tensors, told: Told) -> Iterator[Case]:
    """The refinement of VGen: inversion by the negative prompt, then DPM-Solver++ from there."""
    yield from inversion_cases(f"{name}.inversion", asked, recorded, told({"y": recorded["neg_y"]}, True))
    solver = DPMSolver(REFINEMENT, asked["reverse_steps"], asked["steps"])
    steps = torch.tensor(asked["model_t_per_step"])
    yield Case(f"{name}.timesteps", difference(solver.table().timestep, steps), EXACT)
    yield Case(f"{name}.k_sigmas", relative(solver.sigmas(), recorded["k_sigmas"]), LOSS)
    predict = _guided(asked, recorded, told, freed=True)
    yield from solver_cases(name, solver, predict, recorded["inverted"], recorded)


def inversion_cases(name: str, asked: dict[str, Any], recorded: Tensors, predict: Predict) -> Iterator[Case]:
    """Each step from the recorded latents before it, and all of them from the clean ones."""
    sampler = Inversion(levels=asked["reverse_steps"], steps=asked["ddim_timesteps"])
    yield Case(f"{name}.timesteps", difference(sampler.timesteps(), torch.tensor(asked["inversion_t"])), EXACT)
    before = recorded["latent"]
    for number, (row, theirs) in enumerate(zip(sampler.rows(), recorded["inversion_traj"], strict=True)):
        ours = sampler.step(row, before, predict(before, row.timestep[None]))
        yield Case(f"{name}.{number}", difference(ours, theirs), SAMPLE)
        before = theirs
    yield Case(f"{name}.final", difference(sampler.draw(predict, recorded["latent"]), recorded["inverted"]), SAMPLE)


def sdedit_cases(name: str, asked: dict[str, Any], recorded: Tensors, told: Told) -> Iterator[Case]:
    """The refinement of the first release: noise is added, then DPM-Solver++, also without fresh noise."""
    solver = DPMSolver(REFINEMENT, asked["T_r"], asked["steps"])
    yield Case(
        f"{name}.noised", difference(solver.noised(recorded["latent"], recorded["eps"]), recorded["noised"]), LOSS
    )
    predict = _guided(asked, recorded, told, freed=False)
    yield from solver_cases(name, solver, predict, recorded["noised"], recorded)
    ours = DPMSolver(REFINEMENT, asked["T_r"], asked["steps"], eta=0.0).draw(predict, recorded["noised"], iter(()))
    yield Case(f"{name}.final_eta0", difference(ours, recorded["final_eta0"]), STOCHASTIC)


def solver_cases(name: str, solver: DPMSolver, predict: Predict, start: Tensor, recorded: Tensors) -> Iterator[Case]:
    """What the network says at each step, of latents made of what is recorded of the steps before, and the end."""
    latents, previous, noise = solver.begin(start), torch.zeros_like(start), iter(recorded["sde_noise"])
    for number, (row, theirs) in enumerate(zip(solver.rows(), recorded["x0_traj"], strict=True)):
        yield Case(f"{name}.clean.{number}", difference(solver.clean(predict, row, latents), theirs), STOCHASTIC)
        latents, previous = solver.step(row, latents, theirs, previous, noise), theirs
    drawn = solver.draw(predict, start, iter(recorded["sde_noise"]))
    yield Case(f"{name}.final", difference(drawn, recorded["final"]), STOCHASTIC)


def _guided(asked: dict[str, Any], recorded: Tensors, told: Told, freed: bool) -> Predict:
    passes = [told({"y": recorded[key]}, freed) for key in ("neg_y", "y")]
    return guided(passes, [asked["guide_scale"]], asked["guide_rescale"])


def _recorded(folder: Path, stem: str) -> dict[str, Tensor]:
    """What is recorded, in float64 where it is of real numbers; clips (..., C, F, h, w) as (..., F, C, h, w)."""
    found = {}
    for key, tensor in load_file(folder / f"{stem}{RECORDED}").items():
        cast = tensor.double() if tensor.is_floating_point() else tensor
        found[key] = cast.transpose(-4, -3) if tensor.ndim > 4 and ".grad." not in key else cast
    return found
