"""Rated answers: each alone in a row, with a label, as for KTO; two of unlike labels are a pair."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from mini_qwen.rows import Row

LABELS = {"true": True, "1": True, "false": False, "0": False}  # as csv spells them


def read_label(value: Any) -> bool | None:
    """Whether an answer is rated good; None for what is no rating."""
    if isinstance(value, str):
        return LABELS.get(value.strip().lower())
    return bool(value) if value in (True, False) else None


def join_rated(rows: Iterable[Row]) -> Iterator[Row]:
    """Make pairs of rated answers, `label` true or false, to one prompt (the form of KTO); other rows pass unchanged.

    An answer waits in memory for one of the other label; those for which none comes are passed on at the end, with
    that fault.
    """
    waiting: dict[str, list[Row]] = {}
    for row in rows:
        label = read_label(row.values.get("label"))
        if row.fault or "chosen" in row.values or label is None:
            yield row
            continue
        prompt, answer = row.values.get("prompt"), row.values.get("completion")
        if answer is None and isinstance(row.values.get("messages"), list):
            prompt, answer = row.values["messages"][:-1], row.values["messages"][-1:]
        values = {**row.values, "messages": None, "prompt": prompt, "completion": answer, "label": label}
        row = row._replace(values=values)
        same = waiting.setdefault(json.dumps([prompt, row.values.get("system")], sort_keys=True, default=str), [])
        if not same or same[0].values["label"] == label:
            same.append(row)
            continue
        other = same.pop(0)
        chosen, rejected = (row, other) if label else (other, row)
        sides = {"chosen": chosen.values["completion"], "rejected": rejected.values["completion"]}
        yield row._replace(values={"joined": True, "prompt": prompt, "system": row.values.get("system"), **sides})
    for row in (row for same in waiting.values() for row in same):
        yield row._replace(fault="no answer of the other label in its file")
