"""mini_qwen/metrics.py against values worked out by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_qwen.metrics import Unigram, bits_per_byte, exact_match, perplexity, repetition_rate, standard_error


def test_bits_per_byte() -> None:
    # Three tokens of probability 1/2, 1/4 and 1/8 need 1 + 2 + 3 bits; the text has 4 bytes.
    assert bits_per_byte(math.log(1 / 2 * 1 / 4 * 1 / 8), num_bytes=4) == pytest.approx(1.5)
    assert bits_per_byte(0.0, num_bytes=7) == 0


def test_perplexity() -> None:
    assert perplexity(3 * math.log(1 / 10), num_tokens=3) == pytest.approx(10)
    # 1/2 and 1/8: the geometric mean is 1/4.
    assert perplexity(math.log(1 / 16), num_tokens=2) == pytest.approx(4)


@pytest.mark.parametrize(
    ("text", "n", "rate"),
    [
        ("abcdabcd", 4, 2 / 5),  # abcd bcda cdab dabc abcd
        ("aaaaaa", 4, 1.0),  # aaaa three times
        ("abcdefgh", 4, 0.0),
        ("abcd", 4, 0.0),  # one 4-gram
        ("abc", 4, 0.0),  # none
        ("", 4, 0.0),
        ("abab", 2, 2 / 3),  # ab ba ab
        ("aab", 1, 2 / 3),
    ],
)
def test_repetition_rate(text: str, n: int, rate: float) -> None:
    assert repetition_rate(text, n) == pytest.approx(rate)
    assert repetition_rate([ord(letter) for letter in text], n) == pytest.approx(rate)


@given(st.lists(st.integers(0, 3), max_size=30))
def test_repeating_a_text_makes_all_its_4_grams_repeated(tokens: list[int]) -> None:
    assert 0 <= repetition_rate(tokens) <= 1
    if len(tokens) >= 4:
        cycled = [*tokens, *tokens, *tokens[:3]]
        assert repetition_rate(cycled) == 1


def test_exact_match() -> None:
    assert exact_match(["Paris", " Paris\n", "paris", "Paris."], ["Paris"] * 4) == 0.5
    assert exact_match(["小明"], [" 小明 "]) == 1
    with pytest.raises(ValueError, match="zip"):
        exact_match(["a", "b"], ["a"])


def test_unigram() -> None:
    # Counts 3, 1, 0, 0 plus one each, of 8 in all.
    unigram = Unigram([[0, 0], [0, 1]], vocab_size=4)
    assert unigram.sum_log_prob([0]) == pytest.approx(math.log(4 / 8))
    assert unigram.sum_log_prob([0, 1, 3]) == pytest.approx(math.log(4 / 8 * 2 / 8 * 1 / 8))
    assert unigram.sum_log_prob([]) == 0


@given(st.lists(st.lists(st.integers(0, 9))))
def test_unigram_probabilities_add_up_to_one(rows: list[list[int]]) -> None:
    unigram = Unigram(rows, vocab_size=10)
    assert sum(math.exp(unigram.sum_log_prob([token])) for token in range(10)) == pytest.approx(1)


def test_standard_error() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(0.9, 900) == pytest.approx(0.01)
    assert standard_error(1.0, 10) == 0
