"""Log-probabilities of given texts under a model, in batches small enough for the logits."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from mini_qwen.blocks import IGNORED, BlockCollator
from mini_qwen.chat import TokenRow

MAX_LOGITS = 2**26  # numbers in one batch of logits: 256 MB in fp32


class Score(NamedTuple):
    sum_log_prob: float  # natural logarithm
    num_tokens: int  # that were scored


@torch.no_grad()
def score_rows(model: PreTrainedModel, rows: Sequence[TokenRow], desc: str) -> list[Score]:
    """For each row, the summed log-probability of its trained tokens given all before them.

    The first token of a row has nothing before it and is never scored. Raises SystemExit for a sum that is not finite.
    """
    scores: list[Score] = [Score(0.0, 0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    collate = BlockCollator(pad_id=0)
    with tqdm(total=len(rows), desc=desc, unit="rows") as progress:
        while order:
            longest = len(rows[order[-1]].ids)
            size = max(1, MAX_LOGITS // (model.config.vocab_size * longest))
            order, chosen = order[:-size], order[-size:]
            batch = collate([as_block(rows[index]) for index in chosen])
            labels = batch.pop("labels")[:, 1:].to(model.device)
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
            )
            counts = (labels != IGNORED).sum(dim=1)
            for index, total, count in zip(chosen, loss.double().sum(dim=1).tolist(), counts.tolist(), strict=True):
                if not math.isfinite(total):
                    raise SystemExit(
                        f"{desc}: the log-probability of row {index} is not a finite number. The weights of this "
                        "checkpoint are not finite, or too large for its precision; take an earlier one."
                    )
                scores[index] = Score(-total, count)
            progress.update(len(chosen))
    return scores


def as_block(row: TokenRow) -> dict[str, np.ndarray]:
    ids = row.ids.astype(np.int64)
    labels = ids.copy() if row.trained is None else np.where(row.trained, ids, IGNORED)
    labels[:1] = IGNORED
    return {"input_ids": ids, "position_ids": np.arange(len(ids)), "labels": labels}
