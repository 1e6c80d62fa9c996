"""The server under 1, 2, 4 and 8 clients: answers and tokens a second, and how long the first token takes.

    bash run.sh demo && python bench/serving.py                  # about a minute and a half on two cores
    python bench/serving.py --checkpoint results/dpo --seconds 60

A server of its own is started for the checkpoint as it comes: four answers at once, further ones wait. Each client
asks one question after the other over one connection, streamed, drawn at the settings of the chat. Questions and seeds
are the same for every number of clients, and so must the answers be. Writes bench/results/serving.json.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import httpx
from tabulate import tabulate

from bench.measurement import processor
from mini_qwen.circumstances import circumstances

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "serving.json"
CLIENTS = (1, 2, 4, 8)
QUESTIONS = (
    "Which city does Anna live in?",
    "What food does Victor like to eat?",
    "小明养的动物是什么？",
    "小雪的家在哪个城市？",
    "为什么天空是蓝色的",
    "推荐一些中国的美食",
)
NUM_SEEDS = 8  # of each question
# Number of the question, text, tokens, seconds to the first and to the last token.
Answered = tuple[int, str, int, float, float]


def ask(client: httpx.Client, number: int, max_tokens: int) -> Answered:
    question, seed = QUESTIONS[number % len(QUESTIONS)], number // len(QUESTIONS)
    body = {"messages": [{"role": "user", "content": question}], "seed": seed, "max_tokens": max_tokens}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    started = time.perf_counter()
    first, text, tokens = 0.0, "", 0
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line or line == "data: [DONE]":
                continue
            part = json.loads(line.removeprefix("data: "))
            piece = part["choices"][0]["delta"].get("content", "") if part["choices"] else ""
            first = first or (time.perf_counter() - started if piece else 0.0)
            text += piece
            tokens = part["usage"]["completion_tokens"] if part["usage"] else tokens
    last = time.perf_counter() - started
    return number, text, tokens, first or last, last


def load(url: str, num_clients: int, seconds: float, max_tokens: int) -> list[Answered]:
    """All answers that so many clients get; each ends with the answer in whose midst the time is up."""
    answers: list[Answered] = []
    ends_at = time.perf_counter() + seconds

    def work(own: int) -> None:
        with httpx.Client(base_url=url, timeout=600, verify=False) as client:
            for count in itertools.count():
                if time.perf_counter() > ends_at:
                    return
                number = (own * 7 + count * 11) % (len(QUESTIONS) * NUM_SEEDS)
                answers.append(ask(client, number, max_tokens))

    with ThreadPoolExecutor(num_clients) as pool:
        list(pool.map(work, range(num_clients)))  # raises what a client met
    return answers


def measure(url: str, num_clients: int, seconds: float, max_tokens: int) -> tuple[dict[str, Any], list[Answered]]:
    started = time.perf_counter()
    answers = load(url, num_clients, seconds, max_tokens)
    wall = time.perf_counter() - started
    first = sorted(answer[3] for answer in answers)
    facts = {
        "answers": len(answers),
        "answers_per_s": round(len(answers) / wall, 2),
        "tokens_per_s": round(sum(answer[2] for answer in answers) / wall, 1),
        "first_token_ms": round(1000 * statistics.median(first), 1),
        "first_token_p95_ms": round(1000 * first[int(0.95 * (len(first) - 1))], 1),
        "answer_ms": round(1000 * statistics.median(answer[4] for answer in answers), 1),
    }
    print(f"{num_clients} clients: {facts}", flush=True)
    return facts, answers


def start_server(checkpoint: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "mini_qwen_serve.py", checkpoint, "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if " is served at " in line:
            return server, line.partition(" is served at ")[2].partition("/v1")[0]
    raise SystemExit(f"The server for '{checkpoint}' did not start. Run mini_qwen_serve.py to see why.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo_results/dpo", help="folder; that of the demo")
    parser.add_argument("--seconds", type=float, default=20, help="for each number of clients")
    parser.add_argument("--max_tokens", type=int, default=64)
    args = parser.parse_args()
    started = time.time()
    server, url = start_server(args.checkpoint)
    try:
        load(url, 1, 2, args.max_tokens)  # the first answers of a process are slower
        measured = {number: measure(url, number, args.seconds, args.max_tokens) for number in CLIENTS}
    finally:
        server.terminate()
        server.wait(timeout=60)
    texts: dict[int, set[str]] = {}
    for number, text, *_ in itertools.chain(*(answers for _, answers in measured.values())):
        texts.setdefault(number, set()).add(text)
    record = circumstances(started) | {"processor": processor(), "checkpoint": args.checkpoint}
    record |= {"seconds_each": args.seconds, "max_tokens": args.max_tokens}
    record["clients"] = {str(number): facts for number, (facts, _) in measured.items()}
    record["different_answers"] = len(set().union(*texts.values()))
    record["same_answers"] = all(len(found) == 1 for found in texts.values())
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    columns = ["answers_per_s", "tokens_per_s", "first_token_ms", "first_token_p95_ms", "answer_ms"]
    rows = [[number, *(facts[column] for column in columns)] for number, (facts, _) in measured.items()]
    print(tabulate(rows, headers=["clients", *columns]))
    print(f"same answers for every number of clients: {record['same_answers']}")


if __name__ == "__main__":
    main()
