"""Learning per token: AdamW, tuned, against Muon for the matrices, on real text, at four small sizes.

    python bench/learning.py                       # about two hours on one core; finished runs are not repeated
    python bench/learning.py --parts rates goal    # some of its parts
    python bench/learning.py --parts               # only the record, of the runs that are finished

Needs the tokenizer of recipes/small. Every run is the real pretraining program with recipes/small/pt.yaml, sizes and
optimizer changed, on the same held-out rows; a seed decides the first weights and the order of the blocks. Parts:
`rates` (learning rates at A and B, one seed), `goal` (how short the candidate can be, several seeds), `law` (two more
sizes, one seed), `wall` (seconds a step, in turns), `levers` (other settings of the candidate at A, one seed; not in
the record yet). Writes bench/results/learning.json.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"

import numpy as np

from bench.learning_runs import Facts, Run, Study, adamw, decay, muon
from bench.measurement import processor
from mini_qwen.circumstances import circumstances

ROOT = Path(__file__).resolve().parents[1]
BASELINE_STEPS, TUNED_STEPS, WALL_STEPS, SEEDS = 400, 160, 20, (42, 43, 44)
COMPARED = {"hidden 64": SEEDS[:1], "hidden 96": SEEDS[:1], "A": SEEDS, "B": SEEDS}
LENGTHS = {"hidden 64": (50, 80), "hidden 96": (50, 80), "A": (50, 80, 120), "B": (50, 80)}  # of the candidate
ROUNDS = 3  # in which seconds are measured
FULL = 998_810_624  # parameters of recipes/pt.yaml
STUDENT = {1: 12.706, 2: 4.303}  # 97.5% quantile of Student's t, by degrees of freedom

# B's best is 1e-3, A's 2e-3; the smaller sizes go on from there.
ADAMW_RATES = {"hidden 64": (4e-3,), "hidden 96": (3e-3,), "A": (5e-4, 1e-3, 2e-3, 4e-3), "B": (5e-4, 1e-3, 2e-3)}
COSINE = ((8e-3, 2e-3), (1.6e-2, 4e-3), (1.6e-2, 8e-3), (3.2e-2, 4e-3))  # Muon's and AdamW's, at A
MUON_RATES = {"A": ((1.6e-2, 4e-3), (1.6e-2, 1.6e-2), (1.6e-2, 3.2e-2), (8e-3, 1.6e-2))}
MUON_RATES["B"] = ((1.6e-2, 1.6e-2), (8e-3, 1.6e-2))


def baselines(size: str) -> list[Run]:
    return [Run(size, BASELINE_STEPS, SEEDS[0], adamw(rate)) for rate in ADAMW_RATES[size]]


def candidates(size: str) -> list[Run]:
    return [Run(size, TUNED_STEPS, SEEDS[0], muon(*rates, **decay(TUNED_STEPS))) for rates in MUON_RATES[size]]


def pair(study: Study, size: str) -> tuple[Facts, Facts]:
    """Keys of the tuned baseline and of the tuned candidate; sizes without rates of their own take A's."""
    return study.best(baselines(size)), study.best(candidates(size if size in MUON_RATES else "A"))


def rates(study: Study) -> None:
    for rates_of_both in COSINE:
        study.run(Run("A", TUNED_STEPS, SEEDS[0], muon(*rates_of_both)))
    for size in ("A", "B"):
        pair(study, size)


def compare(study: Study, size: str) -> None:
    theirs, ours = pair(study, size)
    for seed in COMPARED[size]:
        study.run(Run(size, BASELINE_STEPS, seed, theirs))
        for steps in LENGTHS[size]:
            study.run(Run(size, steps, seed, ours | decay(steps)))


def goal(study: Study) -> None:
    for size in ("A", "B"):
        compare(study, size)


def law(study: Study) -> None:
    for size in ("hidden 96", "hidden 64"):
        compare(study, size)


def timed(study: Study, size: str, seed: int) -> list[Run]:
    theirs, ours = pair(study, size)
    return [Run(size, WALL_STEPS, seed, keys) for keys in (theirs, ours | decay(WALL_STEPS))]


def wall(study: Study) -> None:
    """Short runs without an evaluation on the way; the seed is the round."""
    for size in ("A", "B"):
        for seed in range(ROUNDS):
            for run in timed(study, size, seed):
                study.run(run)


def levers(study: Study) -> None:
    best, more = pair(study, "A")[1], 2 * TUNED_STEPS
    for keys in ({"max_grad_norm": 0.0}, {"adam_beta2": 0.95}, {"weight_decay": 0.1}):
        study.run(Run("A", TUNED_STEPS, SEEDS[0], best | keys))
    study.run(Run("A", more, SEEDS[0], best | decay(more) | {"per_device_train_batch_size": 4}))


PARTS = {"rates": rates, "goal": goal, "law": law, "wall": wall, "levers": levers}


