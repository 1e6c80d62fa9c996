"""The demo of SFT: the real stage script with its demo recipe. Works from any folder, passes overrides on."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.chdir(ROOT)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the demo is small enough for one of several
# In place of this program, so that a signal to it reaches the stage.
os.execv(sys.executable, [sys.executable, "mini_qwen_sft.py", "--config", "recipes/demo/sft.yaml", *sys.argv[1:]])
