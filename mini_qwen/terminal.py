"""A conversation with a checkpoint in the terminal."""

import contextlib

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.generation import WholeCharacters, continue_batch, encode_prompt, speaks_chat
from mini_qwen.sampling import Sampling
from mini_qwen.schemas import Turn


@torch.no_grad()
def talk(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> None:
    """A conversation in the terminal until an empty line, Ctrl-C or the end of the context. `\\n` is a line break.

    The same turns with the same seed get the same answers. Ctrl-C in an answer ends that alone, what was shown stays.
    """
    chat = speaks_chat(model)
    print("chat" if chat else "raw continuation (a pretrained checkpoint)", "- an empty line ends it")
    turns: list[Turn] = []
    while text := read_line():
        turns.append({"role": "user", "content": text.replace("\\n", "\n")})
        prompt = torch.tensor([encode_prompt(tokenizer, turns, chat)])
        num_prompt, context = prompt.numel(), model.config.max_position_embeddings
        if num_prompt >= context:
            print(
                f"The text has {num_prompt:,} tokens, and this checkpoint reads {context:,}, its answer included. "
                "Begin a new conversation."
            )
            return
        shown: list[str] = []

        def show(text: str, shown: list[str] = shown) -> None:
            shown.append(text)
            print(text, end="", flush=True)

        length, streamer = min(max_new_tokens, context - num_prompt), WholeCharacters(tokenizer, show)
        with contextlib.suppress(KeyboardInterrupt):
            continue_batch(model, tokenizer, prompt, torch.ones_like(prompt), length, sampling, [seed], streamer)
        print()
        turns.append({"role": "assistant", "content": "".join(shown)})


def read_line() -> str:
    """What is typed, nothing at the end of the input or on Ctrl-C. Bytes that are no text are asked for again."""
    while True:
        try:
            line = input("> ").strip()
            line.encode()  # without a UTF-8 locale Python hands such bytes on, as half characters
            return line
        except UnicodeError:
            print("That is not UTF-8, and is left out. Set the terminal to UTF-8.")
        except EOFError:
            return ""
        except KeyboardInterrupt:
            print()
            return ""
