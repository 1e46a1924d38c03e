"""Whatever a reward function does, its call ends, typed, and costs no other call."""

import pytest
from misbehaving import CASES, ENDLESS, code

from grpo_latent.rewards.functions import FunctionSpec
from grpo_latent.rewards.runner import RewardItem, RewardRunner


@pytest.fixture(scope="module")
def runners(tmp_path_factory):
    """One with a limit that runs out, one with a limit far from what a slow machine needs."""
    file = tmp_path_factory.mktemp("reward") / "mine.py"
    file.write_text(code())
    functions = [FunctionSpec(str(file))]
    with (
        RewardRunner(functions, timeout_s=2.0, on_error="drop") as short,
        RewardRunner(functions, timeout_s=120.0, on_error="drop") as long,
    ):
        yield {True: short, False: long}


@pytest.mark.parametrize("name", CASES)
def test_its_call_ends(runners, name):
    _, expected = CASES[name]
    items = [
        RewardItem("d", text, "x", {"latent": {"num_spans": 1}})
        for text in ("right", name, "right")
    ]
    before, result, after = runners[name in ENDLESS].score_many(items)
    assert (before.score, after.score) == (3.0, 3.0), "other calls of the wave are as without it"
    assert (result.error_kind or result.score) == expected
    assert result.dropped == isinstance(expected, str)


def test_there_are_as_many_as_the_docs_say():
    assert len(CASES) == 80
