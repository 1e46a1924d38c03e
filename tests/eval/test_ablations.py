"""What exactly each ablation feeds, by hand; donors and hits."""

import dataclasses

import pytest
import torch
from ablation_cases import OWN, VISUAL, prompts, trajectory
from latent_cases import case

from grpo_latent.errors import ConfigError
from grpo_latent.eval.ablations import ABLATIONS, AblationInputs, check_decides, make_changes
from grpo_latent.eval.alignment import nearest_token_hits
from grpo_latent.eval.donors import donors, image_partners, with_truth_of
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.trajectory import Trajectory


def inputs(rois=((2, 0), (1,), (0,)), seed=0, own=OWN, swapped=(None, None, None), **config):
    rows = [
        EvalPrompt(torch.ones(2), None, "test", str(i), f"row {i}", str(i), roi)
        for i, roi in enumerate(rois)
    ]
    ideal = [
        None if v is None or not r else v[list(r)]
        for v, r in zip(VISUAL[: len(own)], rois, strict=True)
    ]
    return AblationInputs(rows, own, ideal, case("qwen2").mechanism(**config), seed, swapped)


def make_vectors(name, given):
    """What the changed requests feed at the latent positions; nothing else of them changes."""
    changes = make_changes(name, given)
    assert all(change is None or set(change) == {"latent_override"} for change in changes)
    return [None if change is None else change["latent_override"].vectors for change in changes]


def test_zero():
    first, second, third = make_vectors("zero", inputs())
    assert first.tolist() == [[0, 0], [0, 0]] and second is None and third.tolist() == [[0, 0]]


def test_noise_has_the_norms_of_the_own_latents_and_other_directions():
    first, second, third = make_vectors("noise", inputs())
    assert first.norm(dim=-1).tolist() == pytest.approx([5.0, 2.0]) and second is None
    assert third.norm(dim=-1).tolist() == pytest.approx([10.0])
    for vectors, own in ((first, OWN[0]), (third, OWN[2])):
        assert (torch.cosine_similarity(vectors, own.latents) < 0.999).all()
    assert torch.equal(make_vectors("noise", inputs())[0], first), "seeded"
    assert not torch.equal(make_vectors("noise", inputs(seed=1))[0], first)


def test_shuffle_feeds_the_latents_of_another_prompt():
    """Only prompts 0 and 2 have latents: they swap."""
    first, second, third = make_vectors("shuffle", inputs())
    assert (
        torch.equal(first, OWN[2].latents)
        and second is None
        and torch.equal(third, OWN[0].latents)
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_holders", [2, 3, 50])
def test_donors_are_a_derangement_of_the_holders(num_holders, seed):
    own = [
        trajectory([[1.0, 0.0]]) if i % 3 else trajectory(torch.zeros(0, 2))
        for i in range(num_holders * 3 // 2 + 2)
    ]
    holders = {i for i, t in enumerate(own) if len(t.latents)}
    given = donors([len(t.latents) for t in own], [str(i) for i in range(len(own))], seed)
    assert (
        {d for d in given if d is not None}
        == holders
        == {i for i, d in enumerate(given) if d is not None}
    )
    assert all(donor != i for i, donor in enumerate(given))


def test_one_holder_has_no_donor():
    assert donors([2, 0], "ab", 0) == [None, None] and donors([], "", 0) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("clusters", "num_donated"),
    # rows with latents only; the last two by hand: of aaab only b and one a can swap, aabbb lacks
    # one a for the third b
    [("aabbcc", 6), ("aaaabbbbcccc", 12), ("abbcdd", 6), ("aaab", 2), ("aabbb", 4), ("aaa", 0)],
)
def test_no_donor_shares_the_question(clusters, num_donated, seed):
    """Rows of one question have the same image and answer: their latents are no other prompt's."""
    given = donors([3] * len(clusters) + [0], f"{clusters}a", seed)
    chosen = [donor for donor in given if donor is not None]
    assert len(chosen) == len(set(chosen)) == num_donated and given[-1] is None
    assert all(
        clusters[donor] != clusters[i] for i, donor in enumerate(given) if donor is not None
    )


def test_oracle_takes_the_boxes_tokens_in_their_order():
    first, second, third = make_vectors("oracle", inputs())
    assert first.tolist() == [[3, 3], [1, 1]] and second is None and third is None, (
        "no own latent; no image"
    )
    assert make_vectors("oracle", inputs(rois=((), (), ())))[0] is None


# two spans of lengths 2 and 1; the second trajectory has one span
SPANS = [
    trajectory(
        [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]],
        [K.START, K.LATENT, K.LATENT, K.FORCED, K.TEXT, K.START, K.LATENT, K.FORCED],
    ),
    trajectory([[0.0, 5.0]]),
    trajectory(
        [[0.0, 6.0], [0.0, 7.0]], [K.START, K.LATENT, K.FORCED, K.START, K.LATENT, K.FORCED]
    ),
]


