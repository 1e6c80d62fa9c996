"""Pictures of figures: heat maps, lines, confusion matrices. One PNG each, legible on a phone."""

import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.font_manager import FontProperties, findfont, get_font

pyplot.switch_backend("Agg")  # pictures go to files; there may be no screen

FONT = "DejaVu Sans"  # comes with matplotlib, so that a picture looks the same everywhere; it has no Chinese
STYLE = {
    "font.family": FONT,
    "font.size": 12,
    "text.parse_math": False,  # a label such as a$b$c is text
    "axes.prop_cycle": matplotlib.cycler(
        color=["#3366cc", "#d95f02", "#1b9e77", "#b3367d", "#806000", "#5b5b5b", "#17a2c4", "#7a4fc0"]
    ),
    "axes.spines.top": False,
    "axes.spines.right": False,
}
MARKERS = "osD^vPX*"
COLOURS = matplotlib.colormaps["YlGnBu"]


@contextmanager
def open_panels(target: Path, num_panels: int, height: float, title: str = "") -> Iterator[list[Axes]]:
    """The panels of one picture, which is written to `target` at the end.

    Up to six panels stand below each other, more in two columns: a panel keeps its width on a phone.

    Args:
        height: inches of a panel; its width is 6.4.
    """
    num_columns = 1 if num_panels <= 6 else 2
    num_rows = math.ceil(max(1, num_panels) / num_columns)
    target.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        size = (6.4 * num_columns, height * num_rows + (0.5 if title else 0))
        figure, grid = pyplot.subplots(num_rows, num_columns, figsize=size, squeeze=False, layout="constrained")
        try:
            panels = list(grid.flat)
            for spare in panels[num_panels:]:
                spare.remove()
            figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
            if title:
                figure.suptitle(drawable(title))
            yield panels[:num_panels]
            figure.savefig(target, dpi=130)
        finally:
            pyplot.close(figure)


def name_lines(panels: list[Axes]) -> None:
    """One legend for all panels, below them, where it covers no line."""
    lines = {(str(line.get_label()), line.get_color()): line for axes in panels for line in axes.get_lines()}
    names = [name for name, _ in lines]
    longest = max((len(part) for name in names for part in name.split("\n")), default=0)
    num_columns = 3 if longest <= 12 else 2 if longest <= 22 else 1
    if lines:
        panels[0].figure.legend(lines.values(), names, loc="outside lower left", ncols=num_columns, frameon=False)


def has_glyphs(text: str) -> bool:
    known = get_font(findfont(FontProperties(family=FONT))).get_charmap()
    return all(ord(character) in known for character in text if character != "\n")


def drawable(text: str, width: int = 48) -> str:
    """The text in up to three lines of `width` characters, '?' for each that the font would draw as a box.

    >>> drawable("pt, 第2")
    'pt, ?2'
    """
    text = "".join(character if has_glyphs(character) and character.isprintable() else "?" for character in text)
    text = textwrap.fill(text, width, max_lines=3, placeholder=" ...")
    return " " + text if text.startswith("_") else text  # matplotlib leaves such a label out of the legend


def short_names(labels: list[str]) -> dict[str, str]:
    """What a picture writes for each label: a number where the font lacks characters. The page can say which is which.

    >>> short_names(["sport", "体育"])
    {'sport': 'sport', '体育': 'class 2'}
    """
    return {
        label: drawable(label, 16) if has_glyphs(label) else f"class {number}"
        for number, label in enumerate(labels, start=1)
    }


