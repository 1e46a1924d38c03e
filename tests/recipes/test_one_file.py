"""`recipes/one_file/latent_grpo.py` is the plug-in's step: rollouts, rewards, log-probs, gradients.

The plug-in's side is `benchmarks/one_process.py`, whose steps tests/verl_plugin/trainer's
test_training.py holds equal to verl's, and what it is made of. In float64, with weights at which a
wrong latent, position or mask moves log-probs by nats.

Does not cover: the run to the quickstart's bound, which takes minutes (docs/results.md has it).
"""

import copy
import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / "benchmarks"), str(REPOSITORY / "recipes" / "one_file")]

import latent_grpo as one_file  # noqa: E402
import one_process  # noqa: E402
from checkpoint_and_data import load_checkpoint, read_questions  # noqa: E402
from one_process_inputs import Batch, Group  # noqa: E402

from grpo_latent.algo.advantages import group_advantages  # noqa: E402
from grpo_latent.algo.losses import Denominators, aggregate, kl_penalty, policy_loss  # noqa: E402
from grpo_latent.data.embedded import digits  # noqa: E402
from grpo_latent.data.rows import write_verl_parquet  # noqa: E402
from grpo_latent.latent.mechanisms import LVR  # noqa: E402
from grpo_latent.models import tiny  # noqa: E402
from grpo_latent.models.loading import load_latent_model, save_latent_model  # noqa: E402
from grpo_latent.rollout.hf import HFRolloutEngine  # noqa: E402
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams  # noqa: E402
from grpo_latent.testing.cases import sharpen  # noqa: E402
from grpo_latent.trajectory import PositionKind, Trajectory  # noqa: E402

KINDS = {
    one_file.START: PositionKind.START,
    one_file.LATENT: PositionKind.LATENT,
    one_file.END: PositionKind.FORCED,
    one_file.TEXT: PositionKind.TEXT,
}
NUM_ROWS = 6
EOS_ID = 2  # of tiny models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose spans have two latents, two spans a completion, and a file of rows."""
    folder = tmp_path_factory.mktemp("one_file")
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(digits.WORDS)
    tokens = {f"{role}_token": LVR.published_tokens[role] for role in ("start", "latent", "end")}
    spans = dict(steps=2, max_spans=2, head="mlp", visibility="latents_only")
    mechanism = LVR.from_tokens(tokenizer.get_vocab(), **tokens, **spans)
    torch.manual_seed(1)  # of the head
    mechanism.attach(model)
    sharpen(model, mechanism.opening_ids, tokenizer.eos_token_id)
    model.lm_head.bias = None  # what makes spans frequent; no folder has it
    with torch.no_grad():  # as do steeper logits, for some hidden states
        model.lm_head.weight[mechanism.start_id] *= 4
    save_latent_model(folder, model, tokenizer, processor, mechanism)
    rows = digits.to_rows(digits.generate(NUM_ROWS, stream="rl", seed=0), "rl")
    write_verl_parquet(folder / "rows.parquet", rows)
    return folder


@pytest.fixture
def policy(folder):
    return one_file.Policy(*load_checkpoint(folder, torch.float64))


@pytest.fixture
def prompts(folder, policy):
    rows = folder / "rows.parquet"
    return one_file.Batch(*read_questions(policy, folder, rows, one_file.MAX_NEW))


@pytest.fixture
def loaded(folder):
    return load_latent_model(folder, dtype=torch.float64)


@pytest.fixture
def rows(folder, loaded):
    """The same rows as the plug-in reads them."""
    return one_process.read_rows(folder, "rows", loaded)


def trajectories_of(batch):
    """The completions as the plug-in records them."""
    num_prompt = batch.ids_BT.shape[1] - one_file.MAX_NEW
    made = []
    for ids_T, kinds_T, vectors_TH in zip(
        batch.ids_BT, batch.kinds_BT, batch.vectors_BTH, strict=True
    ):
        is_new_T = kinds_T >= one_file.START
        kinds = torch.tensor([int(KINDS[kind]) for kind in kinds_T[is_new_T].tolist()])
        nothing = torch.zeros(len(kinds))
        latents = vectors_TH[kinds_T == one_file.LATENT]
        reason = "eos" if ids_T[is_new_T][-1] == EOS_ID else "length"
        made.append(
            Trajectory(
                ids_T[:num_prompt], ids_T[is_new_T], kinds, latents, nothing, nothing, reason
            )
        )
    return made


def roll_out(policy, prompts, seed=0):
    """A group of each row: the batch, and log-probs as sampled."""
    torch.manual_seed(seed)
    rows = torch.arange(NUM_ROWS).repeat_interleave(one_file.GROUP_SIZE)
    batch = prompts.rows(rows)
    return batch, one_file.rollout(policy, batch)


