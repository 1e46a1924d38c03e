"""Every figure of README and docs/ stands in a result file, or is said here to be none.

A line "Result files: …" names the files of the block behind it, a table or a paragraph; a figure is a
number with decimals or with a unit, and is compared at the digits that are shown. Code is left out.
Does not cover: figures in words ("a third"), and that a file's own numbers are right.
"""

import json
import re
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
UNIT = (
    r"(?= ?(?:%|x|s|ms|minutes|MB|GB|GiB|tokens/s|CPU-s(?:econds)?|nats|points|of \d+)(?![\w/]))"
)
FIGURE = re.compile(
    rf"(?<![\w.,/-])[-+−]?(\d+\.\d+(?:e-?\d+)?(?=x\b|\W|$)(?!\.\d)|\de-\d+(?!\w)|\d[\d,]*{UNIT})"
)
CELL = re.compile(r"(?<=\| )\**[-+−]?(\d[\d,]*)\**(?= \|)")
CODE_BLOCK = re.compile(r"```.*?```", re.DOTALL)
CODE = re.compile(r"`[^`]*`|\]\([^)]*\)")
RELEASES = re.compile(
    r"(?:\b(?:verl|vLLM|Python|python|torch|transformers|version|lmms-eval|ms-vlmeval|MKDOCS|arXiv)"
    r"(?: release)?s?(?: [<≥>=]+)?|[<≥>]) ?v?\d+\.\d+(?:\.\d+)*(?:\+\w+)?|\b\d+\.\d+\.\d+\b|\b\d{4}\.\d{5}\b"
)

# What is a figure by its form and no result: {page: {figure: what it is}}
RELEASE = "a release of vLLM"
BOUND = "a bound that the named test asserts"
NO_RESULTS = {
    "README.md": {
        "1.3": "million parameters of the quickstart's model",
        "0.1": "chance: ten digits",
    },
    "checkpoints.md": {
        "3.2": "Llama's release",
        "280": "pixels",
        "1e-3": "by how much another order moves logits",
        "2e-3": "the same",
    },
    "cluster.md": {"20": "seconds of silence, a constant", "1e-6": BOUND},
    "concepts.md": {"1e-6": "what is normal", "1e-4": "what is normal"},
    "evaluation.md": {
        "71.67": "published",
        "215": "published: 71.67 % of 300",
        "280": "pixels",
    },
    "faults.md": {"30": "the limit of a cell", "5": "added to a time limit, a constant"},
    "gpu.md": {
        "80": "GB of a card",
        "15": "seen on an Intel; the bound of the named test is wider",
        "1e-5": BOUND,
    },
    "limits.md": {"1e-4": BOUND, "1e-6": BOUND},
    "results.md": {
        "1.3": "million parameters of the quickstart's model",
        "0.1": "chance: ten digits",
        "1e-6": "relative noise on weights, a setting",
        "95": "% of an interval",
    },
    "speed.md": {
        "11": "positions, a setting",
        "64": "positions, a setting",
        "3.1": "million parameters",
        "0.17": "billion parameters",
    },
    "vllm.md": {
        **dict.fromkeys(("0.25", "0.28", "0.29", "0.30", "0.31", "0.32"), RELEASE),
    },
}


def blocks():
    """(page, line before, block) of each paragraph and table."""
    found = []
    for page in PAGES:
        parts = re.split(r"\n\n+", CODE_BLOCK.sub("", page.read_text()))
        found += [(page.name, *pair) for pair in zip(["", *parts], parts, strict=False)]
    return found


def figures(block):
    """As they are shown, without sign; of a table also whole numbers that have a cell to themselves."""
    text = RELEASES.sub("", CODE.sub("", block))
    return [found.group(1) for found in FIGURE.finditer(text)] + CELL.findall(text)


def files_of(line):
    """Named by README in its prose, by a page of docs/ in a line of its own."""
    if line.startswith("Result files: "):
        return re.findall(r"\]\((results/[\w.-]+\.json)\)", line)
    return re.findall(r"`docs/(results/[\w.-]+\.json)`", line)


CHECKED = [(page, line, block) for page, line, block in blocks() if files_of(line)]
OTHERS = [(page, block) for page, line, block in blocks() if not files_of(line)]


