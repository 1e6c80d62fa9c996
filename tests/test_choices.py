"""mini_qwen/choices.py, exams.py, shots.py: lm-eval's prompts and accuracies, on questions that were checked."""

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from conftest import ROOT, MakeModel, WriteRows
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.choices import ChoiceTask, check_choices, score_choices
from mini_qwen.exams import Question, read_questions
from mini_qwen.harness import HarnessModel
from mini_qwen.options import score_options
from mini_qwen.recipe import check_type
from mini_qwen.shots import is_same, make_prompt

TASKS = Path(lm_eval.__file__).parent / "tasks"
CMMLU = "以下是关于{subject}的单项选择题，请直接给出正确答案的选项。"
FACTS = ["1+1=2", "2+2=4", "3+3=6", "4+4=8", "5+5=10", "6+6=12", "7+7=14"]


def row(number: int, subject: str = "sums", **values: Any) -> dict[str, Any]:
    question, right = FACTS[number].split("=")
    options = {"A": "1", "B": "3", "C": "5", "D": "7"}
    letter = "ABCD"[number % 4]
    return {"subject": subject, "question": f" {question}=? ", **options, letter: right, "answer": letter} | values


@pytest.fixture
def files(write_rows: WriteRows) -> tuple[str, str]:
    """Seven questions of two subjects, five shots of each."""
    questions = [row(number, "sums" if number < 4 else "more_sums") for number in range(7)]
    shots = [
        row(number, subject, question=f"{subject} {number}?")
        for subject in ("sums", "more_sums")
        for number in range(5)
    ]
    return str(write_rows("questions.jsonl", questions)), str(write_rows("shots.parquet", shots))


@pytest.fixture(scope="module")
def model(tiny_model: MakeModel) -> PreTrainedModel:
    return tiny_model()


@pytest.mark.parametrize(
    ("folder", "file", "template", "language", "description", "title"),
    [
        ("ceval", "ceval-valid_accountant", "_default_ceval_yaml", "zh", None, "注册会计师"),
        ("cmmlu", "cmmlu_agronomy", "_default_template_yaml", "zh", CMMLU, "农学"),
        ("mmlu/default", "mmlu_abstract_algebra", "_default_template_yaml", "en", None, "abstract algebra"),
    ],
)
@pytest.mark.parametrize("num_shots", [0, 5])
def test_prompts_are_those_of_lm_eval(
    write_rows: WriteRows,
    folder: str,
    file: str,
    template: str,
    language: Any,
    description: str | None,
    title: str,
    num_shots: int,
) -> None:
    subject = {"subject": "abstract_algebra"} if language == "en" else {"subject": "x", "subject_zh": title}
    rows = [row(number, **subject) for number in range(6)]
    path = str(write_rows("rows.jsonl", rows))
    task = ChoiceTask([path], [path], num_shots, language=language, description=description)
    *shots, question = read_questions([path])
    prompt = make_prompt(task, question, shots[:num_shots], chat=False)

    config = yaml.safe_load((TASKS / folder / template).read_text(encoding="utf-8"))
    config |= yaml.safe_load((TASKS / folder / f"{file}.yaml").read_text(encoding="utf-8"))
    docs = [
        values | {"Question": values["question"], "Answer": values["answer"], "choices": [values[x] for x in "ABCD"]}
        for values in rows
    ]
    if language == "en":
        docs = [doc | {"answer": "ABCD".index(doc["answer"])} for doc in docs]
    split = config.get("validation_split") or config["test_split"]
    data = {split: Dataset.from_list(docs[5:]), config["fewshot_split"]: Dataset.from_list(docs[:5])}
    for key in ("include", "dataset_path", "dataset_name", "task_alias", "tag"):
        config.pop(key, None)
    theirs = ConfigurableTask(config=config | {"custom_dataset": lambda **_: data, "num_fewshot": num_shots})
    assert prompt.text == theirs.fewshot_context(docs[5], num_shots)
    assert [(prompt.text, prompt.delimiter + option) for option in prompt.options] == [
        request.args for request in theirs.construct_requests(docs[5], prompt.text)
    ]


def test_a_text_prompt_lists_no_options() -> None:
    question = Question("s", "s", "2+2=?", ("3", "4"), 1, "row 0")
    shot = Question("s", "s", "1+1=?", ("2", "5"), 0, "row 1")

    def prompt(language: Any, talks: bool) -> tuple[str, str]:
        task = ChoiceTask(["x"], score="text", language=language, chat=talks)
        return make_prompt(task, question, [shot], chat=talks)[:2]

    assert prompt("en", False) == ("1+1=?\nAnswer: 2\n\n2+2=?\nAnswer:", " ")
    assert prompt("zh", False) == ("1+1=?\n答案：2\n\n2+2=?\n答案：", "")
    assert prompt("en", True) == ("1+1=?\n2\n\n2+2=?", "")


