"""mini_qwen/inspection.py: what must hold for any data, on rows made up here."""

import random
import re
import socket
import unicodedata

import numpy as np
import py3langid.langid
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mini_qwen.inspection import (
    ControlText,
    Duplicates,
    bin_ends,
    count_control_text,
    find_duplicates,
    hash_shingles,
    language_shares,
    length_histogram,
)

CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ENGLISH = "The river was high in spring, and nobody in the village wanted to cross it before the snow had melted."
CHINESE = "春天的时候河水很高，村子里没有人愿意在雪融化之前过河，大家都留在家里等天气变暖。"
GERMAN = (
    "Im Frühling stand der Fluss hoch, und niemand im Dorf wollte ihn überqueren, bevor der Schnee geschmolzen war."
)
LENGTHS = st.lists(st.integers(0, 5000), min_size=1) | st.lists(st.integers(900, 1030), min_size=1)


def random_row(seed: int, length: int = 300) -> list[int]:
    return random.Random(seed).choices(range(150_000), k=length)


def find(rows: list[list[int]], threshold: float = 0.8) -> Duplicates:
    """With texts that differ from each other as the rows do."""
    return find_duplicates([str(row) for row in rows], rows, threshold)


def jaccard(one: list[int], other: list[int]) -> float:
    first, second = (set(zip(*(row[at:] for at in range(5)), strict=False)) for row in (one, other))
    return len(first & second) / len(first | second)


@given(LENGTHS, st.integers(0, 6000), st.integers(1, 60))
@example([0], 0, 1)
@example([7], 7, 50)
@example([1, 1_000_000], 1024, 50)
def test_a_histogram_counts_every_row_once(lengths: list[int], max_length: int, width: int) -> None:
    head, *lines = length_histogram(lengths, max_length, width).split("\n")
    assert head.startswith(f"tokens: min {min(lengths):,}, median ")
    assert head.endswith(f", max {max(lengths):,}")
    (at,) = [number for number, line in enumerate(lines) if line.startswith("--")]
    mark = lines.pop(at)
    bins = [[int(number.replace(",", "")) for number in re.findall(r"[\d,]+", line)[:3]] for line in lines]
    assert bins[0][0] == min(lengths) and bins[-1][1] == max(lengths)
    assert all(before[1] + 1 == after[0] for before, after in zip(bins, bins[1:], strict=False))
    assert [count for *_, count in bins] == [sum(a <= length <= b for length in lengths) for a, b, _ in bins]
    # The line lies where it says: all bins above it are within max_length, all below it are not.
    assert all(end <= max_length for _, end, _ in bins[:at]) and all(start > max_length for start, *_ in bins[at:])
    num_longer = sum(count for *_, count in bins[at:])
    assert mark == f"-- max_length {max_length:,}: {num_longer:,} longer ({num_longer / len(lengths):.1%})"
    bars = [line.count("█") + line.count("▏") for line in lines]
    assert max(bars) == width
    assert [bar > 0 for bar in bars] == [count > 0 for *_, count in bins]


def test_histograms_of_little() -> None:
    assert length_histogram([]) == length_histogram([], max_length=8) == "tokens: no rows"
    assert length_histogram([12], width=4) == (
        "tokens: min 12, median 12, mean 12.0, 90% 12, max 12\n12 - 12 | 1 100.0% ████"
    )
    assert length_histogram([9] * 2000, max_length=4, width=1) == (
        "tokens: min 9, median 9, mean 9.0, 90% 9, max 9\n-- max_length 4: 2,000 longer (100.0%)\n"
        "9 - 9 | 2,000 100.0% █"
    )
    assert length_histogram([3, 70]) == length_histogram(np.array([3, 70]))


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_bins(one: int, other: int) -> None:
    shortest, longest = sorted((one, other))
    ends = bin_ends(shortest, longest)
    assert ends == sorted(set(ends)) and ends[0] >= shortest and ends[-1] == longest
    assert len(ends) <= (11 if longest < 8 * shortest else 22)


