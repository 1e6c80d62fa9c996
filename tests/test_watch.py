"""mini_qwen/watch.py: no process outlives its launcher, and one that stands still is named."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from programs import ROOT

from mini_qwen.watch import LAUNCHER, STOPPED_SECONDS, Heartbeat

WORKER = """
import sys, time
from mini_qwen.interruption import interruption
from mini_qwen.watch import call_when_orphaned, end_as_orphan
interruption.listen(speaks=True)
call_when_orphaned(end_as_orphan)
interruption.training = sys.argv[1] == "training"
print("started", flush=True)
time.sleep(100)
"""
LAUNCH = """
import os, subprocess, sys
os.environ["MINI_QWEN_LAUNCHER"] = str(os.getpid()) if sys.argv[2] == "launcher" else ""
if sys.argv[2] != "launcher":
    del os.environ["MINI_QWEN_LAUNCHER"]
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[3]]).returncode)
"""
BEATING = """
import sys, time
from pathlib import Path
from mini_qwen import watch
watch.BEAT_SECONDS, watch.STOPPED_SECONDS = 0.05, 1.0
rank = int(sys.argv[2])
heart = watch.Heartbeat(Path(sys.argv[1]), rank, 2)
heart.start()
heart.step = 7 + rank
print("started", flush=True)
time.sleep(30)
"""


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    return process


@pytest.mark.parametrize("state", ["training", "preparing"])
def test_no_worker_is_alive_10_seconds_after_its_launcher(state: str) -> None:
    """Not even one whose training never reaches a step border."""
    launcher = start(LAUNCH, WORKER, "launcher", state)
    (worker,) = psutil.Process(launcher.pid).children()
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    ends_at = time.monotonic() + 10
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < ends_at:
        time.sleep(0.1)
    assert time.monotonic() < ends_at
    assert launcher.stderr is not None and "the launcher is gone: stopping" in launcher.stderr.read()


def test_a_shell_may_be_outlived() -> None:
    """As with nohup: the program that started this one is no launcher."""
    assert LAUNCHER not in os.environ
    shell = start(LAUNCH, WORKER, "shell", "training")
    (worker,) = psutil.Process(shell.pid).children()
    shell.send_signal(signal.SIGKILL)
    shell.wait()
    time.sleep(3)
    assert worker.is_running()
    worker.kill()


def test_a_process_that_stands_still_is_named_with_its_step(tmp_path: Path) -> None:
    ranks = [start(BEATING, str(tmp_path), str(rank)) for rank in (0, 1)]
    time.sleep(0.7)
    assert [rank.poll() for rank in ranks] == [None, None]
    ranks[1].send_signal(signal.SIGSTOP)
    _, said = ranks[0].communicate(timeout=10)
    assert ranks[0].returncode == 1
    assert f"rank 1 (process {ranks[1].pid}) stands still since 1 s, last heard of at step 8" in said
    ranks[1].kill()


def test_none_is_to_blame_when_all_were_frozen(tmp_path: Path) -> None:
    """As by a scheduler that suspends the whole job."""
    ranks = [start(BEATING, str(tmp_path), str(rank)) for rank in (0, 1)]
    time.sleep(0.7)
    for number, pause in ((signal.SIGSTOP, 2.5), (signal.SIGCONT, 1.5)):
        for rank in ranks:
            rank.send_signal(number)
        time.sleep(pause)
    assert [rank.poll() for rank in ranks] == [None, None]
    for rank in ranks:
        rank.kill()


def test_what_an_earlier_run_left_is_no_sign_of_life(tmp_path: Path) -> None:
    (tmp_path / ".ranks").mkdir()
    (tmp_path / ".ranks" / "1").write_text("3 123 9")
    heart = Heartbeat(tmp_path, rank=0, num_ranks=2)
    for _ in range(1000):
        heart.look_at(1)  # would end this process
    heart.write(1)
    assert (tmp_path / ".ranks" / "0").read_text().startswith(f"0 {os.getpid()} ")
    heart.clear()
    assert not (tmp_path / ".ranks").exists()
    assert STOPPED_SECONDS <= 60
