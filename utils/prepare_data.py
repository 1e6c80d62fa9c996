"""Fetch the items that prepare.sh lists, or check what is there. Started by prepare.sh: items on standard input."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow.parquet import ParquetFile


class Item(NamedTuple):
    """One line of prepare.sh: `many` ("all", or so many) of the files `names` in `folder` of `repo` go to `target`."""

    kind: str
    repo: str
    folder: str
    names: str
    many: str
    target: str
    columns: str


def remote_sizes(hub: str, item: Item) -> dict[str, int]:
    """Ask the hub for the files that the item wants: {path in the repository: bytes}, sorted by path."""
    if hub == "huggingface":
        from huggingface_hub.hf_api import HfApi, RepoFile

        tree = HfApi().list_repo_tree(item.repo, item.folder.strip("/") or None, recursive=True, repo_type=item.kind)
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    else:
        from modelscope.hub.api import HubApi

        entries, page = HubApi().get_model_files(item.repo) if item.kind == "model" else [], 0
        while item.kind == "dataset" and len(entries) == 100 * page:
            page += 1
            entries += HubApi().get_dataset_files(item.repo, root_path=item.folder, page_number=page, page_size=100)
        sizes = {entry["Path"]: entry["Size"] for entry in entries if entry.get("Type") != "tree"}
    below = [path for path in sorted(sizes) if path.startswith(f"{item.folder}/".lstrip("/"))]
    paths = [path for path in below if any(Path(path).match(name) for name in item.names.split(","))]
    if not paths:
        raise SystemExit(f"{item.repo} on {hub} has no {item.names} in {item.folder}: try the other hub with --hub.")
    return {path: sizes[path] for path in paths[: None if item.many == "all" else int(item.many)]}


def fetch(hub: str, item: Item, paths: list[str], folder: Path) -> None:
    """Let the hub's client bring `paths` below `folder`; it takes up what an earlier run left there."""
    if hub == "huggingface":
        from huggingface_hub import snapshot_download
    else:
        from modelscope.hub.snapshot_download import snapshot_download
    snapshot_download(item.repo, repo_type=item.kind, allow_patterns=paths, local_dir=str(folder))
    # huggingface_hub only warns, and returns, when the network is lost and the folder holds anything.
    if lost := [path for path in paths if not (folder / path).is_file()]:
        raise ConnectionError(f"{lost[0]} did not arrive")


def call_client(call: Callable[..., Any], hub: str, item: Item, *args: Any) -> Any:
    """Do one thing with the hub's client; where that fails, end with one paragraph that says what to do."""
    try:
        return call(hub, item, *args)
    except Exception as error:  # the clients raise from unrelated families: their own, those of requests and httpx
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        cure = "Check the network and the proxy"
        if re.search(r"\b40[13]\b|gated|PermissionDenied|authenti", reason, re.IGNORECASE):
            cure = "Accept the conditions on its page and log in with `modelscope login` or `hf auth login`"
        told = f"Could not fetch {item.target} ({item.repo} on {hub}). {reason}. {cure}"
        raise SystemExit(f"{told}, then run the same command again: it continues where this one stopped.") from None


def download(items: list[Item], hub: str, root: Path) -> None:
    """Bring every missing or incomplete file of the items to its place below `root`."""
    missing = []
    for item in items:
        there = {path.name: path.stat().st_size for path in (root / item.target).glob("*")}
        sizes = call_client(remote_sizes, hub, item)
        missing.append({path: size for path, size in sizes.items() if there.get(Path(path).name) != size})
        print(f"{item.target}: {len(missing[-1])} of {len(sizes)} files to fetch", flush=True)
    needed, free = sum(sum(sizes.values()) for sizes in missing), shutil.disk_usage(root).free
    if needed > free:
        raise SystemExit(f"{needed:,} bytes do not fit into {root} ({free:,} free): take a larger disk with --to.")
    for item, sizes in zip(items, missing, strict=True):
        # Files move to their place when they are whole, so that training never reads a half one.
        staging, target = root / f"data/.download-{Path(item.repo).name}", root / item.target
        if sizes:
            print(f"{item.target}: fetching {sum(sizes.values()):,} bytes", flush=True)
            call_client(fetch, hub, item, list(sizes), staging)
            target.mkdir(parents=True, exist_ok=True)
        for path in sizes:
            (staging / path).replace(target / Path(path).name)
    for repo in {item.repo for item in items}:
        shutil.rmtree(root / f"data/.download-{Path(repo).name}", ignore_errors=True)


def inspect_file(path: Path, columns: list[str]) -> tuple[int, str]:
    """Count the rows of a file and say what is wrong with it ("" for nothing)."""
    with path.open("rb") as file:
        head = file.read(256).lstrip().lower()
    if other := re.match(rb"(version https://git-lfs)|<!doctype html|<html", head):
        return 0, f"is {'a Git LFS pointer' if other[1] else 'an HTML page'}, not the data"
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        if path.suffix != ".parquet":
            return 0, "" if head else "is empty"
        with ParquetFile(path) as parquet:
            lost = [column for column in columns if column not in parquet.schema_arrow.names]
            return parquet.metadata.num_rows, f"has no column {' and '.join(lost)}" if lost else ""
    except (OSError, ValueError) as error:
        return 0, f"is cut off or damaged ({' '.join(str(error).split())[:90]})"


def check(items: list[Item], root: Path) -> None:
    """Print what is there, item by item; end with all problems where there are any."""
    line, problems = "{:<73} {:>5} {:>11} {:>10}  {}", []
    print(line.format("item", "files", "rows", "MB", "result"))
    for item in items:
        found = {f"{item.target}/{name}": sorted((root / item.target).glob(name)) for name in item.names.split(",")}
        paths = [path for some in found.values() for path in some]
        reports = [inspect_file(path, item.columns.split(",")) for path in paths]
        wrong = [f"{name} is missing" for name, some in found.items() if not some]
        wrong += [f"{path.relative_to(root)} {what}" for path, (_, what) in zip(paths, reports, strict=True) if what]
        # A shard's name tells how many there are, as in train-00000-of-00075.parquet.
        told = re.findall(r"-of-(\d+)\.", paths[0].name if paths else "") or [item.many.replace("all", "0")]
        if 0 < len(paths) < int(told[0]):
            wrong.append(f"{item.target} has {len(paths)} of {int(told[0])} files")
        rows, size = sum(rows for rows, _ in reports), sum(path.stat().st_size for path in paths)
        name, result = item.target if len(found) > 1 else next(iter(found)), "problem" if wrong else "ok"
        print(line.format(name, len(paths), f"{rows:,}" if rows else "-", f"{size / 1e6:,.1f}", result), flush=True)
        problems += wrong
    if problems:
        cure = "Delete damaged files and run prepare.sh again without --check: only what is missing is fetched."
        raise SystemExit("\n".join(["", *problems, cure]))


def main(action: str, hub: str, to: str) -> None:
    """Check the items of standard input below the folder `to`; with the action "download", fetch them first."""
    items, root = [Item(*line.split()[1:8]) for line in sys.stdin], Path(to).resolve()
    try:
        if action == "download":
            download(items, hub, root)
        check(items, root)
    except (KeyboardInterrupt, OSError) as error:
        raise SystemExit(f"Stopped: {error!r}. Run the same command again to continue.") from None


if __name__ == "__main__":
    main(*sys.argv[1:])
