"""The decoding grid: how a checkpoint behaves as temperature, top-p, top-k and beams change."""

import hashlib
from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar

from pydantic import ConfigDict
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.generation import ask
from mini_qwen.manners import manners
from mini_qwen.sampling import Sampling


@dataclass
class DecodingGrid:
    """Recipe value of `decoding`: which settings answer the prompts, beside the most likely tokens (temperature 0)."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    temperatures: list[float] = field(default_factory=lambda: [0.3, 0.7, 1.0, 1.5])
    top_ps: list[float] = field(default_factory=lambda: [0.3, 0.6, 0.9, 1.0])  # each at every temperature
    top_ks: list[int] = field(default_factory=list)  # each at temperature 1 and top-p 1
    beams: list[int] = field(default_factory=list)  # numbers of beams
    samples: int = 4  # answers to each prompt where tokens are drawn
    max_new_tokens: int = 128
    seed: int = 0

    def settings(self) -> list[Sampling]:
        """Raises SystemExit for a value that means nothing, no sample, or no token."""
        if self.samples < 1:
            raise SystemExit(f"decoding: samples is {self.samples}; each prompt needs one answer at least.")
        if self.max_new_tokens < 1:
            raise SystemExit(f"decoding: max_new_tokens is {self.max_new_tokens}; an answer needs one token at least.")
        if 0 in self.temperatures:
            raise SystemExit("decoding: temperature 0, the most likely tokens, is always measured; leave it out.")
        try:
            drawn = [Sampling(temperature, top_p) for temperature, top_p in product(self.temperatures, self.top_ps)]
            drawn += [Sampling(temperature=1.0, top_k=top_k) for top_k in self.top_ks]
            return [Sampling(), *drawn, *(Sampling(num_beams=number) for number in self.beams)]
        except ValueError as error:
            raise SystemExit(f"decoding: {error}") from None


def run_grid(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], grid: DecodingGrid, batch_size: int
) -> list[dict[str, Any]]:
    """For each setting its values and the manners of the answers to all prompts.

    Sample k of prompt i has the same seed at every setting and in every checkpoint, so that what differs is the
    setting, or the checkpoint, and not the draw.
    """
    cells = []
    for sampling in tqdm(grid.settings(), desc="decoding grid", unit="settings"):
        samples = grid.samples if sampling.temperature > 0 else 1
        texts = [text for text in prompts for _ in range(samples)]
        seeds = [draw_seed(grid.seed, at, k) for at in range(len(prompts)) for k in range(samples)]
        answers = ask(model, tokenizer, texts, grid.max_new_tokens, batch_size, "answers", sampling, seeds)
        setting = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "num_beams": sampling.num_beams,
        }
        cells.append(setting | manners(answers))
    return cells


def draw_seed(seed: int, prompt: int, sample: int) -> int:
    """63 bits that depend on all three: a sum would give neighbouring seeds of a grid the same draws, moved by one."""
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt} {sample}".encode()).digest()[:8]) >> 1
