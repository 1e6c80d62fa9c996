"""mini_qwen/remote.py against a real server: streams, failures in a line, cancelling, and a key that nobody sees."""

import time
from pathlib import Path

import pytest
import torch
from conftest import MakeModel
from scripted_server import HOSTILE, KEY, WHOLE, ScriptedServer
from serving import LEARNT, Served, ask, save, teach, wait_for
from transformers import PreTrainedTokenizerBase

pytest.importorskip("openai", reason="the openai client is not installed")

from mini_qwen.backends import LocalBackend, Settings
from mini_qwen.engine import Engine
from mini_qwen.remote import Address, RemoteBackend, read_address
from mini_qwen.reply import Reply
from mini_qwen.sampling import Sampling

GREEDY = Settings(Sampling(), 100, 7)


def backend(scripted: ScriptedServer, model: str, key: str | None = None, timeout: float = 10) -> RemoteBackend:
    return RemoteBackend(read_address(f"{scripted.url}#{model}"), key, timeout)


def failure(reply: Reply) -> str:
    with pytest.raises(RuntimeError):
        list(reply)
    assert reply.error is not None and "\n" not in reply.error
    return reply.error


def test_an_answer_streams_and_is_counted_by_its_server(scripted: ScriptedServer) -> None:
    reply = backend(scripted, "echo").answer(ask("小雪?"), GREEDY, raw=False)
    assert "".join(reply) == reply.text == "You said: 小雪?"
    assert (reply.finish, reply.num_tokens) == ("stop", 1000)
    short = backend(scripted, "echo").answer(ask("long question"), Settings(Sampling(), 5, 7), raw=False)
    assert ("".join(short), short.finish) == ("You s", "length")


def test_without_its_servers_count_the_pieces_are_the_tokens(scripted: ScriptedServer) -> None:
    reply = backend(scripted, "hostile").answer(ask("x"), GREEDY, raw=False)
    assert "".join(reply) == HOSTILE
    assert reply.num_tokens == 1


def test_characters_survive_any_cut_of_the_stream(scripted: ScriptedServer) -> None:
    reply = backend(scripted, "bytes").answer(ask("x"), GREEDY, raw=False)
    assert "".join(reply) == WHOLE + "\ufffdend"


def test_halves_of_a_character_are_joined_or_replaced(scripted: ScriptedServer) -> None:
    reply = backend(scripted, "halves").answer(ask("x"), GREEDY, raw=False)
    assert "".join(reply) == "hi 🙂 there \ufffdlone" and reply.num_tokens == 3
    said = failure(backend(scripted, "mangled").answer(ask("x"), GREEDY, raw=False))
    assert said.endswith("broke off its answer: half a \ufffd character.")


@pytest.mark.parametrize("count", ['"5"', "true", "5.5", "-3", "[]", "0", "1" + 400 * "0"])
def test_a_count_that_is_none_leaves_the_pieces_as_the_tokens(scripted: ScriptedServer, count: str) -> None:
    reply = backend(scripted, "counting").answer(ask(count), GREEDY, raw=False)
    assert "".join(reply) == "one two"
    assert (reply.error, reply.num_tokens) == (None, 2)


def test_settings_are_sent_and_what_some_servers_refuse_only_where_it_matters(scripted: ScriptedServer) -> None:
    turns = [{"role": "system", "content": "be brief"}, *ask("hi")]
    list(backend(scripted, "echo").answer(turns, Settings(Sampling(0.5, 0.9), 12, 3), raw=False))
    path, _, body = scripted.requests[-1]
    assert path == "/v1/chat/completions"
    assert (body["messages"], body["max_tokens"], body["seed"]) == (turns, 12, 3)
    assert (body["temperature"], body["top_p"]) == (0.5, 0.9)
    assert not {"top_k", "repetition_penalty"} & set(body)
    list(backend(scripted, "echo").answer(turns, Settings(Sampling(0.5, 0.9, 8, 1.2), 12, 3), raw=True))
    path, _, body = scripted.requests[-1]
    assert (path, body["prompt"], body["top_k"], body["repetition_penalty"]) == ("/v1/completions", "hi", 8, 1.2)


def test_without_a_model_the_first_that_the_server_lists_answers(scripted: ScriptedServer) -> None:
    unnamed = RemoteBackend(read_address(scripted.url), None, 10)
    assert "".join(unnamed.answer(ask("a"), GREEDY, raw=False)) == "You said: a"
    assert scripted.requests[-1][2]["model"] == "echo"


