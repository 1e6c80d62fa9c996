"""Numbers that say how good a checkpoint is. Pure functions of texts, ids and log-probabilities."""

import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from unicodedata import normalize


def bits_per_byte(sum_log_prob: float, num_bytes: int) -> float:
    """How many bits the model needs for one byte of the text: comparable between tokenizers, unlike perplexity.

    >>> bits_per_byte(sum_log_prob=-math.log(2) * 8, num_bytes=4)
    2.0
    """
    return -sum_log_prob / math.log(2) / num_bytes


def bits_per_character(sum_log_prob: float, num_characters: int) -> float:
    """The same for one character, in which Chinese is counted: one of its characters is three bytes of UTF-8.

    >>> bits_per_character(sum_log_prob=-math.log(2) * 12, num_characters=len("小明在家"))
    3.0
    """
    return -sum_log_prob / math.log(2) / num_characters


def perplexity(sum_log_prob: float, num_tokens: int) -> float:
    """Infinite above a loss of 700 nats a token, near which the numbers of a computer end."""
    loss = -sum_log_prob / num_tokens
    return math.exp(loss) if loss <= 700 else math.inf


def repetition_rate(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of the n-grams that occur more than once; 0 for a text shorter than n tokens.

    >>> repetition_rate("abcdabcd")  # abcd twice, bcda cdab dabc once: 2 of 5
    0.4

    Source: the seed study of MiniMind2 (`ngram_repetition`).
    """
    counts = Counter(ngrams(tokens, n))
    repeated = sum(count for count in counts.values() if count > 1)
    return repeated / counts.total() if counts else 0.0


def weighted_repetition(tokens: Sequence[Hashable], n: int = 4, window: int = 50) -> float:
    """How much a text repeats itself nearby (WnR): the share of equal n-grams among the neighbours, averaged.

    With g(0) ... g(M - 1) the n-grams of the text, and the neighbours of position p all q != p, |q - p| <= window:

        WnR = 1/M * sum over p of  |neighbours q of p with g(q) = g(p)| / |neighbours of p|

    0 where no n-gram comes again within the window, 1 where all are the same; 0 for a text of one n-gram or none. A
    call of the same function every hundred tokens costs nothing, a phrase said over and over does.

    >>> weighted_repetition("ababa", n=2, window=2)  # ab ba ab ba: 1 of 2, 1 of 3, 1 of 3, 1 of 2
    0.41666666666666663

    Source: the seed study of MiniMind2 (`weighted_ngram_repetition`), of which the text is followed, with one change:
    a position is not its own neighbour. There it is, and a text that repeats nothing scores 1/101 or more. The seed's
    code divides by the largest count within the same text instead, so that two texts cannot be compared and one that
    repeats nothing scores 1; and its empty text gives a pair.
    """
    places: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    for at, ngram in enumerate(ngrams(tokens, n)):
        places[ngram].append(at)
    num = max(0, len(tokens) - n + 1)
    if num < 2 or window < 1:  # nobody has a neighbour
        return 0.0
    shares = []
    for same in places.values():
        for at in same:
            equal = bisect_right(same, at + window) - bisect_left(same, at - window) - 1
            neighbours = min(num - 1, at + window) - max(0, at - window)
            shares.append(equal / neighbours)
    return math.fsum(shares) / num


def distinct_n(answers: Iterable[Sequence[Hashable]], n: int) -> float:
    """Different n-grams as a share of all n-grams, those of all answers taken together; 0 where there is none.

    An n-gram does not reach from one answer into the next. The figure falls with the amount of text, so only answers
    of like number and length compare.

    >>> distinct_n(["abab", "abc"], n=2)  # ab ba ab, ab bc: three different ones of 5
    0.6

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models" (distinct-1 and
    distinct-2).
    """
    counts = Counter(ngram for answer in answers for ngram in ngrams(answer, n))
    return len(counts) / counts.total() if counts else 0.0


def ngrams(tokens: Sequence[Hashable], n: int) -> Iterator[tuple[Hashable, ...]]:
    return (tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1))


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that equal the expected one, blanks at the ends aside, and however "é" is written (NFC)."""
    pairs = [[normalize("NFC", text).strip() for text in pair] for pair in zip(answers, expected, strict=True)]
    return sum(answer == right for answer, right in pairs) / len(pairs)


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


def confusion_matrix(truth: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]) -> list[list[int]]:
    """How often each label was taken for which: a row for each true label, a column for each predicted one.

    One column more, the last, counts the answers that are no label at all.

    >>> confusion_matrix(["tech", "tech", "sport"], ["tech", None, "tech"], labels=["sport", "tech"])
    [[0, 1, 0], [0, 1, 1]]

    Raises KeyError for a truth that is no label.
    """
    number = {label: at for at, label in enumerate(labels)}
    matrix = [[0] * (len(labels) + 1) for _ in labels]
    for right, answer in zip(truth, predicted, strict=True):
        matrix[number[right]][number.get(answer, len(labels))] += 1
    return matrix


def macro_f1(matrix: Sequence[Sequence[int]]) -> float:
    """The mean of the labels' F1 = 2 right / (rows of the label + answers of the label), from a confusion matrix.

    It tells a model that guesses from one that gives the same label always: with five labels both are right for a
    fifth, but the second has 1/15. A label that neither occurs nor is answered counts as 0.

    >>> macro_f1([[1, 0, 0], [1, 0, 0]])  # 2 * 1 / (1 + 2) and 0
    0.3333333333333333
    """
    columns = [sum(column) for column in zip(*matrix, strict=True)]
    sizes = [sum(row) + column for row, column in zip(matrix, columns, strict=False)]  # the last column is no label
    return sum(2 * matrix[at][at] / size for at, size in enumerate(sizes) if size) / len(matrix)
