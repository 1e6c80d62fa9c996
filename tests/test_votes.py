"""mini_qwen/votes.py and utils/votes_to_pairs.py: no vote is lost, and what a vote teaches is what was voted."""

import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from transformers import PreTrainedTokenizerBase

from mini_qwen.preferences import PreferenceData, prepare_preferences
from mini_qwen.votes import Answer, Vote, append_vote, check_votes, preference_pairs, read_votes
from utils import votes_to_pairs as program

HARD = 'line\nbreak \u2028 and "quotes" 🙂 <|im_end|> \\n {"a": 1}'


def vote(verdict: str = "better", winner: str | None = "a", prompt: str = HARD, **texts: str | Answer) -> Vote:
    answers = [
        text if isinstance(text, Answer) else Answer(model, text, "stop")
        for model, text in (texts or {"a": "good", "b": "bad"}).items()
    ]
    return Vote("2026-01-31T08:05:00+00:00", prompt, "", {"seed": 0}, True, verdict, winner, answers)


def test_a_vote_comes_back_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    votes = [
        vote(a=HARD, b="bad"),
        vote("tie", None),
        vote("all_bad", None),
        vote(a=Answer("a", "", "length", True), b=""),
    ]
    for one in votes:
        append_vote(file, one)
    assert read_votes(file) == (votes, 0)
    lines = file.read_text(encoding="utf-8").split("\n")
    assert len(lines) == 5 and lines[-1] == ""
    assert json.loads(lines[0])["answers"][0] == {
        "model": "a", "text": HARD, "finish": "stop", "raw": False, "error": None
    }  # fmt: skip
    assert read_votes(tmp_path / "none.jsonl") == ([], 0)


def test_no_vote_is_lost_when_many_vote_at_once(tmp_path: Path) -> None:
    """Three processes of four threads."""
    file = tmp_path / "votes.jsonl"
    code = (
        "import json, sys; from pathlib import Path; from concurrent.futures import ThreadPoolExecutor\n"
        "from mini_qwen.votes import Answer, Vote, append_vote\n"
        "name, file = sys.argv[1], Path(sys.argv[2])\n"
        "def cast(number):\n"
        "    answers = [Answer('a', f'{name} {number}' * 900, 'stop'), Answer('b', '', 'stop')]\n"
        "    append_vote(file, Vote('', 'x', '', {}, True, 'better', 'a', answers))\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    list(pool.map(cast, range(25)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    commands = [[sys.executable, "-c", code, name, str(file)] for name in "xyz"]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda command: subprocess.run(command, env=environment, check=True), commands))
    votes, num_broken = read_votes(file)
    assert num_broken == 0
    expected = {f"{name} {number}" * 900 for name in "xyz" for number in range(25)}
    assert len(votes) == 75 and {one.answers[0].text for one in votes} == expected


def test_a_line_that_a_crash_cut_off_costs_no_other_vote(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    append_vote(file, vote())
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:40])
    append_vote(file, vote("tie", None))
    votes, num_broken = read_votes(file)
    assert [one.verdict for one in votes] == ["better", "tie"] and num_broken == 1


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """The system grants the file no more bytes, in the middle of the next line."""
    file = tmp_path / "votes.jsonl"
    append_vote(file, vote())
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        with pytest.raises(OSError):
            append_vote(file, vote("tie", None))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    append_vote(file, vote("tie", None))
    assert [one.verdict for one in read_votes(file)[0]] == ["better", "tie"]


def test_lines_that_are_no_votes_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    append_vote(file, vote())
    good = json.loads(file.read_bytes())
    wrong = [good | {"winner": "nobody"}, good | {"verdict": "great"}, good | {"extra": 1}, [1], {"prompt": "x"}]
    wrong += [good | {"verdict": "tie"}, good | {"answers": "none"}]
    with file.open("a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(line) + "\n" for line in wrong) + "\n\nnot json\n")
    votes, num_broken = read_votes(file)
    assert (len(votes), num_broken) == (1, len(wrong) + 1)


@pytest.mark.parametrize(("verdict", "winner"), [("better", None), ("better", "c"), ("tie", "a"), ("best", "a")])
def test_a_vote_that_says_nothing_cannot_be_made(verdict: str, winner: str | None) -> None:
    with pytest.raises(ValueError, match=verdict):
        vote(verdict, winner)


def test_a_model_that_failed_cannot_win() -> None:
    with pytest.raises(ValueError, match="winner 'a'"):
        vote(a=Answer("a", "half", None, False, "it crashed"), b="bad")


def test_where_no_vote_can_be_written_is_known_before(tmp_path: Path) -> None:
    check_votes(tmp_path / "new" / "votes.jsonl")
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="--votes"):
        check_votes(tmp_path / "file" / "votes.jsonl")


