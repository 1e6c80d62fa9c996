"""Recipes: flat YAML files, the one place of hyperparameters, checked strictly before anything else happens."""

import contextlib
import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

ROOT = Path(__file__).resolve().parents[1]


def parse_recipe(*classes: type, argv: list[str] | None = None, default: str) -> tuple[Any, ...]:
    """Read `--config FILE` (or `default`), apply `--key value` overrides, and build one object of each dataclass.

        parse_recipe(DocumentData, PTConfig, ModelConfig, argv=["--learning_rate", "2e-5"], default="recipes/pt.yaml")

    A key belongs to the first class that has a field of that name. Relative recipe paths are looked up from the
    working directory first, then from the repository.

    Raises:
        SystemExit: a key that no class knows, a value of the wrong type, a missing recipe or required key. The
            message names the key, the value, where it was written, and the nearest key that exists.
    """
    argv = sys.argv[1:] if argv is None else argv
    overrides = read_overrides(argv)
    path = find_recipe(overrides.pop("config", default))
    written = {key: (value, f"in {path}") for key, value in load_yaml(path).items()}
    written |= {key: (value, "on the command line") for key, value in overrides.items()}
    owners = {field.name: cls for cls in reversed(classes) for field in dataclasses.fields(cls) if field.init}
    values: dict[type, dict[str, Any]] = {cls: {} for cls in classes}
    for key, (value, place) in written.items():
        if key not in owners:
            near = difflib.get_close_matches(key, owners, n=1)
            cure = f"Did you mean '{near[0]}'?" if near else "See the recipes/ folder for the keys there are."
            raise SystemExit(f"Unknown recipe key '{key}' (value {value!r}) {place}. {cure}")
        values[owners[key]][key] = check_type(owners[key], key, value, place)
    return tuple(build(cls, values[cls], path) for cls in classes)


def read_overrides(argv: list[str]) -> dict[str, Any]:
    """`["--block_size", "64", "--packing=false"]` becomes `{"block_size": 64, "packing": False}`.

    A flag without a value means true; several values make a list. Values are read as YAML, so types come out right.
    """
    overrides: dict[str, Any] = {}
    key = None
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].replace("-", "_").partition("=")
            overrides[key] = [value] if equals else []
        elif key is None:
            raise SystemExit(f"Do not understand '{word}'. Overrides are written as --key value.")
        else:
            overrides[key].append(word)
    parsed = {key: [parse_scalar(word) for word in words] for key, words in overrides.items()}
    return {key: True if not words else words[0] if len(words) == 1 else words for key, words in parsed.items()}


def parse_scalar(word: str) -> Any:
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def find_recipe(name: str) -> Path:
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path
    raise SystemExit(f"There is no recipe '{name}', neither here nor in {ROOT}. Recipes are YAML files, see recipes/.")


def load_yaml(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SystemExit(f"{path} is not valid YAML: {error}") from None
    if not isinstance(recipe, Mapping):
        raise SystemExit(f"{path} holds {type(recipe).__name__}, not a list of 'key: value' lines.")
    return dict(recipe)


def check_type(cls: type, key: str, value: Any, place: str) -> Any:
    """Return `value` as the field's type.

    Text that reads as a number is accepted for a float (YAML's `1e-4`), and one item for a list of one.
    """
    hint = typing.get_type_hints(cls)[key]
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if isinstance(value, str) and float in choices:
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) and not accepts_bool(hint):
        raise SystemExit(f"Recipe key '{key}' is {value!r} {place}, but must be {describe(hint)}.")
    if isinstance(value, (str, int, float)) and all(typing.get_origin(part) in (list, None) for part in choices):
        wants_list = any(typing.get_origin(part) is list for part in choices) and type(value) not in choices
        value = [value] if wants_list else value
    try:
        config = None if dataclasses.is_dataclass(hint) else ConfigDict(arbitrary_types_allowed=True)
        return TypeAdapter(hint, config=config).validate_python(value)
    except ValidationError:
        raise SystemExit(f"Recipe key '{key}' is {value!r} {place}, but must be {describe(hint)}.") from None


def accepts_bool(hint: Any) -> bool:
    return hint in (bool, Any) or any(accepts_bool(part) for part in typing.get_args(hint))


def describe(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def build(cls: type, values: dict[str, Any], path: Path) -> Any:
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.init and field.name not in values
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SystemExit(f"{path} lacks the key{'s' if missing[1:] else ''} {', '.join(missing)}.")
    try:
        made = cls(**values)
    except ValueError as error:
        raise SystemExit(f"{path}: {error}") from error
    made.written = values  # what the recipe and the command line said, for the record of the run
    return made
