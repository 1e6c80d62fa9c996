"""Checkpoints side by side: the same documents, questions, pairs and prompts for each, one row of figures each."""

import gc
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.chat import TokenRow
from mini_qwen.encoding import encode_text
from mini_qwen.files import find_files
from mini_qwen.generation import Answer, encode_prompt, generate, speaks_chat
from mini_qwen.ledger import Ledger
from mini_qwen.metrics import Unigram, bits_per_byte, exact_match, perplexity, repetition_rate, standard_error
from mini_qwen.model import check_checkpoint
from mini_qwen.preferences import read_preferences
from mini_qwen.report import training_facts
from mini_qwen.rows import check_columns, read_rows
from mini_qwen.schemas import PAIR_COLUMNS, PAIRS, join_rated
from mini_qwen.scoring import score_rows
from mini_qwen.tokenizer import count_bytes, load_tokenizer
from mini_qwen.training import choose_precision


@dataclass
class EvalData:
    """Recipe keys of the evaluation. Each part is left out when its files are not named."""

    checkpoints: list[str]
    output_dir: str = "results/eval"
    documents: list[str] = field(default_factory=list)  # held-out rows {"text"}: bits per byte, perplexity
    unigram_documents: list[str] = field(default_factory=list)  # training rows {"text"}: the unigram to beat
    questions: list[str] = field(default_factory=list)  # rows {"question", "answer", "group"}: exact match
    preferences: list[str] = field(default_factory=list)  # held-out DPO rows: accuracy and margin
    prompts: list[str] = field(default_factory=list)  # answered by all checkpoints, side by side
    max_new_tokens: int = 128
    max_length: int = 1024  # tokens of a document or a pair that are scored
    batch_size: int = 64
    chat: str | None = None  # a checkpoint to talk to in the terminal instead
    temperature: float = 0.7  # for chat; measuring takes the most likely token
    top_p: float = 0.8
    repetition_penalty: float = 1.1


@dataclass
class Questions:
    texts: list[str]
    answers: list[str]
    groups: list[str]

    @classmethod
    def read(cls, paths: list[str]) -> "Questions":
        rows = list(read_rows(find_files(paths), ["question", "answer", "group"]))
        for row in rows:
            for name in ("question", "answer"):
                if not isinstance(row.values.get(name), str):
                    raise SystemExit(f"{row.place}: '{name}' is {row.values.get(name)!r}, but must be text.")
        values = [row.values for row in rows]
        groups = [row.get("group") or "all" for row in values]
        return cls([row["question"] for row in values], [row["answer"] for row in values], groups)


def load_checkpoint(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, on the GPU if there is one.

    A checkpoint of another project does not say its stage; it counts as fine-tuned if it brings a chat template.
    """
    check_checkpoint(path)
    precision = choose_precision()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    if not hasattr(model.config, "training_stage"):
        brings_template = AutoTokenizer.from_pretrained(path, trust_remote_code=False).chat_template
        model.config.training_stage = "sft" if brings_template else "pt"
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), load_tokenizer(path)


def document_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> list[TokenRow]:
    """Documents as in pretraining, with their end token; longer ones lose their end."""
    end = np.uint32(tokenizer.eos_token_id)
    return [TokenRow(np.append(ids, end)[:max_length]) for ids in encode_text(tokenizer, texts)]


def read_texts(paths: list[str]) -> list[str]:
    files = find_files(paths)
    return [row.values["text"] for row in read_rows(files, ["text"]) if row.values.get("text")]


def score_documents(args: EvalData, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Bits per byte and perplexity of held-out documents, and of a unigram model of the same tokens.

    The first token of a document has nothing before it: neither its bits nor its bytes count.
    """
    rows = document_tokens(tokenizer, read_texts(args.documents), args.max_length)
    scores = score_rows(model, rows, "documents")
    total, count = sum(score.sum_log_prob for score in scores), sum(score.num_tokens for score in scores)
    num_bytes = sum(count_bytes(tokenizer, row.ids[1:]) for row in rows)
    figures = {"bits_per_byte": bits_per_byte(total, num_bytes), "perplexity": perplexity(total, count)}
    if args.unigram_documents:
        training_rows = document_tokens(tokenizer, read_texts(args.unigram_documents), args.max_length)
        unigram = Unigram((row.ids.tolist() for row in training_rows), len(tokenizer))
        total = sum(unigram.sum_log_prob(row.ids[1:].tolist()) for row in rows)
        figures["unigram_bits_per_byte"] = bits_per_byte(total, num_bytes)
    return figures | {"scored_tokens": count}


def ask(
    args: EvalData, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], desc: str
) -> list[Answer]:
    """Answers to single questions, in the checkpoint's own manner: chat template or raw continuation."""
    chat = speaks_chat(model)
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}], chat) for text in texts]
    return generate(model, tokenizer, prompts, args.max_new_tokens, args.batch_size, desc)


