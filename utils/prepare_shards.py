"""Prepare a recipe's data with many processes, on this machine, a Slurm cluster or Ray, by Hugging Face's datatrove.

    pip install -c constraints.txt -e ".[shards]"
    python utils/prepare_shards.py recipes/pt.yaml --tasks 8 --workers 2
    python utils/prepare_shards.py recipes/pt.yaml --tasks 500 --slurm PARTITION --time 04:00:00
    python utils/prepare_shards.py recipes/pt.yaml --tasks 500 --ray

Each task prepares its share of the files into the recipe's cache_dir, which all machines must see under the same path.
What a task has finished it never does again; a task that was killed goes on where it was. Afterwards the stage finds
every file prepared and only packs: `bash run.sh pt --prepare_only true`. Further --key value pairs override the
recipe.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from mini_qwen.cache import prepare_parts
from mini_qwen.stages import STAGES, open_stage


class PrepareFiles(PipelineStep):
    """Every `world_size`-th file of the recipe, beginning with the `rank`-th."""

    name = "prepare files"
    type = "mini_qwen"

    def __init__(self, recipe: str, overrides: list[str], stage: str | None, tokenizer: str | None) -> None:
        super().__init__()
        self.opening = (recipe, overrides, stage, tokenizer)

    def run(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> Iterable[Any]:
        opened = open_stage(*self.opening)
        files = opened.files[rank::world_size]
        try:
            parts = prepare_parts(opened.keys.cache_dir, {"": files}, opened.preparation)[""]
        except SystemExit as stop:  # which datatrove's pool of workers would wait for without end
            raise RuntimeError(str(stop)) from None
        for part in parts:
            self.stat_update("rows read", value=part.ledger.rows_read, unit="file")
            self.stat_update("rows dropped", value=part.ledger.rows_dropped.total(), unit="file")
            self.stat_update("tokens", value=part.num_tokens, unit="file")
        yield from ()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--tasks", type=int, default=8, help="shares that the files are dealt into (default: 8)")
    parser.add_argument("--workers", type=int, default=-1, help="tasks at a time (default: all)")
    parser.add_argument("--stage", choices=list(STAGES), help="default: from the recipe's name")
    parser.add_argument("--tokenizer", help="default: the recipe's")
    parser.add_argument("--logs", default="cache/shards", help="datatrove's logs and list of finished tasks")
    parser.add_argument("--slurm", metavar="PARTITION", help="one job array on this partition")
    parser.add_argument("--time", default="24:00:00", help="of a Slurm job")
    parser.add_argument("--ray", action="store_true", help="on the Ray cluster that RAY_ADDRESS names")
    args, overrides = parser.parse_known_args(argv)
    opened = open_stage(args.recipe, overrides, args.stage, args.tokenizer)  # what is wrong is said before any job
    num_tasks = min(args.tasks, len(opened.files))
    common: dict[str, Any] = {
        "pipeline": [PrepareFiles(str(Path(args.recipe).resolve()), overrides, args.stage, args.tokenizer)],
        "tasks": num_tasks,
        "workers": args.workers,
        "logging_dir": args.logs,
        "skip_completed": False,  # a finished file is recognised by what it was made from, not by its task's number
    }
    if args.slurm:
        from datatrove.executor import SlurmPipelineExecutor

        SlurmPipelineExecutor(
            **common,
            partition=args.slurm,
            time=args.time,
            job_name="mini_qwen",
            venv_path=f"{sys.prefix}/bin/activate",
        ).run()
    elif args.ray:
        from datatrove.executor import RayPipelineExecutor

        RayPipelineExecutor(**common).run()
    else:
        LocalPipelineExecutor(**common).run()


if __name__ == "__main__":
    main()
