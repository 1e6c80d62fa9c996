"""Who may speak to the server: the address it listens at, the key it asks for, and no web page from elsewhere."""

import errno
import hmac
import ipaddress
import os
import socket

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mini_qwen.api_json import ApiError
from mini_qwen.api_responses import error_response

KEY_VARIABLE = "MINI_QWEN_API_KEY"
OPEN_PATHS = {"/health"}
BACKLOG = 2048  # connections that wait to be accepted


def is_local(host: str) -> bool:
    """Whether only programs of this machine can reach the address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def choose_key(host: str, given: str | None) -> str | None:
    """The key that clients must send, from the command line or the environment.

    Raises SystemExit for an address that others reach without a key, and for a key that no header can carry.
    """
    key = given if given is not None else os.environ.get(KEY_VARIABLE) or None
    if key is None and not is_local(host):
        raise SystemExit(
            f"host {host} can be reached from other machines, so a key is needed: set {KEY_VARIABLE}, or --api_key. "
            "Without one the server listens at 127.0.0.1 alone."
        )
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise SystemExit("The API key must be of letters, digits and signs in ASCII, without blanks.")
    return key


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at that address; port 0 is any free one.

    Raises SystemExit when it is taken or cannot be had.
    """
    if not 0 <= port <= 65535:
        raise SystemExit(f"port is {port}, but must be 0 (any free one) to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Only where the protocol is named does asyncio send small pieces at once; else one may wait 40 ms.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Before the model is loaded: a second server on this port hears of it at once, and clients wait.
        listener.listen(BACKLOG)
        return listener
    except UnicodeError:
        raise SystemExit(f"host {host:.80} is no name that a machine can have.") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SystemExit(
                f"Port {port} of {host} is in use. Choose another with --port, or end the program that has it."
            ) from None
        raise SystemExit(f"The server cannot listen at {host}, port {port}: {error.strerror}.") from None


def address_of(listener: socket.socket) -> str:
    """`http://127.0.0.1:8000`"""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Guard:
    """Turns requests away before anything of them is read.

    With a key: those without it. Without one: those that name another host than this machine, as a web page does
    whose own name has been made to lead here (DNS rebinding). In any case bodies that are not declared to be JSON: a
    page of another site can send all else without asking the server first, and is told no when it asks.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app, self.key = app, None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self.find_fault(scope) if scope["type"] == "http" else None
        await (self.app if error is None else error_response(error))(scope, receive, send)

    def find_fault(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self.key is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key):
                words = "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'."
                return ApiError(words, status=401, code="invalid_api_key")
        if self.key is None and not is_local(host_of(headers.get("host", ""))):
            return ApiError("This server answers requests to 127.0.0.1 or localhost only.", status=403)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and (kind != "application/json" or "content-encoding" in headers):
            return ApiError("The content type must be application/json, not compressed.", status=415)
        return None


def host_of(value: str) -> str:
    """`localhost:8000` -> `localhost`, `[::1]:8000` -> `[::1]`"""
    return value.partition("]")[0] + "]" if value.startswith("[") else value.partition(":")[0]
