"""Threads: as many as there are cores for them, shared by the processes, unless the user says otherwise."""

import os
from pathlib import Path

import pytest

from mini_qwen.threads import available_cores, threads_of_each


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("3200000 100000", 8)]
)
def test_a_quota_is_a_number_of_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 16 if logical else 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    new, old = tmp_path / "new", tmp_path / "old"
    new.mkdir()
    (new / "cpu.max").write_text(quota + "\n")
    (old / "cpu").mkdir(parents=True)
    number, period = quota.replace("max", "-1").split()
    (old / "cpu" / "cpu.cfs_quota_us").write_text(number + "\n")
    (old / "cpu" / "cpu.cfs_period_us").write_text(period + "\n")
    assert available_cores(new) == available_cores(old) == cores
    assert available_cores(tmp_path / "not there") == 8


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity of processes")
def test_affinity_counts(tmp_path: Path) -> None:
    one = {min(os.sched_getaffinity(0))}
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, one)
    try:
        assert available_cores(tmp_path / "not there") == 1
    finally:
        os.sched_setaffinity(0, before)


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("mini_qwen.threads.available_cores", lambda: 16)
    assert [threads_of_each(number) for number in (1, 3, 16, 40)] == [16, 5, 1, 1]
    for words in ("4", "4,2"):
        monkeypatch.setenv("OMP_NUM_THREADS", words)
        assert threads_of_each(8) == 4
