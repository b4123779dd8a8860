"""Stable Video Diffusion compared with recordings of sgm: UNet, decoder, objective, sampler, losses, key maps."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from parity_cases import (
    DOUBLE,
    EXACT,
    LOSS,
    RECORDED,
    RECORDED64,
    SINGLE,
    WEIGHTS,
    Case,
    compare_settings,
    difference,
    disagreements,
    read_json,
    relative,
    same_calls,
    stand_in,
    weights_of,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from inflate.families import svd_files, svd_keys
from inflate.families.svd import Condition, euler_scheduler, predictor
from inflate.models import exchange, original_names
from inflate.models.discriminator import ImageDiscriminator, VideoDiscriminator, load_published
from inflate.models.unet import TemporalSpec, VideoUNet
from inflate.models.vae import VideoVAE
from inflate.objectives import EDM, hinge_discriminator_loss, hinge_generator_loss, vanilla_discriminator_loss
from inflate.sampling.steps import guided
from inflate.sampling.svd import euler

TABLE = 3e-6  # relative; the recorded noise levels were raised to the 7th power in float32, ours in float64


# ---- the UNet


def load_unet(folder: Path, stem: str) -> VideoUNet:
    """Our UNet with the recorded weights; the number of heads is the configuration's, all else the tensors'."""
    config = read_json(folder / f"{stem}.json")["config"]
    tensors = weights_of(folder / f"{stem}{WEIGHTS}")
    width, heads = config.get("num_head_channels", -1), config.get("num_heads", -1)
    image = original_names.unet_config(tensors, width if width > 0 else 1)
    if width <= 0:
        image["attention_head_dim"] = heads
    unet = svd_files.sgm_unet(tensors, image, stem)
    _compare_config(unet, config)
    return unet.requires_grad_(False)


_AS_RELEASED = {
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "video_kernel_size": [3, 1, 1],
}


def _compare_config(unet: VideoUNet, config: dict[str, Any]) -> None:
    """What was read off the tensors must be what the configuration says."""
    depth = config["transformer_depth"]
    levels = len(config["channel_mult"])
    attention = [2**level in config["attention_resolutions"] for level in range(levels)]
    depths = [depth] * levels if isinstance(depth, int) else list(depth)
    expected = {
        "block_out_channels": [config["model_channels"] * factor for factor in config["channel_mult"]],
        "layers_per_block": config["num_res_blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "cross_attention_dim": config["context_dim"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
    }
    compare_settings({name: unet.config[name] for name in expected}, expected)
    fixed = {name: value for name, value in _AS_RELEASED.items() if config.get(name, value) != value}
    if fixed:
        raise ValueError(f"no published model differs in {', '.join(fixed)}")
    if any(has and unet.config.transformer_layers_per_block[i] != depths[i] for i, has in enumerate(attention)):
        raise ValueError("transformer_depth differs between tensors and configuration")


def unet_cases(folder: Path, stem: str) -> Iterator[Case]:
    """Every recorded call, in float32 and, where recorded so, in float64."""
    calls = [call["name"] for call in read_json(folder / f"{stem}.json")["calls"]]
    recorded = load_file(folder / f"{stem}{RECORDED}")
    unet = load_unet(folder, stem)
    for suffix, outputs, tolerance in _precisions(folder, stem, recorded):
        nn.Module.to(unet, next(iter(outputs.values())).dtype)
        same_calls(outputs, calls)
        for call in calls:
            output = _call_unet(unet, recorded, call)
            yield Case(f"{stem}{suffix}.{call}", difference(output, outputs[f"{call}.out"]), tolerance)


@torch.no_grad()
def _call_unet(unet: VideoUNet, recorded: dict[str, Tensor], call: str) -> Tensor:
    sample, noise, context, ids, image_only = (
        recorded[f"{call}.{name}"] for name in ("x", "c_noise", "context", "added_time_ids", "image_only_indicator")
    )
    inputs = (tensor.to(unet.dtype) for tensor in (sample, noise, context))
    return unet(*inputs, added_time_ids=ids.to(unet.dtype), image_only=image_only.bool()).sample


# ---- the decoder


def load_decoder(folder: Path, stem: str) -> VideoVAE:
    """Our VAE with the recorded decoder; its encoder, which is not recorded, has random weights."""
    config = read_json(folder / f"{stem}.json")["config"]
    if config["attn_resolutions"]:
        raise ValueError("attention beside the middle block is in no published decoder")
    widths = tuple(config["ch"] * factor for factor in config["ch_mult"])
    image = {
        "in_channels": config["in_channels"],
        "out_channels": config["out_ch"],
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": config["num_res_blocks"],
        "latent_channels": config["z_channels"],
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    vae = svd_files.build_vae(image)
    wanted = exchange.shapes(vae.decoder)
    names = svd_keys.vae_to_sgm([f"decoder.{key}" for key in wanted], len(widths))
    back = {theirs.removeprefix("decoder."): ours.removeprefix("decoder.") for ours, theirs in names.items()}
    tensors = weights_of(folder / f"{stem}{WEIGHTS}")
    exchange.adopt(vae.decoder, exchange.convert(tensors, back, wanted, stem))
    return vae.requires_grad_(False)


def decoder_cases(folder: Path, stem: str) -> Iterator[Case]:
    """Every recorded call with and without temporal layers, in float32 and, where recorded so, in float64."""
    calls = [call["name"] for call in read_json(folder / f"{stem}.json")["calls"]]
    recorded = load_file(folder / f"{stem}{RECORDED}")
    decoder = load_decoder(folder, stem)
    for suffix, outputs, tolerance in _precisions(folder, stem, recorded):
        dtype = next(iter(outputs.values())).dtype
        decoder.decoder.to(dtype)
        same_calls(outputs, calls)
        for call in calls:
            for kind, image_only in (("out", False), ("out_skip_video", True)):
                with torch.no_grad():
                    output = decoder.decode(recorded[f"{call}.z"].to(dtype), image_only=image_only).sample
                recorded_output = outputs[f"{call}.{kind}"]
                yield Case(f"{stem}{suffix}.{call}.{kind}", difference(output, recorded_output), tolerance)


# ---- the objective and the sampler


def edm_cases(folder: Path, stem: str) -> Iterator[Case]:
    """Preconditioning, loss, denoiser, noise levels and a guided sample with a recorded UNet."""
    weights = read_json(folder / f"{stem}.json")["weights"].split()[0].removesuffix(WEIGHTS)
    recorded = load_file(folder / f"{stem}{RECORDED}")
    unet, objective = load_unet(folder, weights), EDM()
    sigma, scalings = recorded["sigma"], objective.scalings(recorded["sigma"])
    for name, value in zip(scalings._fields, scalings, strict=True):
        yield Case(f"{stem}.{name}", difference(value, recorded[name]), LOSS)
    weight = 1.0 / scalings.c_out**2
    yield Case(f"{stem}.weight", relative(weight, recorded["weight"]), LOSS)
    target = objective.target(recorded["latents"], sigma, recorded["noise"])
    yield Case(f"{stem}.v_target", difference(target, recorded["v_target"]), SINGLE)
    yield from _edm_network_cases(stem, objective, unet, recorded)
    for steps in sorted(_table_lengths(recorded)):
        table = _sigmas(objective, steps)
        yield Case(f"{stem}.sigmas_edm_{steps}", relative(table, recorded[f"sigmas_edm_{steps}"]), TABLE)
    yield from _edm_sample_cases(stem, objective, unet, recorded)


@torch.no_grad()
def _edm_network_cases(stem: str, objective: EDM, unet: VideoUNet, recorded: dict[str, Tensor]) -> Iterator[Case]:
    predict = _predictor(unet, recorded, "", repeats=1)
    clean, noise, sigma = recorded["latents"], recorded["noise"], recorded["sigma"]
    noisy = clean + sigma[:, None, None, None, None] * noise
    yield Case(f"{stem}.noised", relative(noisy, recorded["noised"]), LOSS)
    scalings = objective.scalings(sigma)
    output = predict(scalings.c_in[:, None, None, None, None] * noisy, scalings.c_noise)
    yield Case(f"{stem}.unet_output_F", difference(output, recorded["unet_output_F"]), SINGLE)
    denoised = objective.denoise(predict, recorded["noised"], sigma)
    yield Case(f"{stem}.denoised", difference(denoised, recorded["denoised"]), SINGLE)
    loss = objective.loss(predict, clean, sigma, noise)
    yield Case(f"{stem}.loss_per_video", difference(loss, recorded["loss_per_video"]), LOSS)
    yield Case(f"{stem}.v_mse_per_video", difference(loss, recorded["v_mse_per_video"]), LOSS)


@torch.no_grad()
def _edm_sample_cases(stem: str, objective: EDM, unet: VideoUNet, recorded: dict[str, Tensor]) -> Iterator[Case]:
    sigmas, scales = recorded["sample_sigmas"], recorded["sample_guidance"]
    low, high = (float(f"{float(sigma):.4g}") for sigma in (sigmas[-2], sigmas[0]))  # as written, before float32
    scheduler = euler_scheduler(objective, low, high)
    scheduler.set_timesteps(len(sigmas) - 1)
    yield Case(f"{stem}.sample_sigmas", relative(scheduler.sigmas, sigmas), TABLE)
    noise = recorded["sample_noise"].reshape(-1, *recorded["sample_noise"].shape[-4:])  # (B, F, C, h, w)
    guidance = torch.linspace(float(scales[0]), float(scales[-1]), noise.shape[1])
    yield Case(f"{stem}.sample_guidance", difference(guidance, scales), LOSS)
    predict = guided([_predictor(unet, recorded, "sample_", repeats=2)], [guidance[:, None, None, None]])
    latents = euler(predict, noise, scheduler).reshape(recorded["sample_out"].shape)
    yield Case(f"{stem}.sample_out", difference(latents, recorded["sample_out"]), SINGLE)


def _predictor(unet: VideoUNet, recorded: dict[str, Tensor], prefix: str, repeats: int) -> Callable[..., Tensor]:
    """Our network on a recorded condition, with `repeats` 2 behind its null.

    The added ids are recorded as their sinusoids y only, which replace those of the ids.
    """
    context, latent = recorded[f"{prefix}context"], recorded[f"{prefix}cond_latents_unscaled"]
    y = torch.cat([recorded[f"{prefix}y"]] * repeats)
    condition = Condition(context, latent, torch.zeros(len(context), unet.spec.added_ids))
    if repeats == 2:
        condition = Condition.cat([condition.null(), condition])
    network = predictor(unet, condition)

    def predict(scaled: Tensor, c_noise: Tensor) -> Tensor:
        def replace(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
            return (y.repeat_interleave(len(inputs[0]) // len(y), 0),)

        handle = unet.class_embedding.register_forward_pre_hook(replace)
        try:
            return network(scaled, c_noise)
        finally:
            handle.remove()

    return predict


def _sigmas(objective: EDM, steps: int) -> Tensor:
    scheduler = euler_scheduler(objective)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def _table_lengths(recorded: dict[str, Tensor]) -> list[int]:
    return [int(key.removeprefix("sigmas_edm_")) for key in recorded if key.startswith("sigmas_edm_")]


# ---- adversarial losses


def discriminator_cases(folder: Path, stem: str) -> Iterator[Case]:
    """The losses of recorded logits; and the logits themselves, of the two architectures that ours can be."""
    recorded = load_file(folder / f"{stem}{RECORDED}")
    for variant, settings in read_json(folder / f"{stem}.json")["variants"].items():
        own = {
            key.removeprefix(f"{variant}."): value for key, value in recorded.items() if key.startswith(f"{variant}.")
        }
        real, fake = own["logits_real_eval"], own["logits_fake_eval"]
        losses = {
            "hinge_d": hinge_discriminator_loss(real, fake),
            "vanilla_d": vanilla_discriminator_loss(real, fake),
            "g_loss": hinge_generator_loss(fake),
        }
        for name, loss in losses.items():
            yield Case(f"{stem}.{variant}.{name}", difference(loss, own[name]), LOSS)
        yield from _logit_cases(f"{stem}.{variant}", own, settings)


def _logit_cases(name: str, recorded: dict[str, Tensor], settings: dict[str, Any]) -> Iterator[Case]:
    tensors = {key.removeprefix("sd."): value for key, value in recorded.items() if key.startswith("sd.")}
    kernels = {value.shape[2:] for value in tensors.values() if value.ndim > 1}
    sizes = (settings["ndf"], settings["n_layers"], "batch")
    if kernels == {(4, 4)}:
        network, clip, logits = ImageDiscriminator(*sizes), (lambda x: x[:, None]), (lambda x: x)
    elif kernels == {(3, 3, 3)}:
        network, clip, logits = VideoDiscriminator(*sizes, 4), (lambda x: x.transpose(1, 2)), (lambda x: x[:, 0])
    else:
        return  # 4x4x4 convolutions: an architecture that is not ours
    load_published(network, tensors)
    for kind in ("real", "fake"):
        with torch.no_grad():
            output = network.eval()(clip(recorded[kind]))
        yield Case(f"{name}.logits_{kind}_eval", difference(output, logits(recorded[f"logits_{kind}_eval"])), SINGLE)


# ---- key maps, on models of the real size without memory


def sgm_key_cases(folder: Path, stem: str) -> Iterator[Case]:
    """Our real-size models named as sgm's have exactly sgm's keys and shapes."""
    listed = read_json(folder / f"{stem}.json")
    unet, vae = _real_models(listed)
    layout = original_names.UNetLayout.of(unet.config)
    ours = {
        "unet": _named(unet, svd_keys.unet_to_sgm(exchange.shapes(unet), layout)),
        **_sides(_named(vae, svd_keys.vae_to_sgm(exchange.shapes(vae), len(vae.config.block_out_channels)))),
    }
    yield from _list_cases(stem, ours, listed)


def diffusers_key_cases(folder: Path, stem: str) -> Iterator[Case]:
    """Our real-size models named as diffusers' have exactly its keys and shapes."""
    listed = read_json(folder / f"{stem}.json")
    config, spec = svd_files.image_unet_config(listed["unet_config"])
    unet = exchange.build_unet(config, spec)
    vae = svd_files.build_vae(svd_files.image_vae_config(listed["vae_config"]))
    ours = {
        "unet": _named(unet, svd_keys.unet_to_diffusers(exchange.shapes(unet))),
        "vae": _named(vae, svd_keys.vae_to_diffusers(exchange.shapes(vae))),
    }
    yield from _list_cases(stem, ours, listed)


