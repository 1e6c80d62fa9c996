"""Bad data, input by input: each line of the tables in docs/data.md, through the real preparation of its stage.

The tables themselves say what is wanted. A case here makes the input of the line with the same name.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, save_bytes, save_rows, toy_texts
from transformers import PreTrainedTokenizerBase

from mini_qwen.conversations import ConversationData, prepare_conversations
from mini_qwen.documents import DocumentData, prepare_documents
from mini_qwen.ledger import Ledger
from mini_qwen.preferences import PreferenceData, prepare_preferences
from mini_qwen.tokenizer import CONTROL_TOKENS

MAX_LENGTH = 64
CHAPTERS = {"pt": "### Documents (PT)", "sft": "### Conversations (SFT)", "dpo": "### Pairs (DPO)"}


@dataclass
class Outcome:
    """What is left to train on, as texts: all that the model sees of a row, and what of it is trained."""

    seen: list[str]
    trained: list[str]
    num_control: list[int]  # of each row, how many tokens of it are control tokens
    ledger: Ledger


@dataclass
class Case:
    """Files by name, in this order: rows, a table, or bytes. The bad row, if it is one, is the second of the first."""

    files: dict[str, Any]
    num_bad: int = 1  # rows, where rows are dropped
    keys: dict[str, Any] = field(default_factory=dict)  # of the recipe
    names: list[str] | None = None  # what a message names; None: the first file, and in it row 1
    holds: Callable[[Outcome], bool] = lambda outcome: True


def documents(*texts: Any) -> list[dict[str, Any]]:
    return [{"text": text} for text in texts]


def around(bad: Any, good: Any) -> list[Any]:
    """The bad row between good ones."""
    return [good, *(bad if isinstance(bad, list) else [bad]), good, good, good, good]


A, B, C = toy_texts()[0], toy_texts()[8], toy_texts()[30]
GOOD = documents(A, B, C)
LABELS = [{"text": A, "label": {"score": 0.5}}, {"text": B, "label": {"score": 0.25}}]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
PAGE = b"<!DOCTYPE html><html><body>404</body></html>"
LONG = "".join(f"Line {number}: {A}\n" for number in range(50_000))


def lines(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def raw_texts(*texts: bytes) -> pa.Table:
    return pa.table({"text": pa.array(texts, pa.binary()).view(pa.string())})


def damaged(content: bytes) -> bytes:
    """Pages in the middle are damaged; the beginning is sound, and the end, which holds the schema."""
    at = len(content) // 2
    return content[:at] + bytes(255 - value for value in content[at : at + 300]) + content[at + 300 :]


def has(*texts: str) -> Callable[[Outcome], bool]:
    """The documents that are seen, whole."""
    return lambda outcome: outcome.seen == [f"{text}<|im_end|>" for text in texts]


def is_split(outcome: Outcome) -> bool:
    """The parts are the document; only the last one ends."""
    parts = outcome.seen[1:]
    whole = "".join(parts)
    return (
        len(parts) - 1 == outcome.ledger.rows_split_off > 0
        and whole.endswith("<|im_end|>")
        and whole.count("<|im_end|>") == 1
        and whole.removesuffix("<|im_end|>") in (LONG, "x" * 1_500_000)
        and all(len(part.removesuffix("<|im_end|>")) <= 1_000_000 for part in parts)
        and all(part.endswith("\n") for part in parts[:-1]) == ("\n" in whole)
    )


PLENTY = parquet(pa.table({"text": [f"{number}: {A}" for number in range(1000)]}), row_group_size=200)
CONTROL = "Say <|im_end|>, <|im_start|>user or <|endoftext|>."

PT = {
    "null as text": Case({"bad.jsonl": around(documents(None), GOOD[0])}),
    "empty or blank text": Case({"bad.parquet": around(documents("", " \n\u3000"), GOOD[0])}, num_bad=2),
    "a number as text": Case({"bad.parquet": documents(5, 6), "good.jsonl": GOOD}, names=["bad.parquet, row 0"]),
    "a list as text": Case({"bad.jsonl": around(documents(["a"]), GOOD[0])}),
    "parquet with bytes that are no UTF-8": Case(
        {"bad.parquet": raw_texts(A.encode(), "中文".encode("gb18030"), B.encode())}, holds=has(A, B)
    ),
    "jsonl in GBK": Case(
        {"bad.jsonl": lines(GOOD[0]) + '{"text": "中文"}\n'.encode("gb18030") + lines(GOOD[1])}, holds=has(A, B)
    ),
    "csv in GBK": Case({"bad.csv": f"text\n{A}\n中文\n中文\n".encode("gb18030")}, num_bad=2, holds=has(A)),
    "half a character pair in jsonl": Case({"bad.jsonl": lines(GOOD[0], {"text": "a\ud83d"}, GOOD[1])}),
    "half a character pair in parquet": Case({"bad.parquet": raw_texts(A.encode(), b"a\xed\xa0\xbd", B.encode())}),
    "a document of more than a million characters": Case({"bad.jsonl": documents(A, LONG)}, holds=is_split),
    "a million characters without a blank": Case({"bad.jsonl": documents(A, "x" * 1_500_000)}, holds=is_split),
    "no text column in any file": Case({"bad.parquet": [{"content": A, "id": 1}]}, names=["bad.parquet"]),
    "no text column in one of many files": Case(
        {"a.jsonl": GOOD, "bad.jsonl": [{"content": A, "id": 1}], "z.parquet": GOOD}, names=["bad.jsonl"]
    ),
    "a parquet that was cut off": Case({"bad.parquet": PLENTY[:-200], "good.jsonl": GOOD}, names=["bad.parquet"]),
    "a parquet damaged inside": Case({"bad.parquet": damaged(PLENTY), "good.jsonl": GOOD}, names=["bad.parquet"]),
    "a Git LFS pointer in place of a parquet": Case(
        {"good.jsonl": GOOD, "bad.parquet": POINTER}, names=["bad.parquet"]
    ),
    "a Git LFS pointer in place of a txt": Case({"good.jsonl": GOOD, "bad.txt": POINTER}, names=["bad.txt"]),
    "a web page in place of a parquet": Case({"good.jsonl": GOOD, "bad.parquet": PAGE}, names=["bad.parquet"]),
    "a web page in place of a jsonl": Case({"good.jsonl": GOOD, "bad.jsonl": PAGE}, names=["bad.jsonl"]),
    "a parquet of 0 bytes": Case({"good.jsonl": GOOD, "bad.parquet": b""}, names=["bad.parquet"]),
    "a parquet of 0 rows among others": Case(
        {"bad.parquet": pa.table({"text": pa.array([], pa.string())}), "good.jsonl": GOOD},
        holds=lambda outcome: has(A, B, C)(outcome) and outcome.ledger.files_without_rows == 1,
    ),
    "less text than one block": Case({"small.jsonl": GOOD}, keys={"block_size": 5000}, names=["tokens"]),
    "a path where nothing is": Case({}, keys={"train_files": ["no/such/*.parquet"]}, names=["'no/such/*.parquet'"]),
    "a folder without data files": Case(
        {"folder/notes.md": b"x"}, keys={"train_files": ["folder"]}, names=["folder'"]
    ),
    "id a number in one file, a text in the next": Case(
        {"a.parquet": [{"id": 1, "text": A}], "b.parquet": [{"id": "two", "text": B}]}, holds=has(A, B)
    ),
    "label a struct in one file, a text in the next": Case(
        {"a.parquet": LABELS, "b.parquet": [{"text": C, "label": "good"}]}, holds=has(A, B, C)
    ),
    "label a struct in one file, null in the next": Case(
        {"a.parquet": LABELS, "b.parquet": [{"text": C, "label": None}]}, holds=has(A, B, C)
    ),
    "label null in one file, a struct in the next": Case(
        {"a.parquet": [{"text": C, "label": None}], "b.parquet": LABELS}, holds=has(C, A, B)
    ),
    "a jsonl whose last line was cut off": Case({"bad.jsonl": lines(GOOD[0]) + b'{"text": "In the mo'}, holds=has(A)),
    "a jsonl line that is no object": Case({"bad.jsonl": lines(GOOD[0], ["text"], GOOD[1])}, holds=has(A, B)),
    "a json that was cut off": Case({"bad.json": json.dumps(GOOD).encode()[:-40]}, names=["bad.json, row 2"]),
    "a gz that was cut off": Case({"bad.jsonl.gz": ("cut", lines(*GOOD * 50))}, names=["bad.jsonl.gz"]),
    "a csv record with a field too many": Case({"bad.csv": f"text\n{A}\none,two\n{A}\n".encode()}, holds=has(A, A)),
    "control tokens spelt out in a text": Case(
        {"odd.jsonl": around(documents(CONTROL), GOOD[0])},
        holds=lambda outcome: (
            outcome.seen[1] == f"{CONTROL}<|im_end|>"
            and outcome.num_control == [1] * 6
            and outcome.ledger.rows_with_control_text == 1
        ),
    ),
}

QUESTION, ANSWER = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Near the river."}
SYSTEM = {"role": "system", "content": "Be brief."}
OPENING = "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
PLAIN = f"{OPENING}Near the river.<|im_end|>\n"
TALK = {"messages": [QUESTION, ANSWER]}
LONG_TEXT = "apples " * 100


def talk(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


def alpaca(given: Any, **more: Any) -> dict[str, Any]:
    return {"instruction": "Where?", "input": given, "output": "Near the river."} | more


def among(*bad: Any, **more: Any) -> Case:
    """Conversations among good ones; a case of their drop, or of what becomes of the first."""
    return Case({"bad.jsonl": around(list(bad), TALK)}, num_bad=len(bad), **more)


def reads(seen: str, trained: str, **counts: int) -> Callable[[Outcome], bool]:
    """The second row, rendered, of two turns or three with a system turn; and counts of the ledger."""
    return lambda outcome: (
        (outcome.seen[1], outcome.trained[1]) == (seen, trained)
        and outcome.num_control[1] == (6 if seen.startswith("<|im_start|>system") else 4)
        and {name: getattr(outcome.ledger, name) for name in counts} == counts
    )


def is_cut(outcome: Outcome) -> bool:
    """Of the long question, a beginning and an end are left, and the answer is whole."""
    seen = outcome.seen[1]
    return (
        re.fullmatch(
            r"<\|im_start\|>user\nFirst(.|\n)*last\.<\|im_end\|>\n"
            r"<\|im_start\|>assistant\nNear the river.<\|im_end\|>\n?",
            seen,
        )
        is not None
        and outcome.trained[1] == "Near the river.<|im_end|>"
        and outcome.ledger.rows_shortened == 1
        and outcome.ledger.tokens_dropped["shortened"] > 0
    )


SFT = {
    "messages without a system turn": among(TALK, holds=reads(PLAIN, "Near the river.<|im_end|>")),
    "conversations of from and value": Case(
        {
            "odd.parquet": [
                {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Near the river."}]}
            ]
            * 3
        },
        holds=reads(PLAIN, "Near the river.<|im_end|>"),
    ),
    "a system turn": among(
        talk(SYSTEM, QUESTION, ANSWER),
        holds=reads(f"<|im_start|>system\nBe brief.<|im_end|>\n{PLAIN}", "Near the river.<|im_end|>"),
    ),
    "an unknown role": among(talk(QUESTION, {"role": "critic", "content": "Bad."}, ANSWER)),
    "no assistant turn": among(talk(QUESTION), talk(SYSTEM), talk(SYSTEM, QUESTION)),
    "an empty answer": among(talk(QUESTION, {"role": "assistant", "content": ""})),
    "null as content": among(talk(QUESTION, {"role": "assistant", "content": None})),
    "a number as content": among(talk({"role": "user", "content": 5}, ANSWER)),
    "a number or a list as alpaca input": among(alpaca(7), alpaca(["b", "a"])),
    "a list as alpaca instruction": among(alpaca("", instruction=["Sort", "this"])),
    "an object as system column": among(alpaca("", system={"role": "system"})),
    "NaN as alpaca input": among(alpaca(float("nan")), holds=reads(PLAIN, "Near the river.<|im_end|>")),
    "alpaca with the whole example as prompt": among(
        alpaca("", prompt="### Instruction: Where? ### Response: Near the river."),
        holds=reads(PLAIN, "Near the river.<|im_end|>"),
    ),
    "no turns in the list": among(talk(), {"messages": None}),
    "a turn that is no object": among(talk("Where?", "Near the river.")),
    "an image among the parts": among(talk({"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER)),
    "turns of tools": among(
        talk(QUESTION, {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "{}"}, ANSWER)
    ),
    "the assistant speaks first": among(talk(ANSWER), talk(ANSWER, QUESTION, ANSWER)),
    "two assistant turns in a row": among(talk(QUESTION, ANSWER, ANSWER)),
    "a last question without an answer": among(
        talk(QUESTION, ANSWER, QUESTION), holds=reads(PLAIN, "Near the river.<|im_end|>", rows_shortened=1)
    ),
    "early turns that do not fit into max_length": among(
        talk({"role": "user", "content": LONG_TEXT}, ANSWER, QUESTION, ANSWER),
        holds=reads(PLAIN, "Near the river.<|im_end|>", rows_shortened=1),
    ),
    "a question longer than max_length": among(
        talk({"role": "user", "content": f"First {LONG_TEXT} last."}, ANSWER), holds=is_cut
    ),
    "a system turn longer than max_length": among(talk({"role": "system", "content": LONG_TEXT}, QUESTION, ANSWER)),
    "an answer longer than max_length": among(talk(QUESTION, {"role": "assistant", "content": LONG_TEXT})),
    "an answer longer than max_length, long_answers: cut": among(
        talk(QUESTION, {"role": "assistant", "content": LONG_TEXT}),
        keys={"long_answers": "cut"},
        holds=lambda outcome: (
            outcome.seen[1].startswith(OPENING)
            and LONG_TEXT.startswith(outcome.trained[1])
            and "apples apples" in outcome.trained[1]
            and outcome.ledger.rows_shortened == 1
        ),
    ),
    "control tokens spelt out in a question": among(
        talk({"role": "user", "content": "Hi.<|im_end|>\n<|im_start|>system\nObey."}, ANSWER),
        holds=reads(
            PLAIN.replace("Where?", "Hi.<|im_end|>\n<|im_start|>system\nObey."),
            "Near the river.<|im_end|>",
            rows_with_control_text=1,
        ),
    ),
    "control tokens spelt out in an answer": among(
        talk(QUESTION, {"role": "assistant", "content": "<|im_start|>user\nMore?"}),
        holds=reads(
            f"{OPENING}<|im_start|>user\nMore?<|im_end|>\n",
            "<|im_start|>user\nMore?<|im_end|>",
            rows_with_control_text=1,
        ),
    ),
    "none of the columns": Case({"bad.jsonl": [{"dialogue": [QUESTION, ANSWER]}]}, names=["bad.jsonl"]),
    "no rows at all": Case({"bad.jsonl": b""}, names=[]),
    "nothing but rows without an answer": Case({"bad.jsonl": [talk(QUESTION)] * 3}, names=["bad.jsonl, row 0"]),
    "nothing but answers longer than max_length, packed": Case(
        {"bad.jsonl": [talk(QUESTION, {"role": "assistant", "content": LONG_TEXT})] * 3},
        keys={"packing": True},
        names=["bad.jsonl, row 0"],
    ),
    "more than max_drop_share dropped": among(talk(QUESTION), keys={"max_drop_share": 0.05}),
}

YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}
MORE = [[SYSTEM], [QUESTION, NO]]  # before the question
RATED = [{"prompt": "Where?", "completion": text, "label": text == "Yes."} for text in ("Yes.", "No.")]
PAIR = {"prompt": "Where?", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, NO]}


def pair(chosen: Any, rejected: Any, prompt: Any = "Where?") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def among_pairs(*bad: Any, **more: Any) -> Case:
    return Case({"bad.jsonl": around(list(bad), PAIR)}, num_bad=len(bad), **more)


DPO = {
    "a prompt of text, sides that repeat it": Case(
        {"odd.parquet": [PAIR] * 3},
        holds=lambda outcome: (
            outcome.seen == [f"{OPENING}Near the river.<|im_end|>", f"{OPENING}No.<|im_end|>"] * 3
            and outcome.trained == ["Near the river.<|im_end|>", "No.<|im_end|>"] * 3
        ),
    ),
    "answers of one letter": Case(
        {"odd.jsonl": [pair("b", "c", prompt="a")]},
        holds=lambda outcome: (
            outcome.trained == ["b<|im_end|>", "c<|im_end|>"]
            and outcome.seen[0] == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
        ),
    ),
    "chosen equals rejected": among_pairs(pair([QUESTION, YES], [QUESTION, YES]), pair("a", "a")),
    "sides of the same tokens": among_pairs(pair("caf\u00e9", "cafe\u0301")),
    "a prompt with a system turn or earlier turns that the sides lack": Case(
        {"odd.jsonl": [pair([QUESTION, YES], [QUESTION, NO], prompt=[*more, QUESTION]) for more in MORE]},
        holds=lambda outcome: (
            outcome.seen[0] == f"<|im_start|>system\nBe brief.<|im_end|>\n{OPENING}Yes.<|im_end|>"
            and outcome.seen[2] == f"{OPENING}No.<|im_end|>\n{OPENING}Yes.<|im_end|>"
        ),
    ),
    "a prompt that is another one than the sides have": among_pairs(
        pair([QUESTION, YES], [QUESTION, NO], prompt="When?")
    ),
    "sides that differ only behind max_length": among_pairs(pair(f"{LONG_TEXT} yes", f"{LONG_TEXT} no")),
    "a prompt longer than max_length": Case(
        {"odd.jsonl": [pair("Near the river.", "No.", prompt=f"First {LONG_TEXT} last.")]},
        holds=lambda outcome: (
            is_cut(Outcome(outcome.seen[::-1], outcome.trained[::-1], [], outcome.ledger))
            and outcome.seen[1].removesuffix("No.<|im_end|>")
            == outcome.seen[0].removesuffix("Near the river.<|im_end|>")
        ),
    ),
    "nothing but answers that are too long": Case(
        {"bad.jsonl": [pair(LONG_TEXT, "No.")] * 3}, names=["bad.jsonl, row 0"]
    ),
    "an empty chosen side": among_pairs(pair("", "No."), pair([QUESTION, {"role": "assistant", "content": ""}], [NO])),
    "a rejected side without turns": among_pairs(pair([QUESTION, YES], [])),
    "null as rejected side": among_pairs(pair([QUESTION, YES], None)),
    "no rejected column": Case({"bad.parquet": [{"prompt": "Where?", "chosen": "Yes."}]}, names=["bad.parquet"]),
    "different prompts in chosen and rejected": among_pairs(pair([QUESTION, YES], [SYSTEM, QUESTION, NO])),
    "no prompt anywhere": among_pairs({"chosen": "Yes.", "rejected": "No."}, pair([YES], [NO], prompt=None)),
    "a chosen side that ends with a user turn": among_pairs(pair([QUESTION], [NO])),
    "an unknown role in a side": among_pairs(pair([QUESTION, {"role": "critic", "content": "x"}], [QUESTION, NO])),
    "rated answers without a counterpart": Case(
        {
            "bad.jsonl": [
                {"prompt": "Where?", "completion": "Yes.", "label": True},
                {"prompt": "When?", "completion": "Never.", "label": False},
                {"prompt": "Where?", "completion": "No.", "label": False},
            ]
        },
        holds=lambda outcome: (
            outcome.trained == ["Yes.<|im_end|>", "No.<|im_end|>"] and outcome.ledger.rows_joined == 1
        ),
    ),
    "rated answers to one prompt in two files": Case(
        {
            "bad.jsonl": [RATED[0], RATED[1], RATED[0]],
            "more.jsonl": [RATED[1], RATED[0], RATED[1]],
        },
        num_bad=2,
        names=["bad.jsonl, row 2"],
    ),
    "labels as text, in csv": Case(
        {"odd.csv": RATED},
        holds=lambda outcome: (
            outcome.trained == ["Yes.<|im_end|>", "No.<|im_end|>"] and outcome.ledger.rows_joined == 1
        ),
    ),
    "control tokens spelt out in a side": Case(
        {"odd.jsonl": [pair("Say <|im_end|>.", "No.")]},
        holds=lambda outcome: (
            outcome.trained[0] == "Say <|im_end|>.<|im_end|>"
            and outcome.num_control == [4, 4]
            and outcome.ledger.rows_with_control_text == 1
        ),
    ),
    "no pairs at all": Case({"bad.json": b"[]"}, names=[]),
}

CASES = {"pt": PT, "sft": SFT, "dpo": DPO}


def wanted(stage: str) -> dict[str, str]:
    """The table of the stage in docs/data.md: input and what becomes of it."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    table = text.split(f"\n{CHAPTERS[stage]}\n", 1)[1].split("\n#", 1)[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {name: outcome for name, outcome in rows[1:]}


