"""mini_qwen/schemas.py: the forms of conversations and pairs all read as the same turns; what is none is counted."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import save_rows
from transformers import PreTrainedTokenizerBase

from mini_qwen.conversations import ConversationData, prepare_conversations
from mini_qwen.preferences import PreferenceData, prepare_preferences
from mini_qwen.schemas import BadRow, check_order, read_conversation, read_pair, read_turns

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Where?"}
ANSWER = {"role": "assistant", "content": "Near the river."}
WORSE = {"role": "assistant", "content": "Who knows."}
EARLIER = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


def sharegpt(turns: list[dict[str, str]], user: str = "human", assistant: str = "gpt") -> list[dict[str, str]]:
    names = {"system": "system", "user": user, "assistant": assistant}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


def parts(turns: list[dict[str, str]], key: str) -> list[dict[str, Any]]:
    """Each content as parts, cut in two."""
    return [
        turn | {"content": [{"type": "text", key: turn["content"][:3]}, {"type": "text", key: turn["content"][3:]}]}
        for turn in turns
    ]


# Form: the row, and the turns that it means.
CONVERSATIONS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "sharegpt": ({"conversations": sharegpt([USER, ANSWER])}, [USER, ANSWER]),
    "sharegpt with a system turn": ({"conversations": sharegpt([SYSTEM, USER, ANSWER])}, [SYSTEM, USER, ANSWER]),
    "sharegpt, several exchanges": ({"conversations": sharegpt([*EARLIER, USER, ANSWER])}, [*EARLIER, USER, ANSWER]),
    "sharegpt, user and bot": ({"conversations": sharegpt([USER, ANSWER], "user", "bot")}, [USER, ANSWER]),
    "sharegpt, model": ({"conversations": sharegpt([USER, ANSWER], "user", "model")}, [USER, ANSWER]),
    "sharegpt with a system column": (
        {"system": "Be brief.", "conversations": sharegpt([USER, ANSWER])},
        [SYSTEM, USER, ANSWER],
    ),
    "a system turn goes before the column": (
        {"system": "another", "conversations": [SYSTEM, USER, ANSWER]},
        [SYSTEM, USER, ANSWER],
    ),
    "an empty system turn is none": (
        {"conversations": [{"from": "system", "value": ""}, *sharegpt([USER, ANSWER])]},
        [USER, ANSWER],
    ),
    "an empty system column is none": ({"system": " ", "messages": [USER, ANSWER]}, [USER, ANSWER]),
    "no tools": ({"tools": "[]", "conversations": sharegpt([USER, ANSWER])}, [USER, ANSWER]),
    "conversations of role and content": ({"conversations": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "messages": ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "messages of from and value": ({"messages": sharegpt([USER, ANSWER])}, [USER, ANSWER]),
    "messages beside their prompt": ({"prompt": "Where?", "messages": [USER, ANSWER]}, [USER, ANSWER]),
    "messages beside empty columns": (
        {"messages": [USER, ANSWER], "conversations": None, "output": None, "tools": None},
        [USER, ANSWER],
    ),
    "parts with text": ({"messages": parts([USER, ANSWER], "text")}, [USER, ANSWER]),
    "parts with value": ({"messages": parts([SYSTEM, USER, ANSWER], "value")}, [SYSTEM, USER, ANSWER]),
    "parts as parquet fills them up": (
        {
            "messages": [
                turn | {"content": [{"type": "text", "text": None, "value": turn["content"]}]}
                for turn in (USER, ANSWER)
            ]
        },
        [USER, ANSWER],
    ),
    "prompt and completion": ({"prompt": "Where?", "completion": "Near the river."}, [USER, ANSWER]),
    "prompt and completion as turns": ({"prompt": [*EARLIER, USER], "completion": [ANSWER]}, [*EARLIER, USER, ANSWER]),
    "a prompt of turns, a completion of text": ({"prompt": [USER], "completion": "Near the river."}, [USER, ANSWER]),
    "alpaca": ({"instruction": "Where?", "input": "", "output": "Near the river."}, [USER, ANSWER]),
    "alpaca without input": ({"instruction": "Where?", "output": "Near the river."}, [USER, ANSWER]),
    "alpaca with an input": (
        {"instruction": "Translate:", "input": "猫", "output": "cat"},
        [{"role": "user", "content": "Translate:\n猫"}, {"role": "assistant", "content": "cat"}],
    ),
    "alpaca with history and system": (
        {
            "instruction": "Where?",
            "input": None,
            "output": "Near the river.",
            "history": [["Hi.", "Hello."]],
            "system": "Be brief.",
        },
        [SYSTEM, *EARLIER, USER, ANSWER],
    ),
    "alpaca beside a prompt that holds the whole example": (
        {"instruction": "Where?", "input": "", "output": "Near the river.", "completion": "elsewhere"}
        | {"prompt": "### Instruction: Where? ### Output: Near the river."},
        [USER, ANSWER],
    ),
    "prompt and completion beside an output of something else": (
        {"prompt": "Where?", "completion": "Near the river.", "output": "Who knows."},
        [USER, ANSWER],
    ),
    "prompt and completion beside empty alpaca columns": (
        {"prompt": "Where?", "completion": "Near the river.", "instruction": "", "output": ""},
        [USER, ANSWER],
    ),
    "alpaca with an empty history": (
        {"instruction": "Where?", "input": "", "output": "Near the river.", "history": [], "system": ""},
        [USER, ANSWER],
    ),
}

PAIRS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "the seed's: a prompt of text, both sides whole": (
        {"prompt": "Where?", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        [USER],
    ),
    "a prompt of text, sides of one turn": ({"prompt": "Where?", "chosen": [ANSWER], "rejected": [WORSE]}, [USER]),
    "a prompt of text, sides of text": (
        {"prompt": "Where?", "chosen": "Near the river.", "rejected": "Who knows."},
        [USER],
    ),
    "a prompt of turns": ({"prompt": [*EARLIER, USER], "chosen": [ANSWER], "rejected": [WORSE]}, [*EARLIER, USER]),
    "a prompt inside the sides only": (
        {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, WORSE]},
        [SYSTEM, USER],
    ),
    "an empty prompt beside whole sides": (
        {"prompt": None, "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        [USER],
    ),
    "sharegpt, each side one turn": (
        {"conversations": sharegpt([USER]), "chosen": sharegpt([ANSWER])[0], "rejected": sharegpt([WORSE])[0]},
        [USER],
    ),
    "sharegpt with system and history": (
        {"system": "Be brief.", "conversations": sharegpt([*EARLIER, USER])}
        | {"chosen": sharegpt([ANSWER])[0], "rejected": sharegpt([WORSE])[0]},
        [SYSTEM, *EARLIER, USER],
    ),
    "alpaca": (
        {"instruction": "Where?", "input": "", "chosen": "Near the river.", "rejected": "Who knows."},
        [USER],
    ),
    "whole sides beside prompt and messages": (
        {"prompt": "Where?", "messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        [USER],
    ),
    "a prompt of turns with a system turn that the sides lack": (
        {"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        [SYSTEM, USER],
    ),
    "a prompt of turns with earlier ones that the sides lack": (
        {"prompt": [*EARLIER, USER], "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        [*EARLIER, USER],
    ),
    "a prompt of the last question, sides with all turns": (
        {
            "prompt": " Where?\n",
            "chosen": [SYSTEM, *EARLIER, USER, ANSWER],
            "rejected": [SYSTEM, *EARLIER, USER, WORSE],
        },
        [SYSTEM, *EARLIER, USER],
    ),
    "a prompt of the first question, sides with all turns": (
        {"prompt": "Hi.", "chosen": [*EARLIER, USER, ANSWER], "rejected": [*EARLIER, USER, WORSE]},
        [*EARLIER, USER],
    ),
    "parts": (
        {"prompt": parts([USER], "text"), "chosen": parts([ANSWER], "text"), "rejected": parts([WORSE], "text")},
        [USER],
    ),
}


@pytest.mark.parametrize("none", [None, float("nan")])
def test_none_and_nan_are_no_value(none: float | None) -> None:
    """NaN is what pandas writes for none, in columns of text too."""
    others = dict.fromkeys(("conversations", "history", "system", "tools"), none)
    alpaca = {"instruction": "Where?", "input": none, "output": "Near the river.", "prompt": none, "completion": none}
    assert read_conversation(alpaca | others, "here") == [USER, ANSWER]
    asked = {"prompt": "Where?", "completion": "Near the river.", "instruction": none, "output": none}
    assert read_conversation(asked | others, "here") == [USER, ANSWER]
    pair = {"prompt": none, "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}
    assert read_pair(pair | others, "here") == ([USER], ANSWER["content"], WORSE["content"])


@pytest.mark.parametrize("form", CONVERSATIONS)
def test_forms_of_conversations(form: str) -> None:
    values, turns = CONVERSATIONS[form]
    assert read_conversation(values, "here") == turns


@pytest.mark.parametrize("form", PAIRS)
def test_forms_of_pairs(form: str) -> None:
    values, prompt = PAIRS[form]
    assert read_pair(values, "here") == (prompt, ANSWER["content"], WORSE["content"])


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
@pytest.mark.parametrize("form", CONVERSATIONS)
def test_conversations_of_every_form_are_trained(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, form: str, suffix: str
) -> None:
    values, turns = CONVERSATIONS[form]
    file = save_rows(tmp_path / f"rows{suffix}", [values] * 3)
    data = ConversationData(train_files=[str(file)], cache_dir=str(tmp_path / "cache"))
    blocks, _, ledger = prepare_conversations(data, tokenizer, 200, seed=0)
    assert (ledger.rows_read, ledger.rows_kept, ledger.rows_dropped.total()) == (3, 3, 0)
    text = "".join(tokenizer.decode(block["input_ids"]) for block in blocks)
    expected = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    assert text == expected * 3


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
@pytest.mark.parametrize("form", PAIRS)
def test_pairs_of_every_form_are_trained(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, form: str, suffix: str
) -> None:
    values, prompt = PAIRS[form]
    file = save_rows(tmp_path / f"rows{suffix}", [values] * 3)
    data = PreferenceData(train_files=[str(file)], cache_dir=str(tmp_path / "cache"))
    pairs, _, ledger = prepare_preferences(data, tokenizer, 200)
    assert (ledger.rows_read, ledger.rows_kept, ledger.rows_dropped.total()) == (3, 3, 0)
    opening = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in prompt)
    for pair in pairs:
        sides = [tokenizer.decode(pair[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
        assert sides == [f"{opening}<|im_start|>assistant\n", "Near the river.<|im_end|>", "Who knows.<|im_end|>"]


TOOL = {"role": "tool", "content": "{}"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "search"}}]}
# Reason: rows that are dropped under it.
BAD_CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "no turns": [
        {"conversations": []},
        {"conversations": None},
        {"conversations": "text"},
        {"messages": 7},
        {"messages": [{"role": "system", "content": ""}]},
        {},
    ],
    "malformed turn": [{"messages": ["hi"]}, {"messages": [None]}, {"messages": [USER, [ANSWER]]}],
    "turns of tools": [
        {"messages": [USER, CALL, TOOL, ANSWER]},
        {"messages": [USER, CALL]},
        {"conversations": [*sharegpt([USER]), {"from": "function_call", "value": "{}"}]},
        {"conversations": [*sharegpt([USER]), {"from": "observation", "value": "{}"}]},
        {"tools": '[{"name": "search"}]', "messages": [USER, ANSWER]},
        {"tools": [{"name": "search"}], "messages": [USER, ANSWER]},
    ],
    "empty turn": [
        {"messages": [{"role": "user"}, ANSWER]},
        {"messages": [USER, {"role": "assistant", "content": None}]},
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "user", "content": " \n\t\u3000"}, ANSWER]},
        {"messages": [{"role": "user", "content": 5}, ANSWER]},
        {"messages": [{"role": "user", "content": []}, ANSWER]},
        {"messages": [{"role": "user", "content": {"text": "hi"}}, ANSWER]},
        {"conversations": [*sharegpt([USER]), {"from": "gpt", "value": ""}]},
        {"instruction": "", "input": "", "output": "a"},
        {"instruction": "q", "input": "", "output": " "},
        {"instruction": "q", "output": "a", "history": [["q", None]]},
        {"instruction": "q", "output": 7},
        {"prompt": "q", "completion": ""},
    ],
    "a turn with parts that are not text": [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}, ANSWER]},
        {"messages": [{"role": "user", "content": ["hi"]}, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}, ANSWER]},
    ],
    "not valid Unicode": [
        {"messages": [{"role": "user", "content": "a\ud83d"}, ANSWER]},
        {"system": "\udc80", "messages": [USER, ANSWER]},
    ],
    "malformed history": [
        {"instruction": "q", "output": "a", "history": "earlier"},
        {"instruction": "q", "output": "a", "history": [["only a question"]]},
    ],
    "'instruction' that is not text": [{"instruction": ["Sort", "this"], "output": "a"}],
    "'input' that is not text": [
        {"instruction": "Square the number", "input": 7, "output": "49"},
        {"instruction": "Sort", "input": ["b", "a"], "output": "a b"},
        {"instruction": "Sort", "input": {"first": "b"}, "output": "a b"},
        {"instruction": "Is it so?", "input": False, "output": "no"},
    ],
    "'system' that is not text": [
        {"instruction": "q", "output": "a", "system": {"role": "system"}},
        {"messages": [USER, ANSWER], "system": 5},
    ],
    "no answer": [
        {"messages": [USER]},
        {"messages": [SYSTEM]},
        {"prompt": "q", "completion": None},
        {"instruction": "q", "output": None},
    ],
    "turns out of order": [
        {"messages": [ANSWER]},
        {"messages": [ANSWER, USER, ANSWER]},
        {"messages": [USER, ANSWER, ANSWER]},
        {"messages": [USER, USER, ANSWER]},
        {"messages": [USER, SYSTEM, ANSWER]},
        {"messages": [SYSTEM, SYSTEM, USER, ANSWER]},
        {"prompt": [USER, ANSWER], "completion": "a"},
    ],
}
BAD_PAIRS: dict[str, list[dict[str, Any]]] = {
    "different prompts in chosen and rejected": [
        {"chosen": [USER, ANSWER], "rejected": [EARLIER[0], WORSE]},
        {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [WORSE]},
    ],
    "'prompt' that is not the one in chosen and rejected": [
        {"prompt": "When?", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"prompt": [*EARLIER, USER], "chosen": [EARLIER[0], ANSWER], "rejected": [EARLIER[0], WORSE]},
        {"prompt": [SYSTEM, USER], "chosen": [*EARLIER, USER, ANSWER], "rejected": [*EARLIER, USER, WORSE]},
    ],
    "'instruction' that is not text": [{"instruction": 5, "chosen": "yes", "rejected": "no"}],
    "'system' that is not text": [{"system": ["x"], "prompt": "q", "chosen": "yes", "rejected": "no"}],
    "empty turn": [
        {"prompt": "q", "chosen": "yes", "rejected": [{"role": "assistant", "content": " "}]},
        {"prompt": "q", "chosen": "", "rejected": "no"},
        {"prompt": "q", "chosen": None, "rejected": "no"},
        {"prompt": "q", "chosen": "yes"},
        {"prompt": "\n", "chosen": "yes", "rejected": "no"},
        {"prompt": "q", "chosen": 5, "rejected": "no"},
    ],
    "no turns": [{"prompt": "q", "chosen": "yes", "rejected": []}],
    "last turn is not an answer": [{"prompt": "q", "chosen": [USER], "rejected": "no"}],
    "prompt does not end with a question": [
        {"prompt": EARLIER, "chosen": "yes", "rejected": "no"},
        {"prompt": None, "chosen": "yes", "rejected": "no"},
        {"chosen": "yes", "rejected": "no"},
        {"prompt": [SYSTEM], "chosen": "yes", "rejected": "no"},
    ],
    "turns out of order": [{"prompt": [ANSWER, USER], "chosen": "yes", "rejected": "no"}],
    "turns of tools": [
        {"prompt": [USER, TOOL], "chosen": "yes", "rejected": "no"},
        {"tools": '[{"name": "search"}]', "prompt": "q", "chosen": "yes", "rejected": "no"},
    ],
    "not valid Unicode": [{"prompt": "q", "chosen": "\ud800", "rejected": "no"}],
}


def cases(table: dict[str, list[dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    return [(reason, values) for reason, rows in table.items() for values in rows]


@pytest.mark.parametrize(("reason", "values"), cases(BAD_CONVERSATIONS))
def test_what_is_no_conversation_has_a_reason(reason: str, values: dict[str, Any]) -> None:
    with pytest.raises(BadRow) as error:
        check_order(read_conversation(values, "here"))
    assert str(error.value) == reason


@pytest.mark.parametrize(("reason", "values"), cases(BAD_PAIRS))
def test_what_is_no_pair_has_a_reason(reason: str, values: dict[str, Any]) -> None:
    with pytest.raises(BadRow) as error:
        read_pair(values, "here")
    assert str(error.value) == reason


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_bad_rows_of_all_kinds_are_counted_one_by_one(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, stage: str
) -> None:
    table = BAD_CONVERSATIONS if stage == "sft" else BAD_PAIRS
    good = {"messages": [USER, ANSWER]} if stage == "sft" else PAIRS["a prompt of text, sides of text"][0]
    file = tmp_path / "rows.jsonl"
    rows = [good, *(values for _, values in cases(table)), good]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    keys = {"train_files": [str(file)], "cache_dir": str(tmp_path / "cache"), "max_drop_share": 1.0}
    if stage == "sft":
        _, _, ledger = prepare_conversations(ConversationData(**keys), tokenizer, 200, seed=0)
    else:
        _, _, ledger = prepare_preferences(PreferenceData(**keys), tokenizer, 200)
    assert ledger.rows_dropped == {reason: len(rows) for reason, rows in table.items()}
    assert (ledger.rows_read, ledger.rows_kept) == (len(rows), 2)
    assert ledger.first_places["empty turn"].startswith(f"{file}, row ")


def test_both_spellings_of_turns_are_read() -> None:
    turns = [SYSTEM, USER, ANSWER]
    assert read_turns(sharegpt(turns), "here") == read_turns(turns, "here") == turns


def test_contents_are_kept_to_the_letter() -> None:
    assert read_turns([{"role": "user", "content": "\n x \n"}], "here")[0]["content"] == "\n x \n"


@pytest.mark.parametrize("role", ["critic", "User", None, ["user"], 5, {"name": "user"}])
@pytest.mark.parametrize(("key", "content"), [("from", "value"), ("role", "content")])
def test_unknown_role_names_file_row_and_role(key: str, content: str, role: Any) -> None:
    with pytest.raises(SystemExit) as error:
        read_turns([USER, {key: role, content: "text"}], "rows.parquet, row 7")
    for part in ("rows.parquet, row 7", "unknown role", repr(role), "human, user, gpt", "map or remove"):
        assert part in str(error.value)