def test_questions_are_what_the_plug_in_reads(prompts, rows):
    for ids, row, answer in zip(prompts.ids_BT, rows, prompts.answers, strict=True):
        assert torch.equal(ids[: len(row.prompt_ids)], row.prompt_ids)
        assert answer == row.ground_truth


def test_greedy_rollouts_are_engine_hf(policy, prompts, loaded, rows):
    batch = prompts.rows(torch.arange(NUM_ROWS))
    one_file.rollout(policy, batch, greedy=True)
    engine = HFRolloutEngine(loaded.model, loaded.mechanism, loaded.eos_ids)
    requests = [RolloutRequest(row.prompt_ids, [0], row.images) for row in rows]
    groups = engine.generate(requests, SamplingParams(one_file.MAX_NEW, temperature=0))
    num_latents = 0
    for own, (theirs,) in zip(trajectories_of(batch), groups, strict=True):
        assert torch.equal(own.token_ids, theirs.token_ids)
        assert torch.equal(own.kinds, theirs.kinds)
        torch.testing.assert_close(own.latents.float(), theirs.latents, atol=1e-6, rtol=1e-6)
        num_latents += len(own.latents)
    assert num_latents > 4


def test_a_rollout_is_its_replay_and_other_latents_are_told(policy, prompts):
    batch, sampled_M = roll_out(policy, prompts)
    replayed_M, _ = one_file.replay(policy, batch)
    torch.testing.assert_close(replayed_M, sampled_M, atol=1e-6, rtol=0)
    kinds = batch.kinds_BT
    assert (kinds == one_file.LATENT).sum() > 20 and (kinds == one_file.END).sum() > 10
    is_after_latent = torch.zeros_like(kinds, dtype=torch.bool)
    is_after_latent[:, 1:] = kinds[:, :-1] == one_file.LATENT
    assert not (kinds[is_after_latent] == one_file.TEXT).any(), "a span was left early"
    moved = copy.copy(batch)
    moved.vectors_BTH = batch.vectors_BTH.clone()
    moved.vectors_BTH[kinds == one_file.LATENT] *= -1
    assert (one_file.replay(policy, moved)[0] - sampled_M).abs().max() > 0.1
    with pytest.raises(ValueError, match="rollout and replay differ"):
        one_file.step_loss(policy, policy, moved, sampled_M, torch.zeros(len(kinds)))


