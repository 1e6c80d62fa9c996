"""How many threads a process computes with: the cores that are really there, shared by the processes that use them.

More threads than cores is far slower than too few: they wait for each other at every operation. A container that may
use 2 of a machine's 64 cores still sees 64, and torch would start a thread for each.
"""

import os
from pathlib import Path

import psutil

VARIABLE = "OMP_NUM_THREADS"
CGROUP = Path("/sys/fs/cgroup")


def quota_of_cores(cgroup: Path = CGROUP) -> int | None:
    """The cores that a container may use; None without a limit.

    cgroup v2: "200000 100000" in cpu.max are 200 of every 100 milliseconds, "max 100000" is no limit. v1: the same two
    numbers, a file each; -1 is no limit.
    """
    files = [cgroup / "cpu.max"]
    if not files[0].is_file():
        files = [cgroup / "cpu" / name for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    if not all(file.is_file() for file in files):
        return None
    quota, period = " ".join(file.read_text(encoding="utf-8") for file in files).split()
    return None if quota in ("max", "-1") else int(quota) // int(period)


def available_cores(cgroup: Path = CGROUP) -> int:
    """Physical cores, or fewer where the process may use fewer: by its affinity or by a container's quota."""
    cores = [psutil.cpu_count(logical=False), psutil.cpu_count()]
    if hasattr(os, "sched_getaffinity"):
        cores.append(len(os.sched_getaffinity(0)))
    cores.append(quota_of_cores(cgroup))
    return max(1, min(count for count in cores if count is not None))


def threads_of_each(num_processes: int) -> int:
    """Threads for each of the processes of this machine; what the user has set in OMP_NUM_THREADS stands.

    Of a list there, "4,2", the first is for the outermost loops, which are torch's.
    """
    wanted = os.environ.get(VARIABLE, "").partition(",")[0]
    return int(wanted) if wanted.isdigit() else max(1, available_cores() // num_processes)
