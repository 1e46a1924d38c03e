"""Rollout and replay log-densities are one number, and draws do not depend on the batch.

z_t pairs with the hidden state at t - 1. (The densities themselves:
tests/latent/test_treatments.py; through verl's engine: tests/verl_plugin.)
"""

import dataclasses

import pytest
import torch
from latent_cases import case, sampling

from grpo_latent.errors import ConfigError, LatentMismatchError
from grpo_latent.latent.mechanisms import LVR, Mechanism, SpanMechanism
from grpo_latent.latent.treatments.gaussian import Gaussian
from grpo_latent.latent.treatments.gumbel_soft import GumbelSoft
from grpo_latent.latent.treatments.vmf import VonMisesFisher
from grpo_latent.models.injection import LatentInjector
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.models.sources import SourceTap, latent_log_densities
from grpo_latent.trajectory import PositionKind as K

TREATMENTS = {
    "gaussian": Gaussian(sigma=0.5),
    "gumbel_soft": GumbelSoft(top_k=4),
    "vlpo": Gaussian(10.0, 0.0),
    "vmf": VonMisesFisher(20.0),
}
TEMPERATURE = 0.9


def mixed_batch(name, treatment, max_spans, **changes):
    """Makes prompts and spans of different lengths, in groups of several.

    A row has up to `max_spans` spans at any offset.
    """
    c = case(name)
    has_images = c.processor is not None
    requests = [
        c.request("read", c.images(1, seed=1) if has_images else None, seeds=range(5)),
        c.request(
            "read red blue ?",
            c.images(2, seed=2) if has_images else None,
            seeds=range(10, 14),
            steps=2,
        ),
    ]
    engine = c.engine(c.mechanism(max_spans=max_spans, **changes), treatment=treatment)
    groups = engine.generate(requests, sampling(18, temperature=TEMPERATURE))
    trajectories = [t for group in groups for t in group]
    images = [r.images for r, group in zip(requests, groups, strict=True) for _ in group]
    assert max(len(t.spans) for t in trajectories) == max_spans
    assert len({tuple(t.kinds.tolist()) for t in trajectories}) > 1
    return c, trajectories, images


@torch.no_grad()
def densities(c, trajectories, images, treatment, side="right"):
    """(recorded, replayed, latent mask), each over the whole sequences [B, T]."""
    batch = collate(trajectories, images, c.adapter, "full", side)
    log_probs_BT, hidden_BTH = replay(c.adapter, batch, temperature=TEMPERATURE)
    density_BT = latent_log_densities(c.adapter, batch, hidden_BTH, treatment, TEMPERATURE)
    is_completion_BT = (batch.kinds_BT >= K.TEXT) & batch.valid_BT
    recorded = torch.cat([t.rollout_log_probs for t in trajectories])
    recorded_BT = torch.zeros_like(log_probs_BT).masked_scatter(is_completion_BT, recorded)
    return recorded_BT, log_probs_BT + density_BT, batch


@pytest.mark.parametrize("max_spans", [1, 3])
@pytest.mark.parametrize(
    "name, exit", [("qwen2_5_vl", "steps"), ("qwen3", "steps"), ("qwen2_5_vl", "end_token")]
)
@pytest.mark.parametrize("treatment", TREATMENTS.values(), ids=TREATMENTS)
def test_rollout_equals_replay(treatment, name, exit, max_spans):
    """LVR's exit and ILVR's."""
    c, trajectories, images = mixed_batch(name, treatment, max_spans, exit=exit)
    for side in ("right", "left"):
        recorded_BT, replayed_BT, batch = densities(c, trajectories, images, treatment, side)
        assert (recorded_BT - replayed_BT).abs().max() <= 1e-4
        is_latent_BT = batch.kinds_BT == K.LATENT
        assert treatment == TREATMENTS["vlpo"] or bool((recorded_BT[is_latent_BT] < -1e-2).all())


