"""vLLM in place of the own engine: what this program hands over to it, and what it refuses since vLLM would not."""

import argparse
import json
import os
import shutil
from collections.abc import Iterable

from mini_qwen.access import is_local
from mini_qwen.model import check_checkpoint
from mini_qwen.sampling import Sampling


def check_vllm(host: str, own_limits: Iterable[str]) -> None:
    """Raises SystemExit for an address that others reach, and for limits that vLLM does not have."""
    if not is_local(host):
        raise SystemExit(
            f"host {host} can be reached from other machines, for which vLLM leaves too much open: it asks for a key "
            "at /v1 and few other paths, and answers at /invocations without one. Serve at 127.0.0.1, with a proxy in "
            "front that passes /v1 only."
        )
    for name in own_limits:
        raise SystemExit(f"--{name} is a limit of the own engine, and vLLM would not keep it: leave it out.")


def become_vllm(args: argparse.Namespace, default: Sampling, key: str | None) -> None:
    """Replace this process by `vllm serve` with the same address, name, key and default settings."""
    if shutil.which("vllm") is None:
        raise SystemExit("There is no program vllm on the PATH. docs/serving.md says how to install it (Linux, GPU).")
    check_checkpoint(args.checkpoint)
    settings = {name: getattr(default, name) for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
    command = ["vllm", "serve", args.checkpoint, "--host", args.host, "--port", str(args.port)]
    command += ["--served-model-name", args.name or args.checkpoint, "--max-num-seqs", str(args.parallel)]
    command += ["--generation-config", "vllm", "--override-generation-config", json.dumps(settings)]
    command += ["--allowed-origins", "[]"]  # else every web page may read the answers
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    os.execvpe("vllm", command, os.environ | quiet | ({} if key is None else {"VLLM_API_KEY": key}))
