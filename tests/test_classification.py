"""mini_qwen/classification.py, question_form.py and passages.py: a rigged model's labels are read out again."""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QWEN_TOKENIZER, MakeModel, WriteRows
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mini_qwen.chat import TokenRow
from mini_qwen.classification import score_classification
from mini_qwen.encoding import encode_text
from mini_qwen.passages import ClassificationTask, Passage, Passages, check_classification, deal, read_passages
from mini_qwen.question_form import QuestionForm
from mini_qwen.recipe import parse_recipe
from mini_qwen.scoring import score_rows

LABELS = ["abcd", "xy", "w"]  # of two tokens or more, and of one, in the tokenizer of the tests
KEYS = {"abcd": "#", "xy": "%", "w": "@"}  # what a passage of the label is full of
BBC = QWEN_TOKENIZER.parents[1] / "eval/bbc_news.parquet"
SIZE = 448


def rig(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prefer: dict[str, float],
) -> PreTrainedModel:
    """Make the model's next token a table of what stands before.

    Its state is the last token, as a unit vector, plus the mean of all tokens so far. A share s of key characters adds
    about 200 s to the logit of the key's label, `prefer` is added to that of a label after any line's end, and 300 is
    the logit of what comes next in a label once it has begun, and of the end token at its end.
    """
    state = model.state_dict()
    for name, weight in state.items():
        weight.zero_() if weight.ndim == 2 or name.endswith("bias") else weight.fill_(1)
    eye, norm = torch.eye(SIZE), SIZE**0.5  # of a unit vector, RMSNorm makes one of this length
    state["model.embed_tokens.weight"].copy_(eye)
    state["model.layers.0.self_attn.v_proj.weight"].copy_(eye)  # queries and keys are 0: all tokens weigh alike
    state["model.layers.0.self_attn.o_proj.weight"].copy_(eye / norm)
    table = torch.zeros(SIZE, SIZE)
    [line_end], *others = (ids.tolist() for ids in encode_text(tokenizer, ["\n", *KEYS.values(), *KEYS]))
    for label, [key], ids in zip(KEYS, others[: len(KEYS)], others[len(KEYS) :], strict=True):
        table[ids[0], key] = 10.0
        table[ids[0], line_end] = prefer.get(label, 0.0) / norm
        for before, after in zip(ids, [*ids[1:], tokenizer.eos_token_id], strict=True):
            table[after, before] = 300 / norm
    model.lm_head.weight = torch.nn.Parameter(table)
    return model


@pytest.fixture
def make_rigged(tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> MakeModel:
    def make(stage: str = "pt", prefer: dict[str, float] | None = None) -> PreTrainedModel:
        model = tiny_model(stage=stage, hidden_size=SIZE, num_key_value_heads=4)
        return rig(model, tokenizer, prefer or {})

    return make


def make_rows(num_each: int, labels: dict[str, str] = KEYS) -> list[dict[str, str]]:
    """Passages full of their label's key, none like another."""
    return [{"text": key * (60 + at), "category": label} for label, key in labels.items() for at in range(num_each)]


@pytest.fixture
def file(write_rows: WriteRows) -> str:
    return str(write_rows("rows.jsonl", make_rows(6)))


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: ClassificationTask, **options: int
) -> dict[str, Any]:
    options = {"max_length": 1024, "batch_size": 4, "seed": 0} | options
    check_classification({"task": task})
    figures = score_classification(model, tokenizer, {"task": task}, **options)["task"]
    assert json.loads(json.dumps(figures)) == figures
    return figures


