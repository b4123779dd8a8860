"""DynamiCrafter's training and sampling compared with recordings of the original's, and the tables that both use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from parity_cases import EXACT, LOSS, RECORDED, WEIGHTS, Case, difference, read_json
from parity_dynamicrafter_unet import SINGLE, load_unet, tokens_of
from safetensors.torch import load_file
from torch import Tensor, nn

from inflate.families import dynamicrafter_keys as keys
from inflate.families.dynamicrafter import Condition, ends, predictor, repeated
from inflate.models import exchange
from inflate.models.original_video_names import layout_of
from inflate.models.unet import VideoUNet
from inflate.objectives import DDPM, Predict, schedule_signal
from inflate.sampling.ddim import DDIM, Spacing, Table, table
from inflate.sampling.steps import guided

PREDICTION = 1e-5
GRADIENT = 1e-3  # of the norm of a tensor's gradient; float32 leaves 3e-7 where others cancel out
SMALL = 1e-3  # norms below this are taken for it
BETWEEN = "c_concat_interp"
"""The detail latents of two ends."""
GIVEN = ("z", "noise", "t", "text", "img_feat", "fs")
CONDITIONS = (
    "x_T", "text", "null_text", "image_features", "null_image_features", "image_tokens", "null_image_tokens", "fs",
    "c_concat", BETWEEN,
)  # fmt: skip
STEP = ("noise", "x_prev", "pred_x0", "out")
"""What a training step is given, what samples are made of, and what is recorded of each."""
SPACINGS: dict[str, Spacing] = {"uniform": "leading", "uniform_trailing": "trailing"}


def objective_of(described: dict[str, Any]) -> DDPM:
    """The objective that a recording was made with, which it tells in words."""
    words = described["schedule"].lower()
    predicted = [
        name for name, word in (("v_prediction", r"\bv-pred"), ("epsilon", r"\beps")) if re.search(word, words)
    ]
    if len(predicted) != 1 or re.search(r"turning_step=(?!400\b)", words):
        raise ValueError(f"a schedule that is not known: {described['schedule']}")
    zero = re.search(r"(?<!no )(?<!without )(zero[- ](terminal[- ])?|zt?)snr", words) is not None
    return DDPM(predicted[0], zero, described.get("base_scale") or 1.0)


def described_cases(folder: Path, stem: str) -> Iterator[Case]:
    """Which conditions the recorded draws leave out; what else is described must be recorded beside it."""
    described, name = read_json(folder / f"{stem}.json"), stem.removeprefix("train_sampler_")
    for part, recording in (("training", "train"), ("sampling", "sampler")):
        there = (folder / f"{recording}_{name}{RECORDED}").is_file()
        yield Case(f"{stem}.{part}", there != (part in described), EXACT)
    if "classifier_free_dropout" in described:
        yield from _dropout_cases(stem, described["classifier_free_dropout"])


def _dropout_cases(stem: str, recorded: dict[str, list[float]]) -> Iterator[Case]:
    draws, nothing = torch.tensor(recorded["random_num"]), torch.zeros(1, 1, 1)
    ones = torch.ones(len(draws), 1, 1)
    left = Condition(ones, ones, None, draws).drop(draws, nothing, nothing)
    assert left.image is not None
    for key, ours in (("text_dropped", 1 - left.text), ("image_kept", left.image)):
        yield Case(f"{stem}.{key}", difference(ours.flatten(), torch.tensor(recorded[key]).float()), EXACT)


# ---- training


def training_cases(folder: Path, stem: str) -> Iterator[Case]:
    """One loss and its gradients: what goes in, what comes out, and what each tensor gets."""
    name = stem.removeprefix("train_")
    described, recorded = read_json(folder / f"train_sampler_{name}.json"), _recorded(folder, stem)
    unet = _double(load_unet(folder, name)).requires_grad_(True)
    detail = repeated(recorded["z"][:, described["training"]["cond_frame"]], recorded["z"].shape[1])
    number = _number(folder, name, recorded, len(detail))
    condition = Condition(recorded["text"], recorded["img_feat"], detail, number)
    step = _step(unet, objective_of(described), condition, recorded)
    for key, (ours, tolerance) in step.items():
        if key in recorded:
            yield Case(f"{stem}.{key}", difference(ours.detach(), recorded[key]), tolerance)
    unknown = [key for key in recorded if key not in (*GIVEN, *step) and not key.startswith("grad")]
    yield Case(f"{stem}.unknown", len(unknown), EXACT)
    yield from _gradient_cases(stem, unet, described["training"]["grad_param_names"], recorded)


def _step(
    unet: VideoUNet, objective: DDPM, condition: Condition, recorded: dict[str, Tensor]
) -> dict[str, tuple[Tensor, float]]:
    """All that one training step computes, with tolerances; leaves the parameters' gradients behind."""
    clean, noise, timestep = (recorded[key] for key in ("z", "noise", "t"))
    assert condition.image is not None
    assert condition.detail is not None
    predict, predictions = _kept(predictor(unet, condition))
    losses = objective.loss(predict, clean, timestep, noise).mean(dim=1)
    losses.mean().backward()
    return {
        "c_concat": (condition.detail, EXACT),
        "context": (torch.cat([condition.text, tokens_of(unet, condition.image)], dim=1), PREDICTION),
        "x_scaled": (objective.rescale(timestep)[:, None, None, None, None] * clean, LOSS),
        "x_noisy": (objective.noisy(clean, timestep, noise), LOSS),
        "target": (objective.target(clean, timestep, noise), LOSS),
        "pred": (predictions[0], PREDICTION),
        "loss_per_sample": (losses, LOSS),
        "loss": (losses.mean(), LOSS),
    }


