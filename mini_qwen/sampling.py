"""How the next token is chosen: settings, and a draw that depends on a prompt's seed and on nothing beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 takes the most likely token, and with beams the most likely of so many continuations."""

    temperature: float = 0.0
    top_p: float = 1.0  # the likeliest tokens that make up this probability stay
    top_k: int = 0  # so many of the likeliest tokens stay; 0: all
    repetition_penalty: float = 1.0  # on every token that stands in the prompt or the answer already
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name, right, cure in [
            ("temperature", self.temperature >= 0, "0 takes the most likely token, 1 the model's own probabilities"),
            ("top_p", 0 < self.top_p <= 1, "1 keeps all tokens"),
            ("top_k", self.top_k >= 0, "0 keeps all tokens"),
            ("repetition_penalty", self.repetition_penalty > 0, "1 penalises nothing, 1.1 a little"),
            ("num_beams", self.num_beams >= 1, "1 is no beam search"),
        ]:
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)}: {cure}.")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"num_beams {self.num_beams} with temperature {self.temperature}: beams do not draw; take 0."
            )

    def processors(self, seeds: Sequence[int], num_tokens: int, pad_id: int) -> LogitsProcessorList:
        """What turns a batch's logits into the choice of its next tokens, row by row.

        A draw leaves one token a row, so that model.generate with do_sample=False takes it.
        """
        steps = LogitsProcessorList()
        if self.repetition_penalty != 1:
            steps.append(PenaltyBesidePads(self.repetition_penalty, pad_id))
        if self.temperature > 0:
            steps.append(TemperatureLogitsWarper(self.temperature))
        steps.append(FiniteLogits())  # behind the temperature: a tiny one makes logits infinite
        if self.temperature > 0:
            if self.top_k > 0:
                steps.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                steps.append(TopPLogitsWarper(self.top_p))
            steps.append(SeededDraw(seeds, num_tokens))
        return steps


class PenaltyBesidePads(RepetitionPenaltyLogitsProcessor):
    """transformers' repetition penalty, blind to the pads that a batch needs: they are no part of what was said."""

    def __init__(self, penalty: float, pad_id: int) -> None:
        super().__init__(penalty)
        self.pad_id = pad_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return super().__call__(torch.where(input_ids == self.pad_id, input_ids[:, -1:], input_ids), scores)


class FiniteLogits(LogitsProcessor):
    """Changes nothing. Raises SystemExit where a row has no likeliest token; argmax would give one all the same.

    -inf is a token that cannot come. With NaN, +inf, or -inf for all tokens the row's maximum is not finite.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not scores.amax(dim=-1).isfinite().all():
            raise SystemExit("The model's logits are not finite. Take an earlier checkpoint, or a higher precision.")
        return scores


class SeededDraw(LogitsProcessor):
    """Draws each row's next token with numbers of its own seed, whichever rows share the batch.

    One uniform number u a row and step; the token is the first whose cumulative probability, in the order of the ids,
    exceeds u. Probabilities 0.5, 0.3, 0.2 and u = 0.6 give token 1.
    """

    def __init__(self, seeds: Sequence[int], num_tokens: int) -> None:
        rows = [
            torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
        self.numbers = torch.stack(rows)
        self.step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        cumulative = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
        # Of the sum itself, which is 1 only up to rounding: a number above it would find no token.
        numbers = self.numbers[:, self.step, None].to(scores.device) * cumulative[:, -1:]
        self.step += 1
        chosen = torch.searchsorted(cumulative, numbers, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)
