"""What the tests share: an offline environment, small tokenizers and models, and files of rows."""

import atexit
import csv
import io
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# Read when the libraries are imported, hence before them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="mini_qwen_tests_")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels run on a CPU, slowly

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.figure import Figure
from programs import VOCAB, Programs, arguments
from scripted_server import ScriptedServer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import mini_qwen_dpo
import mini_qwen_pt
import mini_qwen_sft
import mini_qwen_tokenizer
from mini_qwen import pictures
from mini_qwen.blocks import Blocks, write_blocks
from mini_qwen.files import COMPRESSIONS, kind
from mini_qwen.model import NewModel, build_model
from mini_qwen.packing import Packed, cut
from mini_qwen.store import StoreWriter, TokenStore
from mini_qwen.tokenizer import load_tokenizer, train_tokenizer

for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:  # as nohup and background jobs have them; the programs inherit it
        signal.signal(number, usual)

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 448,
}
BASE_CONFIG = ROOT / "models/Qwen2.5-0.5B-Instruct"
QWEN_TOKENIZER = ROOT / "../shared/data/tokenizer/Qwen2.5-0.5B-Instruct"
NAMES = [("Anna", "小明"), ("Victor", "小雪"), ("Martha", "建国"), ("Oliver", "晓芳"), ("Sophie", "大伟")]
SENTENCES = [
    ("{} lives in a small house near the river.", "{}住在河边的一座小房子里。"),
    ("In the morning {} likes to eat bread and apples.", "早上{}喜欢吃面包和苹果。"),
    ("{} has a dog, two cats and 17 birds!", "{}养了一条狗、两只猫和17只鸟！"),
    ("Where does {} go tomorrow?\n\nTo the market, as always.", "{}明天去哪里？\n\n像往常一样去市场。"),
]

# The same examples in every run, and no deadline: the machine may be busy with other things.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None)
hypothesis.settings.load_profile("tests")

MakeModel = Callable[..., PreTrainedModel]
MakeStore = Callable[..., TokenStore]
MakeBlocks = Callable[..., Blocks]
WriteRows = Callable[[str, list[Any]], Path]


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """As through a checkpoint's optimizer.pt."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def toy_texts() -> list[str]:
    """Forty sentences, half of them Chinese."""
    return [
        sentence.format(name)
        for pair in SENTENCES
        for names in NAMES
        for sentence, name in zip(pair, names, strict=True)
    ]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of 400 tokens, trained here: 256 bytes, 141 merges and 3 control tokens."""
    return train_tokenizer(toy_texts(), vocab_size=400)


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of tokenizer, pt, sft and dpo, each of six steps."""
    folder = tmp_path_factory.mktemp("road")
    mini_qwen_tokenizer.main(
        ["--config", str(ROOT / "recipes/demo/tokenizer.yaml"), "--vocab_size", str(VOCAB), "--output_dir"]
        + [str(folder / "tokenizer"), "--train_files", str(ROOT / "mini_data/pt/tourism_geography")]
        + ["--eval_rows", "50", "--compare_with", "nowhere"]
    )
    for stage, module in {"pt": mini_qwen_pt, "sft": mini_qwen_sft, "dpo": mini_qwen_dpo}.items():
        module.main(arguments(stage, folder))
    return folder


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """What runs stage programs quickly, with faults planted into them."""
    runner = Programs(tmp_path_factory.mktemp("programs"))
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """The real tokenizer of Qwen2.5, where it has been fetched."""
    if not (QWEN_TOKENIZER / "tokenizer.json").is_file():
        pytest.skip(f"the tokenizer of Qwen2.5 is not at {QWEN_TOKENIZER}")
    return load_tokenizer(str(QWEN_TOKENIZER))


@pytest.fixture(scope="session")
def tiny_model(tokenizer: PreTrainedTokenizerBase) -> MakeModel:
    """Make a Qwen2 of 2 layers in evaluation mode, the same one for the same seed.

    Its weights are ten times as large as at the start of a training, so that what a token sees shows in the logits.
    """

    def make(seed: int = 0, attention: str = "sdpa", stage: str = "pt", **sizes: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        args = NewModel(base_config=str(BASE_CONFIG), attn_implementation=attention, **(SMALL | sizes))
        model = build_model(args, tokenizer, "fp32", stage).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(10 if weight.ndim == 2 else 1)
        return model

    return make


@pytest.fixture
def scripted() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    """Write rows of token ids, and flags where given, into a TokenStore of their own."""

    def make(rows: list[list[int]], trained: list[list[bool]] | None = None) -> TokenStore:
        folder = tmp_path_factory.mktemp("store") / "rows"
        writer = StoreWriter(folder, flags=trained is not None)
        flags = None if trained is None else [np.array(row, bool) for row in trained]
        writer.add([np.array(row, np.uint32) for row in rows], flags)
        writer.close()
        return TokenStore([folder])

    return make


@pytest.fixture(scope="session")
def make_blocks(make_store: MakeStore, tmp_path_factory: pytest.TempPathFactory) -> MakeBlocks:
    """Pack rows of token ids, and flags where given, into Blocks; `pack` and the rest as write_blocks takes them."""

    def make(
        rows: list[list[int]],
        block_size: int,
        pack: Callable[..., Packed] = cut,
        trained: list[list[bool]] | None = None,
        **options: bool,
    ) -> Blocks:
        store, folder = make_store(rows, trained), tmp_path_factory.mktemp("blocks")
        windows = [(0, np.arange(len(store)))]
        write_blocks(folder, store, windows, partial(pack, size=block_size), block_size, **options)
        return Blocks(folder)

    return make


def save_rows(path: Path, rows: list[Any]) -> Path:
    """Write rows to a file in the kind and the compression that its name says; to .txt goes their `text` alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content: str | bytes
    if kind(path) == ".parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        content = sink.getvalue().to_pybytes()
    elif kind(path) == ".jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif kind(path) == ".csv":
        table = io.StringIO()
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        content = table.getvalue()
    elif kind(path) == ".txt":
        content = "".join(row["text"] + "\n" for row in rows)
    else:
        content = json.dumps(rows, ensure_ascii=False)
    save_bytes(path, content if isinstance(content, bytes) else content.encode())
    return path


def save_bytes(path: Path, content: bytes) -> None:
    """Write bytes, compressed as the name says."""
    with pa.output_stream(str(path), compression=COMPRESSIONS.get(path.suffix)) as stream:
        stream.write(content)


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write rows to a file below the test's folder, in the format that its suffix names."""

    def write(name: str, rows: list[Any]) -> Path:
        return save_rows(tmp_path / name, rows)

    return write


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn, to look into."""
    closed: list[Figure] = []
    close = pictures.pyplot.close

    def keep(figure: Figure) -> None:
        closed.append(figure)
        close(figure)

    monkeypatch.setattr(pictures.pyplot, "close", keep)
    return closed
