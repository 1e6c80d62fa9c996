"""Presets: questions that a page offers, from a file with a row each."""

from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

from mini_qwen.files import find_files
from mini_qwen.rows import read_rows

NAME_LENGTH = 60  # characters of a prompt that stand for its name


class Preset(NamedTuple):
    name: str
    prompt: str
    system: str


def read_presets(path: str | None) -> list[Preset]:
    """The rows of a .csv or other data file with a `prompt`, perhaps `system` and `name`, or the lines of a .txt.

    Two of one name get numbers. Raises SystemExit for a file that is missing or empty, and for a row without a prompt.
    """
    if path is None:
        return []
    presets: list[Preset] = []
    for row in read_rows(find_files([path]), ["prompt", "system", "name", "text"]):
        if row.fault is None and row.values.get("prompt") is None and row.values.get("text") is None:
            raise SystemExit(f"{row.place} has no prompt: write one under the column 'prompt'.")
        prompt = row.text("text" if row.values.get("prompt") is None else "prompt")
        if not prompt.strip():
            raise SystemExit(f"{row.place} has no prompt: it is blank.")
        system, name = (row.text(key) if row.values.get(key) else "" for key in ("system", "name"))
        name = " ".join((name.strip() or prompt).split())[:NAME_LENGTH]
        taken = {preset.name for preset in presets}
        numbered = (f"{name} ({number})" for number in count(2))
        presets.append(Preset(next(one for one in chain([name], numbered) if one not in taken), prompt, system))
    if not presets:
        raise SystemExit(f"'{Path(path)}' holds no preset. Write one a line, under the heading 'prompt'.")
    return presets
