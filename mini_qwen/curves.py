"""Curves of what runs logged: losses and any other figure, against steps."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from mini_qwen.pictures import drawable, name_lines, open_panels
from mini_qwen.training_logs import read_history

History = list[dict[str, Any]]


def read_losses(source: Path | History, key: str = "loss", x_key: str = "step") -> tuple[list[float], list[float]]:
    """Steps and values of `key` in what a run logged.

    Args:
        source: a history, or anything that read_history reads.
        key: 'loss', 'eval_loss', 'grad_norm', 'learning_rate', 'rewards/accuracies' ...
        x_key: what stands in place of the steps: 'epoch', or 'num_tokens' where the run logged it.

    Raises:
        SystemExit: a value is no number.
    """
    history = read_history(source) if isinstance(source, Path) else source
    points = [(entry[x_key], entry[key]) for entry in history if key in entry and x_key in entry]
    for x, y in points:
        for name, value in ((x_key, x), (key, y)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise SystemExit(
                    f"{source if isinstance(source, Path) else 'history'}: '{name}' is {value!r} at {x_key} {x!r}, "
                    "but a curve is drawn from numbers. Name another key."
                )
    return [x for x, _ in points], [y for _, y in points]


def plot_curves(
    states: dict[str, Path | History],
    target: Path,
    panels: bool = False,
    keys: tuple[str, ...] = ("loss",),
    x_key: str = "step",
) -> None:
    """One picture of what several runs logged, evaluations of the same figure as dots of the same colour.

    Args:
        states: label of each run -> its history, or anything that read_history reads.
        panels: a panel for each run, for losses that mean different things; else all lines in one.
        keys: figures to draw, in panels of their own.
        x_key: see read_losses.
    """
    histories = {label: read_history(run) if isinstance(run, Path) else run for label, run in states.items()}
    groups = [{label: history} for label, history in histories.items()] if panels else [histories]
    wanted = [(key, group) for key in keys for group in groups]
    with open_panels(target, len(wanted), 4.4 if len(wanted) == 1 else 3.2) as grid:
        for axes, (key, group) in zip(grid, wanted, strict=True):
            draw_curves(axes, group, key, x_key, with_dots=f"eval_{key}" not in keys)
            if panels and axes.get_lines():
                axes.legend()
        if not panels:
            name_lines(grid)


def draw_curves(axes: Axes, histories: dict[str, History], key: str, x_key: str, with_dots: bool) -> None:
    for number, (label, history) in enumerate(histories.items()):
        name, colour = drawable(label), f"C{number}"
        xs, ys = read_losses(history, key, x_key)
        # Evaluations are few, and a line through a single point cannot be seen.
        marker = "o" if key.startswith("eval_") or len(xs) == 1 else None
        if xs:
            axes.plot(xs, ys, label=name, color=colour, linewidth=1.5, marker=marker)
        xs, ys = read_losses(history, f"eval_{key}", x_key) if with_dots else ([], [])
        if xs:
            axes.plot(xs, ys, "o", color=colour, label=f"{name}, held out")
    axes.set(xlabel=drawable(x_key), ylabel=drawable(key))
    axes.grid(alpha=0.3)
