"""Draw the loss curves of several runs into one picture.

    python utils/plot_losses.py results/pt results/pt_other --target losses.png

Reads the trainer_state.json of each run folder, such as a stage's output_dir or a folder of logs/.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mini_qwen.curves import plot_curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a trainer_state.json")
    parser.add_argument("--target", type=Path, default=Path("losses.png"), help="picture to write")
    args = parser.parse_args()
    for run in args.runs:
        if not (run / "trainer_state.json").is_file():
            raise SystemExit(f"'{run}' has no trainer_state.json. Name the folder that a stage wrote.")
    plot_curves({str(run): run / "trainer_state.json" for run in args.runs}, args.target)
    print(f"wrote {args.target}")


if __name__ == "__main__":
    main()
