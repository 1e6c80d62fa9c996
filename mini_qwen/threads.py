"""How many threads a process computes with: the cores that are really there, shared by the processes that use them.

More threads than cores is far slower than too few: they wait for each other at every operation. A container that may
use 2 of a machine's 64 cores still sees 64, and torch would start a thread for each.
"""

import os
from pathlib import Path

import psutil

VARIABLE = "OMP_NUM_THREADS"
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": 200 of every 100 milliseconds; "max 100000": no limit


def available_cores(quota_file: Path = CPU_QUOTA) -> int:
    """Physical cores, or fewer where the process may use fewer: by its affinity or by a container's quota."""
    cores = [psutil.cpu_count(logical=False), psutil.cpu_count()]
    if hasattr(os, "sched_getaffinity"):
        cores.append(len(os.sched_getaffinity(0)))
    if quota_file.is_file():
        quota, period = quota_file.read_text(encoding="utf-8").split()
        cores.append(None if quota == "max" else int(quota) // int(period))
    return max(1, min(count for count in cores if count is not None))


def threads_of_each(num_processes: int) -> int:
    """Threads for each of the processes of this machine; what the user has set in OMP_NUM_THREADS stands.

    Of a list there, "4,2", the first is for the outermost loops, which are torch's.
    """
    wanted = os.environ.get(VARIABLE, "").partition(",")[0]
    return int(wanted) if wanted.isdigit() else max(1, available_cores() // num_processes)
