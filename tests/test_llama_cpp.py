"""llama.cpp itself, through llama-cpp-python, reads the exported GGUF: the same tokens, logits and answers.

llama-cpp-python is built from source and is not among the pinned packages; docs/export.md has the command.
"""

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeModel, toy_texts
from exporting import export, save
from sample_conversations import CONVERSATIONS, begins_with_line_break, disarmed
from serving import teach
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.chat import TEMPLATE, skeleton
from mini_qwen.generation import encode_prompt, generate
from mini_qwen.schemas import Turn
from mini_qwen.templates import safe_template
from mini_qwen.tokenizer import CONTROL_TOKENS

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed, see docs/export.md")
pytestmark = pytest.mark.slow

ANSWERS = {
    "Where does Anna live?": "Anna lives in a small house near the river.",
    "小明养了什么？": "小明养了一条狗、两只猫和17只鸟！",
    "\n  What is <|im_end|>?": "A token 🙂, 你好.",
    "Where does Victor go tomorrow?": "To the market, as always.",
}


def composed(turns: list[Turn]) -> list[Turn]:
    """In Unicode's composed form (NFC), into which our tokenizer brings a text first; llama.cpp does not."""
    return [turn | {"content": unicodedata.normalize("NFC", turn["content"])} for turn in turns]


@pytest.fixture(scope="module")
def trained(tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model that has learnt four answers by heart."""
    return teach(tiny_model(stage="sft", hidden_size=64, max_position_embeddings=1024), tokenizer, ANSWERS)


@pytest.fixture(scope="module")
def llama(
    trained: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """In fp32, its keys and values too."""
    folder = tmp_path_factory.mktemp("llama")
    exported = export(save(folder / "sft", trained, tokenizer), "gguf", folder / "out")
    return llama_cpp.Llama(
        str(exported / "sft-fp32.gguf"), n_ctx=1024, logits_all=True, type_k=0, type_v=0, n_threads=1, verbose=False
    )


def encode_pieces(llama: Any, turns: list[Turn]) -> list[int]:
    """As mini_qwen does: the template's text with control tokens, each content by itself and without."""
    ids: list[int] = []
    for piece in skeleton(TEMPLATE, tuple(turn["role"] for turn in turns), True):
        text = piece.text if piece.turn is None else turns[piece.turn]["content"]
        ids += llama.tokenize(text.encode(), add_bos=False, special=piece.turn is None)
    return ids


def test_fifty_conversations_are_the_same_tokens(llama: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    for turns in CONVERSATIONS:
        assert encode_pieces(llama, composed(turns)) == encode_prompt(tokenizer, turns, chat=True)
    decomposed = [turns for turns in CONVERSATIONS if composed(turns) != turns]
    assert len(decomposed) == 4
    for turns in decomposed:  # which docs/export.md warns of
        assert encode_pieces(llama, turns) != encode_prompt(tokenizer, turns, chat=True)


def test_a_chat_rendered_to_one_text_is_the_same_tokens(llama: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """As llama-server does it: control tokens of the template are read, those that a content spells were disarmed."""
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
        llama.metadata["tokenizer.chat_template"], eos_token="<|im_end|>", bos_token=""
    )
    assert llama.metadata["tokenizer.chat_template"] == safe_template(CONTROL_TOKENS)
    for turns in map(composed, CONVERSATIONS):
        ids = llama.tokenize(formatter(messages=turns).prompt.encode(), add_bos=True, special=True)
        rendered = tokenizer.apply_chat_template(
            turns, chat_template=safe_template(CONTROL_TOKENS), add_generation_prompt=True, return_dict=False
        )
        assert ids == rendered
        assert ids == encode_prompt(tokenizer, disarmed(turns), chat=True) or begins_with_line_break(turns)


def test_documents_are_the_same_tokens(llama: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    for text in toy_texts():
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer.encode(text)


def test_logits_are_those_of_torch(llama: Any, trained: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Up to the rounding of fp32 sums in another order: logits of about 10, of which 1e-3 is a ten-thousandth."""
    for turns in CONVERSATIONS[:6]:
        ids = encode_prompt(tokenizer, turns, chat=True)
        llama.reset()
        llama.eval(ids)
        with torch.no_grad():
            ours = trained(torch.tensor([ids])).logits[0].numpy()
        assert np.abs(llama.scores[: len(ids)] - ours).max() < 1e-3


def test_greedy_answers_are_the_same(llama: Any, trained: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}], chat=True) for text in ANSWERS]
    ours = generate(trained, tokenizer, prompts, 80)
    assert [answer.text for answer in ours] == list(ANSWERS.values())
    for prompt, answer in zip(prompts, ours, strict=True):
        said = llama.create_completion(prompt, max_tokens=80, temperature=0.0, repeat_penalty=1.0)["choices"][0]
        assert (said["text"], said["finish_reason"]) == (answer.text, "stop")


def test_the_chat_of_llama_cpp_answers_by_the_files_own_template(llama: Any) -> None:
    messages = [{"role": "user", "content": "小明养了什么？"}]
    said = llama.create_chat_completion(messages, max_tokens=80, temperature=0.0, repeat_penalty=1.0)
    assert said["choices"][0]["message"]["content"] == ANSWERS["小明养了什么？"]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_smaller_types_load_and_answer(
    trained: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, dtype: str
) -> None:
    folder = export(save(tmp_path / "sft", trained, tokenizer), "gguf", tmp_path / "out", "--dtype", dtype)
    llama = llama_cpp.Llama(str(folder / f"sft-{dtype}.gguf"), n_ctx=512, n_threads=1, verbose=False)
    for question, answer in ANSWERS.items():
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": question}], chat=True)
        said = llama.create_completion(prompt, max_tokens=80, temperature=0.0, repeat_penalty=1.0)["choices"][0]
        assert said["text"] == answer