def test_the_winner_is_chosen_against_each_of_the_others() -> None:
    pairs, without = preference_pairs([vote(winner="b", a="1", b="2", c="3", d="4")])
    assert [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs] == [
        ("2", "1"), ("2", "3"), ("2", "4")
    ]  # fmt: skip
    assert pairs[0]["prompt"] == HARD and not without


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (vote("tie", None), "tie"),
        (vote("all_bad", None), "all bad"),
        (vote(a="same", b="same"), "the same answer twice"),
        (vote(a="good", b=" "), "an empty answer"),
        (vote(a="", b="bad"), "an empty answer"),
        (vote(a="good", b=Answer("b", "half", None, False, "it crashed")), "the other model failed"),
        (vote(a=Answer("a", "good and then", "length"), b="bad"), "the chosen answer was cut off"),
        (vote(a=Answer("a", "good and then", "cancelled"), b="bad"), "the chosen answer was cut off"),
        (vote(a=Answer("a", " Prague.", "stop", True), b="bad"), "a continuation of raw text"),
        (vote(a="good", b=Answer("b", " Prague.", "stop", True)), "a continuation of raw text"),
    ],
)
def test_what_teaches_nothing_is_no_pair_and_counted(made: Vote, reason: str) -> None:
    pairs, without = preference_pairs([made])
    assert (pairs, dict(without)) == ([], {reason: 1})


def test_a_rejected_answer_may_be_cut_off() -> None:
    (pair,), without = preference_pairs([vote(a="good", b=Answer("b", "on and on", "length"))])
    assert pair["rejected"][0]["content"] == "on and on" and not without


def test_pairs_are_accepted_by_dpo_with_the_voted_text_as_chosen(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """From the file of votes, through the program, to the token rows that DPO trains on."""
    file, pairs = tmp_path / "votes.jsonl", tmp_path / "pairs.jsonl"
    with_system = vote(winner="b", prompt="Where does Anna live?", a="At home.", b="Near the river.")
    with_system.system = "be brief"
    for one in [
        vote(a="yes <|im_end|>", b="no"),
        vote("tie", None),
        with_system,
        vote("all_bad", None),
        vote(a="x", b="x"),
    ]:
        append_vote(file, one)
    with file.open("a") as stream:
        stream.write('{"cut": \n')
    command = [sys.executable, "utils/votes_to_pairs.py", str(file), "--output_file", str(pairs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for said in ("5 votes", "2 pairs", "1 tie", "1 all bad", "1 the same answer twice", "1 lines"):
        assert said in done.stdout, done.stdout

    data = PreferenceData(train_files=[str(pairs)], max_drop_share=0, cache_dir=str(tmp_path / "cache"))
    rows, _, ledger = prepare_preferences(data, tokenizer, max_length=200)
    assert (ledger.rows_read, ledger.rows_kept, ledger.rows_shortened) == (2, 2, 0)
    texts = [
        tuple(tokenizer.decode(np.array(row[key])) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
        for row in rows
    ]
    ends = "<|im_end|>"
    assert [text[1:] for text in texts] == [
        ("yes <|im_end|>" + ends, "no" + ends), ("Near the river." + ends, "At home." + ends)
    ]  # fmt: skip
    assert texts[1][0] == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nWhere does Anna live?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_program_refuses_what_holds_no_pair(tmp_path: Path) -> None:
    for name in ("none.jsonl", "ties.jsonl"):
        if name == "ties.jsonl":
            append_vote(tmp_path / name, vote("tie", None))
        command = [
            sys.executable,
            "utils/votes_to_pairs.py",
            str(tmp_path / name),
            "--output_file",
            str(tmp_path / "p.jsonl"),
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and name in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "p.jsonl").exists()


def test_the_program_overwrites_nothing_and_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, other = tmp_path / "votes.jsonl", tmp_path / "mine.jsonl"
    append_vote(file, vote())
    (tmp_path / "votes.jsonl.lock").unlink(missing_ok=True)
    other.write_text("mine")
    (tmp_path / "link.jsonl").symlink_to(file)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refused(output_file: Path) -> str:
        with pytest.raises(SystemExit) as caught:
            program.main([str(file), "--output_file", str(output_file)])
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        return str(caught.value)

    assert "the votes themselves" in refused(file)
    assert "the votes themselves" in refused(tmp_path / "link.jsonl")
    assert "mine.jsonl' is there already" in refused(other)
    assert "must end in .jsonl" in refused(tmp_path / "pairs.txt")
    assert "The pairs cannot be made" in refused(other / "pairs.jsonl")
    assert "name too long" in refused(tmp_path / ("x" * 300 + ".jsonl"))

    def fail(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(program, "sync", fail)
    assert "No space left on device" in refused(tmp_path / "pairs.jsonl")
    monkeypatch.undo()
    program.main([str(file), "--output_file", str(tmp_path / "new/pairs.jsonl")])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pairs.jsonl"]


def test_the_command_of_the_program_s_help_can_be_given_after_the_demo() -> None:
    """Its recipe is of a model that the demo has made, and its output_dir is not the demo's own."""
    (line,) = [line for line in program.__doc__.splitlines() if "mini_qwen_dpo.py --config" in line]
    words = line.split()[2:]
    options = dict(zip(words[::2], words[1::2], strict=True))
    recipe = yaml.safe_load((ROOT / options["--config"]).read_text(encoding="utf-8"))
    assert recipe["checkpoint"] == "demo_results/sft" and recipe["output_dir"] != options["--output_dir"]
