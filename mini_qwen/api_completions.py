"""What the API answers, in OpenAI's form: whole, or as a stream of events."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from mini_qwen.api_json import to_event

DONE = b"data: [DONE]\n\n"


def count(num_prompt: int, num_answer: int) -> dict[str, int]:
    """Tokens. An answer's end token counts: it was generated as any other."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
    }


@dataclass
class Envelope:
    """What all parts of one answer carry. `seed` is ours: with it the same request gets the same answer again."""

    model: str
    chat: bool  # else a continuation of text
    seed: int
    include_usage: bool = False  # in a stream, behind its last part
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, choice: dict[str, Any] | None, usage: dict[str, int] | None, kind: str) -> dict[str, Any]:
        common = {"index": 0, "logprobs": None}
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": [] if choice is None else [common | choice],
            "seed": self.seed,
        } | ({} if usage is None else {"usage": usage})

    def whole(self, text: str, finish: str, usage: dict[str, int]) -> dict[str, Any]:
        if not self.chat:
            return self.wrap({"text": text, "finish_reason": finish}, usage, "text_completion")
        message = {"role": "assistant", "content": text, "refusal": None}
        return self.wrap({"message": message, "finish_reason": finish}, usage, "chat.completion")

    def part(self, text: str | None, finish: str | None = None, opens: bool = False) -> bytes:
        """One event of a stream: the opening, a piece of the text, or the end."""
        if not self.chat:
            choice = {"text": text or "", "finish_reason": finish}
            content = self.wrap(choice, None, "text_completion")
        else:
            delta = ({"role": "assistant"} if opens else {}) | ({} if text is None else {"content": text})
            content = self.wrap({"delta": delta, "finish_reason": finish}, None, "chat.completion.chunk")
        return to_event(content | ({"usage": None} if self.include_usage else {}))

    def ending(self, finish: str, usage: dict[str, int]) -> bytes:
        """The last events of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        counted = to_event(self.wrap(None, usage, kind)) if self.include_usage else b""
        return self.part(None, finish) + counted + DONE
