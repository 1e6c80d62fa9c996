"""Options that share their prompt's computation, against rows of prompt + option: time and memory.

    python bench/options.py                 # a few minutes on two cores

C-Eval questions with five shots, the options' texts scored, by a model of random weights with Qwen's vocabulary. Both
ways give the same log-probabilities, which is checked. Part of the ratio is that rows of their own make the logits of
the whole prompt, which weigh much in so narrow a model: at 4 options of 17 tokens after 315, sharing the tokens alone
would save a factor of 3.5. Writes bench/results/options.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from transformers import PreTrainedModel

from bench.measurement import Facts, Work, alternate, medians, processor, ratios
from bench.sources import ROOT, SHARED, tokenizer_path
from mini_qwen.chat import TokenRow
from mini_qwen.circumstances import circumstances
from mini_qwen.encoding import encode_text
from mini_qwen.exams import ChoiceTask, read_questions
from mini_qwen.model import NewModel, build_model
from mini_qwen.options import score_options
from mini_qwen.scoring import score_rows
from mini_qwen.shots import make_prompt
from mini_qwen.tokenizer import load_tokenizer

RESULT = Path(__file__).parent / "results/options.json"
SIZES = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
EVERY = 192  # 8 of the 1,346 questions, from all over the file
NUM_SHOTS = 5


def make_inputs() -> tuple[PreTrainedModel, list[list[int]], list[list[list[int]]]]:
    tokenizer = load_tokenizer(tokenizer_path())
    questions, shots = (str(SHARED / f"eval/ceval_{part}.parquet") for part in ("val", "dev"))
    task = ChoiceTask([questions], [shots], NUM_SHOTS, score="text")
    all_shots, prompts, options = read_questions(task.shots), [], []
    for question in read_questions(task.questions)[::EVERY]:
        own = [shot for shot in all_shots if shot.subject == question.subject][:NUM_SHOTS]
        prompt = make_prompt(task, question, own, chat=False)
        prompts.append(encode_text(tokenizer, [prompt.text])[0].tolist())
        options.append([ids.tolist() for ids in encode_text(tokenizer, list(prompt.options))])
    torch.manual_seed(0)
    base = str(ROOT / "models/Qwen2.5-0.5B-Instruct")
    args = NewModel(base_config=base, attn_implementation="sdpa", intermediate_size=1024, vocab_size=151_936, **SIZES)
    return build_model(args, tokenizer, "fp32", "pt").eval(), prompts, options


def score_shared(model: PreTrainedModel, prompts: list[list[int]], options: list[list[list[int]]]) -> list[float]:
    return [score.sum_log_prob for group in score_options(model, prompts, options, "shared") for score in group]


def score_alone(model: PreTrainedModel, prompts: list[list[int]], options: list[list[list[int]]]) -> list[float]:
    rows = [
        TokenRow(np.array(prompt + option, np.uint32), np.arange(len(prompt + option)) >= len(prompt))
        for prompt, group in zip(prompts, options, strict=True)
        for option in group
    ]
    return [score.sum_log_prob for score in score_rows(model, rows, "alone")]


WAYS = {"shared": score_shared, "alone": score_alone}


def variant(folder: Path, way: str) -> Work:
    inputs = make_inputs()

    def work() -> Facts:
        return {"mean_log_prob": round(float(np.mean(WAYS[way](*inputs))), 3)}

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    started, load = time.time(), os.getloadavg()[0]
    model, prompts, options = make_inputs()
    difference = float(np.abs(np.subtract(*(way(model, prompts, options) for way in WAYS.values()))).max())
    assert difference < 1e-3, difference
    with tempfile.TemporaryDirectory(prefix="mini_qwen_bench_") as folder:
        measured = alternate({way: partial(variant, way=way) for way in WAYS}, args.rounds, Path(folder))
    middle = medians(measured)
    found = ratios(middle["alone"], middle["shared"])
    print(found)
    data = {
        "prompts": len(prompts),
        "options": sum(map(len, options)),
        "mean_prompt_tokens": round(float(np.mean([len(prompt) for prompt in prompts])), 1),
        "mean_option_tokens": round(float(np.mean([len(option) for group in options for option in group])), 1),
        "parameters": model.num_parameters(),
        "largest_difference": float(f"{difference:.1e}"),
    }
    machine = {"processor": processor(), "load_before": load, "threads": torch.get_num_threads()}
    record = {"data": data, "ratios": found, "medians": middle, "rounds": measured}
    RESULT.write_text(json.dumps(circumstances(started) | machine | record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