def test_the_key_goes_to_its_server_and_nowhere_else(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "sk-of-another-server")
    list(backend(scripted, "echo", KEY).answer(ask("x"), GREEDY, raw=False))
    assert scripted.requests[-1][1]["authorization"] == f"Bearer {KEY}"
    list(backend(scripted, "echo").answer(ask("x"), GREEDY, raw=False))
    for _, headers, _ in scripted.requests[-2:]:
        assert "sk-of-another-server" not in str(headers)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("crash", "answered 500: .*it crashed"),
        ("broken", "broke off its answer"),
        ("cut", "broke off its answer"),
        ("stumbling", "out of memory"),
        ("page", "broke off its answer"),
        ("picky", r"answered 400: .*'top_k'.* takes 0 and 1"),
    ],
)
def test_a_failure_is_a_line_that_says_what_and_where(scripted: ScriptedServer, model: str, says: str) -> None:
    reply = backend(scripted, model).answer(ask("x"), Settings(Sampling(top_k=5), 100, 7), raw=False)
    pytest.raises(RuntimeError, list, reply).match(says)
    assert scripted.url in failure(reply)
    assert reply.text in ("", "half an ")


def test_a_wrong_key_is_not_repeated(scripted: ScriptedServer) -> None:
    said = failure(backend(scripted, "locked", KEY).answer(ask("x"), GREEDY, raw=False))
    assert "answered 401" in said and "Bearer ***" in said and KEY not in said


@pytest.mark.parametrize("model", ["locked", "tattling"])
def test_no_part_of_a_key_is_left_where_a_long_message_is_cut(scripted: ScriptedServer, model: str) -> None:
    for length in range(150, 300, 5):
        said = failure(backend(scripted, model, KEY).answer(ask("x" * length), GREEDY, raw=False))
        assert KEY[:5] not in said and len(said) <= 300


def test_a_server_that_is_not_there(scripted: ScriptedServer) -> None:
    gone = ScriptedServer()
    gone.close()
    said = failure(RemoteBackend(read_address(f"{gone.url}#x"), None, 10).answer(ask("x"), GREEDY, raw=False))
    assert f"{gone.url} cannot be reached" in said


@pytest.mark.parametrize("model", ["silent", "pausing"])
def test_silence_is_waited_for_only_so_long(scripted: ScriptedServer, model: str) -> None:
    started = time.monotonic()
    said = failure(backend(scripted, model, timeout=0.3).answer(ask("x"), GREEDY, raw=False))
    assert "said nothing for 0.3 seconds" in said
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("model", ["endless", "silent"])
def test_cancelling_closes_the_connection(scripted: ScriptedServer, model: str) -> None:
    """Also of a server that has not said a word yet, and in no time."""
    reply = backend(scripted, model).answer(ask("x"), GREEDY, raw=False)
    if model == "endless":
        assert next(iter(reply)).startswith("word ")
    wait_for(lambda: scripted.requests, 10)
    assert not scripted.hung_up.is_set()
    reply.cancel()
    assert scripted.hung_up.wait(5)
    assert reply.finish == "cancelled" and reply.error is None
    reply.cancel()


def test_addresses() -> None:
    assert read_address("http://host:8000") == Address("http://host:8000/v1", None, "host:8000")
    assert read_address("http://host:8000/v1/") == Address("http://host:8000/v1", None, "host:8000")
    assert read_address("https://host/api/v1#a/b") == Address("https://host/api/v1", "a/b", "a/b (host)")


@pytest.mark.parametrize(
    "text", ["ftp://host/v1", "http://", "http://host:99999/v1", "http://host/v1?a=b", "http://a b"]
)
def test_what_is_no_address_is_refused_with_a_right_one(text: str) -> None:
    pytest.raises(SystemExit, read_address, text).match("http://host:8000/v1")


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(SystemExit) as refused:
        read_address(f"http://me:{KEY}@host:8000/v1")
    assert "--api_keys" in str(refused.value) and KEY not in str(refused.value)


def test_our_own_server_gives_the_answer_of_the_checkpoint(
    tmp_path: Path, tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = teach(tiny_model(stage="sft", hidden_size=64, max_position_embeddings=512), tokenizer, LEARNT)
    checkpoint = save(tmp_path / "parrot", model, tokenizer)
    drawn = Settings(Sampling(1.5, 0.9, 20, 1.1), 24, 5)
    threads = torch.get_num_threads()
    local = LocalBackend(Engine(checkpoint))
    torch.set_num_threads(threads)  # as the other tests had them
    served = Served(tmp_path / "log", checkpoint, "--api_key", KEY)
    try:
        served.ready()
        remote = RemoteBackend(read_address(served.url), KEY, 30)
        for settings in (GREEDY, drawn):
            replies = [either.answer(ask("say it"), settings, raw=False) for either in (local, remote)]
            texts = ["".join(reply) for reply in replies]
            assert texts[0] == texts[1] and texts[0]
            assert (replies[0].finish, replies[0].num_tokens) == (replies[1].finish, replies[1].num_tokens)
        wrong = RemoteBackend(read_address(served.url), "wrong", 30)
        assert "answered 401" in failure(wrong.answer(ask("say it"), GREEDY, raw=False))
    finally:
        served.kill()
