"""Every figure of docs/results.md, docs/latent_use.md and README's table stands in its result files.

A block is the table or paragraph behind a line "Result files: …"; numbers with decimals count, and are
compared at the digits that are shown.
"""

import json
import re
from pathlib import Path
from statistics import fmean, stdev

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("results.md", "latent_use.md")
FIGURE = re.compile(r"(?<![\w.])[-+−]?(\d+\.\d+)(?:e-?\d+)?(?![\w.])")


def blocks():
    """(line before, block) of each paragraph and table."""
    found = []
    for page in PAGES:
        parts = re.split(r"\n\n+", (DOCS / page).read_text())
        found += zip(["", *parts], parts, strict=False)
    return found


CHECKED = [(line, block) for line, block in blocks() if line.startswith("Result files: ")]


def numbers(value):
    """All numbers in a result file."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield float(value)
    elif isinstance(value, str) and "gap" in value:  # a verdict's sentence has its interval
        yield from map(float, FIGURE.findall(value))
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)


def derived(result):
    """What tables say beside the file's own summary: by seed, gains, and the lowest on the way."""
    runs = result.get("each", [])
    for seed in {run["seed"] for run in runs}:
        finals = [run["final"] for run in runs if run["seed"] == seed]
        yield fmean(finals)
        if len(finals) > 1:
            yield stdev(finals)
    for run in runs:
        yield run["final"] - run["start"]
    for treatment in result.get("treatments", {}).values():  # differences are told in points
        for share in ("wrong", "right"):
            for name in ("to_start", "to_mask"):
                yield from (100 * n for n in numbers(treatment[share].get(name)))


def stands(figure, known):
    digits = len(figure.split(".")[1])
    return any(round(abs(value), digits) == float(figure) for value in known)


def files_of(line):
    return re.findall(r"\]\((results/[\w.-]+\.json)\)", line)


@pytest.mark.parametrize("line, block", CHECKED, ids=lambda text: text[:40])
def test_figures_stand_in_their_files(line, block):
    results = [json.loads((DOCS / name).read_text()) for name in files_of(line)]
    assert results
    known = [n for result in results for n in [*numbers(result), *derived(result)]]
    # names of settings are no figures: `KL 0.05`, `anchor 0.3`, a rate
    prose = re.sub(r"KL 0\.05|anchor 0\.3|\d(\.\d)?e-4|torch 2\.13(\.0)?|`[^`]*`", "", block)
    figures = [found.group(1) for found in FIGURE.finditer(prose)]
    assert figures, "nothing to check"
    wrong = [figure for figure in figures if not stands(figure, known)]
    assert not wrong, f"{wrong} are in none of {files_of(line)}"


def test_readmes_figures_stand_in_the_file_that_it_names():
    """Of its only table of figures, and of the line before it."""
    parts = re.split(r"\n\n+", (DOCS.parent / "README.md").read_text())
    (index,) = [i for i, part in enumerate(parts) if part.startswith("| after SFT |")]
    (name,) = re.findall(r"`docs/(results/[\w.]+\.json)`", parts[index - 1])
    known = list(numbers(json.loads((DOCS / name).read_text())))
    figures = FIGURE.findall(parts[index])
    assert len(figures) == 6 and [figure for figure in figures if not stands(figure, known)] == []


def test_a_wrong_figure_is_found():
    result = {"each": [{"seed": 0, "start": 0.5, "final": 0.75}], "mean": 0.75}
    known = [*numbers(result), *derived(result)]
    assert stands("0.75", known) and stands("0.250", known) and not stands("0.76", known)


def test_every_table_names_its_files():
    for line, block in blocks():
        if block.startswith("|"):
            assert line.startswith("Result files: "), block[:80]


def test_result_files_are_small_and_name_no_path():
    files = sorted((DOCS / "results").glob("*.json"))
    named = {name for line, _ in CHECKED for name in files_of(line)}
    assert named == {f"results/{path.name}" for path in files}
    for path in files:
        text = path.read_text()
        assert len(text) < 20_000, path.name
        assert not re.search(r'"/(?:tmp|home|root|work|data)\b', text), path.name
