"""mini_qwen/conversations.py: only answers are trained, every row ends in its stop token, every row is counted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WriteRows
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mini_qwen.chat import BadRow, TokenRow, Turn, encode_chat, encode_text
from mini_qwen.conversations import (
    MIN_PROMPT,
    ConversationData,
    conversation_rows,
    cut_middle,
    fit_conversation,
    prepare_conversations,
    read_conversation,
)
from mini_qwen.ledger import Ledger
from mini_qwen.packing import Blocks
from mini_qwen.rows import Row
from mini_qwen.tokenizer import train_tokenizer

QUESTION, ANSWER = {"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Near the river."}
SYSTEM = {"from": "system", "value": "be brief"}
TURNS = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Near the river."}]
WORDS = st.lists(st.sampled_from(["river", "小明", "🙂", "apples", "a", "b\n"]), min_size=1, max_size=20).map(" ".join)


def exchange(number: int, extra: str = "") -> list[dict[str, str]]:
    return [{"from": "human", "value": f"question {number}{extra}"}, {"from": "gpt", "value": f"answer {number}"}]


def row(values: dict[str, Any]) -> Row:
    return Row(Path("rows.parquet"), 0, values)


def keys(files: list[Path], cache: Path, **changes: Any) -> ConversationData:
    return ConversationData(**({"train_files": [str(file) for file in files], "cache_dir": str(cache)} | changes))


def make_turns(system: str | None, exchanges: list[tuple[str, str]]) -> list[Turn]:
    turns = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in exchanges:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def parse_chat(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[Turn]:
    """The turns of a tokenised conversation, read back from its text."""
    turns = []
    for part in tokenizer.decode(ids).split("<|im_start|>")[1:]:
        assert part.endswith("<|im_end|>\n")
        role, _, content = part.removesuffix("<|im_end|>\n").partition("\n")
        turns.append({"role": role, "content": content})
    return turns


def assert_ends_in_stop_token(tokenizer: PreTrainedTokenizerBase, row: TokenRow) -> None:
    """Nothing but the template's line break follows the stop token, and the stop token is trained."""
    stop = len(row.ids) - 1 - row.ids[::-1].index(tokenizer.eos_token_id)
    assert row.trained[stop]
    assert not any(row.trained[stop + 1 :])
    assert tokenizer.decode(row.ids[stop + 1 :]) == "\n"


@pytest.mark.parametrize(
    "values",
    [
        {"conversations": [QUESTION, ANSWER]},
        {"conversations": TURNS},
        {"messages": TURNS},
        {"messages": [QUESTION, ANSWER]},
        {"prompt": "Where?", "completion": "Near the river."},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
    ],
)
def test_every_schema_reads_the_same(values: dict[str, Any]) -> None:
    assert read_conversation(values, "here") == (TURNS, False)


def test_several_turns_behind_a_system_turn() -> None:
    turns, shortened = read_conversation({"conversations": [SYSTEM, *exchange(1), *exchange(2)]}, "here")
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert not shortened


def test_a_last_question_without_answer_is_left_out() -> None:
    turns, shortened = read_conversation({"conversations": [*exchange(1), QUESTION]}, "here")
    assert [turn["content"] for turn in turns] == ["question 1", "answer 1"]
    assert shortened


@pytest.mark.parametrize(
    "turns",
    [
        [QUESTION],
        [SYSTEM],
        [SYSTEM, QUESTION],
        [ANSWER],
        [ANSWER, QUESTION, ANSWER],
        [QUESTION, ANSWER, ANSWER],
        [QUESTION, QUESTION, ANSWER],
        [QUESTION, SYSTEM, ANSWER],
        [SYSTEM, SYSTEM, QUESTION, ANSWER],
        [QUESTION, {"from": "gpt", "value": " "}],
        [],
        None,
    ],
)
def test_what_is_no_conversation_is_dropped_and_counted(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]] | None
) -> None:
    ledger = Ledger()
    assert not list(conversation_rows([row({"conversations": turns})], tokenizer, 100, ledger, set()))
    assert (ledger.rows_read, ledger.rows_kept, ledger.rows_dropped.total()) == (1, 0, 1)
    assert ledger.tokens_read == 0


