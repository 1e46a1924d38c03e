"""Sampling against brute force, and its statistics; it depends on seed and position only."""

import math

import numpy as np
import pytest
import slow_reading
import torch

from grpo_latent.rollout.sampling import (
    Bans,
    invert,
    latent_uniforms,
    sample,
    seed_bits,
    trajectory_seed,
    truncate,
    uniforms,
)

LOGITS = torch.tensor([[1.0, -0.5, 2.0, 0.3, -3.0, 1.0001, 0.0]])


def draws(num_draws, position=0, first_seed=0):
    return uniforms(np.arange(first_seed, first_seed + num_draws, dtype=np.uint64), position)


def test_latents_draw_from_a_stream_of_their_own():
    """No number of one latent comes back at another position, seed, or text position."""
    seeds = np.arange(3, dtype=np.uint64)
    bits = seed_bits(seeds.tolist())
    latents = [latent_uniforms(bits, position, 5) for position in range(4)]
    texts = [uniforms(seeds, position) for position in range(64)]
    numbers = torch.cat([*(values.flatten() for values in latents), *texts])
    assert len(numbers.unique()) == 4 * 3 * 5 + 64 * 3 and bool(
        ((numbers > 0) & (numbers < 1)).all()
    )
    assert torch.equal(latent_uniforms(bits[1:2], 2, 5), latents[2][1:2])
    by_row = latent_uniforms(bits, torch.tensor([3, 0, 2]), 5)
    assert torch.equal(by_row, torch.stack([latents[3][0], latents[0][1], latents[2][2]]))


def test_latents_draw_by_the_hash_that_text_draws_by():
    """In integers of torch, so that a device makes them; numpy's unsigned ones are the reference."""
    seeds = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, *map(trajectory_seed, range(50), *[range(50)] * 3)]
    for position in (0, 7, 4095):
        counters = (1 << 40) + position * 300 + np.arange(300)
        expected = uniforms(np.array(seeds, np.uint64)[:, None], counters[None]) + 2.0**-54
        assert torch.equal(latent_uniforms(seed_bits(seeds), position, 300), expected)


def bans(mask):
    """Of a mask over the vocabulary, bool [N, V]."""
    return Bans(torch.arange(mask.shape[1]), mask)


def chi_square(counts, probs):
    expected = np.asarray(probs) * np.sum(counts)
    kept = expected > 0
    assert np.all(np.asarray(counts)[~kept] == 0)
    return float((((counts - expected) ** 2)[kept] / expected[kept]).sum())


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "degrees", "critical"),
    [
        (1.0, -1, 1.0, 6, 22.46),
        (0.7, 3, 1.0, 2, 13.82),
        (1.5, -1, 0.8, 3, 16.27),
        (1.0, 4, 0.9, 2, 13.82),
    ],
)
def test_frequencies_are_the_distribution(temperature, top_k, top_p, degrees, critical):
    """Frequencies pass chi-square at p = 0.001 on 200 000 draws from consecutive seeds.

    Such seeds are the worst case for a counter-based hash.
    """
    num_draws, logits = 200_000, LOGITS[0].tolist()
    tokens, full, drawn = sample(
        LOGITS.expand(num_draws, -1), draws(num_draws), temperature, top_k, top_p
    )
    by_weight = sorted(range(7), key=lambda i: -logits[i])[: top_k if top_k > 0 else 7]
    weights = {i: math.exp(logits[i] / temperature) for i in by_weight}
    nucleus, mass = [], 0.0
    for i in by_weight:
        if mass < top_p:
            nucleus.append(i)
            mass += weights[i] / sum(weights.values())
    probs = [
        weights[i] / sum(weights[j] for j in nucleus) if i in nucleus else 0.0 for i in range(7)
    ]
    counts = np.bincount(tokens.numpy(), minlength=7)
    assert sum(p > 0 for p in probs) == degrees + 1
    assert chi_square(counts, probs) < critical
    full_weights = [math.exp(x / temperature) for x in logits]
    for token in nucleus:
        row = int((tokens == token).nonzero()[0])
        assert float(drawn[row]) == pytest.approx(math.log(probs[token]), abs=1e-5)
        assert float(full[row]) == pytest.approx(
            math.log(full_weights[token] / sum(full_weights)), abs=1e-5
        )


