"""An OpenAI-compatible API for a checkpoint.

    python mini_qwen_serve.py demo_results/dpo                                  # http://127.0.0.1:8000/v1
    MINI_QWEN_API_KEY=... python mini_qwen_serve.py results/dpo --host 0.0.0.0  # for others, with a key
    python mini_qwen_serve.py results/dpo --engine vllm                         # the same address, served by vLLM

The answers are those of `mini_qwen_eval.py --chat` with the same seed and settings. docs/serving.md says the rest.
Reads a checkpoint folder. Writes nothing.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports, which take seconds, shows no traceback

import argparse
import logging
import os
import socket
import sys

from transformers.utils import logging as transformers_logging

from mini_qwen.access import address_of, bind, choose_key
from mini_qwen.api_requests import Limits
from mini_qwen.engine import Engine
from mini_qwen.evaluation import EvalData
from mini_qwen.files import brief
from mini_qwen.sampling import Sampling
from mini_qwen.server import Server, make_app
from mini_qwen.vllm_server import become_vllm, check_vllm
from mini_qwen.watch import call_when_orphaned, end_as_orphan

CHAT = EvalData([]).chat_sampling()
OWN_LIMITS = {  # of the own engine: what is usual, and what it is
    "waiting": (32, "requests that may wait beside them"),
    "max_tokens": (Limits.max_tokens, "longest answer that may be asked"),
    "default_tokens": (Limits.default_tokens, "where none is asked for"),
    "max_bytes": (Limits.max_bytes, "longest body of a request"),
}
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("checkpoint", help="the folder that a stage wrote")
    parser.add_argument("--host", default="127.0.0.1", help="any other needs a key and the own engine")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--api_key", help="what clients must send; better in the environment, MINI_QWEN_API_KEY")
    parser.add_argument("--name", help="what clients call the model; the folder when nothing is said")
    parser.add_argument("--parallel", type=int, default=4, help="answers at once, a token of each in turn")
    for key, (usual, words) in OWN_LIMITS.items():
        parser.add_argument(f"--{key}", type=int, default=argparse.SUPPRESS, help=f"{words} (default: {usual:,})")
    parser.add_argument("--temperature", type=float, default=CHAT.temperature, help="where a request names none")
    parser.add_argument("--top_p", type=float, default=CHAT.top_p)
    parser.add_argument("--top_k", type=int, default=CHAT.top_k)
    parser.add_argument("--repetition_penalty", type=float, default=CHAT.repetition_penalty)
    parser.add_argument("--engine", choices=["own", "vllm"], default="own")
    given = vars(parser.parse_args(argv))
    if given["engine"] == "vllm":
        check_vllm(given["host"], [key for key in OWN_LIMITS if key in given])
    args = argparse.Namespace(**{key: usual for key, (usual, _) in OWN_LIMITS.items()} | given)
    for key, least in {"parallel": 1, "waiting": 0, "max_tokens": 1, "default_tokens": 1, "max_bytes": 1}.items():
        if getattr(args, key) < least:
            raise SystemExit(f"{key} is {getattr(args, key)}, but must be {least} or more.")
    return args


def serve(args: argparse.Namespace, default: Sampling, key: str | None, listener: socket.socket) -> None:
    """Load the checkpoint and answer until a signal comes."""
    limits = Limits(args.max_tokens, args.default_tokens, args.max_bytes)
    try:
        engine = Engine(args.checkpoint, args.parallel, args.name, args.waiting)
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"'{args.checkpoint}' cannot be loaded: {brief(error)}") from None
    manner = "chat" if engine.speaks_chat else "raw continuation (a pretrained checkpoint)"
    ready = f"{engine.name}, {manner}, is served at {address_of(listener)}/v1 - Ctrl-C ends it"
    try:
        Server(make_app(engine, default, limits, key), engine, ready).run(sockets=[listener])
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if not engine.close():
            os._exit(0)  # a long prompt is still computed; its thread would not let the process end


def main(argv: list[str] | None = None) -> None:
    args = read_arguments(argv)
    key = choose_key(args.host, args.api_key)
    try:
        default = Sampling(args.temperature, args.top_p, args.top_k, args.repetition_penalty)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if args.engine == "vllm":
        become_vllm(args, default, key)
    call_when_orphaned(end_as_orphan)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("uvicorn.access").setLevel(logging.INFO)
    before = {number: signal.signal(number, lambda *_: sys.exit(0)) for number in SIGNALS}
    try:
        with bind(args.host, args.port) as listener:
            serve(args, default, key, listener)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
