"""What a reward sees does not depend on token ids, placeholders or special tokens."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_latent.rewards.view import reward_view
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.trajectory import Trajectory
from reward import accuracy, digits
from reward import format as format_reward

TOKENS = [
    "<|lvr_start|>",
    "<|lvr|>",
    "<|lvr_latent_end|>",
    "<|lvr_end|>",
    "<eos>",
    "<answer>",
    "</answer>",
    "7",
    "look",
]
START, LATENT, _, END, EOS, OPEN, CLOSE, SEVEN, LOOK = range(9)


def tokenizer(special):
    raw = Tokenizer(
        models.WordLevel({t: i for i, t in enumerate([*TOKENS, "[UNK]"])}, unk_token="[UNK]")
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    made.add_special_tokens({"additional_special_tokens": special})
    return made


def trajectory(ids_kinds, stop_reason="eos"):
    ids, kinds = (torch.tensor(x) for x in zip(*ids_kinds, strict=True))
    zeros = torch.zeros(len(ids))
    latents = torch.zeros(int(torch.isin(kinds, torch.tensor([K.LATENT, K.MIXED])).sum()), 4)
    return Trajectory(torch.tensor([1]), ids, kinds, latents, zeros, zeros, stop_reason)


def span(placeholder=LATENT, steps=2):
    return [(START, K.START), *[(placeholder, K.LATENT)] * steps, (END, K.FORCED)]


ANSWER = [(OPEN, K.TEXT), (SEVEN, K.TEXT), (CLOSE, K.TEXT)]
STOP = [(EOS, K.TEXT)]


def view(made, special=(), eos_ids=(EOS,)):
    return reward_view(made, tokenizer(list(special)).decode, eos_ids)


def test_hand_example():
    seen = view(trajectory([(LOOK, K.TEXT), *span(), *ANSWER, *span(steps=3), *STOP]))
    assert seen.solution_str == "look <answer> 7 </answer>"
    assert seen.latent == {
        "num_spans": 2,
        "num_steps": 5,
        "num_forced_ends": 2,
        "span_offsets": [len("look"), len("look <answer> 7 </answer>")],
        "stop_reason": "eos",
    }


def test_mixed_tokens_are_text_of_which_nothing_is_left_out():
    """HRPO: fed with a vector beside it, but sampled, and read by the reward, like any other."""
    mixed = [(token, K.MIXED) for token, _ in [(LOOK, K.TEXT), *ANSWER]]
    seen = view(trajectory([*mixed, (LOOK, K.TEXT), *STOP]))
    assert seen.solution_str == "look <answer> 7 </answer> look"
    counts = {"num_spans": 0, "num_steps": 0, "num_forced_ends": 0, "span_offsets": []}
    assert seen.latent == counts | {"stop_reason": "eos"}


@pytest.mark.parametrize("placeholder", range(9))
@pytest.mark.parametrize("special", [[], TOKENS[:5], TOKENS[:7], ["<answer>"]])
def test_rewards_do_not_depend_on_special_token_flags_or_placeholder_ids(special, placeholder):
    """Placeholders run over start, end, EOS and the answer tags too."""
    seen = view(trajectory([*span(placeholder), *ANSWER, *STOP]), special)
    assert seen == view(trajectory([*span(), *ANSWER, *STOP]))
    arguments = ("x", seen.solution_str, "7", {"latent": seen.latent})
    assert format_reward.compute_score(*arguments) == 1.0
    assert accuracy.compute_score(*arguments) == 1.0
    assert digits.compute_score(*arguments)["score"] == pytest.approx(1.1)


def test_delimiters_that_the_policy_writes_as_text_stay_text():
    seen = view(trajectory([(START, K.TEXT), (END, K.TEXT), *ANSWER, *STOP]), TOKENS[:5])
    assert (
        seen.solution_str.startswith("<|lvr_start|> <|lvr_end|>") and seen.latent["num_spans"] == 0
    )
    assert format_reward.compute_score("x", seen.solution_str, "7", {"latent": seen.latent}) == 0.0


def test_only_a_closing_eos_is_dropped():
    made = trajectory([*span(), *ANSWER, *STOP, (SEVEN, K.TEXT)], "length")
    assert view(made).solution_str == "<answer> 7 </answer> <eos> 7"


def test_a_completion_of_latents_only():
    seen = view(trajectory(span()[:-1], "length"))
    assert (
        seen.solution_str == ""
        and seen.latent["span_offsets"] == [0]
        and seen.latent["num_forced_ends"] == 0
    )
