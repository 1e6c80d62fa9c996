"""The folder that transformers and vLLM load as it is: weights, config, tokenizer and chat template.

`training_stage`, the one key of ours in config.json, stays: mini_qwen's own programs tell by it whether a checkpoint
answers or continues text, and transformers and vLLM pass over keys they do not know. Three things are added for older
versions, which would not fail without them but compute something else: `rope_theta` beside `rope_parameters`,
`torch_dtype` beside `dtype`, and a tokenizer class that transformers 4 knows too.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig

from mini_qwen.export import Checkpoint
from mini_qwen.model import special_ids

SHARD_SIZE = "5GB"


def write_model_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors, tokenizer files and, where it answers, template.

    Without a chat template, vLLM offers completions of raw text and refuses chats: what a checkpoint of the PT stage
    can do.
    """
    write_json(folder / "config.json", config_values(checkpoint))
    GenerationConfig(**special_ids(checkpoint.tokenizer)).save_pretrained(folder)
    weights = {name: weight.to(checkpoint.dtype) for name, weight in checkpoint.weights.items()}
    save_torch_state_dict(weights, folder, max_shard_size=SHARD_SIZE, metadata={"format": "pt"})
    write_json(folder / "tokenizer.json", checkpoint.layout)
    write_json(folder / "tokenizer_config.json", tokenizer_values(checkpoint))
    if checkpoint.chat_template is not None:
        (folder / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")


def config_values(checkpoint: Checkpoint) -> dict[str, Any]:
    values = checkpoint.config.to_diff_dict() | special_ids(checkpoint.tokenizer)
    dtype = str(checkpoint.dtype).removeprefix("torch.")
    rope = checkpoint.config.rope_parameters
    return values | {
        "architectures": ["Qwen2ForCausalLM"],
        "dtype": dtype,
        "torch_dtype": dtype,
        "rope_theta": rope["rope_theta"],
        "use_cache": True,  # off in the checkpoints of a run under way
    }


def tokenizer_values(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": checkpoint.tokenizer.eos_token,
        "pad_token": checkpoint.tokenizer.pad_token,
        "padding_side": "left",
        "model_max_length": checkpoint.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,  # else older versions drop blanks before punctuation
    }


def write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