def score_questions(args: EvalData, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Exact match in each group of questions, with its standard error; how many answers stop, how much they repeat."""
    questions = Questions.read(args.questions)
    answers = ask(args, model, tokenizer, questions.texts, "questions")
    figures = {}
    for group in sorted(set(questions.groups)):
        chosen = [index for index, name in enumerate(questions.groups) if name == group]
        right = [questions.answers[index] for index in chosen]
        accuracy = exact_match([answers[index].text for index in chosen], right)
        figures |= {f"accuracy_{group}": accuracy, f"standard_error_{group}": standard_error(accuracy, len(chosen))}
    return figures | manners(answers)


def manners(answers: list[Answer]) -> dict[str, float]:
    """How many answers stop by themselves, and the mean share of their 4-grams that occur more than once."""
    return {
        "stop_rate": fmean(answer.stopped for answer in answers),
        "repetition_4gram": fmean(repetition_rate(answer.ids) for answer in answers),
    }


def score_preferences(args: EvalData, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Share of held-out pairs whose chosen answer has the higher log-probability, and the mean margin in nats."""
    ledger = Ledger()
    rows = join_rated(read_rows(find_files(args.preferences), PAIR_COLUMNS))
    pairs = list(read_preferences(rows, tokenizer, args.max_length, ledger))
    ledger.check(max_drop_share=1.0)
    print(f"preferences: {ledger.rows_kept:,} of {ledger.rows_read:,} pairs scored {dict(ledger.rows_dropped) or ''}")
    sides = [pair.side(answer) for answer in ("chosen_ids", "rejected_ids") for pair in pairs]
    scores = score_rows(model, sides, "preferences")
    margins = [
        chosen.sum_log_prob - rejected.sum_log_prob
        for chosen, rejected in zip(scores[: len(pairs)], scores[len(pairs) :], strict=True)
    ]
    return {"preference_accuracy": fmean(margin > 0 for margin in margins), "preference_margin": fmean(margins)}


def evaluate(args: EvalData) -> list[dict[str, Any]]:
    """One record for each checkpoint: where it comes from, its figures, its answers to the prompts."""
    check_inputs(args)
    records = []
    for checkpoint in args.checkpoints:
        print(f"evaluating {checkpoint}")
        model, tokenizer = load_checkpoint(checkpoint)
        figures: dict[str, float] = {}
        for wanted, score in [
            (args.documents, score_documents),
            (args.questions, score_questions),
            (args.preferences, score_preferences),
        ]:
            if wanted:
                figures |= score(args, model, tokenizer)
        answers = ask(args, model, tokenizer, args.prompts, "prompts") if args.prompts else []
        if answers and not args.questions:
            figures |= manners(answers)
        records.append(
            {
                "checkpoint": checkpoint,
                "stage": model.config.training_stage,
                "parameters": model.num_parameters(),
                **training_facts(Path(checkpoint)),
                **figures,
                "answers": [answer.text for answer in answers],
            }
        )
        del model
        gc.collect()
    return records


def check_inputs(args: EvalData) -> None:
    """Refuse checkpoints and files that cannot be used before the first model is loaded."""
    for checkpoint in args.checkpoints:
        check_checkpoint(checkpoint)
    for paths, choices in [
        (args.documents, [["text"]]),
        (args.unigram_documents, [["text"]]),
        (args.questions, [["question", "answer"]]),
        (args.preferences, PAIRS),
    ]:
        check_columns(find_files(paths), choices)
