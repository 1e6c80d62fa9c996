"""mini_qwen/pictures.py: every figure stands in its cell, and no label breaks a picture."""

import math
import warnings
from pathlib import Path

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from mini_qwen import pictures
from mini_qwen.pictures import drawable, plot_confusion, plot_heat_maps, plot_lines, short_names

GRID = {(0.5, 0.8): 0.1, (0.5, 1.0): 0.2, (1.0, 0.8): 0.3, (1.0, 1.0): 0.4}


def written(figure: Figure, panel: int) -> dict[tuple[float, float], str]:
    """Text of each cell, under the names of its ticks."""
    axes = figure.axes[panel]
    xs, ys = ([label.get_text() for label in labels] for labels in (axes.get_xticklabels(), axes.get_yticklabels()))
    found = {}
    for text in axes.texts:
        column, row = text.get_position()
        found[xs[int(column)], ys[int(row)]] = text.get_text()
    return found


def test_every_cell_says_its_figure(tmp_path: Path, figures: list[Figure]) -> None:
    other = {cell: value * 2 for cell, value in GRID.items() if cell != (1.0, 1.0)}
    plot_heat_maps({"pt": GRID, "sft": other}, "temperature", "top_p", tmp_path / "a.png", "stops", percent=True)
    (figure,) = figures
    assert written(figure, 0) == {("0.5", "0.8"): "10%", ("0.5", "1"): "20%", ("1", "0.8"): "30%", ("1", "1"): "40%"}
    assert written(figure, 1) == {("0.5", "0.8"): "20%", ("0.5", "1"): "40%", ("1", "0.8"): "60%", ("1", "1"): "-"}
    first, second = (axes.images[0].norm for axes in figure.axes[:2])
    assert (first.vmin, first.vmax) == (second.vmin, second.vmax) == (0.1, 0.6)


def test_lines_have_their_points_and_names(tmp_path: Path, figures: list[Figure]) -> None:
    plot_lines({"pt": ([0, 1], [2, 3]), "_sft": ([0, 1], [4, math.nan])}, "t", "length", tmp_path / "a.png", "Length")
    (figure,) = figures
    first, second = figure.axes[0].get_lines()
    assert first.get_xydata().tolist() == [[0, 2], [1, 3]]
    assert first.get_color() != second.get_color()
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["pt", "_sft"]


def test_counts_stand_in_the_row_of_the_truth(tmp_path: Path, figures: list[Figure]) -> None:
    plot_confusion([[5, 1, 0], [0, 1234, 2]], ["sport", "体育", "no answer"], tmp_path / "a.png", "BBC")
    (figure,) = figures
    assert written(figure, 0) == {
        ("sport", "sport"): "5",
        ("class 2", "sport"): "1",
        ("no answer", "sport"): "0",
        ("sport", "class 2"): "0",
        ("class 2", "class 2"): "1,234",
        ("no answer", "class 2"): "2",
    }
    with pytest.raises(ValueError, match="3 labels, but rows of \\[2\\] counts"):
        plot_confusion([[1, 2]], ["a", "b", "c"], tmp_path / "b.png", "")


@pytest.mark.parametrize(
    "label", ["中文", "a$b$ \\frac{", "_hidden", "\ud800\x00", "\U0001f600", "x" * 300, "", "a\nb"]
)
def test_no_label_breaks_a_picture_or_lacks_its_glyphs(tmp_path: Path, label: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a missing glyph, and draws a box
        plot_lines({label: ([0], [1])}, label, label, tmp_path / "lines.png", label)
        plot_heat_maps({label: GRID}, label, label, tmp_path / "heat.png", label)
        plot_confusion([[1]], [label], tmp_path / "confusion.png", label)
    for name in ("lines", "heat", "confusion"):
        assert image.imread(tmp_path / f"{name}.png").std() > 0
    assert max(map(len, drawable(label).split("\n"))) <= 49


def test_labels_stay_apart() -> None:
    names = short_names(["体育", "财经", "sport"])
    assert list(names.values()) == ["class 1", "class 2", "sport"]


def test_nothing_to_draw_is_an_empty_picture(tmp_path: Path, figures: list[Figure]) -> None:
    plot_heat_maps({}, "x", "y", tmp_path / "a/heat.png", "")
    plot_heat_maps({"pt": {}}, "x", "y", tmp_path / "heat.png", "")
    plot_heat_maps({"pt": {(0, 0): math.nan}}, "x", "y", tmp_path / "heat.png", "")
    plot_lines({}, "x", "y", tmp_path / "lines.png", "")
    assert len(figures) == 4
    assert not pictures.pyplot.get_fignums()
