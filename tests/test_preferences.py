"""mini_qwen/preferences.py: both answers whole and ended by their stop token, every pair counted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WriteRows, save_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mini_qwen import chat, encoding, preferences
from mini_qwen.ledger import SHORTENED, Ledger
from mini_qwen.preferences import (
    Pair,
    PreferenceData,
    encode_preferences,
    prepare_preferences,
    read_preferences,
)
from mini_qwen.rated import join_rated
from mini_qwen.rows import Row
from mini_qwen.schemas import Turn, read_pair
from mini_qwen.shortening import MIN_PROMPT, TOO_LONG
from mini_qwen.tokenizer import train_tokenizer

USER = {"role": "user", "content": "Where?"}
HISTORY = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}, USER]
WORDS = st.lists(st.sampled_from(["river", "小明", "🙂", "apples", "a", "b\n"]), min_size=1, max_size=15).map(" ".join)


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in encoding.encode_text(tokenizer, texts)]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], add_generation_prompt: bool = False
) -> list[int]:
    return chat.encode_chat(tokenizer, turns, add_generation_prompt).ids.tolist()


def as_rows(values: list[dict[str, Any]]) -> list[Row]:
    return [Row(Path("a.parquet"), number, row) for number, row in enumerate(values)]


def read(
    tokenizer: PreTrainedTokenizerBase, values: list[dict[str, Any]], max_length: int
) -> tuple[list[Pair], Ledger]:
    """The pairs, their ids as lists, which compare as wholes; and a ledger that adds up."""
    ledger = Ledger()
    pairs = list(read_preferences(as_rows(values), tokenizer, max_length, ledger))
    if pairs:
        ledger.check(max_drop_share=1.0)
    assert all(ids.dtype == np.uint32 for pair in pairs for ids in pair)
    return [Pair(*(ids.tolist() for ids in pair)) for pair in pairs], ledger


def fit_pair(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], chosen: str, rejected: str, max_length: int
) -> Pair | None:
    pairs, ledger = read(tokenizer, [{"prompt": turns, "chosen": chosen, "rejected": rejected}], max_length)
    assert ledger.rows_dropped == ({} if pairs else {TOO_LONG: 1})
    return pairs[0] if pairs else None


def keys(files: list[Path], cache: Path, **changes: Any) -> PreferenceData:
    return PreferenceData(**({"train_files": [str(file) for file in files], "cache_dir": str(cache)} | changes))


def numbered_pair(number: int) -> dict[str, Any]:
    """As in the real data: the prompt is a text, the sides are turns."""
    chosen, rejected = [answer(f"good {number}")], [answer(f"bad {number}")]
    return {"prompt": f"question {number}", "chosen": chosen, "rejected": rejected}


REASONS = {
    "chosen equals rejected": {"prompt": "q", "chosen": [answer("yes")], "rejected": [answer("yes")]},
    "different prompts in chosen and rejected": {
        "chosen": [USER, answer("yes")],
        "rejected": [{"role": "user", "content": "When?"}, answer("no")],
    },
    "empty turn": {"prompt": "q", "chosen": [answer("yes")], "rejected": [answer(" ")]},
    "no turns": {"prompt": "q", "chosen": [answer("yes")], "rejected": []},
    "last turn is not an answer": {"prompt": "q", "chosen": [USER], "rejected": [answer("no")]},
    "prompt does not end with a question": {"prompt": HISTORY[:2], "chosen": "yes", "rejected": "no"},
    "turns of tools": {"prompt": "q", "chosen": "yes", "rejected": [{"role": "tool", "content": "x"}]},
    "not valid Unicode": {"prompt": "q", "chosen": "yes", "rejected": "\ud800"},
    TOO_LONG: {"prompt": "q", "chosen": "apples " * 80, "rejected": "no"},
}
OTHERS = [
    {"prompt": "\n", "chosen": "yes", "rejected": "no"},
    {"prompt": "q", "chosen": [answer("")], "rejected": [answer("no")]},
    {"prompt": "q", "chosen": "", "rejected": "no"},
    {"prompt": "q", "chosen": None, "rejected": "no"},
    {"prompt": "q", "chosen": "yes", "rejected": None},
    {"prompt": "q", "rejected": "no"},
    {"prompt": None, "chosen": "yes", "rejected": "no"},
    {"chosen": "yes", "rejected": "no"},
    {"prompt": "q", "chosen": "yes", "rejected": "apples " * 80},
]


@pytest.mark.parametrize("reason", REASONS)
def test_a_pair_that_teaches_nothing_is_dropped_under_its_reason(
    tokenizer: PreTrainedTokenizerBase, reason: str
) -> None:
    pairs, ledger = read(tokenizer, [REASONS[reason]], 100)
    assert not pairs
    assert ledger.rows_dropped == {reason: 1}
    assert ledger.first_places == {reason: "a.parquet, row 0"}


@pytest.mark.parametrize("values", OTHERS)
def test_a_pair_without_both_answers_and_a_prompt_is_dropped(
    tokenizer: PreTrainedTokenizerBase, values: dict[str, Any]
) -> None:
    pairs, ledger = read(tokenizer, [values], 100)
    assert not pairs
    assert (ledger.rows_read, ledger.rows_kept, ledger.rows_dropped.total()) == (1, 0, 1)


def test_unknown_role_names_file_and_row(tokenizer: PreTrainedTokenizerBase) -> None:
    values = {"prompt": "q", "chosen": [{"role": "critic", "content": "x"}], "rejected": "no"}
    with pytest.raises(SystemExit, match=r"some\.parquet, row 5.*critic"):
        encode_preferences(tokenizer, 100, [Row(Path("some.parquet"), 5, values)])


def make_history(exchanges: list[tuple[str, str]], system: str | None, question: str) -> list[Turn]:
    turns = [{"role": "system", "content": system}] if system is not None else []
    for asked, answered in exchanges:
        turns += [{"role": "user", "content": asked}, answer(answered)]
    return [*turns, {"role": "user", "content": question}]


@settings(max_examples=100)
@given(
    exchanges=st.lists(st.tuples(WORDS, WORDS), max_size=3),
    system=st.none() | WORDS,
    question=WORDS,
    answers=st.tuples(WORDS, WORDS),
    max_length=st.integers(20, 160),
)
def test_shortening_costs_early_turns_then_the_questions_middle_never_an_answer(
    tokenizer: PreTrainedTokenizerBase,
    exchanges: list[tuple[str, str]],
    system: str | None,
    question: str,
    answers: tuple[str, str],
    max_length: int,
) -> None:
    def prompt_ids(kept: list[tuple[str, str]]) -> list[int]:
        return encode_chat(tokenizer, make_history(kept, system, question), add_generation_prompt=True)

    stop = tokenizer.eos_token_id
    chosen_ids, rejected_ids = ([*ids, stop] for ids in encode_text(tokenizer, list(answers)))
    room = max_length - max(len(chosen_ids), len(rejected_ids))
    if answers[0] == answers[1]:
        return
    fitted = fit_pair(tokenizer, make_history(exchanges, system, question), *answers, max_length)
    if fitted is None:
        (ids,) = encode_text(tokenizer, [question])
        assert len(prompt_ids([])) > room
        assert len(prompt_ids([])) - len(ids) + MIN_PROMPT > room
        return
    assert (fitted.chosen_ids, fitted.rejected_ids) == (chosen_ids, rejected_ids)
    assert len(fitted.prompt_ids) <= room
    assert tokenizer.decode(fitted.prompt_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    fits = [number for number in range(len(exchanges) + 1) if len(prompt_ids(exchanges[number:])) <= room]
    if fits:  # the fewest exchanges that must go have gone
        assert fitted.prompt_ids == prompt_ids(exchanges[fits[0] :])
    else:
        only_question = tokenizer.decode(prompt_ids([]))
        shortened = tokenizer.decode(fitted.prompt_ids)
        cuts = range(len(shortened) + 1)
        assert any(only_question.startswith(shortened[:n]) and only_question.endswith(shortened[n:]) for n in cuts)
        assert len(shortened) < len(only_question)


def test_a_question_is_cut_to_the_least_that_may_be_left_and_no_further(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = make_history([], "be brief", "apples " * 60)
    (question,) = encode_text(tokenizer, ["apples " * 60])
    whole = fit_pair(tokenizer, turns, "yes", "no", max_length=1000)
    assert whole is not None
    longest = len(whole.prompt_ids) + max(len(whole.chosen_ids), len(whole.rejected_ids))
    least = longest - len(question) + MIN_PROMPT
    fitted = fit_pair(tokenizer, turns, "yes", "no", max_length=least)
    assert fitted is not None
    assert len(fitted.prompt_ids) == len(whole.prompt_ids) - len(question) + MIN_PROMPT
    assert fit_pair(tokenizer, turns, "yes", "no", max_length=least - 1) is None


def test_prompt_and_chosen_are_the_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    """As in SFT, but for the template's line break behind the stop token."""
    pair = fit_pair(tokenizer, HISTORY, "yes 🙂", "no", max_length=200)
    assert pair is not None
    conversation = encode_chat(tokenizer, [*HISTORY, answer("yes 🙂")])
    assert tokenizer.decode(conversation).endswith("<|im_end|>\n")
    assert pair.prompt_ids + pair.chosen_ids == conversation[:-1]


