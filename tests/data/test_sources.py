"""Finding clips: each layout, and each way a user can get it wrong."""

from __future__ import annotations

import csv
import json

import pytest
from clip_files import numbered

from inflate.data import video
from inflate.data.settings import Data
from inflate.data.sources import find_clips
from inflate.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """Two pairs: nothing here is decoded, so any bytes will do."""
    for name in ("b", "a"):
        (tmp_path / f"{name}.mp4").write_bytes(b"video")
        (tmp_path / f"{name}.txt").write_text(f"caption {name}\n", encoding="utf-8")
    return tmp_path


def write_rows(folder, kind, rows):
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def find(path, **settings):
    return find_clips(Data(path=str(path), **settings))


ROWS = [
    {"file_name": "b.mp4", "caption": "a cat, asleep", "speed": "slow"},
    {"file_name": "a.mp4", "caption": "ein Käfer", "speed": "fast"},
]


# ---------------------------------------------------------------------------------------------------- pairs


def test_pairs_come_in_order_of_name(folder):
    found = find(folder)
    assert [(clip.name, clip.caption) for clip in found] == [("a.mp4", "caption a"), ("b.mp4", "caption b")]
    assert found[0].media == folder / "a.mp4"


def test_sub_folders_are_searched_and_hidden_files_are_not(folder):
    (folder / "more").mkdir()
    (folder / "more" / "c.MOV").write_bytes(b"video")
    (folder / "more" / "c.txt").write_text("caption c")
    (folder / ".trash").mkdir()
    (folder / ".trash" / "d.mp4").write_bytes(b"video")
    assert [clip.name for clip in find(folder)] == ["a.mp4", "b.mp4", "more/c.MOV"]


def test_a_split_is_a_sub_folder(folder):
    assert [clip.name for clip in find(folder.parent, split=folder.name)] == ["a.mp4", "b.mp4"]


def test_missing_captions_are_named(folder):
    (folder / "a.txt").unlink()
    (folder / "b.txt").write_text("  \n")
    with pytest.raises(DataError) as caught:
        find(folder)
    message = str(caught.value)
    assert f"{folder / 'a.mp4'}: no caption a.txt" in message
    assert f"{folder / 'b.mp4'}: no caption b.txt" in message
    assert "data.captions=optional" in message
    assert [clip.caption for clip in find(folder, captions="optional")] == ["", ""]


def test_many_missing_captions_are_counted(folder):
    for number in range(9):
        (folder / f"x{number}.mp4").write_bytes(b"video")
    with pytest.raises(DataError, match="and 4 more"):
        find(folder)


def test_a_caption_that_is_not_text_is_named(folder):
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 text"):
        find(folder)


def test_two_videos_with_one_caption_are_duplicates(folder):
    (folder / "a.webm").write_bytes(b"video")
    with pytest.raises(DataError, match=r"a\.webm: duplicate of a\.mp4: both would take a\.txt"):
        find(folder)


def test_a_folder_without_clips_says_what_it_has(tmp_path):
    with pytest.raises(DataError, match="no clips; it is empty"):
        find(tmp_path)
    (tmp_path / "clip.dat").write_bytes(b"video")
    with pytest.raises(DataError, match=r"no clips; it has clip\.dat\. Clips end in \.avi"):
        find(tmp_path)


def test_clips_in_splits_ask_for_the_split(folder):
    for name in ("train", "held_out"):
        (folder / name).mkdir()
        write_rows(folder / name, "jsonl", ROWS)
    with pytest.raises(DataError, match=r"set data\.split to held_out or train"):
        find(folder)
    with pytest.raises(DataError, match=r"no sub-folder 'val' \(data\.held_out\); it has held_out, train"):
        find_clips(Data(path=str(folder), split="train", held_out="val").evaluation())
    with pytest.raises(DataError, match=r"no sub-folder 'test' \(data\.split\); it has held_out, train"):
        find(folder, split="test")