def test_exact_duplicates_differ_in_unicode_form_and_white_space_only() -> None:
    texts = [
        "café au lait",
        "tea",
        unicodedata.normalize("NFD", " café  au\n lait"),
        "Tea",
        "",
        "tea\u3000",
        " \t",
        "t ea",
    ]
    assert find_duplicates(texts, [[1]] * len(texts)) == Duplicates(3, 0, [(0, 2), (1, 5), (4, 6)], [])
    assert find_duplicates([], []) == Duplicates(0, 0, [], [])
    assert find_duplicates(["\ud800", "\ud800"], [[1], [1]]).num_exact == 1  # half a character, as JSON may hold


def test_near_duplicates() -> None:
    row = random_row(0)
    changed = [*row[:100], 7, *row[101:]]
    cut = row[:280]
    unrelated = random_row(1)
    half = row[:150] + random_row(2, 150)
    shuffled = random.Random(3).sample(row, len(row))
    found = find([row, unrelated, changed, half, cut, shuffled])
    assert found == Duplicates(0, 2, [], [(0, 2), (0, 4)])


def test_a_row_is_counted_once() -> None:
    row = random_row(0)
    near = [*row[:100], 7, *row[101:]]
    assert find([row, near, row, near, near]) == Duplicates(3, 1, [(0, 2), (1, 3), (1, 4)], [(0, 1)])


def test_a_row_is_compared_with_rows_that_stay() -> None:
    """Each row shares 90% with the one before, so that the last is far from the first: removing all would lose it."""
    row, rows = random_row(0), [random_row(0)]
    for seed in range(1, 10):
        row = row[30:] + random_row(seed, 30)
        rows.append(row)
    found = find(rows)
    assert 3 <= found.num_near <= 6
    removed = {later for _, later in found.near_pairs}
    assert not removed & {earlier for earlier, _ in found.near_pairs}


def test_rows_shorter_than_a_shingle_are_compared_exactly() -> None:
    assert find([[1, 2, 3, 4], [1, 2, 3, 4]]).num_exact == 1
    assert find_duplicates(["a", "b"], [[1, 2, 3, 4]] * 2) == Duplicates(0, 0, [], [])
    assert find_duplicates(["a", "b"], [[1, 2, 3, 4, 5]] * 2) == Duplicates(0, 1, [], [(0, 1)])
    assert find_duplicates(["a", "b"], [[], []]) == Duplicates(0, 0, [], [])


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_the_estimate_agrees_with_the_true_similarity(threshold: float) -> None:
    for kept, seed in zip(range(60, 400, 20), range(100, 200), strict=False):
        one = random_row(seed, 400)
        other = one[:kept] + random_row(seed + 1000, 400 - kept)
        true = jaccard(one, other)
        if abs(true - threshold) > 0.12:  # three standard errors and more
            assert find([one, other], threshold).num_near == (true > threshold), true


def test_long_rows_and_arrays() -> None:
    row = random_row(0, 30_000)
    other = [*row[:20_000], 5, *row[20_001:]]
    texts, ids = ["a", "b", "c"], [np.array(row), np.array(other, dtype=np.uint32), np.array(random_row(1, 30_000))]
    assert find_duplicates(texts, ids) == Duplicates(0, 1, [], [(0, 1)])


def test_examples_are_few_and_the_result_is_the_same_again() -> None:
    rows = [random_row(seed) for seed in range(3)] * 10
    for number, row in enumerate(rows):
        rows[number] = [*row[:50], number, *row[51:]]
    found = find(rows)
    assert found == find(rows)
    assert found.num_near == 27 and found.near_pairs == [(0, 3), (1, 4), (2, 5), (0, 6), (1, 7)]


def test_duplicates_refuse_what_cannot_be_right() -> None:
    with pytest.raises(ValueError, match="threshold is 1.0"):
        find_duplicates(["a"], [[1]], threshold=1.0)
    with pytest.raises(ValueError, match="zip"):
        find_duplicates(["a", "b"], [[1]])


