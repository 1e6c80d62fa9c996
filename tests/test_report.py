"""mini_qwen/report.py: it says what was measured, for every checkpoint, and nothing else."""

import html
import json
import math
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import mini_qwen_eval
from mini_qwen.chapters import MANNERS, STAGE_COLUMNS
from mini_qwen.comparison import Limits
from mini_qwen.decoding import DecodingGrid
from mini_qwen.evaluation import EvalData
from mini_qwen.illustrations import curve, is_drawn
from mini_qwen.report import labels, training_facts, write_report

PROMPTS = ["Where?", "小明去哪里？"]
CIRCUMSTANCES = {
    "command": "mini_qwen_eval.py --x 1",
    "commit": "abc123",
    "versions": {"torch": "9.9"},
    "seconds": 12.5,
}


def cell(temperature: float, top_p: float = 1.0, top_k: int = 0, beams: int = 1, **figures: float) -> dict[str, Any]:
    setting = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "num_beams": beams,
        "num_answers": 8,
        "repetition_standard_error": 0.0,
    }
    manners = dict.fromkeys(MANNERS, 0.5) | {"answer_length": 20 * temperature} | figures
    return setting | manners


GRID = [
    cell(0.0),
    cell(0.7, 0.5),
    cell(0.7, 1.0),
    cell(1.5, 0.5),
    cell(1.5, 1.0),
    cell(1.0, top_k=5),
    cell(0.0, beams=4),
]
MATRIX = [[3, 1, 0], [0, 4, 2]]
OUTCOME = {"accuracy": 0.7, "standard_error": 0.145, "macro_f1": 0.735, "matrix": MATRIX}
CHOICES = {
    "accuracy": 0.375,
    "standard_error": 0.171,
    "accuracy_length_corrected": 0.25,
    "accuracy_prior_corrected": 0.125,
    "chance": 0.251,
    "macro_accuracy": 0.416,
    "num_questions": 8,
    "num_shots_dropped": 33,
    "num_too_long": 7,
    "subjects": {"law": {"accuracy": 0.5, "num_questions": 6}, "art": {"accuracy": 0.333, "num_questions": 2}},
}
PT: dict[str, Any] = {
    "checkpoint": "results/pt",
    "stage": "pt",
    "parameters": 1234567,
    "loss": 2.1119,
    "perplexity": 8.264,
    "bits_per_byte": 1.2344,
    "scored_tokens": 4321,
    "scored_bytes": 11111,
    "num_documents": 5,
    "num_documents_cut": 2,
    "chinese_bits_per_character": 3.456,
    "chinese_characters": 987,
    "chinese_tokens": 1500,
    "unigram_bits_per_byte": 2.222,
    "accuracy_facts": 1.0,
    "standard_error_facts": 0.0,
    "num_questions_facts": 59,
    "num_questions_two_hops": 40,
    "accuracy_two_hops": 0.25,
    "standard_error_two_hops": 0.044,
    "rouge_l": 0.678,
    "num_questions": 99,
    "stop_rate": 0.996,
    "num_answers": 1000,
    "repetition_standard_error": 0.0,
    "answer_length": 17.25,
    "repetition_4gram": 0.0313,
    "repetition_near": 0.0042,
    "distinct_2": 0.876,
    "preference_accuracy": 0.615,
    "preference_standard_error": 0.028,
    "preference_margin": -3.25,
    "num_pairs": 300,
    "num_pairs_dropped": 4,
    "pair_log_probs": [[-5.0, -6.0], [-5.0, -6.0]],
    "choices": {"exam": CHOICES},
    "classification": {
        "news": {
            "labels": ["sport", "tech"],
            "num_rows": 10,
            "num_shots": 1,
            "num_repeats_dropped": 98,
            "num_texts_cut": 83,
            "num_shots_dropped": 6,
            "chance": 0.5,
            "by_text": OUTCOME | {"no_label": 2},
            "by_likelihood": OUTCOME
            | {"accuracy": 0.6, "accuracy_length_corrected": 0.55, "accuracy_prior_corrected": 0.65},
        }
    },
    "answers": ["and then\nit rained", "去"],
    "prompt_manners": {
        "stop_rate": 0.125,
        "answer_length": 40.5,
        "repetition_4gram": 0.222,
        "repetition_near": 0.111,
        "distinct_2": 0.444,
    },
    "decoding": GRID,
}
SFT = PT | {
    "checkpoint": "results/sft",
    "stage": "sft",
    "bits_per_byte": 1.5,
    "answers": ["In Paris.", "北京"],
    "pair_log_probs": [[-4.0, -6.0], [-6.0, -6.0]],
}
ALL_CHAPTERS = ["In short", "Forgetting", "Held-out documents", "Questions and pairs", "Multiple choice"]
ALL_CHAPTERS += ["Classification", "How answers behave", "Decoding", "Answers", "How this was measured"]
ANSWERED = {"answers": PT["answers"]}
# The same without what is drawn, which takes most of the time.
DRAWN = ("classification", "decoding")
PT_TABLES, SFT_TABLES = ({key: record[key] for key in record if key not in DRAWN} for record in (PT, SFT))


