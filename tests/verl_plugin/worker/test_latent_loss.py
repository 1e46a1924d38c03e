"""The terms at latents, written out one position at a time.

(Through the engine: test_treated_engine.py.)
"""

import dataclasses
import math

import pytest
import torch
from verl.utils import tensordict_utils as tu

from grpo_latent.errors import ConfigError, LatentMismatchError
from grpo_latent.latent.treatments import LatentTerms, Mask, Treatment
from grpo_latent.latent.treatments.loss_components import Component
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.verl_plugin.worker.latent_loss import NUM_ACTS, NUM_LATENTS, LatentLoss

PROMPT = [K.PROMPT, K.VISION]
COMPLETIONS = [
    [K.START, K.LATENT, K.LATENT, K.FORCED, K.TEXT],
    [K.TEXT, K.START, K.LATENT, K.FORCED, K.TEXT, K.TEXT],
    [K.START, K.LATENT, K.FORCED, K.TEXT],  # dropped: acts nowhere
]
ADVANTAGES = [1.5, -0.5, 9.0]
DUAL_CLIP = 2.5
TERMS = LatentTerms(
    weight=0.7, clip_low=0.1, clip_high=0.3, clip_ratio_c=DUAL_CLIP, kl_coef=0.4, anchor_weight=0.2
)
H = 4


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def make_case(dp_size=1):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    lengths = [len(kinds) for kinds in COMPLETIONS]
    counts = [kinds.count(K.LATENT) for kinds in COMPLETIONS]
    masks = [torch.tensor([float(k in (K.TEXT, K.START)) for k in kinds]) for kinds in COMPLETIONS]
    masks[2] = masks[2] * 0
    new, old, ref = ([0.4 * draw(n) for n in lengths] for _ in range(3))
    new[1][2] = old[1][2] + 2.0  # a ratio of 7.4 at a negative advantage: beyond the dual clip
    means, ref_means = ([draw(count, H) for count in counts] for _ in range(2))
    # verl's log_probs score the position after theirs; whatever stands in the prompt or at the end
    # is never read
    shifted = [torch.cat([torch.tensor([math.nan]), row, torch.tensor([math.nan])]) for row in new]
    fields = {
        "prompts": nested([torch.zeros(2, dtype=torch.long)] * 3),
        "responses": nested([torch.zeros(n, dtype=torch.long) for n in lengths]),
        "position_kinds": nested([torch.tensor(PROMPT + kinds) for kinds in COMPLETIONS]),
        "response_mask": nested(masks),
        "old_log_probs": nested(old),
        "ref_log_prob": nested(ref),
        "advantages": nested([a * mask for a, mask in zip(ADVANTAGES, masks, strict=True)]),
        "ref_latent_means": nested(ref_means),
    }
    counts_of_batch = {NUM_ACTS: 3, NUM_LATENTS: 3}
    data = tu.get_tensordict(
        fields, {"dp_size": dp_size, "global_batch_size": 3, **counts_of_batch}
    )
    output = {
        "log_probs": nested([row.requires_grad_() for row in shifted]),
        "latent_means": nested(means),
    }
    return data, output, (new, old, ref, means, ref_means)


def expected_terms(new, old, ref, means, ref_means):
    policy, kl, anchor, ratios = 0.0, 0.0, 0.0, 0.0
    for row in (0, 1):
        places = [t for t, kind in enumerate(COMPLETIONS[row]) if kind == K.LATENT]
        for latent, t in enumerate(places):
            rho, advantage = math.exp(new[row][t] - old[row][t]), ADVANTAGES[row]
            clipped = -min(rho * advantage, min(max(rho, 0.9), 1.3) * advantage)
            policy += min(clipped, -DUAL_CLIP * advantage) if advantage < 0 else clipped
            d = float(ref[row][t] - new[row][t])
            kl += math.exp(d) - d - 1
            reference = ref_means[row][latent]
            anchor += float(
                ((means[row][latent] - reference) ** 2).mean() / reference.var(correction=0)
            )
            ratios += rho
    return policy / 3, kl / 3, anchor / 3, ratios / 3


