"""mini_qwen/engine.py and reply.py: an answer is that of the chat, whoever else asks, and no slot is lost."""

import asyncio
import builtins
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from hypothesis import given
from hypothesis import strategies as st
from serving import BREAKING, COUNT, EMOJI, LEARNT, ask, break_at, save, teach, wait_for
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.engine import Busy, Engine
from mini_qwen.generation import WholeCharacters, generate
from mini_qwen.reply import Reply, StopStrings
from mini_qwen.sampling import Sampling
from mini_qwen.terminal import talk

GREEDY = Sampling()
HOT = Sampling(temperature=1.5, top_p=0.9, repetition_penalty=1.1)
LONG = 8000  # tokens, far more than a test waits for; the random model goes on for ever behind "Anna"
DEADLINE = 120.0  # seconds until an answer of a test fails, so that one that never ends does not hang it


@pytest.fixture(scope="module")
def parrot(tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return teach(tiny_model(stage="sft", hidden_size=64, max_position_embeddings=512), tokenizer, LEARNT)


MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(tmp_path: Path, tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[MakeEngine]:
    """Engines of a checkpoint; without one, of a random model that goes on for ever. They are closed with the test."""
    engines: list[Engine] = []
    replies: list[Reply] = []
    threads = torch.get_num_threads()

    class Remembering(Engine):
        def answer(self, *args: Any, **options: Any) -> Reply:
            replies.append(super().answer(*args, **options))
            return replies[-1]

    def give_up() -> None:
        for reply in replies:
            reply.end(None, error=f"not within {DEADLINE:g} seconds")

    def make(model: PreTrainedModel | None = None, stage: str = "sft", context: int = 8192, **options: Any) -> Engine:
        model = model or tiny_model(stage=stage, max_position_embeddings=context)
        engines.append(Remembering(save(tmp_path / f"model{len(engines)}", model, tokenizer), **options))
        return engines[-1]

    alarm = threading.Timer(DEADLINE, give_up)
    alarm.start()
    yield make
    alarm.cancel()
    assert all([engine.close(60) for engine in engines])
    torch.set_num_threads(threads)


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: Engine, **options: Any) -> str:
    """What the terminal shows when `say it again` is typed."""
    typed = iter(["say it again", ""])
    monkeypatch.setattr(builtins, "input", lambda _: next(typed))
    capsys.readouterr()
    talk(engine.model, engine.tokenizer, **options)
    return capsys.readouterr().out.partition("\n")[2].removesuffix("\n")


@pytest.mark.parametrize("stage", ["sft", "pt"])
@pytest.mark.parametrize("sampling", [GREEDY, HOT, Sampling(1.0, top_k=20)])
def test_an_answer_is_that_of_the_terminal(
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    sampling: Sampling,
) -> None:
    """Also beside others, and piece by piece."""
    engine = make_engine(stage=stage)
    shown = said(monkeypatch, capsys, engine, max_new_tokens=60, sampling=sampling, seed=7)
    assert len(shown) > 10
    assert engine.speaks_chat is (stage == "sft")
    prompt = engine.encode(ask("say it again")) if stage == "sft" else engine.encode_text("say it again")
    others = [engine.answer(engine.encode_text("Anna"), HOT, 60, seed) for seed in range(5)]
    reply = engine.answer(prompt, sampling, 60, 7)
    assert "".join(reply) == shown == reply.text
    assert (reply.finish, reply.num_tokens, reply.error) == ("length", 60, None)
    assert len({"".join(other) for other in others}) == 5


def test_answers_at_once_are_those_given_alone(make_engine: MakeEngine) -> None:
    engine = make_engine(parallel=8)
    settings = [GREEDY, HOT, Sampling(0.7, 0.8), Sampling(1.0, top_k=5, repetition_penalty=1.3)]
    jobs = [(text, settings[seed % 4], 20 + seed, seed) for seed in range(6) for text in ("Anna", "小雪 lives", "a b")]

    def work(job: tuple[str, Sampling, int, int]) -> tuple[str, int]:
        text, *rest = job
        reply = engine.answer(engine.encode(ask(text)), *rest)
        return "".join(reply), reply.num_tokens

    alone = [work(job) for job in jobs]
    assert len({text for text, _ in alone}) > 12
    order = random.Random(0).sample(range(len(jobs)), len(jobs))
    with ThreadPoolExecutor(8) as pool:
        together = dict(zip(order, pool.map(lambda at: work(jobs[at]), order), strict=True))
    assert [together[at] for at in range(len(jobs))] == alone


def test_whole_characters_only(make_engine: MakeEngine, parrot: PreTrainedModel) -> None:
    engine = make_engine(parrot)
    reply = engine.answer(engine.encode(ask("say it")), GREEDY, 200, 0)
    pieces = list(reply)
    assert "".join(pieces) == EMOJI
    assert len(pieces) > 10 and "\ufffd" not in "".join(pieces)
    assert reply.finish == "stop"
    assert reply.num_tokens == len(engine.encode_text(EMOJI)) + 1  # and the end token
    assert list(reply) == [EMOJI]  # from the beginning, for who comes late
    for length in range(1, 40):
        cut = engine.answer(engine.encode(ask("say it")), GREEDY, length, 0)
        assert EMOJI.startswith("".join(cut)) and cut.finish == "length"


@given(st.lists(st.integers(0, 255), max_size=40))
def test_any_bytes_come_as_they_decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """The first 256 tokens are the bytes; most sequences of them are no text."""
    shown: list[str] = []
    streamer = WholeCharacters(tokenizer, shown.append)
    streamer.put(torch.tensor([[5, 6, 7]]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    assert "".join(shown) == tokenizer.decode(ids).rstrip("\ufffd")
    assert streamer.num_tokens == len(ids)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_no_part_of_a_stop_string_is_shown(text: str, stop: list[str], data: st.DataObject) -> None:
    """Whatever pieces the text comes in: all that stands before the stop string that is complete first."""
    whole = text
    for end in range(len(text) + 1):
        found = [end - len(one) for one in stop if text[:end].endswith(one)]
        if found:
            whole = text[: min(found)]
            break
    stops, shown, rest = StopStrings(stop), "", text
    while rest and not stops.found:
        length = data.draw(st.integers(1, len(rest)))
        shown += stops.pass_on(rest[:length])
        rest = rest[length:]
        assert whole.startswith(shown)
    assert shown + stops.held == whole


def test_an_answer_ends_before_a_stop_string(make_engine: MakeEngine, parrot: PreTrainedModel) -> None:
    engine = make_engine(parrot)
    prompt = engine.encode(ask("count"))
    for stop, text in [
        (["three"], "one two "),
        (["\nsix", "five"], "one two three four "),
        (["e t"], "on"),
        (["one"], ""),
        (["seven!", "eight"], COUNT),
    ]:
        reply = engine.answer(prompt, GREEDY, 100, 0, stop)
        assert ("".join(reply), reply.finish) == (text, "stop")
        assert reply.num_tokens < len(engine.encode_text(COUNT)) + 1 or text == COUNT  # it computes no further
    cut = engine.answer(prompt, GREEDY, 2, 0, [COUNT])
    assert COUNT.startswith("".join(cut)) and cut.finish == "length"
    assert cut.text  # what was held back comes at the end


def test_full_and_free_again(make_engine: MakeEngine) -> None:
    engine = make_engine(parallel=2, waiting=2)
    prompt = engine.encode(ask("Anna"))
    replies = [engine.answer(prompt, GREEDY, LONG, 0) for _ in range(4)]
    with pytest.raises(Busy, match="2 answers are under way and 2 wait"):
        engine.answer(prompt, GREEDY, 1, 0)
    replies[3].cancel()  # one that waits
    replies[3].cancel()
    assert list(replies[3]) == [] and replies[3].finish == "cancelled"
    short = engine.answer(prompt, GREEDY, 1, 0)
    assert next(iter(replies[0]))
    assert replies[2].text == "" and not replies[2].ended
    replies[0].cancel()  # one that runs: the next in line takes its place
    assert replies[0].num_tokens < LONG
    assert next(iter(replies[2]))
    replies[2].cancel()
    assert "".join(short) and short.finish == "length"
    replies[1].cancel()
    wait_for(lambda: not engine.running and not engine.waiting, 20)
    assert [reply.finish for reply in replies] == ["cancelled"] * 4
    assert all(reply.num_tokens < LONG for reply in replies)


def test_those_who_wait_are_served_in_their_order(make_engine: MakeEngine) -> None:
    engine = make_engine(parallel=1)
    ended: list[int] = []
    prompt = engine.encode(ask("Anna"))
    first = engine.answer(prompt, GREEDY, LONG, 0)  # which keeps the others waiting until all are watched
    for number in range(6):
        reply = engine.answer(prompt, GREEDY, 8, 0)
        reply.watch(lambda number=number, reply=reply: ended.append(number) if reply.ended else None)
    first.cancel()
    wait_for(lambda: len(ended) == 6, 60)
    assert ended == sorted(ended)


def test_nobody_reads_and_no_slot_is_held(make_engine: MakeEngine) -> None:
    """Neither a reply that is never read, nor one whose client takes nothing."""
    pytest.importorskip("starlette")
    from mini_qwen.api_completions import Envelope
    from mini_qwen.api_responses import ReplyResponse

    engine = make_engine(parallel=1)
    prompt = engine.encode(ask("Anna"))
    unread = engine.answer(prompt, GREEDY, 30, 0)
    sent: list[dict[str, Any]] = []

    async def send_to_nobody() -> None:
        async def receive() -> dict[str, Any]:
            await asyncio.sleep(60)
            return {}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)
            await asyncio.sleep(60)

        reply = engine.answer(prompt, GREEDY, 30, 0)
        task = asyncio.create_task(ReplyResponse(reply, Envelope("m", True, 0), 3, True)({}, receive, send))
        await asyncio.to_thread(wait_for, lambda: reply.ended and not engine.running, 60)
        assert (reply.finish, reply.text) == ("length", unread.text)
        task.cancel()
        await task

    asyncio.run(send_to_nobody())
    assert len(sent) == 1


def test_a_failure_is_that_answer_s_alone(
    make_engine: MakeEngine, tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_model(stage="sft", max_position_embeddings=512)
    break_at(model, tokenizer, BREAKING)
    engine = make_engine(model, parallel=1)
    good, bad = engine.encode(ask("Anna")), engine.encode(ask(f"Anna {BREAKING}"))
    for sampling in (GREEDY, HOT):
        replies = [engine.answer(prompt, sampling, 10, 0) for prompt in (bad, good, bad, good)]
        for reply in replies[::2]:
            with pytest.raises(RuntimeError, match="logits are not finite"):
                list(reply)
            assert (reply.finish, reply.text) == (None, "")
        assert "".join(replies[1]) == "".join(replies[3]) != ""
    beams = engine.answer(good, Sampling(num_beams=2), 10, 0)  # cannot be streamed
    with pytest.raises(RuntimeError, match="ValueError"):
        list(beams)
    wait_for(lambda: not engine.running, 20)


@pytest.mark.parametrize("error", [RuntimeError("Event loop is closed"), SystemExit(1)])
def test_a_watcher_that_fails_costs_no_slot(make_engine: MakeEngine, error: BaseException) -> None:
    """Those who wait are taken on, and all is closed although the watchers of those that run and wait fail."""
    engine = make_engine(parallel=1)
    prompt = engine.encode(ask("Anna"))

    def fail() -> None:
        raise error

    watched, waiting = engine.answer(prompt, GREEDY, 8, 0), engine.answer(prompt, GREEDY, 8, 0)
    watched.watch(fail)
    assert "".join(waiting) and waiting.finish == "length"
    wait_for(lambda: not engine.running, 20)
    assert watched.ended
    assert "".join(engine.answer(prompt, GREEDY, 8, 0)) == waiting.text
    if isinstance(error, Exception):
        assert watched.text == waiting.text  # other readers of it miss nothing
        replies = [engine.answer(prompt, GREEDY, LONG, 0) for _ in range(3)]
        for reply in replies:
            reply.watch(fail)
        assert engine.close(20)
        assert [reply.finish for reply in replies] == ["cancelled"] * 3


@pytest.mark.parametrize(
    ("length", "tokens", "words"),
    [
        (0, 5, "empty"),
        (5, 0, "max_new_tokens is 0"),
        (500, 13, "500 tokens and its answer up to 13.*more than the 512"),
    ],
)
def test_what_does_not_fit_is_refused(make_engine: MakeEngine, length: int, tokens: int, words: str) -> None:
    engine = make_engine(context=512)
    with pytest.raises(ValueError, match=words):
        engine.answer([5] * length, GREEDY, tokens, 0)
    assert not engine.running
    assert "".join(engine.answer([5] * 500, GREEDY, 12, 0)) == generate(
        engine.model, engine.tokenizer, [[5] * 500], 12
    )[0].text.rstrip("\ufffd")


def test_closing_ends_all(make_engine: MakeEngine) -> None:
    engine = make_engine(parallel=2)
    replies = [engine.answer(engine.encode(ask("Anna")), GREEDY, LONG, 0) for _ in range(4)]
    next(iter(replies[0]))
    assert engine.close(20)
    assert [reply.finish for reply in replies] == ["cancelled"] * 4
    assert all(reply.num_tokens < LONG for reply in replies)
    assert not [thread for thread in threading.enumerate() if thread.name == "answer"]
    with pytest.raises(Busy, match="closed"):
        engine.answer([5], GREEDY, 1, 0)


def test_names_and_numbers(make_engine: MakeEngine) -> None:
    engine = make_engine(name="mine")
    assert (engine.name, engine.context) == ("mine", 8192)
    assert make_engine().name.endswith("model1")
    with pytest.raises(ValueError, match="parallel is 0"):
        make_engine(parallel=0)


def test_readers_of_one_reply_and_a_late_end() -> None:
    """Several threads may read one reply; what comes after its end changes nothing."""
    reply = Reply()
    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(lambda: "".join(reply)) for _ in range(3)]
        try:
            for number in range(200):
                reply.write(f"{number} ", number)
        finally:
            reply.end("length")  # or the readers would wait for ever
        reply.end("stop")
        reply.cancel()
        reply.add("late")
        texts = {reader.result(timeout=60) for reader in readers}
    assert texts == {"".join(f"{number} " for number in range(200))}
    assert reply.finish == "length"
