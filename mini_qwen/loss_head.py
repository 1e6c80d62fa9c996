"""The loss head of a model: rows with labels are scored without the logits of a whole batch, for PT, SFT and DPO.

Only positions with a label are: a third to a half of the tokens of SFT and DPO has none.
"""

import functools
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from mini_qwen.blocks import IGNORED
from mini_qwen.token_scores import score_tokens


@dataclass
class HeadOutput(ModelOutput):
    """What a model with this head returns for rows with labels, in the names of TRL's trainers.

    All tensors but the loss are [B, L - 1]: position t is the token that the label at t + 1 names; 0 where none is.
    """

    loss: torch.Tensor | None = None  # mean over the labelled tokens, or their sum / num_items_in_batch
    log_probs: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None


def add_loss_head(model: PreTrainedModel, equal_weights: bool) -> None:
    """Let `model(..., labels=labels)` score through this head and return a HeadOutput, which has no logits.

    Without labels the model is as it was. `fused_lm_head=True` is how TRL's trainers ask for the metrics too.
    """
    plain_forward = MethodType(type(model).forward, model)

    @functools.wraps(plain_forward)  # the Trainer and generate() read its signature
    def forward(
        *args: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        fused_lm_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return plain_forward(*args, **kwargs)
        hidden = model.base_model(*args, **(kwargs | {"use_cache": False})).last_hidden_state[:, :-1]
        weight = model.get_output_embeddings().weight
        targets = labels[:, 1:]
        mask = targets != IGNORED
        scores = score_tokens(hidden[mask], weight, targets[mask], equal_weights, with_entropy=fused_lm_head)
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        output = HeadOutput(loss=-scores.log_probs.sum() / count)
        if fused_lm_head:
            output.label_mask = mask
            for name, values in scores._asdict().items():
                output[name] = values.new_zeros(mask.shape).masked_scatter(mask, values)
            # The mean over the vocabulary of a token's logits is its logit under the mean of the head's rows.
            output.mean_logits = (hidden.detach() @ weight.detach().mean(dim=0).to(hidden.dtype)) * mask
        return output

    model.forward = forward