@dataclasses.dataclass(frozen=True)
class Mixture(SpanMechanism):
    """Feeds the mean embedding of the next token's distribution."""

    published_tokens = {role: LVR.published_tokens[role] for role in ("start", "latent", "end")}

    def make(self, model, source):
        return source.mix(source.logits().softmax(-1))


@torch.no_grad()
def test_a_tap_looks_up_other_tokens_within_a_forward_that_has_latents():
    """The vocabulary's embeddings, while recorded vectors are armed for the sequence's own."""
    c = case("qwen3")
    mechanism = Mixture.from_tokens(c.tokenizer.get_vocab(), steps=2)
    engine = c.engine(mechanism)
    group = engine.generate([c.request(seeds=range(4))], sampling(12))[0]
    batch = collate(group, [None] * 4, engine.adapter, "full")
    tap = SourceTap.install(c.model, mechanism)
    tap.arm(*batch.sources(mechanism))
    with LatentInjector.install(c.model, mechanism).inject(
        batch.recorded_mask_BT, batch.latents_NH
    ):
        c.model(
            batch.fed_ids_BT, attention_mask=batch.valid_BT.long(), position_ids=batch.position_ids
        )
    assert len(batch.latents_NH) >= 4
    torch.testing.assert_close(tap.take().means_MH, batch.latents_NH, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "treatment", [Gaussian(sigma=0.5), GumbelSoft(top_k=4)], ids=["gaussian", "gumbel_soft"]
)
def test_a_shifted_pairing_is_another_number(treatment):
    """Monet's published code pairs z_t with mu_t: the comparison above would see it."""
    c, trajectories, images = mixed_batch("qwen2_5_vl", treatment, 3)
    batch = collate(trajectories, images, c.adapter, "full")
    with torch.no_grad():
        _, hidden_BTH = replay(c.adapter, batch, temperature=TEMPERATURE)
        right_BT = latent_log_densities(c.adapter, batch, hidden_BTH, treatment, TEMPERATURE)
        shifted_BT = latent_log_densities(
            c.adapter, batch, hidden_BTH.roll(-1, 1), treatment, TEMPERATURE
        )
    is_latent_BT = (batch.kinds_BT == K.LATENT) & batch.valid_BT
    assert (right_BT - shifted_BT)[is_latent_BT].abs().median() > 0.1


