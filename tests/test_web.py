"""The web page's pieces without a browser: every word in both languages, every text as text, settings, passwords."""

import dataclasses
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from conftest import ROOT, MakeModel
from scripted_server import HOSTILE, KEY, ScriptedServer
from serving import ask, save, wait_for
from transformers import PreTrainedTokenizerBase
from web_site import Site

pytest.importorskip("gradio", reason="gradio is not installed")

import gradio as gr
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

import mini_qwen_web
from mini_qwen.answer_streams import AnswerStream
from mini_qwen.backends import Settings
from mini_qwen.controls import clean, read_settings
from mini_qwen.page_sessions import Exchange, PageSession, PageSessions
from mini_qwen.ratings import Rating
from mini_qwen.remote import RemoteBackend, read_address
from mini_qwen.sampling import Sampling
from mini_qwen.votes import read_votes
from mini_qwen.web import PASSWORD_VARIABLE, PageGuard, build_page, read_password
from mini_qwen.web_arena import ArenaTab
from mini_qwen.web_chat import ChatTab
from mini_qwen.web_html import show_answer, show_conversation, show_scores
from mini_qwen.web_texts import CHINESE, ENGLISH, Texts, choose_texts

SETTINGS = Settings(Sampling(), 50, 3)


def answered(scripted: ScriptedServer, model: str, question: str = "x", raw: bool = False) -> AnswerStream:
    backend = RemoteBackend(read_address(f"{scripted.url}#{model}"), None, 5)
    stream = AnswerStream(backend, ask(question), SETTINGS, raw, threading.Event())
    wait_for(lambda: stream.done, 10)
    return stream