def test_a_span_alone():
    given = inputs(own=SPANS)
    assert [
        change and change["latent_override"].part for change in make_changes("zero@span1", given)
    ] == [
        "span1",
        None,
        "span1",
    ]
    assert [v if v is None else v.tolist() for v in make_vectors("zero@span0", given)] == [
        [[0, 0]] * 2,
        [[0, 0]],
        [[0, 0]],
    ]
    # only trajectories 0 and 2 have a second span: they swap
    first, second, third = make_vectors("shuffle@span1", given)
    assert first.tolist() == [[0, 7]] and second is None and third.tolist() == [[3, 0]]
    first, second, third = make_vectors("oracle@span1", inputs(own=SPANS[:1] * 3))
    assert first.tolist() == [[3, 3]], "latent number 2 gets box token 2 mod 2"


def test_mean_and_first_repeat():
    first, second, third = make_vectors("mean", inputs(own=SPANS))
    assert first.tolist() == [[pytest.approx(1 / 3), pytest.approx(11 / 3)], [1, 3.5], [3, 0]]
    assert second.tolist() == third.tolist() == first.tolist()
    first, second, third = make_vectors("first_repeat", inputs(own=SPANS))
    assert first.tolist() == [[1, 0]] and third.tolist() == [[0, 6]]
    assert second is None, "one latent repeated is what it was"


def test_image_swap_feeds_the_latents_of_the_swapped_image():
    swapped = (trajectory([[9.0, 9.0]]), trajectory([[8.0, 8.0]]), None)
    first, second, third = make_vectors("image_swap", inputs(own=SPANS, swapped=swapped))
    assert first.tolist() == [[9, 9]] and second.tolist() == [[8, 8]] and third is None
    assert make_vectors("image_swap@span1", inputs(own=SPANS, swapped=swapped)) == [None] * 3, (
        "nothing at that place"
    )


def slots(text, vision):
    """Slots of two image embeddings and an h each."""
    kinds = [K.SELECTED, K.SELECTED, K.LATENT] * len(text) + [K.TEXT]
    latents = [
        row
        for i, h in enumerate(text)
        for row in ([vision[2 * i], 0.0], [vision[2 * i + 1], 0.0], [0.0, h])
    ]
    zeros, kinds = torch.zeros(len(kinds)), torch.tensor(kinds)
    selected = torch.arange(len(vision)).flip(0)
    ids = torch.ones(2, dtype=torch.long)
    return Trajectory(
        ids, kinds, kinds, torch.tensor(latents), zeros, zeros, "eos", selected_idx=selected
    )


