"""The form of a classification question: the passage and its examples as a prompt, and the label in an answer."""

import re
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from mini_qwen.encoding import encode_text
from mini_qwen.generation import encode_prompt
from mini_qwen.overlap import IDEOGRAPH
from mini_qwen.passages import ClassificationTask, Passage
from mini_qwen.schemas import Turn

SPARE_TOKENS = 16  # that an answer may have beside the longest label
WORD = f"[^\\W{IDEOGRAPH}]"  # part of a word that has borders; Chinese has none


class Prompt(NamedTuple):
    ids: list[int]
    cut: bool  # the passage lost its end
    num_shots_dropped: int


class QuestionForm:
    """How the questions of a task are put to one checkpoint.

    To a chat model, examples are earlier turns, answered with their label. One that continues raw text gets them as
    Example 1, 2, ... with the question as the last of them, as in the seed study of MiniMind2.
    """

    def __init__(
        self,
        task: ClassificationTask,
        labels: list[str],
        shots: list[Passage],
        tokenizer: PreTrainedTokenizerBase,
        chat: bool,
    ) -> None:
        self.task, self.labels, self.tokenizer, self.chat = task, labels, tokenizer, chat
        self.longest_first = sorted(labels, key=len, reverse=True)
        self.shots = [(shorten(tokenizer, body(shot), task.max_text_tokens), shot.label) for shot in shots]

    @cached_property
    def label_ids(self) -> list[list[int]]:
        return [ids.tolist() for ids in encode_text(self.tokenizer, self.labels)]

    @property
    def num_answer_tokens(self) -> int:
        return max(map(len, self.label_ids)) + SPARE_TOKENS

    def turns(self, shots: list[tuple[str, str]], passage: str) -> list[Turn]:
        names = ", ".join(self.labels)
        start = self.task.instruction.replace("{labels}", names)
        end = f"Your answer (choose ONLY one category in {names}):"
        if not self.chat:
            asked = [f"{text}\n\n{end}\n{label}" for text, label in [*shots, (passage, "")]]
            if shots:
                asked = [f"Example {at}:\n{text}" for at, text in enumerate(asked, start=1)]
                asked = ["Here are some examples:", *asked]
            return [{"role": "user", "content": "\n\n".join([start, *asked])}]
        turns: list[Turn] = []
        for text, label in shots:
            turns += [{"role": "user", "content": f"{text}\n\n{end}"}, {"role": "assistant", "content": label}]
        turns.append({"role": "user", "content": f"{passage}\n\n{end}"})
        turns[0]["content"] = f"{start}\n\n{turns[0]['content']}"
        return turns

    def prompt(self, passage: Passage, max_length: int) -> Prompt:
        """The question with as many examples as `max_length` tokens hold besides the answer; the first ones go first.

        Where it does not fit even alone, the passage loses more of its end. Raises SystemExit where that does not do.
        """
        room = max_length - self.num_answer_tokens
        text = body(passage)
        num_whole = len(encode_text(self.tokenizer, [text])[0])
        num_kept = min(num_whole, self.task.max_text_tokens)
        dropped = 0
        while True:
            turns = self.turns(self.shots[dropped:], shorten(self.tokenizer, text, num_kept))
            ids = encode_prompt(self.tokenizer, turns, self.chat)
            if len(ids) <= room:
                return Prompt(ids, num_kept < num_whole, dropped)
            if dropped < len(self.shots):
                dropped += 1
            elif num_kept:
                num_kept = max(0, num_kept - (len(ids) - room))
            else:
                raise SystemExit(
                    f"max_length {max_length} is too short for a question with the labels {', '.join(self.labels)}: "
                    f"without a passage it has {len(ids)} tokens, and the answer may have {self.num_answer_tokens}. "
                    "Raise max_length, or shorten the task's instruction."
                )

    def read_label(self, answer: str) -> str | None:
        """The label that comes first in the answer as a word of its own, or None.

        Capitals do not count. Of "tech" and "tech news" in the same place the longer one is meant.
        """
        found = self.pattern.search(answer)
        return self.longest_first[found.lastindex - 1] if found else None

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches a label, and by its last group says which."""
        parts = []
        for label in self.longest_first:
            before = f"(?<!{WORD})" if re.match(WORD, label[0]) else ""
            after = f"(?!{WORD})" if re.match(WORD, label[-1]) else ""
            parts.append(f"{before}({re.escape(label)}){after}")
        return re.compile("|".join(parts), re.IGNORECASE)


def body(passage: Passage) -> str:
    return f"title:\n{passage.title}\ncontent:\n{passage.text}" if passage.title else f"content:\n{passage.text}"


def shorten(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> str:
    """The text's first tokens, as text, without half a character at the end."""
    [ids] = encode_text(tokenizer, [text])
    if len(ids) <= max_tokens:
        return text
    return tokenizer.decode(ids[:max_tokens], clean_up_tokenization_spaces=False).rstrip("\ufffd")
