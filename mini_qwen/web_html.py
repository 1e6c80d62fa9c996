"""The HTML of conversations, answers and scores, in which every text is text, whatever it looks like."""

from collections.abc import Sequence
from html import escape

from mini_qwen.answer_streams import AnswerStream
from mini_qwen.page_sessions import Exchange
from mini_qwen.ratings import Rating
from mini_qwen.web_texts import Texts

CSS = """
.gradio-container { max-width: 1280px !important; width: 100%; margin: 0 auto; }
.talk, .answer { overflow-wrap: anywhere; line-height: 1.6; }
.talk { display: flex; flex-direction: column; gap: 12px; padding: 4px; }
.talk > div { max-width: 85%; padding: 8px 14px; border-radius: 12px; }
.talk .asked { align-self: flex-end; background: var(--color-accent-soft); }
.talk .reply { align-self: flex-start; background: var(--background-fill-secondary); }
.talk .nothing { align-self: center; }
.said { white-space: pre-wrap; }
.given, .note, .name, .nothing, .verdict { opacity: 0.65; }
.note, .name { font-size: var(--text-xs); font-variant-numeric: tabular-nums; }
.note { margin-top: 4px; }
.failure { color: var(--error-text-color); white-space: pre-wrap; }
.answer { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 12px 14px; min-height: 170px;
  display: flex; flex-direction: column; background: var(--background-fill-primary); }
.block .html-container { padding: 0 !important; }
.block.column { min-width: min(230px, 100%) !important; }
.column, .column .html-container, .answer { height: 100%; box-sizing: border-box; }
.answer .head, .title { font-weight: 600; }
.answer .head { margin-bottom: 6px; }
.answer .said { flex-grow: 1; max-height: 420px; overflow-y: auto; }
.title { margin-top: 12px; }
.scores { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.scores tr { border-bottom: 1px solid var(--border-color-primary); }
.scores th, .scores td { text-align: right; padding: 6px clamp(4px, 1vw, 12px); }
.scores :is(th, td):first-child { text-align: left; overflow-wrap: anywhere; padding-left: 0; min-width: 6em; }
footer { display: none !important; }
"""


def show_conversation(exchanges: Sequence[Exchange], names: bool, texts: Texts) -> str:
    """A conversation. `names`: also say which model answered."""
    parts = [show_exchange(exchange, names, texts) for exchange in exchanges]
    return f'<div class="talk">{"".join(parts) or show("nothing", texts.nothing_said)}</div>'


def show_exchange(exchange: Exchange, names: bool, texts: Texts) -> str:
    stream = exchange.stream
    name = show("name", stream.name) if names else ""
    after = show_failure(stream, texts) + show("note", note(stream, texts))
    if stream.raw:  # one text, its beginning given
        said = f'<span class="given">{escape(exchange.question)}</span>{escape(stream.text)}'
        return f'<div class="reply">{name}<div class="said">{said}</div>{after}</div>'
    asked = f'<div class="asked">{show("said", exchange.question)}</div>'
    return f'{asked}<div class="reply">{name}{show("said", stream.text or pending(stream, texts))}{after}</div>'


def show_answer(head: str, stream: AnswerStream | None, hidden: bool, texts: Texts) -> str:
    """A column of the arena. `hidden`: without what would tell the model, its speed and the texts of its failure."""
    parts = [show("head", head)]
    if stream is not None:
        parts.append(show("said", stream.text or pending(stream, texts)))
        parts.append(show_failure(stream, texts, hidden))
        parts.append("" if hidden else show("note", note(stream, texts)))
    return f'<div class="answer">{"".join(parts)}</div>'


def show_scores(ratings: Sequence[Rating], num_broken: int, texts: Texts) -> str:
    broken = show("note", texts.broken_lines.format(number=num_broken)) if num_broken else ""
    if not ratings:
        return show("nothing", texts.no_votes) + broken
    rows = []
    for rating in ratings:
        interval = "–" if rating.interval is None else "{:.0f} – {:.0f}".format(*rating.interval)
        cells = [rating.model, f"{rating.score:.0f}", interval, f"{rating.num_votes:,}", f"{rating.num_wins:,}"]
        rows.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{escape(column)}</th>" for column in texts.columns)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<table class="scores"><tr>{head}</tr>{body}</table>{show("note", texts.scores_note)}{broken}'


def show(kind: str, text: str) -> str:
    return f'<div class="{kind}">{escape(text)}</div>' if text else ""


def show_failure(stream: AnswerStream, texts: Texts, hidden: bool = False) -> str:
    if stream.error is None:
        return ""
    return show("failure", texts.failed_hidden if hidden else texts.failed.format(error=stream.error))


def pending(stream: AnswerStream, texts: Texts) -> str:
    return "" if stream.done else texts.waiting


def note(stream: AnswerStream, texts: Texts) -> str:
    """How many tokens, how fast, and why it ended where that was not by itself."""
    if not stream.num_tokens:
        return texts.cancelled if stream.finish == "cancelled" else ""
    tokens, seed = stream.num_tokens, stream.settings.seed
    figures = texts.rate.format(tokens=tokens, rate=stream.rate, seconds=stream.seconds, seed=seed)
    ends = {"cancelled": texts.cancelled, "length": texts.length}
    return " · ".join([figures, *filter(None, [ends.get(stream.finish or "")])])
