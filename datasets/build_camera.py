"""Build clips of one exact movement of the camera, from pictures or from frames of clips.

python datasets/build_camera.py PICTURES OUT --move pan_left --clips 12 --held-out 4
python datasets/build_camera.py --demo OUT --move zoom_in --clips 64 --held-out 8
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from inflate.data import camera
from inflate.errors import DataError, InflateError
from inflate.metrics.folders import parse_size


def main() -> None:
    """Read the command line, build, and say where the clips are."""
    parser = argparse.ArgumentParser(description="Build clips of one exact movement of the camera.")
    parser.add_argument("pictures", nargs="?", type=Path, help="folder or metadata table of stills or clips")
    parser.add_argument("folder", type=Path, metavar="OUT", help="a new folder for the clips")
    parser.add_argument("--demo", action="store_true", help="film the demo world in place of PICTURES")
    parser.add_argument("--move", required=True, choices=camera.MOVES)
    parser.add_argument("--clips", type=int, default=12, help="training clips (default 12)")
    parser.add_argument("--held-out", type=int, default=4, help="held-out clips, of other pictures (default 4)")
    parser.add_argument("--size", default="64x64", metavar="WxH", help="pixels (default 64x64)")
    parser.add_argument("--frames", type=int, default=camera.Shot.frames, help="default 16")
    parser.add_argument("--fps", type=float, default=camera.Shot.fps, help="frames per second (default 8)")
    parser.add_argument("--slowest", type=float, default=camera.Shot.slowest, help="sides per second (default 0.12)")
    parser.add_argument("--fastest", type=float, default=camera.Shot.fastest, help="sides per second (default 0.24)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    try:
        folder = build(parser.parse_args())
    except InflateError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {folder}")


def build(told: argparse.Namespace) -> Path:
    """The clips that a command line asks for."""
    if told.demo == (told.pictures is not None):
        raise DataError("name a folder of pictures or clips, or --demo, and one of them only")
    height, width = parse_size(told.size)
    shot = camera.Shot(told.move, told.frames, height, width, told.fps, told.slowest, told.fastest)
    count = told.clips + told.held_out
    takes = camera.from_demo(count, shot, told.seed) if told.demo else camera.from_files(told.pictures)
    return camera.build(told.folder, takes, shot, told.clips, told.held_out, told.seed)


if __name__ == "__main__":
    main()
