"""Answers of a checkpoint: batched for measuring, streamed for talking."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from mini_qwen.chat import encode_chat
from mini_qwen.encoding import encode_text
from mini_qwen.schemas import Turn


class Answer(NamedTuple):
    text: str
    ids: list[int]  # without the end token
    stopped: bool  # ended with <|im_end|> before the length limit


def speaks_chat(model: PreTrainedModel) -> bool:
    """Whether the checkpoint answers in the chat template; one of the PT stage continues raw text."""
    return model.config.training_stage != "pt"


class WholeCharacters(TextStreamer):
    """Prints text as it comes, but never the first bytes of a character whose last ones did not come."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(text.rstrip("\ufffd"), stream_end)


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
) -> list[Answer]:
    """Continue each prompt with the most likely tokens, until `<|im_end|>` or `max_new_tokens`.

    Prompts of like length share a batch, filled up on the left; answers come back in the order of the prompts.
    """
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in tqdm(range(0, len(order), batch_size), desc=desc, unit="batches"):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [prompts[index] for index in chosen]}, return_tensors="pt")
        output = model.generate(
            **batch.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            use_cache=True,
        )
        for index, ids in zip(chosen, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            stopped = tokenizer.eos_token_id in ids
            ids = ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids
            answers[index] = Answer(tokenizer.decode(ids), ids, stopped)
    return [answers[index] for index in range(len(prompts))]


@torch.no_grad()
def talk(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    repetition_penalty: float,
) -> None:
    """A conversation in the terminal until an empty line. A typed `\\n` means a line break."""
    chat = speaks_chat(model)
    print("chat" if chat else "raw continuation (a pretrained checkpoint)", "- an empty line ends it")
    turns: list[Turn] = []
    streamer = WholeCharacters(tokenizer, skip_prompt=True, skip_special_tokens=True)
    while text := read_line():
        turns.append({"role": "user", "content": text.replace("\\n", "\n")})
        prompt = torch.tensor([encode_prompt(tokenizer, turns, chat)], device=model.device)
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=streamer,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            use_cache=True,
        )
        answer = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).rstrip("\ufffd")
        turns.append({"role": "assistant", "content": answer})


def read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
