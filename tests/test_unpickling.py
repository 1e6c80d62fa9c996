"""No program runs code that comes with a file: planted pickles stay unread or are refused, genuine files load."""

import collections
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import ROOT, Programs, arguments, same_weights

from mini_qwen.checkpoint import MANIFEST, read_manifest, write_manifest
from mini_qwen.model import NewModel, make_config
from mini_qwen.tokenizer import load_tokenizer
from mini_qwen.unpickling import load_deepspeed_safely


class Planted:
    """Unpickling it writes a file: what a forged checkpoint would do first."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.witness), "w")


def plain_pickle(file: Path, planted: Planted) -> None:
    file.write_bytes(pickle.dumps(planted))


def torch_zip(file: Path, planted: Planted) -> None:
    torch.save({"state": planted, "python": planted, "cpu": torch.zeros(1)}, file)


def torch_legacy(file: Path, planted: Planted) -> None:
    torch.save({"state": planted, "optimizer": planted}, file, _use_new_zipfile_serialization=False)


FORMATS = [plain_pickle, torch_zip, torch_legacy]
# Beside the files of a checkpoint, those that libraries would read if they were there.
EXTRA = ["pytorch_model.bin", "training_args.bin", "optimizer.bin", "scaler.pt", "adapter_model.bin", "model.bin"]


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    return tmp_path / "code was run"


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
def test_the_planted_pickle_is_a_real_one(
    tmp_path: Path, witness: Path, form: Callable[[Path, Planted], None]
) -> None:
    """Read as pickles are read, it runs: else the tests below would show nothing."""
    form(tmp_path / "file", Planted(witness))
    if form is plain_pickle:
        with (tmp_path / "file").open("rb") as stream:
            pickle.Unpickler(stream).load()
    else:
        torch.load(tmp_path / "file", weights_only=bool(0))
    assert witness.exists()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
def test_resuming_runs_no_code(
    road: Path, tmp_path: Path, programs: Programs, witness: Path, form: Callable[[Path, Planted], None]
) -> None:
    """Even of a checkpoint whose manifest was forged with it, file by file."""
    folder, shared = tmp_path / "pt", {"save_strategy": "steps", "save_steps": 3}
    argv = arguments("pt", road, output_dir=folder, **shared)
    assert programs.run("pt", argv, kill_at_step={"step": 5}).code == -9
    names = sorted(path.name for path in (folder / "checkpoint-3").iterdir() if path.name != MANIFEST)

    def resume(name: str) -> tuple[str, int]:
        forged = Path(shutil.copytree(folder, tmp_path / f"forged {name}"))
        form(forged / "checkpoint-3" / name, Planted(witness))
        write_manifest(forged / "checkpoint-3", read_manifest(folder / "checkpoint-3")["fingerprint"], 0.0)
        again = arguments("pt", road, output_dir=forged, resume_from_checkpoint="true", **shared)
        return name, programs.run("pt", again).code

    codes = dict(programs.map(resume, [*names, *EXTRA]))
    assert not witness.exists()
    assert all(codes[name] == 1 for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.__name__)
def test_going_on_from_a_forged_model_runs_no_code(
    road: Path, tmp_path: Path, programs: Programs, witness: Path, form: Callable[[Path, Planted], None]
) -> None:
    """SFT, eval and chat load a folder: each of its files in turn is a pickle here, then one beside them.

    DPO loads by the same function as SFT. Files that are only records are not read at all, and the run goes on.
    """
    names = [path.name for path in (road / "pt").iterdir() if path.is_file() and path.name != MANIFEST]

    def forge(name: str) -> tuple[str, list[int]]:
        forged = Path(shutil.copytree(road / "pt", tmp_path / f"forged {name}"))
        (forged / MANIFEST).unlink()
        form(forged / name, Planted(witness))
        sft = arguments("sft", road, checkpoint=forged, output_dir=tmp_path / f"sft {name}", max_steps=1)
        evaluate = ["--config", str(recipe_of(tmp_path / f"eval {name}", forged))]
        runs = [("sft", sft), ("eval", evaluate), ("eval", [*evaluate, "--chat", str(forged)])]
        return name, [programs.run(stage, argv).code for stage, argv in runs]

    codes = dict(programs.map(forge, [*names, *EXTRA]))
    assert not witness.exists()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert codes[name] == [1, 1, 1], name
    for name in ("run.json", "training_loss.png", *EXTRA):
        assert codes[name][0] == 0 and codes[name][2] == 0, name  # what is read was not forged


def recipe_of(folder: Path, checkpoint: Path) -> Path:
    """An evaluation's recipe that needs no data but the checkpoint."""
    folder.mkdir()
    text = json.dumps(
        {"checkpoints": [str(checkpoint)], "output_dir": str(folder), "prompts": ["a"], "max_new_tokens": 1}
    )
    (folder / "eval.yaml").write_text(text, encoding="utf-8")
    return folder / "eval.yaml"