def numbers(value):
    """All numbers in a result file."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield float(value)
    elif isinstance(value, str) and "gap" in value:  # a verdict's sentence has its interval
        yield from (float(text.replace(",", "")) for text in figures(value))
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
    for ways in result.get("passes", {}).values():  # each way of a pass to each other one
        for ours, theirs in product(ways.values(), repeat=2):
            yield from (ours[key] / theirs[key] for key in ("seconds", "gib"))
    for treatment in result.get("treatments", {}).values():  # differences are told in points
        for share in ("wrong", "right"):
            for name in ("to_start", "to_mask"):
                yield from (100 * n for n in numbers(treatment[share].get(name)))


def known_to(names):
    """Numbers of these files; without `provenance`, whose memory and seed are no results."""
    results = [json.loads((DOCS / name).read_text()) for name in names]
    bodies = [{key: result[key] for key in result if key != "provenance"} for result in results]
    return [n for body in bodies for n in [*numbers(body), *derived(body)]]


def stands(figure, known):
    mantissa, _, exponent = figure.replace(",", "").partition("e")
    digits = len(mantissa.partition(".")[2])
    scale = 10.0 ** -int(exponent or 0)
    return any(round(abs(value) * scale, digits) == float(mantissa) for value in known)


@pytest.mark.parametrize("page, line, block", CHECKED, ids=lambda text: text[:40])
def test_figures_stand_in_their_files(page, line, block):
    known = known_to(files_of(line))
    settings = NO_RESULTS.get(page, {})
    found = [figure for figure in figures(block) if figure not in settings]
    assert found, "nothing to check"
    wrong = [figure for figure in found if not stands(figure, known)]
    assert not wrong, f"{wrong} are in none of {files_of(line)}"


@pytest.mark.parametrize("page, block", OTHERS, ids=lambda text: text[:40])
def test_no_figure_is_without_a_file(page, block):
    wrong = [figure for figure in figures(block) if figure not in NO_RESULTS.get(page, {})]
    assert not wrong, f"{wrong}: no line with result files stands before them"


def test_what_is_no_result_is_still_there():
    of_page = {page.name: figures(page.read_text()) for page in PAGES}
    for page, listed in NO_RESULTS.items():
        assert not [figure for figure in listed if figure not in of_page[page]], page


def test_a_wrong_figure_is_found():
    result = {"each": [{"seed": 0, "start": 0.5, "final": 0.75}], "mean": 0.75, "gap": 1.53e-5}
    known = [*numbers(result), *derived(result)]
    assert stands("0.75", known) and stands("0.250", known) and not stands("0.76", known)
    assert stands("1.5e-5", known) and not stands("1.6e-5", known) and not stands("2e-6", known)


def test_what_counts_as_a_figure():
    text = "in 1,024 rows 3.5x, 12 s, +0.80 and 2.9e-06; 7 of 9 `0.5` verl 0.9.1 [a](b-0.3.md) 24 runs"
    assert figures(text) == ["3.5", "12", "0.80", "2.9e-06", "7"]


def seeds(result):
    """Of a result file: wherever the command wrote them."""
    if isinstance(result, dict):
        for key, value in result.items():
            if key in ("seed", "seeds") and value is not None:
                yield value
            yield from seeds(value)
    elif isinstance(result, list):
        for item in result:
            yield from seeds(item)


# of times and counts: nothing in them is drawn
WITHOUT_SEED = {"sizing", "config_mistakes", "inspect_page"}


def test_result_files_say_where_they_come_from_and_name_no_path():
    files = sorted((DOCS / "results").glob("*.json"))
    named = {name for _, line, _ in CHECKED for name in files_of(line)}
    assert named == {f"results/{path.name}" for path in files}
    for path in files:
        text = path.read_text()
        assert len(text) < 20_000, path.name
        assert not re.search(r'[" =]/(?:tmp|home|root|work|data)\b', text), path.name
        result = json.loads(text)
        origin = result["provenance"]
        assert origin["processor"] or origin["accelerators"], path.name
        assert origin["versions"]["torch"] and origin["date"] and origin["commit"], path.name
        assert path.stem in WITHOUT_SEED or [*seeds(result)], path.name
