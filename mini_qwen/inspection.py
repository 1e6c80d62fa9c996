"""What is in this data: token lengths, repeated rows, languages, and text that looks like a chat template."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import py3langid
from datasketch import MinHash, MinHashLSH
from tqdm import tqdm

SHINGLE = 5  # tokens
NUM_PERMUTATIONS = 128
SKETCHED_AT_ONCE = 2**13  # shingles: 4 MB for each temporary array, however long the row is
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio; odd, so that multiplying loses nothing
# Of false and of missed candidates when datasketch chooses the bands. A false one costs a microsecond, since the
# estimate decides; a missed one is lost: 5% of the pairs right at 0.8 so, 60% with equal weights.
WEIGHTS = (0.05, 0.95)
# py3langid takes 5% of standard Chinese encyclopedia paragraphs for Wu, and 3% of classical poems for Cantonese.
CHINESE = {"wuu": "zh", "yue": "zh"}
LOOK_ALIKE = r"<[|｜][\w▁]+[|｜]>"  # DeepSeek's have wide bars and ▁
OTHER_TEMPLATES = re.compile(r"</?s>|\[/?INST\]|<</?SYS>>|### ?(?:Instruction|Response|Human|Assistant):")


def length_histogram(lengths: Sequence[int], max_length: int | None = None, width: int = 50) -> str:
    """How many tokens the rows have, as text to print; the longest bar is `width` characters wide.

    Bins end at powers of two, or, where the longest row is less than eight times the shortest, are equally wide.
    A line shows where `max_length` lies and how many rows are longer; a bin that it would cut becomes two.

    >>> print(length_histogram([3, 4, 5, 6, 6, 7, 40], max_length=32, width=8))
    tokens: min 3, median 6, mean 10.1, 90% 20, max 40
     3 -  4 | 2  28.6% ████
     5 -  8 | 4  57.1% ████████
     9 - 16 | 0   0.0%
    17 - 32 | 0   0.0%
    -- max_length 32: 1 longer (14.3%)
    33 - 40 | 1  14.3% ██
    """
    if len(lengths) == 0:
        return "tokens: no rows"
    shortest, longest = int(min(lengths)), int(max(lengths))
    ends = bin_ends(shortest, longest)
    if max_length is not None and shortest <= max_length < longest:
        ends = sorted({*ends, max_length})
    starts = [shortest, *(end + 1 for end in ends[:-1])]
    counts = np.bincount(np.searchsorted(ends, lengths), minlength=len(ends)).tolist()
    space, count_space = len(f"{longest:,}"), len(f"{max(counts):,}")
    lines = []
    for start, end, count in zip(starts, ends, counts, strict=True):
        figures = f"{count:{count_space},} {count / len(lengths):6.1%}"
        bar = "█" * round(width * count / max(counts)) or "▏" * (count > 0)  # one row among millions still shows
        lines.append(f"{start:{space},} - {end:{space},} | {figures} {bar}".rstrip())
    if max_length is not None:
        num_longer = sum(length > max_length for length in lengths)
        mark = f"-- max_length {max_length:,}: {num_longer:,} longer ({num_longer / len(lengths):.1%})"
        lines.insert(sum(start <= max_length for start in starts), mark)
    median, ninety = np.percentile(lengths, [50, 90])
    middle = f"median {median:,.0f}, mean {np.mean(lengths):,.1f}, 90% {ninety:,.0f}"
    return "\n".join([f"tokens: min {shortest:,}, {middle}, max {longest:,}", *lines])


def bin_ends(shortest: int, longest: int) -> list[int]:
    """The last length of each bin, rising: at most 11 bins of equal widths, or one for each power of two.

    >>> bin_ends(0, 20), bin_ends(1000, 1024)
    ([0, 1, 2, 4, 8, 16, 20], [1000, 1004, 1008, 1012, 1016, 1020, 1024])
    """
    if longest < 8 * shortest:
        step = 2 ** ((longest - shortest) // 10).bit_length()
        ends = range(-(-shortest // step) * step, longest, step)
    else:
        ends = [0, *(2**power for power in range(longest.bit_length()))]
    return [*(end for end in ends if shortest <= end < longest), longest]


class Duplicates(NamedTuple):
    """Rows that repeat an earlier one, each counted once; the first five of a kind as (earlier index, index)."""

    num_exact: int
    num_near: int
    exact_pairs: list[tuple[int, int]]
    near_pairs: list[tuple[int, int]]


def find_duplicates(texts: Sequence[str], ids: Sequence[Sequence[int]], threshold: float = 0.8) -> Duplicates:
    """The rows that removing duplicates would remove: each is compared with the earlier ones that would stay.

    Exact: the texts are equal in Unicode NFC with every run of white space as one blank and none at the ends.
    Near: of all 5-grams of token ids in two rows, the share that is in both (Jaccard similarity) is `threshold` or
    more by MinHash's estimate (standard error 0.035 at 0.8). Measured with threshold 0.8: found are half of the pairs
    of similarity 0.8, all of 0.9, 1 in 400 of 0.7. Rows shorter than 5 tokens are only compared exactly. The random
    permutations are seeded. Takes about 0.4 ms and keeps 7 kB for a row of 500 tokens.

    One other token in a row of 500 changes 5 of its 496 5-grams: a similarity of 491 / 501 = 0.98. In a row of 20
    it changes 5 of 16: 11 / 21 = 0.52.

    Args:
        ids: token ids of each text, without a template around it: what all rows share would make them similar.
        threshold: 0.5 to 0.95, or ValueError.
    """
    if not 0.5 <= threshold <= 0.95:
        raise ValueError(f"threshold is {threshold}: near-duplicates can be searched with 0.5 to 0.95.")
    empty = MinHash(NUM_PERMUTATIONS, seed=1, hashfunc=int)
    index = MinHashLSH(threshold, NUM_PERMUTATIONS, weights=WEIGHTS)
    firsts: dict[bytes, int] = {}
    sketches: dict[int, MinHash] = {}
    exact: list[tuple[int, int]] = []
    near: list[tuple[int, int]] = []
    for number, (text, row) in enumerate(zip(tqdm(texts, desc="duplicates", unit="rows"), ids, strict=True)):
        first = firsts.setdefault(text_digest(text), number)
        if first < number:
            exact.append((first, number))
        elif len(row) >= SHINGLE:
            sketch = empty.copy()
            hashes = hash_shingles(row)
            for start in range(0, len(hashes), SKETCHED_AT_ONCE):
                sketch.update_batch(hashes[start : start + SKETCHED_AT_ONCE].tolist())
            similar = {other: sketches[other].jaccard(sketch) for other in sorted(index.query(sketch))}
            closest = max(similar, key=similar.__getitem__, default=number)  # the earliest of equals
            if similar.get(closest, 0.0) >= threshold:
                near.append((closest, number))
            else:
                # Only rows that stay: with all of them, n variants of one text would take n * n / 2 comparisons.
                index.insert(number, sketch)
                sketches[number] = sketch
    return Duplicates(len(exact), len(near), exact[:5], near[:5])


def text_digest(text: str) -> bytes:
    """16 bytes that are equal for texts equal up to Unicode form and white space; lone surrogates are no error."""
    normal = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def hash_shingles(ids: Sequence[int]) -> np.ndarray:
    """A 32-bit number for each run of 5 token ids, (len(ids) - 4,) uint64: equal runs, equal numbers."""
    row = np.asarray(ids, dtype=np.uint64)
    mixed = np.zeros(len(row) - SHINGLE + 1, dtype=np.uint64)
    for offset in range(SHINGLE):
        mixed = (mixed ^ row[offset : offset + len(mixed)]) * MULTIPLIER
        mixed ^= mixed >> np.uint64(32)
    return mixed & np.uint64(0xFFFFFFFF)


def language_shares(texts: Sequence[str]) -> dict[str, float]:
    """Share of the rows in each language, by ISO 639 code, largest first; no rows, no shares.

    Judged by the first 1,000 characters. 'none' are rows without a letter there, 'other' all languages under 1%.
    Wu and Cantonese count as 'zh'. Rows of a few words are often misjudged: 'hello there' comes out as 'st'.
    """
    counts: Counter[str] = Counter()
    for text in tqdm(texts, desc="languages", unit="rows"):
        start = text[:1000]
        language = py3langid.classify(start)[0] if any(map(str.isalpha, start)) else "none"
        counts[CHINESE.get(language, language)] += 1
    rare = [language for language, count in counts.items() if language != "none" and count < 0.01 * len(texts)]
    counts["other"] = sum(counts.pop(language) for language in rare)
    return {language: count / len(texts) for language, count in counts.most_common() if count}


class ControlText(NamedTuple):
    """Rows whose text contains what only a chat template should write; a row may count in both."""

    control_tokens: int  # one of the given tokens, or any <|word|>
    other_templates: int  # <s> </s> [INST] [/INST] <<SYS>> <</SYS>>, ### Instruction: Response: Human: Assistant:


def count_control_text(texts: Sequence[str], control_tokens: Sequence[str]) -> ControlText:
    """Count rows that were rendered by some chat template before, or that talk about one.

    They are trained on as plain text (no control token comes out of a text), so the model learns to write the marks.
    `<s>` is also struck-out text in HTML, and `<|word|>` an operator in some languages: look before dropping rows.

    >>> count_control_text(["<|im_end|>", "<|user|> hi", "[INST] hi [/INST]", "a <| b |> c"], ["<|im_end|>"])
    ControlText(control_tokens=2, other_templates=1)
    """
    look_alike = re.compile("|".join([LOOK_ALIKE, *map(re.escape, control_tokens)]))
    return ControlText(*(sum(bool(mark.search(text)) for text in texts) for mark in (look_alike, OTHER_TEMPLATES)))
