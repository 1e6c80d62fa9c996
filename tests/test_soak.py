"""The long tests of survival: random kills, a real small disk, a process that stands still. Half an hour.

    bash run.sh test -m soak

Each leaves its figures in bench/results/soak.json, from where docs/reliability.md has them.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, STAGES, Programs, arguments, losses, same_weights
from test_launch import LINUX, Two, environment, processes_of, run, trained, two, wait_for_end_of_all

from mini_qwen.checkpoint import step_of, verify
from mini_qwen.circumstances import circumstances
from mini_qwen.disk import folder_bytes

assert two and trained  # fixtures

pytestmark = pytest.mark.soak
RESULTS = ROOT / "bench" / "results" / "soak.json"
NUM_KILLS = 200
NUM_KILLS_ZERO_2 = 10
SAVE_EACH_STEP = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": 12}


def record(name: str, **figures: Any) -> None:
    """Enter the figures of one test, beside those of the others."""
    print(name, figures)
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    facts = {"command": "bash run.sh test -m soak"}
    facts |= {key: value for key, value in circumstances(time.time()).items() if key not in ("command", "seconds")}
    known[name] = figures | {"circumstances": facts}
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def newest_step(folder: Path) -> int:
    return max((step_of(path) for path in folder.glob("checkpoint-*")), default=0)


def steps_said(output: str) -> int:
    return output.count("'loss'")


def test_random_kills(road: Path, tmp_path: Path, programs: Programs) -> None:
    """kill -9 at random times, a checkpoint behind every step; each run is resumed until it ends."""
    straight, seconds = {}, {}
    for stage in STAGES:
        straight[stage] = tmp_path / f"straight-{stage}"
        argv = arguments(stage, road, output_dir=straight[stage], **SAVE_EACH_STEP)
        started = time.monotonic()
        assert programs.run(stage, argv).code == 0
        seconds[stage] = time.monotonic() - started
    generator, counts = random.Random(0), Counter[str]()

    def survive(number: int) -> None:
        stage = STAGES[number % 3]
        folder = tmp_path / f"run-{number}"
        argv = arguments(stage, road, output_dir=folder, **SAVE_EACH_STEP)
        killed = programs.run(stage, argv, kill_after=generator.uniform(0.3, 1.6 * seconds[stage]))
        counts["runs"] += 1
        if killed.code == -9:
            counts["killed"] += 1
            counts["killed while a checkpoint was written"] += any((folder / ".unfinished").glob("checkpoint-*"))
            lost = steps_said(killed.output) - newest_step(folder)
            counts["most steps lost"] = max(counts["most steps lost"], lost)
        else:
            assert killed.code == 0, killed.output
        done = programs.run(stage, [*argv, "--resume_from_checkpoint", "auto"])
        assert done.code == 0, done.output
        counts["resumed without help"] += killed.code == -9
        assert same_weights(folder, straight[stage]) and losses(folder) == losses(straight[stage])
        counts["equal bit for bit"] += killed.code == -9
        verify(folder)
        shutil.rmtree(folder)

    while counts["killed"] < NUM_KILLS:
        programs.map(survive, range(counts["runs"], counts["runs"] + 20))
    assert counts["killed"] == counts["resumed without help"] == counts["equal bit for bit"]
    assert counts["most steps lost"] <= 1
    record("random kills, one process", **counts)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_kill_behind_any_write(road: Path, tmp_path: Path, programs: Programs, stage: str) -> None:
    """As tests/test_checkpoint.py does for PT."""
    shared = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    before = tmp_path / "before"
    assert (
        programs.run(stage, arguments(stage, road, output_dir=before, **shared), kill_at_step={"step": 6}).code == -9
    )

    def kill_and_resume(number: int) -> bool:
        folder = Path(shutil.copytree(before, tmp_path / f"at-{number}"))
        argv = arguments(stage, road, output_dir=folder, resume_from_checkpoint="true", **shared)
        killed = programs.run(stage, argv, kill_at_write={"folder": str(folder), "number": number})
        assert killed.code in (0, -9)
        assert programs.run(stage, argv).code == 0
        assert same_weights(folder, road / stage)
        shutil.rmtree(folder)
        return killed.code == -9

    killed: list[bool] = []
    while all(killed):
        killed += programs.map(kill_and_resume, range(len(killed) + 1, len(killed) + 9))
    assert sum(killed) > 60
    record(f"kill behind each write, {stage}", kills=sum(killed), equal_bit_for_bit=sum(killed))


def kill_all(process: subprocess.Popen[bytes], folder: Path) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def kill_launcher(process: subprocess.Popen[bytes], folder: Path) -> None:
    process.kill()


def kill_one_rank(process: subprocess.Popen[bytes], folder: Path) -> None:
    workers = [found for found in processes_of(folder) if "mini_qwen.launch" not in found.cmdline()]
    random.Random(process.pid).choice(workers).kill()


@LINUX
def test_random_kills_under_zero_2(two: Two, tmp_path: Path) -> None:
    """The whole group, the launcher, or one of the two processes; a checkpoint behind every step."""
    straight = tmp_path / "straight"
    assert run(two.command("pt", straight, **SAVE_EACH_STEP)).code == 0
    generator, counts = random.Random(1), Counter[str]()
    ways: list[Callable[[subprocess.Popen[bytes], Path], None]] = [kill_all, kill_launcher, kill_one_rank]
    while counts["killed"] < NUM_KILLS_ZERO_2:
        folder = tmp_path / f"run-{counts['runs']}"
        command = two.command("pt", folder, resume_from_checkpoint="auto", **SAVE_EACH_STEP)
        with (tmp_path / "said").open("wb") as said:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=said, stderr=said, env=environment(), start_new_session=True
            )
        while not (folder / "checkpoint-1").exists():
            time.sleep(0.01)
            assert process.poll() is None, (tmp_path / "said").read_text()
        time.sleep(generator.uniform(0, 1.0))
        way = ways[counts["killed"] % 3]
        alive = process.poll() is None and len(processes_of(folder)) > 2
        if alive:
            way(process, folder)
        process.wait(timeout=60)
        assert not wait_for_end_of_all(folder)
        counts["runs"] += 1
        if alive:
            counts["killed"] += 1
            counts[way.__name__.replace("_", " ")] += 1
            counts["killed while a checkpoint was written"] += any((folder / ".unfinished").glob("checkpoint-*"))
        done = run(command)
        assert done.code == 0, done.output[-4000:]
        assert same_weights(folder, straight) and losses(folder) == losses(straight)
        counts["equal bit for bit"] += alive
        shutil.rmtree(folder)
    record("random kills, ZeRO-2 on two processes", **counts)


@LINUX
def test_kills_within_a_save_under_zero_2(two: Two, trained: Path, tmp_path: Path) -> None:
    """One of the processes kills itself at a thing that a save does to files; the other is ended by the launcher."""
    generator, kills = random.Random(2), []
    while len(kills) < NUM_KILLS_ZERO_2:
        folder = tmp_path / f"run-{len(kills)}"
        fault = {"kill_at_write": {"folder": str(folder), "number": generator.randrange(8, 75)}}
        done = run(two.command("pt", folder, faults=fault))
        kills += re.findall(r"killed at write \d+: (.*)", done.output)[:1]
        assert not wait_for_end_of_all(folder)
        done = run(two.command("pt", folder, resume_from_checkpoint="auto"))
        assert done.code == 0, done.output[-4000:]
        assert same_weights(folder, trained / "two" / "pt") and losses(folder) == losses(trained / "two" / "pt")
    record("kills within a save, ZeRO-2 on two processes", equal_bit_for_bit=len(kills), killed=len(kills), at=kills)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_real_small_disk(road: Path, tmp_path: Path, programs: Programs) -> None:
    """tmpfs of four sizes: too small for one checkpoint, for two, and filled by something else in the middle."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "block_size": 32, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    straight = tmp_path / "straight"
    assert programs.run("pt", arguments("pt", road, output_dir=straight, **options)).code == 0
    figures = {}
    for megabytes in (20, 60, 100, 140):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(disk)], check=True)
        try:
            argv = arguments("pt", road, output_dir=disk / "pt", **options)
            refused = programs.run("pt", argv)
            assert refused.code == (0 if megabytes == 140 else 1), refused.output
            if refused.code:
                assert re.search(r"needs [\d.]+ GB more: 1 checkpoint of [\d.]+ GB.*[\d.]+ GB free", refused.output)
            figures[f"{megabytes} MB"] = "refused before the first step" if refused.code else "enough"
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    whole = folder_bytes(straight / "checkpoint-4")
    for share in (0.1, 0.4, 0.7, 0.95):  # of the second checkpoint that there is room for
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "none", str(disk)], check=True)
        try:
            argv = arguments("pt", road, output_dir=disk / "pt", **options)
            fill = {"folder": str(disk), "step": 4, "free": int(share * whole)}
            stopped = programs.run("pt", argv, fill_disk=fill)
            assert stopped.code == 1 and "Traceback" not in stopped.output
            assert re.search(r"The disk of .* is full: a checkpoint needs [\d.]+ GB, [\d.]+ GB are", stopped.output)
            (left,) = (disk / "pt").glob("checkpoint-*")
            verify(left)
            assert left.name == "checkpoint-2" and not (disk / "pt" / ".unfinished").exists()
            (disk / "filling").unlink()
            assert programs.run("pt", [*argv, "--resume_from_checkpoint", "true"]).code == 0
            assert same_weights(disk / "pt", straight)
            figures[f"room for {share:.0%} of one"] = "stopped with the figures, resumed to the same weights"
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    record("small disks", **figures)


