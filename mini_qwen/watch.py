"""Threads that see what a training loop cannot: a launcher that is gone, a process of the run that stands still."""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mini_qwen.interruption import EXIT_CODE, interruption, say

RANKS = ".ranks"
ORPHAN_SECONDS = 8.0  # from the end of the launcher to the end of its processes, with a checkpoint or without
BEAT_SECONDS = 2.0
STOPPED_SECONDS = 60.0
LAUNCHER = "MINI_QWEN_LAUNCHER"  # in the environment: the number of the process, run.sh or mini_qwen.launch
LAUNCHERS = (LAUNCHER, "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


def call_when_orphaned(action: Callable[[], None]) -> None:
    """Call `action` in a thread of its own when the process that launched this one has ended.

    Only a launcher, which says so in the environment, must not be outlived; a shell or nohup may be.
    """
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))

    def wait() -> None:
        while os.getppid() == launcher:
            time.sleep(BEAT_SECONDS / 2)
        action()

    if any(name in os.environ for name in LAUNCHERS):
        threading.Thread(target=wait, daemon=True, name="orphan").start()


def end_as_orphan() -> None:
    """Leave a training loop a few seconds to reach a step border and save, then end in any case."""
    interruption.request("the launcher is gone")
    if interruption.training:
        time.sleep(ORPHAN_SECONDS)  # the process ends meanwhile, if it can
    os._exit(EXIT_CODE)


class Heartbeat(threading.Thread):
    """Each process of several writes its step into output_dir/.ranks/RANK every few seconds, and reads the others'.

    Who looks for STOPPED_SECONDS and finds one that has not done so says which and at which step, and ends; the
    launcher then ends the others. Without it all would wait for the one that is stopped, half an hour and without a
    word. Looks are counted, not seconds: when all are frozen together, none is to blame.
    """

    def __init__(self, output_dir: Path, rank: int, num_ranks: int) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self.folder, self.rank = output_dir / RANKS, rank
        self.step = 0  # set by the trainer
        self.ended = threading.Event()
        self.first = {other: self.read(other) for other in range(num_ranks) if other != rank}  # of an earlier run
        self.seen = {other: (content, 0) for other, content in self.first.items()}  # and looks without a change

    def run(self) -> None:
        beats = 0
        while not self.ended.wait(BEAT_SECONDS):
            beats += 1
            self.write(beats)
            for other in self.seen:
                self.look_at(other)

    def end(self) -> None:
        self.ended.set()
        self.join()

    def clear(self) -> None:
        """Remove what all processes wrote, once all have ended theirs."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, beats: int) -> None:
        with contextlib.suppress(OSError):  # a full disk is the next save's to report
            self.folder.mkdir(parents=True, exist_ok=True)
            fresh = self.folder / f"{self.rank}.new"
            fresh.write_text(f"{self.step} {os.getpid()} {beats}")
            fresh.replace(self.folder / str(self.rank))

    def read(self, other: int) -> str:
        try:
            return (self.folder / str(other)).read_text()
        except OSError:
            return ""

    def look_at(self, other: int) -> None:
        content, (before, looks) = self.read(other), self.seen[other]
        self.seen[other] = (content, looks + 1 if content == before else 0)
        silent = self.seen[other][1] * BEAT_SECONDS
        if content not in ("", self.first[other]) and silent > STOPPED_SECONDS:
            step, process, _ = content.split()
            say(
                f"rank {other} (process {process}) stands still since {silent:.0f} s, last heard of at step {step}: "
                "it was stopped, or its machine is gone. This run ends; its newest checkpoint is whole."
            )
            os._exit(1)
