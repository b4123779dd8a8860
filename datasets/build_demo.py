"""Build the demo clips: textured shapes that move over textured backgrounds, with captions and exact motion.

python datasets/build_demo.py [FOLDER] [--clips 600] [--held-out 64] [--seed 0] [--size 64] [--told 0]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from inflate.data.demo_clips import build
from inflate.errors import InflateError


def main() -> None:
    """Read the command line, build, and say where the clips are."""
    parser = argparse.ArgumentParser(description="Build the demo clips.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("datasets/demo"))
    parser.add_argument("--clips", type=int, default=600, help="training clips (default 600)")
    parser.add_argument("--held-out", type=int, default=64, help="held-out clips (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--size", type=int, default=64, help="pixels a side, of the same scenes (default 64)")
    parser.add_argument(
        "--told", type=float, default=0.0, help="share whose caption alone says how they move (default 0)"
    )
    arguments = parser.parse_args()
    try:
        counts = arguments.clips, arguments.held_out
        folder = build(arguments.folder, *counts, arguments.seed, arguments.size, told=arguments.told)
    except InflateError as error:
        sys.exit(f"error: {error}")
    print(f"{folder}: {arguments.clips} training and {arguments.held_out} held-out clips")


if __name__ == "__main__":
    main()
