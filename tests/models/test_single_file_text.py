"""Text encoders in a single file: against diffusers' own reading of the names, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint
from original_files import FIRST, LAST, OPEN, write_whole_file
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import randomise
from inflate.errors import CheckpointError
from inflate.families.video_ldm import Encoders, VideoLDM
from inflate.models import single_file_text
from inflate.models.folders import SHIPPED
from inflate.models.single_file_text import load_text_encoders
from inflate.models.text_encoders import TextEncoders, load_tokenizer

PROMPTS = ["a red disc over blue", "a box"]
TOKENIZER = SHIPPED["pocket"]
GENERATIONS = ("Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL")


def write(folder: Path, generation: str) -> tuple[Path, Any, tuple[Any, ...]]:
    file = folder / "model.safetensors"
    return file, *write_whole_file(file, generation)


def padded(pad: str | None = None) -> Any:
    tokenizer = load_tokenizer(TOKENIZER / "tokenizer")
    tokenizer.add_special_tokens({"pad_token": tokenizer.eos_token if pad is None else pad})
    return tokenizer


def expected(generation: str, encoders: tuple[Any, ...]) -> tuple[Tensor, Tensor | None]:
    """Context and pooled state, by transformers: of Stable Diffusion 2 the states before the last layer, normalised."""
    zero = load_tokenizer(TOKENIZER / "tokenizer").convert_ids_to_tokens(0)
    if generation == "Stable Diffusion XL":
        found = TextEncoders(encoders, (padded(), padded(zero))).embed(PROMPTS)
        return found.context, found.pooled
    tokens = padded(None if generation == "Stable Diffusion 1" else zero)(
        PROMPTS, padding="max_length", max_length=20, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        outputs = encoders[0](tokens, output_hidden_states=True)
        if generation == "Stable Diffusion 1":
            return outputs.last_hidden_state, None
        return encoders[0].text_model.final_layer_norm(outputs.hidden_states[-2]), None


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    bare = {key.removeprefix("text_model."): tensor for key, tensor in theirs.items() if "position_ids" not in key}
    return {key.removeprefix("text_model.") for key in ours} == bare.keys() and all(
        torch.equal(tensor, bare[key.removeprefix("text_model.")]) for key, tensor in ours.items()
    )


@pytest.mark.parametrize("generation", GENERATIONS)
def test_encoders_have_the_tensors_that_diffusers_reads(generation: str, tmp_path: Path) -> None:
    file, _, encoders = write(tmp_path, generation)
    tensors, found = load_file(file), load_text_encoders(file, TOKENIZER).networks
    if generation == "Stable Diffusion 2":
        theirs = convert_open_clip_checkpoint(encoders[0], tensors, OPEN)
        used = {key: tensor for key, tensor in theirs.items() if ".layers.2." not in key and "proj.weight" not in key}
        assert same({key: one for key, one in found[0].state_dict().items() if "proj.weight" not in key}, used)
        return
    assert same(found[0].state_dict(), convert_ldm_clip_checkpoint(tensors))
    if generation == "Stable Diffusion XL":
        assert same(found[1].state_dict(), convert_open_clip_checkpoint(encoders[1], tensors, LAST))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_file_becomes_the_video_model_of_its_parts(generation: str, tmp_path: Path) -> None:
    file, unet, encoders = write(tmp_path, generation)
    family = VideoLDM.load(file, None, TOKENIZER, "epsilon" if generation == "Stable Diffusion 2" else None)
    context, pooled = expected(generation, encoders)
    text, latents = family.embed(PROMPTS), torch.randn(2, 3, 4, 8, 8)
    torch.testing.assert_close(text.context, context, atol=1e-6, rtol=0)
    if pooled is None:
        assert text.pooled is None
    else:
        torch.testing.assert_close(text.pooled, pooled, atol=1e-6, rtol=0)
    flat = latents.flatten(0, 1), torch.tensor([500] * 6), text.context.repeat_interleave(3, 0)
    with torch.no_grad():
        ours = family.predict(text)(latents, torch.tensor([500, 500])).flatten(0, 1)
        theirs = unet(*flat, **family.added(text, latents)).sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert family.size == (2 * unet_side(generation),) * 2
    assert (family.noise.config.steps_offset, family.noise.config.timestep_spacing) == (1, "leading")
    family.save_pretrained(tmp_path / "export")
    again = VideoLDM.load(tmp_path / "export").embed([*PROMPTS, ""])
    assert torch.equal(again.context, family.embed([*PROMPTS, ""]).context)
    alone = Encoders.load(file, TOKENIZER).embed(PROMPTS)
    assert torch.equal(alone.context, text.context)


def unet_side(generation: str) -> int:
    return 128 if generation == "Stable Diffusion XL" else 64


def test_a_stable_diffusion_2_without_its_unused_layer_is_read_too(tmp_path: Path) -> None:
    file, _, _ = write(tmp_path, "Stable Diffusion 2")
    unused = f"{OPEN}transformer.resblocks.2.", f"{OPEN}text_projection", f"{OPEN}logit_scale"
    whole = load_text_encoders(file, TOKENIZER).embed(PROMPTS)
    save_file({key: one for key, one in load_file(file).items() if not key.startswith(unused)}, file)
    assert torch.equal(load_text_encoders(file, TOKENIZER).embed(PROMPTS).context, whole.context)


@pytest.mark.parametrize(
    ("generation", "change", "message"),
    [
        ("Stable Diffusion 1", {"cond_stage_model.x": torch.zeros(1)}, r"no known text encoder: cond_stage_model\.x"),
        ("Stable Diffusion 1", {"cond_stage_model.transformer.x": torch.zeros(1)}, r"1 left over \(x\)"),
        ("Stable Diffusion 2", {f"{OPEN}ln_final.bias": None}, r"1 missing \(final_layer_norm\.bias\)"),
        ("Stable Diffusion XL", {f"{LAST}ln_final.bias": torch.zeros(9)}, r"shape: final_layer_norm\.bias \(9,"),
        ("Stable Diffusion XL", {f"{FIRST}text_model.embeddings.token_embedding.weight": None}, "is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(
    generation: str, change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    file, _, _ = write(tmp_path, generation)
    tensors = load_file(file) | change
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(CheckpointError, match=message):
        load_text_encoders(file, TOKENIZER)


def test_a_tokenizer_must_be_named_and_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _, _ = write(tmp_path, "Stable Diffusion 1")
    with pytest.raises(CheckpointError, match=r"holds no tokenizer: .* as model\.tokenizer or by --tokenizer"):
        VideoLDM.load(file)
    tokens = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    save_file({**load_file(file), tokens: torch.zeros(160, 64)}, file)
    with pytest.raises(CheckpointError, match=r"has 164 tokens but the text encoder cond_stage_model\..* has 160"):
        single_file_text.load_text_encoders(file, TOKENIZER)
    with pytest.raises(CheckpointError, match="leave tokenizer out"):
        VideoLDM.load("pocket", None, TOKENIZER)


def test_temporal_layers_go_over_a_single_file(tmp_path: Path) -> None:
    file, _, _ = write(tmp_path, "Stable Diffusion XL")
    trained = VideoLDM.load(file, None, TOKENIZER)
    randomise(trained.unet)
    trained.save_pretrained(tmp_path / "export")
    other = VideoLDM.load(tmp_path / "export", file, TOKENIZER)
    born, created = VideoLDM.load(file, None, TOKENIZER).unet.state_dict(), trained.unet.created_parameters()
    for name, value in other.unet.state_dict().items():
        assert torch.equal(value, created[name] if name in created else born[name])
    with pytest.raises(CheckpointError, match="without temporal layers to go over another"):
        VideoLDM.load(file, file, TOKENIZER)


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    save_file({"lora_unet.alpha": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="holds no image model"):
        VideoLDM.load(tmp_path / "lora.safetensors", None, TOKENIZER)
