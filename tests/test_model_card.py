"""mini_qwen/model_card.py, lineage.py and hub.py: the card says what the records say, and no path of the machine."""

import json
import re
import shutil
import threading
import time
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from exporting import export
from huggingface_hub import ModelCard, constants
from programs import Programs, arguments

import mini_qwen_eval
from mini_qwen.checkpoint import MANIFEST
from mini_qwen.evaluation import load_checkpoint
from mini_qwen.export import open_checkpoint
from mini_qwen.hub import check_repo_id
from mini_qwen.lineage import publishable, read_lineage, shorten
from mini_qwen.model_card import UNKNOWN, fenced, make_card

ROOT = Path(__file__).resolve().parents[1]


def card_of(folder: Path, *about: Any) -> str:
    return make_card(open_checkpoint(str(folder)), *(about or (None, [], None, None)))


def cells(card: str, row: str) -> list[str]:
    """Of the row of that name in a table of the card."""
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def record(folder: Path, name: str = "run.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture
def alone(road: Path, tmp_path: Path) -> Path:
    """A DPO checkpoint that a test may change: a copy, its manifest gone."""
    folder = Path(shutil.copytree(road / "dpo", tmp_path / "dpo"))
    (folder / MANIFEST).unlink()
    return folder


@pytest.fixture(scope="module")
def evaluation(road: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    words = ["--config", str(ROOT / "recipes/demo/eval.yaml"), "--checkpoints", str(road / "sft"), str(road / "dpo")]
    words += ["--output_dir", str(folder), "--parts", "documents", "--documents"]
    mini_qwen_eval.main([*words, str(ROOT / "mini_data/eval/documents.parquet")])
    return folder


def test_every_stage_of_the_road_is_told_from_its_records(road: Path) -> None:
    card = card_of(road / "dpo")
    runs = [record(road / stage) for stage in ("pt", "sft", "dpo")]
    assert cells(card, "rows") == [f"{run['ledger']['rows_kept']:,}" for run in runs]
    assert cells(card, "tokens, learnt") == [f"{run['ledger']['tokens_trained']:,}" for run in runs]
    assert cells(card, "held-out loss") == [f"{run['metrics']['eval_loss']:.4g}" for run in runs]
    assert cells(card, "mean training loss") == [f"{run['metrics']['train_loss']:.4g}" for run in runs]
    assert cells(card, "commit") == [run["commit"] for run in runs]
    assert cells(card, "steps") == ["6", "6", "6"]
    histories = [record(road / stage, "trainer_state.json")["log_history"] for stage in ("pt", "sft", "dpo")]
    losses = [[entry["loss"] for entry in history if "loss" in entry][-1] for history in histories]
    assert cells(card, "last training loss") == [f"{loss:.4g}" for loss in losses]
    seconds = [run["seconds"] for run in runs]
    assert cells(card, "seconds") == [f"{number:.4g}" for number in seconds]
    assert cells(card, "machine") == [run["device"] for run in runs]
    (parameters,) = cells(card, "parameters")
    assert parameters == f"{runs[-1]['parameters']:,}"
    for name, number in runs[-1]["versions"].items():
        assert f"{name} {number}" in cells(card, "versions")[-1]
    recipes = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)]
    assert [recipe.keys() for recipe in recipes] == [run["recipe"].keys() for run in runs]
    assert recipes[2]["PreferenceConfig"]["beta"] == 0.1
    assert UNKNOWN not in card and "run.json of" not in card


def test_no_path_of_this_machine_is_told(road: Path, evaluation: Path, tmp_path: Path) -> None:
    """The recipes of these runs are full of them."""
    assert str(road) in json.dumps(record(road / "dpo")) and str(ROOT) in json.dumps(
        record(evaluation, "results.json")
    )
    folder = export(road / "dpo", "hub", tmp_path / "out", "--results", str(evaluation), "--language", "zh", "en")
    card = (folder / "README.md").read_text(encoding="utf-8")
    for path in (road, ROOT, evaluation, tmp_path, Path.home()):
        assert str(path) not in card
    assert not re.search(r"(?<![\w.\])])/(tmp|home|root|work|mnt)\b", card)
    assert "train-00000-of-00001.parquet" in card and "documents.parquet" in card
    assert (folder / "model.safetensors").is_file() and (folder / "chat_template.jinja").is_file()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/mnt/my data/corpus", "corpus"),
        ("/mnt/corpus/", "corpus"),
        ("~/corpus/rows.jsonl", "rows.jsonl"),
        ("~", ""),
        ("../other/rows.jsonl", "rows.jsonl"),
        (r"C:\Users\me\rows.jsonl", "rows.jsonl"),
        (r"\\server\share\rows.jsonl", "rows.jsonl"),
        ("file:///mnt/rows.jsonl", "rows.jsonl"),
        ("rows of '/mnt/a/b.parquet', and of [/mnt/c]", "rows of 'b.parquet', and of [c]"),
        ("data/../../home/bob/f", "f"),
        (r"data\..\..\bob\f", "f"),
        ("user@host:/mnt/data/x", "x"),
        ("user@host:data/x", "x"),
        ("host:/mnt/data/x", "x"),
        ("from user@host:/mnt/data/x, and data/../../b/c.parquet", "from x, and c.parquet"),
        ("mini_data/pt", "mini_data/pt"),
        ("a..b/c and ask me@example.org: no", "a..b/c and ask me@example.org: no"),
        ("http://me@example.org:8000/v1/../a", "http://me@example.org:8000/v1/../a"),
        ("demo_results/sft", "demo_results/sft"),
        ("https://example.org/a/b and/or 1/2", "https://example.org/a/b and/or 1/2"),
        ("why is 3 / 4 = 0.75?", "why is 3 / 4 = 0.75?"),
    ],
)
def test_paths_outside_the_project_become_names(text: str, told: str) -> None:
    assert shorten(text) == told