def bare(stage: str, **figures: Any) -> dict[str, Any]:
    return {"checkpoint": f"results/{stage}", "stage": stage, "parameters": 1000} | figures


class Report:
    """What is written about some records."""

    def __init__(
        self, folder: Path, records: list[dict[str, Any]], prompts: list[str] = PROMPTS, **recipe: Any
    ) -> None:
        self.folder = folder / "out"
        checkpoints = [record["checkpoint"] for record in records]
        args = EvalData(checkpoints, output_dir=str(self.folder), prompts=prompts, **recipe)
        self.said = write_report(args, records, CIRCUMSTANCES)
        self.recipe = asdict(args)
        self.markdown = (self.folder / "report.md").read_text(encoding="utf-8")
        self.page = (self.folder / "report.html").read_text(encoding="utf-8")
        self.results = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        parts = re.split(r"^## (.*)$", self.markdown, flags=re.MULTILINE)
        self.chapters = dict(zip(parts[1::2], parts[2::2], strict=True))

    def tables(self, chapter: str) -> list[list[dict[str, str]]]:
        """Those of a chapter, each as one dict a row."""
        return [read_table(table) for table in re.findall(r"(?:^\|.*\n?)+", self.chapters[chapter], re.MULTILINE)]


def read_table(table: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in table.strip().splitlines()]
    header, rule, *rows = lines
    assert set("".join(rule)) <= set("-:")
    return [dict(zip(header, row, strict=True)) for row in rows]


