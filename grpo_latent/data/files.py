"""Files of rows in verl's schema, parquet or JSON, as one kind of row.

What columns are called and how a cell is spelled ends here.

    file ──iter_verl_rows──▶ ({"data_source", "prompt", "images", "reward_model", …}, "file row 7")

JSON is read by Python's own reader, so that "007", "1e5" and "2026-11-28" stay the texts that they
are: `datasets` guesses types by column and gives back dates.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_latent.errors import ConfigError, DataError

REQUIRED_COLUMNS = ("data_source", "prompt", "reward_model")
JSON_SUFFIXES = (".json", ".jsonl")
ROWS_PER_GROUP = 1024
_STRUCTS = ("reward_model", "extra_info")
_SCHEMA = "see the schema in grpo_latent/data/rows.py"


@dataclass(frozen=True)
class RowKeys:
    """Names of the columns that hold prompts and images: verl's `data.prompt_key`, `image_key`."""

    prompt: str = "prompt"
    images: str = "images"

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> RowKeys:
        """Of a config's group `data`; raises `ConfigError` where a key is no name."""
        names = {}
        for field, key in (("prompt", "prompt_key"), ("images", "image_key")):
            name = data.get(key, field)
            if not isinstance(name, str) or not name:
                raise ConfigError(
                    "not a column", where=f"data.{key}", got=name, expected="a column's name"
                )
            names[field] = name
        taken = set(names.values()) & {*REQUIRED_COLUMNS, "extra_info"} - {"prompt"}
        if taken or names["prompt"] == names["images"]:
            key = "prompt_key" if names["prompt"] in taken else "image_key"
            raise ConfigError(
                "a column that holds something else",
                where=f"data.{key}",
                got=data.get(key),
                expected="a column of its own",
                fix=f"Leave data.{key} out, or name the column.",
            )
        return cls(**names)

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(self.prompt if name == "prompt" else name for name in REQUIRED_COLUMNS)


def is_json(path: str | Path) -> bool:
    return Path(path).suffix in JSON_SUFFIXES


def iter_verl_rows(
    path: str | Path, keys: RowKeys | None = None, rows_per_batch: int = ROWS_PER_GROUP
) -> Iterator[tuple[dict, str]]:
    """(row, file and row for messages) of a file; the rows are not checked.

    Prompt and images stand under `prompt` and `images`, whatever their columns are called.

    Raises:
        DataError: not a parquet or JSON file, columns missing, no rows, or a struct's JSON text
            that does not parse.
    """
    keys = keys or RowKeys()
    records = (
        _json_records(path) if is_json(path) else _parquet_records(path, keys, rows_per_batch)
    )
    index = -1
    for index, record in enumerate(records):
        where = f"{path} row {index}"
        if is_json(path):
            _check_columns(record, keys, where)
        yield as_row(record, keys, where), where
    if index < 0:
        raise _no_rows(path, "an empty file")


def num_rows(path: str | Path) -> int | None:
    """The number of rows of a parquet file, None of a JSON file, which says none."""
    return None if is_json(path) else _open_parquet(path).metadata.num_rows


def as_row(record: dict, keys: RowKeys, where: str) -> dict:
    """A record with prompt and images under their usual names, and structs that are structs.

    Raises:
        DataError: a struct's JSON text does not parse.
    """
    named = {"prompt", "images", keys.prompt, keys.images}
    row = {name: value for name, value in record.items() if name not in named}
    row |= {"prompt": record.get(keys.prompt), "images": record.get(keys.images)}
    for name in _STRUCTS:
        if isinstance(row.get(name), str):
            row[name] = _parsed(row[name], f"{where}: {name}")
    return row


