"""The plots of runs."""

from pathlib import Path

import pytest

from inflate.curves import plot

HISTORY = [{"step": step, "loss/a": 1 / (step + 1), "lr/a": 0.1} for step in range(3)] + [{"step": 4, "loss/b": 2.0}]
HELD_OUT = [{"step": 0, "psnr": 20.0, "held-out loss": 0.1}]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[object]]:
    """What is drawn: titles of panels, lines with their colours and points, labels of the legend."""
    found: dict[str, list[object]] = {"titles": [], "lines": [], "labels": []}
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, text, **_: found["titles"].append(text))
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot", lambda self, x, y, color, **_: found["lines"].append((color, x, y))
    )
    monkeypatch.setattr(
        "matplotlib.figure.Figure.legend",
        lambda self, handles, **_: found["labels"].extend(line.get_label() for line in handles),
    )
    return found


def test_every_quantity_of_a_run_has_a_panel(tmp_path: Path, drawn: dict[str, list[object]]) -> None:
    plot(tmp_path / "metrics.png", {"": {"history": HISTORY, "held_out": HELD_OUT}})
    assert drawn["titles"] == ["loss/a", "lr/a", "loss/b", "held-out psnr", "held-out loss"]
    assert [line[0] for line in drawn["lines"]] == ["C0", "C0", "C0", "C1", "C1"]
    assert drawn["lines"][2] == ("C0", [4], [2.0])
    assert drawn["labels"] == []
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.png"]


def test_several_runs_share_the_axes(tmp_path: Path, drawn: dict[str, list[object]]) -> None:
    other = {"history": [{"step": 9, "loss/a": 3.0}], "held_out": []}
    plot(tmp_path / "runs.svg", {"first": {"history": HISTORY, "held_out": HELD_OUT}, "second": other})
    assert drawn["titles"] == ["loss/a", "lr/a", "loss/b", "held-out psnr", "held-out loss"]
    assert drawn["lines"][:2] == [("C0", [0, 1, 2], [1.0, 1 / 2, 1 / 3]), ("C1", [9], [3.0])]
    assert drawn["labels"] == ["first", "second"]
    assert b"<svg" in (tmp_path / "runs.svg").read_bytes()
