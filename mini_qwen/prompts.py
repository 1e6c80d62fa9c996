"""Prompts of a study: texts of the recipe, or the rows of a file of them."""

from pathlib import Path

from mini_qwen.files import KINDS, find_files, kind
from mini_qwen.rows import read_rows

COLUMNS = ("prompt", "question", "instruction", "text", "turns")


def read_prompts(items: list[str]) -> list[str]:
    """The texts, an item that names a data file replaced by its prompts: lines of a .txt, rows of the other kinds.

    Of a row the first column of COLUMNS that it has counts; of `turns`, a list, the first turn.

    Raises SystemExit for a file that is missing or holds no prompt, and for a row without one.
    """
    prompts: list[str] = []
    for item in items:
        if "\n" in item or kind(Path(item)) not in KINDS:
            prompts.append(item)
            continue
        found = []
        for row in read_rows(find_files([item]), list(COLUMNS)):
            values = [row.values[name] for name in COLUMNS if row.values.get(name)]
            text = values[0][0] if values and isinstance(values[0], list) else values[0] if values else None
            if not isinstance(text, str):
                raise SystemExit(f"{row.place} has no prompt: put a text under one of {', '.join(COLUMNS)}.")
            found.append(text)
        if not found:
            raise SystemExit(f"The prompt file '{item}' is empty. Write one prompt a line into it.")
        prompts += found
    return prompts