@pytest.mark.parametrize("dp_size", [1, 2])
def test_by_hand(dp_size):
    """On two ranks the same rows are half of the batch: FSDP's average makes up for that."""
    data, output, values = make_case(dp_size)
    loss = LatentLoss(
        lambda **_: (torch.tensor(5.0), {"text": 1}),
        TERMS,
        frozenset({int(K.LATENT)}),
        "token-mean",
    )
    assert loss.count(data).tolist() == [3, 3]
    total, metrics = loss(output, data)
    policy, kl, anchor, ratio = expected_terms(*values)
    assert float(total) == pytest.approx(
        5.0 + dp_size * (0.7 * policy + 0.4 * kl + 0.2 * anchor), rel=1e-5
    )
    logged = {
        name: metric.aggregate() / dp_size for name, metric in metrics.items() if name != "text"
    }
    assert metrics["text"] == 1 and logged["latent/pg_loss"] == pytest.approx(policy, rel=1e-5)
    assert logged["latent/kl"] == pytest.approx(kl, rel=1e-5) and logged[
        "latent/anchor"
    ] == pytest.approx(anchor, rel=1e-5)
    assert logged["latent/ratio_mean"] == pytest.approx(ratio, rel=1e-5)
    assert logged["latent/clipfrac_lower"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("dp_size", [1, 2])
def test_one_mean_over_text_and_latents_by_count(dp_size):
    """VLPO's: (sum over 5 tokens + sum over 3 latents) / 8, KL with it; the anchor stays its own.

    The text's loss of 5.0 is a mean over 5 tokens, so its sum is 25.
    """
    data, output, values = make_case(dp_size)
    tu.assign_non_tensor(data, batch_num_tokens=5)
    terms = dataclasses.replace(TERMS, weight="by_count")
    loss = LatentLoss(
        lambda **_: (torch.tensor(5.0 * dp_size), {}),
        terms,
        frozenset({int(K.LATENT)}),
        "token-mean",
    )
    total, metrics = loss(output, data)
    policy, kl, anchor, _ = expected_terms(*values)
    summed = 5 * 5.0 + 3 * (policy + 0.4 * kl)
    assert float(total) == pytest.approx(dp_size * (summed / 8 + 0.2 * anchor), rel=1e-5)
    assert metrics["latent/pg_loss"].aggregate() == pytest.approx(dp_size * policy, rel=1e-5)


def test_by_count_by_hand():
    """Four tokens of loss .01 and two latents of .09: .22 / 6, not .01 + .09; no text, no latents."""
    share = lambda acts, tokens: LatentLoss(  # noqa: E731
        None, LatentTerms(weight="by_count"), frozenset(), "token-mean"
    )._share({NUM_ACTS: acts, "batch_num_tokens": tokens})
    assert (1 - share(2, 4)) * 0.01 + share(2, 4) * 0.09 == pytest.approx(0.22 / 6)
    assert share(0, 4) == 0 and share(2, 0) == 1 and share(0, 0) == 0
    with pytest.raises(ConfigError, match="latent.treatment.weight"):
        LatentLoss(None, LatentTerms(weight="by_count"), frozenset(), "seq-mean-token-mean")
    for wrong in ("by_hand", -1.0, True):
        with pytest.raises(ConfigError, match="latent.treatment.weight"):
            LatentTerms(weight=wrong)


def test_nothing_but_live_latents_gets_a_gradient():
    """Text, delimiters, padding and dropped rows, whose log-probs are even NaN here and there."""
    data, output, _ = make_case()
    leaf = output["log_probs"].values().detach().clone().requires_grad_()
    output["log_probs"] = torch.nested.nested_tensor_from_jagged(
        leaf, output["log_probs"].offsets()
    )
    loss = LatentLoss(
        lambda **_: (torch.tensor(0.0), {}), TERMS, frozenset({int(K.LATENT)}), "token-mean"
    )
    loss(output, data)[0].backward()
    kinds = torch.cat([torch.tensor(PROMPT + kinds) for kinds in COMPLETIONS])
    live = (kinds == K.LATENT) & (
        torch.arange(len(kinds)) < sum(len(PROMPT) + len(k) for k in COMPLETIONS[:2])
    )
    assert torch.equal(leaf.grad.roll(1) != 0, live)


@pytest.mark.parametrize(
    "act_kinds", [frozenset(), frozenset({int(K.LATENT)})], ids=["mask", "acting"]
)
def test_a_latent_that_is_marked_as_an_action_is_refused(act_kinds):
    """Its log-prob would be a placeholder's, or a density under the text's clip.

    Also in a row whose text is right.
    """
    data, output, _ = make_case()
    mask = data["response_mask"].values().clone()
    assert COMPLETIONS[0][2] == K.LATENT
    mask[2] = 1.0
    data["response_mask"] = torch.nested.nested_tensor_from_jagged(
        mask, data["response_mask"].offsets()
    )
    terms = TERMS if act_kinds else LatentTerms()
    loss = LatentLoss(lambda **_: (torch.tensor(0.0), {}), terms, act_kinds, "token-mean")
    with pytest.raises(
        LatentMismatchError, match="trajectory 0, position 2: a latent position is marked"
    ):
        loss(output, data)


@dataclasses.dataclass(frozen=True)
class Own(Treatment):
    """A user's: a penalty on the norm of the mean, weighted by an option, and one metric."""

    penalty: float = 0.5
    change: str = ""

    def reads_statistics(self, terms):
        return True

    def components(self, view, terms):
        norms_M = view.statistics_MS.norm(dim=-1)
        values = norms_M[:-1] if self.change == "too few" else norms_M
        over = "spans" if self.change == "nowhere" else "latents"
        twice = [Component("norm", None, norms_M)] if self.change == "twice" else []
        return [
            Component("norm", self.penalty, values, over),
            Component("norm_max", None, norms_M / 2),
            *twice,
        ]


def own_loss(treatment, mode="token-mean"):
    return LatentLoss(
        lambda **_: (torch.tensor(5.0), {}), LatentTerms(), frozenset(), mode, treatment=treatment
    )


def test_a_component_of_a_users_own():
    """The loss knows its weight and its values, not what it is; dropped rows are left out."""
    data, output, (_, _, _, means, _) = make_case()
    norms = [[float(row.norm()) for row in rows] for rows in means[:2]]
    total, metrics = own_loss(Own(penalty=0.5))(output, data)
    mean = sum(map(sum, norms)) / 3
    assert float(total) == pytest.approx(5.0 + 0.5 * mean, rel=1e-6)
    assert metrics["latent/norm"].aggregate() == pytest.approx(mean, rel=1e-6)
    assert metrics["latent/norm_max"].aggregate() == pytest.approx(mean / 2, rel=1e-6)
    by_trajectory = sum(sum(row) / len(row) for row in norms) / 3
    total, metrics = own_loss(Own(penalty=2.0), "seq-mean-token-mean")(output, data)
    assert float(total) == pytest.approx(5.0 + 2.0 * by_trajectory, rel=1e-6)
    assert metrics["latent/norm_max"].aggregate() == pytest.approx(mean / 2, rel=1e-6), (
        "a metric is a plain mean"
    )


@pytest.mark.parametrize("change", ["too few", "nowhere", "twice"])
def test_a_component_that_does_not_fit_is_refused(change):
    data, output, _ = make_case()
    with pytest.raises(LatentMismatchError, match="component 'norm': not a component"):
        own_loss(Own(change=change))(output, data)


def test_mask_adds_nothing():
    data, output, _ = make_case()
    total, metrics = own_loss(Mask())(output, data)
    assert float(total) == 5.0 and metrics == {}
