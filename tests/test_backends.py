"""backends, model_sources, answer_streams, page_sessions: what answers, how, and what is refused before."""

import threading
from pathlib import Path

import pytest
import torch
from conftest import MakeModel
from scripted_server import KEY, ScriptedServer
from serving import ask, save, wait_for
from transformers import PreTrainedTokenizerBase

pytest.importorskip("openai", reason="the openai client is not installed")

from mini_qwen.answer_streams import AnswerStream, ask_all, draw_order, follow
from mini_qwen.backends import Backend, LocalBackend, Settings
from mini_qwen.evaluation import load_checkpoint
from mini_qwen.generation import encode_prompt, generate
from mini_qwen.model_sources import KEYS_VARIABLE, open_backends, read_keys
from mini_qwen.page_sessions import MAX_SESSIONS, Exchange, PageSession, PageSessions, Round
from mini_qwen.remote import RemoteBackend, read_address
from mini_qwen.sampling import Sampling

DRAWN = Settings(Sampling(1.2, 0.9, 0, 1.1), 20, 3)


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """`pt` and `sft`, both untrained: they go on for as long as they may."""
    folder = tmp_path_factory.mktemp("backends")
    for stage in ("pt", "sft"):
        save(folder / stage, tiny_model(stage=stage, max_position_embeddings=2048), tokenizer)
    return folder


@pytest.fixture(scope="module")
def backends(folders: Path) -> dict[str, LocalBackend]:
    threads = torch.get_num_threads()
    opened = open_backends([str(folders / "pt"), str(folders / "sft")], [], parallel=2, timeout=5)
    torch.set_num_threads(threads)  # as the other tests had them
    return {Path(backend.name).name: backend for backend in opened if isinstance(backend, LocalBackend)}


@pytest.mark.parametrize(("stage", "raw"), [("pt", False), ("pt", True), ("sft", False), ("sft", True)])
def test_a_checkpoint_answers_as_in_the_terminal_and_the_same_again(
    folders: Path, backends: dict[str, LocalBackend], stage: str, raw: bool
) -> None:
    model, tokenizer = load_checkpoint(str(folders / stage))
    chat = stage == "sft" and not raw
    prompt = encode_prompt(tokenizer, ask("Where is 小明?"), chat)
    (expected,) = generate(model, tokenizer, [prompt], 20, sampling=DRAWN.sampling, seeds=[3])
    for _ in range(2):
        reply = backends[stage].answer(ask("Where is 小明?"), DRAWN, raw)
        assert "".join(reply) == expected.text.rstrip("\ufffd")
    assert backends[stage].speaks_chat is (stage == "sft")


def test_an_answer_ends_with_the_context_and_a_prompt_beyond_it_is_refused(backends: dict[str, LocalBackend]) -> None:
    backend = backends["sft"]
    question = ask("bread and apples " * 300)
    room = backend.engine.context - len(backend.engine.encode(question))
    assert 0 < room < 2000
    reply = backend.answer(question, Settings(Sampling(), 100_000, 0), False)
    wait_for(lambda: reply.ended, 60)
    assert (reply.finish, reply.num_tokens) == ("length", room)
    with pytest.raises(ValueError, match=r"2,048.*Clear the conversation"):
        backend.answer(ask("bread and apples " * 3000), DRAWN, False)


def test_one_failing_backend_leaves_the_others_going(
    backends: dict[str, LocalBackend], scripted: ScriptedServer
) -> None:
    too_long = ask("bread and apples " * 3000)
    remote = [RemoteBackend(read_address(f"{scripted.url}#{model}"), None, 5) for model in ("crash", "cut", "echo")]
    streams = ask_all([backends["sft"], *remote], too_long, Settings(Sampling(), 30, 0))
    for _ in follow(streams):
        pass
    full, crash, cut, echo = streams
    assert full.error and "2,048" in full.error
    assert crash.error and "500" in crash.error
    assert cut.error and "broke off" in cut.error and cut.text == "half an "
    assert echo.error is None and echo.text == "You said: bread and apples bre"[:30]