def _kept(predict: Predict) -> tuple[Predict, list[Tensor]]:
    """A prediction, and the list in which it leaves what it says."""
    found: list[Tensor] = []

    def keep(noisy: Tensor, timestep: Tensor) -> Tensor:
        found.append(predict(noisy, timestep))
        return found[-1]

    return keep, found


def _gradient_cases(stem: str, unet: VideoUNet, names: list[str], recorded: dict[str, Tensor]) -> Iterator[Case]:
    """Norms and means of all tensors' gradients, and some gradients as a whole, in units of the norms."""
    places = exchange.inverse(keys.unet_names(exchange.shapes(unet), layout_of(unet.config)))
    yield Case(f"{stem}.grad_param_names", len(set(names) ^ set(places)), EXACT)
    own = {name: unet.get_parameter(places[name]).grad for name in names}
    norms = recorded["grad_norm"].clamp(min=SMALL)
    spreads = norms / torch.tensor([float(each.numel()) ** 0.5 for each in own.values()])
    ours = torch.stack([each.norm() for each in own.values()])
    yield Case(f"{stem}.grad_norm", difference(ours / norms, recorded["grad_norm"] / norms), GRADIENT)
    ours = torch.stack([each.mean() for each in own.values()])
    yield Case(f"{stem}.grad_mean", difference(ours / spreads, recorded["grad_mean"] / spreads), GRADIENT)
    for key in sorted(key for key in recorded if key.startswith("grad.")):
        name = key.removeprefix("grad.").replace("diffusion_model.", keys.UNET, 1)
        apart = own[name].reshape(recorded[key].shape) - recorded[key]
        yield Case(f"{stem}.{key}", float(apart.norm() / norms[names.index(name)]), GRADIENT)


# ---- sampling


@torch.no_grad()
def sampling_cases(folder: Path, stem: str) -> Iterator[Case]:
    """The tokens, both kinds of detail latents, and each step of each case from the recorded latents before it."""
    name = stem.removeprefix("sampler_")
    described, recorded = read_json(folder / f"train_sampler_{name}.json"), _recorded(folder, stem)
    recorded["fs"] = _number(folder, name, recorded, len(recorded["x_T"]))
    unet, settings = _double(load_unet(folder, name)), described["sampling"]["cases"]
    yield from _condition_cases(stem, unet, recorded)
    own = {f"{case}.{key}" for case in settings for key in STEP}
    yield Case(
        f"{stem}.unknown", len(own.symmetric_difference(key for key in recorded if key not in CONDITIONS)), EXACT
    )
    for case, asked in settings.items():
        own = {key.removeprefix(f"{case}."): each for key, each in recorded.items() if key.startswith(f"{case}.")}
        predict = _guided(unet, case, asked, recorded)
        yield from step_cases(f"{stem}.{case}", asked, objective_of(described), predict, recorded["x_T"], own)


