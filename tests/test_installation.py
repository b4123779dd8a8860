"""The checks of an installation: `inflate doctor` as a whole, and each fault that it can find."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from packaging.requirements import Requirement
from typer.testing import CliRunner

from inflate import cli, installation
from inflate.errors import DataError
from inflate.findings import Finding, all_pass, failed, warning


@pytest.fixture
def _apart() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_apart")
def test_the_command_makes_every_check_and_leaves_nothing(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["doctor", "--output", str(tmp_path / "new" / "output")])
    assert result.exit_code == 0, result.output
    *lines, last = result.stdout.splitlines()
    assert [line.split(":")[0].split(maxsplit=1)[1] for line in lines] == list(installation.checks(tmp_path))
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}
    told = dict(zip(installation.checks(tmp_path), lines, strict=True))
    assert "8 of 8 frames" in told["video"]
    assert str(tmp_path) in told["output"]
    assert "differs from its parent by 0.0e+00 (UNet)" in told["pocket model"]
    assert "its export loads again" in told["training"]
    assert "accelerate launch --multi_gpu --num_processes N -m inflate.doctor" in last
    assert list(tmp_path.iterdir()) == []


def test_a_failure_ends_with_status_1_after_the_other_checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    few = {name: check for name, check in installation.checks(tmp_path / "file").items() if name in ("output", "GPUs")}
    monkeypatch.setattr(installation, "checks", lambda _: few | {"last": lambda: Finding("fine")})
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    _, output, last, _ = result.stdout.splitlines()
    assert output.startswith("FAILED   output: NotADirectoryError: ")
    assert last == "ok       last: fine"


def test_what_a_check_raises_is_a_line_or_goes_on() -> None:
    def broken() -> Finding:
        raise DataError("one\ntwo")

    lines: list[str] = []
    assert all_pass({"a": lambda: warning("slow", "be quick")}, (), lines.append)
    assert not all_pass({"b": broken, "c": lambda: failed("gone")}, installation.MACHINE, lines.append)
    assert lines == ["warning  a: slow (be quick)", "FAILED   b: one two", "FAILED   c: gone"]
    with pytest.raises(DataError):
        all_pass({"b": broken}, (OSError,), lines.append)


# --- packages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("pytest>=1", ""),
        ("pytest>=1000", f"pytest is {pytest.__version__}, not >=1000"),
        ("no-such-package>=2,<3", "no-such-package<3,>=2 is missing"),
        ("python>=3.11", ""),
    ],
)
def test_a_requirement_that_is_not_met_is_told(text: str, fault: str) -> None:
    assert installation.unmet(Requirement(text)) == fault


@pytest.mark.parametrize(
    ("requires", "line"),
    [
        ('torch>=2.6\nRequires-Dist: pytest>=1000; extra == "dev"', "ok packages: 2 as asked for; python 3."),
        ("torch>=1000\nRequires-Dist: no-such-package", "; no-such-package is missing (pip install -U"),
        ('pytest>=1000; extra == "curate"', "warning packages: pytest is "),
        ('no-such-package; extra == "curate"', "ok packages: 1 as asked for"),
        ("torch; sys_platform == 'amiga'", "ok packages: 1 as asked for"),
    ],
)
def test_packages_are_compared_with_what_the_distribution_asks_for(
    requires: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "inflate_video-0.0.dist-info"
    installed.mkdir()
    head = "Metadata-Version: 2.4\nName: inflate-video\nVersion: 0.0\nRequires-Python: >=3.11\n"
    extras = "Provides-Extra: dev\nProvides-Extra: curate\n"
    (installed / "METADATA").write_text(f"{head}{extras}Requires-Dist: {requires}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert line in " ".join(installation.packages().line("packages").split())


def make_package(folder: Path, name: str, body: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(body)


def test_a_broken_torchvision_is_worse_than_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    line = installation.torchvision().line("torchvision")
    assert line.startswith("FAILED   torchvision: cannot be imported: RuntimeError: operator torchvision::nms does not")
    assert "pip uninstall torchvision" in line


def test_an_optional_package_must_do_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, "inflate_extension", "def work(device):\n    raise NotImplementedError('no operator')")
    monkeypatch.syspath_prepend(tmp_path)
    line = installation.optional("inflate_extension", lambda package, device: package.work(device)).line("it")
    assert "it: does not work on c" in line
    assert "NotImplementedError: no operator (install the inflate_extension that is built for torch" in line
    assert installation.optional("inflate_absent", lambda *_: None) == Finding("not installed, optional")


# --- the machine ------------------------------------------------------------------------------------------------------

CARD = "GPU 0: NVIDIA H100"


@pytest.mark.parametrize(
    ("built", "usable", "cards", "line"),
    [
        ("12.9", 1, [CARD, "GPU 1: NVIDIA H100"], "ok       it: torch 2, built for 12.9, uses 1 of 2 GPUs"),
        ("12.9", 0, [CARD], "FAILED   it: torch 2, built for 12.9, cannot use GPU 0: NVIDIA H100 (a newer driver"),
        (None, 0, [CARD], "FAILED   it: torch 2 is built for CPUs, but there is GPU 0: NVIDIA H100 (install torch"),
        ("12.9", 0, [], "warning  it: torch 2 is built for 12.9, but there is no GPU"),
        (None, 0, [], "ok       it: no GPU"),
    ],
)
def test_torch_must_be_built_for_the_machine(built: str | None, usable: int, cards: list[str], line: str) -> None:
    assert installation.judge_cuda("2", built, usable, cards).line("it").startswith(line)


@pytest.mark.parametrize(
    ("used", "asked", "gpu", "verdict"),
    [(4, None, False, "ok"), (8, "8", False, "warning"), (1, "1", False, "warning"), (1, "1", True, "ok")],
)
def test_threads_must_fit_the_processors(used: int, asked: str | None, gpu: bool, verdict: str) -> None:
    assert installation.judge_threads(4, used, asked, gpu).verdict == verdict


def test_too_little_shared_memory_is_told(tmp_path: Path) -> None:
    assert installation.shared_memory(tmp_path, 0).verdict == "ok"
    assert "docker run --shm-size" in installation.shared_memory(tmp_path, 2**60).line("shared memory")
    assert installation.shared_memory(tmp_path / "absent").found.endswith("on this system")
