"""Chapters of the report that are drawn: classification, decoding, training. Each picture is a PNG in the folder."""

from pathlib import Path
from typing import Any

from mini_qwen.cache import hash_of
from mini_qwen.chapters import MANNERS, Columns, Named, make_table, tasks
from mini_qwen.curves import plot_curves
from mini_qwen.page import Part, Picture, Table
from mini_qwen.pictures import plot_confusion, plot_heat_maps, plot_lines


def classification_chapter(named: Named, folder: Path) -> list[Part]:
    columns: Columns = {
        "accuracy": ("accuracy", "{:.1%}"),
        "standard_error": ("±", "{:.1%}"),
        "chance": ("chance", "{:.1%}"),
        "macro_f1": ("macro-F1", "{:.3f}"),
        "no_label": ("no label said", "{:,}"),
        "accuracy_length_corrected": ("length-corrected", "{:.1%}"),
        "accuracy_prior_corrected": ("prior-corrected", "{:.1%}"),
        "num_rows": ("rows", "{:,}"),
        "num_texts_cut": ("texts cut", "{:,}"),
        "num_repeats_dropped": ("repeats dropped", "{:,}"),
        "num_shots_dropped": ("shots dropped", "{:,}"),
    }
    parts: list[Part] = []
    for name in tasks(named, "classification"):
        for way in ("by_likelihood", "by_text"):
            results = {label: record["classification"][name] for label, record in named.items()}
            results = {label: result | result[way] for label, result in results.items() if way in result}
            shown = way.replace("_", " ")
            parts += make_table(results, columns, f"{name}, {shown}.")
            for label, result in results.items():
                picture = folder / f"confusion_{file_name(name)}_{way}_{file_name(label)}.png"
                names = [*result["labels"], "no label"]
                plot_confusion(result["matrix"], names, picture, f"{name}, {shown}: {label}")
                rows = [[truth, *map(str, row)] for truth, row in zip(result["labels"], result["matrix"], strict=True)]
                parts.append(Picture(picture, f"Confusion matrix of {name}, {shown}, {label}"))
                parts.append(Table(["true \\ said", *names], rows, f"{name}, {shown}, {label}."))
    return parts


def decoding_chapter(named: Named, folder: Path) -> list[Part]:
    """A heat map and a curve for each figure over temperature and top-p, and every setting in a table."""
    named = {label: record for label, record in named.items() if "decoding" in record}
    if not named:
        return []
    parts: list[Part] = []
    for key, (heading, form) in MANNERS.items():
        percent = "%" in form
        drawn = {label: [cell for cell in record["decoding"] if is_drawn(cell)] for label, record in named.items()}
        if any(drawn.values()):
            grids = {label: {(c["temperature"], c["top_p"]): c[key] for c in cells} for label, cells in drawn.items()}
            picture = folder / f"decoding_{key}.png"
            plot_heat_maps(grids, "temperature", "top-p", picture, heading, percent)
            parts.append(Picture(picture, f"{heading} by temperature and top-p, a panel for each checkpoint"))
            lines = {label: curve(cells, key) for label, cells in drawn.items()}
            picture = folder / f"decoding_{key}_by_temperature.png"
            plot_lines(lines, "temperature", heading, picture, f"{heading}, mean over top-p", percent)
            parts.append(Picture(picture, f"{heading} by temperature, a line for each checkpoint"))
    settings: Columns = {
        "temperature": ("temperature", "{:g}"),
        "top_p": ("top-p", "{:g}"),
        "top_k": ("top-k", "{}"),
        "num_beams": ("beams", "{}"),
        "num_answers": ("answers", "{:,}"),
    }
    cells = [{"label": label} | cell for label, record in named.items() for cell in record["decoding"]]
    header = ["stage", *(name for name, _ in (settings | MANNERS).values())]
    rows = [
        [cell["label"], *(form.format(cell[key]) for key, (_, form) in (settings | MANNERS).items())] for cell in cells
    ]
    caption = "Every setting; temperature 0 takes the most likely token. The same seeds for every checkpoint."
    return [*parts, Table(header, rows, caption)]


def is_drawn(cell: dict[str, Any]) -> bool:
    """A cell of the grid of temperature and top-p."""
    return cell["temperature"] > 0 and cell["top_k"] == 0


def curve(cells: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Means over top-p at each temperature."""
    temperatures = sorted({cell["temperature"] for cell in cells})
    groups = [[cell[key] for cell in cells if cell["temperature"] == temperature] for temperature in temperatures]
    return temperatures, [sum(group) / len(group) for group in groups]


def training_chapter(named: Named, folder: Path) -> list[Part]:
    """The losses of all runs, each in a panel, and over one another where a stage was trained more than once."""
    states = {label: Path(record["checkpoint"]) / "trainer_state.json" for label, record in named.items()}
    states = {label: state for label, state in states.items() if state.is_file()}
    if not states:
        return []
    plot_curves(states, folder / "training_loss.png", panels=True)
    parts: list[Part] = [Picture(folder / "training_loss.png", "Training loss of each run, held-out losses as dots")]
    stages = [named[label]["stage"] for label in states]
    for stage in sorted({stage for stage in stages if stages.count(stage) > 1}):
        picture = folder / f"training_loss_{file_name(stage)}.png"
        plot_curves({label: state for label, state in states.items() if named[label]["stage"] == stage}, picture)
        parts.append(Picture(picture, f"Training losses of all {stage} runs in one picture"))
    return parts


def file_name(label: str) -> str:
    """Of letters and digits; where others had to go, with a hash, so that `sft-1` and `sft_1` are two files."""
    plain = "".join(letter if letter.isalnum() else "_" for letter in label)
    return plain if plain == label else f"{plain[-60:]}_{hash_of(label)[:6]}"
