"""mini_qwen/preferences.py: both answers whole and ended by their stop token, every pair counted."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteRows
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mini_qwen.chat import BadRow, Turn, encode_chat, encode_text
from mini_qwen.conversations import MIN_PROMPT
from mini_qwen.ledger import Ledger
from mini_qwen.preferences import PreferenceData, fit_pair, preference_rows, prepare_preferences, read_pair
from mini_qwen.rows import Row
from mini_qwen.tokenizer import train_tokenizer

USER = {"role": "user", "content": "Where?"}
HISTORY = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}, USER]
WORDS = st.lists(st.sampled_from(["river", "小明", "🙂", "apples", "a", "b\n"]), min_size=1, max_size=15).map(" ".join)


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def keys(files: list[Path], cache: Path, **changes: Any) -> PreferenceData:
    return PreferenceData(**({"train_files": [str(file) for file in files], "cache_dir": str(cache)} | changes))


def numbered_pair(number: int) -> dict[str, Any]:
    """As in the real data: the prompt is a text, the sides are turns."""
    chosen, rejected = [answer(f"good {number}")], [answer(f"bad {number}")]
    return {"prompt": f"question {number}", "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Where?", "chosen": [answer("yes")], "rejected": [answer("no")]},
        {"prompt": "Where?", "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": [answer("yes")], "rejected": [answer("no")]},
        {"prompt": [{"from": "human", "value": "Where?"}], "chosen": "yes", "rejected": "no"},
        {"chosen": [USER, answer("yes")], "rejected": [USER, answer("no")]},
        {"prompt": None, "chosen": [USER, answer("yes")], "rejected": [USER, answer("no")]},
        {"prompt": "Where?", "chosen": [USER, answer("yes")], "rejected": [USER, answer("no")]},
    ],
)
def test_every_schema_reads_the_same(values: dict[str, Any]) -> None:
    assert read_pair(values, "here") == ([USER], "yes", "no")


@pytest.mark.parametrize("implicit", [True, False])
def test_a_history_before_the_question(implicit: bool) -> None:
    before = HISTORY if implicit else []
    sides = {"chosen": [*before, answer("yes")], "rejected": [*before, answer("no")]}
    assert read_pair(sides if implicit else {"prompt": HISTORY, **sides}, "here") == (HISTORY, "yes", "no")


REASONS = {
    "chosen equals rejected": {"prompt": "q", "chosen": [answer("yes")], "rejected": [answer("yes")]},
    "different prompts in chosen and rejected": {
        "chosen": [USER, answer("yes")],
        "rejected": [{"role": "user", "content": "When?"}, answer("no")],
    },
    "empty assistant turn": {"prompt": "q", "chosen": [answer("yes")], "rejected": [answer(" ")]},
    "no turns": {"prompt": "q", "chosen": [answer("yes")], "rejected": []},
    "last turn is not an answer": {"prompt": "q", "chosen": [USER], "rejected": [answer("no")]},
    "prompt does not end with a question": {"prompt": HISTORY[:2], "chosen": "yes", "rejected": "no"},
    "empty user turn": {"prompt": "\n", "chosen": "yes", "rejected": "no"},
    "answer too long for max_length": {"prompt": "q", "chosen": "apples " * 80, "rejected": "no"},
}
OTHERS = [
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
    ledger = Ledger()
    rows = [Row(Path("a.parquet"), 0, REASONS[reason])]
    assert not list(preference_rows(rows, tokenizer, 100, ledger))
    assert ledger.rows_dropped == {reason: 1}


@pytest.mark.parametrize("values", OTHERS)
def test_a_pair_without_both_answers_and_a_prompt_is_dropped(
    tokenizer: PreTrainedTokenizerBase, values: dict[str, Any]
) -> None:
    ledger = Ledger()
    assert not list(preference_rows([Row(Path("a.parquet"), 0, values)], tokenizer, 100, ledger))
    assert (ledger.rows_read, ledger.rows_kept, ledger.rows_dropped.total()) == (1, 0, 1)


def test_unknown_role_names_file_and_row(tokenizer: PreTrainedTokenizerBase) -> None:
    values = {"prompt": "q", "chosen": [{"role": "tool", "content": "x"}], "rejected": "no"}
    with pytest.raises(SystemExit, match=r"some\.parquet, row 5.*tool"):
        list(preference_rows([Row(Path("some.parquet"), 5, values)], tokenizer, 100, Ledger()))


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
        return encode_chat(tokenizer, make_history(kept, system, question), add_generation_prompt=True).ids

    stop = tokenizer.eos_token_id
    chosen_ids, rejected_ids = ([*ids, stop] for ids in encode_text(tokenizer, list(answers)))
    room = max_length - max(len(chosen_ids), len(rejected_ids))
    try:
        whole, fitted = fit_pair(tokenizer, make_history(exchanges, system, question), *answers, max_length)
    except BadRow:
        (ids,) = encode_text(tokenizer, [question])
        assert len(prompt_ids([])) > room
        assert len(prompt_ids([])) - len(ids) + MIN_PROMPT > room
        return
    assert whole.prompt_ids == prompt_ids(exchanges)
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
    whole, _ = fit_pair(tokenizer, turns, "yes", "no", max_length=1000)
    longest = len(whole.prompt_ids) + max(len(whole.chosen_ids), len(whole.rejected_ids))
    least = longest - len(question) + MIN_PROMPT
    _, fitted = fit_pair(tokenizer, turns, "yes", "no", max_length=least)
    assert len(fitted.prompt_ids) == len(whole.prompt_ids) - len(question) + MIN_PROMPT
    with pytest.raises(BadRow, match="max_length"):
        fit_pair(tokenizer, turns, "yes", "no", max_length=least - 1)


def test_prompt_and_chosen_are_the_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    """As in SFT, but for the template's line break behind the stop token."""
    pair, _ = fit_pair(tokenizer, HISTORY, "yes 🙂", "no", max_length=200)
    conversation = encode_chat(tokenizer, [*HISTORY, answer("yes 🙂")]).ids
    assert tokenizer.decode(conversation).endswith("<|im_end|>\n")
    assert pair.prompt_ids + pair.chosen_ids == conversation[:-1]


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
        assert len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) <= 100
    trained = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)
    prompts = sum(2 * len(pair["prompt_ids"]) for pair in pairs)
    assert (ledger.tokens_trained, ledger.tokens_masked) == (trained, prompts)
    assert ledger.tokens_read == trained + prompts + ledger.tokens_dropped.total()


def test_trl_finds_its_columns_first(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows("rows.parquet", [numbered_pair(number) for number in range(3)])
    pairs, _, _ = prepare_preferences(keys([file], tmp_path / "cache"), tokenizer, 100)
    assert pairs.column_names[:3] == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert [tokenizer.decode(pair["chosen_ids"]) for pair in pairs] == [f"good {n}<|im_end|>" for n in range(3)]


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
