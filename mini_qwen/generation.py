"""Answers of a checkpoint: batched for measuring, in whole characters for showing them as they come."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from mini_qwen.chat import encode_chat
from mini_qwen.encoding import encode_text
from mini_qwen.sampling import Sampling
from mini_qwen.schemas import Turn

GREEDY = Sampling()


class Answer(NamedTuple):
    text: str
    ids: list[int]  # without the end token
    stopped: bool  # ended with <|im_end|> before the length limit
    beyond: bool = False  # prompt and the longest answer allowed exceed the checkpoint's context


def speaks_chat(model: PreTrainedModel) -> bool:
    """Whether the checkpoint answers in the chat template; one of the PT stage continues raw text."""
    return model.config.training_stage != "pt"


class WholeCharacters(BaseStreamer):
    """Hands on an answer's text as its tokens come, never the first bytes of a character whose last ones did not.

    "🙂" in two tokens: behind the first one the text is "\ufffd", of which nothing is shown. Bytes that no
    character begins with are shown as "\ufffd" once another character follows, and not at the end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.num_tokens = -1  # so far, the end token included; -1: the prompt, which generate() hands on first, is due
        self.pending: list[int] = []  # tokens since the last whole character
        self.shown = 0  # characters of theirs

    def put(self, value: torch.Tensor) -> None:
        if self.num_tokens < 0:
            self.num_tokens = 0
            self.show("")  # which may end it before the prompt is computed
            return
        self.num_tokens += value.numel()
        self.pending += value.flatten().tolist()
        text = self.tokenizer.decode(self.pending, skip_special_tokens=True)
        whole = text.rstrip("\ufffd")
        fresh, self.shown = whole[self.shown :], len(whole)
        if whole == text:
            self.pending, self.shown = [], 0
        self.show(fresh)

    def end(self) -> None:
        pass


def encode_prompt(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], chat: bool) -> list[int]:
    """The ids to continue: the conversation in the chat template, or the last turn's text as it is."""
    if chat:
        return encode_chat(tokenizer, turns, add_generation_prompt=True).ids.tolist()
    return encode_text(tokenizer, [turns[-1]["content"]])[0].tolist()


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 64,
    desc: str = "generating",
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
) -> list[Answer]:
    """Continue each prompt until `<|im_end|>` or `max_new_tokens`.

    Prompts of like length share a batch, filled up on the left; answers come back in the order of the prompts. In fp32
    they do not depend on the batch size, drawn ones included: what is drawn for a prompt is decided by its seed alone.

    Args:
        sampling: how tokens are chosen; the most likely one when nothing is said.
        seeds: one for each prompt. Without them the n-th prompt has seed n.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in tqdm(range(0, len(order), batch_size), desc=desc, unit="batches", leave=False):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [prompts[index] for index in chosen]}, return_tensors="pt")
        own = [seeds[index] for index in chosen]
        ids, mask = batch["input_ids"], batch["attention_mask"]
        output = continue_batch(model, tokenizer, ids, mask, max_new_tokens, sampling, own)
        for index, ids in zip(chosen, output.tolist(), strict=True):
            stopped = tokenizer.eos_token_id in ids
            ids = ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids
            answers[index] = Answer(tokenizer.decode(ids), ids, stopped)
    return [answers[index] for index in range(len(prompts))]


def continue_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    streamer: BaseStreamer | None = None,
) -> torch.Tensor:
    """The new tokens of each row, [B, <= max_new_tokens]; rows that have ended go on with pads."""
    # A checkpoint's generation_config.json may ask for sampling and end tokens of its own, and generate() would take
    # from it whatever is not set here. It has no say. Threads that share the model all put the same in its place.
    model.generation_config = GenerationConfig()
    output = model.generate(
        input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=GenerationConfig(
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            num_beams=sampling.num_beams,
            max_new_tokens=max_new_tokens,
        ),
        logits_processor=sampling.processors(seeds, max_new_tokens, tokenizer.pad_token_id),
        streamer=streamer,
    )
    return output[:, input_ids.shape[1] :]


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    desc: str,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
) -> list[Answer]:
    """Answers to single questions, in the checkpoint's own manner: chat template or raw continuation."""
    chat = speaks_chat(model)
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}], chat) for text in texts]
    limit = model.config.max_position_embeddings
    beyond = [len(prompt) + max_new_tokens > limit for prompt in prompts]
    if any(beyond):
        num = sum(beyond)
        print(f"{desc}: {num:,} prompts reach with their answers beyond the {limit:,} tokens of this checkpoint")
    answers = generate(model, tokenizer, prompts, max_new_tokens, batch_size, desc, sampling, seeds)
    return [answer._replace(beyond=flag) for answer, flag in zip(answers, beyond, strict=True)]
