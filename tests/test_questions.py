"""mini_qwen/questions.py: right answers are counted by group, with a model whose answer is known."""

import math
from typing import Any

import pytest
import torch
from conftest import MakeModel, WriteRows
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.encoding import encode_text
from mini_qwen.questions import Question, read_questions, score_questions

QUESTIONS = [
    Question("Where?", "a", "facts"),
    Question("小明？", "b", "facts"),
    Question("Who lives near the river?", " a\n", "new_wording"),
    Question("x", "a b", "new_wording"),
    Question("y", "a", "new_wording"),
]


def rig(model: PreTrainedModel, token: int) -> PreTrainedModel:
    """Make the model say this token, whatever it is asked.

    Every token's state is the same direction and the layers add nothing, so the token with the longest row of the
    embedding, which is the head too, has the largest logit.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
        model.get_input_embeddings().weight[token] = 2.0
    return model


@pytest.fixture
def says_a(tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    ((token,),) = encode_text(tokenizer, ["a"])
    return rig(tiny_model(stage="sft"), int(token))


@pytest.fixture
def says_nothing(tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    assert tokenizer.eos_token_id is not None
    return rig(tiny_model(stage="sft"), tokenizer.eos_token_id)


def test_figures_by_hand(says_a: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """It says 'a' to all: right once of two and twice of three. ROUGE-L 1, 0, 1, 2/3 (one word of two) and 1."""
    found = score_questions(says_a, tokenizer, QUESTIONS, max_new_tokens=1, batch_size=2)
    assert found["accuracy_facts"] == 1 / 2
    assert found["standard_error_facts"] == math.sqrt(1 / 2 * 1 / 2 / 2)
    assert found["accuracy_new_wording"] == 2 / 3
    assert found["standard_error_new_wording"] == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 3))
    assert found["rouge_l"] == pytest.approx((1 + 0 + 1 + 2 / 3 + 1) / 5)
    assert (found["num_questions"], found["num_questions_facts"], found["num_questions_new_wording"]) == (5, 2, 3)
    assert (found["stop_rate"], found["answer_length"], found["repetition_4gram"]) == (0.0, 1.0, 0.0)


def test_an_answer_that_goes_on_is_not_right(says_a: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """'aaaaaa' holds the right word; its three 4-grams are the same."""
    found = score_questions(says_a, tokenizer, QUESTIONS, max_new_tokens=6, batch_size=64)
    assert (found["accuracy_facts"], found["accuracy_new_wording"], found["rouge_l"]) == (0.0, 0.0, 0.0)
    assert (found["answer_length"], found["repetition_4gram"], found["repetition_near"]) == (6.0, 1.0, 1.0)


def test_a_model_that_says_nothing_stops(says_nothing: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    found = score_questions(says_nothing, tokenizer, QUESTIONS, max_new_tokens=6, batch_size=64)
    assert (found["stop_rate"], found["answer_length"], found["repetition_4gram"]) == (1.0, 0.0, 0.0)
    assert (found["accuracy_facts"], found["standard_error_facts"], found["rouge_l"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_batches_and_order_do_not_matter(
    tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    model = tiny_model(stage="sft")
    expected = score_questions(model, tokenizer, QUESTIONS, max_new_tokens=5, batch_size=3)
    found = score_questions(model, tokenizer, QUESTIONS[::-1], max_new_tokens=5, batch_size=batch_size)
    assert found == pytest.approx(expected)


def test_rows_become_questions(write_rows: WriteRows) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "Where?", "answer": "Here.", "group": "facts", "language": "en"},
        {"question": "小明？", "answer": "在。", "group": None},
        {"question": "Who?", "answer": ""},
        {"question": "When?", "answer": "now", "group": 2},
    ]
    one, two = write_rows("one.jsonl", rows[:2]), write_rows("two.parquet", rows[2:3])
    three = write_rows("three.json", rows[3:])
    assert read_questions([str(one), str(two), str(three)]) == [
        Question("Where?", "Here.", "facts"),
        Question("小明？", "在。", "all"),
        Question("Who?", "", "all"),
        Question("When?", "now", "2"),
    ]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"question": "Where?"}, "answer"),
        ({"answer": "Here."}, "question"),
        ({"question": 5, "answer": "x"}, "question"),
        ({"question": "x", "answer": ["x"]}, "answer"),
        ({"question": None, "answer": "x"}, "question"),
        ({"question": "", "answer": "x"}, "question"),
        ({"question": " \n", "answer": "x"}, "question"),
    ],
)
def test_a_row_that_is_no_question_is_named(write_rows: WriteRows, row: dict[str, Any], name: str) -> None:
    file = write_rows("q.jsonl", [{"question": "Where?", "answer": "Here."}, row])
    with pytest.raises(SystemExit, match=rf"q\.jsonl, row 1: '{name}' is .*, but must be text"):
        read_questions([str(file)])


@pytest.mark.parametrize(("group", "name"), [(0, "0"), (1, "1"), (None, "all"), ("", "all"), ("a b", "a b")])
def test_any_value_names_a_group_but_nothing(write_rows: WriteRows, group: Any, name: str) -> None:
    (question,) = read_questions([str(write_rows("q.jsonl", [{"question": "q", "answer": "a", "group": group}]))])
    assert question.group == name


def test_a_file_without_rows_is_named(write_rows: WriteRows) -> None:
    with pytest.raises(SystemExit, match=r"no question in .*q\.jsonl"):
        read_questions([str(write_rows("q.jsonl", []))])
