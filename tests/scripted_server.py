"""A small HTTP server with OpenAI's protocol that answers as good and bad servers do: the model asked says how."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-PlantedKeyPlantedKeyPlanted"
HOSTILE = (
    "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> **bold** ${document.title} "
    "{{value}} $$x$$ <|im_end|>\n<b>second</b> line &amp; `code`"
)
WHOLE = "🙂 你真棒 👩‍👩‍👧 Ωμέγα"


class ScriptedServer(ThreadingHTTPServer):
    """Models: echo, hostile, bytes (one at a time), halves, counting, endless, silent, pausing, and failing ones."""

    daemon_threads = True

    def __init__(self, models: tuple[str, ...] = ("echo",)) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = models
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []  # path, headers, body
        self.hung_up = threading.Event()  # a client closed the connection before its answer had ended
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.note({})
        self.send_json(
            200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]}
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.note(body)
        asked = body["prompt"] if self.path.endswith("/v1/completions") else body["messages"][-1]["content"]
        try:
            getattr(self, f"answer_{body['model']}")(body, asked)
        except (BrokenPipeError, ConnectionResetError):
            self.server.hung_up.set()

    def note(self, body: dict[str, Any]) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.path, headers, body))

    def answer_echo(self, body: dict[str, Any], asked: str) -> None:
        self.begin()
        said = f"You said: {asked}"[: body["max_tokens"]]
        for character in said:
            self.piece(character)
        self.conclude("stop" if said.endswith(asked) else "length", usage=1000)

    def answer_hostile(self, body: dict[str, Any], asked: str) -> None:
        self.begin()
        self.piece(HOSTILE)
        self.conclude("stop")

    def answer_bytes(self, body: dict[str, Any], asked: str) -> None:
        self.begin()
        for part in (WHOLE, "\ufffd", "end"):
            for byte in self.event({"content": part}):
                self.wfile.write(bytes([byte]))
        self.conclude("stop")

    def answer_halves(self, body: dict[str, Any], asked: str) -> None:
        """An emoji's two halves in two events, and halves without another one: JSON may hold them, text may not."""
        self.begin()
        for part in ("hi \ud83d", "\ude42 there", " \ude42lone\ud83d"):
            self.piece(part)
        self.conclude("stop")

    def answer_counting(self, body: dict[str, Any], asked: str) -> None:
        """The number of tokens is the JSON that was asked."""
        self.begin()
        self.piece("one ")
        self.piece("two")
        self.conclude("stop", usage=json.loads(asked))

    def answer_endless(self, body: dict[str, Any], asked: str) -> None:
        self.begin()
        while True:
            self.piece("word ")
            time.sleep(0.01)

    def answer_silent(self, body: dict[str, Any], asked: str) -> None:
        if not self.connection.recv(1):
            self.server.hung_up.set()

    def answer_pausing(self, body: dict[str, Any], asked: str) -> None:
        self.begin()
        self.piece("half an ")
        self.answer_silent(body, asked)

    def answer_broken(self, body: dict[str, Any], asked: str) -> None:
        """A proxy's broken stream: chunks were promised, and the last one does not come."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        event = self.event({"content": "half an "})
        self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")

    def answer_cut(self, body: dict[str, Any], asked: str) -> None:
        """The stream ends, but the answer did not."""
        self.begin()
        self.piece("half an ")

    def answer_stumbling(self, body: dict[str, Any], asked: str) -> None:
        self.begin()
        self.piece("half an ")
        self.wfile.write(b'data: {"error": {"message": "out of memory"}}\n\n')

    def answer_mangled(self, body: dict[str, Any], asked: str) -> None:
        self.begin()
        self.wfile.write(b'data: {"error": {"message": "half a \\ud83d character"}}\n\n')

    def answer_tattling(self, body: dict[str, Any], asked: str) -> None:
        self.begin()
        message = {"message": f"{asked} {self.headers['Authorization']}"}
        self.wfile.write(f"data: {json.dumps({'error': message})}\n\n".encode())

    def answer_crash(self, body: dict[str, Any], asked: str) -> None:
        self.send_json(500, {"error": {"message": "it crashed"}})

    def answer_page(self, body: dict[str, Any], asked: str) -> None:
        """What a proxy says, and no JSON."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html><body>Welcome</body></html>")

    def answer_locked(self, body: dict[str, Any], asked: str) -> None:
        self.send_json(401, {"error": {"message": f"{asked}: wrong key {self.headers['Authorization']}"}})

    def answer_picky(self, body: dict[str, Any], asked: str) -> None:
        if {"top_k", "repetition_penalty"} & set(body):
            self.send_json(400, {"error": {"message": "Unknown parameter: 'top_k'."}})
        else:
            self.answer_echo(body, asked)

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

    def event(self, delta: dict[str, str], finish: str | None = None, usage: Any = None) -> bytes:
        raw = self.path.endswith("/v1/completions")
        said = {"text": delta.get("content", "")} if raw else {"delta": delta}
        record: dict[str, Any] = {"id": "1", "object": "chunk", "created": 1, "model": "m"}
        record["choices"] = [{"index": 0, "finish_reason": finish, **said}] if usage is None else []
        if usage is not None:
            record["usage"] = {"prompt_tokens": 1, "completion_tokens": usage}
        return f"data: {json.dumps(record, ensure_ascii=False)}\n\n".encode(errors="backslashreplace")

    def piece(self, text: str) -> None:
        self.wfile.write(self.event({"content": text}))

    def conclude(self, reason: str, usage: Any = None) -> None:
        self.wfile.write(self.event({}, reason))
        if usage is not None:
            self.wfile.write(self.event({}, usage=usage))
        self.wfile.write(b"data: [DONE]\n\n")

    def send_json(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
