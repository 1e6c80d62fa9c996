"""The web page: two tabs, fonts of the machine that looks at it, and nothing from anywhere else."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mini_qwen.access import host_of, is_local
from mini_qwen.backends import Backend
from mini_qwen.page_sessions import PageSessions
from mini_qwen.presets import Preset
from mini_qwen.web_arena import ArenaTab
from mini_qwen.web_chat import ChatTab
from mini_qwen.web_html import CSS, show
from mini_qwen.web_texts import Texts

TITLE = "mini_qwen"
PASSWORD_VARIABLE = "MINI_QWEN_WEB_PASSWORD"
FONTS = ["system-ui", "-apple-system", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
MONO_FONTS = ["ui-monospace", "Menlo", "Consolas", "monospace"]
MOST_WAITING = 64  # questions of all pages that wait for their turn
# What a browser may load for this page, whatever an answer or a later version of Gradio asks for.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"  # for which default-src does not count
)


def build_page(
    backends: Sequence[Backend], presets: Sequence[Preset], votes: Path, texts: Texts, parallel: int
) -> gr.Blocks:
    """The page that asks these backends.

    Args:
        votes: the file to which the arena's votes are added.
        parallel: questions that are answered at once; the others wait for their turn.
    """
    sessions = PageSessions()
    limit = {"concurrency_limit": parallel, "concurrency_id": "answers"}
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        with gr.Tab(texts.chat, elem_id="chat"):
            ChatTab(backends, presets, texts, sessions, limit)
        with gr.Tab(texts.arena, elem_id="arena"):
            if len(backends) > 1:
                arena = ArenaTab(backends, presets, texts, sessions, votes, limit)
                page.load(arena.show_scores, None, arena.scores, show_progress="hidden", api_visibility="private")
            else:
                gr.HTML(show("nothing", texts.needs_two), elem_id="arena-needs-two")

        def leave(request: gr.Request) -> None:
            sessions.close(request.session_hash)

        page.unload(leave)
    return page.queue(api_open=False, max_size=MOST_WAITING, default_concurrency_limit=None)


def read_password(host: str, password: str | None) -> str | None:
    """The password that the page asks for, from the argument or MINI_QWEN_WEB_PASSWORD.

    Raises SystemExit where there is none and other machines can reach the page.
    """
    password = password or os.environ.get(PASSWORD_VARIABLE) or None
    if password is None and not is_local(host):
        raise SystemExit(
            f"With --host {host} others can reach the page, so it needs a password: set {PASSWORD_VARIABLE} or "
            "--password. Without --host it is for this machine alone."
        )
    return password


def serve_page(page: gr.Blocks, host: str, port: int, user: str, password: str | None) -> None:
    """Serve until interrupted. Raises SystemExit when the port is taken."""
    theme = gr.themes.Base(primary_hue="blue", font=FONTS, font_mono=MONO_FONTS)
    options: dict[str, Any] = {
        "share": False,
        "ssr_mode": False,
        "mcp_server": False,
        "pwa": False,
        "footer_links": [],
    }
    try:
        page.launch(
            server_name=host,
            server_port=port,
            auth=(user, password) if password else None,
            theme=theme,
            css=CSS,
            quiet=True,
            inbrowser=False,
            prevent_thread_lock=True,
            enable_monitoring=False,
            max_file_size="1kb",  # there is nothing to upload
            app_kwargs={"middleware": [Middleware(PageGuard, local=password is None)]},
            **options,
        )
    except OSError as error:
        raise SystemExit(f"The page cannot be served at {host}:{port}: {error}. Choose another --port.") from None
    print(f"the page: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    page.block_thread()


class PageGuard:
    """Tells browsers to load nothing from another place for this page.

    `local`: also turns away requests that name another host than this machine, as a web page's does whose own name
    has been made to lead here (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, local: bool) -> None:
        self.app, self.local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else "localhost"
        if self.local and not is_local(host_of(host)):
            refusal = PlainTextResponse("Without a password this page is at 127.0.0.1 or localhost only.", 403)
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send_with_policy)