@LINUX
def test_a_stopped_rank_is_named_within_120_seconds(two: Two, tmp_path: Path) -> None:
    folder = tmp_path / "pt"
    command = two.command("pt", folder, max_steps=100_000, save_total_limit=2)
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, env=environment())
    while newest_step(folder) < 30:
        time.sleep(0.1)
    workers = [found for found in processes_of(folder) if "mini_qwen.launch" not in found.cmdline()]
    stopped = next(found for found in workers if found.environ()["RANK"] == "1")
    stopped.send_signal(signal.SIGSTOP)
    since = time.monotonic()
    code = process.wait(timeout=200)
    ended_after = time.monotonic() - since
    words = (tmp_path / "said").read_text(errors="replace")
    (step,) = re.findall(
        rf"rank 1 \(process {stopped.pid}\) stands still since 6\d s, last heard of at step (\d+)", words
    )
    assert code == 1 and 0 < int(step) <= newest_step(folder) + 1 and ended_after < 120
    assert not wait_for_end_of_all(folder)
    verify(folder / f"checkpoint-{newest_step(folder)}")
    record("a stopped rank", ended_after_s=round(ended_after), code=code)


@LINUX
def test_accelerate_by_hand(two: Two, trained: Path, tmp_path: Path) -> None:
    """Without our launcher the checkpoint and the end of all are the same; the code is accelerate's own."""
    folder = tmp_path / "pt"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(two.machine)]
    fault = json.dumps({"signal_launcher": {"step": 2, "name": "SIGTERM"}})
    done = run([*launcher, "tests/faults.py", fault, "mini_qwen_pt.py", *two.arguments("pt", folder, batch_size=4)])
    assert done.code not in (0, 75)
    assert not wait_for_end_of_all(folder)
    assert run(two.command("pt", folder, resume_from_checkpoint="true")).code == 0
    assert same_weights(folder, trained / "two" / "pt")
    record("accelerate launch by hand", code=done.code)


@LINUX
def test_a_gradient_that_is_not_finite_on_rank_1(two: Two, tmp_path: Path) -> None:
    done = run(two.command("pt", tmp_path / "pt", faults={"nan_gradient": {"backward_pass": 4, "rank": 1}}))
    assert done.code == 1 and re.search(r"Step 4, rank [01]: .*the gradient's norm (inf|nan)", done.output)
    assert [path.name for path in (tmp_path / "pt").glob("checkpoint-*")] == ["checkpoint-3"]
    verify(tmp_path / "pt" / "checkpoint-3")