@pytest.mark.parametrize("score", ["letter", "text"])
@pytest.mark.parametrize("chat", [False, True])
def test_accuracies_are_lm_evals_and_ours(
    tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase, files: tuple[str, str], score: Any, chat: bool
) -> None:
    model = tiny_model(stage="sft")
    task = ChoiceTask([files[0]], [files[1]], 2, score=score, language="en", chat=chat)
    figures = score_choices(model, tokenizer, {"sums": task}, 2048, 3)["sums"]
    harness = HarnessModel(model, tokenizer, chat)
    questions, shots = read_questions([files[0]]), read_questions([files[1]])
    right: dict[str, list[bool]] = {"sums": [], "more_sums": []}
    by_prior, by_length = [], []
    without_question: list[bool] = []
    for question in questions:
        own = [shot for shot in shots if shot.subject == question.subject][:2]
        prompt = make_prompt(task, question, own, chat)

        def score_after(context: str, prompt: Any = prompt) -> list[float]:
            pairs = [harness.encode_pair(context, prompt.delimiter + option) for option in prompt.options]
            scores = [score_options(model, [before], [[after]], "test")[0][0] for before, after in pairs]
            return [score.sum_log_prob for score in scores]

        totals, before = score_after(prompt.text), score_after("Answer:")
        right[question.subject].append(totals.index(max(totals)) == question.right)
        without_question.append(before.index(max(before)) == question.right)
        gains = [total - prior for total, prior in zip(totals, before, strict=True)]
        by_prior.append(gains.index(max(gains)) == question.right)
        shares = [total / len(option) for total, option in zip(totals, prompt.options, strict=True)]
        by_length.append(shares.index(max(shares)) == question.right)
    flags = right["sums"] + right["more_sums"]
    accuracy = sum(flags) / 7
    assert figures["accuracy"] == pytest.approx(accuracy)
    assert figures["standard_error"] == pytest.approx((accuracy * (1 - accuracy) / 7) ** 0.5)
    assert figures["accuracy_prior_corrected"] == pytest.approx(sum(by_prior) / 7)
    assert figures["accuracy_without_question"] == pytest.approx(sum(without_question) / 7)
    assert figures["accuracy_length_corrected"] == pytest.approx(sum(by_length) / 7)
    assert figures["macro_accuracy"] == pytest.approx((sum(right["sums"]) / 4 + sum(right["more_sums"]) / 3) / 2)
    assert figures["subjects"]["more_sums"] == {
        "accuracy": pytest.approx(sum(right["more_sums"]) / 3),
        "num_questions": 3,
    }
    assert figures["chance"] == 0.25 and figures["num_questions"] == 7
    assert json.loads(json.dumps(figures)) == figures


def test_shots_are_dropped_from_the_front_and_questions_left_out_until_they_fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    write_rows: WriteRows,
    capsys: pytest.CaptureFixture[str],
) -> None:
    long, short = row(0, question="Anna " * 300), row(1)
    shots = [row(2, question="The first. " * 40), row(3), row(4)]
    questions, shots_file = write_rows("questions.jsonl", [long, short]), write_rows("shots.jsonl", shots)
    task = ChoiceTask([str(questions)], [str(shots_file)], 3, language="en")
    all_shots, question = read_questions(task.shots), read_questions(task.questions)[1]
    harness = HarnessModel(model, tokenizer)
    lengths = [
        harness.count_tokens(make_prompt(task, question, all_shots[dropped:], chat=False).text, " A")
        for dropped in range(4)
    ]
    assert lengths == sorted(lengths, reverse=True)
    for max_length, dropped in [(lengths[0], 0), (lengths[0] - 1, 1), (lengths[1] - 1, 2), (lengths[3], 3)]:
        figures = score_choices(model, tokenizer, {"t": task}, max_length, 8)["t"]
        assert (figures["num_questions"], figures["num_too_long"]) == (1, 1)
        assert (figures["num_shots_dropped"], figures["num_prompts_shortened"]) == (dropped, int(dropped > 0))
    said = capsys.readouterr().out
    assert "1 prompts lost shots from the front" in said and f"{questions}, row 0" in said
    figures = score_choices(model, tokenizer, {"t": task}, lengths[3] - 1, 8)["t"]
    assert (figures["num_questions"], figures["num_too_long"], figures["accuracy"]) == (0, 2, None)


