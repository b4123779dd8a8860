"""Reading and writing videos, sound and damaged."""

from __future__ import annotations

import pickle
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clip_files import busy, cut, damage, numbered
from PIL import Image

from inflate.data import video
from inflate.errors import DataError


def levels(frames):
    """The frame numbers that `numbered` painted."""
    return [round((float(frame.mean()) - 16) / 8) for frame in frames]


def test_probe_counts_frames_that_decode(make_clip):
    found = video.probe(make_clip("a.mp4", numbered(20), fps=8))
    assert (found.frames, found.width, found.height, found.rotation) == (20, 48, 32, 0)
    assert found.fps == pytest.approx(8)
    assert found.duration == pytest.approx(2.5)
    assert not found.variable


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.ts", "libx264")]
)
def test_other_containers_read_the_same(make_clip, name, codec):
    path = make_clip(name, numbered(14), codec=codec)
    found = video.probe(path)
    assert found.frames == 14
    assert found.fps == pytest.approx(8, rel=0.01)
    assert levels(video.read(path, [3, 7, 13], found)) == [3, 7, 13]


def test_the_codec_is_told_with_its_pixel_format(make_clip):
    assert video.codec(make_clip("a.mp4", numbered(4))) == "h264/yuv420p"
    assert video.codec(make_clip("a.avi", numbered(4), codec="mpeg4")) == "mpeg4/yuv420p"


def test_seeking_reads_what_reading_all_reads(make_clip):
    path = make_clip("a.mp4", busy(40), gap=7)
    found, whole = video.scan(path, limit=2**30)
    assert whole is not None
    for indices in ([0, 1], [6, 7, 8], [13, 20, 39], [39], [25, 25, 26]):
        np.testing.assert_array_equal(video.read(path, indices, found), whole[indices])


def test_seeking_decodes_from_the_key_frame_only(make_clip, monkeypatch):
    path = make_clip("a.mp4", busy(40), gap=10)
    found = video.probe(path)
    seen = []
    original = video._pixels
    monkeypatch.setattr(video, "_walked", lambda *_: pytest.fail("read from the beginning"))
    monkeypatch.setattr(video, "_pixels", lambda frame, *rest: (seen.append(frame.pts), original(frame, *rest))[1])
    video.read(path, [35], found)
    assert seen == [found.stamps[35]]


def test_open_groups_of_pictures_fall_back_to_reading_from_the_start(make_clip, monkeypatch):
    open_groups = {"x264-params": "open-gop=1:keyint=6:min-keyint=6:scenecut=0:bframes=3:b-adapt=0"}
    path = make_clip("a.mp4", busy(30), encoder=open_groups)
    found, whole = video.scan(path, limit=2**30)
    original, walks = video._walked, []
    monkeypatch.setattr(video, "_walked", lambda *given: (walks.append(given), original(*given))[1])
    for indices in ([n, n + 1] for n in range(29)):
        np.testing.assert_array_equal(video.read(path, indices, found), whole[indices])
    assert len(walks) > 1  # more than the window at frame 0: some key frame had leading pictures


def test_variable_rate_goes_by_time_stamps(make_clip):
    stamps = [0, 100, 200, 300, 900, 1000, 1100, 1200]
    path = make_clip("a.mkv", numbered(8), fps=10, stamps=stamps)
    found = video.probe(path)
    assert found.variable
    np.testing.assert_allclose(found.times, np.array(stamps) / 1000, atol=2e-3)
    assert found.shown_at([0.0, 0.25, 0.5, 0.8, 0.95, 1.15, 9.0]) == [0, 2, 3, 3, 4, 6, 7]


def test_a_rotated_phone_video_is_upright(make_clip):
    frames = numbered(4)
    frames[:] = 40
    frames[:, :, 24:] = 200  # right half bright
    found, upright = video.scan(make_clip("a.mp4", frames, rotation=90), limit=2**30)
    assert (found.width, found.height, found.rotation) == (32, 48, 90)
    assert upright.shape == (4, 48, 32, 3)
    assert upright[0, :20].mean() > 190  # counter-clockwise: right becomes top
    assert upright[0, 28:].mean() < 50


def test_rotation_is_applied_before_fitting(make_clip):
    path = make_clip("a.mp4", numbered(3, 32, 64), rotation=-90)
    assert video.read(path, size=(64, 32)).shape == (3, 64, 32, 3)
    assert video.probe(path).rotation == 270