@pytest.mark.parametrize("stage", ["pt", "sft"])
@pytest.mark.parametrize("num_shots", [0, 3])
def test_what_the_model_says_is_read(
    make_rigged: MakeModel, tokenizer: PreTrainedTokenizerBase, file: str, stage: str, num_shots: int
) -> None:
    task = ClassificationTask([file], num_shots=num_shots, labels=LABELS)
    # In the examples all keys are about as frequent; the passage asked about makes its own the most frequent.
    figures = score(make_rigged(stage), tokenizer, task)
    assert figures["labels"] == LABELS
    assert figures["num_rows"] == 18 - num_shots
    assert figures["chance"] == 1 / 3
    each = 6 - num_shots // 3
    perfect = [[each, 0, 0, 0], [0, each, 0, 0], [0, 0, each, 0]]
    for way in ("by_text", "by_likelihood"):
        assert figures[way]["accuracy"] == figures[way]["macro_f1"] == 1, way
        assert figures[way]["standard_error"] == 0
        assert figures[way]["matrix"] == perfect
    assert figures["by_text"]["no_label"] == 0
    assert figures["by_likelihood"]["accuracy_length_corrected"] == 1
    assert figures["by_likelihood"]["accuracy_prior_corrected"] == 1


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_a_model_that_prefers_one_label_is_corrected_by_the_prior(
    make_rigged: MakeModel, tokenizer: PreTrainedTokenizerBase, file: str, stage: str
) -> None:
    # A passage brings its label up to 200, this preference more, whatever the passage is.
    figures = score(make_rigged(stage, prefer={"xy": 400.0}), tokenizer, ClassificationTask([file], labels=LABELS))
    everywhere_xy = [[0, 6, 0, 0]] * 3
    assert figures["by_text"]["matrix"] == figures["by_likelihood"]["matrix"] == everywhere_xy
    by_likelihood = figures["by_likelihood"]
    assert by_likelihood["accuracy"] == pytest.approx(1 / 3)
    assert by_likelihood["standard_error"] == pytest.approx((1 / 3 * 2 / 3 / 18) ** 0.5)
    assert by_likelihood["macro_f1"] == pytest.approx(1 / 6)  # 2 * 6 / (6 + 18) = 1/2 for one of three
    assert by_likelihood["accuracy_prior_corrected"] == 1


def test_answers_without_a_label_are_counted(
    make_rigged: MakeModel, tokenizer: PreTrainedTokenizerBase, file: str
) -> None:
    # Asked for labels that it never says, the model says its own.
    rows = make_rows(6, {"pop": "#", "jazz": "%"})
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = score(make_rigged(), tokenizer, ClassificationTask([file], by=["text"]))
    assert figures["by_text"]["no_label"] == 12
    assert figures["by_text"]["matrix"] == [[0, 0, 6], [0, 0, 6]]
    assert figures["by_text"]["accuracy"] == figures["by_text"]["macro_f1"] == 0
    assert "by_likelihood" not in figures


