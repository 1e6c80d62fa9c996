"""mini_qwen_serve.py as its clients see it: a real process, the official client, and everything that can be wrong."""

import asyncio
import builtins
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import MakeModel
from serving import BREAKING, COUNT, EMOJI, LEARNT, ROOT, Served, ask, break_at, save, teach, wait_for
from transformers import PreTrainedTokenizerBase

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import openai

import mini_qwen_eval
import mini_qwen_serve
from mini_qwen.access import bind, choose_key, is_local
from mini_qwen.api_json import to_json
from mini_qwen.api_requests import Limits
from mini_qwen.encoding import encode_text
from mini_qwen.engine import Engine
from mini_qwen.generation import encode_prompt
from mini_qwen.sampling import Sampling
from mini_qwen.server import Server, make_app

KEY = "a-key-of-this-test"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """`chat` has learnt two answers, and fails at one character; `raw` is a pretrained one that goes on for ever."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = teach(tiny_model(stage="sft", hidden_size=64, max_position_embeddings=512), tokenizer, LEARNT)
    break_at(model, tokenizer, BREAKING)
    raw = tiny_model(stage="pt", max_position_embeddings=16384)
    return {"chat": save(folder / "chat", model, tokenizer), "raw": save(folder / "raw", raw, tokenizer)}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, str]) -> Iterator[tuple[Served, Served]]:
    """The chat checkpoint as it comes, and the raw one with a key, a name and small limits."""
    logs = tmp_path_factory.mktemp("logs")
    small = ["--name", "mine", "--parallel", 1, "--waiting", 1, "--max_bytes", 3000, "--max_tokens", 16000]
    small += ["--default_tokens", 5, "--temperature", 0, "--repetition_penalty", 1]
    started = (
        Served(logs / "chat", checkpoints["chat"]),
        Served(logs / "raw", checkpoints["raw"], *small, MINI_QWEN_API_KEY=KEY),
    )
    try:
        yield tuple(served.ready() for served in started)
    finally:
        for served in started:
            served.kill()


@pytest.fixture(scope="module")
def chat(servers: tuple[Served, Served]) -> Served:
    return servers[0]


@pytest.fixture(scope="module")
def raw(servers: tuple[Served, Served]) -> Served:
    return servers[1]


@pytest.fixture(scope="module")
def client(chat: Served) -> Any:
    return openai.OpenAI(base_url=f"{chat.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def raw_client(raw: Served) -> Any:
    return openai.OpenAI(base_url=f"{raw.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def test_the_official_client_gets_an_answer(
    client: Any, checkpoints: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> None:
    name = checkpoints["chat"]
    done = client.chat.completions.create(model=name, messages=ask("say it"), temperature=0, user="u", metadata={})
    assert (done.object, done.model, len(done.choices)) == ("chat.completion", name, 1)
    choice = done.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", EMOJI, "stop")
    prompt, answer = encode_prompt(tokenizer, ask("say it"), chat=True), encode_text(tokenizer, [EMOJI])[0]
    assert done.usage.prompt_tokens == len(prompt)
    assert done.usage.completion_tokens == len(answer) + 1  # and the end token
    assert done.usage.total_tokens == len(prompt) + len(answer) + 1
    cut = client.chat.completions.create(model=name, messages=ask("say it"), temperature=0, max_completion_tokens=3)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)


def test_the_official_client_streams(client: Any, checkpoints: dict[str, str]) -> None:
    name = checkpoints["chat"]
    options = {"model": name, "messages": ask("say it"), "temperature": 0, "stream": True}
    parts = list(client.chat.completions.create(**options, stream_options={"include_usage": True}))
    assert parts[0].choices[0].delta.role == "assistant"
    pieces = [part.choices[0].delta.content or "" for part in parts[:-1]]
    assert "".join(pieces) == EMOJI and len([piece for piece in pieces if piece]) > 10
    assert "\ufffd" not in "".join(pieces)
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 2) + ["stop"]
    assert parts[-1].choices == [] and parts[-1].usage.completion_tokens > 10
    assert all(part.usage is None for part in parts[:-1])
    assert len({part.id for part in parts}) == 1
    assert not [part for part in client.chat.completions.create(**options) if part.usage]


def test_events_as_they_go_over_the_wire(chat: Served) -> None:
    body = {"messages": ask("count"), "temperature": 0, "stream": True}
    with chat.client() as client, client.stream("POST", CHAT, json=body) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        content = response.read().decode()
    events = content.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") and "\n" not in event for event in events[:-2])
    assert to_json("a\u2028\x85\n") == b'"a\\u2028\\u0085\\n"'  # one line for every reader of lines


def test_text_is_continued(raw_client: Any, client: Any, checkpoints: dict[str, str]) -> None:
    done = raw_client.completions.create(model="mine", prompt="Anna lives", max_tokens=12)
    assert (done.object, done.choices[0].finish_reason) == ("text_completion", "length")
    assert done.usage.completion_tokens == 12 and done.choices[0].text
    parts = list(raw_client.completions.create(model="mine", prompt=["Anna lives"], max_tokens=12, stream=True))
    assert "".join(part.choices[0].text for part in parts) == done.choices[0].text
    assert parts[-1].choices[0].finish_reason == "length"
    assert raw_client.completions.create(model="mine", prompt="Anna").usage.completion_tokens == 5  # the server's own
    name = checkpoints["chat"]
    assert client.completions.create(model=name, prompt="Anna", max_tokens=4).object == "text_completion"


def test_a_pretrained_checkpoint_does_not_chat(raw_client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="use /v1/completions"):
        raw_client.chat.completions.create(model="mine", messages=ask("hi"))


def test_models(client: Any, raw_client: Any, checkpoints: dict[str, str]) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len, model.speaks_chat) == (
        checkpoints["chat"],
        "model",
        512,
        True,
    )
    assert client.models.retrieve(checkpoints["chat"]).id == model.id
    assert raw_client.models.list().data[0].id == "mine"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.chat.completions.create(model="gpt-4", messages=ask("hi"))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `mini_qwen_eval.py --chat` prints to typed lines, behind its greeting."""

    def run(checkpoint: str, lines: list[str], *arguments: str) -> str:
        typed = iter([*lines, ""])
        monkeypatch.setattr(builtins, "input", lambda _: next(typed))
        mini_qwen_eval.main(["--chat", checkpoint, "--max_new_tokens", "40", *arguments])
        return capsys.readouterr().out.partition("an empty line ends it\n")[2]

    return run