def test_shingle_hashes_depend_on_the_run_of_five_alone() -> None:
    row = random_row(0, 50_000)
    hashes = hash_shingles(row).tolist()
    assert len(hashes) == len(row) - 4
    assert hash_shingles(row[100:105]).tolist() == [hashes[100]]
    assert hash_shingles([1, 2, 3, 4, 5]) != hash_shingles([5, 4, 3, 2, 1])
    # 50,000 random numbers of 32 bits: 0.3 pairs are expected to be equal.
    assert max(hashes) < 2**32 and len(set(hashes)) >= len(hashes) - 5
    small = [[a, b, c, d, e] for a in range(6) for b in range(6) for c in range(6) for d in range(6) for e in range(6)]
    assert len({int(hash_shingles(run)[0]) for run in small}) >= len(small) - 2


def test_language_shares() -> None:
    texts = [ENGLISH] * 5 + [CHINESE] * 3 + ["1 + 1 = 2 !"] * 2
    shares = language_shares(texts)
    assert list(shares.items()) == [("en", 0.5), ("zh", 0.3), ("none", 0.2)]
    assert shares == language_shares(texts)
    assert language_shares([]) == {}


def test_languages_under_one_percent_are_others() -> None:
    shares = language_shares([ENGLISH] * 150 + [GERMAN, CHINESE, "", "123"])
    assert list(shares) == ["en", "none", "other"]
    assert shares["none"] == shares["other"] == 2 / 154
    assert language_shares([ENGLISH] * 99 + [GERMAN])["de"] == 0.01


def test_only_the_beginning_of_a_text_decides() -> None:
    assert language_shares([ENGLISH * 20 + CHINESE * 500]) == {"en": 1.0}
    assert language_shares([" " * 1000 + ENGLISH]) == {"none": 1.0}


def test_chinese_has_one_code() -> None:
    """The classifier itself calls this greeting Cantonese."""
    assert language_shares(["你好"]) == {"zh": 1.0}


def test_languages_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(py3langid.langid, "IDENTIFIER", None)  # so that the model is loaded again
    assert language_shares([ENGLISH]) == {"en": 1.0}


@pytest.mark.parametrize(
    ("text", "control_tokens", "other_templates"),
    [
        ("Answer.<|im_end|>", 1, 0),
        ("<|im_start|>user\nhi<|im_end|>\n" * 3, 1, 0),  # rows, not occurrences
        ("<|eot_id|>", 1, 0),
        ("<|reserved_special_token_0|>", 1, 0),
        ("<｜begin▁of▁sentence｜>", 1, 0),
        ("a <| b |> c, and <|> too", 0, 0),
        ("<|The Start of Reference Answer|>", 0, 0),  # the judge prompts of MT-Bench
        ("<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST]", 0, 1),
        ("yes</s>", 0, 1),
        ("Below is a task.\n\n### Instruction:\nSort it.\n\n### Response:", 0, 1),
        ("### Human: hi", 0, 1),
        ("### Explanation:\nmarkdown as usual", 0, 0),
        ("[institute] <sub>2</sub> <script>", 0, 0),
        ("<s>hi<|im_end|>", 1, 1),
        ("", 0, 0),
    ],
)
def test_control_text(text: str, control_tokens: int, other_templates: int) -> None:
    assert count_control_text([text, "nothing"], CONTROL_TOKENS) == ControlText(control_tokens, other_templates)


def test_given_control_tokens_are_literal() -> None:
    assert count_control_text(["[CLS] a", "C", "<pad+>"], ["[CLS]", "<pad+>"]) == ControlText(2, 0)
    assert count_control_text(["<|user|>", "[CLS]"], []) == ControlText(1, 0)
    assert count_control_text([], CONTROL_TOKENS) == ControlText(0, 0)
