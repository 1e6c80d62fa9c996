"""The server: an engine behind an API of OpenAI's form."""

import asyncio
import socket
import sys
import time
from collections.abc import Awaitable, Callable

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from mini_qwen.access import Guard
from mini_qwen.api_completions import Envelope
from mini_qwen.api_json import ApiError, error_body, to_json
from mini_qwen.api_requests import Endpoint, Limits, read_request
from mini_qwen.api_responses import ReplyResponse, error_response, json_response
from mini_qwen.engine import Busy, Engine
from mini_qwen.sampling import Sampling

TOO_MUCH = 16  # a body of up to so many times the limit is read and thrown away, so that its sender hears why


async def read_body(request: Request, limits: Limits) -> bytes:
    """Raises ApiError for one that is too long or too slow."""
    body, length = bytearray(), 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                length += len(chunk)
                if length <= limits.max_bytes:
                    body += chunk
                elif length > TOO_MUCH * limits.max_bytes:
                    break
    except TimeoutError:
        raise ApiError(f"The body did not arrive within {limits.body_seconds:g} seconds.", status=408) from None
    except asyncio.CancelledError:
        raise ApiError("The server is ending.", status=503) from None
    if length > limits.max_bytes:
        raise ApiError(f"The body is longer than the {limits.max_bytes:,} bytes that this server takes.", status=413)
    return bytes(body)


class Handlers:
    """What each path does with a request."""

    def __init__(self, engine: Engine, default: Sampling, limits: Limits) -> None:
        self.engine, self.default, self.limits = engine, default, limits
        self.started = int(time.time())

    def describe(self) -> dict[str, object]:
        facts = {"id": self.engine.name, "object": "model", "created": self.started, "owned_by": "mini_qwen"}
        return facts | {"max_model_len": self.engine.context, "speaks_chat": self.engine.speaks_chat}

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.engine.name):
            words = f"There is no model {name[:80]!r} here, but '{self.engine.name}'."
            raise ApiError(words, "model", status=404, code="model_not_found")

    def begin(self, body: bytes, endpoint: Endpoint) -> ReplyResponse:
        """Start the answer. Takes a while for a long body, hence is called in a thread."""
        request = read_request(body, endpoint)
        self.check_model(request.model)
        chat = endpoint == "chat"
        if chat and not self.engine.speaks_chat:
            words = f"'{self.engine.name}' is a pretrained checkpoint, which continues text: use /v1/completions."
            raise ApiError(words, "messages", code="no_chat")
        sampling, seed, stop = request.sampling(self.default), request.chosen_seed(), request.stops()
        try:
            if chat:
                prompt = self.engine.encode(request.turns(self.limits))
            else:
                prompt = self.engine.encode_text(request.text())
        except SystemExit as error:  # of an encoder that does not fit; it would end the server
            raise ApiError(str(error), status=500, code="encoding_failed") from None
        num_tokens = request.num_tokens(self.limits, self.engine.context - len(prompt))
        try:
            reply = self.engine.answer(prompt, sampling, num_tokens, seed, stop)
        except ValueError as error:
            raise ApiError(str(error), "messages" if chat else "prompt", code="context_length_exceeded") from None
        except Busy as error:
            raise ApiError(str(error), status=429, code="rate_limit_exceeded") from None
        envelope = Envelope(self.engine.name, chat, seed, request.include_usage())
        return ReplyResponse(reply, envelope, len(prompt), bool(request.stream))

    def answer(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            body = await read_body(request, self.limits)
            try:
                return await asyncio.to_thread(self.begin, body, endpoint)
            except RecursionError:
                raise ApiError("The body is nested too deeply.") from None

        return handle

    async def models(self, _: Request) -> Response:
        return json_response({"object": "list", "data": [self.describe()]})

    async def model(self, request: Request) -> Response:
        self.check_model(request.path_params["name"])
        return json_response(self.describe())

    async def health(self, _: Request) -> Response:
        counts = {"running": len(self.engine.running), "waiting": len(self.engine.waiting)}
        return json_response({"status": "ok"} | counts)


async def on_error(_: Request, error: Exception) -> Response:
    """What a request gets that ended with an exception; one of ours is written to the server's output by uvicorn."""
    if isinstance(error, ApiError):
        return error_response(error)
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # nobody reads it
    if isinstance(error, HTTPException):
        words = {404: "There is no such path here.", 405: "This path does not know the method."}
        shown = ApiError(words.get(error.status_code, error.detail), status=error.status_code)
        return error_response(shown, dict(error.headers or {}))
    return error_response(ApiError("The server made a mistake; its own output says which.", status=500))


def make_app(engine: Engine, default: Sampling, limits: Limits, key: str | None = None) -> Starlette:
    """The API of an engine.

    Args:
        default: how tokens are chosen where a request does not say.
        key: what clients must send as `Authorization: Bearer KEY`; None: nothing, and only this machine is answered.
    """
    handlers = Handlers(engine, default, limits)
    routes = [
        Route("/health", handlers.health),
        Route("/v1/models", handlers.models),
        Route("/v1/models/{name:path}", handlers.model),
        Route("/v1/chat/completions", handlers.answer("chat"), methods=["POST"]),
        Route("/v1/completions", handlers.answer("text"), methods=["POST"]),
    ]
    errors = {kind: on_error for kind in (ApiError, HTTPException, ClientDisconnect, Exception)}
    app = Starlette(routes=routes, exception_handlers=errors, middleware=[Middleware(Guard, key=key)])
    app.router.redirect_slashes = False
    return app


class Protocol(H11Protocol):
    """uvicorn's reader of HTTP, which answers what is not HTTP in OpenAI's form too."""

    def send_400_response(self, msg: str) -> None:
        error = ApiError(f"{msg} A header is missing, malformed or too long, or the body is not as the headers say.")
        if self.cycle is not None:
            self.cycle.disconnected = True  # its request had begun well; what it would still answer is not sent
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = to_json(error_body(error))
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            head = h11.Response(status_code=400, headers=headers, reason="Bad Request")
            for part in (head, h11.Data(body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn, which says when it is ready, and ends all answers before it waits for their clients."""

    def __init__(self, app: Starlette, engine: Engine, ready: str) -> None:
        options = {"lifespan": "off", "ws": "none", "log_config": None, "timeout_graceful_shutdown": 3}
        super().__init__(uvicorn.Config(app, http=Protocol, **options))
        # Threads that generate hand Python's lock on after 1 ms in place of 5, so that requests are seen at once: with
        # eight of them /health takes 3 ms, not 22.
        sys.setswitchinterval(0.001)
        self.engine, self.ready = engine, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.ready, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self.engine.close, 2.0)
        await super().shutdown(sockets)
