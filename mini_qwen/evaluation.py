"""Checkpoints side by side: the same documents, questions, pairs and prompts for each, one record of figures each."""

import gc
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.choices import check_choices, score_choices
from mini_qwen.classification import score_classification
from mini_qwen.comparison import Limits
from mini_qwen.decoding import DecodingGrid, run_grid
from mini_qwen.exams import ChoiceTask
from mini_qwen.files import find_files
from mini_qwen.generation import ask
from mini_qwen.held_out import score_documents
from mini_qwen.manners import manners
from mini_qwen.model import check_checkpoint
from mini_qwen.pairs import score_preferences
from mini_qwen.passages import ClassificationTask, check_classification
from mini_qwen.prompts import read_prompts
from mini_qwen.questions import read_questions, score_questions
from mini_qwen.rows import check_columns
from mini_qwen.sampling import Sampling
from mini_qwen.schemas import PAIRS
from mini_qwen.study import Loaded, Part, Study
from mini_qwen.tokenizer import load_tokenizer
from mini_qwen.training import choose_precision


@dataclass
class EvalData:
    """Recipe keys of the evaluation. A part is left out when its files are not named, or `parts` does not name it."""

    checkpoints: list[str]
    output_dir: str = "results/eval"
    parts: list[str] | None = None  # of documents, questions, preferences, choices, classification, prompts, decoding
    documents: list[str] = field(default_factory=list)  # held-out rows {"text"}: loss, bits per byte
    unigram_documents: list[str] = field(default_factory=list)  # training rows {"text"}: the unigram to beat
    questions: list[str] = field(default_factory=list)  # rows {"question", "answer", "group"}: exact match, ROUGE-L
    preferences: list[str] = field(default_factory=list)  # held-out DPO rows: accuracy and margin
    choices: dict[str, ChoiceTask] = field(default_factory=dict)  # multiple choice, scored through lm-eval
    classification: dict[str, ClassificationTask] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)  # texts, or files of them, answered by all checkpoints
    decoding: DecodingGrid | None = None  # the prompts again, at many settings
    limits: Limits = field(default_factory=Limits)  # what makes a stage worse than its parent
    max_new_tokens: int = 128
    max_length: int = 1024  # tokens of a document, a pair, or a prompt with its options
    batch_size: int = 64
    seed: int = 0
    chat: str | None = None  # a checkpoint to talk to in the terminal instead
    temperature: float = 0.7  # for chat; measuring takes the most likely token
    top_p: float = 0.8
    repetition_penalty: float = 1.1

    def chat_sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, repetition_penalty=self.repetition_penalty)


def load_checkpoint(path: str) -> Loaded:
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


def make_parts(args: EvalData) -> list[Part]:
    """The parts that the recipe asks for, its inputs checked before any model is loaded.

    Raises SystemExit for a number, a checkpoint or a file that cannot be used, and for a part that is not known.
    """
    check_sizes(args)
    if not args.checkpoints:
        raise SystemExit("'checkpoints' is empty. Name one or more folders that stages wrote.")
    for checkpoint in args.checkpoints:
        check_checkpoint(checkpoint)
        load_tokenizer(checkpoint)
        if args.checkpoints.count(checkpoint) > 1:
            raise SystemExit(f"The checkpoint '{checkpoint}' is named twice. Name each once.")
    for paths, columns in [
        (args.documents, [["text"]]),
        (args.unigram_documents, [["text"]]),
        (args.questions, [["question", "answer"]]),
        (args.preferences, PAIRS),
    ]:
        check_columns(find_files(paths), columns)
    check_choices(args.choices)
    check_classification(args.classification)
    questions = read_questions(args.questions) if args.questions else []
    prompts = read_prompts(args.prompts)
    choice_files = [path for task in args.choices.values() for path in (*task.questions, *task.shots)]
    class_files = [path for task in args.classification.values() for path in task.files]
    length, answer, batch = args.max_length, args.max_new_tokens, args.batch_size
    if args.decoding is not None:
        args.decoding.settings()

    def answer_prompts(*loaded: Any) -> dict[str, Any]:
        answers = ask(*loaded, prompts, answer, batch, "prompts")
        own = manners(answers)
        return {"answers": [given.text for given in answers], "prompt_manners": own}

    parts = [
        Part(
            "documents",
            [args.documents, args.unigram_documents, length],
            args.documents + args.unigram_documents if args.documents else [],
            lambda *loaded: score_documents(*loaded, args.documents, args.unigram_documents, fitting(*loaded, length)),
        ),
        Part(
            "questions",
            [args.questions, answer],
            args.questions,
            lambda *loaded: score_questions(*loaded, questions, answer, batch),
        ),
        Part(
            "preferences",
            [args.preferences, length],
            args.preferences,
            lambda *loaded: score_preferences(*loaded, args.preferences, fitting(*loaded, length)),
        ),
        Part(
            "choices",
            [{name: asdict(task) for name, task in args.choices.items()}, length],
            choice_files,
            lambda *loaded: {"choices": score_choices(*loaded, args.choices, length, batch)},
        ),
        Part(
            "classification",
            [{name: asdict(task) for name, task in args.classification.items()}, length, args.seed],
            class_files,
            lambda *loaded: {
                "classification": score_classification(
                    *loaded, args.classification, fitting(*loaded, length), batch, args.seed
                )
            },
        ),
        Part("prompts", [prompts, answer], [], answer_prompts),
        Part(
            "decoding",
            [prompts, asdict(args.decoding) if args.decoding else None],
            [],
            lambda *loaded: {"decoding": run_grid(*loaded, prompts, args.decoding, batch)},
        ),
    ]
    wanted = {part.name for part in parts if part.files}
    wanted |= {"prompts"} if prompts else set()
    wanted |= {"decoding"} if prompts and args.decoding is not None else set()
    if choose_precision() != "fp32":  # sums of half-precision numbers round differently in batches of other shapes
        parts = [part._replace(settings=[part.settings, batch]) for part in parts]
    return choose_parts(parts, wanted, args.parts)


def check_sizes(args: EvalData) -> None:
    for key, least in {"max_new_tokens": 1, "max_length": 2, "batch_size": 1}.items():
        if getattr(args, key) < least:
            raise SystemExit(f"{key} is {getattr(args, key)}, but must be {least} or more.")


def fitting(model: PreTrainedModel, _: PreTrainedTokenizerBase, length: int) -> int:
    """The recipe's max_length, or the positions that this checkpoint has, where those are fewer."""
    return min(length, model.config.max_position_embeddings)


def choose_parts(parts: list[Part], possible: set[str], named: list[str] | None) -> list[Part]:
    known = [part.name for part in parts]
    for name in named or []:
        if name not in known:
            raise SystemExit(f"There is no part '{name}' of an evaluation. There are {', '.join(known)}.")
        if name not in possible:
            raise SystemExit(f"The part '{name}' is asked for, but the recipe names nothing to measure it with.")
    return [part for part in parts if part.name in possible and (named is None or part.name in named)]


def evaluate(args: EvalData) -> list[dict[str, Any]]:
    """One record for each checkpoint: its stage and size, its figures, its answers to the prompts."""
    parts = make_parts(args)
    study = Study(Path(args.output_dir))
    records = []
    for checkpoint in args.checkpoints:
        print(f"evaluating {checkpoint}")
        figures = study.measure(checkpoint, [Part("model", None, [], describe), *parts], load_checkpoint)
        records.append({"checkpoint": checkpoint} | figures)
        gc.collect()
    return records


def describe(model: Any, _: Any) -> dict[str, Any]:
    return {"stage": model.config.training_stage, "parameters": model.num_parameters()}
