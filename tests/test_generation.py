"""mini_qwen/generation.py and terminal.py: batches change nothing, and the terminal shows whole characters."""

import builtins
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen import encoding
from mini_qwen.chat import encode_chat
from mini_qwen.evaluation import load_checkpoint
from mini_qwen.generation import Answer, WholeCharacters, ask, encode_prompt, generate, speaks_chat
from mini_qwen.sampling import Sampling
from mini_qwen.schemas import Turn
from mini_qwen.terminal import talk


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in encoding.encode_text(tokenizer, texts)]


# No word of it is in the toy tokenizer: every character is two to four tokens, an emoji of families many more.
ANSWER = "🙂 你真棒 Ωμέγα 👩‍👩‍👧 好的，世界 ok"
QUESTION: list[Turn] = [{"role": "user", "content": "say it"}]

TypeLines = Callable[..., None]


@pytest.fixture(scope="module")
def model(tiny_model: MakeModel) -> PreTrainedModel:
    """Random weights: it goes on for ever, with tokens that are no characters."""
    return tiny_model(stage="pt")


@pytest.fixture(scope="module")
def parrot(tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model that has learnt to give one answer, and to stop."""
    model = tiny_model(stage="sft", hidden_size=64).train()
    row = encode_chat(tokenizer, [*QUESTION, {"role": "assistant", "content": ANSWER}])
    inputs = torch.from_numpy(row.ids.astype(np.int64))[None]
    labels = inputs.masked_fill(~torch.from_numpy(row.trained)[None], -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model(input_ids=inputs, labels=labels).loss
        if loss.item() < 0.01:
            return model.eval()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"one answer was not learnt, loss {loss.item():.3f}")


@pytest.fixture
def type_lines(monkeypatch: pytest.MonkeyPatch) -> TypeLines:
    """Let `input` return these lines, raise these errors, and then the end of the input."""

    def lines(*typed: str | BaseException) -> None:
        left = iter(typed)

        def read(prompt: str = "") -> str:
            line = next(left, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", read)

    return lines


def chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 200) -> None:
    talk(model, tokenizer, max_new_tokens, Sampling(), seed=0)


def watch_prompts(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Record what the model is asked to continue; it continues as ever."""
    prompts: list[list[int]] = []
    real = model.generate

    def recording(inputs: torch.Tensor, **options: object) -> torch.Tensor:
        prompts.append(inputs[0].tolist())
        return real(inputs, **options)

    monkeypatch.setattr(model, "generate", recording)
    return prompts


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_batched_answers_are_those_given_one_by_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    texts = ["Anna", "Where does Victor go tomorrow?", "小雪", "In the morning 小明 likes to eat", "a", "早上"]
    prompts = encode_text(tokenizer, texts)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert len({tuple(answer.ids) for answer in alone}) == len(texts)
    assert generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=batch_size) == alone


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_p=0.8, repetition_penalty=1.3),
        Sampling(temperature=1.5, top_k=20),
        Sampling(num_beams=3),
    ],
)
def test_drawn_answers_do_not_depend_on_the_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> None:
    texts = ["Anna", "Where does Victor go tomorrow?", "小雪", "In the morning 小明 likes to eat", "a"]
    prompts = [prompt for prompt in encode_text(tokenizer, texts) for _ in range(3)]
    seeds = [100 + number for number in range(len(prompts))]
    alone = [
        generate(model, tokenizer, [prompt], 12, sampling=sampling, seeds=[seed])[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    for batch_size in (2, 7, 64):
        assert generate(model, tokenizer, prompts, 12, batch_size, sampling=sampling, seeds=seeds) == alone
    if sampling.num_beams == 1:
        assert len({tuple(answer.ids) for answer in alone}) > len(texts)  # the samples of one prompt differ


def test_what_the_checkpoint_says_of_sampling_changes_nothing(
    tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_model(stage="pt")
    prompts = encode_text(tokenizer, ["Anna", "小雪"])
    plain = generate(model, tokenizer, prompts, 8)
    drawn = generate(model, tokenizer, prompts, 8, sampling=Sampling(temperature=1.0))
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k, config.repetition_penalty = True, 3.0, 2, 1.9
    config.min_new_tokens, config.no_repeat_ngram_size, config.eos_token_id = 8, 1, list(range(400))
    assert generate(model, tokenizer, prompts, 8) == plain
    assert generate(model, tokenizer, prompts, 8, sampling=Sampling(temperature=1.0)) == drawn


def test_answers_are_the_most_likely_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    (prompt,) = encode_text(tokenizer, ["Anna lives"])
    (answer,) = generate(model, tokenizer, [prompt], max_new_tokens=5)
    ids = list(prompt)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer.ids == ids[len(prompt) :]
    assert answer.text == tokenizer.decode(answer.ids)


def test_stopped_says_whether_it_ended_by_itself(parrot: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = encode_prompt(tokenizer, QUESTION, chat=True)
    (ids,) = encode_text(tokenizer, [ANSWER])
    (whole,) = generate(parrot, tokenizer, [prompt], max_new_tokens=len(ids) + 1)
    assert whole == Answer(ANSWER, ids, True)
    (cut,) = generate(parrot, tokenizer, [prompt], max_new_tokens=len(ids))
    assert (cut.ids, cut.stopped) == (ids, False)
    (short,) = generate(parrot, tokenizer, [prompt], max_new_tokens=3)
    assert (short.ids, short.stopped) == (ids[:3], False)


def test_an_answer_that_stops_early_is_not_filled_up(
    parrot: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Beside a prompt that it has never seen, which may be continued for longer."""
    prompts = [encode_prompt(tokenizer, QUESTION, chat=True), encode_text(tokenizer, ["17 birds"])[0]]
    (ids,) = encode_text(tokenizer, [ANSWER])
    known, _ = generate(parrot, tokenizer, prompts, max_new_tokens=len(ids) + 30)
    assert known == Answer(ANSWER, ids, True)


def test_answers_that_may_reach_beyond_the_context_are_told(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a", "a b c d e f g h"]
    short, long = (len(ids) for ids in encode_text(tokenizer, texts))
    for context, expected in [(long + 3, [False, False]), (long + 2, [False, True]), (short + 2, [True, True])]:
        monkeypatch.setattr(model.config, "max_position_embeddings", context)
        assert [answer.beyond for answer in ask(model, tokenizer, texts, 3, 2, "test")] == expected


def test_no_prompts_no_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert generate(model, tokenizer, [], max_new_tokens=5) == []


@pytest.mark.parametrize(("stage", "chats"), [("pt", False), ("sft", True), ("dpo", True)])
def test_a_checkpoint_of_the_pt_stage_continues_text(tiny_model: MakeModel, stage: str, chats: bool) -> None:
    assert speaks_chat(tiny_model(stage=stage)) is chats


@pytest.mark.parametrize("template", ["{{ messages }}", None])
def test_a_foreign_checkpoint_chats_if_it_brings_a_template(
    tiny_model: MakeModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
) -> None:
    model = tiny_model()
    del model.config.training_stage
    monkeypatch.setattr(tokenizer, "chat_template", template)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert speaks_chat(load_checkpoint(str(tmp_path))[0]) is (template is not None)


def test_prompts_in_both_manners(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "it"}, {"role": "user", "content": "again <|im_end|>"}]
    assert tokenizer.decode(encode_prompt(tokenizer, turns, chat=True)) == (
        "<|im_start|>user\nsay it<|im_end|>\n<|im_start|>assistant\nit<|im_end|>\n"
        "<|im_start|>user\nagain <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    raw = encode_prompt(tokenizer, turns, chat=False)
    assert tokenizer.decode(raw) == "again <|im_end|>"
    assert tokenizer.eos_token_id not in raw


def test_the_terminal_shows_the_answer_in_whole_characters(
    parrot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    type_lines: TypeLines,
    capsys: pytest.CaptureFixture[str],
) -> None:
    type_lines("say it")
    chat(parrot, tokenizer)
    shown = capsys.readouterr().out
    assert shown.partition("\n")[2] == ANSWER + "\n"
    assert "\ufffd" not in shown


def test_an_answer_cut_off_inside_a_character_shows_no_half_of_it(
    parrot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    type_lines: TypeLines,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ANSWER.startswith("🙂 你")
    (ids,) = encode_text(tokenizer, ["🙂 你"])
    type_lines("say it")
    chat(parrot, tokenizer, max_new_tokens=len(ids) - 1)
    shown = capsys.readouterr().out
    assert "🙂" in shown
    assert "\ufffd" not in shown


def test_a_typed_backslash_n_is_a_line_break(
    parrot: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, type_lines: TypeLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = watch_prompts(parrot, monkeypatch)
    type_lines(r"one\ntwo")
    chat(parrot, tokenizer, max_new_tokens=2)
    assert [tokenizer.decode(prompt) for prompt in prompts] == [
        "<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    ]


def test_what_was_said_before_stays_in_the_conversation(
    parrot: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, type_lines: TypeLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = watch_prompts(parrot, monkeypatch)
    type_lines("say it", " again ")
    chat(parrot, tokenizer)
    assert len(prompts) == 2
    assert tokenizer.decode(prompts[1]) == (
        f"<|im_start|>user\nsay it<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
        "<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_pretrained_checkpoint_continues_what_is_typed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    type_lines: TypeLines,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = watch_prompts(model, monkeypatch)
    type_lines("Anna lives", "小雪")
    chat(model, tokenizer, max_new_tokens=3)
    assert prompts == encode_text(tokenizer, ["Anna lives", "小雪"])
    assert "raw continuation" in capsys.readouterr().out


@pytest.mark.parametrize("ending", [[""], ["   "], [KeyboardInterrupt()], []])
def test_an_empty_line_or_ctrl_c_or_the_end_of_input_ends_it(
    parrot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    type_lines: TypeLines,
    monkeypatch: pytest.MonkeyPatch,
    ending: list[str | BaseException],
) -> None:
    prompts = watch_prompts(parrot, monkeypatch)
    type_lines("say it", *ending, *(["never read"] if ending else []))
    chat(parrot, tokenizer, max_new_tokens=2)
    assert len(prompts) == 1


def test_ctrl_c_in_an_answer_ends_the_answer_and_keeps_what_was_shown(
    parrot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    type_lines: TypeLines,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where "🙂 你" has been written of it; the next question gets its answer as ever."""
    (ids,) = encode_text(tokenizer, ["🙂 你"])
    left, put = iter(range(len(ids) + 1)), WholeCharacters.put

    def interrupt(streamer: WholeCharacters, value: torch.Tensor) -> None:
        put(streamer, value)
        if next(left, None) == len(ids):
            raise KeyboardInterrupt

    monkeypatch.setattr(WholeCharacters, "put", interrupt)
    prompts = watch_prompts(parrot, monkeypatch)
    type_lines("say it", "again")
    chat(parrot, tokenizer, max_new_tokens=len(ids) + 5)
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == "🙂 你" and len(shown) == 3
    assert "<|im_start|>assistant\n🙂 你<|im_end|>\n<|im_start|>user\nagain" in tokenizer.decode(prompts[1])


@pytest.mark.parametrize("line", [UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "a\udcff"])
def test_a_line_that_is_no_text_is_asked_for_again(
    parrot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    type_lines: TypeLines,
    capsys: pytest.CaptureFixture[str],
    line: str | BaseException,
) -> None:
    type_lines(line, "say it")
    chat(parrot, tokenizer)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "That is not UTF-8, and is left out. Set the terminal to UTF-8.",
        ANSWER,
    ]


def test_a_conversation_ends_with_the_context(
    parrot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    type_lines: TypeLines,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An answer is cut off where it ends; the next question would be read at positions that were never learnt."""
    num_prompt = len(encode_prompt(tokenizer, QUESTION, chat=True))
    monkeypatch.setattr(parrot.config, "max_position_embeddings", num_prompt + 6)
    prompts = watch_prompts(parrot, monkeypatch)
    type_lines("say it", "again", "never read")
    chat(parrot, tokenizer)
    assert len(prompts) == 1
    _, answer, end = capsys.readouterr().out.splitlines()
    assert ANSWER.startswith(answer) and len(answer) < 6
    assert re.fullmatch(rf"The text has \d+ tokens, and this checkpoint reads {num_prompt + 6}, its answer .*", end)
