"""mini_qwen/preview.py: what is marked is what is trained."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeBlocks, MakeModel
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, Trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from mini_qwen.blocks import BlockCollator
from mini_qwen.chat import encode_chat
from mini_qwen.packing import fit
from mini_qwen.preview import mark_trained, print_first_row
from mini_qwen.schemas import Turn
from mini_qwen.training import PTConfig

MARKED = re.compile("\033\\[32m⟦(.*?)⟧\033\\[0m", re.DOTALL)
TURNS: list[Turn] = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "🙂 小河边"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "At home."},
]


def unmarked(text: str) -> str:
    return MARKED.sub(r"\1", text)


def test_marks_are_around_exactly_the_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    row = encode_chat(tokenizer, TURNS)
    text = mark_trained(tokenizer, row.ids.tolist(), row.trained.tolist())
    assert MARKED.findall(text) == ["🙂 小河边<|im_end|>", "At home.<|im_end|>"]
    assert unmarked(text) == tokenizer.decode(row.ids)


@given(tokens=st.lists(st.tuples(st.integers(ord("!") - 33, ord("~") - 33), st.booleans()), max_size=12))
def test_every_trained_token_is_inside_marks_and_no_other(
    tokenizer: PreTrainedTokenizerBase, tokens: list[tuple[int, bool]]
) -> None:
    """On tokens of one printable letter each, whose ids of a byte-level alphabet are 0 to 93."""
    ids, trained = [token for token, _ in tokens], [flag for _, flag in tokens]
    text = mark_trained(tokenizer, ids, trained)
    inside = "".join(MARKED.findall(text))
    assert inside == tokenizer.decode([token for token, flag in tokens if flag])
    assert MARKED.sub("", text) == tokenizer.decode([token for token, flag in tokens if not flag])
    assert len(unmarked(text)) == len(ids)


@pytest.fixture
def make_trainer(tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Any:
    def make(rows: Any, collator: Any) -> Trainer:
        args = PTConfig(output_dir=str(tmp_path), report_to=[])
        return Trainer(
            model=tiny_model(), args=args, train_dataset=rows, processing_class=tokenizer, data_collator=collator
        )

    return make


@pytest.mark.parametrize("flatten", [False, True])
def test_first_row_of_conversations(
    make_trainer: Any,
    make_blocks: MakeBlocks,
    tokenizer: PreTrainedTokenizerBase,
    capsys: pytest.CaptureFixture[str],
    flatten: bool,
) -> None:
    row = encode_chat(tokenizer, TURNS)
    blocks = make_blocks([row.ids], 200, partial(fit, fill=False), [row.trained])
    print_first_row(make_trainer(blocks.as_dataset(), BlockCollator(tokenizer.pad_token_id, flatten)))
    shown = capsys.readouterr().out
    assert MARKED.findall(shown) == ["🙂 小河边<|im_end|>", "At home.<|im_end|>"]
    assert unmarked(shown).endswith(tokenizer.decode(row.ids) + "\n")
    assert f"{sum(row.trained)} of its first {len(row.ids)} tokens" in shown


def test_first_row_of_documents_leaves_out_what_is_no_target(
    make_trainer: Any, make_blocks: MakeBlocks, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in ("abc", "xyz")]
    blocks = make_blocks(documents, 8)
    print_first_row(make_trainer(blocks, BlockCollator(tokenizer.pad_token_id)))
    shown = capsys.readouterr().out
    assert unmarked(shown).splitlines()[-1] == "abc<|im_end|>xyz<|im_end|>"
    assert [part[-10:] for part in MARKED.findall(shown)] == ["<|im_end|>"] * 2
    assert all(not part.startswith(("a", "x")) for part in MARKED.findall(shown))


def test_first_row_of_pairs_is_the_chosen_side(
    make_trainer: Any, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = encode_chat(tokenizer, TURNS[:1], add_generation_prompt=True).ids.tolist()
    chosen, rejected = ([*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in ("a good one", "bad"))
    pair = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    print_first_row(make_trainer([pair], DataCollatorForPreference(tokenizer.pad_token_id)))
    shown = capsys.readouterr().out
    assert MARKED.findall(shown) == ["a good one<|im_end|>"]
    assert "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n" in shown


def test_a_long_row_is_cut(
    make_trainer: Any, make_blocks: MakeBlocks, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = make_blocks([tokenizer("abc" * 100)["input_ids"]], 250)
    trainer = make_trainer(blocks, BlockCollator(tokenizer.pad_token_id))
    print_first_row(trainer, max_tokens=10)
    shown = capsys.readouterr().out
    assert "9 of its first 10 tokens" in shown
    ids = blocks[0]["input_ids"][:10].tolist()
    assert unmarked(shown).splitlines()[-1] == tokenizer.decode(ids)
