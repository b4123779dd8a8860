"""Compiled blocks beside uncompiled ones: how many graphs, equal outputs and gradients, and what cannot be compiled."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from helpers import randomise, tiny_unet
from inflate.adapters import attach
from inflate.adapters.settings import AdapterSettings, Kind
from inflate.adapters.targets import resolve
from inflate.errors import TrainingError
from inflate.layers.clip import ClipState
from inflate.layers.hierarchy import Hierarchy
from inflate.layers.temporal import VideoResnet, VideoTransformer
from inflate.models.unet import VIDEO_LDM, TemporalSpec, VideoUNet
from inflate.training import compiling, loop
from inflate.training.compiling import Compilation, kind_of
from inflate.training.loop import fit
from inflate.training.memory_settings import Memory
from inflate.training.player import check_shardable
from inflate.training.sharding import Sharding
from tiny_svd import Clips, image_to_video, largest_difference
from toy import Points, Regression, settings

# Dynamo makes an instance of autograd.Function, which is deprecated, and looks at the gradients of inner tensors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

GRAPHS = 19
"""Of Stable Video Diffusion: 13 structures of residual blocks and 3 of transformers, of which one of each runs at two
sizes; and the middle block's scale of the output is a 1 that is no float."""
SIDE = 16


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def svd(width: int = 4) -> VideoUNet:
    """Stable Video Diffusion's four levels, narrow."""
    torch.manual_seed(0)
    parent = UNet2DConditionModel(
        in_channels=8,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        attention_head_dim=(1, 2, 4, 4),
        cross_attention_dim=8,
        norm_num_groups=2,
        use_linear_projection=True,
    )
    unet = VideoUNet.from_2d(parent, TemporalSpec(added_id_dim=8, cross_attention_resnet_eps=1e-6))
    randomise(unet)
    return unet.train()


def gradients(unet: VideoUNet) -> dict[str, Tensor]:
    """The output, and the gradients by name."""
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator)
    given = draw(1, 2, 8, SIDE, SIDE), torch.tensor([0.3]), draw(1, 1, 8), draw(1, 3).abs()
    unet.zero_grad()
    output = unet(*(each.to(unet.dtype) for each in given)).sample
    output.square().mean().backward()
    found = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **found}


