"""Trainers to time: as the seed's scripts have them on today's libraries, as TRL has them, and ours lever by lever.

Each variant trains once over the same rows, in fp32 unless it says otherwise, and saves and evaluates nothing.
"""

import copy
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_caching, load_from_disk
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Qwen2Config,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as PaddingCollator

from bench.measurement import Facts, Work
from mini_qwen.blocks import BlockCollator, Blocks
from mini_qwen.model import resize_config
from mini_qwen.tokenizer import load_tokenizer
from mini_qwen.trainers import GuardedSFTTrainer, GuardedTrainer, PreparedDPOTrainer
from mini_qwen.training import AnswerConfig, PreferenceConfig, PTConfig

Sizes = dict[str, int]
QUIET: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "logging_steps": 4, "disable_tqdm": True}
PLAIN: dict[str, Any] = QUIET | {"use_cpu": True, "bf16": False}


def make_model(sizes: Sizes) -> PreTrainedModel:
    set_seed(42)
    base = Qwen2Config(tie_word_embeddings=True).to_dict()
    model = AutoModelForCausalLM.from_config(resize_config(base, sizes), attn_implementation="sdpa")
    model.config.training_stage = "pt"
    return model


def train(trainer: Trainer) -> Facts:
    result = trainer.train()
    return {"steps": result.global_step, "loss": round(result.training_loss, 4)}


def pt_naive(folder: Path, data: Path, sizes: Sizes, batch_size: int) -> Work:
    """The seed's: columns of lists, the mask of ones that its collator adds, all logits."""
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    rows = [{"input_ids": block["input_ids"].tolist()} for block in Blocks(data / "blocks")]
    dataset = Dataset.from_list([row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows])
    dataset.save_to_disk(str(folder / "rows"))
    args = TrainingArguments(str(folder), per_device_train_batch_size=batch_size, num_train_epochs=1, **PLAIN)
    trainer = Trainer(
        make_model(sizes),
        args,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=load_from_disk(str(folder / "rows")),
    )
    return lambda: train(trainer)


def pt_ours(folder: Path, data: Path, sizes: Sizes, batch_size: int, **levers: Any) -> Work:
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    keys = {"precision": "fp32", "num_train_epochs": 1} | QUIET | levers
    args = PTConfig(str(folder), per_device_train_batch_size=batch_size, **keys)
    trainer = GuardedTrainer(
        model=make_model(sizes),
        args=args,
        train_dataset=Blocks(data / "blocks"),
        data_collator=BlockCollator(tokenizer.pad_token_id),
    )
    return lambda: train(trainer)


def padded_rows(data: Path) -> Dataset:
    """The conversations that ours packs, one a row, with the same labels."""
    rows = [{name: block[name].tolist() for name in ("input_ids", "labels")} for block in Blocks(data / "rows")]
    return Dataset.from_list(rows)


def sft_seed(folder: Path, data: Path, sizes: Sizes, batch_size: int) -> Work:
    """As with TRL 0.11, which the seed used: rows filled up to the longest of a batch, and all logits."""
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    keys = PLAIN | {"num_train_epochs": 1, "remove_unused_columns": False}
    trainer = Trainer(
        make_model(sizes),
        TrainingArguments(str(folder), per_device_train_batch_size=batch_size, **keys),
        data_collator=PaddingCollator(pad_token_id=tokenizer.pad_token_id),
        train_dataset=padded_rows(data),
    )
    return lambda: train(trainer)


def sft_trl(folder: Path, data: Path, sizes: Sizes, batch_size: int, **settings: Any) -> Work:
    """TRL's defaults but for the precision: its own loss head, activation checkpointing."""
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    keys = PLAIN | {"num_train_epochs": 1, "max_length": 1024} | settings
    args = SFTConfig(str(folder), per_device_train_batch_size=batch_size, **keys)
    trainer = SFTTrainer(make_model(sizes), args, train_dataset=padded_rows(data), processing_class=tokenizer)
    return lambda: train(trainer)


def sft_ours(folder: Path, data: Path, sizes: Sizes, batch_size: int, **levers: Any) -> Work:
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    keys = {"precision": "fp32", "num_train_epochs": 1} | QUIET | levers
    trainer = GuardedSFTTrainer(
        model=make_model(sizes),
        args=AnswerConfig(str(folder), per_device_train_batch_size=batch_size, **keys),
        train_dataset=Blocks(data / "packed").as_dataset(),
        processing_class=tokenizer,
        data_collator=BlockCollator(tokenizer.pad_token_id),
    )
    return lambda: train(trainer)


def dpo(folder: Path, data: Path, sizes: Sizes, batch_size: int, **settings: Any) -> Work:
    """TRL's trainer with these settings; making it is measured too, because there the reference may be scored."""
    disable_caching()  # else the reference is scored by the first of all variants only, and its values are used again
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    pairs = load_from_disk(str(data / "pairs"))
    model = make_model(sizes)
    keys = {"precision": "fp32", "num_train_epochs": 1} | QUIET | settings
    args = PreferenceConfig(str(folder / "out"), per_device_train_batch_size=batch_size, **keys)
    reference = None if args.precompute_ref_log_probs else copy.deepcopy(model)

    def work() -> Facts:
        trainer = PreparedDPOTrainer(
            model=model, ref_model=reference, args=args, train_dataset=pairs, processing_class=tokenizer
        )
        return train(trainer)

    return work
