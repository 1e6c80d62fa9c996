"""mini_qwen/manners.py: five figures of answers, by hand."""

import pytest

from mini_qwen.generation import Answer
from mini_qwen.manners import manners

TWICE = Answer("", [1, 2, 3, 4, 1, 2, 3, 4], stopped=True)
SHORT = Answer("", [5, 6], stopped=False)
EMPTY = Answer("", [], stopped=True)


def test_figures_by_hand() -> None:
    """4-grams of the first answer: 1234 2341 3412 4123 1234, two of five repeated, each with one like it of four.

    The two rates differ by 2/5, so their standard deviation is (2/5) / sqrt(2), and that of the mean (2/5) / 2.
    Pairs: 12 23 34 41 12 23 34 and 56, five different ones of eight.
    """
    assert manners([TWICE, SHORT]) == pytest.approx(
        {
            "num_answers": 2,
            "num_beyond_context": 0,
            "stop_rate": 1 / 2,
            "answer_length": 5.0,
            "repetition_4gram": (2 / 5 + 0) / 2,
            "repetition_standard_error": (2 / 5) / 2,
            "repetition_near": ((1 / 4 + 1 / 4) / 5 + 0) / 2,
            "distinct_2": 5 / 8,
        }
    )


def test_empty_answers_repeat_nothing() -> None:
    figures = manners([EMPTY])
    assert figures == {
        "num_answers": 1,
        "num_beyond_context": 0,
        "stop_rate": 1.0,
        "answer_length": 0.0,
        "repetition_4gram": 0.0,
        "repetition_standard_error": 0.0,
        "repetition_near": 0.0,
        "distinct_2": 0.0,
    }


def test_every_answer_weighs_the_same_but_pairs_are_counted_together() -> None:
    figures = manners([TWICE, EMPTY, EMPTY, EMPTY])
    assert figures["repetition_4gram"] == pytest.approx(2 / 5 / 4)
    assert figures["answer_length"] == 2.0
    assert figures["distinct_2"] == pytest.approx(4 / 7)
    assert manners([SHORT, SHORT])["distinct_2"] == 0.5  # said by both


def test_what_repeats_far_away_is_near_for_one_figure_only() -> None:
    """The window reaches 50 places: a sentence that comes again after 56 tokens is repeated, but not nearby."""
    far = Answer("", [1, 2, 3, 4, *range(10, 62), 1, 2, 3, 4], stopped=True)
    figures = manners([far])
    assert figures["repetition_4gram"] == pytest.approx(2 / 57)
    assert figures["repetition_near"] == 0.0


def test_answers_beyond_the_context_are_counted() -> None:
    assert manners([TWICE._replace(beyond=True), SHORT, SHORT._replace(beyond=True)])["num_beyond_context"] == 2


def test_the_order_of_the_answers_does_not_matter() -> None:
    assert manners([TWICE, SHORT, EMPTY]) == manners([EMPTY, SHORT, TWICE])