def _condition_cases(stem: str, unet: VideoUNet, recorded: dict[str, Tensor]) -> Iterator[Case]:
    for kind in ("image", "null_image"):
        ours = tokens_of(unet, recorded[f"{kind}_features"])
        yield Case(f"{stem}.{kind}_tokens", difference(ours, recorded[f"{kind}_tokens"]), PREDICTION)
    detail, frames = recorded["c_concat"], recorded["c_concat"].shape[1]
    yield Case(f"{stem}.c_concat", difference(repeated(detail[:, 0], frames), detail), EXACT)
    if BETWEEN in recorded:
        detail = recorded[BETWEEN]
        yield Case(f"{stem}.{BETWEEN}", difference(ends(detail[:, 0], detail[:, -1], frames), detail), EXACT)


def _guided(unet: VideoUNet, case: str, asked: dict[str, Any], recorded: dict[str, Tensor]) -> Predict:
    """The prediction of a case: of the whole condition, guided away from nothing by one scale or two, or by none."""
    detail = recorded[BETWEEN if "interp" in case else "c_concat"]
    full = Condition(recorded["text"], recorded["image_features"], detail, recorded["fs"])
    image = replace(full, text=recorded["null_text"])
    nothing = replace(image, image=recorded["null_image_features"])
    conditions, scales = [nothing, full], [asked["cfg"]]
    if "multiplecond" in asked["sampler"]:
        conditions, scales = [nothing, image, full], [asked.get("cfg_img") or asked["cfg"], asked["cfg"]]
    if asked["cfg"] == 1.0:
        conditions, scales = [full], []
    predict = predictor(unet, Condition.cat(conditions))
    return guided([predict], scales, asked["guidance_rescale"])


def step_cases(
    name: str, asked: dict[str, Any], objective: DDPM, predict: Predict, latents: Tensor, recorded: dict[str, Tensor]
) -> Iterator[Case]:
    """Each step from the recorded latents before it, the first from `latents`."""
    timesteps = torch.tensor(asked["timesteps_descending"])
    sampler = DDIM(objective, len(timesteps), asked["eta"], SPACINGS[asked["spacing"]])
    if asked["steps"] == len(timesteps):  # otherwise the original took more steps than it was asked for
        yield Case(f"{name}.timesteps", difference(sampler.timesteps(), timesteps), EXACT)
    for number, row in enumerate(zip(*table(objective, timesteps, asked["eta"]), strict=True)):
        step, before = Table(*row), latents
        timestep = step.timestep.expand(len(before))
        prediction = predict(before, timestep)
        clean = step.rescale * objective.separate(before, timestep, prediction)[0]
        after = sampler.step(step, before, prediction, iter(recorded["noise"][number:]))
        latents = recorded["x_prev"][number]
        yield Case(f"{name}.pred_x0.{number}", _spread_difference(clean, recorded["pred_x0"][number]), SINGLE)
        yield Case(f"{name}.x_prev.{number}", _spread_difference(after, latents), SINGLE)
    yield Case(f"{name}.out", _spread_difference(after, recorded["out"]), SINGLE)


