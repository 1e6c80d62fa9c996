"""The harness: a loaded model as lm-eval (EleutherAI's evaluation harness) wants to see one."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.chat import TokenRow
from mini_qwen.encoding import encode_text
from mini_qwen.generation import encode_prompt, generate
from mini_qwen.options import Rated, rate_options
from mini_qwen.scoring import Score, score_rows
from mini_qwen.shots import Prompt

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise SystemExit(
        "Multiple choice goes through lm-eval, which is not installed: pip install -e '.[harness]'"
    ) from None

MAX_NEW_TOKENS = 256  # lm-eval's own, for a task that says none
Pair = tuple[str, str]  # context, continuation


class HarnessModel(LM):
    """Answers lm-eval's requests. Options of the same context share its computation (mini_qwen/options.py).

    Args:
        chat: a context is one turn of the user in the chat template, and what follows it the assistant's answer.
        max_length: tokens that context and continuation may have together; who asks sees to it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chat: bool = False,
        max_length: int | None = None,
        batch_size: int = 8,
        desc: str = "options",
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.chat, self.desc = model, tokenizer, chat, desc
        self.max_length = min(max_length or model.config.max_position_embeddings, model.config.max_position_embeddings)
        self.batch_size = batch_size

    def encode_context(self, context: str) -> list[int]:
        """An empty context that is no turn of a chat is the end of the text before."""
        turns = [{"role": "user", "content": context}]
        return (
            encode_prompt(self.tokenizer, turns, self.chat) if context or self.chat else [self.tokenizer.eos_token_id]
        )

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both; blanks at the end of a context that is no chat turn go to the continuation.

            "Answer: ", "A"       Answer | :    and   ␣A          as one text is tokenised, cut where the context ends
            "http:", "//b"        http | :      and   // | b      by itself, for in one text :// is a token

        Source of the first rule: lm-eval, `TemplateLM._encode_pair`. Where a token spans the border, the rule there
        takes the first letters off the continuation.
        """
        if not self.chat:
            kept = context.rstrip()
            context, continuation = kept, context[len(kept) :] + continuation
            before = self.encode_context(context)
            whole = encode_text(self.tokenizer, [context + continuation])[0].tolist()
            if context and whole[: len(before)] == before:
                return before, whole[len(before) :]
        return self.encode_context(context), encode_text(self.tokenizer, [continuation])[0].tolist()

    def count_tokens(self, context: str, continuation: str) -> int:
        return sum(map(len, self.encode_pair(context, continuation)))

    def rate(self, pairs: list[Pair]) -> list[Rated]:
        """Log-probability of each continuation given its context."""
        options: dict[tuple[int, ...], dict[tuple[int, ...], Rated | None]] = {}
        encoded = []
        for before, after in (self.encode_pair(*pair) for pair in pairs):
            assert len(before) + len(after) <= self.max_length, (len(before), len(after), self.max_length)
            encoded.append((tuple(before), tuple(after)))
            options.setdefault(encoded[-1][0], {})[encoded[-1][1]] = None
        groups = [list(group) for group in options.values()]
        rated = rate_options(self.model, list(options), groups, self.desc, self.batch_size)
        found = {
            before: dict(zip(group, values, strict=True))
            for before, group, values in zip(options, groups, rated, strict=True)
        }
        return [found[before][after] for before, after in encoded]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        rated = self.rate([request.args for request in requests])
        return [(score.sum_log_prob, is_greedy) for score, is_greedy in rated]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of whole texts; one longer than the model's context in windows that each score what no other does."""
        texts = [request.args[0] for request in requests]
        rows, owners = [], []
        for owner, ids in enumerate(encode_text(self.tokenizer, texts)):
            windows = get_rolling_token_windows(ids.tolist(), self.tokenizer.eos_token_id, self.max_length - 1, 1)
            for before, after in map(make_disjoint_window, windows):
                scored = np.arange(len(before) + len(after)) >= len(before)
                rows.append(TokenRow(np.array([*before, *after], np.uint32), scored))
                owners.append(owner)
        totals = [0.0] * len(texts)
        for owner, score in zip(owners, score_rows(self.model, rows, self.desc), strict=True):
            totals[owner] += score.sum_log_prob
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The most probable answers, up to the first of the request's `until` texts.

        Raises ValueError for a request to sample: what is measured here is not left to chance.
        """
        answers: dict[int, str] = {}
        wanted: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            settings: dict[str, Any] = request.args[1]
            if settings.get("do_sample"):
                raise ValueError(f"this model answers greedily, but the task asks for {settings}")
            wanted.setdefault(settings.get("max_gen_toks", MAX_NEW_TOKENS), []).append(index)
        for num_tokens, chosen in wanted.items():
            prompts = [self.encode_context(requests[index].args[0]) for index in chosen]
            assert all(len(prompt) + num_tokens <= self.max_length for prompt in prompts), self.max_length
            written = generate(
                self.model, self.tokenizer, prompts, num_tokens, batch_size=self.batch_size, desc=self.desc
            )
            for index, answer in zip(chosen, written, strict=True):
                answers[index] = cut(answer.text, requests[index].args[1].get("until") or [])
        return [answers[index] for index in range(len(requests))]


def cut(text: str, until: str | list[str]) -> str:
    """
    >>> cut("Paris. Question: and", until=["\\n", "Question:"])
    'Paris. '
    """
    for end in [until] if isinstance(until, str) else until:
        text = text.split(end)[0] if end else text
    return text


class Results(NamedTuple):
    """Of the prompts of one task. The accuracies are lm-eval's own numbers; None where there is no prompt."""

    accuracy: float | None
    accuracy_by_length: float | None  # by the characters of an option, its `acc_norm`
    right: list[bool]  # of each prompt
    scores: list[list[Score]]  # of each prompt's options


def run_choices(harness: HarnessModel, name: str, prompts: list[Prompt], right: list[int]) -> Results:
    """Let lm-eval ask the prompts; `right` holds the number of each one's right option."""
    if not prompts:
        return Results(None, None, [], [])
    rows = [prompt._asdict() | {"right": number} for prompt, number in zip(prompts, right, strict=True)]
    config = {
        "task": name,
        "custom_dataset": lambda: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "num_fewshot": 0,  # the prompts have theirs already
        "doc_to_text": lambda row: row["text"],
        "doc_to_choice": lambda row: row["options"],
        "doc_to_target": lambda row: row["right"],
        "target_delimiter": prompts[0].delimiter,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }
    with quiet_logging():
        found = evaluate(harness, {name: ConfigurableTask(config=config)}, bootstrap_iters=0)
    figures, samples = found["results"][name], sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return Results(
        float(figures["acc,none"]),
        float(figures["acc_norm,none"]),
        [sample["acc"] == 1 for sample in samples],
        [[Score(total, 0) for total, _ in sample["filtered_resps"]] for sample in samples],  # 0: it does not say
    )


@contextlib.contextmanager
def quiet_logging() -> Iterator[None]:
    """lm-eval warns of the documents that we hand over as if they were somebody's code."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
