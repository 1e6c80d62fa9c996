"""What of the fast recipe's gain is Muon's, the schedule's, the embedding's own rate: runs of 160 steps at size A.

    python bench/learning_apart.py               # a quarter of an hour on one core

Each run is one of bench/learning.py's, with one thing changed at a time, on the same rows and with the same seed.
Needs the tokenizer of recipes/small. Writes bench/results/learning_apart.json.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"

from tabulate import tabulate

from bench.learning import SEEDS, TUNED_STEPS
from bench.learning_runs import ROOT, Facts, Run, Study, adamw, decay, muon
from bench.measurement import processor
from mini_qwen.circumstances import circumstances

WSD = decay(TUNED_STEPS)
VARIANTS: dict[str, Facts] = {
    "AdamW 2e-3, cosine": adamw(2e-3),
    "AdamW 4e-3, cosine": adamw(4e-3),
    "AdamW 8e-3, cosine": adamw(8e-3),
    "AdamW 1.6e-2, cosine": adamw(1.6e-2),
    "AdamW 4e-3, WSD": adamw(4e-3) | WSD,
    "AdamW 8e-3, WSD": adamw(8e-3) | WSD,
    "Muon 8e-3, rest 4e-3, cosine": muon(8e-3, 4e-3),
    "Muon 8e-3, rest 1.6e-2, cosine": muon(8e-3, 1.6e-2),
    "Muon 8e-3, rest 4e-3, WSD": muon(8e-3, 4e-3, **WSD),
    "Muon 8e-3, rest 1.6e-2, WSD": muon(8e-3, 1.6e-2, **WSD),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="../shared/data/corpus", help="a folder of rows {text: ...}")
    parser.add_argument("--runs", type=Path, default=ROOT / "results/learning", help="of finished runs, a file each")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS[:1])
    args = parser.parse_args()
    started = time.time()
    study = Study(args.runs, args.corpus, ends_at=float("inf"))
    losses = {
        name: [study.run(Run("A", TUNED_STEPS, seed, keys))["final_loss"] for seed in args.seeds]
        for name, keys in VARIANTS.items()
    }
    print(tabulate(losses.items(), ("variant", f"held-out loss behind {TUNED_STEPS} steps"), "github"))
    record = circumstances(started) | {"processor": processor(), "load": os.getloadavg()[0], "seeds": args.seeds}
    record |= {"losses": losses, "runs": list(study.runs.values())}
    (ROOT / "bench/results/learning_apart.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
