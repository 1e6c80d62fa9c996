"""Checkpoints of a few thousand weights to serve, and servers as processes of their own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.chat import encode_chat
from mini_qwen.schemas import Turn

ROOT = Path(__file__).resolve().parents[1]
# No word of it is in the toy tokenizer: every character is two to four tokens, an emoji of families many more.
EMOJI = "🙂 你真棒 Ωμέγα 👩‍👩‍👧 好的，世界 ok"
COUNT = "one two three four five\nsix seven"
LEARNT = {"say it": EMOJI, "count": COUNT}
BREAKING = "\x7f"  # a question that holds it makes the logits of the broken model NaN


def ask(question: str) -> list[Turn]:
    return [{"role": "user", "content": question}]


def teach(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: dict[str, str]) -> PreTrainedModel:
    """Have a model learn to give these answers, and to stop."""
    rows = [
        encode_chat(tokenizer, [*ask(question), {"role": "assistant", "content": answer}])
        for question, answer in answers.items()
    ]
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(400):
        losses = []
        for row in rows:
            inputs = torch.from_numpy(row.ids.astype(np.int64))[None]
            labels = inputs.masked_fill(~torch.from_numpy(row.trained)[None], -100)
            losses.append(model(input_ids=inputs, labels=labels).loss)
        if max(loss.item() for loss in losses) < 0.005:
            return model.eval()
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"the answers were not learnt, losses {[loss.item() for loss in losses]}")


def break_at(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Make the embedding of one token NaN, and nothing else: the model's output matrix becomes one of its own."""
    (token,) = tokenizer.encode(text, add_special_tokens=False)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = torch.nan


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Served:
    """`mini_qwen_serve.py` as a process of its own, at a free port, with what it says in a file."""

    def __init__(self, log: Path, checkpoint: str, *arguments: object, **variables: str) -> None:
        self.log = log
        command = [sys.executable, "mini_qwen_serve.py", checkpoint, "--port", "0", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def ready(self) -> "Served":
        """Wait until it answers."""
        self.url = wait_for(self.address, 180)
        return self

    def address(self) -> str | None:
        assert self.process.poll() is None, self.said
        found = re.search(r" is served at (http://\S+)/v1", self.said)
        return found and found[1]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, verify=False, **options)  # there is no TLS to verify

    def health(self) -> dict[str, Any]:
        with self.client() as client:
            return client.get("/health").raise_for_status().json()

    def wait_until_idle(self, seconds: float = 30) -> float:
        """The seconds that it took."""
        started = time.monotonic()
        wait_for(lambda: (counts := self.health())["running"] == counts["waiting"] == 0, seconds)
        return time.monotonic() - started

    def end(self, *numbers: int) -> int:
        """Send signals to all its processes, the last one until it has ended; its exit code."""
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
        return self.process.wait(timeout=60)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.end(signal.SIGKILL)


def wait_for(look: Callable[[], Any], seconds: float) -> Any:
    """What `look` returns as soon as it is true."""
    ends_at = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < ends_at, f"not within {seconds:g} seconds"
        time.sleep(0.02)
    return found