def test_a_question_is_not_among_its_own_shots(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    path = str(write_rows("rows.jsonl", [row(number) for number in range(4)]))
    figures = score_choices(model, tokenizer, {"t": ChoiceTask([path], [path], 2)}, 2048, 8)["t"]
    assert figures["num_shots_equal_question"] == 2  # rows 0 and 1 are the first two shots of all


def test_a_question_is_the_same_whatever_its_white_space() -> None:
    one = Question("s", "s", "Which is  right?", ("a b", "c"), 0, "here")
    assert is_same(one, one._replace(text=" Which is right?\n", options=(" a  b", "c\n"), right=1))
    assert not is_same(one, one._replace(options=("ab", "c")))
    assert not is_same(one, one._replace(options=("c", "a b")))


def test_an_empty_text_cannot_be_scored_and_is_counted(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    write_rows: WriteRows,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [row(0, A=""), row(1), row(2, A="3")]
    task = ChoiceTask([str(write_rows("rows.jsonl", rows))], score="text")
    check_choices({"t": task})
    said = capsys.readouterr().out
    assert "1 with identical options (first: " in said and "1 with an empty option (first: " in said
    figures = score_choices(model, tokenizer, {"t": task}, 2048, 8)["t"]
    assert (figures["num_questions"], figures["num_without_text"]) == (2, 1)


def test_questions_with_fewer_options_lower_no_ones_chance(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    rows = [row(0), row(1, C=None, D=None)]
    task = ChoiceTask([str(write_rows("rows.parquet", rows))])
    assert score_choices(model, tokenizer, {"t": task}, 2048, 8)["t"]["chance"] == (1 / 4 + 1 / 2) / 2


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(0), row(1, answer="E")], r"rows.jsonl, row 1: 'answer' is 'E'.*A to D"),
        ([row(0, D=None, answer="D")], r"row 0: 'answer' is 'D'.*3 options, A to C"),
        ([row(0, answer="AB")], "'answer' is 'AB'"),
        ([row(0, answer=None)], "'answer' is None"),
        ([row(0, question=" ")], "row 0: 'question' is ' '"),
        ([row(0, B=None)], "row 0 has 1 options"),
        ([{"question": "?", "A": "1", "B": "2"}], "rows.jsonl lacks the column 'answer'.*question, A, B"),
        ([row(0), 7], "row 1 cannot be read: no object"),
        ([], "rows.jsonl has no rows"),
    ],
)
def test_bad_files_are_refused_before_any_model(write_rows: WriteRows, rows: list[Any], words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        check_choices({"t": ChoiceTask([str(write_rows("rows.jsonl", rows))])})


def test_shots_that_are_not_there_are_said(files: tuple[str, str], write_rows: WriteRows) -> None:
    few = str(write_rows("few.jsonl", [row(0), row(1)]))
    check_choices({"t": ChoiceTask([files[0]], [files[1]], 5)})
    with pytest.raises(SystemExit, match="wants 5 shots.*few.jsonl have 2 of the subject 'sums'"):
        check_choices({"t": ChoiceTask([files[0]], [few], 5)})
    with pytest.raises(SystemExit, match="num_shots 5 and 0 files"):
        check_choices({"t": ChoiceTask([files[0]], num_shots=5)})


def test_recipe_value() -> None:
    class Recipe:
        choices: dict[str, ChoiceTask]

    value = {"ceval": {"questions": "a.parquet", "shots": ["b.parquet"], "num_shots": 5}}
    assert check_type(Recipe, "choices", value, "here") == {"ceval": ChoiceTask(["a.parquet"], ["b.parquet"], 5)}
    for wrong in ({"num_shot": 5}, {"score": "word"}, {"language": "de"}, {"num_shots": "many"}):
        with pytest.raises(SystemExit, match="choices"):
            check_type(Recipe, "choices", {"ceval": {"questions": "a.parquet"} | wrong}, "here")


def test_mini_datas_choices_fit_the_demo(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    task = ChoiceTask([str(ROOT / "mini_data/eval/choices.jsonl")], score="text", language="en", chat=True)
    figures = score_choices(model, tokenizer, {"mini": task}, 128, 32)["mini"]
    assert set(figures["subjects"]) == {"new_wording", "unasked_fact"} and figures["num_questions"] == 192
