"""Prompts of a study: texts of the recipe, or the rows of a file of them."""

import os
from pathlib import Path

from mini_qwen.files import KINDS, find_files, kind
from mini_qwen.rows import read_rows

COLUMNS = ("prompt", "question", "instruction", "text", "turns")


def read_prompts(items: list[str]) -> list[str]:
    """The texts, an item that names a data file replaced by its prompts: lines of a .txt, rows of the other kinds.

    An item of one line with the ending of a data file names one, blanks in it or not.
    Of a row the first column of COLUMNS that it has counts; of `turns`, a list, the first turn.

    Raises SystemExit for a file that is missing or holds no prompt, for a row without one, and for a blank prompt.
    """
    prompts: list[str] = []
    for item in items:
        if "\n" in item or kind(Path(item)) not in KINDS:
            prompts.append(item)
            continue
        if not os.path.exists(item):  # unlike Path.exists, also of a name that is too long
            raise SystemExit(
                f"There is no data at '{item}', which ends like a file of prompts. Name a file that exists; a text to "
                "answer must end otherwise, with a question mark for one."
            )
        found = []
        for row in read_rows(find_files([item]), list(COLUMNS)):
            names = [name for name in COLUMNS if row.values.get(name)]
            if not names and row.fault is None:
                raise SystemExit(f"{row.place} has no prompt: put a text under one of {', '.join(COLUMNS)}.")
            name = names[0] if names else COLUMNS[0]
            value = row.values.get(name)
            first = {name: value[0]} if isinstance(value, list) else {name: value}
            text = row._replace(values=first).text(name)
            if not text.strip():
                raise SystemExit(f"{row.place} has no prompt: '{name}' is blank.")
            found.append(text)
        if not found:
            raise SystemExit(f"The prompt file '{item}' is empty. Write one prompt a line into it.")
        prompts += found
    if not all(prompt.strip() for prompt in prompts):
        raise SystemExit("A prompt of the recipe is blank: there is nothing to answer. Take it out of 'prompts'.")
    return prompts