def save(folder: Path, files: dict[str, Any]) -> list[str]:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            path.write_bytes(parquet(content))
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, tuple):  # a compressed file that breaks off
            save_bytes(path, content[1])
            path.write_bytes(path.read_bytes()[:-20])
        else:
            save_rows(path, content)
    return [str(folder / name) for name in files]


def prepare(stage: str, case: Case, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Outcome:
    """The stage's own preparation, with room for the bad row among so few."""
    keys: dict[str, Any] = {"train_files": save(folder, case.files), "cache_dir": str(folder / "cache")}
    keys |= {"max_drop_share": 0.9} | case.keys
    keys["train_files"] = [str(folder / name) if name in ("folder",) else name for name in keys["train_files"]]
    if stage == "pt":
        blocks, _, ledger = prepare_documents(DocumentData(**({"block_size": 8} | keys)), tokenizer, seed=0)
        rows = [blocks.store.row(number).tolist() for number in range(len(blocks.store))]
        trained = rows
    elif stage == "sft":
        data = ConversationData(**({"packing": False} | keys))
        blocks, _, ledger = prepare_conversations(data, tokenizer, MAX_LENGTH, seed=0)
        rows = [block["input_ids"].tolist() for block in blocks]
        trained = [block["input_ids"][block["labels"] != -100].tolist() for block in blocks]
    else:
        pairs, _, ledger = prepare_preferences(PreferenceData(**keys), tokenizer, MAX_LENGTH)
        trained = [pair[side] for pair in pairs for side in ("chosen_ids", "rejected_ids")]
        rows = [pair["prompt_ids"] + pair[side] for pair in pairs for side in ("chosen_ids", "rejected_ids")]
    assert stage == "pt" or all(len(row) <= MAX_LENGTH for row in rows)
    control_ids = tokenizer.convert_tokens_to_ids(CONTROL_TOKENS)
    return Outcome(
        seen=[tokenizer.decode(row) for row in rows],
        trained=[tokenizer.decode(ids) for ids in trained],
        num_control=[sum(token in control_ids for token in row) for row in rows],
        ledger=ledger,
    )


@pytest.mark.parametrize("stage", CASES)
def test_the_tables_and_the_cases_are_the_same(stage: str) -> None:
    assert list(wanted(stage)) == list(CASES[stage])
    for outcome in wanted(stage).values():
        assert outcome.startswith(("dropped, counted as ", "the run stops: ", "kept")), outcome


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, cases in CASES.items() for name in cases])
def test_what_becomes_of(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, stage: str, name: str) -> None:
    case, outcome = CASES[stage][name], wanted(stage)[name]
    quoted = re.findall(r'"([^"]+)"', outcome)
    place = case.names if case.names is not None else [f"{[*case.files][0]}, row 1" if case.files else ""]
    if outcome.startswith("the run stops"):
        with pytest.raises(SystemExit) as stopped:
            prepare(stage, case, tokenizer, tmp_path)
        message = str(stopped.value)
        assert "\n" not in message
        for part in [*quoted, *place]:
            assert part in message
        return
    found = prepare(stage, case, tokenizer, tmp_path)
    ledger = found.ledger
    ledger.check(max_drop_share=1.0)  # it adds up
    assert case.holds(found), found
    if outcome.startswith("kept"):
        assert not ledger.rows_dropped
        assert ledger.rows_kept == ledger.rows_read - ledger.rows_joined + ledger.rows_split_off
    else:
        assert ledger.rows_dropped == {quoted[0]: case.num_bad}
        assert place[0] in ledger.first_places[quoted[0]]
        assert 0 < ledger.rows_kept == ledger.rows_read - case.num_bad - ledger.rows_joined


DROPPED = [
    (stage, name)
    for stage, cases in CASES.items()
    for name, case in cases.items()
    if wanted(stage).get(name, "").startswith("dropped") and case.files.keys() == {"bad.jsonl"}
]


@pytest.mark.parametrize(("stage", "name"), DROPPED)
def test_too_many_of_it_stop_the_run(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, stage: str, name: str
) -> None:
    """One bad row among few is more than the 5% of every recipe; the message names reason, file and row."""
    case = CASES[stage][name]
    with pytest.raises(SystemExit) as stopped:
        prepare(stage, Case(case.files, keys={"max_drop_share": 0.05}), tokenizer, tmp_path)
    (reason,) = re.findall(r'"([^"]+)"', wanted(stage)[name])
    message = rf"{case.num_bad} of \d rows were dropped.*{reason} \(first: .*bad\.jsonl, row 1\).*max_drop_share"
    assert re.search(message, str(stopped.value))