def test_neither_the_batch_nor_the_order_of_rows_matters(
    tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    rows = make_rows(8)
    shuffled = random.Random(1).sample(rows, len(rows))
    tasks = [
        ClassificationTask([str(write_rows(f"{at}.jsonl", some))], num_shots=2, num_rows=12)
        for at, some in enumerate([rows, shuffled])
    ]
    model = tiny_model()
    first = score(model, tokenizer, tasks[0], batch_size=1)
    assert first == score(model, tokenizer, tasks[0], batch_size=12)
    assert first == score(model, tokenizer, tasks[1], batch_size=5)


def passages(sizes: dict[str, int]) -> Passages:
    return Passages(
        [Passage("", f"{label} {at}", label) for label in sizes for at in range(sizes[label])], [*sizes], 0
    )


@pytest.mark.parametrize("seed", range(5))
def test_dealt_rows_are_balanced_and_never_examples(seed: int) -> None:
    given = passages({"a": 40, "b": 20, "c": 9})
    dealt = {}
    for num_shots in (0, 1, 5):
        task = ClassificationTask(["f"], num_shots=num_shots, num_rows=11)
        shots, rows = dealt[num_shots] = deal("task", task, given, seed)
        assert [shot.label for shot in shots] == list("abcab")[:num_shots]
        assert [row.label for row in rows] == list("abcabcabcab")
        assert len({*shots, *rows}) == num_shots + 11
    assert dealt[0][1] == dealt[1][1] == dealt[5][1]  # the same questions with and without examples
    assert dealt[1][0] == dealt[5][0][:1]
    everything = ClassificationTask(["f"], num_shots=5)
    shots, rows = deal("task", everything, given, seed)
    assert Counter(shots + rows) == Counter(given.rows)
    assert deal("task", everything, given._replace(rows=given.rows[::-1]), seed) == (shots, rows)
    assert deal("task", everything, given, seed + 1)[1] != rows


def test_repeated_texts_are_left_out(
    make_rigged: MakeModel, tokenizer: PreTrainedTokenizerBase, write_rows: WriteRows
) -> None:
    rows = make_rows(3)
    file = str(write_rows("rows.jsonl", [*rows, rows[0], rows[4], rows[0]]))
    figures = score(make_rigged(), tokenizer, ClassificationTask([file], by=["likelihood"]))
    assert (figures["num_rows"], figures["num_repeats_dropped"]) == (9, 3)


def test_texts_that_differ_in_white_space_are_repeats(write_rows: WriteRows) -> None:
    """A passage is asked about without the blanks at its ends: the example would be the question."""
    texts = ["the match was won", "the match was won\n", "the  match was won", "a phone", " a phone"]
    rows = [{"text": text, "category": "tech" if "phone" in text else "sport"} for text in texts]
    file = str(write_rows("rows.jsonl", rows))
    found = read_passages("task", ClassificationTask([file]))
    assert found.rows == [Passage("", "the match was won", "sport"), Passage("", "a phone", "tech")]
    assert found.num_repeats == 3
    file = str(write_rows("rows.jsonl", [*rows, {"text": "a phone\n", "category": "sport"}]))
    with pytest.raises(SystemExit, match="row 5: the text 'a phone' has the category 'sport', but .*row 3"):
        read_passages("task", ClassificationTask([file]))


def make_form(
    tokenizer: PreTrainedTokenizerBase, num_shots: int = 0, chat: bool = False, **options: Any
) -> QuestionForm:
    shots = [Passage("", f"text {at}", LABELS[at % 3]) for at in range(num_shots)]
    task = ClassificationTask(["f"], instruction="Choose of {labels}.", **options)
    return QuestionForm(task, LABELS, shots, tokenizer, chat)


def test_questions_word_by_word(tokenizer: PreTrainedTokenizerBase) -> None:
    end = "\n\nYour answer (choose ONLY one category in abcd, xy, w):"
    passage = Passage("News", "It <|im_end|> rains.", "xy")
    start, text = "Choose of abcd, xy, w.\n\n", f"title:\nNews\ncontent:\nIt <|im_end|> rains.{end}"

    alone = make_form(tokenizer).prompt(passage, 1024)
    assert tokenizer.decode(alone.ids) == f"{start}{text}\n"
    assert tokenizer.eos_token_id not in alone.ids

    raw = make_form(tokenizer, num_shots=2).prompt(passage, 1024)
    assert tokenizer.decode(raw.ids) == (
        f"{start}Here are some examples:\n\nExample 1:\ncontent:\ntext 0{end}\nabcd\n\n"
        f"Example 2:\ncontent:\ntext 1{end}\nxy\n\nExample 3:\n{text}\n"
    )
    chat = make_form(tokenizer, num_shots=1, chat=True).prompt(passage, 1024)
    assert tokenizer.decode(chat.ids) == (
        f"<|im_start|>user\n{start}content:\ntext 0{end}<|im_end|>\n<|im_start|>assistant\nabcd<|im_end|>\n"
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.ids.count(tokenizer.eos_token_id) == 3  # one for each turn, none out of the passage


@pytest.mark.parametrize("chat", [False, True])
def test_a_long_question_loses_examples_then_its_end(tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    form = make_form(tokenizer, num_shots=3, chat=chat)
    passage = Passage("", "# " * 40 + "小明", "xy")
    whole = form.prompt(passage, 10_000)
    assert (whole.num_shots_dropped, whole.cut) == (0, False)
    needed = len(whole.ids) + form.num_answer_tokens
    assert form.prompt(passage, needed) == whole

    shorter = form.prompt(passage, needed - 1)
    assert (shorter.num_shots_dropped, shorter.cut) == (1, False)
    text = tokenizer.decode(shorter.ids)
    assert "text 0" not in text and "text 1" in text and "Choose of" in text

    alone = make_form(tokenizer, chat=chat)
    shortest = len(alone.prompt(Passage("", "", "xy"), 10_000).ids) + form.num_answer_tokens
    previous = whole
    for max_length in range(needed, shortest - 1, -1):
        prompt = form.prompt(passage, max_length)
        assert len(prompt.ids) + form.num_answer_tokens <= max_length
        assert prompt.cut <= (prompt.num_shots_dropped == 3)  # the examples go first
        assert prompt.num_shots_dropped >= previous.num_shots_dropped
        assert "\ufffd" not in tokenizer.decode(prompt.ids)
        previous = prompt
    assert previous.cut
    with pytest.raises(SystemExit, match="max_length 50 is too short .* Raise max_length"):
        form.prompt(passage, 50)


def test_dropped_examples_and_cut_texts_are_counted_and_said(
    make_rigged: MakeModel, tokenizer: PreTrainedTokenizerBase, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ClassificationTask([file], num_shots=3, num_rows=6, max_text_tokens=50, by=["likelihood"])
    figures = score(make_rigged(), tokenizer, task)
    assert (figures["num_texts_cut"], figures["num_shots_dropped"]) == (6, 0)
    task.max_text_tokens = 1000
    figures = score(make_rigged(), tokenizer, task, max_length=420)
    assert figures["num_texts_cut"] == 0
    # A question alone has about 180 tokens, an example 120: of three examples one stays, in each of six prompts.
    assert figures["num_shots_dropped"] == 12
    said = capsys.readouterr().out.splitlines()
    assert "6 texts cut, 0 examples dropped" in said[0]
    assert "0 texts cut, 12 examples dropped for max_length 420" in said[1]


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_likelihoods_are_those_of_whole_rows(
    tiny_model: MakeModel, tokenizer: PreTrainedTokenizerBase, file: str, stage: str
) -> None:
    """The same three choices from rows that are scored whole, prompt and label in one, without any cache."""
    model, task = tiny_model(stage=stage, seed=3), ClassificationTask([file], labels=LABELS, by=["likelihood"])
    _, rows = deal("task", task, read_passages("task", task), seed=0)
    form = QuestionForm(task, LABELS, [], tokenizer, chat=stage == "sft")
    whole = [
        TokenRow(np.array([*prompt, *label], np.uint32), np.array([False] * len(prompt) + [True] * len(label)))
        for prompt in (form.prompt(row, 1024).ids for row in [*rows, Passage("", "N/A", "")])
        for label in form.label_ids
    ]
    table = np.array([score.sum_log_prob for score in score_rows(model, whole, "rows")]).reshape(-1, len(LABELS))
    right = np.array([LABELS.index(row.label) for row in rows])
    raw, corrected, relative = (
        values.argmax(axis=1) for values in (table[:-1], table[:-1] / [4, 2, 1], table[:-1] - table[-1])
    )
    assert not (raw == corrected).all() and not (raw == relative).all()  # else the corrections would not show
    figures = score(model, tokenizer, task)["by_likelihood"]
    assert figures["accuracy"] == pytest.approx((raw == right).mean())
    assert figures["accuracy_length_corrected"] == pytest.approx((corrected == right).mean())
    assert figures["accuracy_prior_corrected"] == pytest.approx((relative == right).mean())
    counts = [[((right == true) & (raw == answer)).sum() for answer in range(4)] for true in range(3)]
    assert figures["matrix"] == counts


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("sport", "sport"),
        (" Sport.\n", "sport"),
        ("The passage is about tech, not sport.", "tech"),
        ("transport", None),
        ("sports", None),
        ("sport_2", None),
        ("tech news", "tech news"),
        ("tech new", "tech"),
        ("这是体育新闻", "体育"),
        ("体育sport", "体育"),
        ("答案：sport新闻", "sport"),
        ("C++!", "C++"),
        ("C", None),
        ("", None),
    ],
)
def test_labels_are_found_in_answers(tokenizer: PreTrainedTokenizerBase, answer: str, label: str | None) -> None:
    labels = ["tech", "sport", "tech news", "体育", "C++"]
    form = QuestionForm(ClassificationTask(["f"]), labels, [], tokenizer, chat=False)
    assert form.read_label(answer) == label


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"body": "a", "category": "x"}], {}, r"rows.jsonl lacks the column 'text' \+ 'category'.*body"),
        ([{"text": "a", "kind": "x"}], {}, "lacks the column"),
        (make_rows(2), {"title": "title"}, "lacks the column .*'title'"),
        ([], {}, "Task 'bbc' has no rows: .*rows.jsonl is empty"),
        ([{"text": "a", "category": "x"}, {"text": "b"}], {}, "rows.jsonl, row 1: 'category' is None, but must be"),
        ([{"text": "a", "category": 3}], {}, "row 0: 'category' is 3, but must be text"),
        ([{"text": " ", "category": "x"}], {}, "row 0: 'text' is ' ', but must be text"),
        ([{"text": "a", "category": "x", "title": 5}], {"title": "title"}, "row 0: 'title' is 5"),
        (
            [{"text": "a", "category": "x"}],
            {"labels": ["y", "z"]},
            "row 0: 'category' is 'x', but .* are y, z",
        ),
        ([{"text": "a", "category": "x"}], {}, r"the labels \['x'\], but needs two or more"),
        ([{"text": "a", "category": "x"}, {"text": "b", "category": "X"}], {}, "no two are the same"),
        (
            [{"text": "a", "category": "x"}, {"text": "a", "category": "y"}],
            {},
            "row 1: the text 'a' has the category 'y', but .*row 0 has the same text with 'x'",
        ),
        (make_rows(2), {"num_shots": 4}, "has 2 different texts with the label 'abcd' .* needs 2 as examples and"),
        (make_rows(2), {"labels": [*LABELS, "new"]}, "has 0 different texts with the label 'new'"),
        (make_rows(2), {"num_shots": -1}, "Task 'bbc' has num_shots -1, but it must be 0 or more"),
        (make_rows(2), {"num_rows": 0}, "num_rows 0, but it must be 1"),
        (make_rows(2), {"max_text_tokens": 0}, "max_text_tokens 0, but it must be 1"),
        (make_rows(2), {"by": []}, "Task 'bbc' is judged by nothing"),
    ],
)
def test_bad_tasks_are_refused(
    write_rows: WriteRows, rows: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    file = write_rows("rows.jsonl", rows)
    with pytest.raises(SystemExit, match=message):
        check_classification({"bbc": ClassificationTask([str(file)], **options)})


def test_bad_tasks_in_broken_files(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "category": "x"}\n{"text": "b", \n')
    with pytest.raises(SystemExit, match="rows.jsonl, row 1 cannot be read: it is not valid JSON"):
        check_classification({"bbc": ClassificationTask([str(file)])})
    with pytest.raises(SystemExit, match="There is no data at 'nowhere'"):
        check_classification({"bbc": ClassificationTask(["nowhere"])})


def test_a_title_is_not_said_twice(write_rows: WriteRows) -> None:
    rows = [
        {"title": "News", "text": "News\n\nIt rains.", "category": "x"},
        {"title": None, "text": "It snows.", "category": "y"},
        {"title": "Alone", "text": "Alone", "category": "y"},
    ]
    task = ClassificationTask([str(write_rows("rows.jsonl", rows))], title="title")
    assert read_passages("task", task).rows == [
        Passage("News", "It rains.", "x"),
        Passage("", "It snows.", "y"),
        Passage("Alone", "Alone", "y"),
    ]


@dataclass
class Keys:
    classification: dict[str, ClassificationTask]


def test_tasks_in_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("classification: {bbc: {files: [bbc.parquet], num_shots: 5, by: [text]}}")
    [keys] = parse_recipe(Keys, argv=[], default=str(recipe))
    assert keys.classification == {"bbc": ClassificationTask(["bbc.parquet"], num_shots=5, by=["text"])}
    for wrong in ("num_shot: 5", "num_shots: five", "by: [guess]"):
        recipe.write_text(f"classification: {{bbc: {{files: [bbc.parquet], {wrong}}}}}")
        with pytest.raises(SystemExit, match=wrong.split(":")[0]):
            parse_recipe(Keys, argv=[], default=str(recipe))


def test_bbc_news() -> None:
    if not BBC.is_file():
        pytest.skip(f"BBC news is not at {BBC}")
    task = ClassificationTask([str(BBC)], title="title", num_shots=5, num_rows=100)
    found = read_passages("bbc", task)
    assert (len(found.rows), found.num_repeats) == (2125, 100)
    assert found.labels == ["business", "entertainment", "politics", "sport", "tech"]
    shots, rows = deal("bbc", task, found, seed=0)
    assert [shot.label for shot in shots] == found.labels
    assert Counter(row.label for row in rows) == dict.fromkeys(found.labels, 20)
    assert not {shot.text for shot in shots} & {row.text for row in rows}
