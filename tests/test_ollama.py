"""mini_qwen/ollama.py: the Modelfile's template writes the text of the chat template."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from exporting import export
from sample_conversations import CONVERSATIONS
from transformers.utils.chat_template_utils import render_jinja_template

from mini_qwen.chat import TEMPLATE
from mini_qwen.evaluation import EvalData
from mini_qwen.ollama import go_template
from mini_qwen.schemas import Turn

PROGRAM = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
type Input struct { Template string; Conversations [][]Message }
func main() {
    var input Input
    if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil { panic(err) }
    parsed := template.Must(template.New("").Parse(input.Template))
    for _, messages := range input.Conversations {
        if err := parsed.Execute(os.Stdout, map[string]any{"Messages": messages}); err != nil { panic(err) }
        os.Stdout.WriteString("\\x00")
    }
}
"""


def rendered(turns: list[Turn]) -> str:
    return render_jinja_template([turns], chat_template=TEMPLATE, add_generation_prompt=True)[0][0]


def write_out(template: str, turns: list[Turn]) -> str:
    """What Go makes of a template of this one form: a range over turns with two fields; all other text is copied."""
    parts = re.fullmatch(r"\{\{ range \.Messages \}\}(.*?)\{\{ end \}\}(.*)", template, re.DOTALL)
    assert parts is not None
    pieces = re.split(r"(\{\{ \.Role \}\}|\{\{ \.Content \}\})", parts[1])
    assert "{{" not in "".join(pieces[::2]) + parts[2]
    fields = {"{{ .Role }}": "role", "{{ .Content }}": "content"}
    return "".join(turn[fields[piece]] if piece in fields else piece for turn in turns for piece in pieces) + parts[2]


def test_the_template_writes_the_text_of_the_chat() -> None:
    for turns in CONVERSATIONS:
        assert write_out(go_template(), turns) == rendered(turns)


def test_go_itself_writes_the_text_of_the_chat(tmp_path: Path) -> None:
    go = shutil.which("go")
    if go is None:
        pytest.skip("Go is not installed: apt-get install golang-go")
    (tmp_path / "main.go").write_text(PROGRAM, encoding="utf-8")
    conversations = [[{"Role": turn["role"], "Content": turn["content"]} for turn in turns] for turns in CONVERSATIONS]
    done = subprocess.run(
        [go, "run", str(tmp_path / "main.go")],
        input=json.dumps({"Template": go_template(), "Conversations": conversations}).encode(),
        capture_output=True,
        timeout=300,
        env=os.environ | {"GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().split("\0")[:-1] == [rendered(turns) for turns in CONVERSATIONS]


def test_a_modelfile_that_answers(road: Path, tmp_path: Path) -> None:
    folder = export(road / "dpo", "ollama", tmp_path / "out", "--dtype", "bf16")
    assert {path.name for path in folder.iterdir()} == {"dpo-bf16.gguf", "Modelfile"}
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith('FROM ./dpo-bf16.gguf\nTEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n')
    assert re.search('TEMPLATE """(.*?)"""\n', text, re.DOTALL)[1] == go_template()
    parameters = dict(re.findall(r"^PARAMETER (\S+) (.*)$", text, re.MULTILINE))
    sampling = EvalData(checkpoints=[]).chat_sampling()
    assert parameters == {
        "stop": '"<|im_end|>"',
        "num_ctx": "512",
        "temperature": str(sampling.temperature),
        "top_p": str(sampling.top_p),
        "top_k": str(sampling.top_k),
        "repeat_penalty": str(sampling.repetition_penalty),
        "repeat_last_n": "-1",
    }


def test_a_modelfile_that_continues_text(road: Path, tmp_path: Path) -> None:
    folder = export(road / "pt", "ollama", tmp_path / "out")
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith('FROM ./pt-fp32.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "<|im_end|>"\n')