def test_slots_by_their_kinds():
    own = [slots([1.0, 2.0], [3.0, 4.0, 5.0, 6.0]), slots([7.0], [8.0, 9.0])]
    given = inputs(own=own, rois=((2, 0), (1,)), swapped=(None, None))
    for part, first, second in (
        ("text", [[0, 7]], [[0, 1], [0, 2]]),
        ("vision", [[8, 0], [9, 0]], [[3, 0], [4, 0], [5, 0], [6, 0]]),
        ("all", [[8, 0], [9, 0], [0, 7], [8, 0], [9, 0], [0, 7]], [[3, 0], [4, 0], [0, 1]]),
        ("latent0", [[8, 0], [9, 0], [0, 7]], [[3, 0], [4, 0], [0, 1]]),
    ):
        changes = make_changes("shuffle" if part == "all" else f"shuffle@{part}", given)
        assert [c["latent_override"].vectors.tolist() for c in changes] == [first, second]
        assert [c["latent_override"].selected_idx.tolist() for c in changes] == [
            [3, 2, 1, 0],
            [1, 0],
        ]
    assert make_changes("shuffle@latent1", given) == [None, None], (
        "one of the two has a second slot"
    )
    assert make_changes("zero@latent1", given)[0]["latent_override"].vectors.shape == (3, 2)
    ideal = make_changes("oracle", given)[0]["latent_override"].vectors
    assert ideal.tolist() == [[3, 3], [1, 1], [0, 1], [3, 3], [1, 1], [0, 2]], (
        "boxes at image embeddings, h as it was"
    )


def test_ablations_of_the_request():
    """Prompt 1 has no latents; none has an image."""
    assert make_changes("markers_only", inputs()) == [{"steps": 0}, None, {"steps": 0}]
    assert make_changes("no_span", inputs()) == [{"max_spans": 0}, None, {"max_spans": 0}]
    assert make_changes("image_blind_after_span", inputs()) == [None] * 3
    config = dict(mechanism="coconut")
    assert make_changes("no_span", inputs(**config))[0] == {"steps": 0}
    assert make_changes("markers_only", inputs(**config)) == [None] * 3
    seeing = AblationInputs(prompts()[:3], OWN, [None] * 3, case("qwen2").mechanism())
    assert make_changes("image_blind_after_span", seeing) == [
        {"blind_after_span": True},
        None,
        {"blind_after_span": True},
    ]
    bottleneck = dataclasses.replace(
        seeing, mechanism=case("qwen2").mechanism(visibility="latents_only")
    )
    assert make_changes("image_blind_after_span", bottleneck) == [None] * 3, "it is blind anyway"


@pytest.mark.parametrize("name", ["lobotomy", "shuffle@left", "no_span@span0", "shuffle@span"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ConfigError, match="ablations"):
        make_changes(name, inputs())


def test_only_latents_that_the_model_makes_itself_decide_about_use():
    allowed = {"shuffle", "image_swap"}
    for name in (*allowed, "shuffle@span1", "image_swap@latent0"):
        check_decides(name, "verdict.primary")
    for name in (*sorted(set(ABLATIONS) - allowed), "oracle@span0"):
        with pytest.raises(
            ConfigError,
            match=f"verdict.primary: a loss under.*got {name}; expected shuffle or image_sw",
        ):
            check_decides(name, "verdict.primary")


def test_image_partners_share_a_grid():
    c, rows = case("qwen2_5_vl"), prompts()[:4]
    wide = c.images(1, size=(28, 56))
    rows = [
        *rows[:2],
        dataclasses.replace(rows[0], images=wide),
        rows[2],
        dataclasses.replace(rows[0], images=None),
    ]
    assert image_partners(rows) == {0: 1, 1: 3, 3: 0}
    assert image_partners([rows[0], rows[0], rows[1]]) == {0: 2, 2: 1}, (
        "the same question's image is no other one"
    )


def test_nearest_token_hits():
    """Latents (3, 4) and (0, 2): nearest of (1, 1), (2, 2), (3, 3) are numbers 2 and 0."""
    assert nearest_token_hits(OWN[0], (2, 0), VISUAL[0]) == [True, True]
    assert nearest_token_hits(OWN[0], (1, 0), VISUAL[0]) == [False, True]
    assert (
        nearest_token_hits(OWN[0], (2,), VISUAL[0]) == [True]
        and nearest_token_hits(OWN[0], (), VISUAL[0]) == []
    )


def test_truth_of_donors():
    prompts = [
        dataclasses.replace(p, extra_info={"index": index})
        for index, p in enumerate(inputs().prompts)
    ]
    swapped = with_truth_of(prompts, [2, None, 0])
    assert [(p.ground_truth, p.where) for p in swapped] == [
        ("2", "row 0"),
        ("1", "row 1"),
        ("0", "row 2"),
    ]
    assert [p.extra_info["index"] for p in swapped] == [0, 1, 2]