def test_long_texts_are_looked_through_at_once() -> None:
    """Each in less than a second; where every sign may begin a path, the time must not grow with the square."""
    for unit in ("a@", "a=", "a/", "a:", "@:", "../"):
        started = time.monotonic()
        shorten(f"is {unit * 20_000}")
        assert time.monotonic() - started < 3


def test_what_a_recipe_calls_a_secret_is_left_out() -> None:
    recipe = {"hub_token": "hf_abc", "api_key": "x", "inner": [{"my_secret": 1, "/mnt/a/b": 2.0}], "eos_token_id": 3}
    assert publishable(recipe) == {"inner": [{"b": 2.0}], "eos_token_id": 3}


def test_a_record_that_is_missing_is_said_to_be_missing(alone: Path) -> None:
    (alone / "run.json").unlink()
    (alone / "trainer_state.json").unlink()
    card = card_of(alone)
    missing = "run.json of dpo, trainer_state.json of dpo, the licence, the languages, an evaluation"
    assert f"Missing were: {missing}." in card
    for row in ("data", "rows", "steps", "held-out loss", "machine", "commit", "versions"):
        assert cells(card, row) == [UNKNOWN]
    assert "No evaluation was given" in card and "Without a licence nobody else may use the model" in card
    assert "### dpo\n\nNot recorded." in card


def test_a_record_of_another_version_may_lack_keys(alone: Path) -> None:
    old = record(alone)
    for key in ("versions", "ledger", "precision"):
        del old[key]
    del old["metrics"]["eval_loss"]
    (alone / "run.json").write_text(json.dumps(old), encoding="utf-8")
    card = card_of(alone)
    assert cells(card, "versions") == cells(card, "rows") == cells(card, "held-out loss") == [UNKNOWN]
    assert cells(card, "commit") == [old["commit"]]