@pytest.mark.parametrize("temperature", [0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(-1, 1.0), (0, 0.5), (1, 1.0), (3, 0.6), (50, 0.95), (5, 1e-6)]
)
def test_token_by_token_against_brute_force(temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(top_k + 7)
    logits = torch.randn(200, 11, generator=generator) * 2
    banned = torch.rand(200, 11, generator=generator) < 0.3
    banned[:, 4] = False
    u = draws(200, position=3)
    tokens, _, _ = sample(logits, u, temperature, top_k, top_p, bans(banned))
    for row in range(200):
        allowed = {i for i in range(11) if not banned[row, i]}
        assert int(tokens[row]) == slow_reading.draw(
            logits[row].double().tolist(), float(u[row]), temperature, top_k, top_p, allowed
        )


def test_truncate_keeps_ties_at_the_kth_and_the_first_of_the_nucleus():
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert torch.isfinite(truncate(logits, 2, 1.0)).tolist() == [[True, True, True, False]]
    assert torch.isfinite(truncate(logits, -1, 1e-9)).tolist() == [[False, True, False, False]]
    assert torch.equal(truncate(logits, 4, 1.0), logits) and torch.equal(
        truncate(logits, 0, 1.0), logits
    )


def test_greedy_reports_the_full_log_prob_at_temperature_one_and_avoids_banned():
    banned = torch.zeros(1, 7, dtype=torch.bool)
    banned[0, 2] = True
    token, full, drawn = sample(LOGITS, draws(1), 0.0, bans=bans(banned))
    assert token.item() == 5 and drawn.item() == 0
    log_sum = math.log(sum(math.exp(x) for x in LOGITS[0].tolist()))
    assert full.item() == pytest.approx(1.0001 - log_sum, abs=1e-6)


@pytest.mark.parametrize("u", [0.0, np.nextafter(1.0, 0.0)])
def test_the_ends_of_the_unit_interval_give_allowed_tokens(u):
    banned = torch.tensor([[True, False, False, False, False, False, True]])
    token, _, drawn = sample(
        LOGITS, torch.tensor([u], dtype=torch.float64), 1.0, bans=bans(banned)
    )
    assert token.item() == (1 if u == 0 else 5) and torch.isfinite(drawn).all()


@pytest.mark.parametrize("vocab_size", [3, 256, 257, 1000])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_two_levels_find_what_one_cumulative_sum_finds(vocab_size, scale):
    """In float64 over the whole row, also where most weights are 0 in float32."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits_NV = torch.randn(500, vocab_size, generator=generator) * scale
    weights_NV = (logits_NV - logits_NV.amax(-1, keepdim=True)).exp()
    u_N = draws(500, position=1)
    tokens_N, total_N = invert(weights_NV, u_N)
    whole_NV = weights_NV.double().cumsum(-1)
    torch.testing.assert_close(total_N, whole_NV[:, -1], rtol=1e-6, atol=0)
    expected_N = torch.searchsorted(whole_NV, u_N[:, None] * whole_NV[:, -1:], right=True)[:, 0]
    assert (tokens_N != expected_N).sum() <= 1, "rounding moves a boundary once in 10^5"
    assert (weights_NV.gather(1, tokens_N[:, None]) > 0).all()


def test_a_banned_token_of_all_the_mass_is_in_the_full_distribution_only():
    """e^200 times the others' mass: weights relative to it would all be 0."""
    logits = torch.tensor([[200.0, 0.0, 0.0]])
    only_first = Bans(torch.tensor([0]), torch.ones(1, 1, dtype=torch.bool))
    token, full, drawn = sample(logits, torch.tensor([0.6]).double(), 1.0, bans=only_first)
    assert token.item() == 2 and drawn.item() == pytest.approx(-math.log(2))
    assert full.item() == pytest.approx(-200)


@pytest.mark.parametrize("vocab_size", [7, 256, 600])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_give_an_id_and_a_log_prob_that_tells(vocab_size, temperature):
    logits_NV = torch.zeros(2, vocab_size)
    logits_NV[0, 3] = torch.nan
    tokens_N, full_N, _ = sample(logits_NV, draws(2), temperature)
    assert ((tokens_N >= 0) & (tokens_N < vocab_size)).all()
    assert full_N.isnan().tolist() == [True, False]


def test_no_bans_at_all():
    none = Bans.build([], [], torch.device("cpu")).rows(torch.zeros(1, dtype=torch.long))
    for mine, plain in zip(
        sample(LOGITS, draws(1), 1.0, bans=none), sample(LOGITS, draws(1), 1.0), strict=True
    ):
        assert torch.equal(mine, plain)


def test_uniforms_are_splitmix64():
    """First outputs of Vigna's splitmix64.c from state 0 and state 1234567, top 53 bits."""
    known = {
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423],
    }
    for seed, outputs in known.items():
        for position, output in enumerate(outputs):
            value = uniforms(np.array([seed], dtype=np.uint64), position).item()
            assert value == (output >> 11) * 2.0**-53


def test_uniforms_are_uniform_and_positions_independent():
    first, second = draws(100_000, 0), draws(100_000, 1)
    for values in (first, second):
        counts = np.histogram(values.numpy(), bins=20, range=(0, 1))[0]
        assert chi_square(counts, np.full(20, 0.05)) < 43.8  # 19 degrees, p = 0.001
    correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
    assert abs(correlation) < 4 / math.sqrt(100_000)


def test_uniforms_depend_on_seed_and_position_only():
    seeds = np.array([9, 5, 2**63 - 1], dtype=np.uint64)
    together = uniforms(seeds, 4)
    assert [uniforms(seeds[i : i + 1], 4).item() for i in range(3)] == together.tolist()
    assert torch.equal(uniforms(seeds[::-1].copy(), 4), together.flip(0))


def test_trajectory_seeds_are_fixed_distinct_and_fit_int64():
    """The fixed value guards against a change that would silently alter every run."""
    assert trajectory_seed(0, 0, 0, 0) == 5854343820274218872
    arguments = [
        (run, step, row, idx)
        for run in range(2)
        for step in range(3)
        for row in ("a", 1)
        for idx in range(8)
    ]
    seeds = [trajectory_seed(*a) for a in arguments]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert trajectory_seed(1, 11, 1, 0) != trajectory_seed(11, 1, 1, 0)
