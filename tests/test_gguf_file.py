"""mini_qwen/gguf_file.py: what gguf's own reader finds in the file is the checkpoint, bit for bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel
from exporting import export, save
from sample_conversations import TEXTS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from mini_qwen.encoding import encode_text
from mini_qwen.export import Checkpoint, open_checkpoint
from mini_qwen.weights import DTYPES

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -e '.[export]'")

from mini_qwen.gguf_file import check_supported, file_name, vocabulary, write_gguf  # noqa: E402

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase
) -> Checkpoint:
    return open_checkpoint(str(save(tmp_path_factory.mktemp("gguf") / "sft", tiny_model(stage="sft"), tokenizer)))


def read(checkpoint: Checkpoint, folder: Path) -> Any:
    write_gguf(checkpoint, folder / file_name(checkpoint))
    return gguf.GGUFReader(folder / file_name(checkpoint))


def values(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def as_torch(tensor: Any) -> torch.Tensor:
    """The tensor in the type that the file gives it, of the shape that torch has it in."""
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.tensor_type.name]
    shape = tuple(reversed(tensor.shape.tolist()))
    return (
        torch.from_numpy(np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1).copy()).view(dtype).view(shape)
    )


LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
} | {f"attn_{name}.{kind}": f"self_attn.{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias")}
NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
NAMES |= {f"blk.{at}.{name}": f"model.layers.{at}.{theirs}" for at in (0, 1) for name, theirs in LAYER.items()}


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_tensors_are_the_weights_bit_for_bit(checkpoint: Checkpoint, tmp_path: Path, dtype: str) -> None:
    """Those of llama.cpp's qwen2 and no other; norms and biases in fp32, which it adds and multiplies in."""
    reader = read(dataclasses.replace(checkpoint, dtype=DTYPES[dtype]), tmp_path)
    tensors = {tensor.name: as_torch(tensor) for tensor in reader.tensors}
    assert tensors.keys() == NAMES.keys()
    for name, tensor in tensors.items():
        weight = checkpoint.weights[NAMES[name]]
        expected = weight if weight.ndim == 1 else weight.to(DTYPES[dtype])
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    assert values(reader)["general.file_type"] == {"fp32": 0, "fp16": 1, "bf16": 32}[dtype]


def test_sizes_are_those_of_the_config(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = values(read(checkpoint, tmp_path))
    assert {key: value for key, value in found.items() if key.startswith(("qwen2.", "general."))} == {
        "general.architecture": "qwen2",
        "general.type": "model",
        "general.name": "sft",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "qwen2.block_count": 2,
        "qwen2.context_length": 32768,
        "qwen2.embedding_length": 32,
        "qwen2.feed_forward_length": 64,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.attention.layer_norm_rms_epsilon": pytest.approx(1e-6, rel=1e-6),  # stored as fp32
        "qwen2.rope.freq_base": 1_000_000.0,
    }


def test_the_tokenizer_is_all_there(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = values(read(checkpoint, tmp_path))
    model, ids = checkpoint.layout["model"], checkpoint.tokenizer.get_vocab()
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 448 == checkpoint.config.vocab_size
    assert tokens[:400] == sorted(ids, key=ids.__getitem__)
    assert tokens[400:] == [f"[PAD{at}]" for at in range(400, 448)]
    assert kinds == [NORMAL] * 397 + [CONTROL] * 3 + [UNUSED] * 48
    assert found["tokenizer.ggml.merges"] == [" ".join(merge) for merge in model["merges"]]
    assert len(found["tokenizer.ggml.merges"]) == 141
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    special = {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")}
    assert {name: tokens[token_id] for name, token_id in special.items()} == {
        "bos": "<|endoftext|>",
        "eos": "<|im_end|>",
        "padding": "<|endoftext|>",
    }
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == checkpoint.chat_template


def test_tokens_and_merges_of_the_file_alone_encode_text_as_the_checkpoint_does(
    checkpoint: Checkpoint, tmp_path: Path, qwen_pattern: str
) -> None:
    found = values(read(checkpoint, tmp_path))
    vocab = {token: at for at, token in enumerate(found["tokenizer.ggml.tokens"])}
    rebuilt = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in found["tokenizer.ggml.merges"]]))
    split = pre_tokenizers.Split(Regex(qwen_pattern), behavior="isolated")
    rebuilt.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    rebuilt.decoder = decoders.ByteLevel()
    normalize = checkpoint.tokenizer.backend_tokenizer.normalizer.normalize_str
    for text in TEXTS:
        assert rebuilt.encode(normalize(text)).ids == encode_text(checkpoint.tokenizer, [text])[0].tolist()


