"""utils/check_data.py: what it says of a recipe's data is so, and it says when the stage would stop."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import WriteRows, toy_texts
from transformers import PreTrainedTokenizerBase

from utils.check_data import main

ROOT = Path(__file__).resolve().parents[1]
ANSI = re.compile(r"\x1b\[\d+m")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def check(tokenizer_folder: str, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(stage: str, file: Path, *words: str) -> str:
        recipe = str(ROOT / f"recipes/demo/{stage}.yaml")
        main([recipe, "--tokenizer", tokenizer_folder, "--train_files", str(file), *words])
        return ANSI.sub("", capsys.readouterr().out)

    return run


def test_documents(check: Any, write_rows: WriteRows) -> None:
    texts = toy_texts()
    rows = [*({"text": text} for text in texts), {"text": texts[3]}, {"text": " "}, {"text": "Say <|im_end|> and go."}]
    said = check("pt", write_rows("rows.jsonl", rows), "--max_drop_share", "0.1")
    assert "the first 43 rows of 1 files" in said
    assert "42 kept" in said
    assert re.search(r"1 dropped: empty text \(first: .*rows.jsonl, row 41\)", said)
    assert "1 rows equal an earlier one" in said and "equal, 3 and 40 of the rows read" in said
    assert re.search(r"zh \d\d\.\d%", said)
    assert "1 rows a control token" in said
    assert said.count("sample ") == 3 and "⟦Anna lives in a small house near the river.<|im_end|>⟧" in said
    assert "tokens: min" in said and "█" in said


def test_conversations_and_pairs(check: Any) -> None:
    said = check("sft", ROOT / "mini_data/sft", "--rows", "300", "--max_length", "512")
    assert "stage sft: the first 300 rows of 3 files" in said
    assert re.search(r"<\|im_start\|>assistant\n⟦[^⟧]+<\|im_end\|>⟧", said)
    said = check("dpo", ROOT / "mini_data/dpo", "--rows", "100", "--max_length", "512")
    assert "stage dpo: the first 100 rows of 2 files" in said
    assert re.search(r"<\|im_start\|>assistant\n⟦[^⟧]+<\|im_end\|>⟧", said)


def test_it_says_that_the_stage_would_stop_and_writes_nothing(
    check: Any, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows("rows.jsonl", [{"text": ""}, {"text": "Anna lives here."}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"would stop: 50\.0% of these rows are dropped, max_drop_share is 5%"):
        check("pt", file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipes/demo/eval.yaml"], r"eval.yaml does not say .* which stage .* --stage"),
        (["recipes/demo/pt.yaml", "--blocksize", "3"], "Unknown recipe key 'blocksize'.*'block_size'"),
        (["recipes/demo/pt.yaml", "--train_files", "nowhere"], "no data at 'nowhere'"),
        (["recipes/demo/pt.yaml", "--train_files", "mini_data/sft"], "lacks the column 'text'"),
    ],
)
def test_mistakes_are_named(
    tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=message):
        main([*words, "--tokenizer", tokenizer_folder])


def test_rows_that_no_utf8_can_hold_are_counted_like_others(check: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "half \\ud83d of it"}\n{"text": "Anna lives here."}\n\xff\n')
    said = check("pt", file, "--max_drop_share", "1")
    assert "1 kept" in said and "1 dropped: not valid Unicode" in said and "1 dropped: not valid UTF-8" in said


def test_the_histogram_is_of_the_rows_before_they_are_shortened(check: Any, write_rows: WriteRows) -> None:
    rows = [{"prompt": "word " * 200, "completion": "yes"}, {"prompt": "hi", "completion": "yes"}]
    said = check("sft", write_rows("rows.jsonl", rows), "--max_length", "100")
    assert "2 kept, 1 shortened to 100 tokens" in said
    assert "max_length 100: 1 longer (50.0%)" in said


def test_pairs_that_are_only_scored_are_looked_at_too(check: Any, write_rows: WriteRows) -> None:
    good = {"prompt": "Where?", "chosen": "Near.", "rejected": "No."}
    file = write_rows("train.jsonl", [good] * 3)
    said = check("dpo", file, "--test_files", str(write_rows("test.jsonl", [good] * 2)))
    assert "3 kept" in said and "test:   2 kept of the first 2 of test_files" in said
    bad = write_rows("bad.jsonl", [good, good | {"rejected": "Near."}])
    with pytest.raises(SystemExit, match=r"would stop: 50\.0% of these rows are dropped"):
        check("dpo", file, "--test_files", str(bad))
    with pytest.raises(SystemExit, match=r"other\.jsonl lacks the column"):
        check("dpo", file, "--test_files", str(write_rows("other.jsonl", [{"text": "x"}])))


def test_files_of_other_kinds_are_counted(check: Any, write_rows: WriteRows, tmp_path: Path) -> None:
    file = write_rows("data/rows.jsonl", [{"text": text} for text in toy_texts()])
    assert "unread:" not in check("pt", file.parent)
    for name in ("more.jsonl.bz2", "deep/more.bz2", "README.md"):
        (file.parent / name).parent.mkdir(exist_ok=True)
        (file.parent / name).write_bytes(b"x")
    assert "unread: 2 .bz2, 1 .md (no data files)" in check("pt", file.parent)


def test_a_tokenizer_that_is_not_there_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=r"takes its tokenizer from 'results/nothing'.*--tokenizer PATH"):
        main(["recipes/demo/sft.yaml", "--checkpoint", "results/nothing"])
