"""Values that are not finite, put in at each place where they can come up, change nothing.

One engine in one process; what a message has to name. The rest is rewards (tests/rewards), the gap
between rollout and replay (test_replay_gap.py) and one run (tests/verl_plugin/trainer).
"""

import math
import pickle

import engine_helpers as helpers
import pytest
import torch
from verl.utils import tensordict_utils as tu

from grpo_latent.errors import ConfigError, TrainingError
from grpo_latent.latent.treatments import LatentTerms, Mask
from grpo_latent.latent.treatments.loss_components import Component
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.verl_plugin.worker.adapters import full_tensors
from grpo_latent.verl_plugin.worker.finite import KEYS, NUMBERS, STEP, SkippedUpdates
from grpo_latent.verl_plugin.worker.latent_loss import LatentLoss


@pytest.fixture(scope="module")
def case(tmp_path_factory, request):
    folder = helpers.make_checkpoint(tmp_path_factory.mktemp("model"), tiny.tiny_qwen3)
    return folder, *helpers.roll_out(folder)


@pytest.fixture
def engine(case, gloo):
    return helpers.make_engine(case[0])


def text_loss(model_output, data, dp_group=None):
    from verl.workers.utils.padding import no_padding_2_padding

    from grpo_latent.verl_plugin.worker.micro_batch import MicroBatch

    log_probs_BT = no_padding_2_padding(model_output["log_probs"], data)
    mask_BT = MicroBatch(data).response_mask_BT
    return -(log_probs_BT * mask_BT).sum() / mask_BT.sum(), {}


def make_loss(text=text_loss):
    return LatentLoss(text, LatentTerms(), frozenset(), "token-mean", None, Mask())


def make_batch(case, **changes):
    """Six trajectories of step 12; `changes` are functions of a column's rows."""
    _, loaded, trajectories, images, expected, positions = case
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    keys = [f"group{i // 2}_{i % 2}_0" for i in range(len(trajectories))]
    meta = {STEP: 12, KEYS: " ".join(keys), "compute_loss": True}
    batch = helpers.make_batch(trajectories, images, positions, adapter, **meta)
    lengths = [len(t.token_ids) for t in trajectories]
    given = {
        "advantages": [torch.ones(length) for length in lengths],
        "old_log_probs": list(expected),
        "ref_log_prob": list(expected),
    }
    for name, rows in given.items():
        batch[name] = torch.nested.as_nested_tensor([r.clone() for r in rows], layout=torch.jagged)
    batch[NUMBERS] = torch.arange(len(trajectories))
    for name, change in changes.items():
        rows = [row.clone() for row in batch[name].unbind()]
        change(rows)
        batch[name] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    return batch


def put(row, value, position=None):
    """Into a row of the batch, at its first action or at `position`."""

    def change(rows):
        rows[row].view(-1)[0 if position is None else position] = value

    return change


def update(engine, batch, loss=None):
    tu.assign_non_tensor(
        batch,
        use_remove_padding=False,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2,
        use_fused_kernels=False,
        global_batch_size=6,
    )
    with engine.train_mode(disable_auto_offload=True):
        return engine.train_batch(batch, loss or make_loss())


def weights_of(engine):
    return {name: tensor.clone() for name, tensor in full_tensors(engine.module.state_dict())}


def assert_nothing_moved(engine, before):
    after = weights_of(engine)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not engine.optimizer.state, "the optimizer has not stepped"


def test_an_ordinary_update_moves_weights_and_skips_none(engine, case):
    before = weights_of(engine)
    outputs = update(engine, make_batch(case))
    assert outputs["metrics"]["skipped_updates"] == [0.0]
    after = weights_of(engine)
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("column", "what"),
    [
        ("latent_embeds", "recorded latents: not finite"),
        ("advantages", "advantages: not finite"),
        ("old_log_probs", "old log-probs: not finite"),
        ("ref_log_prob", "reference log-probs: not finite"),
    ],
)
def test_inputs(engine, case, column, what, value):
    """In a trajectory with latents, at its first position, which is an action."""
    row = next(i for i, t in enumerate(case[2]) if len(t.latents) and t.response_mask()[0])
    before = weights_of(engine)
    with pytest.raises(TrainingError, match=what) as caught:
        update(engine, make_batch(case, **{column: put(row, value)}))
    assert f"step 12, trajectory group{row // 2}_{row % 2}_0" in caught.value.where
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert_nothing_moved(engine, before)


def test_what_no_action_reads_may_be_anything(engine, case):
    """Log-probs of latents and forced tokens are nobody's."""
    row = next(i for i, t in enumerate(case[2]) if not bool(t.response_mask().all()))
    position = int((~case[2][row].response_mask()).nonzero()[0])
    update(engine, make_batch(case, old_log_probs=put(row, math.nan, position)))