def test_unknown_role_names_file_and_row(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [Row(Path("some.parquet"), 3, {"conversations": [{"from": "function_call", "value": "x"}]})]
    with pytest.raises(SystemExit, match=r"some\.parquet, row 3.*function_call"):
        list(conversation_rows(rows, tokenizer, 100, Ledger(), set()))


@settings(max_examples=150)
@given(
    system=st.none() | WORDS,
    exchanges=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4),
    max_length=st.integers(20, 200),
)
def test_shortening_costs_early_turns_then_the_questions_middle_never_an_answer(
    tokenizer: PreTrainedTokenizerBase, system: str | None, exchanges: list[tuple[str, str]], max_length: int
) -> None:
    turns = make_turns(system, exchanges)
    complete = encode_chat(tokenizer, turns)
    last_alone = make_turns(system, exchanges[-1:])
    (question,) = encode_text(tokenizer, [exchanges[-1][0]])
    try:
        whole, fitted = fit_conversation(tokenizer, turns, max_length)
    except BadRow:
        # The answer does not fit beside the whole question, nor beside the smallest part that may be left of it.
        rest = len(encode_chat(tokenizer, last_alone).ids) - len(question)
        assert rest + len(question) > max_length
        assert rest + MIN_PROMPT > max_length
        return
    assert whole == complete
    assert len(fitted.ids) <= max_length
    assert_ends_in_stop_token(tokenizer, fitted)
    left = parse_chat(tokenizer, fitted.ids)
    dropped = len(turns) - len(left)
    if len(complete.ids) <= max_length:
        assert left == turns
        return
    assert dropped % 2 == 0
    rest = make_turns(system, exchanges[dropped // 2 :])
    if dropped:  # no more exchanges than needed
        assert len(encode_chat(tokenizer, make_turns(system, exchanges[dropped // 2 - 1 :])).ids) > max_length
    if len(left) - (system is not None) > 2:
        assert left == rest
        return
    for turn, original in zip(left, rest, strict=True):
        if turn["role"] != "user" or len(encode_chat(tokenizer, rest).ids) <= max_length:
            assert turn == original
        else:
            assert is_cut_middle(turn["content"], original["content"])


def is_cut_middle(text: str, original: str) -> bool:
    """`text` is a beginning and an end of `original`."""
    cuts = range(len(text) + 1)
    return len(text) < len(original) and any(
        original.startswith(text[:cut]) and original.endswith(text[cut:]) for cut in cuts
    )


def test_questions_middle_is_cut_and_its_two_ends_stay(tokenizer: PreTrainedTokenizerBase) -> None:
    question = "Read this: " + "apples " * 100 + "\nHow many birds?"
    turns = make_turns("be brief", [(question, "17 birds.")])
    _, fitted = fit_conversation(tokenizer, turns, max_length=80)
    system, user, answer = parse_chat(tokenizer, fitted.ids)
    assert (system["content"], answer["content"]) == ("be brief", "17 birds.")
    assert user["content"].startswith("Read this: apples")
    assert user["content"].endswith("apples \nHow many birds?")
    assert 78 <= len(fitted.ids) <= 80  # no more is lost than must be


def test_a_question_is_cut_to_the_least_that_may_be_left_and_no_further(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = make_turns("be brief", [("apples " * 60, "17 birds.")])
    (question,) = encode_text(tokenizer, ["apples " * 60])
    least = len(encode_chat(tokenizer, turns).ids) - len(question) + MIN_PROMPT
    _, fitted = fit_conversation(tokenizer, turns, max_length=least)
    assert len(fitted.ids) == least
    with pytest.raises(BadRow, match="max_length"):
        fit_conversation(tokenizer, turns, max_length=least - 1)


@settings(max_examples=100)
@given(text=st.text(st.sampled_from("🙂👩‍👩‍👧é小猫a "), min_size=1, max_size=30), length=st.integers(0, 60))
def test_the_cut_leaves_no_half_characters(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> None:
    (ids,) = encode_text(tokenizer, [text])
    if length >= len(ids):
        return
    cut = cut_middle(tokenizer, ids, length)
    assert length - 6 <= len(cut) <= length  # an end of a character of 4 bytes lacks 3 at most
    assert "\ufffd" not in tokenizer.decode(cut)


def test_rows_that_lost_a_part_are_counted_with_their_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """A last question without an answer is no part of the row; its tokens are not read."""
    conversations = [exchange(1), [*exchange(2), QUESTION], [*exchange(3, " apples" * 30), *exchange(4)]]
    rows = [row({"conversations": turns}) for turns in conversations]
    ledger = Ledger()
    fitted = [token_row for token_row, _ in conversation_rows(rows, tokenizer, 64, ledger, set())]
    assert (ledger.rows_kept, ledger.rows_shortened) == (3, 2)
    whole = sum(len(encode_chat(tokenizer, read_conversation(token_row.values, "here")[0]).ids) for token_row in rows)
    kept = sum(len(token_row.ids) for token_row in fitted)
    assert ledger.tokens_read == whole
    assert ledger.tokens_dropped == {"shortened to max_length": whole - kept}


def test_an_answer_that_does_not_fit_is_dropped_and_counted(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    long_answer = [QUESTION, {"from": "gpt", "value": "apples " * 100}]
    rows = [{"conversations": exchange(number)} for number in range(9)] + [{"conversations": long_answer}]
    file = write_rows("rows.parquet", rows)
    data = keys([file], tmp_path / "cache", max_drop_share=0.1)
    blocks, _, ledger = prepare_conversations(data, tokenizer, 60, seed=0)
    assert len(blocks.store) == ledger.rows_kept == 9
    assert ledger.rows_dropped == {"answer too long for max_length": 1}
    data = keys([file], tmp_path / "cache", max_drop_share=0.09)
    with pytest.raises(SystemExit, match=r"1 of 10 rows.*answer too long.*9%"):
        prepare_conversations(data, tokenizer, 60, seed=0)


GOOD = st.sampled_from([1, 3]).flatmap(
    lambda count: st.sampled_from(["", " apples" * 30]).map(
        lambda extra: [turn for number in range(count) for turn in exchange(number, extra)]
    )
)
WITH_EXTRAS = GOOD.map(lambda turns: [SYSTEM, *turns, QUESTION])
BAD = st.sampled_from([[QUESTION], [], [ANSWER, ANSWER], [QUESTION, {"from": "gpt", "value": "apples " * 60}]])


@settings(max_examples=40)
@given(
    conversations=st.tuples(GOOD, GOOD, st.lists(st.one_of(GOOD, BAD, WITH_EXTRAS), max_size=8)).map(
        lambda parts: [*parts[2], parts[0], parts[1]]
    ),
    eval_rows=st.integers(0, 1),
    packing=st.booleans(),
)
def test_ledger_adds_up_to_the_blocks(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
    conversations: list[list[dict[str, str]]],
    eval_rows: int,
    packing: bool,
) -> None:
    folder = tmp_path_factory.mktemp("conversations")
    file = folder / "rows.json"
    file.write_text(json.dumps([{"conversations": turns} for turns in conversations]), encoding="utf-8")
    data = keys([file], folder, eval_rows=eval_rows, packing=packing, max_drop_share=1.0)
    blocks, held_out, ledger = prepare_conversations(data, tokenizer, 64, seed=0)
    assert ledger.rows_read == len(conversations)
    assert ledger.rows_read == ledger.rows_kept + ledger.rows_held_out + ledger.rows_dropped.total()
    assert ledger.rows_kept == len(blocks.store)
    assert ledger.rows_held_out == (len(held_out.store) if held_out else 0) <= eval_rows
    labels = np.concatenate([block["labels"] for block in blocks])
    assert ledger.tokens_trained == (labels != -100).sum()
    assert ledger.tokens_masked == (labels == -100).sum()
    assert ledger.tokens_read == len(labels) + ledger.tokens_dropped.total()


def conversations_in(blocks: Blocks, tokenizer: PreTrainedTokenizerBase) -> Counter[str]:
    """The conversations of all blocks as texts, each ending in a stop token that is trained."""
    found: Counter[str] = Counter()
    for block in blocks:
        begins = np.flatnonzero(block["position_ids"] == 0)[1:]
        for ids, labels in zip(np.split(block["input_ids"], begins), np.split(block["labels"], begins), strict=True):
            assert_ends_in_stop_token(tokenizer, TokenRow(ids.tolist(), (labels != -100).tolist()))
            found[tokenizer.decode(ids)] += 1
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_held_out_rows_are_never_trained_on(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path, packing: bool
) -> None:
    rows = [{"conversations": exchange(number)} for number in range(30)]
    files = [write_rows("a.parquet", rows[:12]), write_rows("b.jsonl", rows[12:])]
    splits = []
    for cache, seed in [("a", 1), ("b", 1), ("c", 2)]:
        data = keys(files, tmp_path / cache, eval_rows=8, packing=packing)
        train, held_out, ledger = prepare_conversations(data, tokenizer, 64, seed)
        assert held_out is not None
        seen, unseen = conversations_in(train, tokenizer), conversations_in(held_out, tokenizer)
        assert (seen.total(), unseen.total()) == (22, 8) == (ledger.rows_kept, ledger.rows_held_out)
        assert len(seen | unseen) == 30  # so the two share none
        splits.append(unseen)
    assert splits[0] == splits[1] != splits[2]


def test_packing_puts_several_conversations_into_a_block(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows("rows.parquet", [{"conversations": exchange(number)} for number in range(20)])
    packed, single = (
        prepare_conversations(keys([file], tmp_path / "cache", packing=packing), tokenizer, 128, seed=0)[0]
        for packing in (True, False)
    )
    assert len(packed) < len(single) == 20
    assert conversations_in(packed, tokenizer) == conversations_in(single, tokenizer)
    assert packed.store.folder == single.store.folder  # the same prepared rows serve both


def test_a_column_of_none_of_the_schemas_is_refused(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    file = write_rows("rows.parquet", [{"dialogue": "x", "id": 1}])
    with pytest.raises(SystemExit) as error:
        prepare_conversations(keys([file], tmp_path / "cache"), tokenizer, 64, seed=0)
    for part in (str(file), "conversations", "messages", "completion", "dialogue, id"):
        assert part in str(error.value)


def test_prepared_rows_are_used_again_until_something_changes(
    tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [{"conversations": exchange(number)} for number in range(6)]
    file, cache = write_rows("rows.parquet", rows), tmp_path / "cache"

    def prepare(with_tokenizer: PreTrainedTokenizerBase = tokenizer, max_length: int = 64, eval_rows: int = 1) -> Path:
        data = keys([file], cache, eval_rows=eval_rows)
        return prepare_conversations(data, with_tokenizer, max_length, seed=0)[0].store.folder

    first = prepare()
    written = (first / "ids.u32").stat().st_mtime_ns
    assert prepare() == first
    assert (first / "ids.u32").stat().st_mtime_ns == written
    others = {prepare(max_length=65), prepare(eval_rows=2), prepare(train_tokenizer(["apples and 小猫"], 259))}
    write_rows("rows.parquet", rows[::-1])
    others.add(prepare())
    assert len(others - {first}) == 4
