"""SFT: TRL's preparation of `messages` rows with the loss on answers only, packed, against ours."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Qwen2Config
from trl import SFTConfig, SFTTrainer

from bench.measurement import Facts, Work, alternate, medians, ratios
from bench.sources import MAX_LENGTH, SEED, read_conversations, tokenizer_path, write_conversations
from mini_qwen.blocks import Blocks
from mini_qwen.conversations import ConversationData, prepare_conversations
from mini_qwen.disk import folder_bytes
from mini_qwen.schemas import Turn
from mini_qwen.tokenizer import load_tokenizer

WISHED = (
    "Ours where the ids differ: each content is tokenised by itself, so that the prompt of a chat is a prefix of the "
    "conversation it becomes, and text never becomes a control token. TRL tokenises the rendered conversation as a "
    "whole, where a content's first or last characters can merge with the template's line breaks."
)


def load_messages(file: Path, folder: Path) -> Dataset:
    return load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "read"))


def trl_trainer(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path, **settings: Any) -> SFTTrainer:
    """With a model of the right vocabulary that has next to nothing else."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **heads)
    quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "activation_checkpointing": False}
    args = SFTConfig(str(folder / "out"), assistant_only_loss=True, **quiet, **settings)
    model = AutoModelForCausalLM.from_config(config)
    return SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)


def trl_variant(folder: Path, file: Path, num_proc: int | None) -> Work:
    """The default packing, best fit. Of the constructor only the preparation is measured: itself it gets a single row.

    Reading the jsonl file into `datasets`' own format is not measured; in ours it is.
    """
    tokenizer = load_tokenizer(tokenizer_path())
    dataset = load_messages(file, folder)
    trainer = trl_trainer(dataset.select([0]), tokenizer, folder, max_length=MAX_LENGTH, packing=True)
    trainer.args.dataset_num_proc = num_proc
    bytes_before = folder_bytes(folder)

    def work() -> Facts:
        blocks = trainer._prepare_dataset(dataset, tokenizer, trainer.args, True, None, "train")
        lengths = np.concatenate([chunk.flatten() for chunk in blocks.data.column("seq_lengths").chunks])
        return facts_of(len(lengths), int(lengths.sum()), len(blocks), folder_bytes(folder) - bytes_before)

    return work


def facts_of(rows: int, tokens: int, blocks: int, written: int) -> Facts:
    return {"rows": rows, "tokens": tokens, "blocks": blocks, "disk_bytes_per_token": round(written / tokens, 2)}


def our_variant(folder: Path, file: Path) -> Work:
    tokenizer = load_tokenizer(tokenizer_path())

    def work() -> Facts:
        blocks = our_blocks(folder, file, tokenizer, packing=True)
        return facts_of(len(blocks.store), blocks.store.num_tokens, len(blocks), folder_bytes(folder))

    return work


def our_blocks(folder: Path, file: Path, tokenizer: PreTrainedTokenizerBase, packing: bool) -> Blocks:
    keys = {"cache_dir": str(folder / "ours"), "max_drop_share": 1.0}
    data = ConversationData(train_files=[str(file)], packing=packing, **keys)
    return prepare_conversations(data, tokenizer, MAX_LENGTH, SEED)[0]


def alternates(turns: list[Turn]) -> bool:
    """(system), user, assistant, user, assistant ..., none of them blank: what we train on as it is."""
    roles = [turn["role"] for turn in turns[turns[0]["role"] == "system" :]]
    in_turn = roles == ["user", "assistant"] * (len(roles) // 2)
    return bool(roles) and in_turn and all(turn["content"].strip() for turn in turns)


def compare_rows(conversations: list[list[Turn]], tokenizer: PreTrainedTokenizerBase, folder: Path) -> Facts:
    """Ids and labels of TRL's rows, before packing, against ours, for the conversations that fit `max_length`."""
    usable = [turns for turns in conversations if alternates(turns)]
    dataset = load_messages(write_conversations(usable, folder / "usable.jsonl"), folder)
    theirs = trl_trainer(dataset, tokenizer, folder, max_length=None).train_dataset.to_list()
    fitting = [index for index, row in enumerate(theirs) if len(row["input_ids"]) <= MAX_LENGTH]
    file = write_conversations([usable[index] for index in fitting], folder / "fitting.jsonl")
    ours = our_blocks(folder, file, tokenizer, packing=False)
    found = {"same": 0, "other_ids_same_text": 0, "other_text": 0, "other_labels_only": 0}
    for index, block in zip(fitting, ours, strict=True):
        row = theirs[index]
        if not np.array_equal(row["input_ids"], block["input_ids"]):
            same_text = tokenizer.decode(row["input_ids"]) == tokenizer.decode(block["input_ids"])
            found["other_ids_same_text" if same_text else "other_text"] += 1
        else:
            found["same" if np.array_equal(row["labels"], block["labels"]) else "other_labels_only"] += 1
    skipped = {"out_of_turn_or_blank": len(conversations) - len(usable), "too_long": len(usable) - len(fitting)}
    return {"compared": len(fitting), **found, "not_compared": skipped, "wished": WISHED}


def compare_conversations(folder: Path, num_rows: int, rounds: int) -> Facts:
    conversations = read_conversations()
    (folder / "rows").mkdir()
    identity = compare_rows(conversations, load_tokenizer(tokenizer_path()), folder / "rows")
    file = write_conversations(conversations, folder / "messages.jsonl", num_rows)
    trl = {f"trl, {num_proc or 1} processes": partial(trl_variant, num_proc=num_proc) for num_proc in (None, 2)}
    measured = alternate({**trl, "ours": our_variant}, rounds, folder, file=file)
    middle = medians(measured)
    fastest = min(trl, key=lambda name: middle[name]["wall_s"])
    return {
        "data": {"rows": num_rows, "different_rows": len(conversations), "megabytes": file.stat().st_size / 1e6},
        "rows_compared": identity,
        "medians": middle,
        "against": fastest,
        "ratios": ratios(middle[fastest], middle["ours"]),
        "rounds": measured,
    }
