"""How answers behave, whatever they say: whether they end, how long they are, how much they repeat."""

from collections.abc import Sequence
from statistics import fmean, stdev

from mini_qwen.generation import Answer
from mini_qwen.metrics import distinct_n, repetition_rate, weighted_repetition


def manners(answers: Sequence[Answer]) -> dict[str, float]:
    """Means over the answers, all counted in the checkpoint's own tokens, the end token left out.

    `stop_rate`: share that end by themselves. `answer_length`: tokens. `repetition_4gram`: share of an answer's
    4-grams that occur more than once in it. `repetition_near`: the same by distance, WnR with a window of 50.
    `distinct_2`: distinct pairs of neighbours among all pairs, over all answers together. `num_beyond_context`:
    answers that, at full length, end beyond what the checkpoint can read.
    """
    repeated = [repetition_rate(answer.ids) for answer in answers]
    return {
        "num_answers": len(answers),
        "num_beyond_context": sum(answer.beyond for answer in answers),
        "stop_rate": fmean(answer.stopped for answer in answers),
        "answer_length": fmean(len(answer.ids) for answer in answers),
        "repetition_4gram": fmean(repeated),
        "repetition_standard_error": stdev(repeated) / len(repeated) ** 0.5 if len(repeated) > 1 else 0.0,
        "repetition_near": fmean(weighted_repetition(answer.ids) for answer in answers),
        "distinct_2": distinct_n([answer.ids for answer in answers], 2),
    }
