"""A recipe as the planner reads it: strictly, and without a GPU, the data, the tokenizer or a checkpoint's weights."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers import Qwen2Config, TrainingArguments

from mini_qwen.disk import checkpoint_bytes, most_checkpoints, optimizer_bytes
from mini_qwen.files import DataKeys
from mini_qwen.model import SIZES, NewModel, TrainedModel, resize_config
from mini_qwen.optimizer import make_optimizer
from mini_qwen.plan import MUON_STAGES, Machine, Run
from mini_qwen.plan_parameters import empty_model
from mini_qwen.recipe import parse_recipe
from mini_qwen.stages import STAGES, find_stage

# What `attn_implementation` names that keeps documents apart by a mask held in memory; auto is planned as SDPA.
MASKING = ("auto", "eager", "sdpa")


class Recipe(NamedTuple):
    path: str
    stage: str
    data: DataKeys
    training: TrainingArguments
    config: Qwen2Config
    attention: str  # as written; auto: the plan is for SDPA, which needs more than the others

    @property
    def length(self) -> int:
        """Tokens of a block, a conversation, or either side of a pair."""
        return self.data.block_size if self.stage == "pt" else self.training.max_length

    @property
    def packed(self) -> bool:
        return self.stage == "pt" or bool(getattr(self.data, "packing", False))


def read_recipe(path: str, overrides: list[str], stage: str | None = None, model: str | None = None) -> Recipe:
    """Parse a recipe of PT, SFT or DPO.

    Args:
        overrides: `--key value` words that change it.
        model: where the sizes of SFT's and DPO's model stand while their checkpoint is not there: a folder with a
            config.json, or the recipe that trains it.
    """
    stage = find_stage(path, stage)
    words = ["--config", path, "--prepare_only", "true", *overrides]
    data, training, keys = parse_recipe(*STAGES[stage], argv=words, default=path)
    return Recipe(path, stage, data, training, read_config(path, keys, model), keys.attn_implementation)


def read_config(path: str, keys: NewModel | TrainedModel, model: str | None) -> Qwen2Config:
    """The model's sizes. Raises SystemExit when they stand nowhere, or are not those of a Qwen2."""
    if isinstance(keys, NewModel):
        file = Path(keys.base_config) / "config.json"
        changes = {key: getattr(keys, key) for key in SIZES if getattr(keys, key) is not None}
        key = f"base_config '{keys.base_config}'"
    elif model is not None and Path(model).suffix in (".yaml", ".yml"):
        return read_recipe(model, [], stage="pt").config
    else:
        file, changes = Path(model or keys.checkpoint) / "config.json", {}
        key = f"--model '{model}'" if model else f"checkpoint '{keys.checkpoint}'"
    if not file.is_file():
        raise SystemExit(
            f"{path}: {key} has no config.json, which says how large the model is. Name one that has, or the recipe "
            "that makes the model: --model recipes/pt.yaml."
        )
    base = json.loads(file.read_text(encoding="utf-8"))
    if base.get("model_type") != "qwen2":
        raise SystemExit(
            f"{file}: model_type is {base.get('model_type')!r}; the plan is for 'qwen2'. Name another: --model FOLDER."
        )
    # Ids of the base's own tokenizer may lie outside of another vocabulary, and say nothing of the model's size.
    return resize_config(base | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")), changes)


def count_rows(recipe: Recipe, tokens: int | None, rows: int | None) -> tuple[int, int]:
    """Rows and computed tokens of an epoch: as given, else from the ledger in output_dir.

    Blocks are full: 15.95e9 tokens in blocks of 1,024 are 15,576,172 rows. Unpacked rows have tokens / rows each.

    Raises SystemExit when neither says how many there are.
    """
    ledger = Path(recipe.training.output_dir) / "data_ledger.json"
    if tokens is None and rows is None and ledger.is_file():
        counts = json.loads(ledger.read_text(encoding="utf-8"))
        tokens = counts["tokens_trained"] + counts["tokens_masked"] + counts.get("tokens_padding", 0)
        rows = (counts.get("blocks") or None) if recipe.packed else counts["rows_kept"]
    if recipe.packed and (tokens or rows):
        rows = rows or math.ceil(tokens / recipe.length)
        return rows, rows * recipe.length
    if tokens and rows:
        return rows, tokens
    both = "--tokens N" if recipe.packed else "--tokens N, of both sides of all pairs, and --rows N, the pairs"
    if recipe.stage == "sft" and not recipe.packed:
        both = "--tokens N and --rows N, the conversations"
    raise SystemExit(
        f"{recipe.path}: how much an epoch is, is not known: output_dir '{recipe.training.output_dir}' has no "
        f"data_ledger.json. Say it: {both}. Or have the data prepared, which writes the ledger: the stage with "
        "--prepare_only true."
    )


def make_run(recipe: Recipe, machine: Machine, tokens: int | None, rows: int | None, loss_head: str | None) -> Run:
    """Raises SystemExit for keys that do not work on this machine, and when the size of an epoch is not known."""
    training: Any = recipe.training
    precision = training.written.get("precision", "auto")
    if precision == "fp32" or (precision == "bf16" and not machine.gpu.bf16):
        works = "bf16" if machine.gpu.bf16 else "fp16"
        raise SystemExit(
            f"{recipe.path}: precision is {precision}, in which this GPU has no fast products. Leave the key out, or "
            f"set precision: {works}."
        )
    several = machine.gpus > 1 or machine.zero > 0
    if several and training.low_memory:
        raise SystemExit(
            f"{recipe.path}: low_memory is true, which works on one process, not under DeepSpeed. Plan for --gpus 1, "
            "or without it: --low_memory false."
        )
    if several and training.muon_learning_rate and training.max_grad_norm:
        raise SystemExit(
            f"{recipe.path}: muon_learning_rate is {training.muon_learning_rate}, and max_grad_norm "
            f"{training.max_grad_norm}. Muon does not clip under DeepSpeed: plan for --gpus 1, or --max_grad_norm 0."
        )
    if training.muon_learning_rate and machine.zero not in MUON_STAGES:
        raise SystemExit(
            f"{recipe.path}: muon_learning_rate is {training.muon_learning_rate}, which works under ZeRO-2 or without "
            f"DeepSpeed, not under ZeRO-{machine.zero}. Plan for --zero 2."
        )
    rows, tokens = count_rows(recipe, tokens, rows)
    ahead = recipe.stage == "dpo" and training.precompute_ref_log_probs
    head = loss_head or ("full" if training.label_smoothing_factor else training.loss_head)
    return Run(
        config=recipe.config,
        rows=rows,
        tokens=tokens,
        micro=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        length=recipe.length,
        state_bytes=optimizer_bytes(stand_in(recipe, zero=0)),
        sides=2 if recipe.stage == "dpo" else 1,
        epochs=training.num_train_epochs,
        max_steps=max(0, training.max_steps),
        precision=precision,
        half_weights=training.low_memory,
        muon=bool(training.muon_learning_rate),
        alone=bool(training.low_memory or (training.muon_learning_rate and training.max_grad_norm)),
        # Documents of a block are kept apart, and pairs are filled up with pads.
        masked=recipe.attention in MASKING and getattr(recipe.data, "isolate_documents", True),
        checkpointing=bool(training.activation_checkpointing or training.gradient_checkpointing),
        loss_head="full" if head in ("full", "library") else "chunked",
        reference="ahead" if ahead else "each step" if recipe.stage == "dpo" else "none",
    )


def stand_in(recipe: Recipe, zero: int) -> Any:
    """What mini_qwen/disk.py looks at of a trainer."""
    training: Any = recipe.training
    model = empty_model(recipe.config, torch.bfloat16 if training.low_memory else torch.float32)
    training.deepspeed_plugin = SimpleNamespace(zero_stage=zero) if zero else None
    training.precision = "bf16"  # or fp16, which is stored as large
    optimizer = None if zero else make_optimizer(model, training, training.muon_learning_rate)
    return SimpleNamespace(args=training, model=model, optimizer=optimizer, checkpoint_limit=training.save_total_limit)


def disk_bytes(recipe: Recipe, machine: Machine, num_steps: int) -> tuple[int, int]:
    """Bytes of a checkpoint, and how many there are at most when the run has ended; one more while it is written."""
    trainer = stand_in(recipe, machine.zero)
    return checkpoint_bytes(trainer), most_checkpoints(trainer, num_steps)
