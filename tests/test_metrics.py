"""mini_qwen/metrics.py and overlap.py against values worked out by hand."""

import doctest
import math
import subprocess
import sys
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_qwen import metrics, overlap
from mini_qwen.metrics import (
    Unigram,
    bits_per_byte,
    bits_per_character,
    confusion_matrix,
    distinct_n,
    exact_match,
    macro_f1,
    perplexity,
    repetition_rate,
    standard_error,
    weighted_repetition,
)
from mini_qwen.overlap import MixedTokenizer, rouge_l


def test_bits_per_byte() -> None:
    # Three tokens of probability 1/2, 1/4 and 1/8 need 1 + 2 + 3 bits; the text has 4 bytes.
    assert bits_per_byte(math.log(1 / 2 * 1 / 4 * 1 / 8), num_bytes=4) == pytest.approx(1.5)
    assert bits_per_byte(0.0, num_bytes=7) == 0


def test_bits_per_character() -> None:
    # 1/8 and 1/4 are 3 + 2 bits for two characters, which are six bytes.
    sum_log_prob = math.log(1 / 8 * 1 / 4)
    assert bits_per_character(sum_log_prob, num_characters=len("小明")) == pytest.approx(5 / 2)
    assert bits_per_byte(sum_log_prob, num_bytes=len("小明".encode())) == pytest.approx(5 / 6)


def test_perplexity() -> None:
    assert perplexity(3 * math.log(1 / 10), num_tokens=3) == pytest.approx(10)
    # 1/2 and 1/8: the geometric mean is 1/4.
    assert perplexity(math.log(1 / 16), num_tokens=2) == pytest.approx(4)
    assert perplexity(-1e6, num_tokens=2) == math.inf  # of a model that exploded


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


@pytest.mark.parametrize(
    ("text", "n", "window", "score"),
    [
        ("", 4, 50, 0.0),
        ("abc", 4, 50, 0.0),  # no 4-gram
        ("abcd", 4, 50, 0.0),  # one: it has no neighbours
        ("abcdefgh", 4, 50, 0.0),
        ("aaaa", 1, 50, 1.0),
        ("aaaaaaaa", 4, 2, 1.0),
        # abcd bcda cdab dabc abcd: the first and the last have each other among four neighbours, the rest nobody.
        ("abcdabcd", 4, 50, (1 / 4 + 1 / 4) / 5),
        ("abcdabcd", 4, 4, (1 / 4 + 1 / 4) / 5),
        ("abcdabcd", 4, 3, 0.0),  # they are 4 apart
        # a a b a: neighbours are those next to it. a: 1 of 1. a: 1 of 2. b: 0 of 2. a: 0 of 1.
        ("aaba", 1, 1, (1 + 1 / 2) / 4),
        # With all as neighbours: a, a, a have 2 of 3 each, b none.
        ("aaba", 1, 3, 3 * (2 / 3) / 4),
        ("ab", 1, 0, 0.0),  # nobody has neighbours
    ],
)
def test_weighted_repetition(text: str, n: int, window: int, score: float) -> None:
    result = weighted_repetition(text, n, window)
    assert result == pytest.approx(score)
    assert type(result) is float
    assert weighted_repetition([ord(letter) for letter in text], n, window) == result


def test_what_repeats_far_away_is_not_weighted() -> None:
    near, far = [1, 2, 3, 4, 1, 2, 3, 4, *range(10, 100)], [1, 2, 3, 4, *range(10, 100), 1, 2, 3, 4]
    # In 98 tokens begin 95 4-grams, of which two are equal: 4 places apart, or 94.
    assert repetition_rate(near) == repetition_rate(far) == 2 / 95
    # The first has 50 neighbours, the fifth its 4 before and 50 behind.
    assert weighted_repetition(near) == pytest.approx((1 / 50 + 1 / 54) / 95)
    assert weighted_repetition(far) == 0


@given(st.lists(st.integers(0, 2), max_size=25), st.integers(1, 3), st.integers(0, 30))
def test_weighted_repetition_is_the_formula(tokens: list[int], n: int, window: int) -> None:
    grams = [tokens[at : at + n] for at in range(len(tokens) - n + 1)]
    shares = []
    for p, gram in enumerate(grams):
        neighbours = [q for q in range(len(grams)) if q != p and abs(q - p) <= window]
        shares.append(sum(grams[q] == gram for q in neighbours) / len(neighbours) if neighbours else 0.0)
    expected = sum(shares) / len(shares) if shares else 0.0
    assert weighted_repetition(tokens, n, window) == pytest.approx(expected)
    assert 0 <= weighted_repetition(tokens, n, window) <= 1


