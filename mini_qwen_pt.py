"""Stage 1, pretraining: a resized Qwen2.5 with random weights learns to continue documents.

    bash run.sh pt                                           # the full recipe, a process for each GPU
    python mini_qwen_pt.py --config recipes/demo/pt.yaml     # a CPU and mini_data

The recipe holds every hyperparameter; the command line overrides it, for example `--learning_rate 2e-4`.

Reads:  rows {"text": ...} from the recipe's train_files, and a tokenizer.
Writes: output_dir, with model, tokenizer, trainer_state.json, run.json, data_ledger.json and training_loss.png.
"""

from mini_qwen import run
from mini_qwen.blocks import BlockCollator
from mini_qwen.documents import DocumentData, prepare_documents
from mini_qwen.model import NewModel, build_model, make_config, needs_flat_rows
from mini_qwen.optimizer import make_optimizer
from mini_qwen.preview import print_first_row
from mini_qwen.recipe import parse_recipe
from mini_qwen.tokenizer import load_tokenizer
from mini_qwen.trainers import GuardedTrainer
from mini_qwen.training import PTConfig


def main(argv: list[str] | None = None) -> None:
    recipe = parse_recipe(DocumentData, PTConfig, NewModel, argv=argv, default="recipes/pt.yaml")
    data_args, training_args, model_args = recipe
    run.begin(training_args, *recipe)

    tokenizer = load_tokenizer(model_args.tokenizer)
    make_config(model_args, tokenizer)  # sizes that cannot work are refused before any data is touched

    # Documents become blocks of block_size tokens, once: one process makes them, the others wait and open its files.
    train_blocks, eval_blocks, ledger = prepare_documents(data_args, tokenizer, training_args.seed)
    run.show_data(training_args, ledger)

    model = build_model(model_args, tokenizer, training_args.precision, "pt", training_args.low_memory)
    trainer = GuardedTrainer(
        model=model,
        args=training_args,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
        data_collator=BlockCollator(tokenizer.pad_token_id, flatten=needs_flat_rows(model)),
        optimizers=(make_optimizer(model, training_args, training_args.muon_learning_rate), None),
    )
    run.show_start(trainer)
    print_first_row(trainer)  # see what is trained on before paying for it

    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    run.finish(trainer, result, ledger, *recipe)


if __name__ == "__main__":
    main()
