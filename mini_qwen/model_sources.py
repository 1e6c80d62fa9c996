"""The models that a command line names, folders or URLs: each is checked before the first one is loaded."""

import os
from collections.abc import Sequence

from mini_qwen.backends import Backend, LocalBackend
from mini_qwen.engine import Engine
from mini_qwen.model import check_checkpoint
from mini_qwen.remote import RemoteBackend, read_address

MAX_MODELS = 4
KEYS_VARIABLE = "MINI_QWEN_API_KEYS"


def open_backends(sources: Sequence[str], keys: Sequence[str], parallel: int, timeout: float) -> list[Backend]:
    """One backend for each source, a checkpoint's folder or a URL such as http://host:8000/v1 or http://host:8000/v1#model.

    Everything is checked before the first checkpoint is loaded; no URL is called yet.

    Args:
        keys: of the URLs, see `read_keys`.
        parallel: how many answers a checkpoint writes at the same time.
        timeout: seconds that a URL may take for the next piece of its answer.

    Raises SystemExit: no source or too many, one that is twice there, a folder that is no checkpoint, a bad URL.
    """
    if not sources:
        raise SystemExit("Name what shall answer: a checkpoint such as demo_results/dpo, or http://host:8000/v1.")
    if len(sources) > MAX_MODELS:
        raise SystemExit(f"There are {len(sources)} models, but side by side there is room for {MAX_MODELS}.")
    urls = [source for source in sources if "://" in source]
    secrets = dict(zip(urls, read_keys(keys, len(urls)), strict=True))
    backends: dict[str, Backend | None] = {}
    for source in sources:
        backend = RemoteBackend(read_address(source), secrets[source], timeout) if source in secrets else None
        name = backend.name if backend else source
        if name in backends:
            raise SystemExit(f"'{name}' is named twice. Name each model once; of a URL, #model chooses the model.")
        if backend is None:
            check_checkpoint(source)
        backends[name] = backend
    for name, backend in backends.items():
        if backend is None:
            print(f"loading {name}", flush=True)
        backends[name] = backend or LocalBackend(Engine(name, parallel))
    return [backend for backend in backends.values() if backend is not None]


def read_keys(given: Sequence[str], num_urls: int) -> list[str | None]:
    """The key of each URL in their order: `none`, the key itself, or `env:NAME` for an environment variable.

    Without them those of MINI_QWEN_API_KEYS count, separated by blanks; without these no URL gets a key, so that no
    key goes to a server for which it is not meant. Raises SystemExit, which never repeats a key.
    """
    place = "--api_keys" if given else KEYS_VARIABLE
    given = given or os.environ.get(KEYS_VARIABLE, "").split()
    if not given:
        return [None] * num_urls
    if len(given) != num_urls:
        raise SystemExit(
            f"{place} holds {len(given)} keys for {num_urls} URLs. Give one for each in their order, `none` where "
            "none is needed, or env:NAME for an environment variable."
        )
    keys: list[str | None] = []
    for word in given:
        name = word.removeprefix("env:")
        if word != name and not os.environ.get(name):
            raise SystemExit(f"{place} says env:{name}, but there is no environment variable {name}.")
        key = os.environ[name] if word != name else word
        if not key.isascii() or not key.isprintable():
            raise SystemExit(f"{place} holds a key with characters that no HTTP header can carry.")
        keys.append(None if word == "none" else key)
    return keys
