"""The plots of runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inflate.curves import plot

HISTORY = [{"step": step, "loss/a": 1 / (step + 1), "lr/a": 0.1} for step in range(3)] + [{"step": 4, "loss/b": 2.0}]
HELD_OUT = [{"step": 0, "psnr": 20.0, "held-out loss": 0.1}]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What is drawn: titles of panels, lines with their colours and points, stacks, marks, labels of the legend."""
    found: dict[str, list[Any]] = {"titles": [], "lines": [], "stacks": [], "marks": [], "labels": []}

    def watch(kind: type, method: str, name: str, tell: Callable[..., Any]) -> None:
        draw = getattr(kind, method)

        def drawing(self: Any, *arguments: Any, **settings: Any) -> Any:
            found[name].append(tell(*arguments, **settings))
            return draw(self, *arguments, **settings)

        monkeypatch.setattr(kind, method, drawing)

    watch(Axes, "set_title", "titles", lambda text, **_: text)
    watch(Axes, "plot", "lines", lambda x, y, color, **_: (color, x, y))
    watch(Axes, "stackplot", "stacks", lambda x, y, labels: (x, dict(zip(labels, y, strict=True))))
    watch(Axes, "axvline", "marks", lambda x, label, **_: (x, label))
    watch(Figure, "legend", "labels", lambda handles, **_: [line.get_label() for line in handles])
    return found


def test_every_quantity_of_a_run_has_a_panel(tmp_path: Path, drawn: dict[str, list[Any]]) -> None:
    plot(tmp_path / "metrics.png", {"": {"history": HISTORY, "held_out": HELD_OUT}})
    assert drawn["titles"] == ["loss/a", "lr/a", "loss/b", "held-out psnr", "held-out loss"]
    assert [line[0] for line in drawn["lines"]] == ["C0", "C0", "C0", "C1", "C1"]
    assert drawn["lines"][2] == ("C0", [4], [2.0])
    assert drawn["labels"] == []
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.png"]


def test_what_belongs_together_shares_a_panel(tmp_path: Path, drawn: dict[str, list[Any]]) -> None:
    history = [
        {"step": 1, "loss/unet": 1.0, "loss at sigma below 1/unet": 2.0, "data_wait": 0.25, "forward": 0.75},
        {"step": 2, "loss/unet": 1.0, "loss at sigma above 1/unet": 3.0, "data_wait": 1.0},
    ]
    names = ("held-out loss", "held-out loss in 4x8x8", "held-out loss, temporal layers bypassed", "training-clip loss")
    psnr = ("clean/psnr", "parent/clean/psnr", "training-clip clean/psnr")
    plot(
        tmp_path / "run.png",
        {"": {"history": history, "held_out": [{"step": 0} | dict.fromkeys((*names, *psnr), 1.0)]}},
    )
    assert drawn["titles"] == [
        "loss/unet", "loss at sigma .../unet", "shares of time", "held-out loss", "held-out loss in ...",
        "held-out clean/psnr",
    ]  # fmt: skip
    assert drawn["lines"][:3] == [("C0", [1, 2], [1.0, 1.0]), ("C0", [1], [2.0]), ("C1", [2], [3.0])]
    assert [line[0] for line in drawn["lines"][3:]] == ["C0", "C1", "C2", "C1", "C0", "C1", "C2"]
    assert drawn["stacks"] == [([1, 2], {"data_wait": [0.25, 1.0], "forward": [0.75, 0.0]})]
    assert drawn["marks"] == []


def test_the_step_from_which_a_run_overfits_is_marked(tmp_path: Path, drawn: dict[str, list[Any]]) -> None:
    losses = zip([1.0, 0.8, 0.9, 0.95], [1.0, 0.7, 0.6, 0.5], strict=True)
    rows = [{"step": n, "held-out loss": one, "training-clip loss": other} for n, (one, other) in enumerate(losses)]
    one = {"history": HISTORY, "held_out": rows}
    plot(tmp_path / "run.png", {"": one})
    assert drawn["marks"] == [(1, "overfits from 1")]
    drawn["marks"].clear()
    plot(tmp_path / "runs.png", {"first": one, "second": {"history": HISTORY, "held_out": rows[:2]}})
    assert drawn["marks"] == [(1, "overfits from 1")] * 2  # in the panels of both losses


def test_several_runs_share_the_axes(tmp_path: Path, drawn: dict[str, list[Any]]) -> None:
    other = {"history": [{"step": 9, "loss/a": 3.0}], "held_out": []}
    plot(tmp_path / "runs.svg", {"first": {"history": HISTORY, "held_out": HELD_OUT}, "second": other})
    assert drawn["titles"] == ["loss/a", "lr/a", "loss/b", "held-out psnr", "held-out loss"]
    assert drawn["lines"][:2] == [("C0", [0, 1, 2], [1.0, 1 / 2, 1 / 3]), ("C1", [9], [3.0])]
    assert drawn["labels"] == [["first", "second"]]
    assert b"<svg" in (tmp_path / "runs.svg").read_bytes()