def test_oblong_pixels_become_square(make_clip):
    found = video.probe(make_clip("a.mp4", numbered(3, 32, 32), ratio=Fraction(3, 2)))
    assert (found.width, found.height) == (48, 32)


def test_fitting_covers_and_crops_the_centre(make_clip):
    frames = np.zeros((3, 64, 128, 3), np.uint8)
    frames[:, :, 32:96] = 255  # the centre square
    fitted = video.read(make_clip("a.mp4", frames), size=(32, 32))
    assert fitted.shape == (3, 32, 32, 3)
    assert fitted[:, :, 2:-2].min() > 240


def test_a_limit_keeps_no_frames_but_still_counts(make_clip):
    found, frames = video.scan(make_clip("a.mp4", numbered(10)), limit=5000)
    assert frames is None
    assert found.frames == 10


# ---------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize(("name", "share"), [(f"cut.{k}", s) for k in ("mp4", "mkv", "avi") for s in (0.5, 0.8)])
def test_a_truncated_file_is_named(make_clip, name, share):
    path = cut(make_clip(name, busy(40), codec="mpeg4" if name.endswith("avi") else "libx264"), share)
    with pytest.raises(DataError, match=rf"{name}: (truncated|only one frame)"):
        video.probe(path)


def test_an_mp4_cut_before_its_index_is_named(make_clip):
    path = make_clip("late.mov", busy(10))
    with pytest.raises(DataError, match=r"late\.mov: not a readable video: corrupt, cut short"):
        video.probe(cut(path, 0.7))


def test_damaged_picture_data_is_named_not_painted_over(make_clip):
    with pytest.raises(DataError, match=r"bad\.mp4: corrupt: .* after \d+ of 30 frames"):
        video.probe(damage(make_clip("bad.mp4", busy(30))))


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(DataError, match=r"empty\.mp4: the file is empty \(0 bytes\)"):
        video.probe(tmp_path / "empty.mp4")


def test_a_video_without_frames_is_named(make_frameless):
    with pytest.raises(DataError, match=r"none\.mkv: no frame decodes"):
        video.probe(make_frameless("none.mkv"))
    with pytest.raises(DataError, match=r"none\.mp4: no video stream; it holds nothing"):  # mp4 forgets empty tracks
        video.probe(make_frameless("none.mp4"))


def test_a_missing_tail_is_not_counted(make_clip):
    path = cut(make_clip("tail.mkv", busy(40)), 0.97)
    assert 30 < video.probe(path).frames < 40
    assert video.probe(path).frames == len(video.read(path))


def test_sound_alone_is_named(make_sound):
    with pytest.raises(DataError, match=r"song\.mp4: no video stream; it holds only audio"):
        video.probe(make_sound("song.mp4"))


def test_one_frame_is_named(make_clip):
    with pytest.raises(DataError, match=r"still\.mp4: only one frame decodes"):
        video.probe(make_clip("still.mp4", numbered(1)))


def test_a_text_called_mp4_is_named(tmp_path):
    (tmp_path / "notes.mp4").write_text("not a video " * 50)
    with pytest.raises(DataError, match=r"notes\.mp4: not a readable video"):
        video.probe(tmp_path / "notes.mp4")


def test_an_unknown_codec_is_named(make_clip):
    path = make_clip("odd.mp4", numbered(5))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(DataError, match=r"odd\.mp4: its codec is unknown"):
        video.probe(path)


def test_a_wrong_extension_is_no_obstacle(make_clip):
    path = make_clip("really_matroska.mp4", numbered(5), kind="matroska")
    assert levels(video.read(path)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("name", "reason"), [("absent.mp4", "no such file"), ("folder.mp4", "not a file")])
def test_what_is_not_a_file_is_named(tmp_path, name, reason):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(DataError, match=f"{name}: {reason}"):
        video.read(tmp_path / name)


@pytest.mark.parametrize("indices", [[], [-1], [5], [2, 1]])
def test_wrong_frame_numbers_are_refused(make_clip, indices):
    path = make_clip("a.mp4", numbered(5))
    with pytest.raises(DataError, match=r"a\.mp4: frames"):
        video.read(path, indices, video.probe(path))


def test_a_file_replaced_after_its_check_is_noticed(make_clip):
    found = video.probe(make_clip("a.mp4", numbered(20)))
    path = make_clip("a.mp4", numbered(10))
    with pytest.raises(DataError, match=r"a\.mp4: frame 15 no longer decodes; did the file change"):
        video.read(path, [5, 15], found)


