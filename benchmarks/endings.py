"""End training in every way that a run can end, look at what is left and said, and go on from it.

    python benchmarks/endings.py OUT

recipes/svd_finetune.py on the pocket model, image-to-video, on a CPU: an undisturbed run first; then, for each ending,
a run that is disturbed after its fifth step, or while it writes a checkpoint, and one that goes on from what it left
with training.resume=latest. Each ending must leave a whole checkpoint and name it, unless killed; every tensor of the
last checkpoint and of the export must equal the undisturbed run's, bit for bit (where two processes were at work:
closely).
The disks are small ones of their own, which only root can mount. Writes OUT/endings.json; the exit status is 1 if
anything is not as it must be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from inflate import config as configuration
from inflate.data.demo_clips import build
from inflate.errors import report_errors
from inflate.training import checkpoint
from kill_and_resume import COMMON, STAGES, being_written, different, recipe, tensors
from record import command, record, write

STEPS, DISTURBED = 8, 5
SETTINGS = (
    *COMMON, *STAGES["image_to_video"], "stage=image_to_video", f"training.steps={STEPS}", "training.progress=true",
    "training.checkpoint_every=4", "training.evaluate_every=0", "data.memory_megabytes=0",
)  # fmt: skip
PATIENCE = 600.0
"""Seconds that any run may take."""


@dataclass
class Running:
    """A run under way: its process group, its folder, its words."""

    group: int
    output: Path
    log: Path
    wait: Callable[[], int]
    """Waits for its end; the exit status, minus the signal's number where one killed it."""

    def says(self, pattern: str) -> None:
        """Wait until the log holds a pattern."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, self.log.read_text(errors="replace")):
            if time.monotonic() > deadline or not alive(self.group):
                sys.exit(f"{self.log} never said {pattern!r}")
            time.sleep(0.005)

    def has_done(self, steps: int) -> None:
        """Wait until the progress bar counts so many steps."""
        self.says(rf"\b[{steps}-9]/{STEPS} ")

    def send(self, number: signal.Signals) -> None:
        """Signal the training process and those that read for it, as a terminal does."""
        os.killpg(self.group, number)


@dataclass(frozen=True)
class Ending:
    """One way to end: how, what mends it, and what must come of it."""

    name: str
    disturb: Callable[[Running], None]
    statuses: tuple[int, ...]
    says: str
    """What the log must say."""
    mend: Callable[[Path], None] = lambda output: None
    disk: bool = False
    processes: int = 1


# --- the endings ------------------------------------------------------------------------------------------------------


def interrupt_once(run: Running) -> None:
    run.has_done(DISTURBED)
    run.send(signal.SIGINT)


def interrupt_twice(run: Running) -> None:
    interrupt_once(run)
    run.says("once more to stop at once")
    run.send(signal.SIGINT)


def terminate(run: Running) -> None:
    run.has_done(DISTURBED)
    run.send(signal.SIGTERM)


def kill_mid_save(run: Running) -> None:
    run.has_done(DISTURBED)
    while not any(name.startswith("checkpoint") for name in being_written(run.output, psutil.Process(run.group))):
        time.sleep(0.0005)
    run.send(signal.SIGKILL)


def clip(output: Path) -> Path:
    return sorted((output.parent / "clips" / "train").glob("*.mp4"))[0]


def vanish(run: Running) -> None:
    run.has_done(2)  # of an epoch of three: the next one needs every clip
    clip(run.output).rename(clip(run.output).with_suffix(".away"))


def put_back(output: Path) -> None:
    [away] = (output.parent / "clips" / "train").glob("*.away")
    away.rename(away.with_suffix(".mp4"))


def fill(run: Running) -> None:
    run.has_done(DISTURBED)
    for size in (2**20, 2**12):
        with contextlib.suppress(OSError), (run.output.parent / "filler").open("ab", buffering=0) as file:
            while True:
                file.write(bytes(size))


def unfill(output: Path) -> None:
    (output.parent / "filler").unlink()


def remount(how: str, disk: Path) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


def lock(run: Running) -> None:
    run.has_done(DISTURBED)
    remount("ro", run.output.parent)


def unlock(output: Path) -> None:
    remount("rw", output.parent)


def kill_rank(run: Running) -> None:
    run.has_done(DISTURBED)
    ranks = [one for one in psutil.Process(run.group).children(True) if one.environ().get("RANK") == "1"]
    ranks[0].kill()


GOES_ON = r"the last whole checkpoint is \S+/checkpoint-\d+: training.resume=latest goes on from it"
FULL, LOCKED = "No space left on device", "Read-only file system"
ENDINGS = (
    Ending("ctrl-C", interrupt_once, (130,), r"stopped by SIGINT at step \d; \S+ is whole"),
    Ending("ctrl-C twice", interrupt_twice, (130,), f"SIGINT again: stopped at once\n  {GOES_ON}"),
    Ending("SIGTERM", terminate, (143,), r"stopped by SIGTERM at step \d; \S+ is whole"),
    Ending("kill -9 mid-save", kill_mid_save, (-9,), ""),
    Ending("vanished clip", vanish, (1,), f"error: \\S+mp4: no such file\n  {GOES_ON}", put_back),
    Ending("full disk", fill, (1,), f"error: .* cannot be written: .*{FULL}.*\n  {GOES_ON}", unfill, disk=True),
    Ending("read-only disk", lock, (1,), f"error: .* cannot be written: .*{LOCKED}.*\n  {GOES_ON}", unlock, disk=True),
    Ending("killed process of two", kill_rank, (1,), f"error: another process has ended.*\n  {GOES_ON}", processes=2),
)


# --- one run ----------------------------------------------------------------------------------------------------------


def train(arguments: list[str], log: Path) -> None:
    """The recipe as from its command line, in a process group of its own with the processes that read clips."""
    os.setpgid(0, 0)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    with report_errors():
        recipe.main(configuration.load(recipe.Config, arguments), arguments)


def begin(output: Path, log: Path, processes: int = 1) -> Running:
    """Start the recipe: alone in a forked process, which shares the imports, or several by accelerate's launcher."""
    arguments = [*SETTINGS, f"data.path={output.parent / 'clips'}", f"training.output={output}"]
    log.touch()
    if processes == 1:
        process = get_context("fork").Process(target=train, args=(arguments, log))
        process.start()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(process.pid or 0, process.pid or 0)  # by whoever is first, it or its child
        return Running(process.pid or 0, output, log, lambda: _joined(process))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--multi_gpu"]
    words = [*launcher, "--num_processes", str(processes), recipe.__file__, *arguments, "training.accumulate=1"]
    with log.open("a") as file:
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        started = subprocess.Popen(words, stdout=file, stderr=file, process_group=0, env=environment)
    return Running(started.pid, output, log, lambda: started.wait(PATIENCE))


