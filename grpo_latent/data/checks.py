"""A pass over all rows of all files before anything starts.

It finds what one of them would break later, and what verl's filter would drop without a word.

    file ──digest──▶ known? ──no──▶ rows ▸ structure ▸ images decoded (threads) ▸ prompt length
                                                                                ──▶ CheckedFile

A file that has passed is not read again: its verdict is kept under the digest of its bytes, of
what counts its prompts, and of this code. Image files beside it count by size and time.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import PIL

from grpo_latent.common import pictures
from grpo_latent.common.files import write_text
from grpo_latent.data import examples, files, image_refs, rows
from grpo_latent.data.files import RowKeys, iter_verl_rows
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.data.rows import parse_prompt
from grpo_latent.errors import DataError
from grpo_latent.models import prompts
from grpo_latent.models.prompts import PromptLength

ROWS_PER_BATCH = 256  # whose image files are in memory at once
ROWS_PER_TASK = 16
MAX_PROBLEMS = 20  # after which a file is not read on
MAX_THREADS = 16


@dataclass(frozen=True)
class CheckedFile:
    """What the pass learned of a file, by row.

    Attributes:
        indices: `extra_info.index` as text.
        num_tokens: of the prompt, image tokens included.
        image_files: (path, bytes, time in ns) of images that lie outside the file.
    """

    indices: list[str]
    num_tokens: list[int]
    image_files: list[list]

    def __len__(self) -> int:
        return len(self.indices)


def check_files(
    paths: Sequence[str | Path],
    length: PromptLength,
    keys: RowKeys | None = None,
    advance: Callable[[int], None] = lambda num_rows: None,
) -> list[CheckedFile]:
    """Checks every row of every file as RL needs it.

    Args:
        length: of the model that will be trained.
        advance: called with numbers of rows that are done, for a progress bar.

    Raises:
        DataError: the first row of a file that cannot be used, with the numbers of further ones;
            an index that two rows have; a file that cannot be read.
    """
    keys = keys or RowKeys()
    checked = [_check_file(str(path), length, keys, advance) for path in paths]
    seen: dict[str, str] = {}
    for path, file in zip(paths, checked, strict=True):
        for number, index in enumerate(file.indices):
            where = f"{path} row {number}"
            if index in seen:
                raise DataError(
                    "two rows have one index",
                    where=f"{where}: extra_info.index",
                    got=f"{index}, as {seen[index]}",
                    expected="an index that is unique over all files: it seeds the row's "
                    "trajectories and names its dumps",
                    fix="Number the rows of the second file on from the first.",
                )
            seen[index] = where
    return checked


def _check_file(
    path: str, length: PromptLength, keys: RowKeys, advance: Callable[[int], None]
) -> CheckedFile:
    cache = _cache_file(path, length, keys)
    known = _known(cache)
    if known is not None:
        advance(len(known))
        return known
    indices: list[str] = []
    num_tokens: list[int] = []
    image_files: dict[str, None] = {}
    problems: list[DataError] = []
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        for batch in _batches(iter_verl_rows(path, keys, ROWS_PER_BATCH), ROWS_PER_BATCH):
            parsed = [_caught(_parse, row, where) for row, where in batch]
            for (_, where), row, sizes in zip(batch, parsed, _sizes(pool, parsed), strict=True):
                found = row if isinstance(row, DataError) else sizes
                if not isinstance(found, DataError):
                    found = _caught(length, row.messages, sizes, where)
                if isinstance(found, DataError):
                    problems.append(found)
                    continue
                indices.append(row.index)
                num_tokens.append(found)
                image_files |= {str(ref.path): None for ref in row.images if ref.path}
            advance(len(batch))
            if len(problems) >= MAX_PROBLEMS:
                break
    if problems:
        raise _with_others(problems)
    checked = CheckedFile(indices, num_tokens, [_stamp(path) for path in image_files])
    _keep(cache, checked)
    return checked


@dataclass(frozen=True)
class _Row:
    messages: list[dict]
    images: list[ImageRef]
    index: str


def _parse(row: dict, where: str) -> _Row:
    messages, images = parse_prompt(row, where)
    index = (row.get("extra_info") or {}).get("index")
    if isinstance(index, bool) or not isinstance(index, int | str):
        raise DataError(
            "a row has no index",
            where=f"{where}: extra_info.index",
            got=repr(index),
            expected="a number or text that is unique over all files: it seeds the row's "
            "trajectories and names its dumps",
            fix="Number the rows.",
        )
    return _Row(messages, images, str(index))


def _caught(function: Callable, *arguments):
    """What `function` returns, or the `DataError` that it raises."""
    try:
        return function(*arguments)
    except DataError as error:
        return error


def _sizes(pool: ThreadPoolExecutor, parsed: Sequence[_Row | DataError]) -> Iterator:
    """By row the sizes of its images, decoded by several threads, or a `DataError`."""

    def decode(task: Sequence[_Row | DataError]) -> list:
        return [
            [] if isinstance(row, DataError) else _caught(_sizes_of, row.images) for row in task
        ]

    return itertools.chain.from_iterable(pool.map(decode, _batches(parsed, ROWS_PER_TASK)))


def _sizes_of(images: Sequence[ImageRef]) -> list[tuple[int, int]]:
    return [image.decoded_size() for image in images]


def _batches(items, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _with_others(problems: list[DataError]) -> DataError:
    """The first problem, which says where the others are."""
    first, others = problems[0], problems[1:]
    if not others:
        return first
    more = "or more " if len(problems) >= MAX_PROBLEMS else ""
    places = ", ".join(
        (error.where or "").rpartition(" row ")[2].partition(":")[0] for error in others
    )
    fix = f"{first.fix or ''} {len(others)} {more}further rows are refused, too: {places}.".strip()
    return DataError(
        first.what, where=first.where, got=first.got, expected=first.expected, fix=fix
    )


# ---- verdicts that are kept -----------------------------------------------------------------


def cache_folder() -> Path:
    """Where verdicts lie: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "grpo_latent/rows"


def _cache_file(path: str, length: PromptLength, keys: RowKeys) -> Path | None:
    try:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError:
        return None  # the reader says what is wrong with the file
    what = [content, length.digest(), asdict(keys), PIL.__version__, _code_digest()]
    key = hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()
    return cache_folder() / f"{key}.json"


@functools.cache
def _code_digest() -> str:
    """Of the modules that say what a usable row is: a verdict of other code is none."""
    digest = hashlib.blake2b(digest_size=16)
    for module in (pictures, image_refs, examples, files, rows, prompts):
        digest.update(Path(module.__file__ or "").read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()


def _known(cache: Path | None) -> CheckedFile | None:
    if cache is None:
        return None
    try:
        checked = CheckedFile(**json.loads(cache.read_text(encoding="utf-8")))
        unchanged = all(_stamp(path) == [path, *rest] for path, *rest in checked.image_files)
    # half of a file, or an image that is gone: the rows are read again, which says what is wrong
    except (OSError, ValueError, TypeError):
        return None
    return checked if unchanged else None


def _stamp(path: str) -> list:
    stat = os.stat(path)
    return [path, stat.st_size, stat.st_mtime_ns]


def _keep(cache: Path | None, checked: CheckedFile) -> None:
    if cache is None:
        return
    try:
        write_text(cache, json.dumps(asdict(checked)))
    except (
        OSError
    ):  # a home that cannot be written costs the next start this pass, and nothing else
        pass
