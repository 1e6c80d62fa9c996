"""Recipes: flat YAML files, the one place of hyperparameters, checked strictly before anything else happens."""

import contextlib
import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

SECRET = re.compile("token$|keys?$|secret|password|credential", re.IGNORECASE)
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
    path = find_recipe(" ".join(overrides.pop("config", [default])) or "(--config names none)")
    written = {key: (value, f"in {path}") for key, value in load_yaml(path).items()}
    written |= {key: (words, "on the command line") for key, words in overrides.items()}
    owners = {field.name: cls for cls in reversed(classes) for field in dataclasses.fields(cls) if field.init}
    values: dict[type, dict[str, Any]] = {cls: {} for cls in classes}
    for key, (value, place) in written.items():
        if key not in owners:
            near = difflib.get_close_matches(key, owners, n=1)
            cure = f"Did you mean '{near[0]}'?" if near else "See the recipes/ folder for the keys there are."
            raise SystemExit(f"Unknown recipe key '{key}' (value {show(key, value)}) {place}. {cure}")
        owner = owners[key]
        instead = getattr(owner, "decided", {}).get(key)
        if instead is not None:
            raise SystemExit(f"Recipe key '{key}' {place} has no effect here. Set instead: {instead}.")
        value = read_words(typing.get_type_hints(owner)[key], value) if isinstance(value, Words) else value
        values[owner][key] = check_type(owner, key, value, place)
    return tuple(build(cls, values[cls], path) for cls in classes)


class Words(list[str]):
    """What stands behind one --key on the command line, as typed."""


def read_overrides(argv: list[str]) -> dict[str, Words]:
    """`["--block_size", "64", "--packing=false"]` becomes `{"block_size": ["64"], "packing": ["false"]}`."""
    overrides: dict[str, Words] = {}
    key = None
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            overrides[key] = Words([value] if equals else [])
        elif key is None:
            raise SystemExit(f"Do not understand '{word}'. Overrides are written as --key value.")
        else:
            overrides[key].append(word)
    return overrides


def read_words(hint: Any, words: Words) -> Any:
    """The value that the words stand for: text stays as typed where the key is text, all else is read as YAML.

    No word means true, several make a list, one may be a YAML list or mapping; `null` is nothing for every key.
    """
    choices = hint_choices(hint)
    is_text = str in choices or any(typing.get_args(part) == (str,) for part in choices)
    keep = is_text and bool not in choices and words != ["null"]
    parsed = list(words) if keep else [parse_scalar(word) for word in words]
    if keep and len(words) == 1 and words[0][:1] in ("[", "{") and isinstance(parse_scalar(words[0]), list | dict):
        parsed = [parse_scalar(words[0])]
    return True if not parsed else parsed[0] if len(parsed) == 1 else parsed


def parse_scalar(word: str) -> Any:
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def show(key: str, value: Any) -> str:
    """For a message; what the key calls a secret is not said."""
    if SECRET.search(key):
        return "not shown"
    return repr(" ".join(value) if isinstance(value, Words) else value)


def hint_choices(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type hint: `int | None` -> (int, NoneType), `int` -> (int,)."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


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
    wrong = [key for key in recipe if not isinstance(key, str)]
    if wrong:
        raise SystemExit(f"{path} has the key {wrong[0]!r}, which YAML does not read as text. Keys are names.")
    return dict(recipe)


def check_type(cls: type, key: str, value: Any, place: str) -> Any:
    """Return `value` as the field's type.

    Text that reads as a number is accepted for a float (YAML's `1e-4`), and one item for a list of one.
    """
    hint = typing.get_type_hints(cls)[key]
    choices = hint_choices(hint)
    if isinstance(value, str) and float in choices:
        with contextlib.suppress(ValueError):
            value = float(value)
    if value is False and any(isinstance(part, type) and issubclass(part, Enum) for part in choices):
        value = "no"  # what YAML reads an unquoted `no` as, the name of a strategy here
    if isinstance(value, bool) and not accepts_bool(hint):
        raise SystemExit(f"Recipe key '{key}' is {value!r} {place}, but must be {describe(hint)}.")
    if isinstance(value, (str, int, float)) and all(typing.get_origin(part) in (list, dict, None) for part in choices):
        wants_list = any(typing.get_origin(part) is list for part in choices) and type(value) not in choices
        value = [value] if wants_list else value
    try:
        config = None if dataclasses.is_dataclass(hint) else ConfigDict(arbitrary_types_allowed=True)
        return TypeAdapter(hint, config=config).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        inside, wrong = walk(value, first["loc"])
        if not inside:
            raise SystemExit(f"Recipe key '{key}' is {value!r} {place}, but must be {describe(hint)}.") from None
        name = ".".join([key, *inside])
        raise SystemExit(f"Recipe key '{name}' is {wrong!r} {place}: {first['msg'].lower()}.") from None


def walk(value: Any, path: tuple[Any, ...]) -> tuple[list[str], Any]:
    """The keys of `path` that lead into a mapping, and what stands there; names of types in it are passed over.

    >>> walk({"bbc": {"by": "guess"}}, ("bbc", "Task", "by"))
    (['bbc', 'by'], 'guess')
    """
    names = []
    for key in path:
        if isinstance(value, dict) and key in value:
            names.append(str(key))
            value = value[key]
    return names, value


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
