"""Score checkpoints side by side, or talk to one.

    python mini_qwen_eval.py --checkpoints results/pt results/sft results/dpo     # the recipe's parts, one report
    python mini_qwen_eval.py --config recipes/demo/eval.yaml                      # after the demo
    python mini_qwen_eval.py --parts prompts decoding --prompts my_questions.txt  # some parts, your own questions
    python mini_qwen_eval.py --chat results/dpo                                   # in the terminal

A checkpoint of the PT stage continues raw text, later ones answer in the chat template: config.json says which it is.
Finished parts are kept in output_dir/parts: a run that was stopped goes on, and nothing is measured twice.

Reads:  checkpoint folders, and the held-out files that the recipe names.
Writes: output_dir, with report.md, report.html (one file, opens anywhere), results.json and the pictures as PNG.
"""

import sys
import time

import torch
from transformers.utils import logging

from mini_qwen.circumstances import circumstances, device_name
from mini_qwen.evaluation import EvalData, check_sizes, evaluate, load_checkpoint
from mini_qwen.recipe import parse_recipe
from mini_qwen.report import check_records, write_report
from mini_qwen.study import measure_versions
from mini_qwen.terminal import talk
from mini_qwen.threads import threads_of_each
from mini_qwen.training import choose_precision
from mini_qwen.watch import call_when_orphaned, end_as_orphan


def main(argv: list[str] | None = None) -> None:
    call_when_orphaned(end_as_orphan)
    (args,) = parse_recipe(EvalData, argv=argv, default="recipes/eval.yaml")
    logging.set_verbosity_error()
    torch.set_num_threads(threads_of_each(1))

    if args.chat is not None:
        check_sizes(args)
        try:
            sampling = args.chat_sampling()
        except ValueError as error:
            raise SystemExit(str(error)) from None
        model, tokenizer = load_checkpoint(args.chat)
        talk(model, tokenizer, args.max_new_tokens, sampling, args.seed)
        return

    started = time.time()
    check_records(args.checkpoints)
    try:
        records = evaluate(args)
        found = circumstances(started) | {"device": device_name(), "precision": choose_precision()}
        found["versions"] |= measure_versions()
        print(write_report(args, records, found))
    except KeyboardInterrupt:
        print(f"\nStopped. Finished parts are kept in {args.output_dir}: the same command goes on.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