class Reader(HTMLParser):
    """The text of a page, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_word_is_there_in_chinese() -> None:
    same = {
        field.name
        for field in dataclasses.fields(Texts)
        if getattr(ENGLISH, field.name) == getattr(CHINESE, field.name)
    }
    assert same == {"top_p", "waiting"}
    assert len(ENGLISH.columns) == len(CHINESE.columns)


@pytest.mark.parametrize("texts", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_sentences_take_their_values(texts: Texts) -> None:
    assert "1,234" in texts.rate.format(tokens=1234, rate=5.67, seconds=8.9, seed=42) and "5.7" in texts.rate.format(
        tokens=1, rate=5.67, seconds=8.9, seed=42
    )
    for sentence, key in [
        ("failed", "error"),
        ("voted", "verdict"),
        ("not_kept", "error"),
        ("broken_lines", "number"),
    ]:
        assert "VALUE" in getattr(texts, sentence).format(**{key: "VALUE"})
    assert "C" in texts.candidate.format(letter="C") and "C" in texts.better.format(letter="C")


def test_the_language_is_the_one_that_is_asked_for_or_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    assert choose_texts("auto") is ENGLISH and choose_texts("zh") is CHINESE
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert choose_texts("auto") is CHINESE and choose_texts("en") is ENGLISH
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert choose_texts("auto") is ENGLISH


@pytest.mark.parametrize("raw", [False, True])
def test_whatever_is_said_is_text(scripted: ScriptedServer, raw: bool) -> None:
    stream = answered(scripted, "hostile", HOSTILE, raw)
    page = Reader(show_conversation([Exchange(HOSTILE, stream)], True, ENGLISH))
    assert page.text.count(HOSTILE) == 2
    assert page.tags <= {"div", "span"}
    column = Reader(show_answer(HOSTILE, stream, False, ENGLISH))
    assert column.text.count(HOSTILE) == 2 and column.tags == {"div"}
    table = Reader(show_scores([Rating(HOSTILE, 1000, (900, 1100), 12, 3)], 0, ENGLISH))
    assert HOSTILE in table.text and table.tags == {"table", "tr", "th", "td", "div"}


def test_what_is_hidden_tells_neither_speed_nor_failure(scripted: ScriptedServer) -> None:
    failed, well = answered(scripted, "crash"), answered(scripted, "echo")
    hidden = show_answer("Model A", failed, True, ENGLISH) + show_answer("Model B", well, True, ENGLISH)
    assert "crash" not in hidden and "127.0.0.1" not in hidden and "tokens/s" not in hidden
    assert ENGLISH.failed_hidden in hidden and "You said: x" in hidden
    open_ = show_answer("A", failed, False, ENGLISH) + show_answer("B", well, False, ENGLISH)
    assert "500" in open_ and "127.0.0.1" in open_ and "tokens/s" in open_


def test_why_an_answer_ended_stands_below_it(scripted: ScriptedServer) -> None:
    whole, cut = answered(scripted, "echo"), answered(scripted, "echo", "x" * 100)
    assert ENGLISH.length not in show_answer("A", whole, False, ENGLISH)
    assert ENGLISH.length in show_answer("A", cut, False, ENGLISH)
    assert CHINESE.length in show_conversation([Exchange("x", cut)], False, CHINESE)


def test_settings_are_those_of_the_sliders() -> None:
    assert read_settings(0.5, 0.9, 7, 1.2, 30, 4) == Settings(Sampling(0.5, 0.9, 7, 1.2), 30, 4)
    drawn = {read_settings(0.5, 0.9, 0, 1, 30, seed).seed for seed in [-1, None] * 5}
    assert len(drawn) == 10 and min(drawn) >= 0
    for wrong in [(-1, 1, 0, 1, 30, 0), (1, 0, 0, 1, 30, 0), (1, 1, 0, 1, 0, 0), (None, 1, 0, 1, 30, 0)]:
        with pytest.raises(gr.Error):
            read_settings(*wrong)


def test_half_a_pair_of_characters_is_no_text() -> None:
    assert clean("a\ud83db🙂") == "a?b🙂"
    assert clean(None) == ""


def test_other_machines_need_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1"):
        assert read_password(host, None) is None
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org", ""):
        with pytest.raises(SystemExit, match="needs a password"):
            read_password(host, None)
        assert read_password(host, "secret") == "secret"
    monkeypatch.setenv(PASSWORD_VARIABLE, "other")
    assert read_password("0.0.0.0", None) == "other"


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:7860", 200), ("localhost", 200), ("[::1]:7860", 200), ("evil.example:7860", 403), ("", 403)],
)
def test_without_a_password_only_names_of_this_machine_lead_to_the_page(host: str, status: int) -> None:
    for local in (True, False):
        answer = TestClient(PageGuard(PlainTextResponse("page"), local)).get("/", headers={"Host": host})
        assert answer.status_code == (status if local else 200)
        assert ("frame-ancestors 'self'" in answer.headers.get("Content-Security-Policy", "")) is answer.is_success


def test_the_page_keeps_keys_and_votes_to_itself(scripted: ScriptedServer, tmp_path: Path) -> None:
    """What is sent to every browser that opens it."""
    backends = [RemoteBackend(read_address(f"{scripted.url}#{model}"), KEY, 5) for model in ("echo", "cut")]
    page = build_page(backends, [], tmp_path / "secret-place.jsonl", ENGLISH, 2)
    sent = str(page.get_config_file())
    assert "echo (127.0.0.1" in sent
    assert KEY not in sent and "secret-place" not in sent
    assert not page.analytics_enabled
    assert page.get_api_info() == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_one_model_has_no_arena(scripted: ScriptedServer, tmp_path: Path) -> None:
    backend = RemoteBackend(read_address(f"{scripted.url}#echo"), None, 5)
    sent = str(build_page([backend], [], tmp_path / "votes.jsonl", CHINESE, 2).get_config_file())
    assert CHINESE.needs_two in sent and "arena-ask" not in sent


def test_a_port_that_is_taken_is_named(scripted: ScriptedServer, tmp_path: Path) -> None:
    argv = [scripted.url, "--port", str(scripted.server_port), "--votes", str(tmp_path / "votes.jsonl")]
    with pytest.raises(SystemExit, match=rf"127\.0\.0\.1:{scripted.server_port}.*--port") as refused:
        mini_qwen_web.main(argv)
    assert "\n" not in str(refused.value)


def test_the_documents_command_for_votes_can_be_given_after_the_demo() -> None:
    """Its recipe is of a model that the demo has made, and its output_dir is not the demo's own."""
    text = (ROOT / "docs/web.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("bash run.sh dpo")]
    words = line.split()[3:]
    options = dict(zip(words[::2], words[1::2], strict=True))
    recipe = yaml.safe_load((ROOT / options["--config"]).read_text(encoding="utf-8"))
    assert recipe["checkpoint"] == "demo_results/sft" and recipe["output_dir"] != options["--output_dir"]
    assert f"--output_file {options['--train_files']}" in text


SLIDERS = (0.7, 1, 0, 1, 40, 0)
REQUEST: Any = SimpleNamespace(session_hash="one")


def arena_of(scripted: ScriptedServer, votes: Path, *models: str) -> ArenaTab:
    backends = [RemoteBackend(read_address(f"{scripted.url}#{model}"), None, 5) for model in models]
    with gr.Blocks():
        return ArenaTab(backends, [], ENGLISH, PageSessions(), votes, {})


def test_clicks_at_the_same_time_are_one_question(scripted: ScriptedServer, tmp_path: Path) -> None:
    backend = RemoteBackend(read_address(f"{scripted.url}#endless"), None, 5)
    with gr.Blocks():
        chat = ChatTab([backend], [], ENGLISH, PageSessions(), {})
    arena = arena_of(scripted, tmp_path / "votes.jsonl", "endless", "silent")
    asking = [chat.send(REQUEST, "q", backend.name, "", False, *SLIDERS) for _ in range(4)]
    asking += [arena.ask(REQUEST, "q", "", True, *SLIDERS) for _ in range(4)]
    barrier = threading.Barrier(len(asking))

    def click(one: Iterator[Any]) -> None:
        barrier.wait(10)
        next(one)

    with ThreadPoolExecutor(len(asking)) as pool:
        list(pool.map(click, asking))
    wait_for(lambda: len(scripted.requests) >= 3, 10)
    for one in asking:
        one.close()
    assert len(chat.sessions.of("one").exchanges) == 1
    assert len(scripted.requests) == 3


def test_two_clicks_are_one_vote(scripted: ScriptedServer, tmp_path: Path) -> None:
    arena = arena_of(scripted, tmp_path / "votes.jsonl", "echo", "hostile")
    for number in range(1, 6):
        list(arena.ask(REQUEST, "q", "", True, *SLIDERS))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda button: arena.voting(button)(REQUEST), [0, 0, 1, 2]))
        assert len(read_votes(arena.votes)[0]) == number


