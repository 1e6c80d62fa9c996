"""Draw what several runs logged into one picture: the training losses, held-out losses as dots.

    python utils/plot_losses.py results/pt results/pt_other --target losses.png
    python utils/plot_losses.py results/dpo ../old/output_dpo.log --keys loss rewards/accuracies grad_norm
    python utils/plot_losses.py results/pt results/sft results/dpo --panels

A run is a stage's output_dir or another folder with a trainer_state.json, that file itself, or the console log of
transformers' Trainer. Every key has a panel of its own: loss, eval_loss, grad_norm, or whatever else the runs logged.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.backend_bases import FigureCanvasBase

from mini_qwen.curves import History, plot_curves
from mini_qwen.training_logs import read_history


def name_runs(runs: list[Path]) -> dict[str, Path]:
    """What tells the runs apart, without the folders that all have in common."""
    if len(runs) == 1:
        return {str(runs[0]): runs[0]}
    common = os.path.commonpath([run.absolute() for run in runs])
    return {os.path.relpath(run.absolute(), common): run for run in runs}


def check_keys(runs: dict[str, History], keys: list[str]) -> None:
    """Every key must have been logged by some run: a wrong name would be an empty panel."""
    logged = {label: {key for entry in history for key in entry} for label, history in runs.items()}
    known = sorted(set().union(*logged.values()))
    for key in keys:
        if key not in known:
            raise SystemExit(f"'{key}' was logged by none of the runs. They logged: {', '.join(known) or 'nothing'}.")
        for label, names in logged.items():
            if key not in names:
                print(f"{label}: no '{key}' was logged")


def check_target(target: Path) -> None:
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if target.suffix.removeprefix(".").lower() not in kinds:
        raise SystemExit(f"'{target}' is no picture that can be written: let it end in one of .{', .'.join(kinds)}.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders, trainer_state.json files, console logs")
    parser.add_argument("--keys", nargs="+", default=["loss"], help="figures to draw")
    parser.add_argument("--x", default="step", help="what to draw them against: step, epoch, num_tokens")
    parser.add_argument("--panels", action="store_true", help="a panel for each run")
    parser.add_argument("--target", type=Path, default=Path("losses.png"), help="picture to write")
    args = parser.parse_args(argv)
    check_target(args.target)
    runs = {label: read_history(run) for label, run in name_runs(args.runs).items()}
    check_keys(runs, [*args.keys, args.x])
    plot_curves(dict(runs), args.target, args.panels, tuple(args.keys), args.x)
    print(f"wrote {args.target}")


if __name__ == "__main__":
    main()
