"""Stories: what a file of shots may say, which frame is shown once, what the page tells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from inflate import story
from inflate.errors import ConfigError
from inflate.story import Shot

YAML = """
- {image: a.png, prompt: a boat leaves}
- previous: true
  prompt: a storm
  frames: 4
- {image: b.png, end_image: c.png, seed: 7}
- {image: c.png}
"""


def written(folder: Path, text: str, name: str = "story.yaml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_shots_are_read_with_their_seeds_and_images_beside_the_file(tmp_path: Path) -> None:
    assert story.read(written(tmp_path, YAML), seed=3) == [
        Shot(tmp_path / "a.png", prompt="a boat leaves", seed=3),
        Shot(previous=True, prompt="a storm", frames=4, seed=4),
        Shot(tmp_path / "b.png", end_image=tmp_path / "c.png", seed=7),
        Shot(tmp_path / "c.png", seed=6),
    ]


@pytest.mark.parametrize("indent", [None, "\t"])
def test_json_is_read_as_it_is_written(tmp_path: Path, indent: str | None) -> None:
    shots = [{"image": "/x/a.png", "prompt": 'a "boat", 50 % / ☂ 😀'}, {"previous": True, "prompt": "no", "seed": 0}]
    file = written(tmp_path, json.dumps(shots, indent=indent), "story.json")
    assert story.read(file) == [
        Shot(Path("/x/a.png"), prompt=shots[0]["prompt"], seed=0),
        Shot(None, True, "no", seed=0),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "- {image: a.png}\n- {image: b.png,\n   promt: x}",
            "shot 2 of FILE:3: unknown setting promt; did you mean prompt?",
        ),
        (
            "- {image: a.png}\n- {image: b.png, frames: many}",
            "shot 2 of FILE:2: frames must be an int or null, not 'many'",
        ),
        ("- {image: a.png}\n- {image: b.png, frames: 1}", "shot 2 of FILE:2: frames: must be 2 or more, not 1"),
        ("- {image: a.png, seed: -1}", "shot 1 of FILE:1: seed: must be 0 to 9223372036854775807, not -1"),
        ("- {image: a.png}\n- {prompt: x}", "shot 2 of FILE:2: give it either an image, or previous: true"),
        ("- {image: a.png, previous: true}", "shot 1 of FILE:1: give it either an image, or previous: true"),
        ("- {previous: true}", "shot 1 of FILE: previous: there is no shot before the first"),
        ("- {image: a.png}\n- b.png", "shot 2 of FILE:2: expected `setting: value`"),
        ("image: a.png", "FILE: expected a list of shots"),
        ("", "FILE: expected a list of shots"),
        ("- {image: a.png", "FILE:1: not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_shot(tmp_path: Path, text: str, message: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        story.read(file)
    assert str(caught.value).startswith(message.replace("FILE", str(file)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        story.read(tmp_path / "nowhere.yaml")


def clips(*lengths: int) -> list[np.ndarray]:
    return [np.full((length, 2, 2, 3), number, np.uint8) for number, length in enumerate(lengths)]


def test_a_frame_that_two_shots_share_is_shown_once(tmp_path: Path) -> None:
    shots = story.read(written(tmp_path, YAML))
    assert [len(part) for part in story.shown(shots, clips(5, 4, 5, 5))] == [5, 3, 5, 4]


def test_a_sheet_shows_more_of_longer_shots() -> None:
    assert [story.columns(clips(5, length)) for length in (4, 16, 24, 49, 200)] == [8, 8, 12, 24, 32]


def test_the_page_lists_the_shots_that_there_are(tmp_path: Path) -> None:
    text = '- {image: "<a>.png", prompt: "1 < 2"}\n- {previous: true, end_image: b.png}\n- {image: c.png}'
    shots = story.read(written(tmp_path, text))
    page = story.page("out.mp4", shots, clips(5, 4), fps=4)
    rows = [
        "<th>1</th><td>0.00 to 1.25</td><td>0 to 4</td><td>&lt;a&gt;.png</td><td></td><td>1 &lt; 2</td><td>0</td>",
        "<th>2</th><td>1.25 to 2.25</td><td>5 to 8</td><td>the shot before</td><td>b.png</td><td></td><td>1</td>",
    ]
    assert [f"<tr>{row}</tr>" in page for row in rows] == [True, True]
    assert 'src="out.mp4"' in page
    assert "<th>3</th>" not in page


def test_a_shot_is_labelled_by_the_start_of_its_prompt() -> None:
    assert Shot(Path("a/b.png")).label == "b.png"
    assert Shot(previous=True).label == "previous"
    long = Shot(previous=True, prompt="a boat leaves the harbour while a storm comes up over the island").label
    assert len(long) <= story.LABEL
    assert long.startswith("a boat leaves")
    assert long.endswith(" ...")