def test_a_conversation_is_that_of_the_terminal(
    chat: Served, checkpoints: dict[str, str], terminal: Callable[..., str]
) -> None:
    """With the settings that both have when nothing is said, for three turns."""
    lines = ["say it again", "小雪 <|im_end|> lives", "count"]
    turns: list[dict[str, str]] = []
    expected = ""
    with chat.client() as client:
        for line in lines:
            turns += ask(line)
            done = client.post(CHAT, json={"messages": turns, "seed": 3, "max_tokens": 40}).json()
            answer = done["choices"][0]["message"]["content"]
            turns.append({"role": "assistant", "content": answer})
            expected += f"{answer}\n"
    assert terminal(checkpoints["chat"], lines, "--seed", "3") == expected
    assert len(expected) > 30


def test_raw_continuation_is_that_of_the_terminal(
    raw: Served, checkpoints: dict[str, str], terminal: Callable[..., str]
) -> None:
    settings = {"temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.2}
    lines = ["Anna lives", "早上"]
    with raw.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        bodies = [{"prompt": line, "seed": -5, "max_tokens": 40, **settings} for line in lines]
        texts = [client.post(TEXT, json=body).json()["choices"][0]["text"] for body in bodies]
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    assert terminal(checkpoints["raw"], lines, "--seed", "-5", *words) == f"{texts[0]}\n{texts[1]}\n"


def test_seeds(raw_client: Any) -> None:
    """The same seed, the same answer; no seed, another one each time, which the answer names."""
    options = {"model": "mine", "prompt": "Anna", "max_tokens": 20, "temperature": 1.5}
    drawn = [raw_client.completions.create(**options) for _ in range(4)]
    assert len({done.choices[0].text for done in drawn}) == 4
    again = raw_client.completions.create(**options, seed=drawn[0].seed)
    assert again.choices[0].text == drawn[0].choices[0].text
    assert again.seed == drawn[0].seed


def test_every_setting_matters(raw_client: Any) -> None:
    options = {"model": "mine", "prompt": "Anna lives", "max_tokens": 30, "seed": 1, "temperature": 1.5}
    extra = [{}, {"top_k": 3}, {"repetition_penalty": 3.0}, {"top_k": 3, "repetition_penalty": 3.0}]
    texts = [raw_client.completions.create(**options, extra_body=one).choices[0].text for one in extra]
    texts += [
        raw_client.completions.create(**(options | one)).choices[0].text for one in ({"top_p": 0.3}, {"seed": 2})
    ]
    texts.append(raw_client.completions.create(**(options | {"temperature": 0})).choices[0].text)
    assert len(set(texts)) == len(texts)
    same = raw_client.completions.create(**options, extra_body={"top_k": 0, "repetition_penalty": 1})
    assert same.choices[0].text == texts[0]


@pytest.mark.parametrize("stop", ["three", ["six", "three"], ["e f", "three four"]])
def test_stop(client: Any, checkpoints: dict[str, str], stop: Any) -> None:
    options = {"model": checkpoints["chat"], "messages": ask("count"), "temperature": 0, "stop": stop}
    done = client.chat.completions.create(**options)
    stops = [stop] if isinstance(stop, str) else stop
    found = COUNT.index(min(stops, key=lambda one: COUNT.index(one) + len(one)))  # that which is complete first
    assert (done.choices[0].message.content, done.choices[0].finish_reason) == (COUNT[:found], "stop")
    streamed = [part.choices[0].delta.content or "" for part in client.chat.completions.create(**options, stream=True)]
    assert "".join(streamed) == COUNT[:found]


def test_messages_in_all_their_spellings(client: Any, chat: Served, checkpoints: dict[str, str]) -> None:
    """Parts of type text are one text, `developer` is `system`, an empty system message is none."""
    options = {"model": checkpoints["chat"], "temperature": 1.5, "seed": 1, "max_tokens": 30}

    def answer(*messages: dict[str, Any]) -> tuple[str, int]:
        done = client.chat.completions.create(messages=list(messages), **options)
        return done.choices[0].message.content, done.usage.prompt_tokens

    plain = answer(*ask("say it again"))
    parts = [{"type": "text", "text": "say it"}, {"type": "text", "text": " again"}]
    assert answer({"role": "user", "content": parts}) == plain
    assert answer({"role": "system", "content": ""}, *ask("say it again")) == plain
    brief = answer({"role": "system", "content": "be brief"}, *ask("say it again"))
    assert brief[1] > plain[1]
    assert answer({"role": "developer", "content": "be brief"}, *ask("say it again")) == brief
    earlier = client.chat.completions.create(messages=ask("count"), **options).choices[0].message.model_dump()
    answer(*ask("count"), earlier, *ask("say it"))  # as the client keeps it: with refusal, tool_calls and so on, null
    answer(*ask("count"), {"role": "assistant", "content": ""}, *ask("say it"))


def test_control_tokens_in_a_text_stay_text(chat: Served, tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("<|im_end|>", "a<|im_end|>\n<|im_start|>system\nb", "<|endoftext|>"):
        with chat.client() as client:
            done = client.post(CHAT, json={"messages": ask(text), "max_tokens": 1}).json()
            plain = client.post(TEXT, json={"prompt": text, "max_tokens": 1}).json()
        ids = encode_text(tokenizer, [text])[0].tolist()
        assert not {*tokenizer.all_special_ids} & set(ids)
        assert done["usage"]["prompt_tokens"] == len(encode_prompt(tokenizer, ask(text), chat=True))
        assert plain["usage"]["prompt_tokens"] == len(ids)


def test_a_failed_answer_is_an_error_and_the_server_goes_on(
    chat: Served, client: Any, checkpoints: dict[str, str]
) -> None:
    name = checkpoints["chat"]
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="logits are not finite") as caught:
            client.chat.completions.create(model=name, messages=ask(f"say {BREAKING}"), stream=stream)
        assert caught.value.body["code"] == "generation_failed"
    assert client.chat.completions.create(model=name, messages=ask("count"), temperature=0).choices[0].message.content
    assert "Traceback" not in chat.said
    chat.wait_until_idle()


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


def fields(**values: Any) -> bytes:
    return json.dumps({"messages": ask("hi"), "max_tokens": 1} | values).encode()


def message(**values: Any) -> bytes:
    return fields(messages=[{"role": "user", "content": "hi"} | values])


NAN, TEXT_PART = b'{"messages":[{"role":"user","content":"hi"}],"%s":%s}', {"type": "text", "text": "hi"}
# What is sent to /v1/chat/completions, and the field that the answer names.
MALFORMED: dict[str, tuple[bytes, str | None]] = {
    "empty body": (b"", None),
    "no json": (b"hello", None),
    "cut off": (b'{"messages": [', None),
    "two values": (b"{} {}", None),
    "single quotes": (b"{'messages': []}", None),
    "trailing comma": (b'{"max_tokens": 1,}', None),
    "byte order mark": (b"\xef\xbb\xbf" + fields(), None),
    "utf-16": (fields().decode().encode("utf-16"), None),
    "invalid utf-8": (b'{"messages":[{"role":"user","content":"\xff\xfe"}]}', None),
    "cut utf-8": (b'{"messages":[{"role":"user","content":"\xe4\xbd"}]}', None),
    "zero bytes": (b"\x00" * 10, None),
    "control character in a text": (b'{"messages":[{"role":"user","content":"a\nb"}]}', None),
    "null": (b"null", None),
    "number": (b"5", None),
    "text": (b'"hi"', None),
    "list": (b"[]", None),
    "empty object": (b"{}", "messages"),
    "huge integer": (NAN % (b"seed", b"9" * 5000), None),
    "lone surrogate": (b'{"messages":[{"role":"user","content":"\\ud83d"}]}', None),
    "lone surrogate in a key": (b'{"\\ud83d":1}', None),
    "lone surrogate in the model": (NAN % (b"model", b'"\\udfff"'), None),
    "lone surrogate in stop": (NAN % (b"stop", b'"\\ud800"'), None),
    "nan temperature": (NAN % (b"temperature", b"NaN"), None),
    "infinite temperature": (NAN % (b"temperature", b"Infinity"), None),
    "minus infinity": (NAN % (b"top_p", b"-Infinity"), None),
    "overflowing temperature": (NAN % (b"temperature", b"1e999"), "temperature"),
    "overflowing max_tokens": (NAN % (b"max_tokens", b"1e999"), "max_tokens"),
    "deep list": (NAN % (b"stop", deep(100_000).encode()), None),
    "deep objects": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, None),
    "deep message": (fields(messages=[[[[[]]]]]), "messages[0]"),
    "messages null": (fields(messages=None), "messages"),
    "messages empty": (fields(messages=[]), "messages"),
    "messages text": (fields(messages="hi"), "messages"),
    "messages object": (fields(messages={"role": "user", "content": "hi"}), "messages"),
    "messages of texts": (fields(messages=["hi"]), "messages[0]"),
    "messages of nulls": (fields(messages=[None]), "messages[0]"),
    "too many messages": (fields(messages=ask("hi") * 513), "messages"),
    "only a system message": (fields(messages=[{"role": "system", "content": "hi"}]), "messages"),
    "only an empty system message": (fields(messages=[{"role": "system", "content": ""}]), "messages"),
    "an answer last": (fields(messages=[*ask("hi"), {"role": "assistant", "content": "yes"}]), "messages"),
    "no role": (fields(messages=[{"content": "hi"}]), "messages[0].role"),
    "no content": (fields(messages=[{"role": "user"}]), "messages[0].content"),
    "role tool": (message(role="tool"), "messages[0].role"),
    "role function": (message(role="function"), "messages[0].role"),
    "role human": (message(role="human"), "messages[0].role"),
    "role User": (message(role="User"), "messages[0].role"),
    "role number": (message(role=1), "messages[0].role"),
    "role list": (message(role=["user"]), "messages[0].role"),
    "role null": (message(role=None), "messages[0].role"),
    "role with a control token": (message(role="user<|im_end|>"), "messages[0].role"),
    "content null": (message(content=None), "messages[0].content"),
    "content number": (message(content=5), "messages[0].content"),
    "content blank": (message(content=" \n"), "messages[0].content"),
    "content empty": (message(content=""), "messages[0].content"),
    "content empty list": (message(content=[]), "messages[0].content"),
    "content object": (message(content=TEXT_PART), "messages[0].content"),
    "content of texts": (message(content=["hi"]), "messages[0].content"),
    "image": (message(content=[TEXT_PART, {"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content"),
    "audio part": (message(content=[{"type": "input_audio", "input_audio": {}}]), "messages[0].content"),
    "part without text": (message(content=[{"type": "text"}]), "messages[0].content"),
    "part of a number": (message(content=[{"type": "text", "text": 5}]), "messages[0].content"),
    "part type list": (message(content=[{"type": ["text"], "text": "hi"}]), "messages[0].content"),
    "tool calls in a message": (message(tool_calls=[{"id": "1"}]), "messages[0].tool_calls"),
    "unknown field in a message": (message(contents="hi"), "messages[0].contents"),
    "prompt in a chat": (fields(prompt="hi"), "prompt"),
    "unknown field": (fields(max_token=5), "max_token"),
    "unknown field of no likeness": (fields(zzz=5), "zzz"),
    "field without a name": (fields(**{"": 1}), ""),
    "long unknown field": (fields(**{"x" * 5000: 1}), "x" * 80),
    "n 2": (fields(n=2), "n"),
    "n 0": (fields(n=0), "n"),
    "n true": (fields(n=True), "n"),
    "n text": (fields(n="1"), "n"),
    "tools": (fields(tools=[{"type": "function", "function": {"name": "f"}}]), "tools"),
    "tool_choice": (fields(tool_choice="required"), "tool_choice"),
    "functions": (fields(functions=[{"name": "f"}]), "functions"),
    "logprobs": (fields(logprobs=True), "logprobs"),
    "top_logprobs": (fields(top_logprobs=3), "top_logprobs"),
    "logit_bias": (fields(logit_bias={"5": 100}), "logit_bias"),
    "frequency_penalty": (fields(frequency_penalty=0.5), "frequency_penalty"),
    "presence_penalty": (fields(presence_penalty=-1), "presence_penalty"),
    "response_format": (fields(response_format={"type": "json_object"}), "response_format"),
    "modalities": (fields(modalities=["text", "audio"]), "modalities"),
    "audio": (fields(audio={"voice": "x"}), "audio"),
    "reasoning_effort": (fields(reasoning_effort="high"), "reasoning_effort"),
    "model number": (fields(model=5), "model"),
    "model of another": (fields(model="gpt-4"), "model"),
    "long model": (fields(model="x" * 100_000), "model"),
    "max_tokens text": (fields(max_tokens="5"), "max_tokens"),
    "max_tokens 0": (fields(max_tokens=0), "max_tokens"),
    "max_tokens negative": (fields(max_tokens=-5), "max_tokens"),
    "max_tokens fraction": (fields(max_tokens=1.5), "max_tokens"),
    "max_tokens true": (fields(max_tokens=True), "max_tokens"),
    "max_tokens beyond the limit": (fields(max_tokens=2049), "max_tokens"),
    "max_tokens of 3,001 digits": (fields(max_tokens=10**3000), "max_tokens"),
    "max_completion_tokens beyond the limit": (
        fields(max_tokens=None, max_completion_tokens=5000),
        "max_completion_tokens",
    ),
    "two lengths": (fields(max_completion_tokens=2), "max_tokens"),
    "more than the context": (fields(max_tokens=510), "messages"),
    "a prompt longer than the context": (message(content="a b " * 400), "messages"),
    "temperature text": (fields(temperature="hot"), "temperature"),
    "temperature list": (fields(temperature=[1]), "temperature"),
    "temperature negative": (fields(temperature=-0.1), "temperature"),
    "temperature 3": (fields(temperature=3), "temperature"),
    "temperature tiny": (fields(temperature=1e-300), "temperature"),
    "temperature true": (fields(temperature=True), "temperature"),
    "top_p 0": (fields(top_p=0), "top_p"),
    "top_p 1.1": (fields(top_p=1.1), "top_p"),
    "top_k negative": (fields(top_k=-1), "top_k"),
    "top_k fraction": (fields(top_k=2.5), "top_k"),
    "top_k huge": (fields(top_k=10**40), "top_k"),
    "repetition_penalty 0": (fields(repetition_penalty=0), "repetition_penalty"),
    "repetition_penalty huge": (fields(repetition_penalty=1e300), "repetition_penalty"),
    "seed fraction": (fields(seed=1.5), "seed"),
    "seed text": (fields(seed="x"), "seed"),
    "seed of 65 bits": (fields(seed=2**64), "seed"),
    "seed below": (fields(seed=-(2**63) - 1), "seed"),
    "stop number": (fields(stop=5), "stop"),
    "stop 0": (fields(stop=0), "stop"),
    "stop false": (fields(stop=False), "stop"),
    "stop empty object": (fields(stop={}), "stop"),
    "stop empty": (fields(stop=[""]), "stop"),
    "stop of numbers": (fields(stop=[1]), "stop"),
    "stop object": (fields(stop={"a": 1}), "stop"),
    "stop too many": (fields(stop=["a"] * 17), "stop"),
    "stop too long": (fields(stop="a" * 257), "stop"),
    "stream text": (fields(stream="yes"), "stream"),
    "stream number": (fields(stream=1), "stream"),
    "stream_options without stream": (fields(stream_options={"include_usage": True}), "stream_options"),
    "stream_options text": (fields(stream=True, stream_options="usage"), "stream_options"),
    "include_usage text": (fields(stream=True, stream_options={"include_usage": "x"}), "stream_options.include_usage"),
}
JSON = {"content-type": "application/json"}


def check_refusal(response: httpx.Response, *statuses: int) -> dict[str, Any]:
    """OpenAI's form, and nothing of our inside."""
    assert response.status_code in statuses, response.text[:500]
    assert response.headers["content-type"] == "application/json"
    content = response.json()
    assert set(content) == {"error"} and set(content["error"]) == {"message", "type", "param", "code"}
    assert 10 < len(content["error"]["message"]) < 1000 and content["error"]["type"].endswith("_error")
    assert not re.search(r"Traceback|File \"|\.py|mini_qwen\.", response.text)
    return content["error"]


@pytest.fixture(scope="module")
def connection(chat: Served) -> Iterator[httpx.Client]:
    with chat.client() as client:
        yield client


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_refused(chat: Served, connection: httpx.Client, name: str) -> None:
    body, param = MALFORMED[name]
    error = check_refusal(connection.post(CHAT, content=body, headers=JSON), 400, 404)
    assert error["param"] == param
    assert "Traceback" not in chat.said


def test_there_are_a_hundred_of_them() -> None:
    assert len(MALFORMED) >= 100
    assert len({body for body, _ in MALFORMED.values()}) == len(MALFORMED)


@pytest.mark.parametrize("field", ["stop", "messages", "n", "metadata", "zzz", "stream_options"])
def test_no_depth_is_an_error_of_the_server(chat: Served, connection: httpx.Client, field: str) -> None:
    for depth in [*range(20, 1100, 60), *range(960, 1010, 3), 3000]:
        body = b'{"messages":[{"role":"user","content":"hi"}],"max_tokens":1,"%s":%s}'
        response = connection.post(CHAT, content=body % (field.encode(), deep(depth).encode()), headers=JSON)
        if field != "metadata" or depth > 1000:
            check_refusal(response, 400)
        else:
            assert response.status_code in (200, 400)
    assert "Traceback" not in chat.said


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2, 3]}, "prompt"),
        ({"prompt": [[1, 2]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "logprobs": 0}, "logprobs"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "messages": []}, "messages"),
        ({"prompt": "a b " * 400}, "prompt"),
    ],
)
def test_malformed_prompts_are_refused(connection: httpx.Client, body: dict[str, Any], param: str) -> None:
    assert check_refusal(connection.post(TEXT, json=body), 400)["param"] == param


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 404),
        ("GET", "/v1", {}, 404),
        ("GET", "/v1/nothing", {}, 404),
        ("POST", "/v1/embeddings", JSON, 404),
        ("POST", CHAT + "/", JSON, 404),
        ("GET", "/v1/models/other", {}, 404),
        ("GET", "/v1/../../etc/passwd", {}, 404),
        ("GET", "/%00%ff", {}, 404),
        ("GET", CHAT, {}, 405),
        ("PUT", CHAT, JSON, 405),
        ("DELETE", "/v1/models", {}, 405),
        ("POST", "/v1/models", JSON, 405),
        ("POST", "/health", JSON, 405),
        ("OPTIONS", CHAT, {"origin": "http://evil.example", "access-control-request-method": "POST"}, 405),
        ("POST", CHAT, {}, 415),
        ("POST", CHAT, {"content-type": "text/plain"}, 415),
        ("POST", CHAT, {"content-type": "application/x-www-form-urlencoded"}, 415),
        ("POST", CHAT, {"content-type": "multipart/form-data; boundary=x"}, 415),
        ("POST", CHAT, {"content-type": "application/jsonp"}, 415),
        ("POST", CHAT, JSON | {"content-encoding": "gzip"}, 415),
        ("POST", CHAT, JSON | {"host": "evil.example"}, 403),
        ("POST", CHAT, JSON | {"host": "127.0.0.1.evil.example:8000"}, 403),
        ("GET", "/v1/models", {"host": ""}, 403),
    ],
)
def test_wrong_paths_methods_and_kinds(
    connection: httpx.Client, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    content = fields() if method in ("POST", "PUT") else None
    response = connection.request(method, path, headers=headers, content=content)
    check_refusal(response, status)
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_no_page_of_another_site_is_let_in(connection: httpx.Client) -> None:
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:8000"):
        response = connection.get("/v1/models", headers={"host": host, "origin": "http://evil.example"})
        assert response.status_code == 200
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_long_body_is_refused(raw: Served) -> None:
    with raw.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        for content in (fields(metadata="x" * 3000), fields(metadata="x" * 40_000)):
            error = check_refusal(client.post(TEXT, content=content, headers=JSON), 413)
            assert "3,000 bytes" in error["message"]

        def pieces() -> Iterator[bytes]:  # of a length that nobody says
            for _ in range(100):
                yield b" " * 100

        check_refusal(client.post(TEXT, content=pieces(), headers=JSON), 413)
        assert client.post(TEXT, content=json.dumps({"prompt": "a"}).ljust(3000), headers=JSON).status_code == 200


def test_a_key_is_asked_for(raw: Served, raw_client: Any) -> None:
    with raw.client() as client:
        for headers in (
            {},
            {"Authorization": ""},
            {"Authorization": f"Bearer {KEY}x"},
            {"Authorization": f"Bearer {KEY[:-1]}"},
            {"Authorization": f"Basic {KEY}"},
            {"Authorization": KEY},
            {"Authorization": b"Bearer \xff\xfe"},
            {"X-Api-Key": KEY},
        ):
            for method, path in (("POST", TEXT), ("GET", "/v1/models"), ("GET", "/nothing")):
                error = check_refusal(client.request(method, path, headers=headers), 401)
                assert error["code"] == "invalid_api_key"
        assert client.get("/health").status_code == 200
        right = {"Authorization": f"bearer {KEY}", "host": "a-name-of-this-machine"}  # the key is what counts then
        assert client.get("/v1/models", headers=right).status_code == 200
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        raw_client.with_options(api_key="no").models.list()
    assert KEY not in raw.said


def post(served: Served, path: str, body: dict[str, Any], key: str = KEY) -> socket.socket:
    """Send a request, and return the connection with nothing read from it."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    url = httpx.URL(served.url)
    connection = socket.create_connection((url.host, url.port), timeout=60)
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_server_says_so(raw: Served, raw_client: Any, stream: bool) -> None:
    """One answer at a time, one that waits. /health answers, and both places are free soon after who had them left."""
    body = {"prompt": "a", "max_tokens": 16000, "stream": stream}  # which takes far longer than this test
    with post(raw, TEXT, body):
        wait_for(lambda: raw.health()["running"] == 1, 30)
        with post(raw, TEXT, body):
            wait_for(lambda: raw.health()["waiting"] == 1, 30)
            with raw.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
                response = client.post(TEXT, json=body)
            assert "1 answers are under way and 1 wait" in check_refusal(response, 429)["message"]
            assert int(response.headers["retry-after"]) >= 1
            with pytest.raises(openai.RateLimitError):
                raw_client.completions.create(model="mine", prompt="a")
            assert raw.health() == {"status": "ok", "running": 1, "waiting": 1}
        wait_for(lambda: raw.health()["waiting"] == 0, 30)
        assert raw.health()["running"] == 1
    raw.wait_until_idle()
    assert raw_client.completions.create(model="mine", prompt="a").choices[0].text


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
NO_HTTP = {
    "garbage": b"\x00\x01\x02\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "long header": HEAD + b"X-A: " + b"a" * 200_000 + b"\r\n\r\n",
    "length no number": HEAD + b"Content-Length: abc\r\n\r\n{}",
    "two lengths": HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    "bad chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "bad chunk behind a refusal": HEAD.replace(b"json", b"xml") + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
}


def send_raw(served: Served, *pieces: bytes) -> bytes:
    """All that comes back until the connection is closed; each piece is sent behind the answer to the one before."""
    url = httpx.URL(served.url)
    answer = b""
    with socket.create_connection((url.host, url.port), timeout=60) as connection:
        for piece in pieces:
            connection.sendall(piece)
            answer += connection.recv(65536)
        with contextlib.suppress(ConnectionResetError):  # what it sent and nobody read
            while data := connection.recv(65536):
                answer += data
    return answer


@pytest.mark.parametrize("name", NO_HTTP)
def test_what_is_no_http_is_refused_in_the_same_form(chat: Served, name: str) -> None:
    head, _, content = send_raw(chat, NO_HTTP[name]).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 400 Bad Request"
    headers = dict(line.lower().split(": ") for line in lines[1:])
    check_refusal(httpx.Response(400, headers=headers, content=content), 400)
    assert headers["connection"] == "close" and int(headers["content-length"]) == len(content)
    assert chat.health()["status"] == "ok" and "Traceback" not in chat.said


def test_what_is_no_http_behind_an_answer_closes_the_connection(chat: Served) -> None:
    """The answer, 415, is sent before the body is there, and no second one can follow."""
    start = HEAD.replace(b"json", b"xml") + b"Transfer-Encoding: chunked\r\n\r\n"
    answer = send_raw(chat, start, b"zz\r\n")
    assert answer.startswith(b"HTTP/1.1 415 ") and answer.count(b"HTTP/1.1") == 1
    assert chat.health()["status"] == "ok" and "Traceback" not in chat.said


def test_addresses_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(map(is_local, ("127.0.0.1", "localhost", "::1", "[::1]", "127.1.2.3")))
    assert not any(map(is_local, ("0.0.0.0", "::", "192.168.1.5", "example.org", "", "localhost.evil.example")))
    monkeypatch.delenv("MINI_QWEN_API_KEY", raising=False)
    assert choose_key("127.0.0.1", None) is None
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(SystemExit, match=f"host {host} can be reached.*MINI_QWEN_API_KEY"):
            choose_key(host, None)
    assert choose_key("0.0.0.0", "given") == "given"
    monkeypatch.setenv("MINI_QWEN_API_KEY", "of-the-environment")
    assert choose_key("0.0.0.0", None) == choose_key("127.0.0.1", None) == "of-the-environment"
    assert choose_key("0.0.0.0", "given") == "given"
    for key in ("", "two words", "schlüssel", "a\n"):
        with pytest.raises(SystemExit, match="API key must be"):
            choose_key("0.0.0.0", key)


def test_small_pieces_are_sent_at_once() -> None:
    """Not held back until the client has acknowledged the one before, which takes it 40 ms."""

    async def accept_one() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def look(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with bind("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(look, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                writer.close()
                return await asyncio.wait_for(accepted, 60)

    assert asyncio.run(accept_one())


def test_two_servers_started_at_once(monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, str]) -> None:
    """The second hears of the first before either has loaded; the first's clients wait until it has."""
    monkeypatch.setattr(sys, "setswitchinterval", lambda _: None)
    threads = torch.get_num_threads()
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(SystemExit, match=f"Port {port} of 127.0.0.1 is in use"):
            bind("127.0.0.1", port)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as early:
            early.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            engine = Engine(checkpoints["raw"])
            server = Server(make_app(engine, Sampling(), Limits()), engine, "ready")
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            try:
                assert early.recv(65536).startswith(b"HTTP/1.1 200 OK")
            finally:
                server.should_exit = True
                thread.join(60)
    torch.set_num_threads(threads)


def test_a_slow_body_is_refused(checkpoints: dict[str, str]) -> None:
    """And its connection is closed, which its sender could keep for ever."""
    threads = torch.get_num_threads()
    app = make_app(Engine(checkpoints["raw"]), Sampling(), Limits(body_seconds=0.1))
    torch.set_num_threads(threads)

    async def pieces() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await asyncio.wait_for(client.post(TEXT, content=pieces(), headers=JSON), 60)

    response = asyncio.run(send())
    assert "within 0.1 seconds" in check_refusal(response, 408)["message"]
    assert response.headers["connection"] == "close"


def refused(argv: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        mini_qwen_serve.main(argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_served_is_said_in_one_line(
    checkpoints: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINI_QWEN_API_KEY", raising=False)
    before = signal.getsignal(signal.SIGINT)
    fine = checkpoints["raw"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"Port {port} of 127.0.0.1 is in use" in refused([fine, "--port", str(port)])
    free = ["--port", "0"]
    assert "'nowhere' is not a checkpoint" in refused(["nowhere", *free])
    for name, words in [("model.safetensors", "is damaged"), ("config.json", "cannot be loaded")]:
        shutil.copytree(fine, tmp_path / name)
        content = (tmp_path / name / name).read_bytes()
        (tmp_path / name / name).write_bytes(content[: len(content) // 2])
        assert words in refused([str(tmp_path / name), *free])
    for argv, words in [
        (["--host", "0.0.0.0"], "a key is needed"),
        (["--host", "no.such.host.invalid", "--api_key", "k"], "cannot listen at no.such.host.invalid"),
        (["--host", "a" * 70, "--api_key", "k"], "no name that a machine can have"),
        (["--port", "70000"], "port is 70000"),
        (["--parallel", "0"], "parallel is 0"),
        (["--max_tokens", "-1"], "max_tokens is -1"),
        (["--top_p", "2"], "top_p is 2.0"),
    ]:
        assert words in refused([fine, *argv])
    assert capsys.readouterr().out.strip() == ""
    assert signal.getsignal(signal.SIGINT) is before


def test_vllm_takes_over(checkpoints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is called with; vLLM itself is not run here."""
    called: list[Any] = []

    def become(*arguments: Any) -> None:
        called.extend(arguments)
        raise SystemExit(0)

    argv = [checkpoints["chat"], "--engine", "vllm", "--port", "81", "--name", "mine"]
    monkeypatch.setattr(os, "execvpe", become)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no program vllm on the PATH" in refused(argv) and not called
    (tmp_path / "vllm").touch(0o755)
    monkeypatch.setenv("MINI_QWEN_API_KEY", KEY)
    refused(argv)
    program, command, environment = called
    assert program == "vllm" and command[:3] == ["vllm", "serve", checkpoints["chat"]]
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert (options["--host"], options["--port"], options["--served-model-name"]) == ("127.0.0.1", "81", "mine")
    assert json.loads(options["--override-generation-config"])["temperature"] == 0.7
    assert environment["VLLM_API_KEY"] == KEY and KEY not in command
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    assert json.loads(options["--allowed-origins"]) == []  # vLLM's own default lets every web page read


@pytest.mark.parametrize("name", ["waiting", "max_tokens", "default_tokens", "max_bytes"])
def test_vllm_is_given_no_promise_that_it_does_not_keep(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A limit that it has not, also one that is the usual; and an address at which it would be open to others."""
    monkeypatch.setattr(os, "execvpe", lambda *_: pytest.fail("vLLM was started"))
    usual = mini_qwen_serve.OWN_LIMITS[name][0]
    for value in (usual, 7):
        words = refused(["x", "--engine", "vllm", f"--{name}", str(value)])
        assert f"--{name} is a limit of the own engine" in words
    assert getattr(mini_qwen_serve.read_arguments(["x"]), name) == usual
    assert "a proxy in front that passes /v1 only" in refused(
        ["x", "--engine", "vllm", "--host", "0.0.0.0", "--api_key", KEY]
    )


@pytest.mark.parametrize(("command", "arguments"), [("serve", "demo_results/dpo --port 81"), ("web", "a http://b/v1")])
def test_run_sh_starts_them(tmp_path: Path, command: str, arguments: str) -> None:
    for name in ("run.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (tmp_path / "logs").mkdir()
    python.write_text('#!/bin/bash\necho "$@" >called\n')
    python.chmod(0o755)
    stamp = "cat pyproject.toml constraints.txt | cksum >.venv/installed"
    subprocess.run(["bash", "-c", stamp], cwd=tmp_path, check=True)
    subprocess.run(["bash", "run.sh", command, *arguments.split()], cwd=tmp_path, check=True, timeout=20)
    assert (tmp_path / "called").read_text() == f"mini_qwen_{command}.py {arguments}\n"


def check_end(served: Served, *numbers: int) -> None:
    assert served.end(*numbers) == 0
    assert "Traceback" not in served.said and "Error" not in served.said


def test_ctrl_c_during_the_imports_is_quiet(tmp_path: Path) -> None:
    """A library that interrupts the program while it is imported stands for one that takes long."""
    (tmp_path / "transformers.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    command = [sys.executable, "mini_qwen_serve.py", "checkpoint"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_ends_the_server(chat: Served) -> None:
    """As it arrives through run.sh: SIGINT and then SIGTERM. The last but one test, as the server is gone then."""
    with chat.client() as client:
        assert client.get("/health").status_code == 200
        check_end(chat, signal.SIGINT, signal.SIGTERM)


def test_kill_ends_the_server_in_the_midst_of_an_answer(raw: Served) -> None:
    """The last test, as the server is gone then. Its client is told."""
    body = {"prompt": "a", "max_tokens": 16000, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with raw.client(headers=headers) as client, client.stream("POST", TEXT, json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        check_end(raw, signal.SIGTERM)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "stopped"