def test_distinct_n() -> None:
    assert distinct_n(["aab", "ab"], n=1) == 2 / 5  # a and b, of 5
    assert distinct_n(["aab", "ab"], n=2) == 2 / 3  # aa ab, ab: none goes from one answer into the next
    assert distinct_n([[7, 7, 7, 7]], n=2) == 1 / 3
    assert distinct_n(["ab", "cd", ""], n=2) == 1
    assert distinct_n(["", "a"], n=2) == 0
    assert distinct_n([], n=1) == 0


def test_exact_match() -> None:
    assert exact_match(["Paris", " Paris\n", "paris", "Paris."], ["Paris"] * 4) == 0.5
    assert exact_match(["小明"], [" 小明 "]) == 1
    assert exact_match(["cafe\u0301", "caf\u00e9"], ["caf\u00e9", "cafe\u0301"]) == 1
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


def test_confusion_matrix() -> None:
    truth = ["sport", "sport", "sport", "tech", "tech", "arts"]
    predicted = ["sport", "tech", None, "tech", "weather", "sport"]
    matrix = confusion_matrix(truth, predicted, labels=["arts", "sport", "tech"])
    assert matrix == [[0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert confusion_matrix([], [], labels=["a", "b"]) == [[0, 0, 0], [0, 0, 0]]
    with pytest.raises(KeyError):
        confusion_matrix(["music"], ["sport"], labels=["sport"])
    with pytest.raises(ValueError, match="zip"):
        confusion_matrix(["sport", "sport"], ["sport"], labels=["sport"])


def test_macro_f1() -> None:
    # arts: 0 right. sport: 1 right, 3 rows, 2 answers: 2/5. tech: 1 right, 2 rows, 2 answers: 2/4.
    assert macro_f1([[0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1]]) == pytest.approx((0 + 2 / 5 + 2 / 4) / 3)
    assert macro_f1([[3, 0, 0], [0, 5, 0]]) == 1
    assert macro_f1([[0, 0, 3], [0, 0, 5]]) == 0
    # Always the same one of five labels: right for a fifth, 2 * 4 / (4 + 20) = 1/3 for one label.
    assert macro_f1([[4, 0, 0, 0, 0, 0]] * 5) == pytest.approx(1 / 15)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The cat's hat, 2 hats!", ["the", "cat", "s", "hat", "2", "hats"]),
        ("小明住在北京。", ["小", "明", "住", "在", "北", "京"]),
        ("Qwen2是一个model", ["qwen2", "是", "一", "个", "model"]),
        ("Été в Москве 𠀀豈", ["été", "в", "москве", "𠀀", "豈"]),
        ("snake_case", ["snake", "case"]),
        (" \n。，!", []),
    ],
)
def test_tokens_of_rouge(text: str, tokens: list[str]) -> None:
    assert MixedTokenizer().tokenize(text) == tokens


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        # the cat the mat, of 5 and of 6 words: P = 4/5, R = 4/6, F = 2 * 4/5 * 2/3 / (22/15) = 8/11
        ("The cat under the mat.", "the cat sat on the mat", 8 / 11),
        # 小明在北京, of 6 and of 7 characters: P = 5/6, R = 5/7, F = 10/13
        ("小明住在北京。", "小明的家在北京", 10 / 13),
        # anna likes 上 a, anna 住 在 上 海 a: anna 上 a, of 4 and of 6 tokens, P = 3/4, R = 3/6, F = 3/5
        ("Anna likes上a", "anna 住在上海 A", 3 / 5),
        # The order counts: of b a and a b one can be kept, P = R = 1/2.
        ("b a", "a b", 1 / 2),
        ("Paris!", "paris", 1.0),
        ("CAFE\u0301", "caf\u00e9", 1.0),
        ("running", "run", 0.0),  # nothing is stemmed
        ("", "a", 0.0),
        ("a", "", 0.0),
        ("", "", 0.0),
        ("。", "。", 0.0),
    ],
)
def test_rouge_l(answer: str, reference: str, score: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(score)
    assert type(rouge_l(answer, reference)) is float


def test_rouge_is_not_loaded_before_it_is_used() -> None:
    code = "import sys, mini_qwen.overlap; print('nltk' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("module", [metrics, overlap])
def test_the_examples_of_the_docstrings_are_right(module: ModuleType) -> None:
    failed, tried = doctest.testmod(module)
    assert tried and not failed