def test_following_shows_the_text_grow(scripted: ScriptedServer) -> None:
    (stream,) = ask_all([RemoteBackend(read_address(f"{scripted.url}#endless"), None, 5)], ask("x"), DRAWN)
    seen = []
    for _ in follow([stream]):
        seen.append(len(stream.text))
        if len(set(seen)) == 4:
            stream.cancel()
    assert sorted(seen) == seen
    assert (stream.done, stream.finish, stream.error) == (True, "cancelled", None)
    assert stream.rate > 0


def test_closing_what_follows_stops_all_of_them(backends: dict[str, LocalBackend], scripted: ScriptedServer) -> None:
    """As Gradio does when a page is closed."""
    both: list[Backend] = [backends["sft"], RemoteBackend(read_address(f"{scripted.url}#endless"), None, 5)]
    streams = ask_all(both, ask("x"), Settings(Sampling(), 2000, 0))
    following = follow(streams)
    while not all(stream.text for stream in streams):
        next(following)
    following.close()
    assert all(stream.finish == "cancelled" for stream in streams)
    assert scripted.hung_up.wait(5)
    wait_for(lambda: not backends["sft"].engine.running, 5)


def test_marks_of_broken_bytes_are_not_shown(scripted: ScriptedServer) -> None:
    (stream,) = ask_all([RemoteBackend(read_address(f"{scripted.url}#bytes"), None, 5)], ask("x"), DRAWN)
    for _ in follow([stream]):
        assert "\ufffd" not in stream.text
    assert stream.text.endswith("end")


def answered(scripted: ScriptedServer, model: str, raw: bool = False) -> AnswerStream:
    stream = AnswerStream(
        RemoteBackend(read_address(f"{scripted.url}#{model}"), None, 5), ask("q"), DRAWN, raw, threading.Event()
    )
    wait_for(lambda: stream.done, 10)
    return stream


def test_a_conversation_is_what_was_asked_and_answered(scripted: ScriptedServer) -> None:
    """A failed answer, its question, and raw text are no part of what a model is asked to go on with."""
    session = PageSession()
    for question, model, raw in [
        ("a", "echo", False),
        ("b", "crash", False),
        ("c", "echo", True),
        ("d", "echo", False),
    ]:
        session.exchanges.append(Exchange(question, answered(scripted, model, raw)))
    turns = session.turns(" ")
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert [turn["content"] for turn in turns] == ["a", "You said: q", "d", "You said: q"]
    assert session.turns("be kind")[0] == {"role": "system", "content": "be kind"}


def test_a_page_that_is_left_is_not_answered_further(backends: dict[str, LocalBackend]) -> None:
    sessions = PageSessions()
    stream = AnswerStream(backends["sft"], ask("x"), Settings(Sampling(), 2000, 0), False, threading.Event())
    sessions.of("one").exchanges.append(Exchange("x", stream))
    sessions.close("another")
    assert not stream.done
    sessions.close("one")
    assert stream.finish == "cancelled"
    assert sessions.of("one").exchanges  # it may come back


def test_pages_that_close_and_have_asked_nothing_cost_no_conversation() -> None:
    """Gradio calls `close` for whoever opened a heartbeat, with any hash and without a login."""
    sessions = PageSessions()
    kept = sessions.of("mine")
    for number in range(MAX_SESSIONS + 20):
        sessions.close(f"x{number}")
    assert sessions.of("mine") is kept and len(sessions.sessions) == 1


def test_a_session_that_makes_room_is_not_answered_further(scripted: ScriptedServer) -> None:
    """Its page's stop button would no longer find the answers."""
    sessions = PageSessions()
    endless = RemoteBackend(read_address(f"{scripted.url}#endless"), None, 5)
    chat, arena = ask_all([endless, endless], ask("x"), DRAWN)
    sessions.of("old").exchanges.append(Exchange("x", chat))
    sessions.of("old").round = Round("x", "", DRAWN, True, [arena])
    for number in range(MAX_SESSIONS - 1):
        sessions.of(f"x{number}")
    assert not chat.done and not arena.done
    sessions.of("one more")
    assert len(sessions.sessions) == MAX_SESSIONS
    assert (chat.finish, arena.finish) == ("cancelled", "cancelled")