def _parsed(text: str, where: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(
            "a text that is no JSON",
            where=where,
            got=text,
            expected="a struct, or the JSON text of an object",
            fix="Store a struct.",
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            "JSON text of something else",
            where=where,
            got=text,
            expected="the JSON text of an object",
            fix="Store a struct.",
        )
    return value


def _open_parquet(path: str | Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            "not a readable parquet file",
            where=str(path),
            got=str(error),
            expected="a parquet file in verl's schema, or .json or .jsonl",
            fix="Check the path; `python -m grpo_latent.data.formats.lvr_json to-parquet` "
            "converts LVR JSON.",
        ) from error


def _parquet_records(path: str | Path, keys: RowKeys, rows_per_batch: int) -> Iterator[dict]:
    import pyarrow as pa

    file = _open_parquet(path)
    names = file.schema_arrow.names
    missing = _missing_names(names, keys)
    if missing:
        got = f"columns {names}, {file.metadata.num_rows} rows"
        raise _missing(missing, keys, str(path), got)
    if file.metadata.num_rows == 0:
        raise _no_rows(path, f"columns {names}, 0 rows")
    columns = [name for name in (*keys.required, keys.images, "extra_info") if name in names]
    index = 0
    try:
        for batch in file.iter_batches(rows_per_batch, columns=columns):
            for record in batch.to_pylist():
                yield record
                index += 1
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            "a parquet file that is damaged",
            where=f"{path} after row {index - 1}",
            got=f"{type(error).__name__}: {error}",
            expected=f"{file.metadata.num_rows} rows",
            fix="Write or copy the file again.",
        ) from error


def _json_records(path: str | Path) -> Iterator[dict]:
    """Records of a JSON list or of JSON lines, whatever the suffix says, as in `datasets`."""
    try:
        with open(path, encoding="utf-8") as file:
            start = file.read(1)
            while start and start.isspace():
                start = file.read(1)
            file.seek(0)
            yield from _list_of(path, json.load(file)) if start == "[" else _lines_of(path, file)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            "not a readable JSON file",
            where=str(path),
            got=f"{type(error).__name__}: {error}",
            expected="a JSON list of records, or one record a line",
            fix="Check the path and the file's first lines.",
        ) from error


def _lines_of(path: str | Path, lines: Iterable[str]) -> Iterator[dict]:
    filled = (line for line in lines if line.strip())
    for index, line in enumerate(filled):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                "a line that is no JSON",
                where=f"{path} row {index}",
                got=f"{error}: {line.strip()}",
                expected="one record a line",
                fix="Write the line again, or drop it.",
            ) from error
        yield _record(record, f"{path} row {index}")


def _list_of(path: str | Path, records: list) -> Iterator[dict]:
    for index, record in enumerate(records):
        yield _record(record, f"{path} row {index}")


def _record(record: object, where: str) -> dict:
    if not isinstance(record, dict):
        raise DataError(
            "not a record",
            where=where,
            got=record,
            expected="an object with verl's columns",
            fix=f"{_SCHEMA[0].upper()}{_SCHEMA[1:]}.",
        )
    return record


def _check_columns(record: dict, keys: RowKeys, where: str) -> None:
    missing = _missing_names(record, keys)
    if missing:
        raise _missing(missing, keys, where, f"columns {list(record)}")


def _missing_names(names: Collection[str], keys: RowKeys) -> list[str]:
    """What must be there; images need not, but no others must stand where they are looked for."""
    required = [*keys.required]
    if "images" in names:
        required.append(keys.images)
    return [name for name in required if name not in names]


def _missing(missing: list[str], keys: RowKeys, where: str, got: str) -> DataError:
    return DataError(
        f"columns {missing} are missing",
        where=where,
        got=got,
        expected=f"columns {list(keys.required)}, and {keys.images} and extra_info where they "
        "apply",
        fix="Rename or add the columns, or name the prompt's by data.prompt_key and the images' "
        f"by data.image_key; {_SCHEMA}.",
    )


def _no_rows(path: str | Path, got: str) -> DataError:
    return DataError("no rows", where=str(path), got=got, expected="at least one row")
