"""Cut a small copy of the data: the first rows of the first file of every folder, all columns and types kept.

    python utils/save_mini_data.py --source data --target mini_data_real --rows 100

Reads:  SOURCE/{pt,sft,dpo}/**/*.parquet; of the preference data, the first train-* and the first test-* file.
Writes: the same paths below TARGET, which must be new or empty.
"""

import argparse
from pathlib import Path

import pyarrow as pa
from pyarrow.parquet import ParquetFile, ParquetWriter
from tqdm import tqdm

STAGES = ("pt", "sft", "dpo")


def first_files(source: Path) -> list[Path]:
    """The files to cut: the first of every folder by name, but of dpo one for each split (the name up to a "-")."""
    chosen: dict[tuple[Path, str], Path] = {}
    for stage in STAGES:
        for path in sorted((source / stage).rglob("*.parquet")):
            split = path.name.partition("-")[0] if stage == "dpo" else ""
            chosen.setdefault((path.parent, split), path)
    return list(chosen.values())


def open_files(paths: list[Path]) -> list[ParquetFile]:
    """Open every file, which reads its footer only. Raises SystemExit with the name of the first that is damaged."""
    opened = []
    for path in paths:
        try:
            opened.append(ParquetFile(path))
        except (OSError, pa.ArrowException) as error:
            cure = "`./prepare.sh --check` lists all such files; delete it and fetch it again."
            raise SystemExit(f"{path} does not open as parquet ({error}): {cure}") from None
    return opened


def save_rows(parquet: ParquetFile, target: Path, rows: int) -> int:
    """Write the first `rows` rows to `target`, reading no more than those; return how many there were."""
    target.parent.mkdir(parents=True, exist_ok=True)
    saved = 0
    with ParquetWriter(target, parquet.schema_arrow) as writer:
        for batch in parquet.iter_batches(batch_size=min(rows, 1024)):
            writer.write_batch(batch.slice(0, rows - saved))
            saved += min(batch.num_rows, rows - saved)
            if saved == rows:
                break
    return saved


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, refuse what cannot work before anything is written, cut, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("data"), help="folder with pt, sft, dpo (default: data)")
    parser.add_argument("--target", type=Path, required=True, help="new folder for the small copy")
    parser.add_argument("--rows", type=int, default=100, help="rows of every file (default: 100)")
    args = parser.parse_args(argv)

    if args.rows < 1:
        raise SystemExit(f"--rows is {args.rows}: take 1 or more.")
    if not args.source.is_dir():
        raise SystemExit(
            f"--source {args.source} is not a folder: `./prepare.sh` makes data/, or name another folder."
        )
    if args.target.exists() and (not args.target.is_dir() or any(args.target.iterdir())):
        raise SystemExit(f"--target {args.target} exists and is not an empty folder: name a new one, or delete it.")
    paths = first_files(args.source)
    if not paths:
        wanted = ", ".join(f"{args.source}/{stage}" for stage in STAGES)
        raise SystemExit(f"There is no .parquet file in {wanted}: `./prepare.sh` fetches them.")

    lines = []
    for path, parquet in zip(tqdm(paths, unit="file"), open_files(paths), strict=True):
        relative = path.relative_to(args.source)
        saved = save_rows(parquet, args.target / relative, args.rows)
        lines.append((relative.as_posix(), saved, parquet.metadata.num_rows))

    width = max(len(name) for name, _, _ in lines)
    print(f"{'file':<{width}} {'rows':>8} {'of':>12}")
    for name, saved, total in lines:
        print(f"{name:<{width}} {saved:>8,} {total:>12,}")
    print(f"{f'{len(lines)} files in {args.target}':<{width}} {sum(saved for _, saved, _ in lines):>8,}")


if __name__ == "__main__":
    main()