# ---------------------------------------------------------------------------------------------------- embedded


def test_embedded_bytes_read_like_a_file(make_clip):
    path = make_clip("a.mp4", numbered(6))
    media = video.Embedded([{"video": {"bytes": path.read_bytes(), "path": None}}], 0, "video", "set[0]")
    media = pickle.loads(pickle.dumps(media))
    np.testing.assert_array_equal(video.read(media), video.read(path))


@pytest.mark.parametrize("value", [{"bytes": None, "path": None}, None, {"bytes": b"", "path": ""}])
def test_an_empty_row_is_named(value):
    with pytest.raises(DataError, match=r"set\[0\]: the row holds no video"):
        video.probe(video.Embedded([{"video": value}], 0, "video", "set[0]"))


def test_damaged_bytes_are_named():
    media = video.Embedded([{"video": {"bytes": b"junk" * 30}}], 0, "video", "set[0]")
    with pytest.raises(DataError, match=r"set\[0\]: not a readable video"):
        video.probe(media)


# ---------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 180, 30), (255, 255, 255)])
def test_colours_survive_writing_and_reading(tmp_path, colour):
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    frames[:] = colour
    read = video.read(video.write(tmp_path / "a.mp4", frames, 8))
    assert np.abs(read.astype(int) - frames).max() <= 3


def test_what_is_written_plays_everywhere(tmp_path):
    path = video.write(tmp_path / "new" / "a.mp4", busy(5), 7.5)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(15, 2)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_odd_sizes_are_padded_by_repeating_the_edge(tmp_path):
    frames = np.full((3, 31, 45, 3), 30, np.uint8)
    frames[:, -1:] = frames[:, :, -1:] = 220
    read = video.read(video.write(tmp_path / "a.mp4", frames, 8, quality=1))
    assert read.shape == (3, 32, 46, 3)
    assert read[:, 31].mean() > 190
    assert read[:, :, 45].mean() > 190


def test_writing_is_reproducible(tmp_path):
    first, second = (video.write(tmp_path / name, busy(6), 8).read_bytes() for name in ("a.mp4", "b.mp4"))
    assert first == second


@pytest.mark.parametrize(
    ("name", "frames", "fps", "reason"),
    [
        ("a.gif", numbered(2), 8, "written as .mp4"),
        ("a.mp4", numbered(2).astype(np.float32), 8, "must be uint8"),
        ("a.mp4", numbered(2)[0], 8, "must be uint8"),
        ("a.mp4", numbered(2)[:0], 8, "must be uint8"),
        ("a.mp4", numbered(2), 0, "fps must be a positive number"),
        ("a.mp4", numbered(2), float("nan"), "fps must be a positive number"),
    ],
)
def test_wrong_frames_are_refused_before_writing(tmp_path, name, frames, fps, reason):
    with pytest.raises(DataError, match=reason):
        video.write(tmp_path / name, frames, fps)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = video.write(tmp_path / "a.mp4", numbered(3), 8)
    before = path.read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(DataError, match=r"a\.mp4: cannot be written \(No space left on device\)"):
        video.write(path, numbered(5), 8)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_parts_are_written_as_the_whole(tmp_path):
    whole = video.write(tmp_path / "a.mp4", busy(7, 31, 45), 8).read_bytes()
    parts = iter([busy(7, 31, 45)[:3], busy(7, 31, 45)[3:]])
    assert video.write_parts(tmp_path / "b.mp4", parts, 8).read_bytes() == whole
    with pytest.raises(DataError, match="must be uint8"):
        video.write_parts(tmp_path / "c.mp4", iter(()), 8)