def test_log_probs_loss_and_gradients_are_the_plug_ins(policy, prompts, loaded, rows):
    config = one_process.compose_config(REPOSITORY / "recipes" / "quickstart", "digits_grpo")
    training = one_process.OneProcess(config, loaded)
    reference = copy.deepcopy(policy)
    with torch.no_grad():  # another reference, so that the KL is not 0
        theirs = dict(training.reference.model.named_parameters())
        for name, parameter in reference.model.named_parameters():
            if not name.startswith("model.visual."):  # frozen, so the reference has the same
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
                theirs[name].copy_(parameter)
    batch, sampled_M = roll_out(policy, prompts)
    rewards_B = torch.randn(len(batch.answers))

    trajectories = trajectories_of(batch)
    groups = [
        Group(row, trajectories[at : at + one_file.GROUP_SIZE], torch.zeros(1), [])
        for row, at in zip(rows, range(0, len(trajectories), one_file.GROUP_SIZE), strict=True)
    ]
    group_ids = [str(at // one_file.GROUP_SIZE) for at in range(len(rewards_B))]
    advantages_B = group_advantages(rewards_B, group_ids)
    expected, log = training._loss(Batch(groups), advantages_B)
    assert log["kl"] > 0.01 and log["entropy"] > 0.1
    expected.backward()

    loss = one_file.step_loss(policy, reference, batch, sampled_M, rewards_B)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    gradients = dict(policy.model.named_parameters())
    num_compared = 0
    for name, parameter in loaded.model.named_parameters():
        if parameter.grad is None:
            assert name.startswith(("lvr_head.", "model.visual.")), name
            continue
        torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=1e-6, rtol=1e-6)
        num_compared += 1
    assert num_compared > 20
    assert all(parameter.grad is None for parameter in policy.head.parameters())


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_loss_clips_as_the_plug_ins(advantage):
    """Ratios far from 1, which the first update of a rollout does not have."""
    torch.manual_seed(0)
    log_probs, old, reference = (0.5 * torch.randn(1, 40) - 2 for _ in range(3))
    mask = torch.ones(1, 40, dtype=torch.bool)
    denominators = Denominators.of(mask)
    policy = policy_loss(
        log_probs, old, torch.tensor([advantage]), mask, denominators=denominators
    ).loss
    penalty = kl_penalty(log_probs, reference, mask)
    expected = policy + one_file.KL_WEIGHT * aggregate(penalty, mask, "token_mean", denominators)
    advantages = torch.full((40,), advantage)
    got = one_file.loss(log_probs[0], old[0], reference[0], torch.zeros(40), advantages)
    assert got.item() == pytest.approx(expected.item(), abs=1e-6)


def test_advantages_are_the_plug_ins():
    torch.manual_seed(0)
    rewards_B = (torch.rand(80) > 0.5).float() + 0.1 * (torch.rand(80) > 0.3).float()
    rewards_B[:16] = 1.1  # two silent groups
    group_ids = [str(at // one_file.GROUP_SIZE) for at in range(80)]
    got = one_file.advantages(rewards_B)
    torch.testing.assert_close(got, group_advantages(rewards_B, group_ids), atol=1e-6, rtol=0)
    assert got[:16].abs().max() < 1e-9


TEXTS = (
    "<|lvr_start|> <|lvr|> <|lvr_end|> <answer> 7 </answer> <|im_end|>",
    "<|lvr_start|> <|lvr|> <|lvr_end|> <answer> 3 </answer> <|im_end|>",
    "<answer> 7 </answer> <|im_end|>",
    "<answer> 7 </answer> <|lvr_start|> <|lvr|> <|lvr_end|> <|im_end|>",
    "<|lvr_start|> <|lvr|> <|lvr_end|> <answer> 7 </answer>",
    "<|lvr_start|> <|lvr|> <|lvr_end|> <answer> </answer> <|im_end|>",
    "<|lvr_start|> <|lvr|> <|lvr_end|> 7 <answer> 7 </answer> <|im_end|>",
    "<|lvr_start|> <|lvr|> <|lvr_end|> <answer> <answer> 7 </answer> <|im_end|>",
    "<|im_end|>",
)


def test_rewards_are_the_recipes(policy, prompts, loaded, rows):
    config = one_process.compose_config(REPOSITORY / "recipes" / "quickstart", "digits_grpo")
    kind_of = {"<|lvr_start|>": one_file.START, "<|lvr|>": one_file.LATENT}
    kind_of["<|lvr_end|>"] = one_file.END
    batch = prompts.rows(torch.zeros(len(TEXTS), dtype=torch.long))
    batch.answers = ["7"] * len(TEXTS)
    num_prompt = batch.ids_BT.shape[1] - one_file.MAX_NEW
    for row, text in enumerate(TEXTS):
        for at, word in enumerate(text.split(), num_prompt):
            batch.ids_BT[row, at] = policy.tokenizer.convert_tokens_to_ids(word)
            batch.kinds_BT[row, at] = kind_of.get(word, one_file.TEXT)
    prompt = dataclasses.replace(rows[0], ground_truth="7")
    with one_process.rewards_of(config, loaded) as scorer:
        outcomes = scorer([prompt] * len(TEXTS), trajectories_of(batch))
    scores_B, correct_B = one_file.rewards(policy, batch)
    assert scores_B.tolist() == pytest.approx([outcome.score for outcome in outcomes])
    assert correct_B.tolist() == [outcome.correct for outcome in outcomes]
    assert sorted(set(correct_B.tolist())) == [0, 1]


def test_its_numbers_are_the_recipes():
    config = one_process.compose_config(REPOSITORY / "recipes" / "quickstart", "digits_grpo")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (rollout.n, rollout.temperature) == (one_file.GROUP_SIZE, 1)
    assert config.data.train_batch_size == one_file.NUM_PROMPTS
    assert config.data.max_response_length == one_file.MAX_NEW
    assert config.trainer.total_training_steps == one_file.NUM_STEPS
    assert config.algorithm.adv_eps == one_file.ADVANTAGE_EPS
    assert (actor.clip_ratio, actor.entropy_coeff) == (one_file.CLIP, one_file.ENTROPY_WEIGHT)
    assert (actor.use_kl_loss, actor.kl_loss_coef) == (True, one_file.KL_WEIGHT)
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    expected, their_schedule = one_process.make_optimizer(parameters, config)
    optimizer, schedule = one_file.make_optimizer(parameters)
    for _ in range(one_file.NUM_STEPS):
        (own,), (their,) = optimizer.param_groups, expected.param_groups
        for name in ("lr", "betas", "weight_decay"):
            assert own[name] == pytest.approx(their[name]), name
        for each in (optimizer, schedule, expected, their_schedule):
            each.step()


def test_it_is_short_and_stands_alone():
    source = (REPOSITORY / "recipes" / "one_file" / "latent_grpo.py").read_text()
    assert len(source.splitlines()) <= 250
    for file in (REPOSITORY / "recipes" / "one_file").glob("*.py"):
        imported = re.findall(r"^(?:import|from) (\w+)", file.read_text(), re.MULTILINE)
        assert not {"grpo_latent", "verl", "ray", "reward"} & set(imported)
