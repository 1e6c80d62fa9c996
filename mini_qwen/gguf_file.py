"""One file for llama.cpp: sizes, tokenizer, chat template and weights as GGUF, written with the gguf library.

llama.cpp computes with vectors (norms and biases) in fp32, whatever type the matrices have; they are written so.
What GGUF cannot say of a checkpoint is refused: llama.cpp would load the file and compute something else.
"""

from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType

from mini_qwen.encoding import byte_of_character, split_pattern
from mini_qwen.export import Checkpoint
from mini_qwen.tokenizer import SPLIT_PATTERN

TYPES = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}


def file_name(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.name}-{checkpoint.dtype_name}.gguf"


def check_supported(checkpoint: Checkpoint) -> None:
    """Raises SystemExit, naming key and value, for what a GGUF of architecture qwen2 has no place for."""
    config, layout = checkpoint.config, checkpoint.layout
    model, rope = layout["model"], config.rope_parameters
    head_dim = config.hidden_size // config.num_attention_heads
    normalizer = (layout["normalizer"] or {}).get("type", "NFC")
    parts = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    wanted = {
        "config.json: rope_type": (rope["rope_type"], "default"),
        "config.json: partial_rotary_factor": (rope.get("partial_rotary_factor") or 1, 1),
        "config.json: head_dim": (getattr(config, "head_dim", None) or head_dim, head_dim),
        "config.json: use_sliding_window": (bool(config.use_sliding_window), False),
        "config.json: hidden_act": (config.hidden_act, "silu"),
        "tokenizer.json: model": (model["type"], "BPE"),
        "tokenizer.json: normalizer": (normalizer, "NFC"),
        "tokenizer.json: the pattern that splits text": (split_pattern(layout["pre_tokenizer"] or {}), SPLIT_PATTERN),
        "tokenizer.json: tokens added to every text": (checkpoint.tokenizer.num_special_tokens_to_add(), 0),
    }
    wanted |= {f"tokenizer.json: {part}": (model.get(part) or None, None) for part in (*parts, "ignore_merges")}
    for what, (value, supported) in wanted.items():
        if value != supported:
            raise SystemExit(
                f"{checkpoint.folder / what.partition(': ')[0]}: {what.partition(': ')[2]} is {value!r}; the GGUF "
                f"that mini_qwen writes can only hold {supported!r}. Export it with --to vllm instead."
            )
    missing = [character for character in byte_of_character() if character not in model["vocab"]]
    if missing or not model["merges"]:
        raise SystemExit(
            f"The tokenizer of '{checkpoint.folder}' has {len(model['merges'])} merges and lacks {len(missing)} of "
            "the 256 bytes; llama.cpp loads neither a byte-level BPE without merges nor one without all bytes."
        )


def vocabulary(layout: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Token and type of each row of the embedding; rows without a token are filled up as `[PAD1234]`, unused."""
    tokens = {token_id: (token, TokenType.NORMAL) for token, token_id in layout["model"]["vocab"].items()}
    for added in layout["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    rows = [tokens.get(token_id, (f"[PAD{token_id}]", TokenType.UNUSED)) for token_id in range(vocab_size)]
    return [token for token, _ in rows], [int(kind) for _, kind in rows]


def merge_lines(layout: dict[str, Any]) -> list[str]:
    """`Ġ t` for the merge of `Ġ` and `t`; a tokenizer.json has them in this form, or as pairs."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in layout["model"]["merges"]]


def write_gguf(checkpoint: Checkpoint, file: Path) -> None:
    """Write all of the checkpoint into one file, for which `check_supported` has spoken."""
    writer = GGUFWriter(file, "qwen2")
    add_sizes(writer, checkpoint)
    add_tokenizer(writer, checkpoint)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, checkpoint.config.num_hidden_layers)
    for name, weight in checkpoint.weights.items():
        dtype = torch.float32 if weight.ndim == 1 else checkpoint.dtype
        own_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        # numpy has no bf16: bytes, and the type beside them.
        values = weight.to(dtype).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(own_name, values, raw_dtype=TYPES[dtype][0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    config: Any = checkpoint.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(checkpoint.name)
    writer.add_file_type(TYPES[checkpoint.dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def add_tokenizer(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    tokenizer, layout = checkpoint.tokenizer, checkpoint.layout
    tokens, kinds = vocabulary(layout, checkpoint.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")  # the name of SPLIT_PATTERN
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merge_lines(layout))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    # Never put before a text; but where none is named llama.cpp takes token 11, a comma, for it.
    writer.add_bos_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    if checkpoint.chat_template is not None:
        writer.add_chat_template(checkpoint.chat_template)
