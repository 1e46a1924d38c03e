"""Reads a benchmark's files into items, and cuts them without cutting a question."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from grpo_latent.errors import ConfigError, DataError
from grpo_latent.eval.benchmarks.presets import find_preset
from grpo_latent.eval.benchmarks.protocol import Benchmark, BenchmarkItem
from grpo_latent.eval.benchmarks.registry import find_benchmark

AS_PUBLISHED, CORRECTED = LABELS = ("published", "corrected")


def load_benchmark(
    name: str,
    path: str | Path,
    subset: str | None = None,
    preset: str | None = None,
    labels: str = AS_PUBLISHED,
) -> list[BenchmarkItem]:
    """Reads the items of a benchmark, in file order.

    Args:
        name: key of `BENCHMARKS`, or package.module:NAME of a `Benchmark`.
        path: its folder as downloaded, or one of its files (images are then sought beside it).
        subset: only this category, such as BLINK's `Counting` or V*'s `relative_position`.
        preset: the paper that asks and counts them (`eval.benchmarks.presets`); None for our form.
        labels: one of `LABELS`: as published, or with the benchmark's `corrections`.

    Raises:
        ConfigError: unknown benchmark or preset, or no corrections are known.
        DataError: no such file, a malformed row, equal ids, a pair of which a half is missing,
            no row of the subset, or items that say to be another benchmark's.
    """
    benchmark = find_benchmark(name)
    asked_as = None if preset is None else find_preset(preset)
    if asked_as is not None:
        asked_as.form(benchmark.name)  # before gigabytes of images are read
    if labels == CORRECTED and not benchmark.corrections:
        raise ConfigError(
            "no labels of this benchmark are known to be wrong",
            where="data.benchmark.labels",
            got=f"{labels} for {benchmark.name}",
            expected=AS_PUBLISHED,
        )
    path = Path(path)
    items: list[BenchmarkItem] = []
    for file in _find_files(benchmark, path, subset):
        items += [
            item
            for item in _read_file(benchmark, file)
            if subset is None or item.category == subset
        ]
    if not items:
        raise _problem(
            benchmark,
            str(path),
            "no rows" if subset is None else f"no rows of subset {subset!r}",
            subset,
        )
    strangers = {item.benchmark for item in items} - {benchmark.name}
    if strangers:  # the report asks the registry by this name how groups are scored
        raise _problem(benchmark, str(path), f"items that are not {benchmark.name}'s", strangers)
    if len({item.item_id for item in items}) != len(items):
        raise _problem(benchmark, str(path), "two rows have one id", "val and test files mixed?")
    sizes = Counter(item.group_id for item in items)
    if benchmark.group_size is not None and set(sizes.values()) != {benchmark.group_size}:
        found = {group: size for group, size in sizes.items() if size != benchmark.group_size}
        got = dict(list(found.items())[:5])
        raise _problem(
            benchmark,
            str(path),
            f"not {benchmark.group_size} rows a group",
            f"rows by group: {got}",
        )
    if labels == CORRECTED:
        right = benchmark.corrections
        items = [replace(item, answer=right.get(item.item_id, item.answer)) for item in items]
    return items if asked_as is None else asked_as.apply(items)


def first_items(
    items: Sequence[BenchmarkItem], max_rows: int | None, where: str = "data.max_rows"
) -> list[BenchmarkItem]:
    """Takes the first `max_rows` items, or all; it is asked before anything is decoded.

    Scores are of groups as a whole (both questions of an MMVP pair, all rotations of an HRBench
    question), so a cut must not go through one.

    Raises:
        ConfigError: the cut goes through a group, or leaves nothing.
    """
    check_max_rows(max_rows, where)
    if max_rows is None or max_rows >= len(items):
        return list(items)
    last = {item.group_id: index for index, item in enumerate(items)}
    whole = []  # numbers of rows that cut no group
    end = 0
    # rows of a group need not stand together: a cut is whole where all groups before it have ended
    for index, item in enumerate(items):
        end = max(end, last[item.group_id])
        if end == index:
            whole.append(index + 1)
    if max_rows not in whole:
        below = [str(size) for size in whole if size < max_rows][-1:]
        above = [str(size) for size in whole if size > max_rows][:1]
        raise ConfigError(
            "rows of one question would be cut apart",
            where=where,
            got=max_rows,
            expected=" or ".join(below + above) + f", or null for all {len(items)} rows",
        )
    return list(items[:max_rows])


def check_max_rows(max_rows: object, where: str = "data.max_rows") -> None:
    """Checks that it is None or a count; raises `ConfigError`."""
    if max_rows is not None and (type(max_rows) is not int or max_rows < 1):
        raise ConfigError(
            "not a number of rows", where=where, got=max_rows, expected="int >= 1, or null for all"
        )


def _find_files(benchmark: Benchmark, path: Path, subset: str | None) -> list[Path]:
    if path.is_file():
        return [path]
    for pattern in benchmark.files:
        found = sorted(path.glob(f"**/{pattern}")) if path.is_dir() else []
        if found:
            # BLINK keeps each subset in a folder of its own name
            own = [file for file in found if subset is not None and subset in file.parts]
            return own or found
    listing = (
        sorted(entry.name for entry in path.iterdir())[:10] if path.is_dir() else "no such folder"
    )
    raise _problem(benchmark, str(path), f"no file of benchmark {benchmark.name}", listing)


def _problem(benchmark: Benchmark, where: str, what: str, got: object) -> DataError:
    return DataError(
        what,
        where=where,
        got=got,
        expected=benchmark.schema,
        fix=f"Get it with {benchmark.source} and pass its folder.",
    )


def _read_file(benchmark: Benchmark, file: Path) -> Iterator[BenchmarkItem]:
    if benchmark.read is not None:
        yield from benchmark.read(file)
        return
    assert benchmark.parse is not None  # one of the two is there: `Benchmark` checks it
    index = -1
    try:
        for index, row in enumerate(_rows(file)):
            where = f"{file} row {index}"
            row = _as_columns(row, benchmark)
            missing = [column for column in benchmark.columns if column not in row]
            if missing:
                raise _problem(
                    benchmark,
                    where,
                    f"columns {missing} are missing",
                    f"columns {sorted(map(str, row))}",
                )
            yield benchmark.parse(row, where, file)
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        what = f"not a readable {file.suffix} file"
        raise _problem(
            benchmark, f"{file} after row {index}", what, f"{type(error).__name__}: {error}"
        ) from error
    except (TypeError, AttributeError, LookupError) as error:  # a value of another type, or none
        got = f"{type(error).__name__}: {error}"
        raise _problem(benchmark, f"{file} row {index}", "malformed row", got) from error


def _as_columns(row: dict, benchmark: Benchmark) -> dict:
    """Names the row's cells as `columns` does, whatever the case and spaces of the header."""
    names = {column.lower(): column for column in benchmark.columns}
    names |= {name.lower(): column for name, column in benchmark.spellings.items()}
    named: dict[str, object] = {}
    for name, value in row.items():
        # csv keeps the cells beyond the header under None
        key = " ".join(name.split()) if isinstance(name, str) else name
        column = name if name in benchmark.columns else names.get(str(key).lower(), key)
        named.setdefault(column, value)
    return named


def _rows(file: Path) -> Iterable[dict]:
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(file).iter_batches(256):
            yield from batch.to_pylist()
    elif file.suffix == ".jsonl":
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    row = json.loads(line)
                    yield row if isinstance(row, dict) else {}
    elif file.suffix == ".json":
        with open(file, encoding="utf-8") as text:
            records = json.load(text)
        yield from (row if isinstance(row, dict) else {} for row in records)
    else:
        csv.field_size_limit(1 << 30)  # HRBench keeps 8k images as text
        with open(file, encoding="utf-8-sig", newline="") as lines:
            yield from csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