@pytest.fixture
def qwen_pattern() -> str:
    """As llama.cpp has it under the name `qwen2`; its engine knows no (?i:...)."""
    return (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def test_the_vocabulary_of_qwen(qwen_tokenizer: PreTrainedTokenizerBase) -> None:
    layout = json.loads(qwen_tokenizer.backend_tokenizer.to_str())
    tokens, kinds = vocabulary(layout, 151_936)
    ids = qwen_tokenizer.get_vocab()
    assert len(tokens) == 151_936 and all(tokens[at] == token for token, at in ids.items())
    assert kinds[151_643:151_646] == [CONTROL] * 3 and set(kinds[:151_643]) == {NORMAL}
    assert kinds[ids["<tool_call>"]] == USER_DEFINED and set(kinds[len(ids) :]) == {UNUSED}


def test_the_output_weight_is_there_only_where_it_is_another(
    tmp_path: Path, tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = tiny_model(stage="sft").config
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config)
    folder = export(save(tmp_path / "untied", model, tokenizer), "gguf", tmp_path / "out")
    assert [path.name for path in folder.iterdir()] == ["untied-fp32.gguf"]
    tensors = {tensor.name: as_torch(tensor) for tensor in gguf.GGUFReader(folder / "untied-fp32.gguf").tensors}
    assert tensors.keys() - NAMES.keys() == {"output.weight"}
    assert torch.equal(tensors["output.weight"], model.lm_head.weight)


def test_a_pretrained_checkpoint_has_no_chat_template(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert "tokenizer.chat_template" not in values(read(dataclasses.replace(checkpoint, stage="pt"), tmp_path))


def change(checkpoint: Checkpoint, path: str, value: Any) -> Checkpoint:
    """With another value at `config.KEY` or `layout.KEY.KEY`."""
    where, *keys, last = path.split(".")
    if where == "config":
        config = type(checkpoint.config)(**checkpoint.config.to_dict())
        setattr(config, last, value)
        return dataclasses.replace(checkpoint, config=config)
    layout = json.loads(json.dumps(checkpoint.layout))
    inner = layout
    for key in keys:
        inner = inner[key]
    inner[last] = value
    return dataclasses.replace(checkpoint, layout=layout)


UNSUPPORTED: dict[str, tuple[str, Any]] = {
    r"config.json: rope_type is 'yarn'": ("config.rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
    r"config.json: partial_rotary_factor is 0.5; .* can only hold 1": (
        "config.rope_parameters",
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    r"config.json: head_dim is 16; .* can only hold 8": ("config.head_dim", 16),
    r"config.json: use_sliding_window is True; .* can only hold False": ("config.use_sliding_window", True),
    r"config.json: hidden_act is 'gelu'": ("config.hidden_act", "gelu"),
    r"tokenizer.json: model is 'Unigram'": ("layout.model.type", "Unigram"),
    r"tokenizer.json: normalizer is 'NFKC'; .* can only hold 'NFC'": ("layout.normalizer.type", "NFKC"),
    r"tokenizer.json: the pattern that splits text is None": ("layout.pre_tokenizer", {"type": "Whitespace"}),
    r"tokenizer.json: ignore_merges is True": ("layout.model.ignore_merges", True),
    r"tokenizer.json: unk_token is '<unk>'": ("layout.model.unk_token", "<unk>"),
    r"has 0 merges and lacks 0 of the 256 bytes": ("layout.model.merges", []),
    r"has 141 merges and lacks 256 of the 256 bytes": ("layout.model.vocab", {"a b": 0}),
}


@pytest.mark.parametrize("words", UNSUPPORTED)
def test_what_gguf_cannot_say_is_refused(checkpoint: Checkpoint, words: str) -> None:
    check_supported(checkpoint)
    with pytest.raises(SystemExit, match=words):
        check_supported(change(checkpoint, *UNSUPPORTED[words]))


def test_a_refusal_comes_before_anything_is_written(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "sliding"
    changed = change(checkpoint, "config.use_sliding_window", True)
    AutoModelForCausalLM.from_pretrained(checkpoint.folder).save_pretrained(folder)
    changed.config.save_pretrained(folder)
    checkpoint.tokenizer.save_pretrained(folder)
    with pytest.raises(SystemExit, match="use_sliding_window"):
        export(folder, "ollama", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"sliding"}
