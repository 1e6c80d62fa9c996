"""Numbers that say how good a checkpoint is. Pure functions of texts, ids and log-probabilities."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence


def bits_per_byte(sum_log_prob: float, num_bytes: int) -> float:
    """How many bits the model needs for one byte of the text: comparable between tokenizers, unlike perplexity.

    >>> bits_per_byte(sum_log_prob=-math.log(2) * 8, num_bytes=4)
    2.0
    """
    return -sum_log_prob / math.log(2) / num_bytes


def perplexity(sum_log_prob: float, num_tokens: int) -> float:
    return math.exp(-sum_log_prob / num_tokens)


def repetition_rate(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of the n-grams that occur more than once; 0 for a text shorter than n tokens.

    >>> repetition_rate("abcdabcd")  # abcd twice, bcda cdab dabc once: 2 of 5
    0.4

    Source: the seed study of MiniMind2 (`ngram_repetition`).
    """
    counts = Counter(tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1))
    repeated = sum(count for count in counts.values() if count > 1)
    return repeated / counts.total() if counts else 0.0


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that equal the expected one, blanks at the ends aside."""
    pairs = list(zip(answers, expected, strict=True))
    return sum(answer.strip() == right.strip() for answer, right in pairs) / len(pairs)


class Unigram:
    """The model that knows how often each token occurs and nothing else: what learning has to beat.

    Counts are smoothed by adding one, so that an unseen token is possible.
    """

    def __init__(self, rows: Iterable[Sequence[int]], vocab_size: int) -> None:
        self.counts = Counter(token for row in rows for token in row)
        self.total = self.counts.total() + vocab_size

    def sum_log_prob(self, row: Sequence[int]) -> float:
        return sum(math.log((self.counts[token] + 1) / self.total) for token in row)


def standard_error(share: float, num: int) -> float:
    """Of a share estimated from `num` independent trials."""
    return math.sqrt(share * (1 - share) / num)