def test_a_damaged_record_is_named(alone: Path) -> None:
    (alone / "trainer_state.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(SystemExit, match="trainer_state.json cannot be read: it holds no JSON object. Restore it"):
        card_of(alone)


def test_only_the_weights_that_a_run_began_with_are_its_parent(road: Path, tmp_path: Path, programs: Programs) -> None:
    """The record names a folder; what another run has written there since is no part of the history."""
    parent = Path(shutil.copytree(road / "sft", tmp_path / "sft"))
    assert programs.run("dpo", arguments("dpo", road, checkpoint=parent, output_dir=tmp_path / "dpo")).code == 0
    assert [run.name for run in read_lineage(tmp_path / "dpo")] == ["pt", "sft", "dpo"]
    shutil.rmtree(parent)
    shutil.copytree(road / "dpo", parent)
    (run,) = read_lineage(tmp_path / "dpo")
    words = "what was before dpo (it began with sft, where the weights that it began with are not to be found now)"
    assert run.missing == [words] and words in card_of(tmp_path / "dpo")
    shutil.rmtree(parent)
    assert len(read_lineage(tmp_path / "dpo")) == 1


def test_the_figures_of_an_evaluation_are_those_of_this_checkpoint(road: Path, evaluation: Path) -> None:
    card = card_of(road / "dpo", "apache-2.0", ["zh", "en"], str(evaluation), "me/model")
    measured = record(evaluation, "results.json")
    of_dpo = measured["checkpoints"][1]
    assert of_dpo["stage"] == "dpo"
    assert cells(card, "bits per byte of held-out documents")[0] == f"{of_dpo['bits_per_byte']:.4g}"
    assert f"| finished | {measured['finished']} |" in card
    assert "Nothing that it asks for was missing." in card
    assert (
        card_of(road / "dpo", None, [], str(evaluation / "results.json"), None).count("bits per byte of held-out") == 1
    )


def test_an_evaluation_of_something_else_is_refused(road: Path, evaluation: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"is about .*sft, .*dpo, not about '.*pt'. Evaluate that first"):
        export(road / "pt", "hub", tmp_path / "out", "--results", str(evaluation))
    with pytest.raises(SystemExit, match="there is no results.json of an evaluation. Name its output_dir"):
        export(road / "dpo", "hub", tmp_path / "out", "--results", str(tmp_path))
    stale = record(evaluation, "results.json")
    stale["checkpoints"][1]["last_loss"] += 0.5
    (tmp_path / "results.json").write_text(json.dumps(stale), encoding="utf-8")
    with pytest.raises(SystemExit, match="measured another run of '.*dpo': its steps, seconds or last loss differ"):
        export(road / "dpo", "hub", tmp_path / "out", "--results", str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_the_hub_reads_licence_and_languages(road: Path) -> None:
    data = ModelCard(card_of(road / "dpo", "apache-2.0", ["zh", "en"], None, None)).data
    assert (data.license, data.language, data.library_name) == ("apache-2.0", ["zh", "en"], "transformers")
    assert data.pipeline_tag == "text-generation" and data.tags == ["qwen2", "mini_qwen"]
    unnamed = ModelCard(card_of(road / "dpo")).data
    assert unnamed.license is None and unnamed.language is None


@pytest.mark.parametrize("stage", ["pt", "dpo"])
def test_the_example_in_the_card_runs(
    road: Path, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(road / stage, "hub", tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    capsys.readouterr()
    code = code.replace(f'from_pretrained("{stage}"', f'from_pretrained("{folder}"').replace("128", "5")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    model, tokenizer = load_checkpoint(str(road / stage))
    ids = names["answer"][0].tolist()
    answer = tokenizer.decode(ids[names["prompt"]["input_ids"].shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out == answer + "\n"
    assert len(ids) == names["prompt"]["input_ids"].shape[1] + 5 or ids[-1] == tokenizer.eos_token_id


def test_a_fence_is_longer_than_what_it_holds() -> None:
    assert fenced("prompt: '````'", "yaml") == "`````yaml\nprompt: '````'\n`````"


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "me/", "me/mo del", "me/" + "x" * 100])
def test_a_name_that_is_no_repository_is_refused_first(road: Path, tmp_path: Path, repo_id: str) -> None:
    with pytest.raises(SystemExit, match="OWNER/NAME"):
        export(road / "dpo", "hub", tmp_path / "out", "--push", repo_id)
    assert not (tmp_path / "out").exists()
    check_repo_id("me/model")


class SmallHub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files needs; it keeps what it is sent."""

    asked: list[tuple[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        lines = [json.loads(line) for line in body.splitlines() if line]
        self.asked.append((self.path, lines))
        if self.path.endswith("/preupload/main"):
            kinds = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in lines[0]["files"]
            ]
            self.answer({"files": kinds})
        elif self.path.endswith("/commit/main"):
            self.answer({"commitUrl": f"http://{self.headers['Host']}/me/model/commit/1", "commitOid": "1"})
        else:
            self.answer({"url": f"http://{self.headers['Host']}/me/model"})

    def do_GET(self) -> None:
        self.asked.append((self.path, None))
        self.answer({"id": "me/model", "sha": "0", "siblings": []})

    def answer(self, content: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: object) -> None:
        pass


def test_the_whole_folder_is_sent_to_a_private_repository(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To a server of this test; the library's own checks of names and hashes are at work."""
    handler = type("Handler", (SmallHub,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    try:
        folder = export(road / "dpo", "hub", tmp_path / "out", "--push", "me/model")
    finally:
        server.shutdown()
        server.server_close()
    asked = handler.asked
    ((created,),) = [lines for path, lines in asked if path == "/api/repos/create"]
    assert (created["name"], created["organization"]) == ("model", "me")
    assert created.get("private") is True or created.get("visibility") == "private"
    (commit,) = [lines for path, lines in asked if path.endswith("/commit/main")]
    sent = {line["value"]["path"]: b64decode(line["value"]["content"]) for line in commit if line["key"] == "file"}
    assert sent == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "uploaded to http" in capsys.readouterr().out


def test_an_upload_that_fails_says_how_to_go_on(road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(SystemExit, match="The upload to me/model failed: .* hf upload me/model"):
        export(road / "dpo", "hub", tmp_path / "out", "--push", "me/model")
    assert (tmp_path / "out/README.md").is_file()


def test_nothing_is_sent_where_the_network_is_forbidden(road: Path, tmp_path: Path) -> None:
    """HF_HUB_OFFLINE is set in all tests. The folder is whole all the same."""
    with pytest.raises(SystemExit, match="Nothing was uploaded: HF_HUB_OFFLINE is set.* hf upload me/model"):
        export(road / "dpo", "hub", tmp_path / "out", "--push", "me/model")
    assert (tmp_path / "out/model.safetensors").is_file()
    assert "# me/model" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
