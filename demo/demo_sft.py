"""The demo of SFT: the real stage script with its demo recipe. Works from any folder, passes overrides on."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
command = [sys.executable, "mini_qwen_sft.py", "--config", "recipes/demo/sft.yaml", *sys.argv[1:]]
one_gpu = {"CUDA_VISIBLE_DEVICES": "0", **os.environ}  # the demo is small enough for one of several
sys.exit(subprocess.run(command, cwd=ROOT, env=one_gpu).returncode)
