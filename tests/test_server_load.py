"""The server under many clients: nothing is lost, every answer is the one that a single client gets, nothing hangs."""

import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from conftest import MakeModel
from serving import Served, ask, save, wait_for
from transformers import PreTrainedTokenizerBase

pytest.importorskip("uvicorn")

CHAT = "/v1/chat/completions"
HEALTH_SECONDS = 10.0  # that /health may take while all cores are busy; on an idle machine it takes milliseconds
FREE_SECONDS = 2.0  # until a place is free that somebody left; a free machine takes a few hundredths


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Served]:
    """A random model, which goes on to the last token that is asked for."""
    folder = tmp_path_factory.mktemp("served")
    checkpoint = save(folder / "model", tiny_model(stage="sft", max_position_embeddings=16384), tokenizer)
    server = Served(folder / "log", checkpoint, "--waiting", 64, "--max_tokens", 16000)
    try:
        yield server.ready()
    finally:
        server.kill()


def body(number: int, **fields: Any) -> dict[str, Any]:
    """One of the questions, each with settings and a seed of its own."""
    text = ("Anna", "小雪 lives", "Where does Victor go tomorrow?", "🙂")[number % 4]
    settings = ({"temperature": 0}, {"temperature": 1.5}, {"top_p": 0.5}, {"temperature": 1, "top_k": 9})
    return {"messages": ask(text), "seed": number, "max_tokens": 12 + number, **settings[number % 3]} | fields


def read_stream(response: httpx.Response) -> str:
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    parts = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert parts[-1]["finish_reason"] in ("stop", "length")
    return "".join(part["delta"].get("content", "") for part in parts)


def answer(client: httpx.Client, number: int, stream: bool) -> str:
    if not stream:
        return client.post(CHAT, json=body(number)).raise_for_status().json()["choices"][0]["message"]["content"]
    with client.stream("POST", CHAT, json=body(number, stream=True)) as response:
        assert response.status_code == 200
        return read_stream(response)


class Health:
    """Asks /health again and again; the longest time that it took, in seconds."""

    def __init__(self, served: Served) -> None:
        self.served, self.longest, self.count, self.ended = served, 0.0, 0, threading.Event()
        self.pool = ThreadPoolExecutor(1)

    def ask(self) -> None:
        with self.served.client() as client:
            while not self.ended.wait(0.02):
                started = time.monotonic()
                assert client.get("/health").json()["status"] == "ok"
                self.longest = max(self.longest, time.monotonic() - started)
                self.count += 1

    def __enter__(self) -> "Health":
        self.asking = self.pool.submit(self.ask)
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.pool.shutdown()
        self.asking.result()  # raises what it met


@pytest.mark.parametrize("seconds", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_eight_clients_get_what_one_gets(served: Served, seconds: int) -> None:
    """Half of the answers streamed, all for so many seconds; a lost one would be an error or a missing [DONE]."""
    with served.client() as client:
        alone = [answer(client, number, stream=number % 2 == 0) for number in range(12)]
    assert len(set(alone)) == 12 and all(alone)
    ends_at = time.monotonic() + seconds

    def work(own: int) -> int:
        draw = random.Random(own)
        with served.client() as client:
            for count in itertools.count(1):
                number = draw.randrange(12)
                assert answer(client, number, stream=draw.random() < 0.5) == alone[number]
                if count > 1 and time.monotonic() > ends_at:
                    return count
        raise AssertionError

    with Health(served) as health, ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(work, range(8)))
    assert max(counts) < 10 * min(counts)  # nobody starves
    assert health.count > 1 and health.longest < HEALTH_SECONDS
    served.wait_until_idle()
    assert "Traceback" not in served.said


def connect(served: Served, content: dict[str, Any]) -> socket.socket:
    """Send a request and return the connection, which takes little at a time."""
    url, data = httpx.URL(served.url), json.dumps(content).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(60)
    connection.connect((url.host, url.port))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def test_fifty_at_once_among_slow_readers_and_those_who_leave(served: Served) -> None:
    slow_body = body(1, stream=True, max_tokens=60)
    with served.client() as client:
        expected = read_stream(client.post(CHAT, json=slow_body))
        alone = [answer(client, number, stream=False) for number in range(5)]

    def fast(number: int) -> None:
        with served.client() as client:
            assert answer(client, number % 5, stream=number % 2 == 0) == alone[number % 5]

    def slow(_: int) -> None:
        """A few bytes at a time; in the end it has all."""
        with connect(served, slow_body) as connection:
            content = b""
            while piece := connection.recv(50 if len(content) < 1500 else 1 << 16):
                content += piece
                time.sleep(0.05 if len(content) < 1500 else 0)
        events = [line[6:] for line in content.decode().splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        parts = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
        assert "".join(part.get("content", "") for part in parts) == expected

    def leave(number: int) -> None:
        """Half of them wait for a stream; all would take thousands of tokens."""
        with connect(served, body(number, max_tokens=16000, stream=number % 2 == 0)):
            time.sleep(0.1 * number)

    with Health(served) as health, ThreadPoolExecutor(50) as pool:
        jobs = [pool.submit(job, number) for number in range(10) for job in (slow, leave, fast, fast, fast)]
        for job in jobs:
            job.result(timeout=120)
        assert served.wait_until_idle() < FREE_SECONDS
    assert health.count > 1 and health.longest < HEALTH_SECONDS
    assert "Traceback" not in served.said


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_place(served: Served, stream: bool) -> None:
    """Within two seconds: the best of three times, as the machine may be busy with other things."""
    times = []
    for _ in range(3):
        connections = [connect(served, body(0, max_tokens=16000, stream=stream)) for _ in range(4)]
        wait_for(lambda: served.health()["running"] == 4, 30)
        for connection in connections:
            connection.close()
        times.append(served.wait_until_idle())
    assert min(times) < FREE_SECONDS