def _joined(process: BaseProcess) -> int:
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        sys.exit(f"a run of {PATIENCE:g} s")
    return process.exitcode


def alive(group: int) -> bool:
    """Whether any process of a group is at work."""
    try:
        members = [one for one in psutil.process_iter() if os.getpgid(one.pid) == group]
    except ProcessLookupError:  # one that ended meanwhile
        return alive(group)
    return any(one.status() != psutil.STATUS_ZOMBIE for one in members if one.is_running())


def outlived(group: int) -> float | None:
    """Seconds for which processes that read clips outlive the training process; None if they do not end."""
    began = time.monotonic()
    while alive(group):
        if time.monotonic() - began > 30:
            return None
        time.sleep(0.1)
    return round(time.monotonic() - began, 1)


@contextlib.contextmanager
def place(ending: Ending, root: Path) -> Iterator[Path]:
    """A folder with the clips for one ending, on a small disk of its own where it needs one."""
    folder = root / re.sub(r"\W+", "-", ending.name)
    folder.mkdir()
    if ending.disk:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", folder], check=True)
    try:
        build(folder / "clips", clips=6, held_out=2)
        yield folder
    finally:
        if ending.disk:
            subprocess.run(["umount", "--lazy", folder], check=True)  # tensors read from it are still mapped


# --- what is left and said --------------------------------------------------------------------------------------------


def last_words(log: Path, folder: Path) -> list[str]:
    """What a run said of its end, without its progress bar, the place where it ran and its launcher's report."""
    text = own_words(log).replace(str(folder), "OUT")
    lines = [line for line in text.splitlines() if f"/{STEPS} [" not in line]
    first = [n for n, line in enumerate(lines) if re.match(r"error: |stopped by|SIG(INT|TERM)", line)]
    return [line for line in lines[first[0] :] if line.strip()] if first else []


def own_words(log: Path) -> str:
    """What a run said itself: what torch's launcher says of processes that ended comes last."""
    text = re.sub(r"[^\n]*\r", "", log.read_text(errors="replace"))
    return re.split(r"\nE\d+ .*torch/distributed/elastic", text)[0]


def examine(ending: Ending, arguments: argparse.Namespace, expected: dict[str, Any]) -> dict[str, Any]:
    """End a run in one way and go on from what it left."""
    with place(ending, arguments.output) as folder:
        output, log = folder / "run", arguments.output / f"{folder.name}.log"
        run = begin(output, log, ending.processes)
        ending.disturb(run)
        began = time.monotonic()
        status = run.wait()
        seconds = round(time.monotonic() - began, 1)
        left, after = checkpoint.latest(output), outlived(run.group)
        ending.mend(output)
        said = own_words(log)
        again = begin(output, log.with_suffix(".resumed.log")).wait()
        found = tensors(output, STEPS)
        result = {
            "ending": ending.name, "exit status": status, "seconds to the end": seconds,
            "seconds that readers outlived it": after, "checkpoint left": left and left.name,
            "last words": last_words(log, folder), "exit status of the resumed run": again,
            "tensors compared": len(found), "different": different(expected, found),
        }  # fmt: skip
        exact = not result["different"]
        if ending.processes > 1:
            result["largest difference"] = apart = largest(expected, found)
            result["different"] = len(result["different"])
            exact = apart < 1e-3
        good = status in ending.statuses and left is not None and after is not None and again == 0 and exact
        result["as it must be"] = good and bool(re.search(ending.says, said)) and "Traceback" not in said
        return result


def largest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of any number, relative to its tensor's largest."""
    pairs = [(value.float(), other[name].float()) for name, value in one.items()]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", choices=[one.name for one in ENDINGS], help="one ending")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    undisturbed = Ending("undisturbed", lambda run: None, (0,), "")
    with place(undisturbed, arguments.output) as folder:
        if begin(folder / "run", arguments.output / "undisturbed.log").wait() != 0:
            sys.exit(f"the undisturbed run failed; see {arguments.output / 'undisturbed.log'}")
        expected = tensors(folder / "run", STEPS)
    results = []
    for ending in ENDINGS:
        if arguments.only in (None, ending.name):
            results.append(examine(ending, arguments, expected))
            print(json.dumps(results[-1], indent=1), flush=True)
    write(arguments.output / "endings.json", record(command("OUT"), {"steps": STEPS, "endings": results}))
    sys.exit(not all(one["as it must be"] for one in results))


if __name__ == "__main__":
    main()
