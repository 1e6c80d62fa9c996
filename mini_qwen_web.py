"""Talk to models on a web page, or let several answer side by side and vote.

    python mini_qwen_web.py demo_results/dpo                                  # http://127.0.0.1:7860
    python mini_qwen_web.py demo_results/pt demo_results/sft demo_results/dpo # with an arena of the three
    python mini_qwen_web.py results/dpo http://127.0.0.1:8000/v1#other        # and an OpenAI-compatible server

Reads:  checkpoint folders, the URLs named, the presets.
Writes: the votes of the arena, a JSON line each. `python utils/votes_to_pairs.py` makes DPO pairs of them.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports, which take seconds, shows no traceback

import argparse
import os
from pathlib import Path

from mini_qwen.model_sources import KEYS_VARIABLE, open_backends
from mini_qwen.presets import read_presets
from mini_qwen.votes import check_votes
from mini_qwen.watch import call_when_orphaned, end_as_orphan
from mini_qwen.web import PASSWORD_VARIABLE, build_page, read_password, serve_page
from mini_qwen.web_texts import choose_texts

PRESETS = Path(__file__).parent / "mini_data/arena/presets.csv"
DEMO = Path("demo_results/dpo")  # where `bash run.sh demo` leaves its last checkpoint


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    models = f"checkpoint folders or URLs, four at most; the arena needs two (default: {DEMO}, if it is there)"
    parser.add_argument("models", nargs="*", help=models)
    parser.add_argument("--host", default="127.0.0.1", help="another one needs a password (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--user", default="mini_qwen", help="the name that goes with the password")
    parser.add_argument("--password", help=f"better in {PASSWORD_VARIABLE}, where no list of processes shows it")
    parser.add_argument(
        "--api_keys", nargs="+", default=[], help=f"one for each URL: env:NAME, none, or the key; or {KEYS_VARIABLE}"
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds of silence that a URL is granted")
    parser.add_argument("--presets", default=str(PRESETS), help="questions to choose from: csv or txt")
    parser.add_argument("--votes", type=Path, default=Path("results/arena/votes.jsonl"))
    parser.add_argument("--language", choices=["auto", "zh", "en"], default="auto", help="auto: as LANG says")
    parser.add_argument("--parallel", type=int, default=4, help="answers that are written at once")
    args, unknown = parser.parse_known_intermixed_args(argv)  # models may stand before and behind options
    if unknown:
        names = ", ".join(word.partition("=")[0] for word in unknown if word.startswith("-"))
        raise SystemExit(f"Unknown: {names}. `--help` lists what there is.")  # not their values: one may be a secret
    if args.parallel < 1 or args.timeout <= 0 or not 0 < args.port < 65536:
        raise SystemExit("--parallel must be 1 or more, --timeout above 0, and --port from 1 to 65535.")
    if not args.models and DEMO.is_dir():
        print(f"No model is named, so the demo's is taken: {DEMO}", flush=True)
        args.models = [str(DEMO)]
    return args


def main(argv: list[str] | None = None) -> None:
    call_when_orphaned(end_as_orphan)
    args = read_arguments(argv)
    # At once, not by an exception: browsers keep their connections open, and a thread that is computing an answer
    # aborts a process that ends in the usual way. Nothing is lost: a vote is on the disk as a whole, or not at all.
    before = {number: signal.signal(number, lambda *_: os._exit(0)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        serve(args)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(args: argparse.Namespace) -> None:
    """Load the models and show the page until a signal comes."""
    password = read_password(args.host, args.password)
    presets = read_presets(args.presets)
    if args.models:
        check_votes(args.votes)  # before the models are loaded, which takes a while
    backends = open_backends(args.models, args.api_keys, args.parallel, args.timeout)
    page = build_page(backends, presets, args.votes, choose_texts(args.language), args.parallel)
    serve_page(page, args.host, args.port, args.user, password)


if __name__ == "__main__":
    main()
