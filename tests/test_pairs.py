"""mini_qwen/pairs.py: pairs right, margins and rewards, with a model whose log-probabilities are known."""

import math
from typing import Any

import pytest
import torch
from conftest import MakeModel, WriteRows
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.pairs import reward_accuracy, score_preferences

LOG_VOCAB = math.log(448)


def test_reward_accuracy_by_hand() -> None:
    """Margins of the policy 2, 1, -3, 1; of the reference 1, 1, -4, 2: the first and the third became larger."""
    policy = [(-4.0, -6.0), (-5.0, -6.0), (-9.0, -6.0), (-5.0, -6.0)]
    reference = [(-5.0, -6.0), (-5.0, -6.0), (-9.0, -5.0), (-5.0, -7.0)]
    assert reward_accuracy(policy, reference) == 2 / 4


def test_a_policy_that_is_its_reference_moved_nothing() -> None:
    pairs = [(-4.0, -6.0), (-6.0, -4.0)]
    assert reward_accuracy(pairs, pairs) == 0.0


def test_a_margin_counts_and_not_the_chosen_answer_alone() -> None:
    """Both answers became less likely, as they do in DPO; the rejected one by more."""
    assert reward_accuracy([(-8.0, -12.0)], [(-5.0, -6.0)]) == 1.0
    assert reward_accuracy([(-3.0, -1.0)], [(-5.0, -6.0)]) == 0.0


def test_other_pairs_are_no_reference() -> None:
    with pytest.raises(ValueError):
        reward_accuracy([(-1.0, -2.0)], [(-1.0, -2.0), (-1.0, -2.0)])


@pytest.fixture
def uniform(tiny_model: MakeModel) -> PreTrainedModel:
    """All its logits are 0: every token costs ln 448."""
    model = tiny_model(stage="sft")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    return model


def pair(chosen: str, rejected: str, prompt: str = "Where?") -> dict[str, Any]:
    sides = {"chosen": chosen, "rejected": rejected}
    return {"prompt": prompt} | {key: [{"role": "assistant", "content": text}] for key, text in sides.items()}


def test_figures_by_hand(uniform: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows) -> None:
    """The shorter answer is the likelier one, and of two that are as long neither is. The prompt costs nothing."""
    texts = [("1", "1234"), ("12", "1"), ("12", "34"), ("1", "12")]
    rows = [pair(*sides, prompt="Where does Victor live?" * at) for at, sides in enumerate(texts, 1)]
    found = score_preferences(uniform, tokenizer, [str(write_rows("pairs.jsonl", rows))], 256)
    assert found["pair_log_probs"] == [
        pytest.approx((-LOG_VOCAB * (len(chosen) + 1), -LOG_VOCAB * (len(rejected) + 1))) for chosen, rejected in texts
    ]
    assert found["preference_accuracy"] == 2 / 4
    assert found["preference_standard_error"] == math.sqrt(0.5 * 0.5 / 4)
    assert found["preference_margin"] == pytest.approx(LOG_VOCAB * (3 - 1 + 0 + 1) / 4)
    assert (found["num_pairs"], found["num_pairs_dropped"]) == (4, 0)


def test_pairs_that_cannot_be_scored_are_counted(
    uniform: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    write_rows: WriteRows,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [pair("a", "b c"), pair("", "b"), pair("a", "b" * 500), {"prompt": "x", "chosen": None, "rejected": None}]
    found = score_preferences(uniform, tokenizer, [str(write_rows("pairs.jsonl", rows))], 64)
    assert (found["num_pairs"], found["num_pairs_dropped"]) == (1, 3)
    assert len(found["pair_log_probs"]) == 1
    assert "1 of 4 pairs scored" in capsys.readouterr().out


def test_no_pair_at_all_is_refused_with_the_reasons(
    uniform: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    file = write_rows("pairs.jsonl", [pair("a", "b" * 500)])
    with pytest.raises(SystemExit, match=r"No pair of .*pairs\.jsonl can be scored: \{'.+': 1\}"):
        score_preferences(uniform, tokenizer, [str(file)], 64)
    empty = write_rows("empty.jsonl", [])
    with pytest.raises(SystemExit, match=r"No pair of .*empty\.jsonl can be scored: it is empty"):
        score_preferences(uniform, tokenizer, [str(empty)], 64)


def test_a_pair_turned_round_has_the_other_sign(
    tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    model = tiny_model(stage="sft")
    texts = [("Anna", "小明住在河边。"), ("Victor has a dog.", "no"), ("bread and apples", "two cats")]
    one = score_preferences(model, tokenizer, [str(write_rows("a.jsonl", [pair(a, b) for a, b in texts]))], 256)
    two = score_preferences(model, tokenizer, [str(write_rows("b.jsonl", [pair(b, a) for a, b in texts]))], 256)
    assert one["preference_margin"] == pytest.approx(-two["preference_margin"], rel=1e-5)
    assert one["preference_accuracy"] == pytest.approx(1 - two["preference_accuracy"])
    assert [sides[::-1] for sides in two["pair_log_probs"]] == [
        pytest.approx(sides, rel=1e-5) for sides in one["pair_log_probs"]
    ]


def test_rated_answers_are_joined_file_by_file_as_in_training(
    uniform: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    rated = [{"prompt": "Where?", "completion": text, "label": text == "Near."} for text in ("Near.", "No.")]
    both = write_rows("both.jsonl", rated)
    apart = [write_rows(f"{number}.jsonl", [row]) for number, row in enumerate(rated)]
    found = score_preferences(uniform, tokenizer, [str(file) for file in (both, *apart)], 64)
    assert (found["num_pairs"], found["num_pairs_dropped"]) == (1, 2)
