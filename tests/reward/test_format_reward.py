"""`reward/format.py` against LVR's published regular expression, and cases judged by hand."""

import itertools
import re

import pytest

from grpo_latent.errors import ConfigError, RewardError
from reward.format import compute_score

PUBLISHED = re.compile(r"^<\|lvr_start\|>.*?<\|lvr_end\|>\s*<answer>.*?</answer>$", re.DOTALL)
ANSWER = "<answer> 4 </answer>"


def score(pieces, variant, stop_reason="eos"):
    """`pieces`: texts and None, which stands for a latent span."""
    text, offsets = "", []
    for piece in pieces:
        if piece is None:
            offsets.append(len(text))
        else:
            text += piece
    latent = {"num_spans": len(offsets), "span_offsets": offsets, "stop_reason": stop_reason}
    return compute_score("x", text, "4", {"latent": latent}, variant=variant)


@pytest.mark.parametrize(
    "pieces, lvr, ilvr, text",
    [
        ([None, ANSWER], 1, 1, 1),
        ([None, "\n ", ANSWER, "\n"], 1, 1, 1),
        ([None, "look ", None, ANSWER], 1, 1, 1),
        ([None, None, ANSWER], 1, 1, 1),
        (["look ", None, ANSWER], 0, 1, 1),
        ([None, "so ", ANSWER], 0, 1, 1),
        (["look ", None, " so ", ANSWER], 0, 1, 1),
        ([ANSWER], 0, 0, 1),
        ([ANSWER, None], 0, 0, 1),
        ([None, ANSWER, None], 0, 0, 1),
        (["<answer> ", None, "4 </answer>"], 0, 0, 1),
        ([None, ANSWER, " done"], 0, 0, 0),
        ([None, ANSWER, ANSWER], 0, 0, 0),
        ([None, "<answer></answer>"], 0, 0, 0),
        ([None, "<answer> 4"], 0, 0, 0),
        ([None, "4"], 0, 0, 0),
        ([None], 0, 0, 0),
        ([], 0, 0, 0),
        ([None, "<answer><answer> 4 </answer></answer>"], 0, 0, 0),
        ([None, "</answer> 4 <answer>"], 0, 0, 0),
        # delimiters spelt out in text are text, not a span
        (["<|lvr_start|><|lvr_end|>", ANSWER], 0, 0, 1),
    ],
)
def test_cases(pieces, lvr, ilvr, text):
    assert [score(pieces, v) for v in ("lvr", "ilvr", "text")] == [lvr, ilvr, text]


def test_a_completion_cut_by_the_length_limit_fails():
    assert [score([None, ANSWER], v, "length") for v in ("lvr", "ilvr", "text")] == [0, 0, 0]


def test_lvr_agrees_with_the_published_expression():
    """Every completion of up to five pieces out of a small set.

    Spans are printed as LVR's tokenizer prints them.
    """
    alphabet = [None, "look ", "\n", ANSWER]
    counts = [0, 0]
    for length in range(6):
        for pieces in itertools.product(alphabet, repeat=length):
            if pieces.count(ANSWER) > 1 or (pieces and pieces[-1] == "\n"):
                # "exactly one" is stricter than the published `.*?`; trailing blanks are allowed
                continue
            printed = "".join(
                "<|lvr_start|><|lvr|><|lvr_end|>" if p is None else p for p in pieces
            )
            expected = PUBLISHED.match(printed) is not None
            if printed.startswith("\n"):  # leading blanks are allowed here
                continue
            assert score(pieces, "lvr") == expected, pieces
            counts[expected] += 1
    assert min(counts) > 20


@pytest.mark.parametrize(
    "extra_info",
    [
        None,
        {},
        {"latent": None},
        {"latent": {"num_spans": 1}},
        {"latent": {"num_spans": 2, "span_offsets": [0], "stop_reason": "eos"}},
    ],
)
def test_no_usable_latent_summary_is_an_error(extra_info):
    with pytest.raises(RewardError, match="latent summary"):
        compute_score("x", ANSWER, "4", extra_info)


def test_other_malformed_input():
    latent = {"num_spans": 0, "span_offsets": [], "stop_reason": "eos"}
    with pytest.raises(ConfigError, match="unknown format"):
        compute_score("x", ANSWER, "4", {"latent": latent}, variant="monet")
    with pytest.raises(RewardError, match="no text"):
        compute_score("x", None, "4", {"latent": latent})
