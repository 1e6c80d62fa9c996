"""A model card for the Hugging Face Hub, written from the run's own records: what none of them says, it does not."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from mini_qwen.comparison import compared_figures
from mini_qwen.export import Checkpoint
from mini_qwen.lineage import Run, publishable, read_lineage, read_record, read_run, shorten
from mini_qwen.markdown import escape_line
from mini_qwen.page import Table, Text, markdown_part

UNKNOWN = "not recorded"
NO_MEASURE = ("checkpoints", "output_dir", "chat", "temperature", "top_p", "repetition_penalty")


def make_card(
    checkpoint: Checkpoint, license_name: str | None, languages: list[str], results: str | None, repo_id: str | None
) -> str:
    """The text of README.md.

    Args:
        license_name: as the Hub spells it, such as `apache-2.0`; None: the card says that none was named.
        languages: tags such as `zh` and `en`; none are guessed.
        results: the output_dir of an evaluation, or its results.json.
        repo_id: where the card is going to be, for its examples.

    Raises SystemExit for records that cannot be read, and for an evaluation that did not measure this checkpoint.
    """
    runs = read_lineage(checkpoint.folder)
    evaluation = [] if results is None else evaluation_blocks(checkpoint.folder, Path(results))
    missing = [item for run in runs for item in run.missing]
    missing += ["the licence"] * (license_name is None) + ["the languages"] * (not languages)
    missing += ["an evaluation"] * (results is None)
    blocks = [
        front_matter(license_name, languages),
        f"# {escape_line(repo_id or checkpoint.name)}",
        paragraph(introduction(checkpoint)),
        "## Use",
        fenced(usage(checkpoint, repo_id or checkpoint.name), "python"),
        "## Model",
        table(["", "value"], model_rows(checkpoint)),
        "## Training",
        table(["", *(run.name for run in runs)], training_rows(runs)),
        paragraph("Tokens are those of the training rows, gone through as often as the epochs say."),
        "## Recipes",
        *(block for run in runs for block in recipe_blocks(run)),
        "## Evaluation",
        *(evaluation or [paragraph("No evaluation was given when this card was written.")]),
        "## Not recorded",
        paragraph("This card was written from the records of the runs. " + what_is_missing(missing)),
    ]
    return "\n\n".join(blocks) + "\n"


def front_matter(license_name: str | None, languages: list[str]) -> str:
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    values |= {"license": license_name} if license_name else {}
    values |= {"language": languages} if languages else {}
    values["tags"] = ["qwen2", "mini_qwen"]
    return f"---\n{dump(values)}---"


def introduction(checkpoint: Checkpoint) -> str:
    manner = "It answers in ChatML" if checkpoint.speaks_chat else "It continues raw text and has no chat template"
    return (
        f"A language model of {checkpoint.num_weights:,} parameters in the architecture of Qwen2.5, trained with "
        f"mini_qwen. Its last stage was {checkpoint.stage}. {manner}; {checkpoint.tokenizer.eos_token} ends a text."
    )


def usage(checkpoint: Checkpoint, name: str) -> str:
    prompt = 'prompt = tokenizer("Once upon a time", return_tensors="pt")'
    if checkpoint.speaks_chat:
        prompt = (
            'turns = [{"role": "user", "content": "Who are you?"}]\nprompt = tokenizer.apply_chat_template(\n'
            '    turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)'
        )
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")\n'
        f"{prompt}\n"
        "answer = model.generate(**prompt, max_new_tokens=128)\n"
        'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))'
    )


def model_rows(checkpoint: Checkpoint) -> list[list[str]]:
    config = checkpoint.config
    values = {
        "parameters": checkpoint.num_weights,
        "type of the weights": checkpoint.dtype_name,
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "attention heads": config.num_attention_heads,
        "key-value heads": config.num_key_value_heads,
        "feed-forward size": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "context, tokens": config.max_position_embeddings,
        "embedding and output weight": "one" if config.tie_word_embeddings else "two",
    }
    return [[key, shown(value)] for key, value in values.items()]


def training_rows(runs: list[Run]) -> list[list[str]]:
    columns = [run.facts() for run in runs]
    return [[key, *(shown(column[key]) for column in columns)] for key in columns[0]]


def recipe_blocks(run: Run) -> list[str]:
    recipe = publishable(run.record.get("recipe"))
    return [
        f"### {escape_line(run.name)}",
        fenced(dump(recipe), "yaml") if recipe else paragraph(f"{UNKNOWN.capitalize()}."),
    ]


def evaluation_blocks(folder: Path, results: Path) -> list[str]:
    file = results / "results.json" if results.is_dir() else results
    evaluation = read_record(file)
    if evaluation is None or not isinstance(evaluation.get("checkpoints"), list):
        raise SystemExit(f"--results {results}: there is no results.json of an evaluation. Name its output_dir.")
    records = {record["checkpoint"]: record for record in evaluation["checkpoints"]}
    found = [record for path, record in records.items() if Path(path).resolve() == folder.resolve()]
    if not found:
        raise SystemExit(
            f"--results {results} is about {', '.join(records)}, not about '{folder}'. Evaluate that first."
        )
    if not is_of(found[0], read_run(folder)):
        raise SystemExit(
            f"--results {results} measured another run of '{folder}': its steps, seconds or last loss differ. "
            "Evaluate this one."
        )
    rows = [
        [figure.name, f"{figure.value:.4g}", f"{figure.standard_error:.2g}" if figure.standard_error else ""]
        for figure in compared_figures(found[0])
    ]
    keys = ("finished", "commit", "device", "precision", "versions")
    measured = [[key, shown(publishable(evaluation.get(key)))] for key in keys]
    recipe = {key: value for key, value in evaluation.get("recipe", {}).items() if key not in NO_MEASURE}
    return [
        table(["figure", "value", "standard error"], rows),
        paragraph("Answers are the most likely tokens. How it was measured:"),
        table(["", "value"], measured),
        fenced(dump(publishable(recipe)), "yaml"),
    ]


def is_of(record: dict[str, Any], run: Run) -> bool:
    """Whether an evaluation's record is of this run, as far as the two have facts in common."""
    facts = {"steps": run.state.get("global_step"), "seconds": run.record.get("seconds"), "last_loss": run.last_loss}
    return all(record.get(key) in (None, value) for key, value in facts.items() if value is not None)


def what_is_missing(missing: list[str]) -> str:
    if not missing:
        return "Nothing that it asks for was missing."
    licence = "\n\nWithout a licence nobody else may use the model: name one at the top of this file."
    return f"Missing were: {', '.join(missing)}." + licence * ("the licence" in missing)


def shown(value: Any) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else shorten(value) if isinstance(value, str) else json.dumps(value)


def table(header: list[str], rows: list[list[str]]) -> str:
    return markdown_part(Table(header, rows), Path())


def paragraph(text: str) -> str:
    return markdown_part(Text(text), Path())


def fenced(text: str, language: str) -> str:
    """A block of code, whose fence is longer than any run of its sign in the text."""
    runs = [len(run) for run in re.findall("`+", text)]
    fence = "`" * max(3, *(run + 1 for run in runs), 3)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def dump(values: Any) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