def test_a_side_is_the_prompt_and_an_answer_of_which_the_answer_is_to_be_learnt(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (pair,) = read_preferences(as_rows([numbered_pair(1)]), tokenizer, 100, Ledger())
    for answer_ids in ("chosen_ids", "rejected_ids"):
        side = pair.side(answer_ids)
        assert side.ids.tolist() == [*pair.prompt_ids, *getattr(pair, answer_ids)]
        assert side.ids[side.trained].tolist() == getattr(pair, answer_ids).tolist()


def test_a_pair_is_three_rows_of_the_store(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = as_rows([numbered_pair(1), REASONS["chosen equals rejected"], numbered_pair(2)])
    token_rows, ledger = encode_preferences(tokenizer, 100, rows)
    assert [tokenizer.decode(row.ids).rpartition("user\n")[2] for row in token_rows] == [
        text
        for number in (1, 2)
        for text in (
            f"question {number}<|im_end|>\n<|im_start|>assistant\n",
            f"good {number}<|im_end|>",
            f"bad {number}<|im_end|>",
        )
    ]
    assert (ledger.rows_read, ledger.rows_kept) == (3, 2)


def test_text_that_spells_a_control_token_is_counted_and_stays_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """In the prompt or in either side."""
    values = [numbered_pair(0), *(numbered_pair(1) | {key: f"a <|im_end|> {key}"} for key in ("prompt", "chosen"))]
    values.append(numbered_pair(1) | {"rejected": "<|im_start|>"})
    pairs, ledger = read(tokenizer, values, 100)
    assert (ledger.rows_kept, ledger.rows_with_control_text) == (4, 3)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    for pair in pairs:
        control = [[token for token in ids if token in (start, end)] for ids in pair]
        assert control == [[start, end, start], [end], [end]]


@settings(max_examples=30)
@given(picks=st.lists(st.sampled_from(["good", "long", *REASONS]), max_size=10).map(lambda picks: ["good", *picks]))
def test_ledger_adds_up_to_the_pairs(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory, picks: list[str]
) -> None:
    long_question = {"prompt": "apples " * 60, "chosen": "yes", "rejected": "no"}
    rows = [REASONS.get(pick, long_question if pick == "long" else numbered_pair(at)) for at, pick in enumerate(picks)]
    folder = tmp_path_factory.mktemp("preferences")
    file = folder / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    pairs, test, ledger = prepare_preferences(keys([file], folder, max_drop_share=1.0), tokenizer, 100)
    assert test is None
    assert (ledger.rows_read, ledger.rows_kept, ledger.rows_held_out) == (len(rows), len(pairs), 0)
    assert ledger.rows_shortened == picks.count("long")
    assert ledger.rows_dropped.total() == sum(pick in REASONS for pick in picks)
    stop = tokenizer.eos_token_id
    for pair in pairs:
        assert pair["chosen_ids"].count(stop) == pair["rejected_ids"].count(stop) == 1
        assert pair["chosen_ids"][-1] == pair["rejected_ids"][-1] == stop
        longer = max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        assert pair["length"] == len(pair["prompt_ids"]) + longer <= 100
    trained = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    prompts = sum(2 * len(pair["prompt_ids"]) for pair in pairs)
    assert (ledger.tokens_trained, ledger.tokens_masked) == (trained, prompts)
    assert ledger.tokens_read == trained + prompts + ledger.tokens_dropped.total()
    assert bool(ledger.tokens_dropped[SHORTENED]) == ("long" in picks)


def test_trl_finds_its_columns_first(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows("rows.parquet", [numbered_pair(number) for number in range(3)])
    pairs, _, _ = prepare_preferences(keys([file], tmp_path / "cache"), tokenizer, 100)
    assert pairs.column_names[:3] == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert [tokenizer.decode(pair["chosen_ids"]) for pair in pairs] == [f"good {n}<|im_end|>" for n in range(3)]


def test_pairs_that_are_test_pairs_too_are_not_trained_on(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Whatever file they are in; they are counted, and a side alone is no pair."""
    other_side = numbered_pair(3) | {"rejected": [answer("worse")]}
    train_file = write_rows("train.jsonl", [numbered_pair(number) for number in (0, 1, 2, 1, 3)])
    test_file = write_rows("test.jsonl", [numbered_pair(1), other_side])
    data = keys([train_file], tmp_path / "cache", test_files=[str(test_file)])
    for _ in range(2):  # prepared, and found
        train, test, ledger = prepare_preferences(data, tokenizer, 64)
        assert [tokenizer.decode(ids).partition("<")[0] for ids in train["chosen_ids"]] == [
            "good 0",
            "good 2",
            "good 3",
        ]
        assert test is not None and len(test) == 2
        assert (ledger.rows_kept, ledger.rows_like_held_out) == (3, 2)
        assert "3 kept + 2 like held out" in ledger.summary()
    alone, _, _ = prepare_preferences(keys([train_file], tmp_path / "cache"), tokenizer, 64)
    assert len(alone) == 5
    with pytest.raises(SystemExit, match="No row is left to train on: of 1 read, dropped: none; 1 are the same as"):
        only = write_rows("only.jsonl", [numbered_pair(1)])
        prepare_preferences(keys([only], tmp_path / "cache", test_files=[str(test_file)]), tokenizer, 64)


def test_test_files_are_read_apart_and_counted_apart(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    train_file = write_rows("train.parquet", [numbered_pair(number) for number in range(5)])
    test_file = write_rows("test.parquet", [numbered_pair(number) for number in range(5, 7)])
    data = keys([train_file], tmp_path / "cache", test_files=[str(test_file)])
    train, test, ledger = prepare_preferences(data, tokenizer, 100)
    assert test is not None
    assert (len(train), len(test), ledger.rows_read) == (5, 2, 5)
    assert [tokenizer.decode(pair["chosen_ids"]) for pair in test] == ["good 5<|im_end|>", "good 6<|im_end|>"]


def test_more_pairs_than_are_written_at_once(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preferences, "PAIRS_AT_ONCE", 3)
    files = [write_rows(f"{n}.parquet", [numbered_pair(number) for number in range(n, n + 4)]) for n in (0, 4)]
    pairs, _, _ = prepare_preferences(keys(files, tmp_path / "cache"), tokenizer, 100)
    assert [tokenizer.decode(pair["rejected_ids"]) for pair in pairs] == [f"bad {n}<|im_end|>" for n in range(8)]


def test_too_many_dropped_pairs_stop_the_run(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [numbered_pair(number) for number in range(9)] + [REASONS["chosen equals rejected"]]
    file = write_rows("rows.json", rows)
    with pytest.raises(SystemExit, match=r"1 of 10 rows.*1 chosen equals rejected.*5%"):
        prepare_preferences(keys([file], tmp_path / "cache"), tokenizer, 100)
    pairs, _, _ = prepare_preferences(keys([file], tmp_path / "cache", max_drop_share=0.1), tokenizer, 100)
    assert len(pairs) == 9


def test_prepared_pairs_are_used_again_until_something_changes(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [numbered_pair(number) for number in range(3)]
    file, cache = write_rows("rows.parquet", rows), tmp_path / "cache"

    def prepare(with_tokenizer: PreTrainedTokenizerBase = tokenizer, max_length: int = 100) -> Path:
        pairs, _, _ = prepare_preferences(keys([file], cache), with_tokenizer, max_length)
        return Path(pairs.cache_files[0]["filename"])

    first = prepare()
    written = first.stat().st_mtime_ns
    assert prepare() == first
    assert first.stat().st_mtime_ns == written
    others = {prepare(max_length=99), prepare(train_tokenizer(["apples and 小猫"], 259))}
    write_rows("rows.parquet", rows[::-1])
    others.add(prepare())
    assert len(others - {first}) == 3


def test_test_pairs_are_never_trained_on(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"prompt": "Where?", "chosen": f"Near {number}.", "rejected": "No."} for number in range(3)]
    train, test = write_rows("pairs/train.jsonl", rows), write_rows("pairs/test.jsonl", [*rows[:1], {"prompt": ""}])
    both = PreferenceData([str(train.parent)], cache_dir=str(tmp_path / "cache"), test_files=[str(test)])
    with pytest.raises(SystemExit, match=r"test\.jsonl is below train_files and test_files"):
        prepare_preferences(both, tokenizer, 64)
    data = PreferenceData([str(train)], cache_dir=str(tmp_path / "cache"), test_files=[str(test)], max_drop_share=0.5)
    _, scored, ledger = prepare_preferences(data, tokenizer, 64)
    assert (len(scored), ledger.test_rows_read, ledger.test_rows_dropped.total()) == (1, 2, 1)
    assert "test:   2 rows read, 1 dropped" in ledger.summary()


def test_pairs_may_have_a_label_of_their_own(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    row = {"prompt": "Where?", "chosen": "Near.", "rejected": "No.", "label": True}
    data = PreferenceData([str(write_rows("pairs.jsonl", [row]))], cache_dir=str(tmp_path / "cache"))
    _, _, ledger = prepare_preferences(data, tokenizer, 64)
    assert (ledger.rows_kept, ledger.rows_joined) == (1, 0)


def rated(prompt: Any, completion: str, label: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label, **more}


def joined(values: list[dict[str, Any]]) -> list[Any]:
    """Of each row that comes out, the pair of answers, or its number and fault."""
    return [
        (row.number, row.fault) if row.fault else (row.values["chosen"], row.values["rejected"])
        for row in join_rated(as_rows(values))
    ]


@pytest.mark.parametrize("first", [True, False])
def test_the_good_answer_is_chosen_whichever_comes_first(first: bool) -> None:
    values = [rated("q", "yes", True), rated("q", "no", False)]
    assert joined(values if first else values[::-1]) == [("yes", "no")]


def test_answers_wait_for_one_of_the_other_label() -> None:
    """In the order in which they came; other prompts may lie in between, and those left over say so at the end."""
    values = [rated("q", "good 1", True), rated("p", "bad p", False), rated("q", "good 2", True)]
    values += [rated("q", "bad 1", False), rated("q", "good 3", True), rated("q", "bad 2", False)]
    left_over = "no answer of the other label in its file"
    assert joined(values) == [("good 1", "bad 1"), ("good 2", "bad 2"), (4, left_over), (1, left_over)]


def test_the_same_question_under_another_system_prompt_is_another() -> None:
    values = [rated("q", "yes", True, system="a"), rated("q", "no", False, system="b"), rated("q", "no", False)]
    assert joined(values) == [(number, "no answer of the other label in its file") for number in range(3)]


def test_rated_conversations_are_joined_by_all_turns_before_the_last() -> None:
    values = [
        {"messages": [*HISTORY, answer("yes")], "label": True},
        {"messages": [USER, answer("no")], "label": False},
    ]
    values.append({"messages": [*HISTORY, answer("no")], "label": False})
    pair, alone = join_rated(as_rows(values))
    assert read_pair(pair.values, "here") == (HISTORY, "yes", "no")
    assert (alone.number, alone.fault) == (1, "no answer of the other label in its file")


def test_rows_that_are_pairs_already_pass_as_they_are() -> None:
    """Also with a label that is no rating; and a row that could not be read keeps its own fault."""
    rows = as_rows([numbered_pair(1), numbered_pair(2) | {"label": {"score": 1}}])
    rows.append(Row(Path("a.parquet"), 2, {}, "not valid JSON"))
    assert list(join_rated(rows)) == rows


RATED = st.builds(rated, st.sampled_from(["p", "q", "r"]), st.sampled_from(["yes", "no", "maybe"]), st.booleans())


@given(values=st.lists(RATED, max_size=30))
def test_every_answer_is_in_one_pair_or_left_over(values: list[dict[str, Any]]) -> None:
    found = list(join_rated(as_rows(values)))
    pairs, left = [row.values for row in found if not row.fault], [row.values for row in found if row.fault]
    sides = [(row["prompt"], row["chosen"], True) for row in pairs]
    sides += [(row["prompt"], row["rejected"], False) for row in pairs]
    sides += [(row["prompt"], row["completion"], row["label"]) for row in left]
    assert sorted(sides) == sorted((row["prompt"], row["completion"], row["label"]) for row in values)
    assert all(len({row["label"] for row in left if row["prompt"] == prompt}) < 2 for prompt in "pqr")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json.gz"])
@pytest.mark.parametrize("turns", [False, True])
def test_rated_answers_are_in_the_ledger(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, suffix: str, turns: bool
) -> None:
    """4 answers are 2 pairs; of the next two the sides are equal; the last one has no counterpart."""
    values = [rated(f"q {n}", f"{'good' if good else 'bad'} {n}", good) for n in range(2) for good in (True, False)]
    values += [rated("same", "answer", True), rated("same", "answer", False), rated("alone", "answer", False)]
    if turns:
        values = [
            {"messages": [USER | {"content": row["prompt"]}, answer(row["completion"])]} | {"label": row["label"]}
            for row in values
        ]
    file = save_rows(tmp_path / f"rows{suffix}", values)
    pairs, _, ledger = prepare_preferences(keys([file], tmp_path / "cache", max_drop_share=0.4), tokenizer, 100)
    assert [tokenizer.decode(pair["chosen_ids"]) for pair in pairs] == ["good 0<|im_end|>", "good 1<|im_end|>"]
    assert [tokenizer.decode(pair["rejected_ids"]) for pair in pairs] == ["bad 0<|im_end|>", "bad 1<|im_end|>"]
    assert (ledger.rows_read, ledger.rows_kept, ledger.rows_joined) == (7, 2, 3)
    assert ledger.rows_dropped == {"chosen equals rejected": 1, "no answer of the other label in its file": 1}
    assert ledger.first_places["no answer of the other label in its file"] == f"{file}, row 6"


@pytest.mark.parametrize(("good", "bad"), [("True", "False"), ("true", " FALSE"), ("1", "0"), (1, 0), (1.0, False)])
def test_labels_as_csv_spells_them(good: Any, bad: Any) -> None:
    assert joined([rated("q", "no", bad), rated("q", "yes", good)]) == [("yes", "no")]


def test_rated_answers_of_a_csv_are_joined(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    values = [rated(f"q {n}", f"{'good' if good else 'bad'} {n}", good) for n in range(2) for good in (True, False)]
    file = write_rows("rows.csv", values)
    pairs, _, ledger = prepare_preferences(keys([file], tmp_path / "cache"), tokenizer, 100)
    assert [tokenizer.decode(pair["chosen_ids"]) for pair in pairs] == ["good 0<|im_end|>", "good 1<|im_end|>"]
    assert (ledger.rows_read, ledger.rows_kept, ledger.rows_joined) == (4, 2, 2)


def test_answers_in_two_files_are_not_joined_and_the_reason_says_so(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    files = [write_rows(f"{good}.jsonl", [rated("q", "answer", good)]) for good in (True, False)]
    with pytest.raises(SystemExit, match=r"No row is left .*2 no answer of the other label in its file"):
        prepare_preferences(keys(files, tmp_path / "cache"), tokenizer, 100)


def test_sides_of_the_same_tokens_are_equal(tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer writes é of two characters as one; the gradient of such a pair is zero."""
    sides = {"chosen": "caf\u00e9", "rejected": "cafe\u0301"}
    pairs, ledger = read(tokenizer, [{"prompt": "q", **sides}, numbered_pair(1)], 100)
    assert (len(pairs), ledger.rows_dropped, ledger.tokens_dropped) == (1, {"chosen equals rejected": 1}, {})