def test_parts_that_stop_coming_leave_nothing(tmp_path):
    def parts():
        yield numbered(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        video.write_parts(tmp_path / "a.mp4", parts(), 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("together", [1, 4, 7, 100])
def test_a_walk_reads_every_frame_once(make_clip, together):
    path = make_clip("a.mp4", numbered(7), gap=3, rotation=90)
    parts = list(video.walk(path, together))
    assert [len(part) for part in parts[:-1]] == [together] * (len(parts) - 1)
    np.testing.assert_array_equal(np.concatenate(parts), video.read(path))


def test_a_walk_stops_at_damage(make_clip):
    path = damage(make_clip("a.mp4", busy(40)))
    with pytest.raises(DataError, match=r"a\.mp4: (corrupt|truncated)"):
        list(video.walk(path))


def test_sound_is_told(make_clip, tmp_path):
    silent = make_clip("a.mp4", numbered(3))
    assert not video.has_sound(silent)
    with av.open(str(tmp_path / "b.mkv"), "w") as container:
        picture, sound = (
            container.add_stream("libx264", rate=8),
            container.add_stream("aac", rate=16_000, layout="mono"),
        )
        picture.height, picture.width = 32, 48
        for pixels in numbered(3):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux([*sound.encode(frame), *sound.encode(), *picture.encode()])
    assert video.has_sound(tmp_path / "b.mkv")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"a\.mp4: cannot be written"):
        video.write(tmp_path / "file" / "a.mp4", numbered(3), 8)


# ---------------------------------------------------------------------------------------------------- stills


def test_contact_sheet_has_a_row_per_video(tmp_path):
    rows = [numbered(16, 64, 64), numbered(4, 64, 64)]
    path = video.contact_sheet(tmp_path / "sheet.png", rows, columns=4)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * 130, 4 * 130, 3)  # frames doubled, one pixel of border
    first = [sheet[65, 65 + 130 * k, 0] for k in range(4)]
    assert first == [16, 56, 96, 136]  # frames 0, 5, 10, 15
    assert [sheet[195, 65 + 130 * k, 0] for k in range(4)] == [16, 24, 32, 40]


def test_labels_stand_left_of_the_rows(tmp_path):
    rows = [numbered(2, 128, 128)] * 2
    plain = Image.open(video.contact_sheet(tmp_path / "a.png", rows))
    labelled = np.asarray(Image.open(video.contact_sheet(tmp_path / "b.png", rows, ["before", "after training"])))
    margin = labelled.shape[1] - plain.width
    assert margin > 50
    for half in np.split(labelled[:, :margin], 2):
        assert half.min() < 100  # ink
    np.testing.assert_array_equal(labelled[:, margin:], np.asarray(plain))


@pytest.mark.parametrize(
    ("rows", "labels"),
    [([], None), ([numbered(2), numbered(2, 16, 16)], None), ([numbered(2)], ["a", "b"]), ([numbered(2)[:0]], None)],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, rows, labels):
    with pytest.raises(DataError, match=r"sheet\.png"):
        video.contact_sheet(tmp_path / "sheet.png", rows, labels)


def test_images_are_fitted_like_videos(tmp_path):
    image = np.zeros((64, 128, 3), np.uint8)
    image[:, 32:96] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    assert video.read_image(tmp_path / "a.png").shape == (64, 128, 3)
    fitted = video.read_image(tmp_path / "a.png", (32, 32))
    assert fitted.shape == (32, 32, 3)
    assert fitted[:, 2:-2].min() > 240


@pytest.mark.parametrize(
    ("name", "reason"), [("absent.png", "no such file"), ("notes.png", "cannot be read as an image")]
)
def test_unreadable_images_are_named(tmp_path, name, reason):
    (tmp_path / "notes.png").write_text("hello")
    with pytest.raises(DataError, match=f"{name}: {reason}"):
        video.read_image(tmp_path / name)


def test_a_still_is_a_clip_of_one_frame(tmp_path):
    image = np.zeros((64, 128, 3), np.uint8)
    image[:, 32:96] = 255
    Image.fromarray(image).save(tmp_path / "a.PNG")
    found, frames = video.scan(tmp_path / "a.PNG", lambda width, height: (height // 2, height // 2), limit=2**20)
    assert found.is_image
    assert (found.frames, found.width, found.height) == (1, 128, 64)
    assert frames.shape == (1, 32, 32, 3)
    assert frames[:, :, 2:-2].min() > 240
    np.testing.assert_array_equal(video.read(tmp_path / "a.PNG", [0], found, (32, 32)), frames)


def test_a_size_may_depend_on_the_upright_frame(make_clip):
    path = make_clip("a.mp4", numbered(3, 32, 64), rotation=-90)
    _, frames = video.scan(path, lambda width, height: (height // 2, width // 2), limit=2**20)
    assert frames.shape == (3, 32, 16, 3)


def test_a_claim_of_too_many_pixels_is_refused(make_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MOST_PIXELS", 40 * 40)
    Image.new("RGB", (64, 32)).save(tmp_path / "large.webp")
    with pytest.raises(DataError, match=r"large\.webp: claims 64x32 pixels"):
        video.scan(tmp_path / "large.webp")
    with pytest.raises(DataError, match=r"large\.mp4: "):
        video.scan(make_clip("large.mp4", busy(3)))
