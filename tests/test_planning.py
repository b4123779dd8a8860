"""`inflate plan`: recipes' own tasks on paper, the table and the choice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from original_files import published_like, write_single_file, write_whole_file
from typer.testing import CliRunner

from inflate.cli import app
from inflate.errors import ConfigError
from inflate.families import svd_outline, video_ldm_outline
from inflate.families.dynamicrafter_model import Model
from inflate.families.svd import SVD as SVDFamily
from inflate.families.video_ldm import VideoLDM
from inflate.fitting import refusal
from inflate.models import exchange, folders, image_stream
from inflate.models.folders import SHIPPED
from inflate.planning import Planner, assignments, largest
from inflate.training import ladder, stages
from inflate.training.cards import Card
from inflate.training.cost import Cost
from inflate.training.ladder import Rung
from inflate.training.stages import Queries

ROOT = Path(__file__).resolve().parents[1]
SVD, VIDEO_LDM = (ROOT / "recipes" / f"{name}_finetune.py" for name in ("svd", "video_ldm"))
SMALL = ["data.frames=2", "data.height=32", "data.width=32"]


def small(recipe: Path, file: str, *more: str) -> Planner:
    return Planner(recipe, [str(ROOT / "recipes" / file), *SMALL, *more])


def test_the_command_prints_the_ladder_and_what_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [measure for measure in ladder.MEASURES if measure.name == "recomputation"]
    monkeypatch.setattr(ladder, "MEASURES", few)
    settings = ["data.cache=cache", "training.batch=1", "text_to_video.held_out_clips=1"]
    arguments = [str(VIDEO_LDM), str(ROOT / "recipes" / "video_ldm_pocket.yaml"), *SMALL, *settings]
    result = CliRunner().invoke(app, ["plan", *arguments, "--gpu", "1GB", "--gpu", "H100"])
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["1 of 2", "2 of 2"]
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[3:5]] == ["as asked", "+ recomputation"]
    one, _, other = result.stdout.splitlines()[-3:]
    assert one.startswith("fits 1GB: 0.")
    assert one.endswith("; as asked")
    assert other.startswith("fits H100: 0.")


def test_a_cache_takes_the_encoders_from_the_step() -> None:
    planner = small(SVD, "svd_pocket.yaml", "image_to_video.trainable=all", str(ROOT / "adapters/temporal_lora.yaml"))
    cached = planner.cost({"data.cache": "cache", "data.cache_draws": 2})
    assert cached.frozen == 0
    assert cached.peaks["evaluate"] > cached.peaks["update"]
    assert cached.gradients == 4 * cached.trained


def test_a_mixture_costs_what_its_largest_batch_does() -> None:
    mixture = "data.buckets=[2x32x32@4fps:5,4x32x32@8fps:1,2x64x64@8fps:1,1x32x32:9]"
    joint = small(VIDEO_LDM, "video_ldm_pocket.yaml", "stage=joint", mixture)
    assert str(largest(joint.config())) == "2x64x64@8fps:1"
    assert str(largest(joint.config({"data.tokens": 2 * 64}))) == "2x32x32@4fps:5", "batches of all are equally large"
    assert joint.smaller({}) == []


def test_both_players_of_the_decoders_training_act() -> None:
    cost = small(SVD, "svd_demo_decoder.yaml").cost({})
    assert cost.optimizer >= 8 * cost.trained
    assert set(cost.peaks) >= {"encode", "forward", "backward", "update", "evaluate", "preview"}


def test_a_decoder_is_trained_and_looked_at_in_less_memory_by_rows() -> None:
    planner = small(SVD, "svd_demo_decoder.yaml", "training.accumulate=1")
    whole, rows = planner.cost({}), planner.cost({"memory.decode_rows": 8})
    assert all(rows.peaks[phase] < whole.peaks[phase] for phase in ("forward", "backward", "evaluate", "preview"))
    assert rows.peaks["backward"] - rows.weights < 0.7 * (whole.peaks["backward"] - whole.weights)


def test_where_nothing_fits_it_says_by_how_much_and_what_is_smaller() -> None:
    planner = small(SVD, "svd_pocket.yaml", "data.frames=4", "data.height=64", "data.width=64")
    asked = Cost(0, 0, 0, 0, 0, 0, {"backward": 20 * 10**9}, 0, 0, 0)
    told = refusal(planner, [Rung("as asked", "", {"training.batch": 1}, asked)], Card.parse("16GB"))
    assert "with training.batch=1 it needs 20.00 GB (backward), 5.60 GB more than the 14.40" in told
    assert re.search(r"smaller are data.frames=2 \(0\.\d\d GB\) or data.height=32 data.width=32 ", told)
    none = CliRunner().invoke(app, ["plan", str(SVD), *planner.sources, "training.batch=0"])
    assert none.exit_code == 1


def test_a_stage_of_two_models_and_a_script_without_a_task_are_refused() -> None:
    with pytest.raises(ConfigError, match="stage=demo trains two models"):
        Planner(SVD, []).steps()
    with pytest.raises(ConfigError, match="no make_task"):
        Planner(ROOT / "recipes" / "pocket_pretrain.py", []).steps()
    with pytest.raises(ConfigError, match="no such recipe"):
        Planner(ROOT / "missing.py", []).steps()


def shapes(family: Any) -> dict[str, dict[str, torch.Size]]:
    networks = {"unet": family.unet, "vae": family.vae}
    return {name: exchange.shapes(network.float()) for name, network in networks.items()}


def test_a_single_file_has_the_shapes_of_what_is_loaded_from_it(tmp_path: Path) -> None:
    svd, image, text = (tmp_path / f"{name}.safetensors" for name in ("svd", "image", "text"))
    published_like().save_sgm(svd)
    ahead, real = svd_outline.outline(svd), SVDFamily.load(svd, frames=14)
    assert shapes(ahead) == shapes(real)
    assert exchange.shapes(ahead.image_encoder) == exchange.shapes(real.image_encoder)
    assert (ahead.frames, ahead.decode_chunk) == (real.frames, real.decode_chunk)
    write_single_file(image, cross_attention_dim=64)
    assert shapes(svd_outline.outline(image, "pocket")) == shapes(SVDFamily.load(image, "pocket"))
    write_whole_file(text, "Stable Diffusion 1")
    found = video_ldm_outline.outline(text, SHIPPED["pocket"])
    assert shapes(found) == shapes(VideoLDM.load(text, tokenizer=SHIPPED["pocket"]))
    assert all(parameter.is_meta for network in found.networks for parameter in network.parameters())


def test_each_stage_of_animation_has_the_shapes_of_what_it_trains(tmp_path: Path) -> None:
    queries, start = Queries(width=64, depth=1, heads=2, head_width=32, queries=2), Model("pocket")
    born = stages.begin("context", start, queries, 1)
    assert shapes(stages.outline("context", start, queries, 1)) == shapes(born)
    image_stream.save(born.unet, born.image_encoder, tmp_path)
    start = Model("pocket-t2v", image_stream=str(tmp_path), image_encoder="pocket")
    adapted = stages.begin("adapt", start, queries, 3)
    assert shapes(stages.outline("adapt", start, queries, 3)) == shapes(adapted)
    adapted.save_pretrained(tmp_path / "adapted")
    start = Model(str(tmp_path / "adapted"))
    assert shapes(stages.outline("joint", start, queries, 3)) == shapes(stages.begin("joint", start, queries, 3))


def test_what_a_stage_of_animation_costs() -> None:
    recipe, card = ROOT / "recipes" / "dynamicrafter_finetune.py", "dynamicrafter_pocket_context.yaml"
    few = ("data.frames=1", "data.cache=cache", "image_text_to_video.held_out_clips=1")
    cost = small(recipe, card, *few).cost({})
    assert cost.frozen == 0
    assert cost.gradients == 4 * cost.trained
    assert set(cost.peaks) >= {"encode", "forward", "backward", "update", "evaluate", "preview"}


@pytest.mark.parametrize("stage", ["base", "refine"])
def test_what_a_stage_of_i2vgen_xl_costs(stage: str) -> None:
    recipe, card = ROOT / "recipes" / "i2vgen_xl_finetune.py", f"i2vgen_xl_pocket_{stage}.yaml"
    few = ("data.cache=cache", "i2vgen_xl.held_out_clips=1", "i2vgen_xl.preview_clips=1", "model.path=pocket-t2v")
    cost = small(recipe, card, *few, "data.frames=2", "data.height=32", "data.width=32").cost({})
    assert cost.frozen == 0
    assert cost.gradients == 4 * cost.trained
    assert set(cost.peaks) >= {"encode", "forward", "backward", "update", "evaluate", "preview"}


@pytest.mark.parametrize("name", [name for name in folders.OUTLINES if "video" in name])
def test_published_video_models_have_their_size_without_weights(name: str) -> None:
    family = svd_outline.outline(name)
    assert sum(parameter.numel() for parameter in family.unet.parameters()) == 1_524_623_082
    assert family.decode_chunk == (25 if name.endswith("xt") else 14)
    assert next(family.vae.parameters()).is_meta


@pytest.mark.parametrize(("name", "millions"), [("2-1-base", 865.9), ("v1-5", 859.5), ("xl-base", 2567.5)])
def test_published_image_models_have_their_size_without_weights(name: str, millions: float) -> None:
    path = next(one for one in folders.OUTLINES if name in one)
    family = video_ldm_outline.outline(path)
    image = [value.numel() for key, value in family.unet.named_parameters() if ".temporal." not in key]
    assert sum(image) / 1e6 == pytest.approx(millions, abs=0.1)


def test_settings_are_written_as_a_command_line_takes_them() -> None:
    written = assignments({"data.cache": None, "training.batch": 1, "a.flag": True, "training.precision": "bf16"})
    assert written == ["data.cache=null", "training.batch=1", "a.flag=true", "training.precision=bf16"]