class Texts(HTMLParser):
    """The tags of a page, and the texts between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return Report(tmp_path_factory.mktemp("report"), [PT, SFT])


FIGURES: dict[str, list[dict[str, str]]] = {
    "In short": [
        {
            "stage": "pt",
            "parameters": "1,234,567",
            "bits/byte": "1.234",
            "unigram bits/byte": "2.222",
            "perplexity": "8.26",
            "stops": "100%",
            "4-gram repetition": "3.1%",
            "pairs right": "61.5%",
            "pair margin": "-3.2",
            "facts": "100.0%",
            "two hops": "25.0%",
        }
    ],
    "Held-out documents": [
        {
            "stage": "pt",
            "loss, nats a token": "2.112",
            "perplexity": "8.26",
            "bits/byte": "1.234",
            "Chinese, bits/character": "3.456",
            "tokens": "4,321",
            "bytes": "11,111",
            "Chinese characters": "987",
            "documents": "5",
            "cut": "2",
        }
    ],
    "Questions and pairs": [
        {"stage": "pt", "facts": "100.0%", "two hops": "25.0%", "ROUGE-L": "0.678", "questions": "99", "±": "4.4%"},
        {
            "stage": "pt",
            "pairs right": "61.5%",
            "±": "2.8%",
            "margin, nats": "-3.2",
            "margin above the parent's": "",
            "pairs": "300",
            "dropped": "4",
        },
    ],
    "Multiple choice": [
        {
            "stage": "pt",
            "accuracy": "37.5%",
            "±": "17.1%",
            "chance": "25.1%",
            "length-corrected": "25.0%",
            "prior-corrected": "12.5%",
            "mean of subjects": "41.6%",
            "questions": "8",
            "shots dropped": "33",
            "too long": "7",
        },
        {"subject": "law", "pt": "50.0%", "sft": "50.0%"},
    ],
    "How answers behave": [
        {
            "stage": "pt",
            "stops": "99.6%",
            "length, tokens": "17.2",
            "4-gram repetition": "3.1%",
            "nearby repetition (WnR)": "0.4%",
            "distinct-2": "87.6%",
        },
        {
            "stage": "pt",
            "stops": "12.5%",
            "length, tokens": "40.5",
            "4-gram repetition": "22.2%",
            "nearby repetition (WnR)": "11.1%",
            "distinct-2": "44.4%",
        },
    ],
}


@pytest.mark.parametrize("chapter", FIGURES)
def test_figures_stand_in_their_columns(report: Report, chapter: str) -> None:
    """And in the same words on the page."""
    tables = report.tables(chapter)
    assert [table[0] for table in tables] == FIGURES[chapter]
    page = "\n".join(Texts(report.page).texts)
    for name, shown in (item for row in FIGURES[chapter] for item in row.items()):
        assert name in page and shown in page


def test_figures_of_a_classification(report: Report) -> None:
    likelihood, *_ = tables = report.tables("Classification")
    common = {"chance": "50.0%", "rows": "10", "texts cut": "83", "repeats dropped": "98", "shots dropped": "6"}
    common |= {"stage": "pt", "±": "14.5%", "macro-F1": "0.735"}
    weighed = {"accuracy": "60.0%", "length-corrected": "55.0%", "prior-corrected": "65.0%"}
    assert likelihood[0] == common | weighed
    assert {"accuracy": "70.0%", "no label said": "2"} | common in [table[0] for table in tables]
    matrix = [
        {"true \\\\ said": "sport", "sport": "3", "tech": "1", "no label": "0"},
        {"true \\\\ said": "tech", "sport": "0", "tech": "4", "no label": "2"},
    ]
    assert tables.count(matrix) == 4  # of two checkpoints, by text and by likelihood


def test_every_setting_of_the_grid_is_a_row(report: Report) -> None:
    (rows,) = report.tables("Decoding")
    assert [row["stage"] for row in rows] == ["pt"] * 7 + ["sft"] * 7
    assert [(row["temperature"], row["top-p"], row["top-k"], row["beams"]) for row in rows[:7]] == [
        ("0", "1", "0", "1"),
        ("0.7", "0.5", "0", "1"),
        ("0.7", "1", "0", "1"),
        ("1.5", "0.5", "0", "1"),
        ("1.5", "1", "0", "1"),
        ("1", "1", "5", "1"),
        ("0", "1", "0", "4"),
    ]
    assert [row["length, tokens"] for row in rows[:7]] == ["0.0", "14.0", "14.0", "30.0", "30.0", "20.0", "0.0"]
    assert all(row["answers"] == "8" for row in rows)


def test_pictures_of_the_grid_are_of_temperature_and_top_p_alone() -> None:
    """Neither the likeliest token, nor top-k, nor beams; a line is the mean over top-p at each temperature."""
    drawn = [cell for cell in GRID if is_drawn(cell)]
    assert drawn == GRID[1:5]
    lengths = [cell(1.5, 0.5, answer_length=4.0), cell(0.7, answer_length=3.0), cell(1.5, answer_length=7.0)]
    assert curve(lengths, "answer_length") == ([0.7, 1.5], [3.0, 5.5])


def test_gaps_stay_empty(tmp_path: Path) -> None:
    report = Report(tmp_path, [bare("pt", bits_per_byte=1.0), bare("sft", accuracy_facts=0.5, num_questions_facts=9)])
    pt, sft = report.tables("In short")[0]
    assert pt == {"stage": "pt", "parameters": "1,000", "bits/byte": "1.000", "facts": ""}
    assert sft == {"stage": "sft", "parameters": "1,000", "bits/byte": "", "facts": "50.0%"}


@pytest.mark.parametrize("zero", [0, 0.0])
def test_a_figure_of_zero_is_shown(tmp_path: Path, zero: float) -> None:
    keys = [key for key in STAGE_COLUMNS if key != "parameters"]
    report = Report(tmp_path, [bare("pt", **dict.fromkeys([*keys, "accuracy_facts", "standard_error_facts"], zero))])
    ((row,),) = report.tables("In short")
    assert len(row) == len(STAGE_COLUMNS) + 2
    assert all(float(shown.rstrip("%")) == 0 for name, shown in row.items() if name not in ("stage", "parameters"))


def test_a_task_of_which_no_question_fits_is_a_gap(tmp_path: Path) -> None:
    nothing = dict.fromkeys(CHOICES) | {"num_questions": 0, "num_too_long": 8, "subjects": {}}
    report = Report(tmp_path, [bare("pt", choices={"exam": nothing}), bare("sft", choices={"exam": CHOICES})])
    pt, sft = report.tables("Multiple choice")[0]
    assert (pt["accuracy"], pt["questions"], pt["too long"]) == ("", "0", "8")
    assert (sft["accuracy"], sft["questions"], sft["too long"]) == ("37.5%", "8", "7")


def test_what_was_not_measured_leaves_no_chapter(tmp_path: Path, report: Report) -> None:
    assert list(report.chapters) == ALL_CHAPTERS
    short = Report(tmp_path, [bare("pt")])
    assert list(short.chapters) == ["In short", "How this was measured"]
    assert not list(short.folder.glob("*.png"))
    assert Texts(short.page).tags.count("h2") == 2


@pytest.mark.parametrize(
    ("figures", "chapter"),
    [
        ({"bits_per_byte": 1.0}, "Held-out documents"),
        ({"rouge_l": 0.5, "num_questions": 3}, "Questions and pairs"),
        ({"preference_accuracy": 0.5, "preference_standard_error": 0.1}, "Questions and pairs"),
        ({"choices": {"exam": CHOICES}}, "Multiple choice"),
        ({"prompt_manners": PT["prompt_manners"]}, "How answers behave"),
        (ANSWERED, "Answers"),
    ],
)
def test_one_part_alone_has_its_chapter(tmp_path: Path, figures: dict[str, Any], chapter: str) -> None:
    report = Report(tmp_path, [bare("pt", **figures)])
    assert list(report.chapters) == ["In short", chapter, "How this was measured"]


def test_a_regression_is_said_at_the_top(report: Report) -> None:
    """1.2344 -> 1.5 bits, more than 5%: before any table, on both pages, in the terminal."""
    sentence = "sft regressed: bits per byte of held-out documents 1.234 in pt, 1.500 now (limit 1.296)."
    chapter = report.chapters["In short"]
    assert next(iter(report.chapters)) == "In short"
    assert chapter.index(sentence) < chapter.index("|")
    assert "**Notice**" in chapter[: chapter.index(sentence)]
    main = report.page[report.page.index("<main>") :]
    assert 0 < main.index('class="notice"') < main.index(sentence) < main.index("<table")
    assert sentence in report.said
    (rows,) = report.tables("Forgetting")
    assert [row["figure"] for row in rows if row[""] == "regressed"] == ["bits per byte of held-out documents"]
    assert {"parent": "pt", "stage": "sft", "before": "1.234", "after": "1.500", "limit": "1.296"}.items() <= rows[
        0
    ].items()
    assert len(rows) == 9


def test_every_regression_is_said(tmp_path: Path) -> None:
    worse = {"bits_per_byte": 3.0, "repetition_4gram": 0.5, "accuracy_facts": 0.2}
    report = Report(
        tmp_path, [PT_TABLES, SFT_TABLES | worse, PT_TABLES | {"checkpoint": "results/dpo", "stage": "dpo"} | worse]
    )
    assert report.chapters["In short"].count("sft regressed") == 3
    assert "dpo regressed" not in report.chapters["In short"]  # no worse than sft, which it was trained from


def test_no_regression_is_said_too(tmp_path: Path) -> None:
    report = Report(tmp_path, [PT_TABLES, SFT_TABLES | {"bits_per_byte": 1.2}])
    sentence = "No stage made a figure of its parent worse."
    assert sentence in report.chapters["In short"] and sentence in report.page and sentence in report.said
    assert "regressed:" not in report.markdown and 'class="notice"' not in report.page


def test_a_regression_is_one_beyond_the_limits_of_the_recipe(tmp_path: Path) -> None:
    report = Report(tmp_path, [PT_TABLES, SFT_TABLES], limits=Limits(bits=0.5))
    assert "regressed:" not in report.markdown


def test_one_checkpoint_alone_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    report = Report(tmp_path, [SFT_TABLES])
    assert "Forgetting" not in report.chapters
    assert "worse" not in report.chapters["In short"]


def test_the_reward_of_pairs_against_the_parent(report: Report) -> None:
    """Margins 1 and 1 became 2 and 0."""
    _, pairs = report.tables("Questions and pairs")
    assert [row["margin above the parent's"] for row in pairs] == ["", "50.0%"]
    assert [record.get("reward_accuracy") for record in report.results["checkpoints"]] == [None, 0.5]


def test_pictures_are_there_and_are_shown(report: Report) -> None:
    drawn = {file.name for file in report.folder.glob("*.png")}
    manners = {f"decoding_{key}{ending}.png" for key in MANNERS for ending in ("", "_by_temperature")}
    ways = {f"confusion_news_{way}_{stage}.png" for way in ("by_text", "by_likelihood") for stage in ("pt", "sft")}
    assert drawn == manners | ways
    assert all((report.folder / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
    assert sorted(re.findall(r"^!\[.+\]\((.*)\)$", report.markdown, re.MULTILINE)) == sorted(drawn)
    assert len(re.findall(r'<img src="data:image/png;base64,', report.page)) == len(drawn)
    assert len(set(re.findall(r'<img src="([^"]*)"', report.page))) >= len(manners) + 1  # not one picture many times


def write_history(checkpoint: Path, *losses: float, **record: Any) -> str:
    checkpoint.mkdir(parents=True)
    history = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    state = {"global_step": len(losses), "log_history": [*history, {"step": len(losses), "eval_loss": 1.0}]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    if record:
        (checkpoint / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return str(checkpoint)


def test_facts_of_the_training_come_from_its_records(tmp_path: Path) -> None:
    checkpoint = write_history(tmp_path / "pt", 3.0, 2.8349, seconds=61.7, recipe={})
    report = Report(tmp_path, [PT_TABLES | {"checkpoint": checkpoint}, SFT_TABLES])
    pt, sft = report.tables("In short")[0]
    assert (pt["steps"], pt["seconds"], pt["last loss"]) == ("2", "62", "2.835")
    assert (sft["steps"], sft["seconds"], sft["last loss"]) == ("", "", "")
    assert "training_loss.png" in report.chapters["Training"]
    assert (report.folder / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert training_facts(Path(write_history(tmp_path / "nothing"))) == {"steps": 0}
    assert training_facts(tmp_path / "nowhere") == {}


DAMAGED: dict[str, tuple[str, str, str]] = {
    "state cut off": ("trainer_state.json", '{"global_step": 3, "log_', r"trainer_state\.json:1: not JSON"),
    "foreign state": ("trainer_state.json", '{"steps": 3}', r"trainer_state\.json' has no list 'log_history'"),
    "loss": (
        "trainer_state.json",
        '{"log_history": [{"step": 1, "loss": "low"}]}',
        r"trainer_state\.json: 'loss' is 'low'",
    ),
    "held-out loss": (
        "trainer_state.json",
        '{"log_history": [{"step": 1, "eval_loss": null}]}',
        r"trainer_state\.json: 'eval_loss' is None",
    ),
    "record": ("run.json", "{", r"run\.json is damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_records_are_named_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    name, content, message = DAMAGED[case]
    (tmp_path / name).write_text(content)
    monkeypatch.setattr(mini_qwen_eval, "evaluate", lambda _: pytest.fail("it was measured"))
    with pytest.raises(SystemExit, match=message):
        mini_qwen_eval.main(["--checkpoints", str(tmp_path)])


@pytest.mark.parametrize("record", ["[1]", '{"seconds": "long"}', '{"seconds": [1]}'])
def test_a_foreign_record_says_nothing(tmp_path: Path, record: str) -> None:
    """Another project may write a run.json, and a trainer_state.json without the number of steps."""
    (tmp_path / "run.json").write_text(record)
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 2.5}], "global_step": "x"}')
    assert training_facts(tmp_path) == {"last_loss": 2.5}
    Report(tmp_path, [bare("pt") | {"checkpoint": str(tmp_path)}])


def test_results_are_json_whatever_the_figures(tmp_path: Path) -> None:
    """Infinity and NaN are none; the tables say them, the file has null."""
    checkpoint = write_history(tmp_path / "pt", 3.0, math.nan)
    figures = {"loss": 5000.0, "perplexity": math.inf, "bits_per_byte": 3000.0}
    report = Report(tmp_path, [bare("pt", **figures) | {"checkpoint": checkpoint}])
    saved = json.loads((report.folder / "results.json").read_text(), parse_constant=pytest.fail)["checkpoints"][0]
    assert (saved["perplexity"], saved["last_loss"], saved["loss"]) == (None, None, 5000.0)
    ((row,),) = report.tables("In short")
    assert (row["perplexity"], row["last loss"]) == ("inf", "nan")


def test_runs_of_the_same_stage_share_a_picture(tmp_path: Path) -> None:
    records = [bare("sft") | {"checkpoint": write_history(tmp_path / name, 3.0, 2.0)} for name in ("old", "new")]
    records.insert(0, bare("pt") | {"checkpoint": write_history(tmp_path / "pt", 4.0, 3.0)})
    report = Report(tmp_path, records)
    assert re.findall(r"\((.*\.png)\)", report.chapters["Training"]) == ["training_loss.png", "training_loss_sft.png"]


def test_checkpoints_of_the_same_stage_can_be_told_apart(tmp_path: Path) -> None:
    """Two runs of one stage side by side is what an evaluation is for."""
    records = [
        PT_TABLES,
        *(SFT_TABLES | {"checkpoint": f"runs/{name}", "answers": [f"by {name}", "x"]} for name in ("old", "new")),
    ]
    assert labels(records) == ["pt", "sft runs/old", "sft runs/new"]
    report = Report(tmp_path, records)
    for chapter in ("In short", "Held-out documents", "Multiple choice", "How answers behave"):
        assert {"pt", "sft runs/old", "sft runs/new"} == {row["stage"] for row in report.tables(chapter)[0]}
    assert re.findall(r"sft runs/(\w+)\*\*\n\n> by (\w+)", report.chapters["Answers"]) == [
        ("old", "old"),
        ("new", "new"),
    ]


def test_pictures_of_like_named_checkpoints_do_not_overwrite_each_other(tmp_path: Path) -> None:
    names = ("runs/sft-1", "runs/sft_1", "runs/" + "x" * 300)
    records = [bare("sft", classification=SFT["classification"]) | {"checkpoint": name} for name in names]
    report = Report(tmp_path, records)
    assert len(list(report.folder.glob("confusion_*.png"))) == 2 * 3


def test_results_hold_everything(report: Report) -> None:
    results = report.results
    assert {key: results[key] for key in CIRCUMSTANCES} == CIRCUMSTANCES
    assert set(results) == {*CIRCUMSTANCES, "recipe", "prompts", "checkpoints", "changes"}
    assert results["recipe"] == report.recipe
    assert results["prompts"] == PROMPTS
    without = [{key: value for key, value in record.items() if key != "pair_log_probs"} for record in (PT, SFT)]
    assert results["checkpoints"] == [without[0], without[1] | {"reward_accuracy": 0.5}]
    worse = [change for change in results["changes"] if change["is_worse"]]
    assert [(change["parent"], change["checkpoint"], change["figure"]) for change in worse] == [
        ("results/pt", "results/sft", "bits per byte of held-out documents")
    ]
    assert len(results["changes"]) == 9


def test_how_it_was_measured_is_said(tmp_path: Path) -> None:
    report = Report(tmp_path, [PT_TABLES], decoding=DecodingGrid(samples=3), max_length=77)
    circumstances, recipe = (
        {row[name]: row["value"] for row in rows for name in row if name != "value"}
        for rows in report.tables("How this was measured")
    )
    assert circumstances["command"] == CIRCUMSTANCES["command"]
    assert (circumstances["commit"], circumstances["seconds"]) == ("abc123", "12.5")
    assert recipe["max_length"] == "77"
    assert '"samples": 3' in recipe["decoding"]
    assert set(recipe) == set(report.recipe)


def test_answers_stand_under_their_prompt(report: Report) -> None:
    first, second = re.split(r"^### ", report.chapters["Answers"], flags=re.MULTILINE)[1:]
    assert first.split() == [
        "Where?",
        "**pt**",
        ">",
        "and",
        "then\\",
        ">",
        "it",
        "rained",
        "**sft**",
        ">",
        "In",
        "Paris.",
    ]
    assert second.split() == ["小明去哪里？", "**pt**", ">", "去", "**sft**", ">", "北京"]
    page = [text.strip() for text in Texts(report.page).texts]
    places = [page.index(text) for text in ("Where?", "In Paris.", "小明去哪里？", "去", "北京")]
    assert places == sorted(places)


HOSTILE = [
    "a | b |\n| --- | --- |\n| c | d |",
    "<script>alert(1)</script>",
    "\n\n# heading\n\n## In short\n\n- list",
    "</blockquote></main></body></html>",
    "{{ 7 * 7 }} {% raw %} ![x](http://evil.example/x.png)",
    "\x00\x1b[31m \ufffd half \r\n end",
    "",
    "长" * 3000,
]


def test_hostile_answers_are_text(tmp_path: Path) -> None:
    """Whatever stands in answers and prompts: the same chapters, tables and tags, and the answers whole."""
    plain = Report(tmp_path / "plain", [bare("pt", answers=["x"] * 8), bare("sft", answers=["x"] * 8)], ["x"] * 8)
    records = [bare("pt", answers=HOSTILE), bare("sft", answers=HOSTILE[::-1])]
    report = Report(tmp_path / "hostile", records, [text or "x" for text in HOSTILE])
    assert list(report.chapters) == list(plain.chapters)
    assert report.markdown.count("\n### ") == 8
    assert report.tables("In short") == plain.tables("In short")
    assert not report.tables("Answers")
    assert "<script" not in report.page and "<script" not in report.markdown
    tags, expected = (
        [tag for tag in Texts(page).tags if tag not in ("p", "br", "details", "summary", "div", "span")]
        for page in (report.page, plain.page)
    )
    assert tags == expected
    shown = html.unescape(report.page)
    for text in (HOSTILE[0].split("\n")[0], HOSTILE[1], HOSTILE[3], HOSTILE[4], HOSTILE[7]):
        assert text in shown
    saved = report.results["checkpoints"][0]["answers"]
    assert saved[:5] == HOSTILE[:5] and saved[6:] == HOSTILE[6:]


def test_names_of_checkpoints_and_tasks_may_hold_anything(tmp_path: Path) -> None:
    tasks = {"choices": {"a|b/c": CHOICES}, "classification": {"../d <b>": PT["classification"]["news"]}}
    names = ["runs/a|b <i> 检查点 [x](y)", "runs/b"]
    report = Report(tmp_path, [bare("sft", **tasks) | {"checkpoint": name} for name in names])
    assert [row["parameters"] for row in report.tables("In short")[0]] == ["1,000", "1,000"]
    assert "<i>" not in report.page and "<b>" not in report.page
    assert len(list(report.folder.glob("confusion_*.png"))) == len(list(tmp_path.rglob("*.png"))) == 4


def test_the_terminal_shows_the_short_chapter_and_the_place(report: Report) -> None:
    assert report.said.endswith(f"The whole report: {report.folder / 'report.html'}")
    assert read_table("\n".join(line for line in report.said.splitlines() if line.startswith("|")))[0]["stage"] == "pt"
    assert "Forgetting" not in report.said
