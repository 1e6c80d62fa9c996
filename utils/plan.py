"""Say what a run needs before anybody pays for it: memory by part, disk, steps, FLOPs, hours, and what makes it fit.

    python utils/plan.py recipes/pt.yaml --gpus 6 --gpu H800 --tokens 15.95e9
    python utils/plan.py recipes/pt.yaml --gpus 6 --gpu H800 --tokens 15.95e9 --sweep
    python utils/plan.py recipes/dpo.yaml --model recipes/pt.yaml --gpu RTX4090 --rows 59338 --tokens 53e6

All figures are computed, none is measured; docs/scaling.md says from what, and how near memory has come to measured
peaks. Needs no GPU, no data and no checkpoint. Further --key value pairs override the recipe. The exit status is 1
when the run does not fit the GPU.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import yaml
from tabulate import tabulate

from mini_qwen.disk import gigabytes
from mini_qwen.plan import CONTEXT_BYTES, FRAGMENTATION, Machine, Run, sweep
from mini_qwen.plan_cures import cures
from mini_qwen.plan_parameters import count_parameters
from mini_qwen.plan_recipe import Recipe, disk_bytes, make_run, read_recipe
from mini_qwen.plan_time import GPUS, Network, flops_per_token

MACHINE_FILE = Path(__file__).resolve().parents[1] / "accelerate_config.yaml"
SEED_MFU = 0.20  # of the one run of the full recipe whose times are known: 6 x H800, docs/scaling.md


def count(text: str) -> int:
    """`15.95e9`, `15_950_000_000`."""
    number = float(text)
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(number)


def share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share above 0 and up to 1; 20% is 0.2")
    return number


def read_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe")
    parser.add_argument("--gpus", type=count, default=1, help="how many (default: 1)")
    parser.add_argument("--gpu", choices=list(GPUS), default="H100")
    parser.add_argument("--tokens", type=count, help="of an epoch (default: the ledger in output_dir)")
    parser.add_argument("--rows", type=count, help="of an epoch: blocks, conversations or pairs")
    parser.add_argument("--mfu", type=share, default=SEED_MFU, help="share of the peak (default: 0.2, the seed run's)")
    parser.add_argument("--zero", type=int, choices=range(4), help="default: accelerate_config.yaml's, 0 for one GPU")
    parser.add_argument("--model", help="of SFT and DPO without checkpoint: a folder with config.json, or a recipe")
    parser.add_argument("--stage", choices=["pt", "sft", "dpo"], help="default: from the recipe's name")
    parser.add_argument("--loss_head", choices=["chunked", "full"], help="default: the recipe's")
    parser.add_argument("--drop_rest", action="store_true", help="no smaller last step, as transformers 4.45 had it")
    parser.add_argument("--sweep", action="store_true", help="also on 1, 2, 4 ... 1,024 GPUs")
    network = parser.add_argument_group("for --sweep")
    usual = Network()
    network.add_argument("--gpus_per_node", type=count, default=usual.gpus_per_node)
    network.add_argument("--node_gb_s", type=float, help="each GPU's to its node, a direction (default: the GPU's)")
    network.add_argument("--network_gb_s", type=float, default=usual.between, help="to other nodes (default: 50)")
    network.add_argument("--link_share", type=share, default=usual.share, help="reached of both (default: 0.7)")
    return parser.parse_known_args(argv)


def stage_of_zero() -> int:
    machine_file = yaml.safe_load(MACHINE_FILE.read_text(encoding="utf-8"))
    return machine_file["deepspeed_config"]["zero_stage"]


def describe_hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 3600:,.0f} seconds"


def plan_rows(recipe: Recipe, run: Run, machine: Machine, args: argparse.Namespace) -> list[list[str]]:
    """What the plan says of everything but memory."""
    gpus, steps, hours = machine.gpus, run.steps(machine.gpus, args.drop_rest), run.hours(machine, args.mfu)
    each, number = disk_bytes(recipe, machine, steps)
    room = each * (number + 1) + 4 * count_parameters(run.config)
    name = {"pt": "blocks", "sft": "rows", "dpo": "pairs"}[recipe.stage]
    trained = run.trained_rows(gpus) * run.tokens / run.rows
    per_token = flops_per_token(run.config, run.tokens / run.rows / run.sides)
    return [
        ["parameters", f"{count_parameters(run.config):,}"],
        ["an epoch", f"{run.rows:,} {name}, {run.tokens:,} tokens"],
        ["a step", f"{run.micro} x {run.accumulation} x {gpus} GPUs = {run.rows_a_step(gpus):,} {name}"],
        ["tokens computed", f"{trained:,.0f}"],
        ["steps", f"{steps:,}"],
        ["FLOPs, PaLM convention", f"{run.all_flops(gpus):.4g}, {per_token:.4g} a token"],
        ["time", f"{describe_hours(hours)}, {gpus * hours:,.1f} GPU hours, at {args.mfu:.1%} MFU"],
        ["a checkpoint", gigabytes(each)],
        ["disk", f"{gigabytes(room)}: {number} and one that is being written, and the model"],
    ]


def memory_rows(run: Run, machine: Machine) -> list[list[str]]:
    """Gigabytes on each GPU, a part a line: the run's, and those of the other stages of ZeRO that it can have."""
    others = [replace(machine, zero=zero) for zero in run.stages if zero != machine.zero]
    columns = [run.memory(place) for place in (machine, *others)]
    lines = [[part, *(f"{column[part] / 1e9:,.2f}" for column in columns)] for part in columns[0]]
    return [*lines, ["memory of each GPU, GB", *(f"{sum(column.values()) / 1e9:,.2f}" for column in columns)]]


