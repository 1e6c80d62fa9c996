"""Start a stage on one process or on several, so that signals, exit codes and the end of all are those of one program.

    python -m mini_qwen.launch --num_processes 6 mini_qwen_pt.py                      # by accelerate_config.yaml
    python -m mini_qwen.launch --num_processes 1 mini_qwen_pt.py --config recipes/demo/pt.yaml

accelerate starts the processes and sets them up. Left alone it ends with code 1 and a traceback when they are stopped,
and kills those that still write a checkpoint after 30 seconds; here a signal goes to the processes, which then end by
themselves, and the code of the first of them that failed is the code of all.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

from mini_qwen.interruption import EXIT_CODE, SIGNALS
from mini_qwen.threads import VARIABLE, threads_of_each
from mini_qwen.watch import LAUNCHER, ORPHAN_SECONDS, call_when_orphaned

NUM_PROCESSES = "MINI_QWEN_NUM_PROCESSES"  # in the environment of each process: how many were asked for
ROOT = Path(__file__).resolve().parents[1]


def forward(number: int, frame: FrameType | None = None) -> None:
    """Hand a signal on to the processes of the run. SIGINT too is theirs to answer, not this program's."""
    processes = psutil.Process().children()
    if not processes and number != signal.SIGKILL:  # none is there yet that could stop
        raise SystemExit(EXIT_CODE)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def end_all_as_orphans() -> None:
    """run.sh was killed: the processes have as long as they have when this program is killed."""
    with contextlib.suppress(SystemExit):
        forward(signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        forward(signal.SIGKILL)
    os._exit(EXIT_CODE)


def exit_code(codes: list[int]) -> int:
    """Of a run of which these processes failed first; negative ones were ended by a signal.

    SIGTERM ends one that has not come so far as to take signals over, and is a stop as well.

    >>> exit_code([75, -15]), exit_code([75, 1]), exit_code([-9, 75])
    (75, 1, 137)
    """
    failed = [code for code in codes if code not in (EXIT_CODE, -signal.SIGTERM)]
    if not failed:
        return EXIT_CODE
    return failed[0] if failed[0] > 0 else 128 - failed[0]


def launch_several(num_processes: int, config_file: str, script: list[str]) -> int:
    """Run `script` on `num_processes` processes of this machine to the end of all of them; their exit code."""
    # Read by torch when it parses the options of its launcher: which signals it takes, which would be all of these.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    os.environ |= {LAUNCHER: str(os.getpid()), NUM_PROCESSES: str(num_processes)}
    os.environ[VARIABLE] = str(threads_of_each(num_processes))  # torch's launcher would take 1
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    options = ["--config_file", config_file, "--num_processes", str(num_processes)]
    try:
        launch_command(launch_command_parser().parse_args([*options, *script]))
    except ChildFailedError as error:
        return exit_code([failure.exitcode for failure in error.failures.values()])
    return 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_processes", type=int, required=True)
    parser.add_argument("--config_file", default=str(ROOT / "accelerate_config.yaml"))
    parser.add_argument("script", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    if not args.script:
        parser.error("name the script to run, for example mini_qwen_pt.py")
    if args.num_processes == 1:
        os.execv(sys.executable, [sys.executable, *args.script])
    call_when_orphaned(end_all_as_orphans)
    sys.exit(launch_several(args.num_processes, args.config_file, args.script))


if __name__ == "__main__":
    main()