def equal_steps(target: float, losses: dict[int, float]) -> float:
    """After how many steps the candidate's runs end at `target`: a line through log steps, between the nearest two.

    >>> round(equal_steps(6.5, {80: 7.0, 160: 6.0}), 1)
    113.1
    """
    points = sorted(losses.items())
    above = max(1, min(len(points) - 1, sum(loss > target for _, loss in points)))
    (first, high), (last, low) = points[above - 1], points[above]
    return float(first * (last / first) ** ((high - target) / (high - low)))


def interval(values: list[float]) -> Facts:
    """Mean, and the half of a 95% interval of Student's t, of independent seeds."""
    facts: Facts = {"mean": round(statistics.mean(values), 4), "seeds": [round(value, 4) for value in values]}
    if len(values) > 1:
        error = statistics.stdev(values) / len(values) ** 0.5
        facts["plus_minus"] = round(STUDENT[len(values) - 1] * error, 4)
    return facts


def sum_up(study: Study, size: str) -> Facts:
    """The comparison at a size: steps to the baseline's loss as a share of its steps and, at A and B, of its time."""
    theirs, ours = pair(study, size)
    seeds, lengths = COMPARED[size], LENGTHS[size]
    targets = [study.run(Run(size, BASELINE_STEPS, seed, theirs))["final_loss"] for seed in seeds]
    shorter = [{steps: Run(size, steps, seed, ours | decay(steps)) for steps in lengths} for seed in seeds]
    losses = [{steps: study.run(run)["final_loss"] for steps, run in runs.items()} for runs in shorter]
    tokens = interval([equal_steps(*both) / BASELINE_STEPS for both in zip(targets, losses, strict=True)])
    facts = {
        "parameters": study.run(Run(size, BASELINE_STEPS, SEEDS[0], theirs))["parameters"],
        "baseline": {"keys": theirs, "steps": BASELINE_STEPS, "final_loss": interval(targets)},
        "candidate": {"keys": ours, "final_loss": {n: interval([loss[n] for loss in losses]) for n in lengths}},
        "share_of_tokens": tokens,
    }
    if size not in MUON_RATES:
        return facts
    rounds = [[study.run(run)["seconds_per_step"] for run in timed(study, size, seed)] for seed in range(ROUNDS)]
    seconds = [statistics.median(each) for each in zip(*rounds, strict=True)]
    ratio = seconds[1] / seconds[0]
    time_share = {key: round(tokens[key] * ratio, 4) for key in ("mean", "plus_minus")}
    return facts | {"seconds_per_step": seconds, "times_a_step": round(ratio, 3), "share_of_time": time_share}


def fit_law(sizes: dict[str, Facts]) -> Facts:
    """log(share of tokens) = a + b log(parameters) by least squares over the sizes, and what it says of the 1B model.

    The interval is Student's for the line itself at that point: it knows of the scatter of these sizes only, and not
    of other batches, lengths of training or data.
    """
    x = np.log([facts["parameters"] for facts in sizes.values()])
    y = np.log([facts["share_of_tokens"]["mean"] for facts in sizes.values()])
    slope, constant = np.polyfit(x, y, 1)
    free, spread = len(x) - 2, float(((x - x.mean()) ** 2).sum())
    variance = float(((y - constant - slope * x) ** 2).sum()) / free
    at = np.log(FULL)
    error = STUDENT[free] * (variance * (1 / len(x) + (at - x.mean()) ** 2 / spread)) ** 0.5
    middle = constant + slope * at
    return {
        "slope": round(float(slope), 4),
        "slope_plus_minus": round(STUDENT[free] * (variance / spread) ** 0.5, 4),
        "share_of_tokens_at_the_full_size": float(f"{np.exp(middle):.3g}"),
        "interval": [float(f"{np.exp(middle + sign * error):.3g}") for sign in (-1, 1)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--corpus", default="../shared/data/corpus", help="a folder of rows {text: ...}")
    parser.add_argument("--runs", type=Path, default=ROOT / "results/learning", help="of finished runs, a file each")
    parser.add_argument("--minutes", type=float, default=600, help="no run is begun when so many have passed")
    args = parser.parse_args()
    started = time.time()
    if not Path(args.corpus).is_dir():
        raise SystemExit(f"{args.corpus} is not there: name a folder of texts with --corpus.")
    study = Study(args.runs, args.corpus, started + 60 * args.minutes)
    for part in args.parts:
        PARTS[part](study)
    sizes = {size: sum_up(study, size) for size in ADAMW_RATES}
    record = circumstances(started) | {"processor": processor(), "load": os.getloadavg()[0]}
    record |= {"sizes": sizes, "law": fit_law(sizes), "runs": list(study.runs.values())}
    (ROOT / "bench/results/learning.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"sizes": sizes, "law": record["law"]}, indent=1))


if __name__ == "__main__":
    main()