def key_map_cases(folder: Path, stem: str) -> Iterator[Case]:
    """The map that a distinct constant in every real-size tensor takes from sgm's names over ours to diffusers'."""
    expected = read_json(folder / f"{stem}.json")
    listed = read_json(folder / "state_keys_svd_sgm.json")
    theirs = read_json(folder / "state_keys_svd_diffusers.json")
    sgm_vae = {f"{side}.{key}": shape for side in ("decoder", "encoder") for key, shape in listed[side].items()}
    unet, vae = _real_models(listed)
    layout, levels = original_names.UNetLayout.of(unet.config), len(vae.config.block_out_channels)
    traced = _trace(
        listed["unet"],
        exchange.inverse(svd_keys.unet_to_sgm(exchange.shapes(unet), layout)),
        exchange.shapes(unet),
        svd_keys.unet_to_diffusers(exchange.shapes(unet)),
        theirs["unet"],
    )
    yield Case(f"{stem}.unet", disagreements(traced, expected["unet"]), EXACT)
    without_quant = {key: shape for key, shape in theirs["vae"].items() if not key.startswith("quant_conv.")}
    traced = _trace(
        sgm_vae,
        exchange.inverse(svd_keys.vae_to_sgm(exchange.shapes(vae), levels)),
        exchange.shapes(vae),
        svd_keys.vae_to_diffusers(exchange.shapes(vae)),
        without_quant,
    )
    decoder = {key.removeprefix("decoder."): value for key, value in traced.items() if key.startswith("decoder.")}
    stripped = {key: value.removeprefix("decoder.") for key, value in decoder.items()}
    recorded = {key.removeprefix("decoder."): v.removeprefix("decoder.") for key, v in expected["vae_decoder"].items()}
    yield Case(f"{stem}.vae_decoder", disagreements(stripped, recorded), EXACT)
    linear = {key for key, shape in listed["decoder"].items() if len(shape) != len(theirs["vae"][decoder[key]])}
    yield Case(f"{stem}.conv1x1_to_linear", len(linear ^ set(expected["conv1x1_to_linear"])), EXACT)


