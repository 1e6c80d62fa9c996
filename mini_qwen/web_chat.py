"""The chat of the web page: one model, a conversation that goes on."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from mini_qwen.answer_streams import AnswerStream, follow
from mini_qwen.backends import Backend, Settings
from mini_qwen.controls import AT_ONCE, PLAIN, QUIET, add_controls, add_presets, clean, read_settings
from mini_qwen.page_sessions import Exchange, PageSession, PageSessions
from mini_qwen.presets import Preset
from mini_qwen.web_html import show_conversation
from mini_qwen.web_texts import Texts


class ChatTab:
    """Built inside a gr.Blocks. `limit`: the listeners that answer, and at most how many at once."""

    def __init__(
        self,
        backends: Sequence[Backend],
        presets: Sequence[Preset],
        texts: Texts,
        sessions: PageSessions,
        limit: dict[str, Any],
    ) -> None:
        self.backends = {backend.name: backend for backend in backends}
        self.texts, self.sessions = texts, sessions
        with gr.Row():
            with gr.Column(scale=3):
                self.talk = gr.HTML(
                    self.show(PageSession()),
                    elem_id="chat-talk",
                    min_height=480,
                    max_height=560,
                    autoscroll=True,
                    **PLAIN,
                )
                self.box = gr.Textbox(
                    label=texts.question,
                    placeholder=texts.question_hint,
                    lines=1,
                    max_lines=8,
                    elem_id="chat-question",
                )
                menu = gr.Column()
                with gr.Row():
                    self.buttons = [
                        gr.Button(texts.send, variant="primary", elem_id="chat-send", min_width=80),
                        gr.Button(texts.stop, variant="stop", elem_id="chat-stop", min_width=80, interactive=False),
                        gr.Button(texts.retry, elem_id="chat-retry", min_width=80),
                        gr.Button(texts.clear, elem_id="chat-clear", min_width=80),
                    ]
            with gr.Column(scale=1, min_width=280):
                first = backends[0]
                model = gr.Dropdown(list(self.backends), value=first.name, label=texts.model, elem_id="chat-model")
                system = gr.Textbox(label=texts.system, lines=1, max_lines=6, elem_id="chat-system")
                raw = gr.Checkbox(
                    not first.speaks_chat, label=texts.raw, interactive=first.speaks_chat, elem_id="chat-raw"
                )
                controls = add_controls(backends, "chat", texts)
            with menu:
                add_presets(presets, "chat", texts, self.box, system)
        send, stop, retry, clear = self.buttons
        given, shown = [model, system, raw, *controls], [self.talk, self.box, *self.buttons]
        gr.on([send.click, self.box.submit], self.send, [self.box, *given], shown, **QUIET, **limit)
        retry.click(self.retry, given, shown, **QUIET, **limit)
        stop.click(self.stop, **AT_ONCE)
        clear.click(self.clear, None, shown, **AT_ONCE)
        model.change(self.choose, model, raw, **AT_ONCE)

    def send(
        self, request: gr.Request, question: str, model: str, system: str, raw: bool, *controls: float
    ) -> Iterator[list[Any]]:
        session, settings = self.sessions.of(request.session_hash), read_settings(*controls)
        stream = None
        with session.lock:  # a second click at the same time finds that there is a question under way
            if clean(question).strip() and not session.answering:
                stream = self.ask(session, clean(question), model, clean(system), raw, settings)
        yield from self.show_growing(session, stream, box="")

    def retry(self, request: gr.Request, model: str, system: str, raw: bool, *controls: float) -> Iterator[list[Any]]:
        """Ask the last question again, as the sliders stand now."""
        session, settings = self.sessions.of(request.session_hash), read_settings(*controls)
        stream = None
        with session.lock:
            if session.exchanges and not session.answering:
                question = session.exchanges.pop().question
                stream = self.ask(session, question, model, clean(system), raw, settings)
        yield from self.show_growing(session, stream, box=gr.skip())

    def ask(
        self, session: PageSession, question: str, model: str, system: str, raw: bool, settings: Settings
    ) -> AnswerStream:
        turns = [*session.turns(system), {"role": "user", "content": question}]
        stream = AnswerStream(self.backends[model], turns, settings, raw, threading.Event())
        session.exchanges.append(Exchange(question, stream))
        return stream

    def show_growing(self, session: PageSession, stream: AnswerStream | None, box: Any) -> Iterator[list[Any]]:
        """What changes on the page until the answer has ended. `box`: what the question's box is to hold meanwhile."""
        if stream is None:
            yield [gr.skip()] * 6
            return
        begin = [box, *(gr.update(interactive=on) for on in (False, True, False, False))]
        for looks, _ in enumerate(follow([stream])):
            yield [self.show(session), *([gr.skip()] * 5 if looks else begin)]
        idle = [gr.update(interactive=on) for on in (True, False, True, True)]
        yield [self.show(session), gr.skip(), *idle]

    def stop(self, request: gr.Request) -> None:
        self.sessions.of(request.session_hash).stop_chat()

    def clear(self, request: gr.Request) -> list[Any]:
        session = self.sessions.of(request.session_hash)
        with session.lock:
            session.stop_chat()
            session.exchanges.clear()
        return [self.show(session), *[gr.skip()] * 5]

    def choose(self, model: str) -> Any:
        """A pretrained checkpoint only continues raw text; another one begins in the chat template."""
        speaks_chat = self.backends[model].speaks_chat
        return gr.update(value=not speaks_chat, interactive=speaks_chat)

    def show(self, session: PageSession) -> str:
        return show_conversation(session.exchanges, len(self.backends) > 1, self.texts)
