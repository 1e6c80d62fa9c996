"""Held-out preference pairs: how often a checkpoint finds the chosen answer likelier, alone and against its parent."""

from collections.abc import Sequence
from itertools import chain
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.files import find_files
from mini_qwen.ledger import Ledger
from mini_qwen.metrics import standard_error
from mini_qwen.preferences import pair_preparation, read_preferences
from mini_qwen.scoring import score_rows

LogProbs = Sequence[tuple[float, float]]  # of each pair's chosen and rejected answer, in nats


def score_preferences(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, files: list[str], length: int
) -> dict[str, Any]:
    """Share of pairs whose chosen answer has the higher log-probability, its standard error, the mean margin in nats.

    `pair_log_probs` holds both numbers of every pair, for the comparison with a reference.
    """
    ledger = Ledger()
    # File by file, as in training: rated answers become the same pairs.
    rows = chain.from_iterable(map(pair_preparation(tokenizer, length).read, find_files(files)))
    pairs = list(read_preferences(rows, tokenizer, length, ledger))
    print(f"preferences: {ledger.rows_kept:,} of {ledger.rows_read:,} pairs scored {dict(ledger.rows_dropped) or ''}")
    if not pairs:
        raise SystemExit(f"No pair of {', '.join(files)} can be scored: {dict(ledger.rows_dropped) or 'it is empty'}.")
    ledger.check(max_drop_share=1.0)
    sides = [pair.side(answer) for answer in ("chosen_ids", "rejected_ids") for pair in pairs]
    sums = [score.sum_log_prob for score in score_rows(model, sides, "preferences")]
    log_probs = list(zip(sums[: len(pairs)], sums[len(pairs) :], strict=True))
    margins = [chosen - rejected for chosen, rejected in log_probs]
    accuracy = fmean(margin > 0 for margin in margins)
    return {
        "preference_accuracy": accuracy,
        "preference_standard_error": standard_error(accuracy, len(pairs)),
        "preference_margin": fmean(margins),
        "num_pairs": len(pairs),
        "num_pairs_dropped": ledger.rows_dropped.total(),
        "pair_log_probs": log_probs,
    }


def reward_accuracy(policy: LogProbs, reference: LogProbs) -> float:
    """Share of pairs whose margin is larger in the policy than in the reference: what DPO's loss pushes up.

        policy (-4, -6), reference (-5, -6): margins 2 and 1, so the pair counts

    A policy that is its reference moves nothing and scores 0.
    """
    moves = [
        (chosen - rejected) - (chosen_before - rejected_before)
        for (chosen, rejected), (chosen_before, rejected_before) in zip(policy, reference, strict=True)
    ]
    return fmean(move > 0 for move in moves)
