"""A process that has imported everything and starts stage programs as forks of itself, a second each instead of ten.

It reads jobs from its standard input, a line of JSON each, and answers with the exit code of each; negative where a
signal ended the program. Standard output and error of the programs go to a file.
"""

import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("pt", "sft", "dpo", "eval")
TIMEOUT = 120.0  # seconds


def run_job(job: dict[str, Any]) -> int:
    """In the fork: run the stage as the program that it is, and return its exit code."""
    import faults

    sys.argv = [f"mini_qwen_{job['stage']}.py", *job["argv"]]
    faults.plant(job["faults"])
    try:
        importlib.import_module(f"mini_qwen_{job['stage']}").main()
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        return 1 if isinstance(leaving.code, str) else leaving.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(job: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = run_job(job)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    started = time.monotonic()
    kill_at = job.get("kill_after")
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        age = time.monotonic() - started
        if age > TIMEOUT or (kill_at is not None and age > kill_at):
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print when they are imported is no answer
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.chdir(ROOT)
    import torch

    torch.set_num_threads(1)
    for name in ("deepspeed", "transformers.models.qwen2.modeling_qwen2", *(f"mini_qwen_{stage}" for stage in STAGES)):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork's garbage collector has nothing to do with what was imported here
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(fork(json.loads(line)), file=answers, flush=True)


if __name__ == "__main__":
    main()
