"""A JSON file of records, or one record a line, as published data sets come."""

from __future__ import annotations

import json
from pathlib import Path

from grpo_latent.errors import DataError


def read_json_records(path: str | Path, what: str) -> list:
    """Reads the records of a file, each still unchecked.

    Args:
        what: is in the list, for messages.

    Raises:
        DataError: not JSON, or no records.
    """
    path = Path(path)
    expected = f"a JSON list of {what} (.json), or one record a line (.jsonl)"
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            "not a readable JSON file",
            where=str(path),
            got=str(error),
            expected=expected,
            fix="Check path and syntax.",
        ) from error
    if not isinstance(records, list) or not records:
        raise DataError(
            "no list of records",
            where=str(path),
            got=type(records).__name__ if not isinstance(records, list) else "an empty list",
            expected=expected,
            fix="Wrap the records in [ ... ].",
        )
    return records