def test_blind_places_are_mixed_and_seen_ones_are_not(backends: dict[str, LocalBackend]) -> None:
    both = list(backends.values())
    assert {tuple(draw_order(both, blind=True)) for _ in range(100)} == {tuple(both), tuple(both[::-1])}
    assert all(draw_order(both, blind=False) == both for _ in range(20))


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert read_keys([], 2) == [None, None]
    assert read_keys(["none", "env:OPENAI_API_KEY", "x"], 3) == [None, KEY, "x"]
    monkeypatch.setenv(KEYS_VARIABLE, f"none {KEY}")
    assert read_keys([], 2) == [None, KEY]
    assert read_keys(["x"], 1) == ["x"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([KEY], "1 keys for 2 URLs"),
        (["none", "env:NO_SUCH_KEY"], "NO_SUCH_KEY"),
        (["none", KEY + "\n"], "HTTP header"),
    ],
)
def test_wrong_keys_are_refused_and_not_repeated(words: list[str], says: str) -> None:
    with pytest.raises(SystemExit, match=says) as refused:
        read_keys(words, 2)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "checkpoint such as"),
        (["http://a/v1"] * 5, "room for 4"),
        (["http://a:1/v1#m", "http://a:1/v1#m"], "named twice"),
        (["nowhere"], "'nowhere' is not a checkpoint"),
        (["http://host:0x/v1"], "http://host:8000/v1"),
    ],
)
def test_models_that_cannot_be_are_refused_in_one_line(words: list[str], says: str) -> None:
    with pytest.raises(SystemExit, match=says) as refused:
        open_backends(words, [], 4, 5)
    assert "\n" not in str(refused.value)


def test_nothing_is_loaded_and_no_url_called_before_all_is_checked(
    folders: Path, scripted: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        open_backends([str(folders / "sft"), scripted.url, "nowhere"], [], 4, 5)
    assert "loading" not in capsys.readouterr().out
    assert not scripted.requests


def test_without_a_model_the_demos_is_taken_where_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    import mini_qwen_web

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="Name what shall answer"):
        mini_qwen_web.main([])
    assert not list(tmp_path.iterdir()), "a page that does not come needs no folder of votes"
    (tmp_path / "demo_results/dpo").mkdir(parents=True)
    assert mini_qwen_web.read_arguments(["--port", "80"]).models == ["demo_results/dpo"]
    assert "demo_results/dpo" in capsys.readouterr().out
    assert mini_qwen_web.read_arguments(["a"]).models == ["a"]
    assert not capsys.readouterr().out


def test_models_may_stand_before_and_behind_options() -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    import mini_qwen_web

    args = mini_qwen_web.read_arguments(["a", "--port", "80", "http://b", "--timeout=3", "c"])
    assert (args.models, args.port, args.timeout) == (["a", "http://b", "c"], 80, 3)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nowhere"], "not a checkpoint"),
        (["http://a/v1", "--host", "0.0.0.0"], "needs a password"),
        (["http://a/v1", "--api_kez", KEY], "Unknown: --api_kez"),
        (["http://a/v1", "--presets", "nowhere.csv"], "nowhere.csv"),
        (["http://a/v1", "--votes", "README.md/votes.jsonl"], "No votes can be written"),
        (["http://a/v1", "--port", "0"], "--port"),
    ],
)
def test_the_program_says_in_one_line_why_it_does_not_start(tmp_path: Path, argv: list[str], says: str) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    import mini_qwen_web

    with pytest.raises(SystemExit, match=says) as refused:
        mini_qwen_web.main(argv if "--votes" in argv else [*argv, "--votes", str(tmp_path / "votes.jsonl")])
    assert "\n" not in str(refused.value)
    assert KEY not in str(refused.value)
