"""The tokenizer: train a byte-level BPE with ChatML control tokens, or load one and make sure that it fits."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mini_qwen.chat import TEMPLATE
from mini_qwen.encoding import byte_of_character, encode_text

END_OF_TURN, PAD = "<|im_end|>", "<|endoftext|>"
CONTROL_TOKENS = [PAD, "<|im_start|>", END_OF_TURN]
# How Qwen2.5 cuts text before byte pairs are merged: contractions, words, single digits, punctuation, line breaks,
# blanks. Source: the tokenizer.json of Qwen2.5.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in Qwen2.5's layout: every text can be encoded, and decodes to itself (in Unicode NFC).

    Args:
        texts: documents.
        vocab_size: all tokens: 256 bytes, the merges, and the 3 control tokens. At least 259.
    """
    if vocab_size < 256 + len(CONTROL_TOKENS):
        raise SystemExit(f"vocab_size is {vocab_size}, but the bytes and control tokens alone are {256 + 3}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TURN, pad_token=PAD, chat_template=TEMPLATE, padding_side="left"
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer and give it the project's chat template.

    Raises SystemExit when there is none at `path`, when it lacks a ChatML control token, or when its end and pad
    tokens are the same (then padding and the end of an answer could not be told apart).
    """
    if not (Path(path) / "tokenizer.json").is_file():
        raise SystemExit(
            f"There is no tokenizer at '{path}' (tokenizer.json is missing). Train one with mini_qwen_tokenizer.py, "
            "or fetch the one of Qwen2.5 with 'bash prepare.sh --only model'."
        )
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    missing = [token for token in CONTROL_TOKENS if token not in tokenizer.get_vocab()]
    if missing:
        raise SystemExit(f"The tokenizer at '{path}' lacks {', '.join(missing)}, control tokens that ChatML needs.")
    tokenizer.eos_token, tokenizer.pad_token = END_OF_TURN, PAD
    tokenizer.chat_template = TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer


def bytes_per_token(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    """How many UTF-8 bytes one token stands for, on average: higher means shorter sequences."""
    num_tokens = sum(len(ids) for ids in encode_text(tokenizer, texts))
    return sum(len(text.encode()) for text in texts) / num_tokens


def count_bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Bytes of text that the tokens stand for: byte-level BPE writes one character for each; the end token is none."""
    return len(byte_characters(tokenizer, ids))


def count_characters(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Characters that begin within the tokens: those bytes that continue none (0x80 to 0xbf do, in UTF-8)."""
    byte_of = byte_of_character()
    return sum(not 0x80 <= byte_of[letter] < 0xC0 for letter in byte_characters(tokenizer, ids))


def byte_characters(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The tokens as byte-level BPE writes them, a character for each byte."""
    return "".join(tokenizer.convert_ids_to_tokens([token for token in ids if token != tokenizer.eos_token_id]))
