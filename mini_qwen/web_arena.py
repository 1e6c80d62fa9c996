"""The arena of the web page: all models side by side, a vote, and the scores that the votes add up to."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gradio as gr

from mini_qwen.answer_streams import ask_all, draw_order, follow
from mini_qwen.backends import Backend
from mini_qwen.controls import AT_ONCE, PLAIN, QUIET, add_controls, add_presets, clean, read_settings
from mini_qwen.files import brief
from mini_qwen.page_sessions import PageSessions, Round
from mini_qwen.presets import Preset
from mini_qwen.ratings import rate
from mini_qwen.votes import Answer, Vote, append_vote, read_votes
from mini_qwen.web_html import show, show_answer, show_scores
from mini_qwen.web_texts import LETTERS, Texts


class ArenaTab:
    """Built inside a gr.Blocks. `limit`: the listeners that answer, and at most how many at once."""

    def __init__(
        self,
        backends: Sequence[Backend],
        presets: Sequence[Preset],
        texts: Texts,
        sessions: PageSessions,
        votes: Path,
        limit: dict[str, Any],
    ) -> None:
        self.backends, self.texts, self.sessions, self.votes = list(backends), texts, sessions, votes
        letters = LETTERS[: len(backends)]
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(label=texts.question, lines=2, max_lines=8, elem_id="arena-question")
            with gr.Column(scale=2):
                menu = gr.Column()
                blind = gr.Checkbox(True, label=texts.blind, elem_id="arena-blind")
        with gr.Accordion(texts.settings, open=False, elem_id="arena-settings"):
            system = gr.Textbox(label=texts.system, lines=1, max_lines=6, elem_id="arena-system")
            with gr.Row():
                controls = add_controls(backends, "arena", texts)
        with menu:
            add_presets(presets, "arena", texts, prompt, system)
        with gr.Row():
            ask = gr.Button(texts.ask, variant="primary", elem_id="arena-ask")
            stop = gr.Button(texts.stop, variant="stop", interactive=False, elem_id="arena-stop")
        with gr.Row(equal_height=True):
            columns = [
                gr.HTML(
                    show_answer(texts.candidate.format(letter=letter), None, True, texts),
                    elem_id=f"arena-{letter}",
                    elem_classes="column",
                    min_width=200,
                    **PLAIN,
                )
                for letter in letters
            ]
        with gr.Row():
            names = [*(texts.better.format(letter=letter) for letter in letters), texts.tie, texts.all_bad]
            ballot = [
                gr.Button(name, interactive=False, min_width=90, elem_id=f"arena-vote-{number}")
                for number, name in enumerate(names)
            ]
        verdict = gr.HTML(show("verdict", texts.vote_hint), elem_id="arena-verdict", **PLAIN)
        gr.HTML(show("title", texts.scores), **PLAIN)
        self.scores = gr.HTML(elem_id="arena-scores", **PLAIN)
        shown = [*columns, ask, stop, *ballot, verdict]
        gr.on([ask.click, prompt.submit], self.ask, [prompt, system, blind, *controls], shown, **QUIET, **limit)
        stop.click(self.stop, **AT_ONCE)
        for number, button in enumerate(ballot):
            button.click(self.voting(number), None, [*shown, self.scores], **AT_ONCE)

    def ask(self, request: gr.Request, prompt: str, system: str, blind: bool, *controls: float) -> Iterator[list[Any]]:
        session = self.sessions.of(request.session_hash)
        prompt, system = clean(prompt), clean(system)
        settings = read_settings(*controls)
        turns = [{"role": "system", "content": system}] if system.strip() else []
        turns.append({"role": "user", "content": prompt})
        round = None
        with session.lock:  # a second click at the same time finds that there is a round under way
            if prompt.strip() and (session.round is None or session.round.done):
                streams = ask_all(draw_order(self.backends, blind), turns, settings)
                session.round = round = Round(prompt, system, settings, blind, streams)
        if round is None:
            yield [gr.skip()] * (2 * len(self.backends) + 5)
            return
        for looks, _ in enumerate(follow(round.streams)):
            rest = [gr.skip()] * (len(self.backends) + 5)
            yield [*self.show_columns(round), *rest] if looks else self.show(round)
        yield self.show(round)

    def stop(self, request: gr.Request) -> None:
        self.sessions.of(request.session_hash).stop_round()

    def voting(self, number: int) -> Any:
        """What the button does that stands at this place: one for each model, then tie, then all bad."""

        def vote(request: gr.Request) -> list[Any]:
            session = self.sessions.of(request.session_hash)
            with session.lock:  # a second click waits, and finds that there was a vote
                if session.round is None or not session.round.open:
                    return [gr.skip()] * (2 * len(self.backends) + 6)
                try:
                    message = self.keep(session.round, number)
                except OSError as error:
                    message = self.texts.not_kept.format(error=brief(error))
            return [*self.show(session.round, message), self.show_scores()]

        return vote

    def keep(self, round: Round, number: int) -> str:
        """Write the vote down, and say so. Raises OSError where it could not be written."""
        answers = [
            Answer(stream.name, stream.text, stream.finish, stream.raw, stream.error) for stream in round.streams
        ]
        kinds = ["better"] * len(answers) + ["tie", "all_bad"]
        winner = answers[number].model if number < len(answers) else None
        settings = asdict(round.settings.sampling) | {
            "max_new_tokens": round.settings.max_new_tokens,
            "seed": round.settings.seed,
        }
        now = datetime.now(UTC).isoformat(timespec="seconds")
        append_vote(
            self.votes, Vote(now, round.prompt, round.system, settings, round.blind, kinds[number], winner, answers)
        )
        round.voted = True
        says = {"better": f"{LETTERS[number % 4]}, {winner}", "tie": self.texts.tie, "all_bad": self.texts.all_bad}
        return self.texts.voted.format(verdict=says[kinds[number]])

    def show(self, round: Round, message: str = "") -> list[Any]:
        """The columns, and which buttons can be pressed."""
        can_win = [stream.error is None and round.open for stream in round.streams]
        ballot = [gr.update(interactive=on) for on in (*can_win, round.open, round.open)]
        ask, stop = gr.update(interactive=round.done), gr.update(interactive=not round.done)
        return [*self.show_columns(round), ask, stop, *ballot, show("verdict", message or self.texts.vote_hint)]

    def show_columns(self, round: Round) -> list[str]:
        """`A · results/dpo`, or `Model A` while the names are hidden."""
        heads = [
            self.texts.candidate.format(letter=letter) if round.hidden else f"{letter} · {stream.name}"
            for letter, stream in zip(LETTERS, round.streams, strict=False)
        ]
        return [
            show_answer(head, stream, round.hidden, self.texts)
            for head, stream in zip(heads, round.streams, strict=True)
        ]

    def show_scores(self) -> str:
        votes, num_broken = read_votes(self.votes)
        return show_scores(rate(votes), num_broken, self.texts)
