"""Measurement: a piece of work in a fresh process, its wall and CPU seconds, and the peak of its memory.

Linux only. Memory is what the process and all its children hold for themselves (Pss_Anon + Pss_Shmem of smaps_rollup):
a page that a forked child shares with its parent counts once, and pages mapped from a file, which the system may drop
at any time, do not count.
"""

import contextlib
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

Facts = dict[str, Any]  # what is to be known about a result: counts of tokens, bytes ...
Work = Callable[[], Facts]
# A variant loads what is taken for granted (tokenizer, model) and returns the work, which alone is measured. It is
# called with `folder`, empty and its own, and the arguments that all variants get.
Variant = Callable[..., Work]

SAMPLE_SECONDS = 0.02
# Threads that wait do so asleep: else one other program on the machine can make any variant many times slower. Read by
# libgomp in the processes that are started here.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def alternate(variants: dict[str, Variant], rounds: int, folder: Path, **shared: Any) -> dict[str, list[Facts]]:
    """Measure the variants in turn: their memory once, then `rounds` times their time alone.

    Looking at the memory takes a fifth to two fifths of a core, so it has a round of its own, whose times do not count
    and whose results stay in `folder`/NAME.
    """
    measured: dict[str, list[Facts]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            place = folder / (f"{name}.again" if number else name)
            place.mkdir()
            facts = measure(variant, sample_memory=number == 0, folder=place, **shared)
            if number:
                shutil.rmtree(place)
            measured[name].append(facts)
            known = ", ".join(f"{key} {value:,}" for key, value in facts.items())
            print(f"round {number}, {name}: {known}", flush=True)
    return measured


def medians(measured: dict[str, list[Facts]]) -> dict[str, Facts]:
    """Of all rounds but the first, with the memory of the first."""
    return {
        name: {key: round(statistics.median(facts[key] for facts in timed), 3) for key in timed[0]} | memory
        for name, (memory, *timed) in measured.items()
    }


def ratios(theirs: Facts, ours: Facts) -> Facts:
    """How many times faster ours is, and which share of their memory it needs."""
    return {
        "wall_times_faster": round(theirs["wall_s"] / ours["wall_s"], 2),
        "cpu_times_less": round(theirs["cpu_s"] / ours["cpu_s"], 2),
        "memory_share": round(ours["peak_growth_mb"] / theirs["peak_growth_mb"], 4),
    }


def measure(variant: Variant, sample_memory: bool, **kwargs: Any) -> Facts:
    """`peak_growth_mb`, above what the process had before the work, or `wall_s`, `cpu_s` and the work's facts.

    Raises SystemExit when the work fails; the child process has said why.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=run_in_child, args=(theirs, variant, kwargs))
    child.start()
    theirs.close()
    try:
        ours.recv()
        process = psutil.Process(child.pid)
        os.sync()  # what the variant before wrote is not to be written at this one's cost
        before = peak = memory_mb(process)
        ours.send(None)
        while sample_memory and not ours.poll(SAMPLE_SECONDS):
            peak = max(peak, memory_mb(process))
        facts = ours.recv()
    except EOFError:
        raise SystemExit(f"{variant} failed; its own message stands above.") from None
    finally:
        child.join()
    return {"peak_growth_mb": round(peak - before, 1)} if sample_memory else facts


def run_in_child(connection: Connection, variant: Variant, kwargs: dict[str, Any]) -> None:
    started = time.perf_counter()
    work = variant(**kwargs)
    unmeasured = time.perf_counter() - started
    connection.send(None)
    connection.recv()
    cpu, wall = cpu_seconds(), time.perf_counter()
    facts = work()
    times = {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_seconds() - cpu, "unmeasured_s": unmeasured}
    connection.send({key: round(value, 3) for key, value in times.items()} | facts)


def to_words(keys: dict[str, Any]) -> list[str]:
    """Keys of a recipe as on the command line: mappings as JSON, lists as words of their own."""
    words: list[str] = []
    for key, value in keys.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{key}", *map(str, values)]
    return words


def cpu_seconds() -> float:
    """Of this process and of those children that have ended."""
    return sum(os.times()[:4])


def memory_mb(process: psutil.Process) -> float:
    kibibytes = 0
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(OSError):  # it has ended since it was listed
            for line in Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    kibibytes += int(line.split()[1])
    return kibibytes * 1024 / 1e6


def processor() -> str:
    """The model's name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
