"""Responses of the API: JSON, errors, and a reply on its way to its client, which ends when the client is gone."""

import asyncio
import contextlib

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mini_qwen.api_completions import Envelope, count
from mini_qwen.api_json import ApiError, error_body, to_event, to_json
from mini_qwen.reply import Reply

HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},  # or who sends a body without end would keep the connection as long
    413: {"Connection": "close"},
    429: {"Retry-After": "1"},
}


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")


def error_response(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    return json_response(error_body(error), error.status, HEADERS.get(error.status, {}) | (headers or {}))


class ReplyResponse(Response):
    """A reply, whole or streamed. It begins with the first piece, so that a failure before it has its own status."""

    def __init__(self, reply: Reply, envelope: Envelope, num_prompt: int, stream: bool) -> None:
        self.reply, self.envelope, self.num_prompt, self.streams = reply, envelope, num_prompt, stream
        self.background = None  # what Starlette would run behind it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        self.reply.watch(lambda: loop.call_soon_threadsafe(changed.set))
        watch = asyncio.create_task(self.cancel_when_gone(receive))
        with contextlib.suppress(asyncio.CancelledError):  # the server is ending and has waited long enough
            try:
                await self.wait(changed, 0 if self.streams else None)
                if self.streams and (self.reply.text or self.failure() is None):
                    await self.send_stream(send, changed)
                else:
                    await self.whole()(scope, receive, send)
            finally:
                self.reply.watch(None)
                self.reply.cancel()
                watch.cancel()

    async def cancel_when_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.reply.cancel()

    async def wait(self, changed: asyncio.Event, position: int | None) -> None:
        """Until there is text beyond the position, or the reply has ended."""
        while True:
            changed.clear()
            if self.reply.ended or (position is not None and len(self.reply.text) > position):
                return
            await changed.wait()

    def failure(self) -> ApiError | None:
        if self.reply.error is not None:
            return ApiError(f"The answer failed: {self.reply.error}", status=500, code="generation_failed")
        if self.reply.finish == "cancelled":
            return ApiError("The answer was stopped: the server is ending.", status=503, code="stopped")
        return None

    def whole(self) -> Response:
        failure = self.failure()
        if failure is not None:
            return error_response(failure)
        usage = count(self.num_prompt, self.reply.num_tokens)
        return json_response(self.envelope.whole(self.reply.text, str(self.reply.finish), usage))

    async def send_stream(self, send: Send, changed: asyncio.Event) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))  # a proxy before this is not to collect the pieces
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        body = self.envelope.part("", opens=True) if self.envelope.chat else b""
        position = 0
        while True:
            ended = self.reply.ended  # read before the text, which is complete then
            piece = self.reply.text[position:]
            position += len(piece)
            body += self.envelope.part(piece) if piece else b""
            if ended:
                break
            await send({"type": "http.response.body", "body": body, "more_body": True})
            body = b""
            await self.wait(changed, position)
        failure = self.failure()
        if failure is None:
            body += self.envelope.ending(str(self.reply.finish), count(self.num_prompt, self.reply.num_tokens))
        else:
            body += to_event(error_body(failure))
        await send({"type": "http.response.body", "body": body})