def test_a_missing_folder_is_named_and_the_demo_has_a_remedy(tmp_path):
    with pytest.raises(DataError, match=r"absent: no such folder or metadata file \(data\.path\)$"):
        find(tmp_path / "absent")
    with pytest.raises(DataError, match=r"build_demo\.py"):
        find(tmp_path / "demo", split="train")


# ---------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_give_clips_captions_and_the_rest(folder, kind):
    table = write_rows(folder, kind, ROWS)
    for path in (folder, table):
        found = find(path)
        assert [clip.media for clip in found] == [folder / "b.mp4", folder / "a.mp4"]
        assert [clip.caption for clip in found] == ["a cat, asleep", "ein Käfer"]
        assert [dict(clip.extra) for clip in found] == [{"speed": "slow"}, {"speed": "fast"}]


@pytest.mark.parametrize("column", ["video", "video_path", "file_path", "file_name", "path", "media_path"])
@pytest.mark.parametrize("caption", ["caption", "text", "prompt", "cap"])
def test_the_usual_column_names_are_known(folder, column, caption):
    write_rows(folder, "jsonl", [{column: "a.mp4", caption: "words"}])
    assert find(folder)[0].caption == "words"


def test_columns_can_be_chosen(folder):
    write_rows(folder, "csv", [{"clip": "a.mp4", "path": "b.mp4", "text": "long", "cap": "short"}])
    found = find(folder, video_column="clip", caption_column="cap")
    assert (found[0].name, found[0].caption) == ("a.mp4", "short")


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        (
            {"clip": "a.mp4", "caption": "x"},
            {},
            r"no column video or .* it has clip, caption \(set data\.video_column\)",
        ),
        ({"path": "a.mp4", "title": "x"}, {}, r"\(set data\.caption_column, or data\.captions=optional\)"),
        ({"path": "a.mp4", "text": "x"}, {"video_column": "film"}, r"no column film; it has path, text"),
        ({"path": "a.mp4", "text": "x", "cap": "y"}, {}, r"columns text and cap both qualify"),
        ({"path": "a.mp4", "video": "b.mp4", "text": "x"}, {}, r"columns video and path both qualify"),
    ],
)
def test_unknown_columns_are_named(folder, row, settings, reason):
    write_rows(folder, "jsonl", [row])
    with pytest.raises(DataError, match=reason):
        find(folder, **settings)


def test_captions_may_have_no_column_when_optional(folder):
    write_rows(folder, "jsonl", [{"path": "a.mp4"}])
    assert find(folder, captions="optional")[0].caption == ""


@pytest.mark.parametrize(("kind", "place"), [("jsonl", ":2"), ("csv", ":3"), ("parquet", ": row 2")])
def test_a_missing_file_is_named_with_its_row(folder, kind, place):
    write_rows(folder, kind, [ROWS[0], ROWS[1] | {"file_name": "gone.mp4"}])
    with pytest.raises(DataError, match=rf"metadata\.{kind}{place}: no such file .*gone\.mp4"):
        find(folder)


def test_a_row_without_a_file_is_named(folder):
    write_rows(folder, "jsonl", [ROWS[0], {"caption": "x"}, {"file_name": 3, "caption": "x"}])
    with pytest.raises(DataError, match=r"jsonl:2: column 'file_name' names no file\n.*jsonl:3: column"):
        find(folder)


def test_a_duplicate_is_named_with_both_rows(folder):
    write_rows(folder, "jsonl", [*ROWS, ROWS[0] | {"file_name": "./b.mp4"}])
    with pytest.raises(DataError, match=r"jsonl:3: duplicate: \./b\.mp4 is listed before, at .*jsonl:1"):
        find(folder)


@pytest.mark.parametrize("caption", [None, "", "  "])
def test_a_row_without_a_caption_is_named(folder, caption):
    write_rows(folder, "jsonl", [ROWS[0], {"file_name": "a.mp4", "caption": caption}])
    with pytest.raises(DataError, match=r"metadata\.jsonl:2: no caption"):
        find(folder)
    assert find(folder, captions="optional")[1].caption == ""