def test_sources_by_hand():
    kinds_BT = torch.tensor(
        [
            [K.PROMPT, K.START, K.LATENT, K.LATENT, K.FORCED, K.TEXT],
            [K.PROMPT, K.SELECTED, K.SELECTED, K.LATENT, K.TEXT, 0],
        ]
    )
    rows, columns = Mechanism().sources(kinds_BT)
    assert rows.tolist() == [0, 0, 1] and columns.tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    "treatment", [Gaussian(sigma=0.5), GumbelSoft(top_k=4)], ids=["gaussian", "gumbel_soft"]
)
def test_draws_depend_on_the_seed_and_not_on_the_batch(treatment):
    """Each trajectory alone gives the same completion and the same latents, up to rounding.

    Also those that were drawn after half of the batch had stopped and been dropped.
    """
    c, seeds, length = (
        case("qwen2"),
        range(12),
        sampling(36, temperature=8.0),
    )  # hot: rows stop early and late
    one = dict(sampled=("<|lvr_start|>", "<|im_end|>"), treatment=treatment)
    together = c.engine(**one).generate([c.request(seeds=seeds)], length)[0]
    alone = c.engine(**one, max_batch_rows=1).generate(
        [c.request(seeds=[seed]) for seed in seeds], length
    )
    for (single,), other in zip(alone, together, strict=True):
        assert torch.equal(single.token_ids, other.token_ids)
        torch.testing.assert_close(single.latents, other.latents, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(single.latent_aux, other.latent_aux, rtol=1e-3, atol=1e-3)
    lengths = sorted(len(t.token_ids) for t in together)
    assert max(t.spans[-1].start for t in together if t.spans) > lengths[len(lengths) // 2]
    first = [t.latents[0] for t in together if len(t.latents)]
    assert len(first) > 1 and (first[0] - first[1]).abs().max() > 0.1  # one prompt, two seeds


def test_noise_is_drawn_beside_text_and_leaves_it_alone():
    """Text before the first latent is drawn from the same numbers as without a treatment."""
    c = case("qwen2")
    requests = [c.request(seeds=range(8))]
    plain, noisy = (
        c.engine(c.mechanism(), treatment=treatment).generate(requests, sampling(12))[0]
        for treatment in (None, Gaussian(0.5))
    )
    for a, b in zip(plain, noisy, strict=True):
        first = a.spans[0].start if a.spans else len(a.token_ids)
        assert torch.equal(a.token_ids[:first], b.token_ids[:first])
        assert bool((a.rollout_log_probs[a.latent_mask] == 0).all()) and a.latent_aux.shape == (
            0,
            0,
        )


def test_what_cannot_be_treated_is_refused():
    c = case("qwen2")
    slots = c.mechanism(mechanism="coconut")
    for config, treatment, message in (
        (c.mechanism(head="mlp"), GumbelSoft(), "head: a mixture of token embeddings is no h"),
        (c.mechanism(exit="latent_end"), GumbelSoft(), "exit: a mixture"),
        (slots, Gaussian(), "slots are shared by the group"),
    ):
        with pytest.raises(ConfigError, match=message):
            c.engine(config, treatment=treatment)
    with pytest.raises(ConfigError, match="more tokens than the vocabulary"):
        c.engine(treatment=GumbelSoft(top_k=100_000)).generate(
            [c.request(seeds=range(8))], sampling(8)
        )


def test_aux_that_does_not_fit_is_refused():
    _, trajectories, _ = mixed_batch("qwen2", GumbelSoft(top_k=4), 3)
    some = next(t for t in trajectories if len(t.latents) > 1)
    with pytest.raises(LatentMismatchError, match="recorded latent_aux does not match"):
        dataclasses.replace(some, latent_aux=some.latent_aux[:-1])


def test_the_tap_sees_what_a_forward_computes():
    """Means and logits out of Hugging Face's own forward equal those of the hidden states."""
    c = case("qwen2", "mlp")
    group = c.engine(c.mechanism(head="mlp")).generate([c.request(seeds=range(6))], sampling(14))[
        0
    ]
    batch = collate(group, [None] * 6, c.adapter, "full")
    batch = batch.with_latents(torch.zeros_like(batch.latents_NH))
    rows, columns = batch.sources(c.adapter.mechanism)
    tap = SourceTap.install(c.model, c.adapter.mechanism)
    ids_BT, valid_BT = batch.input_ids_BT, batch.valid_BT.long()
    with torch.no_grad():
        hidden_BTH = c.adapter.forward_hidden(
            ids_BT, valid_BT, c.adapter.position_ids(ids_BT, batch.valid_BT, None)
        )
        for is_sources_only in (False, True):
            tap.arm(
                rows, columns, wants_logits=not is_sources_only, is_sources_only=is_sources_only
            )
            output = c.model(input_ids=ids_BT, attention_mask=valid_BT, use_cache=False)
            means_MH, logits_MV, _ = tap.take()
            assert output.logits.shape[1] == (1 if is_sources_only else ids_BT.shape[1])
            torch.testing.assert_close(
                means_MH, c.model.lvr_head(hidden_BTH[rows, columns]), rtol=1e-4, atol=1e-4
            )
            if logits_MV is not None:
                expected = c.adapter.logits(hidden_BTH[rows, columns])
                torch.testing.assert_close(logits_MV, expected, rtol=1e-4, atol=1e-4)
    assert c.model(input_ids=ids_BT, attention_mask=valid_BT).hidden_states is None
    with pytest.raises(LatentMismatchError, match="no logits"):
        tap.take()
