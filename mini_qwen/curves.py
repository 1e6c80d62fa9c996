"""Loss curves, read from the trainer_state.json that every run writes."""

import json
from pathlib import Path

from matplotlib import pyplot

pyplot.switch_backend("Agg")  # pictures go to files; there may be no screen


def read_losses(state: Path, key: str = "loss") -> tuple[list[int], list[float]]:
    """Steps and values of `key` ('loss', 'eval_loss', 'grad_norm' ...) in a trainer_state.json."""
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def plot_curves(states: dict[str, Path], target: Path, panels: bool = False) -> None:
    """One picture of the training losses of several runs, held-out losses as dots of the same colour.

    Args:
        states: label of each run -> its trainer_state.json.
        panels: a panel for each run, for losses that mean different things; else all lines in one.
    """
    num_panels = len(states) if panels else 1
    size = (2 + 5 * num_panels, 4.2)
    figure, grid = pyplot.subplots(1, num_panels, figsize=size, squeeze=False, layout="constrained")
    for number, (label, state) in enumerate(states.items()):
        axes = grid[0][number if panels else 0]
        (line,) = axes.plot(*read_losses(state), label=label, linewidth=1.5)
        steps, losses = read_losses(state, "eval_loss")
        if steps:
            axes.plot(steps, losses, "o", color=line.get_color(), label=f"{label}, held out")
    for axes in grid[0]:
        axes.set(xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
