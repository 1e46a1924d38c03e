"""A user's own benchmark by its path, what is refused as one, and which rows are taken of any."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from grpo_latent.errors import ConfigError, DataError
from grpo_latent.eval.accuracies import benchmark_measures
from grpo_latent.eval.benchmarks import (
    BENCHMARKS,
    Benchmark,
    BenchmarkItem,
    first_items,
    load_benchmark,
    register,
)
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.eval.verdict import VerdictSettings


def test_unknown_benchmark():
    with pytest.raises(ConfigError, match="mmvp"):
        load_benchmark("mmpv", ".")


OWN = """
from grpo_latent.eval.benchmarks import Benchmark, BenchmarkItem

def parse(row, where, file):
    pair, text = f"pair {row['n'] // 2}", [{"type": "text", "text": row["q"]}]
    messages = ({"role": "user", "content": text},)
    return BenchmarkItem(NAME, str(row["n"]), pair, "", messages, (), (), str(row["a"]))

NAME = "sums"
SUMS = Benchmark("sums", "a pencil", ("sums.jsonl",), ("n", "q", "a"), parse=parse, group_size=2)
NO_BENCHMARK = parse
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a benchmark of a user's in a module outside the package."""
    (tmp_path / "own_benchmarks.py").write_text(OWN)
    rows = [{"n": n, "q": f"{n} + 1 =", "a": n + 1} for n in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    BENCHMARKS.pop("sums", None)
    sys.modules.pop("own_benchmarks", None)


def test_a_users_own_benchmark_by_its_path(own_module):
    """Read by the same checks, twice in one process, and reported by pairs as MMVP is."""
    for _ in range(2):
        items = load_benchmark("own_benchmarks:SUMS", own_module)
    assert [item.answer for item in items] == ["1", "2", "3", "4"]
    prompts = [
        EvalPrompt(torch.ones(1), None, "sums", item.answer, "", item.item_id, item=item)
        for item in items
    ]
    report = benchmark_measures(prompts, [1.0, 1.0, 1.0, 0.0], VerdictSettings())
    assert (report["row_accuracy"], report["pair_accuracy"]) == (0.75, 0.5)
    (own_module / "sums.jsonl").write_text(json.dumps({"n": 0, "q": "?"}))
    with pytest.raises(DataError, match=r"row 0: columns \['a'\] are missing.*a pencil"):
        load_benchmark("own_benchmarks:SUMS", own_module)


def test_items_of_another_benchmark_are_refused(own_module):
    path = own_module / "own_benchmarks.py"
    path.write_text(OWN.replace('NAME = "sums"', 'NAME = "mmvp"'))
    with pytest.raises(DataError, match="items that are not sums's; got {'mmvp'}"):
        load_benchmark("own_benchmarks:SUMS", own_module)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("own_benchmarks:NONE", "cannot import the benchmark.*NONE"),
        ("nowhere_at_all:SUMS", "cannot import the benchmark.*nowhere_at_all"),
        (":SUMS", "cannot import the benchmark"),
        ("own_benchmarks:NO_BENCHMARK", "not a benchmark.*function"),
    ],
)
def test_what_is_no_benchmark_of_a_users_is_named(name, problem, own_module):
    with pytest.raises(ConfigError, match=problem):
        load_benchmark(name, own_module)


def test_a_second_benchmark_of_one_name_is_refused():
    mmvp = BENCHMARKS["mmvp"]
    assert register(mmvp) is mmvp
    with pytest.raises(ConfigError, match="two benchmarks of one name.*mmvp"):
        register(replace(mmvp))


def test_a_benchmark_has_one_reader():
    for readers in ({}, {"parse": print, "read": print}):
        with pytest.raises(ConfigError, match="benchmark own: a benchmark has one reader"):
            Benchmark("own", "", (), (), **readers)


def named(*groups):
    return [
        BenchmarkItem("hrbench", str(i), group, "", (), (), ("a", "b"), "A")
        for i, group in enumerate(groups)
    ]


@pytest.mark.parametrize(
    ("groups", "whole"),
    [
        ("aabbcc", (2, 4)),  # MMVP's order
        ("aaaabbbb", (4,)),
        ("abab", ()),  # rotations that lie apart: all rows or none
        ("abcdd", (1, 2, 3)),
        ("abcabcdd", (6,)),
    ],
)
def test_rows_of_a_question_are_not_cut_apart(groups, whole):
    items = named(*groups)
    for max_rows in range(1, len(items)):
        if max_rows in whole:
            assert first_items(items, max_rows) == items[:max_rows]
        else:
            with pytest.raises(
                ConfigError,
                match=f"data.max_rows: .*apart; got {max_rows}; expected .*null for all",
            ):
                first_items(items, max_rows)
    for all_rows in (None, len(items), len(items) + 5):
        assert first_items(items, all_rows) == items


@pytest.mark.parametrize("max_rows", [0, -1, 2.5, True, "4"])
def test_what_is_no_number_of_rows_is_refused(max_rows):
    with pytest.raises(ConfigError, match="data.max_rows: not a number of rows"):
        first_items(named("a", "a"), max_rows)