def _real_models(listed: dict[str, Any]) -> tuple[VideoUNet, VideoVAE]:
    stand_ins = {key: stand_in(shape) for key, shape in listed["unet"].items()}
    config = original_names.unet_config(stand_ins, listed["unet_config"]["num_head_channels"])
    unet = exchange.build_unet(config, TemporalSpec(added_id_dim=svd_keys.sgm_added_ids(stand_ins) // 3))
    sides = {f"{side}.{key}": stand_in(listed[side][key]) for side in ("encoder", "decoder") for key in listed[side]}
    return unet, svd_files.build_vae(original_names.vae_config(sides))


def _trace(
    source: dict[str, list[int]],
    to_ours: dict[str, str],
    our_shapes: dict[str, torch.Size],
    to_theirs: dict[str, str],
    their_shapes: dict[str, list[int]],
) -> dict[str, str]:
    names = list(source)
    constants = {key: stand_in(source[key], number) for number, key in enumerate(names)}
    ours = exchange.convert(constants, to_ours, our_shapes, "sgm")
    targets = {key: torch.Size(shape) for key, shape in their_shapes.items()}
    theirs = exchange.convert(ours, to_theirs, targets, "ours")
    return {names[int(tensor.flatten()[0])]: key for key, tensor in theirs.items()}


def _named(model: nn.Module, names: dict[str, str]) -> dict[str, list[int]]:
    return {names[key]: list(shape) for key, shape in exchange.shapes(model).items()}


def _sides(shapes: dict[str, list[int]]) -> dict[str, dict[str, list[int]]]:
    sides: dict[str, dict[str, list[int]]] = {"encoder": {}, "decoder": {}}
    for key, shape in shapes.items():
        side, rest = key.split(".", 1)
        sides[side][rest] = shape
    return sides


def _list_cases(stem: str, ours: dict[str, Any], listed: dict[str, Any]) -> Iterator[Case]:
    for part, shapes in ours.items():
        yield Case(f"{stem}.{part}", _fitted_disagreements(shapes, listed[part]), EXACT)
    parts = set(listed) - set(ours) - {"source", "diffusers", "prefix_in_checkpoint", "params"}
    unread = [part for part in parts if not part.endswith("_config")]
    if unread:
        yield Case(f"{stem}: unknown part {', '.join(unread)}", math.inf, EXACT)


# ---- helpers


def _fitted_disagreements(ours: dict[str, list[int]], theirs: dict[str, list[int]]) -> int:
    """Keys in only one of two lists, and shapes that differ beyond a 1x1 convolution held as a linear layer."""
    squeezed = [{k: [*s[:2]] if s[2:] == [1, 1] else s for k, s in shapes.items()} for shapes in (ours, theirs)]
    return disagreements(*squeezed)


def _precisions(folder: Path, stem: str, recorded: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor], float]]:
    yield "", {key: tensor for key, tensor in recorded.items() if _is_output(key)}, SINGLE
    if (folder / f"{stem}{RECORDED64}").is_file():
        yield "_io64", load_file(folder / f"{stem}{RECORDED64}"), DOUBLE


def _is_output(key: str) -> bool:
    return key.rsplit(".", 1)[-1] in ("out", "out_skip_video")