def _spread_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference in units of the spread, where that is above 1.

    Guidance amplifies the rounding of the recorded passes as it does the spread.
    """
    return difference(ours, theirs) / max(1.0, float(theirs.std()))


# ---- tables


def table_cases(folder: Path, stem: str) -> Iterator[Case]:
    """Noise schedules, scales, and what DDIM does at the recorded timesteps; that every count of steps is finite."""
    described, recorded = read_json(folder / f"{stem}.json"), load_file(folder / f"{stem}{WEIGHTS}")
    for key, theirs in recorded.items():
        ours = _entry(key, recorded)
        if ours is not None:
            tolerance = EXACT if key.endswith("timesteps_ascending") else LOSS
            yield Case(f"{stem}.{key}", difference(ours, theirs), tolerance)
    for spacing, count in _matches(r"(uniform(?:_trailing)?)_(\d+)", described):
        ours = _sampler(spacing, int(count)).timesteps().flip(0)
        yield Case(f"{stem}.{spacing}_{count}", difference(ours, torch.tensor(described[f"{spacing}_{count}"])), EXACT)
    for count in described.get("step_counts_with_nan_direction_eta1", ()):
        rows = torch.stack([*_sampler("uniform_trailing", int(count)).table()])
        yield Case(f"{stem}.finite_{count}", int((~rows.isfinite()).sum()), EXACT)


def _matches(pattern: str, names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    return (match.groups() for name in names if (match := re.fullmatch(pattern, name)))


def _sampler(spacing: str, steps: int, base_scale: float = 1.0) -> DDIM:
    """The model of 256 pixels spaced its steps uniformly, those with a zero terminal SNR downwards from the last."""
    trailing = spacing == "uniform_trailing"
    objective = DDPM("v_prediction" if trailing else "epsilon", trailing, base_scale)
    return DDIM(objective, steps, spacing=SPACINGS[spacing])


def _entry(key: str, recorded: dict[str, Tensor]) -> Tensor | None:
    """Our table of a recorded name; none of timesteps that are not as many as asked, at which the others are taken."""
    for kind, what in _matches(r"(plain|zsnr)\.(betas|alphas_cumprod(?:_f64)?)", [key]):
        signal = schedule_signal(kind == "zsnr")
        before = torch.cat([signal.new_ones(1), signal[:-1]])
        return 1.0 - signal / before if what == "betas" else signal
    for (scale,) in _matches(r"scale_arr_([\d.]+)", [key]):
        return DDPM(base_scale=float(scale)).rescale(torch.arange(len(recorded[key])))
    for spacing, count, what in _matches(r"(uniform(?:_trailing)?)\.(\d+)\.(\w[\w.]*)", [key]):
        return _step_entry(spacing, int(count), what, recorded[f"{spacing}.{count}.timesteps_ascending"])
    raise ValueError(f"{key} is not known")


def _step_entry(spacing: str, count: int, what: str, timesteps: Tensor) -> Tensor | None:
    if what == "timesteps_ascending":
        return _sampler(spacing, count).timesteps().flip(0) if len(timesteps) == count else None
    for kind, number in _matches(r"(alphas|alphas_prev|sigmas_eta|ddim_scale_|ddim_scale_prev_)([\d.]*)", [what]):
        eta, scale = float(number or 0), float(number or 1) if "scale" in kind else 1.0
        objective = _sampler(spacing, count, scale).objective
        rows = table(objective, timesteps.flip(0), eta if kind == "sigmas_eta" else 0.0)
        own = objective.rescale(rows.timestep)
        found = {"alphas": rows.signal, "alphas_prev": rows.signal_after, "sigmas_eta": rows.sigma,
                 "ddim_scale_": own, "ddim_scale_prev_": own * rows.rescale}  # fmt: skip
        return found[kind].flip(0)
    raise ValueError(f"{what} of {spacing} steps is not known")


# ---- helpers


def _recorded(folder: Path, stem: str) -> dict[str, Tensor]:
    """What is recorded, in float64 where it is of real numbers; clips (..., C, F, h, w) as (..., F, C, h, w)."""
    found = {}
    for key, tensor in load_file(folder / f"{stem}{RECORDED}").items():
        precise = tensor.double() if tensor.is_floating_point() else tensor
        found[key] = precise.transpose(-4, -3) if tensor.ndim > 4 and not key.startswith("grad") else precise
    return found


def _number(folder: Path, name: str, recorded: dict[str, Tensor], batch: int) -> Tensor:
    """The frame rates (B,); one that is not recorded is the configuration's."""
    return recorded.get(
        "fs", torch.full((batch,), read_json(folder / f"unet_{name}.json")["unet_config"]["default_fs"])
    )


def _double(unet: VideoUNet) -> VideoUNet:
    nn.Module.to(unet, torch.float64)
    return unet