def test_weights_that_make_log_probs(engine, case):
    with torch.no_grad():
        next(engine.module.parameters()).fill_(math.nan)
    with pytest.raises(TrainingError, match="log-probs: not finite.*overflowed") as caught:
        update(engine, make_batch(case))
    assert "step 12, trajectory group0_0_0" in caught.value.where
    assert not engine.optimizer.state


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_loss_of_the_text(engine, case, value):
    """As with `entropy_coeff=nan`."""

    def broken(model_output, data, dp_group=None):
        loss, metrics = text_loss(model_output, data)
        return loss * value, metrics

    before = weights_of(engine)
    with pytest.raises(TrainingError, match="loss of the text: not finite") as caught:
        update(engine, make_batch(case), make_loss(broken))
    assert "group0_0_0, trajectory group0_1_0" in caught.value.where, "the micro-batch"
    assert_nothing_moved(engine, before)


def test_a_loss_of_ones_own_that_checks_nothing(engine, case):
    before = weights_of(engine)
    with pytest.raises(TrainingError, match="loss: not finite; got nan"):
        update(
            engine,
            make_batch(case),
            lambda model_output, data, dp_group=None: (
                model_output["log_probs"].values().sum() * math.nan,
                {},
            ),
        )
    assert_nothing_moved(engine, before)


def test_a_component_of_a_treatment(engine, case):
    class Broken(Mask):
        def components(self, view, terms):
            return [Component("anchor", 1.0, torch.full((loss.num_latents,), math.nan))]

    class Loss(LatentLoss):
        def _view(self, model_output, batch, masks):
            self.num_latents = int(masks["latents"].sum())
            return super()._view(model_output, batch, masks)

    before = weights_of(engine)
    loss = Loss(text_loss, LatentTerms(), frozenset(), "token-mean", None, Broken())
    with pytest.raises(TrainingError, match="loss component anchor: not finite"):
        update(engine, make_batch(case), loss)
    assert_nothing_moved(engine, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient(engine, case, value):
    before = weights_of(engine)
    name, parameter = next(
        (n, p) for n, p in engine.module.named_parameters() if n.endswith("q_proj.weight")
    )
    backward = engine.forward_backward_batch

    def poisoned(*arguments, **named):
        outputs = backward(*arguments, **named)
        parameter.grad.to_local().view(-1)[0] = value
        return outputs

    engine.forward_backward_batch = poisoned
    with pytest.raises(TrainingError, match="gradient not finite") as caught:
        update(engine, make_batch(case))
    assert caught.value.where == "step 12" and name in caught.value.got
    assert_nothing_moved(engine, before)


def test_a_norm_that_overflows_is_skipped_and_ends_the_run_at_last(engine, case):
    """float32 has 3e38 at most: the squares of finite gradients do not fit."""

    def huge(model_output, data, dp_group=None):
        loss, metrics = text_loss(model_output, data)
        return loss * 1e25, metrics

    before = weights_of(engine)
    for _ in range(2):
        assert update(engine, make_batch(case), make_loss(huge))["metrics"]["skipped_updates"] == [
            1.0
        ]
    with pytest.raises(TrainingError, match="skipped one after another") as caught:
        update(engine, make_batch(case), make_loss(huge))
    assert "3 in a row" in caught.value.got and "max_skipped_updates=3" in caught.value.expected
    assert_nothing_moved(engine, before)


def test_updates_that_are_made_in_between_are_forgiven():
    skipped = SkippedUpdates(2)
    assert [skipped.after(norm, "step 1") for norm in (math.inf, 1.0, math.nan)] == [
        True,
        False,
        True,
    ]
    with pytest.raises(TrainingError, match="2 in a row"):
        skipped.after(math.inf, "step 4")


@pytest.mark.parametrize("clip", [math.nan, 0.0, math.inf])
def test_a_clip_that_would_break_all_gradients(engine, case, clip):
    before = weights_of(engine)
    engine.optimizer_config.clip_grad = clip
    with pytest.raises(ConfigError, match="optim.clip_grad"):
        update(engine, make_batch(case))
    assert_nothing_moved(engine, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_are_neither_saved_nor_sent(engine, tmp_path, value):
    name, parameter = list(engine.module.named_parameters())[-1]
    engine.save_checkpoint(str(tmp_path / "good"), global_step=4)
    files = {p: p.read_bytes() for p in (tmp_path / "good").rglob("*") if p.is_file()}
    with torch.no_grad():
        parameter.to_local().view(-1)[0] = value
    with pytest.raises(TrainingError, match="weight not finite") as caught:
        engine.save_checkpoint(str(tmp_path / "bad"), global_step=5)
    assert name in caught.value.got and caught.value.where.startswith("step 5")
    assert not (tmp_path / "bad").exists()
    with pytest.raises(TrainingError, match="before weights are sent"):
        engine.get_per_tensor_param()
    assert {p: p.read_bytes() for p in files} == files