def plot_heat_maps(
    grids: dict[str, dict[tuple[float, float], float]],
    x_name: str,
    y_name: str,
    target: Path,
    title: str,
    percent: bool = False,
) -> None:
    """A panel for each label, its cells annotated, all on one colour scale. Cells without a figure are grey.

    Args:
        grids: label of a checkpoint -> (x, y) -> figure, such as (temperature, top_p) -> mean length.
        percent: the figures are shares, written as 37%.
    """
    xs = sorted({x for grid in grids.values() for x, _ in grid})
    ys = sorted({y for grid in grids.values() for _, y in grid})
    figures = [value for grid in grids.values() for value in grid.values() if math.isfinite(value)]
    scale = ScalarMappable(Normalize(min(figures, default=0), max(figures, default=1)), COLOURS)
    height = 1.4 + 0.5 * len(ys)
    with open_panels(target, len(grids), height, title) as panels:
        for axes, (label, grid) in zip(panels, grids.items(), strict=True):
            cells = [[grid.get((x, y), math.nan) for x in xs] for y in ys]
            draw_cells(axes, cells, [[write(value, percent) for value in row] for row in cells], scale)
            axes.set_title(drawable(label), fontsize="medium")
            axes.set(xlabel=drawable(x_name), ylabel=drawable(y_name, 20))
            axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
            axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
            axes.invert_yaxis()  # small values below, as in any diagram
        if figures:
            ticks = (lambda value, _: write(value, percent)) if percent else None
            panels[0].figure.colorbar(scale, ax=panels, format=ticks, aspect=12 * len(panels), pad=0.02)


def draw_cells(axes: Axes, cells: list[list[float]], texts: list[list[str]], scale: ScalarMappable) -> None:
    """Coloured cells, row 0 at the top, each with its text in black or white, whichever stands out."""
    axes.set_facecolor("#d9d9d9")
    if not cells:
        return
    axes.imshow(cells, cmap=scale.cmap, norm=scale.norm, aspect="auto")
    size = min(12, 90 / len(cells[0]))
    for row, (values, words) in enumerate(zip(cells, texts, strict=True)):
        for column, (value, word) in enumerate(zip(values, words, strict=True)):
            red, green, blue, _ = scale.to_rgba(value) if math.isfinite(value) else (1, 1, 1, 1)
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            axes.text(column, row, word, ha="center", va="center", size=size, color="white" if dark else "black")


def write(value: float, percent: bool) -> str:
    """A figure in three digits; a dash for one that is not there."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.0%}" if percent else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def plot_lines(
    lines: dict[str, tuple[list[float], list[float]]],
    x_name: str,
    y_name: str,
    target: Path,
    title: str,
    percent: bool = False,
) -> None:
    """One line for each label, told apart by colour and marker. A figure that is not finite is a gap.

    Args:
        lines: label of a checkpoint -> x values and figures, such as temperatures and mean lengths.
        percent: the figures are shares, written as 37%.
    """
    with open_panels(target, 1, 4.4, title) as (axes,):
        for number, (label, (xs, ys)) in enumerate(lines.items()):
            axes.plot(xs, ys, marker=MARKERS[number % len(MARKERS)], label=drawable(label), linewidth=2, markersize=7)
        axes.set(xlabel=drawable(x_name), ylabel=drawable(y_name, 20))
        axes.grid(alpha=0.3)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        name_lines([axes])


def plot_confusion(matrix: list[list[int]], labels: list[str], target: Path, title: str) -> None:
    """Counts of true classes (rows) and predicted ones (columns), coloured by their share of the row.

    Args:
        matrix: counts; a row for each true class. Labels that are only predicted, such as 'no answer', come last.
        labels: one for each column. Where the font lacks characters the picture writes a number, see short_names.

    Raises:
        ValueError: a row has not as many counts as there are labels, or there are more rows than labels.
    """
    if len(matrix) > len(labels) or any(len(row) != len(labels) for row in matrix):
        widths = [len(row) for row in matrix]
        raise ValueError(f"{len(labels)} labels, but rows of {widths} counts: a label for each column is needed.")
    names = list(short_names(labels).values())
    shares = [[count / max(1, sum(row)) for count in row] for row in matrix]
    with open_panels(target, 1, 2.2 + 0.5 * len(matrix), title) as (axes,):
        draw_cells(
            axes, shares, [[f"{count:,}" for count in row] for row in matrix], ScalarMappable(Normalize(0, 1), COLOURS)
        )
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(matrix)), names[: len(matrix)])
