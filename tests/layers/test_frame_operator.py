"""The kernel itself is tested where Triton is installed (`pip install triton`, on Linux), by its interpreter."""

import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from inflate.errors import InflateError
from inflate.layers.frame_attention import FrameAttention, attend_frames_by, by_sdpa
from inflate.layers.frame_operator import by_triton
from inflate.layers.recompute import recompute_by
from inflate.layers.temporal import TemporalTransformer
from inflate.training.memory import simulate

with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton, on Linux)"
)


def run(script, **environment):
    """What a new process prints: Triton decides when it is imported whether kernels are interpreted."""
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env={**os.environ, **environment}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@with_triton
def test_the_kernel_equals_sdpa_both_ways():
    """Of one clip and of two, of frames and heads that fill a program and that do not, strided and summed gradients."""
    printed = run(
        """
        import torch
        from inflate.layers.frame_attention import by_sdpa
        from inflate.layers.frame_operator import by_triton

        torch.manual_seed(0)
        for shape in ((1, 5, 2, 3, 16), (2, 4, 3, 14, 40), (1, 3, 2, 25, 64), (1, 1, 1, 32, 128), (2, 3, 1, 2, 8)):
            clips, places, heads, frames, width = shape
            found, expected = [], []
            for attend, told in ((by_triton, found), (by_sdpa, expected)):
                torch.manual_seed(1)
                given = [torch.randn(clips, frames, places, heads, width, requires_grad=True) for _ in range(3)]
                for each in given[1:]:  # another order of memory than the queries'
                    each.data = each.data.transpose(1, 2).contiguous().transpose(1, 2)
                output = attend(*(each.permute(0, 2, 3, 1, 4) for each in given))
                (output.square().sum() + output.sum()).backward()
                told += [output.detach(), *(each.grad for each in given)]
            gaps = [(one - other).abs().max() / other.abs().max() for one, other in zip(found, expected)]
            print(max(map(float, gaps)))
        """,
        TRITON_INTERPRET="1",
    )
    assert len(printed.splitlines()) == 5
    assert max(map(float, printed.splitlines())) < 1e-5


@with_triton
def test_the_kernels_compile_for_gpus_of_compute_capability_8(tmp_path):
    printed = run(
        """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from inflate.layers import frame_kernel

        SETTINGS = {"FRAMES": 14, "WIDTH": 64, "COLUMNS": 64, "PRECISION": "tf32"}
        KINDS = {"pixels": "i32", "places": "i32", "scale": "fp32"}
        for kernel in (frame_kernel._forward, frame_kernel._backward):
            kinds = {name: "*bf16" for name in kernel.arg_names} | KINDS | dict.fromkeys(SETTINGS, "constexpr")
            kinds |= {name: ("i32",) * 4 for name in kinds if name.startswith("of_")}
            fixed = {(kernel.arg_names.index(name),): value for name, value in SETTINGS.items()}
            source = ASTSource(kernel, {name: kinds[name] for name in kernel.arg_names}, fixed)
            print("mma.sync" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"])
        """,
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert printed.split() == ["True", "True"]


def test_what_the_kernel_cannot_take_is_refused_with_the_remedy():
    for frames, width in ((33, 16), (4, 129)):
        heads = torch.empty(1, 2, 1, frames, width, device="meta")
        with pytest.raises(InflateError, match=rf"not {frames} of {width}: set training.attention=sdpa"):
            by_triton(heads, heads, heads)


def test_on_paper_it_holds_queries_keys_and_values_alone():
    held, moved = [], []
    for attend in (by_sdpa, by_triton):
        with torch.device("meta"):
            block = TemporalTransformer(64, 2, 32, None).requires_grad_(False).to(torch.bfloat16)
        assert attend_frames_by(block, attend) == [block.attn1]

        def inputs():
            return torch.empty(2, 8, 100, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)

        estimate = simulate_frozen(block, inputs)
        held.append(estimate.held)
        moved.append(estimate.forward_flops)
    features = 2 * 8 * 100 * 64 * 2
    assert held[0] - held[1] >= features  # what SDPA gives, which its backward pass reads, and the sums of its softmax
    assert moved[0] == moved[1]


@pytest.mark.parametrize("attend", [by_sdpa, by_triton])
def test_a_recomputation_of_all_but_attention_keeps_what_it_gives(attend):
    work = []
    for policy in ("units", "all_but_attention"):
        with torch.device("meta"):
            block = TemporalTransformer(64, 2, 32, None).to(torch.bfloat16)
        block.inner = False  # a unit of its own
        attend_frames_by(block, attend)
        recompute_by(block, {"": policy})
        work.append(
            simulate_frozen(block, lambda: torch.empty(2, 8, 100, 64, device="meta", dtype=torch.bfloat16)).flops
        )
    assert work[0] - work[1] == 2 * 2 * (2 * 100 * 2) * 8 * 8 * 32  # two products of (F,d) and (d,F) for each head


def simulate_frozen(block, inputs):
    block.attn1.to_q.weight.requires_grad_()
    return simulate(block, inputs, lambda network, hidden: network(hidden, None).sum())


def test_a_copy_of_a_layer_keeps_how_it_attends():
    layer = FrameAttention(16, heads=2, dim_head=8)
    assert layer.attend is by_sdpa
    assert attend_frames_by(layer, by_triton) == [layer]
    assert layer.attend is by_triton
    assert FrameAttention(16, heads=2, dim_head=8).attend is by_sdpa