def print_plan(recipe: Recipe, run: Run, machine: Machine, args: argparse.Namespace) -> None:
    names = ["none", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    head = ["", f"this run, {names[machine.zero]}"]
    head += [names[zero] for zero in run.stages if zero != machine.zero]
    lines = plan_rows(recipe, run, machine, args) + memory_rows(run, machine)
    print(f"{args.recipe} on {machine.gpus} x {args.gpu}, {machine.gpu.teraflops:g} TFLOP/s each; all computed\n")
    align = ["left", *["right"] * (len(head) - 1)]
    print(tabulate(lines, headers=head, tablefmt="github", disable_numparse=True, colalign=align))


def print_cures(run: Run, machine: Machine) -> None:
    found = [[cure.change, f"{cure.num_bytes / 1e9:,.2f}"] for cure in cures(run, machine)]
    if found:
        print("\n" + tabulate(found, headers=["what makes it fit", "GB"], tablefmt="github", disable_numparse=True))
        return
    larger = [name for name, gpu in GPUS.items() if run.fits(replace(machine, gpu=gpu))]
    print("\nNo key of the recipe makes it fit." + f" It fits as it is: --gpu {', '.join(larger)}." * bool(larger))


def print_sweep(run: Run, machine: Machine, network: Network, mfu: float) -> None:
    print(
        f"\nComputing at {mfu:.1%} MFU; sending comes on top: {network.node:g} GB/s within a node of "
        f"{network.gpus_per_node}, {network.between:g} between nodes, {network.share:.0%} of it reached\n"
    )
    lines = [
        [
            *(f"{scale.gpus:,}", f"{scale.micro} x {scale.accumulation}"),
            *(f"{scale.rows_a_step:,}", f"{scale.steps:,}"),
            *(f"{scale.compute_s:.3f}", f"{scale.send_s:.3f}", f"{scale.efficiency:.0%}", f"{scale.hours:,.1f}"),
            *(f"{scale.hours * scale.gpus:,.0f}", f"{scale.gigabytes:.1f}", "yes" if scale.fits else "no"),
        ]
        for scale in sweep(run, machine, network, mfu)
    ]
    head = ["GPUs", "batch x accumulation", "rows a step", "steps", "computing, s a step", "sending, s a step"]
    head += ["efficiency", "hours", "GPU hours", "GB a GPU", "fits"]
    print(tabulate(lines, headers=head, tablefmt="github", disable_numparse=True, colalign=["right"] * len(head)))


def main(argv: list[str] | None = None) -> None:
    args, overrides = read_arguments(argv)
    usual = stage_of_zero() if args.zero is None else args.zero
    machine = Machine(GPUS[args.gpu], args.gpus, usual if args.gpus > 1 or args.zero is not None else 0)
    recipe = read_recipe(args.recipe, overrides, args.stage, args.model)
    run = make_run(recipe, machine, args.tokens, args.rows, args.loss_head)
    if args.sweep and run.alone:
        raise SystemExit(
            f"{args.recipe}: low_memory, and muon_learning_rate with max_grad_norm, work on one process; "
            "--sweep is of many."
        )
    print_plan(recipe, run, machine, args)
    total, fits = sum(run.memory(machine).values()), run.fits(machine)
    print(
        f"\n{total / 1e9:,.1f} GB {'fit' if fits else 'do not fit'} {machine.gpu.gigabytes:g} GB, of which "
        f"{CONTEXT_BYTES / 1e9:g} GB and {FRAGMENTATION:.0%} are set aside."
    )
    if not fits:
        print_cures(run, machine)
    if args.sweep:
        node = args.node_gb_s or machine.gpu.link
        network = Network(args.gpus_per_node, node, args.network_gb_s, args.link_share)
        print_sweep(run, replace(machine, zero=usual), network, args.mfu)
    if not fits:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