def test_before_the_answers_have_ended_there_is_no_vote_and_no_second_question(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    arena = arena_of(scripted, tmp_path / "votes.jsonl", "echo", "endless")
    asking = arena.ask(REQUEST, "q", "", True, *SLIDERS)
    next(asking)
    endless = next(one for one in arena.sessions.of("one").round.streams if one.name.startswith("endless"))
    wait_for(lambda: endless.text, 5)
    arena.voting(0)(REQUEST)
    assert len(list(arena.ask(REQUEST, "another", "", True, *SLIDERS))) == 1
    asking.close()  # as Gradio does when the page is closed
    assert scripted.hung_up.wait(5)
    assert read_votes(arena.votes) == ([], 0)
    assert arena.sessions.of("one").round.prompt == "q"


def test_halves_of_characters_from_a_server_harm_no_other_column_and_no_vote(
    scripted: ScriptedServer, tmp_path: Path
) -> None:
    """No JSON of the page and no file of votes can hold them."""
    arena = arena_of(scripted, tmp_path / "votes.jsonl", "halves", "mangled", "echo")
    for shown in arena.ask(REQUEST, "q", "", False, *SLIDERS):
        str(shown).encode()
        json.dumps(shown, ensure_ascii=False, default=str).encode()
    for column, words in zip(shown, ("hi 🙂 there lone", "half a ", "You said: q"), strict=False):
        assert words in column
    arena.voting(0)(REQUEST)
    (vote,), num_broken = read_votes(arena.votes)
    assert vote.answers[0].text == "hi 🙂 there lone" and not num_broken
    session = PageSession([Exchange("q", answered(scripted, "halves"))])
    assert session.turns("")[1]["content"] == "hi 🙂 there lone"


def test_a_count_of_tokens_that_is_none_harms_no_column(scripted: ScriptedServer) -> None:
    for count in ('"5"', "1" + 400 * "0"):
        assert "2 tokens" in show_answer("A", answered(scripted, "counting", count), False, ENGLISH)


def test_ctrl_c_in_the_midst_of_an_answer_ends_the_program_at_once(
    tmp_path: Path, tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """With a checkpoint that goes on for as long as it may, and a page that stays open."""
    save(tmp_path / "sft", tiny_model(stage="sft", max_position_embeddings=8192), tokenizer)
    site = Site(tmp_path / "web", ["sft"], "--language", "en")
    try:
        site.ready()
        with httpx.Client(base_url=site.url, timeout=60) as client:
            config = client.get("/config").json()
            (button,) = (part["id"] for part in config["components"] if part["props"].get("elem_id") == "chat-send")
            (send,) = (one["id"] for one in config["dependencies"] if [button, "click"] in one["targets"])
            asked = {"data": ["Anna", "sft", "", False, *SLIDERS[:4], 8000, 0], "fn_index": send, "session_hash": "s"}
            client.post("/gradio_api/queue/join", json=asked).raise_for_status()
            with (
                client.stream("GET", "/gradio_api/heartbeat/s"),
                client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "s"}) as events,
            ):
                lines = (line for line in events.iter_lines() if "process_generating" in line)
                for _ in range(3):
                    next(lines)
                started = time.monotonic()
                site.process.send_signal(signal.SIGINT)
                assert site.process.wait(60) == 0, site.said
                assert time.monotonic() - started < 4
        assert "Traceback" not in site.said and "terminate" not in site.said
    finally:
        site.end()


def test_a_vote_that_cannot_be_kept_can_be_cast_again(scripted: ScriptedServer, tmp_path: Path) -> None:
    arena = arena_of(scripted, tmp_path / "votes.jsonl", "echo", "hostile")
    list(arena.ask(REQUEST, "q", "", True, *SLIDERS))
    arena.votes.mkdir()
    shown = arena.voting(0)(REQUEST)
    assert "could not be kept" in shown[-2] and arena.sessions.of("one").round.hidden
    arena.votes.rmdir()
    assert "The vote is kept" in arena.voting(0)(REQUEST)[-2]
    assert len(read_votes(arena.votes)[0]) == 1
