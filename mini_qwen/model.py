"""The model: a Qwen2.5 config, resized and randomly initialised, or a checkpoint loaded with fp32 weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from mini_qwen.checkpoint import MANIFEST, verify
from mini_qwen.training import Attention, choose_attention
from mini_qwen.varlen import VARLEN, add_varlen

SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)


@dataclass
class NewModel:
    """Recipe keys of a model that starts from random weights: a base config and the sizes to change in it."""

    base_config: str = "models/Qwen2.5-0.5B-Instruct"  # folder with a Qwen2 config.json
    tokenizer: str = "models/Qwen2.5-0.5B-Instruct"  # folder with a tokenizer.json
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None  # rows of the embedding, at least the tokenizer's size
    max_position_embeddings: int | None = None  # tokens
    attention_dropout: float = 0.0  # share of the attention's weights that a training step leaves out
    attn_implementation: Attention = "auto"


@dataclass
class TrainedModel:
    """Recipe keys of a model that goes on from a checkpoint folder, which brings its tokenizer."""

    checkpoint: str
    attention_dropout: float = 0.0  # share of the attention's weights that a training step leaves out
    attn_implementation: Attention = "auto"


def resize_config(base: dict[str, Any], changes: dict[str, int]) -> Qwen2Config:
    """A Qwen2Config with `changes` applied to the raw values of `base`.

    It is built anew, because a loaded config carries lists made for its old depth: raising num_hidden_layers on one
    breaks at construction, lowering it at the first save.

    Raises SystemExit for sizes that cannot work, with the numbers and the nearest ones that do.
    """
    made_for_base = ("layer_types", "torch_dtype", "dtype")
    values = {key: value for key, value in base.items() if key not in made_for_base} | changes
    hidden, heads, kv_heads = values["hidden_size"], values["num_attention_heads"], values["num_key_value_heads"]
    wrong = {key: values[key] for key in SIZES if values[key] < 1}
    if wrong:
        raise SystemExit(f"Model sizes must be at least 1, but the recipe has {wrong}.")
    if hidden % 2:
        raise SystemExit(f"hidden_size {hidden} is odd. Nearest sizes that work: [{hidden - 1}, {hidden + 1}].")
    if hidden % heads or (hidden // heads) % 2:
        works = sorted((n for n in range(1, hidden + 1) if hidden % (2 * n) == 0), key=lambda n: abs(n - heads))[:2]
        raise SystemExit(
            f"hidden_size {hidden} cannot be shared by num_attention_heads {heads}: each head needs the same even "
            f"number of dimensions. Nearest num_attention_heads that work: {works}."
        )
    if heads % kv_heads:
        works = sorted((n for n in range(1, heads + 1) if heads % n == 0), key=lambda n: abs(n - kv_heads))[:2]
        raise SystemExit(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}. Nearest "
            f"num_key_value_heads that work: {works}."
        )
    return Qwen2Config(**values)


def check_vocabulary(vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    if vocab_size < len(tokenizer):
        raise SystemExit(
            f"The tokenizer has {len(tokenizer):,} tokens, but the model's vocab_size is {vocab_size:,}: the last "
            f"ones would have no embedding. Set vocab_size to {-(-len(tokenizer) // 64) * 64:,} or more."
        )


def make_config(args: NewModel, tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    """The base config with the recipe's sizes. Refuses what cannot work before any data is touched."""
    path = Path(args.base_config) / "config.json"
    if not path.is_file():
        raise SystemExit(f"base_config '{args.base_config}' is not a folder with a config.json.")
    changes = {key: getattr(args, key) for key in (*SIZES, "max_position_embeddings")}
    changes = {key: value for key, value in changes.items() if value is not None}
    base = json.loads(path.read_text(encoding="utf-8")) | special_ids(tokenizer)
    base["attention_dropout"] = args.attention_dropout
    config = resize_config(base, changes)
    check_vocabulary(config.vocab_size, tokenizer)
    return config


def build_model(
    args: NewModel, tokenizer: PreTrainedTokenizerBase, precision: str, stage: str, low_memory: bool = False
) -> PreTrainedModel:
    """A randomly initialised causal language model with fp32 weights, whatever type it computes in.

    bf16 weights with a plain optimizer would lose small updates: at lr 1e-4 only 64% of them ever changed. With
    `low_memory` they are bf16; its optimizer keeps what they cannot hold.
    """
    config = make_config(args, tokenizer)
    attention = prepare_attention(args, precision, stage)
    dtype = torch.bfloat16 if low_memory else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return settle(model, tokenizer, stage)


def load_model(
    args: TrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str, stage: str, low_memory: bool = False
) -> PreTrainedModel:
    """The checkpoint's model with fp32 weights, or bf16 for `low_memory`.

    Raises SystemExit when the folder is not a complete checkpoint.
    """
    check_checkpoint(args.checkpoint)
    attention = prepare_attention(args, precision, stage)
    model = AutoModelForCausalLM.from_pretrained(
        args.checkpoint,
        dtype=torch.bfloat16 if low_memory else torch.float32,
        attn_implementation=attention,
        attention_dropout=args.attention_dropout,
        use_safetensors=True,
        trust_remote_code=False,
    )
    check_vocabulary(model.config.vocab_size, tokenizer)
    return settle(model, tokenizer, stage)


def check_checkpoint(path: str) -> None:
    """Raises SystemExit when the folder lacks what a checkpoint has, or a file is not as its manifest says."""
    folder = Path(path)
    present = folder.is_dir() and list(folder.glob("*.safetensors"))
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    missing += [] if present else ["*.safetensors"]
    if missing:
        raise SystemExit(
            f"'{path}' is not a checkpoint: it lacks {', '.join(missing)}. Name the folder that a stage wrote "
            "(its output_dir, or a checkpoint-N inside), and run the stage before if it is not there yet."
        )
    if (folder / MANIFEST).is_file():  # a checkpoint of another project has none
        try:
            verify(folder)
        except ValueError as reason:
            raise SystemExit(
                f"'{path}' is damaged: {reason}. Take another checkpoint or run its stage again; if you changed the "
                f"file yourself, delete {MANIFEST}."
            ) from None
        return
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):  # reads the header alone, which says how long the file is
                pass
        except SafetensorError as error:
            raise SystemExit(f"{file} is damaged: {error}. Fetch it again, or take another checkpoint.") from None


def settle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stage: str) -> PreTrainedModel:
    """Make the configs name the stage and the tokenizer's own end and pad tokens, and drop foreign defaults.

    `training_stage` in config.json tells a checkpoint that continues text from one that answers. `rope_theta` is for
    transformers 4, which without a word passes over the `rope_parameters` of today and takes 10,000.
    """
    model.config.training_stage = stage
    model.config.rope_theta = model.config.rope_parameters["rope_theta"]
    for key, token_id in special_ids(tokenizer).items():
        setattr(model.config, key, token_id)
    model.generation_config = GenerationConfig(**special_ids(tokenizer), use_cache=True)
    return model


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    return {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def prepare_attention(args: NewModel | TrainedModel, precision: str, stage: str) -> Attention:
    attention = choose_attention(args.attn_implementation, precision, stage != "dpo", args.attention_dropout)
    if attention == VARLEN:
        add_varlen()
    return attention


def needs_flat_rows(model: PreTrainedModel) -> bool:
    """Flash attention keeps packed rows apart only when the whole batch is one row."""
    return "flash" in model.config._attn_implementation or model.config._attn_implementation == VARLEN