def test_a_caption_that_is_a_number_is_named(folder):
    write_rows(folder, "jsonl", [ROWS[0] | {"caption": 7}])
    with pytest.raises(DataError, match=r"jsonl:1: the caption is not a text but int 7"):
        find(folder)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("metadata.jsonl", '{"path": "a.mp4", "text": "x"}\n{"path": ', r"jsonl:2: not valid JSON"),
        ("metadata.jsonl", '["a.mp4"]\n', r"jsonl:1: a JSON object is needed"),
        ("metadata.jsonl", "\n", r"no clips; the table has no rows"),
        ("metadata.csv", "path,text\n", r"no clips; the table has no rows"),
        ("metadata.csv", "path,text\na.mp4,a cat, asleep\n", r"csv:2: its number of fields differs"),
        ("metadata.csv", "path,text\na.mp4\n", r"csv:2: its number of fields differs"),
        ("metadata.csv", 'path,text\na.mp4,"open\n', r"csv:2: not valid CSV"),
        ("metadata.parquet", "PAR1 not", r"metadata\.parquet: cannot be read as parquet"),
    ],
)
def test_broken_tables_are_named(folder, name, text, reason):
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=reason):
        find(folder)


def test_a_byte_order_mark_is_ignored(folder):
    (folder / "metadata.csv").write_text("path,text\na.mp4,x\n", encoding="utf-8-sig")
    assert find(folder)[0].name == "a.mp4"


def test_two_tables_are_one_too_many(folder):
    write_rows(folder, "jsonl", ROWS)
    write_rows(folder, "csv", ROWS)
    with pytest.raises(DataError, match=r"has metadata\.jsonl, metadata\.csv; keep one"):
        find(folder)


def test_another_file_is_no_table(folder):
    with pytest.raises(DataError, match=r"a\.mp4: not a folder or a \.jsonl, \.csv, \.parquet file"):
        find(folder / "a.mp4")


# ---------------------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture
def saved(make_clip, tmp_path):
    """A dataset on disk with embedded videos, as `Video` columns hold them."""
    import datasets

    files = [make_clip(f"raw/{n}.mp4", numbered(n + 3)).read_bytes() for n in range(2)]
    rows = {
        "video": [{"bytes": data, "path": None} for data in files],
        "text": ["one", "two"],
        "source": ["x", "y"],
    }
    features = datasets.Features(
        {"video": datasets.Video(decode=True), "text": datasets.Value("string"), "source": datasets.Value("string")}
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_hugging_face_videos_are_read_without_its_decoder(saved):
    found = find(saved, source="huggingface", split="train")
    assert [clip.caption for clip in found] == ["one", "two"]
    assert [dict(clip.extra) for clip in found] == [{"source": "x"}, {"source": "y"}]
    assert [video.probe(clip.media).frames for clip in found] == [3, 4]
    assert found[1].name == f"{saved}[1]"


@pytest.mark.parametrize(
    ("split", "reason"), [(None, r"set data\.split; it has train, test"), ("dev", r"no split 'dev' \(data\.split\)")]
)
def test_hugging_face_splits_are_listed(saved, split, reason):
    with pytest.raises(DataError, match=reason):
        find(saved, source="huggingface", split=split)


def test_a_hugging_face_dataset_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="absent: the Hugging Face dataset cannot be loaded"):
        find(tmp_path / "absent", source="huggingface")


def test_images_are_clips_and_may_share_the_caption_of_a_video(folder):
    (folder / "a.png").write_bytes(b"image")
    assert [(clip.name, clip.caption) for clip in find(folder)] == [
        ("a.mp4", "caption a"), ("a.png", "caption a"), ("b.mp4", "caption b"),
    ]  # fmt: skip
    (folder / "a.webp").write_bytes(b"image")
    with pytest.raises(DataError, match=r"a\.webp: duplicate of a\.png"):
        find(folder)
