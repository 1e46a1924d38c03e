"""Log-probs and entropies out of `lm_head` against verl's, which makes the logits of everything."""

import engine_helpers as helpers
import pytest
import torch
from verl.utils import tensordict_utils as tu

from grpo_latent.errors import PluginError
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.verl_plugin.worker import scored_head
from grpo_latent.verl_plugin.worker.scored_head import ScoredHead, Wanted


@pytest.fixture(scope="module", params=["padded", "packed"])
def case(request, tmp_path_factory):
    """An engine of each kind, and a batch of ragged rows."""
    packed = request.param == "packed"
    build = tiny.tiny_qwen3 if packed else tiny.tiny_qwen2_5_vl
    folder = helpers.make_checkpoint(tmp_path_factory.mktemp("model"), build)
    loaded, trajectories, images, _, positions = helpers.roll_out(folder)
    adapter = ModelAdapter(loaded.model, loaded.mechanism)

    def batch():
        return helpers.make_batch(trajectories, images, positions, adapter)

    return folder, packed, trajectories, batch


def scores(engine, batch, packed):
    """Log-probs and entropies of all rows end to end, and the gradients of what they add up to.

    Completions only, as any loss reads them.
    """
    tu.assign_non_tensor(
        batch,
        use_remove_padding=packed,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2,
        use_fused_kernels=False,
        calculate_entropy=True,
    )
    found = []

    def loss(model_output, data, dp_group=None):
        lengths = zip(
            data["prompts"].offsets().diff().tolist(),
            data["response_mask"].unbind(),
            strict=True,
        )
        rows = []
        for row, (prompt_length, mask) in enumerate(lengths):
            kept = [
                model_output[name].unbind()[row][prompt_length - 1 : -1][mask.bool()]
                for name in ("log_probs", "entropy")
            ]
            rows.append(torch.stack(kept))
        values = torch.cat(rows, 1)
        found.append(values.detach())
        weights = torch.arange(1.0, values.shape[1] + 1)
        return (values * weights).sum() / 100, {}

    with engine.train_mode(disable_auto_offload=True):
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(batch, loss)
        gradients = {
            name: parameter.grad.full_tensor().clone()
            for name, parameter in engine.module.named_parameters()
            if parameter.grad is not None
        }
    return torch.cat(found, 1), gradients


def test_scores_and_gradients_are_those_of_all_logits(case, gloo, monkeypatch):
    folder, packed, trajectories, batch = case
    num_actions = sum(int(t.response_mask().sum()) for t in trajectories)
    sizes = []
    # three rows of logits at once: several chunks, the last one short
    monkeypatch.setattr(scored_head, "CHUNK_ELEMENTS", 3 * 512)
    plain = helpers.make_engine(folder, packed, score_in_head=False)
    chunked = helpers.make_engine(folder, packed)
    logits = chunked.head._logits

    def counted(hidden):
        sizes.append(hidden.shape[:-1])
        return logits(hidden)

    chunked.head._logits = counted
    expected, expected_gradients = scores(plain, batch(), packed)
    found, gradients = scores(chunked, batch(), packed)
    assert expected.shape == (2, num_actions) and expected[1].min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, value in expected_gradients.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-5, msg=name)
    vocab_size = chunked.head._vocab_size
    assert len(sizes) > 4 and all(shape[0] <= 3 * 512 // vocab_size for shape in sizes)


def tiny_head(num_positions=5):
    model = tiny.tiny_qwen3().model
    head = ScoredHead.install(model)
    wanted = Wanted(
        torch.zeros(1, num_positions, dtype=torch.bool),
        torch.ones(1, num_positions, dtype=torch.long),
        torch.ones(1, 1),
        has_entropy=True,
    )
    return model, head, wanted


def test_a_batch_without_any_token_still_reaches_the_decoder():
    model, head, wanted = tiny_head()
    head.arm(wanted)
    output = model(input_ids=torch.arange(5)[None])
    scores_BT2 = head.take(output.logits)
    assert scores_BT2.shape == (1, 5, 2) and torch.count_nonzero(scores_BT2[0, 1:]) == 0
    scores_BT2.sum().backward()
    assert all(p.grad is not None for p in model.model.layers.parameters())


def test_logits_that_the_model_changes_are_refused():
    model, head, wanted = tiny_head()
    head.arm(wanted)
    output = model(input_ids=torch.arange(5)[None])
    with pytest.raises(PluginError, match="score_in_head=false"):
        head.take(output.logits / 2)
    with pytest.raises(PluginError, match="no call of lm_head"):
        head.take(output.logits)


def test_nothing_changes_unarmed():
    model, head, wanted = tiny_head()
    ids = torch.arange(5)[None]
    own = tiny.tiny_qwen3().model
    own.load_state_dict(model.state_dict())
    assert torch.equal(model(input_ids=ids).logits, own(input_ids=ids).logits)
    head.arm(wanted)
    head.disarm()
    assert torch.equal(model(input_ids=ids).logits, own(input_ids=ids).logits)
