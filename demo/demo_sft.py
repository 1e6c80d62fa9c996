"""The demo of SFT: the real stage script with its demo recipe. Works from any folder, passes overrides on."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
command = [sys.executable, "mini_qwen_sft.py", "--config", "recipes/demo/sft.yaml", *sys.argv[1:]]
sys.exit(subprocess.run(command, cwd=ROOT).returncode)
