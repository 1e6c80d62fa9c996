"""Backends: what answers on the web page, a checkpoint of this machine or a model behind a URL, all used alike."""

from dataclasses import dataclass
from typing import Protocol

from mini_qwen.engine import Engine
from mini_qwen.reply import Reply
from mini_qwen.sampling import Sampling
from mini_qwen.schemas import Turn


@dataclass(frozen=True)
class Settings:
    """How an answer is drawn. The same question with the same settings gets the same answer from a local backend."""

    sampling: Sampling
    max_new_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, but must be 1 or more.")


class Backend(Protocol):
    name: str
    speaks_chat: bool  # False: it can only continue raw text
    context: int | None  # tokens of prompt and answer together, where they are known

    def answer(self, turns: list[Turn], settings: Settings, raw: bool) -> Reply:
        """Begin to answer the conversation, or with `raw` to continue the last turn's text; returns at once.

        Raises what hinders it at once; what goes wrong later stands in the reply. Cancelling the reply stops the
        generation wherever it runs.
        """


class LocalBackend:
    """A checkpoint that this process has loaded."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.name, self.speaks_chat = engine.name, engine.speaks_chat
        self.context: int | None = engine.context

    def answer(self, turns: list[Turn], settings: Settings, raw: bool) -> Reply:
        """The answer is cut off where the context ends. Raises ValueError for a prompt that leaves no room for one."""
        continues = raw or not self.speaks_chat
        prompt = self.engine.encode_text(turns[-1]["content"]) if continues else self.engine.encode(turns)
        room = self.engine.context - len(prompt)
        if room < 1:
            raise ValueError(
                f"The text has {len(prompt):,} tokens, and this checkpoint reads {self.engine.context:,}, its answer "
                "included. Clear the conversation or ask more briefly."
            )
        return self.engine.answer(prompt, settings.sampling, min(settings.max_new_tokens, room), settings.seed)