def difference(ours: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    scale = {name: float(value.abs().max()) or 1.0 for name, value in others.items()}
    return largest_difference(
        {name: value / scale[name] for name, value in ours.items()},
        {name: value / scale[name] for name, value in others.items()},
    )


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the compilation said; Dynamo's own traces are captured, too."""
    return [record.getMessage() for record in caplog.records if record.name == compiling.__name__]


def test_stable_video_diffusion_needs_19_graphs_and_gives_the_same(caplog: pytest.LogCaptureFixture) -> None:
    unet = svd()
    structures = {kind_of(m) for m in unet.modules() if isinstance(m, VideoResnet | VideoTransformer)}
    for parameter in unet.inert_parameters().values():
        parameter.requires_grad_(False)
    plain = gradients(unet)
    compilation = Compilation([unet], "eager")
    compiled = gradients(unet)
    assert compiled.keys() == plain.keys()
    assert difference(compiled, plain) <= 1e-5
    assert (len(structures), len(compilation.kinds), compilation.graphs) == (17, GRAPHS, GRAPHS)
    unet.enable_gradient_checkpointing()
    assert difference(gradients(unet), plain) <= 1e-5
    with torch.no_grad():
        unet(torch.zeros(1, 3, 8, 32, 32), 0.3, torch.zeros(1, 1, 8), torch.zeros(1, 3))  # another size, not compiled
    with caplog.at_level(logging.INFO):
        compilation.check()
        compilation.check()
    assert compilation.graphs == GRAPHS
    assert told(caplog) == [f"compiled {GRAPHS} graphs for 38 blocks of {GRAPHS} kinds"]
    compilation.release()
    assert not any(getattr(module, "compiled", None) for module in unet.modules())


def test_image_tokens_that_fade_in_need_no_graph_for_every_share() -> None:
    torch.manual_seed(0)
    unet = VideoUNet.from_2d(tiny_unet(cross_attention_dim=16), VIDEO_LDM)
    unet.add_hierarchy(Hierarchy(embedding=6, clip_tokens=2))
    randomise(unet)
    first = {"image_latents": torch.randn(1, 4, 8, 8), "image_embeddings": torch.randn(1, 1, 6)}
    given = torch.randn(1, 2, 4, 8, 8), torch.tensor([500]), torch.randn(1, 5, 16)
    shares = (0.25, 0.5, 0.75, 1.0)
    plain = [unet(*given, **first, image_share=share).sample for share in shares]
    compilation = Compilation([unet.mid_block], "eager")
    for share, wanted in zip(shares, plain, strict=True):
        torch.testing.assert_close(unet(*given, **first, image_share=share).sample, wanted, atol=1e-5, rtol=0)
    assert compilation.graphs == 3 <= len(compilation.kinds), "residual blocks, transformers with shares and without"


def small(kind: Kind | None = None) -> VideoUNet:
    unet = image_to_video().family.unet
    unet.train().requires_grad_(True)
    if kind:
        wanted = AdapterSettings(kind, rank=2, targets=["temporal.attn*", "attn1.to_*", "resnets.*.conv1"])
        wanted.exclude = ["attn2.to_q", "attn2.to_k"]
        torch.manual_seed(5)
        attach.create(unet, wanted, resolve(unet, wanted))
        for name, parameter in unet.named_parameters():
            parameter.data = torch.randn_like(parameter) if "lora_B" in name else parameter.data.double()
    return unet


def test_a_lora_with_recomputation_and_its_backward_pass_traced_too() -> None:
    unet = small("lora")
    plain = gradients(unet)
    unet.enable_gradient_checkpointing()
    compilation = Compilation([unet], "aot_eager")
    assert difference(gradients(unet), plain) <= 1e-10
    assert compilation.graphs == len(compilation.kinds)


def test_a_run_compiles_and_ends_in_the_same_weights(
    tmp_path: Path, on_cpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Compilation] = []

    def eager(networks: Iterator[nn.Module]) -> Compilation:
        made.append(Compilation(networks, "eager"))
        return made[-1]

    monkeypatch.setattr(loop, "Compilation", eager)
    weights = []
    for compiled in (False, True):
        task = image_to_video(Memory(recompute="units"))
        task.preview = lambda folder: None
        task.export = lambda folder: None
        with caplog.at_level(logging.INFO):
            fit(task, Clips(), settings(tmp_path / str(compiled), steps=2, batch=1, compile=compiled))
        weights.append({name: value.clone() for name, value in task.family.unet.state_dict().items()})
    assert largest_difference(*weights) <= 1e-9
    assert len(made) == 1
    assert made[0].graphs == len(made[0].kinds) > 1
    assert told(caplog) == [
        f"compiled {made[0].graphs} graphs for {len(made[0].units)} blocks of {made[0].graphs} kinds"
    ]


def test_a_compiled_run_whose_memory_is_foreseen_trains_on_a_cpu_unmeasured(
    tmp_path: Path, on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "Compilation", lambda networks: Compilation(networks, "eager"))
    task = image_to_video()
    task.preview = task.export = lambda folder: None
    done = fit(task, Clips(), settings(tmp_path / "run", steps=1, batch=1, compile=True), predicted={"forward": 1})
    assert (done.step, done.peaks) == (1, {})


def test_blocks_recomputed_in_two_levels_are_refused_before_the_first_step() -> None:
    unet = image_to_video(Memory(recompute_in={"mid_block": "nested"})).family.unet
    with pytest.raises(TrainingError, match="set memory.recompute=units, or training.compile=false"):
        Compilation([unet], "eager")


def test_graphs_beyond_the_kinds_are_told(caplog: pytest.LogCaptureFixture) -> None:
    unet = small()
    resnet = next(module for module in unet.modules() if isinstance(module, VideoResnet))
    compilation = Compilation([resnet], "eager")
    for _ in range(2):
        with unet.clip.during(ClipState(1)):
            resnet(torch.randn(1, 8, 4, 4).double(), torch.randn(1, 32).double())
        torch._dynamo.reset()
    compilation.check()
    assert (compilation.graphs, len(compilation.kinds)) == (2, 1)
    assert "(2 graphs for 1 kinds)" in caplog.text


def test_what_cannot_be_compiled_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    unet = small()
    resnet = next(module for module in unet.modules() if isinstance(module, VideoResnet))
    resnet.nonlinearity = Breaking()
    Compilation([unet], "eager")
    with pytest.raises(TrainingError, match=r"training.compile=true: a VideoResnet cannot be compiled: .*; set train"):
        gradients(unet)
    with pytest.raises(TrainingError, match="there is no inflated block to compile"):
        fit(Regression(), Points(), settings(tmp_path / "run", compile=True))
    with pytest.raises(TrainingError, match="training.compile=true cannot compile layers whose weights are gathered"):
        check_shardable(image_to_video().players, settings(tmp_path, compile=True), Sharding(True))


class Breaking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x