def test_code_beside_a_config_is_not_run(
    road: Path, tmp_path: Path, programs: Programs, witness: Path, tokenizer: Any
) -> None:
    """auto_map names a Python file for AutoConfig, AutoModel and AutoTokenizer; nobody reads it."""
    forged = Path(shutil.copytree(road / "sft", tmp_path / "forged"))
    (forged / MANIFEST).unlink()
    (forged / "modeling.py").write_text(f"open({str(witness)!r}, 'w')\nclass Any: pass\n", encoding="utf-8")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((forged / name).read_text(encoding="utf-8"))
        content |= {"auto_map": {cls: "modeling.Any" for cls in classes}}
        content |= {"model_type": "unheard_of"} if name == "config.json" else {"tokenizer_class": "Any"}
        (forged / name).write_text(json.dumps(content), encoding="utf-8")
    recipe = ["--config", str(recipe_of(tmp_path / "eval", forged))]
    genuine = ["--config", str(recipe_of(tmp_path / "genuine", road / "sft"))]
    codes = [programs.run("eval", argv).code for argv in (recipe, [*recipe, "--chat", str(forged)], genuine)]
    assert codes == [1, 1, 0]
    with pytest.raises((SystemExit, Exception)):
        load_tokenizer(str(forged))
    for stage in ("sft", "dpo"):
        argv = arguments(stage, road, checkpoint=forged, output_dir=tmp_path / stage)
        assert programs.run(stage, argv).code == 1
    config = make_config(NewModel(base_config=str(forged), vocab_size=512), load_tokenizer(str(road / "tokenizer")))
    assert config.vocab_size == 512
    assert not witness.exists()


def test_a_forged_tokenizer_runs_no_code(road: Path, tmp_path: Path, programs: Programs, witness: Path) -> None:
    names = [path.name for path in (road / "tokenizer").iterdir()] + ["vocab.pkl", "tokenizer.model"]
    for name in names:
        forged = Path(shutil.copytree(road / "tokenizer", tmp_path / f"forged {name}"))
        plain_pickle(forged / name, Planted(witness))
        programs.run("pt", arguments("pt", road, tokenizer=forged, output_dir=tmp_path / f"pt {name}"))
    assert not witness.exists()


@pytest.mark.parametrize("stage", ["pt", "dpo"])
@pytest.mark.parametrize("suffix", [".json", ""])
def test_forged_data_and_prepared_rows_run_no_code(
    road: Path, tmp_path: Path, programs: Programs, witness: Path, stage: str, suffix: str
) -> None:
    """The files of the cache hold numbers and tables; a pickle in their place is numbers too, or no table."""
    cache = Path(shutil.copytree(road / "cache", tmp_path / "cache"))
    files = [file for file in cache.rglob("*") if file.is_file() and (file.suffix == ".json") == bool(suffix)]
    assert files
    for file in files:
        plain_pickle(file, Planted(witness))
    assert programs.run(stage, arguments(stage, road, cache_dir=cache, output_dir=tmp_path / "out")).code == 1
    forged = tmp_path / "train.parquet"
    plain_pickle(forged, Planted(witness))
    done = programs.run(stage, arguments(stage, road, train_files=forged, output_dir=tmp_path / "out"))
    assert done.code == 1 and "cannot be read as parquet" in done.output
    assert not witness.exists()


def deepspeed_file(file: Path, content: Any) -> Path:
    torch.save(content, file, _use_new_zipfile_serialization=False)  # as DeepSpeed writes it
    return file


def test_deepspeed_reads_its_own_classes_and_no_others(tmp_path: Path, witness: Path) -> None:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    load_deepspeed_safely()
    engine = TorchCheckpointEngine()
    genuine = {
        "stage": ZeroStageEnum.gradients,
        "scaler": LossScaler(scale=1.0),
        "fragments": collections.OrderedDict(a=fragment_address(numel=3, start=1)),
        "weights": torch.arange(3.0),
    }
    loaded = engine.load(str(deepspeed_file(tmp_path / "genuine.pt", genuine)), map_location="cpu")
    assert loaded["stage"] == ZeroStageEnum.gradients and loaded["fragments"]["a"].numel == 3
    assert torch.equal(loaded["weights"], genuine["weights"])
    for other in (Planted(witness), Path("a class that is not on the list")):
        forged = deepspeed_file(tmp_path / "forged.pt", {"module": other})
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            engine.load(str(forged), map_location="cpu")
    assert not witness.exists()


def test_no_source_asks_for_it() -> None:
    """Beside tests/test_layout.py, which scans all source for the words themselves: nothing is retried unsafely."""
    for room in ("mini_qwen", "utils", "bench", "."):
        for file in (ROOT / room).glob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert "import pickle" not in text and "UnpicklingError" not in text, file


def test_weights_come_as_safetensors_only(road: Path, tmp_path: Path, programs: Programs) -> None:
    """A genuine pytorch_model.bin is refused as well: the folder is then no checkpoint of ours."""
    folder = Path(shutil.copytree(road / "pt", tmp_path / "pt"))
    (folder / MANIFEST).unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    done = programs.run("sft", arguments("sft", road, checkpoint=folder, output_dir=tmp_path / "sft"))
    assert done.code == 1 and "is not a checkpoint: it lacks *.safetensors" in done.output
    assert same_weights(road / "pt", road / "pt")
