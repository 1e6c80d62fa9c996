"""Controls of the web page: how answers are drawn, presets, and what every listener to a button has in common."""

import random
from collections.abc import Sequence
from typing import Any

import gradio as gr

from mini_qwen.backends import Backend, Settings
from mini_qwen.evaluation import EvalData
from mini_qwen.presets import Preset
from mini_qwen.sampling import Sampling
from mini_qwen.web_texts import Texts

DEFAULTS = EvalData([]).chat_sampling()  # those of `mini_qwen_eval.py --chat`
MAX_NEW_TOKENS = 256
LONGEST = 4096  # tokens, where no model says how much it can read
NEW_SEED = -1
PLAIN: dict[str, Any] = {"apply_default_css": False}  # of gr.HTML; web_html.CSS has the page's own

# No progress bar over what streams, and nothing offered to programs: the API is mini_qwen_serve.py's.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
AT_ONCE: dict[str, Any] = QUIET | {"queue": False}  # also while all places for answers are taken


def add_controls(backends: Sequence[Backend], place: str, texts: Texts) -> list[Any]:
    """The sliders, whose values `read_settings` takes in this order."""
    longest = max((backend.context or LONGEST for backend in backends), default=LONGEST)

    def slider(key: str, low: float, high: float, step: float, value: float) -> gr.Slider:
        return gr.Slider(low, high, value=value, step=step, label=getattr(texts, key), elem_id=f"{place}-{key}")

    return [
        slider("temperature", 0, 2, 0.05, DEFAULTS.temperature),
        slider("top_p", 0.05, 1, 0.05, DEFAULTS.top_p),
        slider("top_k", 0, 200, 1, DEFAULTS.top_k),
        slider("repetition_penalty", 1, 2, 0.05, DEFAULTS.repetition_penalty),
        slider("max_new_tokens", 1, longest, 1, min(MAX_NEW_TOKENS, longest)),
        gr.Number(0, label=texts.seed, precision=0, minimum=NEW_SEED, elem_id=f"{place}-seed"),
    ]


def read_settings(
    temperature: float,
    top_p: float,
    top_k: float,
    repetition_penalty: float,
    max_new_tokens: float,
    seed: float | None,
) -> Settings:
    """The settings that the sliders stand at. An empty seed is another one each time, as -1 is."""
    try:
        sampling = Sampling(float(temperature), float(top_p), int(top_k), float(repetition_penalty))
        fresh = seed is None or seed <= NEW_SEED
        return Settings(sampling, int(max_new_tokens), random.randrange(2**31) if fresh else int(seed))
    except (TypeError, ValueError, OverflowError) as error:
        raise gr.Error(str(error)) from None


def add_presets(presets: Sequence[Preset], place: str, texts: Texts, prompt: gr.Textbox, system: gr.Textbox) -> None:
    """A menu that writes the chosen preset into the two boxes."""
    if not presets:
        return
    by_name = {preset.name: preset for preset in presets}

    def choose(name: str) -> tuple[str, str]:
        return by_name[name].prompt, by_name[name].system

    menu = gr.Dropdown(list(by_name), value=None, label=texts.presets, elem_id=f"{place}-presets")
    menu.input(choose, menu, [prompt, system], **AT_ONCE)


def clean(text: str | None) -> str:
    """What was typed, in characters that UTF-8 can hold: a browser may send half of a pair."""
    return (text or "").encode(errors="replace").decode()
