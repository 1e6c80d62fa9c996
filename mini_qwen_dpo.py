"""Stage 3, direct preference optimisation: of two answers, the model learns to prefer the better one.

    bash run.sh dpo                                          # the full recipe, a process for each GPU
    python mini_qwen_dpo.py --config recipes/demo/dpo.yaml   # a CPU and mini_data

The recipe holds every hyperparameter; the command line overrides it, for example `--learning_rate 1e-6`.

Reads:  the checkpoint folder that mini_qwen_sft.py wrote, pairs from the recipe's train_files, and pairs from its
        test_files, which are only ever scored.
Writes: output_dir, with model, tokenizer, trainer_state.json, run.json, data_ledger.json and training_loss.png.
"""

from mini_qwen import run
from mini_qwen.model import TrainedModel, load_model
from mini_qwen.optimizer import make_optimizer
from mini_qwen.preferences import PreferenceData, prepare_preferences
from mini_qwen.preview import print_first_row
from mini_qwen.recipe import parse_recipe
from mini_qwen.tokenizer import load_tokenizer
from mini_qwen.trainers import PreparedDPOTrainer
from mini_qwen.training import PreferenceConfig


def main(argv: list[str] | None = None) -> None:
    recipe = parse_recipe(PreferenceData, PreferenceConfig, TrainedModel, argv=argv, default="recipes/dpo.yaml")
    data_args, training_args, model_args = recipe
    run.begin(training_args, *recipe)

    tokenizer = load_tokenizer(model_args.checkpoint)

    # Both answers of a pair end in <|im_end|>; a pair that is too long loses the middle of its question.
    train_pairs, test_pairs, ledger = prepare_preferences(data_args, tokenizer, training_args.max_length)
    run.show_data(training_args, ledger)

    model = load_model(model_args, tokenizer, training_args.precision, "dpo", training_args.low_memory)
    trainer = PreparedDPOTrainer(
        model=model,
        args=training_args,
        train_dataset=train_pairs,
        eval_dataset=test_pairs,
        processing_class=tokenizer,
        optimizers=(make_optimizer(model, training_args, training_args.muon_learning_rate), None),
    )
    run.show_start(trainer)
    print_first_row(trainer)  # see what is trained on before paying for it

    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    run.finish(trainer, result, ledger, *recipe)


if __name__ == "__main__":
    main()
