"""`Evaluation` against a recount by hand, interrupted and resumed, and on a plain model."""

import dataclasses
import json
import textwrap

import pytest
import torch
from latent_cases import build_case, case
from safetensors.torch import load_file, save_file

from grpo_latent.data.embedded import digits
from grpo_latent.errors import CheckpointError, ConfigError, DataError
from grpo_latent.eval.decode import Decoding, Evaluator
from grpo_latent.eval.donors import donors
from grpo_latent.eval.evaluate import EvalSettings, Evaluation
from grpo_latent.eval.journal import Journal, PhaseBatch
from grpo_latent.eval.prompts import EvalPrompt, encode_row
from grpo_latent.eval.scoring import Outcome, RewardScorer
from grpo_latent.models import tiny
from grpo_latent.models.loading import LatentModel, load_latent_model
from grpo_latent.models.tiny import LVR_TOKENS
from grpo_latent.rewards.functions import FunctionSpec
from grpo_latent.rewards.runner import RewardRunner
from grpo_latent.rollout.protocol import LatentOverride
from grpo_latent.trajectory import PositionKind, Trajectory

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    right = float(solution_str.strip() == str(ground_truth))
    num_spans = float(extra_info["latent"]["num_spans"])
    return {"score": 0.5 * right, "accuracy": right, "num_spans": num_spans}
"""
TEXTS = (
    "read red ?",
    "read blue ?",
    "? green",
    "read ? ?",
    "red",
    "blue ? read",
    "green",
    "? ?",
    "read",
    "? blue",
)


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "match.py"
    path.write_text(textwrap.dedent(REWARD))
    return path


@pytest.fixture(scope="module")
def loaded():
    c = build_case("qwen2_5_vl")
    return LatentModel(c.model, c.tokenizer, c.processor, c.mechanism(steps=1), (c.eos_id,))


def override(vectors):
    return {"latent_override": LatentOverride(vectors)}


def evaluate(loaded, prompts, reward_file, settings, **kwargs):
    with RewardRunner([FunctionSpec(str(reward_file))]) as runner:
        return Evaluation(loaded, prompts, RewardScorer(runner, loaded), settings, **kwargs).run()


def text_of(loaded, trajectory):
    ids = [
        int(i) for i, kind in zip(trajectory.token_ids, trajectory.kinds, strict=True) if kind == 2
    ]
    ids = ids[:-1] if ids and ids[-1] in loaded.eos_ids else ids
    return loaded.tokenizer.decode(ids)


def make_prompts(loaded, settings):
    """Makes ten prompts of which the even ones' truth is what the model says.

    So that own accuracy is known.
    """
    c, rows = case("qwen2_5_vl"), []
    for index, text in enumerate(TEXTS):
        images = c.images(1, seed=index)
        ids = c.request(text, images).prompt_ids
        rows.append(EvalPrompt(ids, images, "test", "?", f"row {index}", str(index), (0,)))
    own = Evaluator(loaded, settings.max_new_tokens, settings.seed).greedy(rows)
    truths = [
        text_of(loaded, t) if index % 2 == 0 else f"no {index}" for index, t in enumerate(own)
    ]
    return [
        dataclasses.replace(row, ground_truth=truth)
        for row, truth in zip(rows, truths, strict=True)
    ], own


def test_report_against_a_recount(loaded, reward_file):
    settings = EvalSettings(
        max_new_tokens=8, num_sampled=3, temperature=2.0, prompts_per_batch=4, seed=3
    )
    prompts, own = make_prompts(loaded, settings)
    phases = []
    report = evaluate(
        loaded, prompts, reward_file, settings, progress=lambda *event: phases.append(event)
    )
    assert (
        report["greedy"]["accuracy"] == report["ablations"]["own"] == 0.5
        and report["greedy"]["score"] == 0.25
    )
    assert report["greedy"]["tokens_per_question"] == sum(len(t.token_ids) for t in own) / 10
    low, high = report["greedy"]["interval"]
    assert 0.1 <= low < 0.5 < high <= 0.9 and report["outcomes"]["own"] == [1.0, 0.0] * 5
    assert (
        sum(count for phase, count in phases if phase == "shuffle")
        == sum(c for p, c in phases if p == "own")
        == 10
    )

    e = Evaluator(loaded, settings.max_new_tokens, settings.seed)
    sources = donors([len(t.latents) for t in own], [p.row_id for p in prompts], 3)
    shuffled = e.greedy(
        prompts, [None if s is None else override(own[s].latents) for s in sources]
    )
    answers = [text_of(loaded, t) for t in shuffled]
    right = [answer == p.ground_truth for answer, p in zip(answers, prompts, strict=True)]
    follows = [
        answers[i] == prompts[s].ground_truth for i, s in enumerate(sources) if s is not None
    ]
    assert report["ablations"]["shuffle"] == pytest.approx(sum(right) / 10)
    assert report["outcomes"]["shuffle"] == right
    changed = [i for i, s in enumerate(sources) if s is not None]
    entry = report["usage"]["shuffle"]
    assert entry["num_changed"] == len(changed) and entry["verdict"] == "undecided at this n"
    assert entry["gap"] == pytest.approx(
        sum((i % 2 == 0) - right[i] for i in changed) / len(changed)
    )
    discordant = [(i % 2 == 0, right[i]) for i in changed if (i % 2 == 0) != right[i]]
    assert entry["mcnemar"]["only_own"] == discordant.count((True, False))
    assert entry["mcnemar"]["only_other"] == discordant.count((False, True))
    assert (
        report["verdict"]["sentence"] == entry["sentence"]
        and report["usage"]["oracle"]["verdict"] is None
    )
    assert report["follow"] == pytest.approx(sum(follows) / len(follows))
    zeroed = e.greedy(
        prompts, [override(torch.zeros(1, 32)) if len(t.latents) else None for t in own]
    )
    assert report["num_changed"]["zero"] == sum(len(t.latents) > 0 for t in own)
    assert report["ablations"]["zero"] == pytest.approx(
        sum(text_of(loaded, t) == p.ground_truth for t, p in zip(zeroed, prompts, strict=True))
        / 10
    )
    sampled = [t for group in e.generate(prompts, settings.sampled) for t in group]
    assert len({t.seed for t in sampled}) == 30, "no two trajectories share their draws"
    truths = [p.ground_truth for p in prompts for _ in range(3)]
    hits = [text_of(loaded, t) == truth for t, truth in zip(sampled, truths, strict=True)]
    assert (
        report["sampled"]["accuracy"] == pytest.approx(sum(hits) / 30)
        and report["sampled"]["n"] == 3
    )
    any_right = sum(any(hits[3 * i : 3 * i + 3]) for i in range(10)) / 10
    assert report["sampled"]["pass_at_k"]["3"]["estimate"] == pytest.approx(any_right)
    assert report["sampled"]["pass_at_k"]["1"]["estimate"] == pytest.approx(sum(hits) / 30)
    assert report["sampled"]["accuracy_by_seed"] == [
        pytest.approx(sum(hits[j::3]) / 10) for j in range(3)
    ]
    assert set(report["ablations"]) == {"own", "zero", "noise", "shuffle", "oracle"}
    assert report["leak"] > 0 and 0 <= report["hit"] <= 1
    json.dumps(report)


def without_times(report):
    """A report without its run times."""
    if isinstance(report, dict):
        return {
            k: without_times(v)
            for k, v in report.items()
            if k not in ("seconds", "seconds_per_question")
        }
    return report


def test_same_seed_same_report_and_batches_do_not_matter(loaded, reward_file):
    reports, shapes = [], []
    for size in (3, 100):
        settings = EvalSettings(max_new_tokens=8, num_sampled=2, prompts_per_batch=size)
        prompts, _ = make_prompts(loaded, settings)
        report = without_times(evaluate(loaded, prompts, reward_file, settings))
        shape = report.pop("latents")
        shapes.append(
            [shape["norm_mean"], shape["effective_rank"], shape["steps_mean"], report.pop("leak")]
        )
        reports.append(report)
    assert reports[0] == reports[1] and shapes[0] == pytest.approx(shapes[1], rel=1e-4)


def test_without_latents_nothing_can_be_ablated(loaded, reward_file):
    """A model that never opens a span: accuracies of ablations are null, not copies of `own`."""
    settings = EvalSettings(max_new_tokens=6)
    silent = dataclasses.replace(loaded, mechanism=loaded.mechanism.replace(max_spans=0))
    prompts, _ = make_prompts(silent, settings)
    report = evaluate(silent, prompts, reward_file, settings)
    assert report["verdict"]["sentence"] == "not used: no trajectory has latents"
    assert report["ablations"] == {
        "own": 0.5,
        "zero": None,
        "noise": None,
        "shuffle": None,
        "oracle": None,
    }
    assert report["follow"] is report["hit"] is report["leak"] is report["sampled"] is None
    assert report["latents"]["frac_rollouts"] == 0 and report["latents"]["norm_mean"] is None


ALL = (
    "zero",
    "noise",
    "shuffle",
    "mean",
    "image_swap",
    "markers_only",
    "no_span",
    "image_blind_after_span",
    "oracle",
)


def journal_in(folder, **settings):
    return Journal(folder, {"a": 1} | settings)


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_report(
    loaded, reward_file, tmp_path
):
    """Interrupted after 1, 2, … batches. What was done is not done again."""
    decodings = (
        Decoding.from_dict({"steps": 2}, "here"),
        Decoding.from_dict({"n": 2, "temperature": 2.0}, "there"),
    )
    settings = EvalSettings(
        8, num_sampled=2, decodings=decodings, ablations=ALL, prompts_per_batch=4
    )
    prompts, _ = make_prompts(loaded, settings)
    expected = without_times(evaluate(loaded, prompts, reward_file, settings))
    folder, calls = tmp_path / "parts", []

    def interrupt_at(num_batches):
        def progress(phase, count):
            calls.append(phase)
            if len(calls) == num_batches:
                raise KeyboardInterrupt

        return progress

    for num_batches in (1, 2, 6, 11, 12, 20, 33):
        calls.clear()
        before = {
            path: path.stat().st_mtime_ns
            for path in folder.glob("*")
            if path.name != "settings.json"
        }
        with pytest.raises(KeyboardInterrupt):
            evaluate(
                loaded,
                prompts,
                reward_file,
                settings,
                progress=interrupt_at(num_batches),
                journal=journal_in(folder),
            )
        assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "done once"
    report = evaluate(loaded, prompts, reward_file, settings, journal=journal_in(folder))
    assert without_times(report) == expected
    with pytest.raises(
        ConfigError,
        match=r"parts/settings.json: the unfinished evaluation here is another one.*\['a'\]",
    ):
        journal_in(folder, a=2)
    part = folder / "shuffle.00001.json"
    part.write_text(part.read_text()[:20])
    with pytest.raises(
        DataError, match=r"shuffle.00001.json: not a readable batch.*Delete the batch's .json"
    ):
        journal_in(folder).load("shuffle", 1)


@pytest.mark.parametrize(
    "damage", ["half", "no lengths", "other lengths", "scalar", "few ids", "not a list"]
)
def test_a_damaged_part_is_named(tmp_path, damage):
    kinds = torch.tensor(
        [PositionKind.START, PositionKind.LATENT, PositionKind.FORCED, PositionKind.TEXT]
    )
    own = Trajectory(
        torch.ones(1).long(), kinds, kinds, torch.ones(1, 4), torch.zeros(4), torch.zeros(4), "eos"
    )
    journal = journal_in(tmp_path / "parts")
    journal.save("own", 0, PhaseBatch([[Outcome(1.0, 1.0)]], 4, 0.1, trajectories=[own]))
    json_path, path = (
        tmp_path / "parts" / f"own.00000.{suffix}" for suffix in ("json", "safetensors")
    )
    tensors, ids = load_file(path), '["a"]'
    if damage == "no lengths":
        del tensors["kinds.lengths"]
    elif damage == "other lengths":
        tensors["kinds.lengths"] = torch.tensor([9])
    elif damage == "scalar":
        tensors["latents"] = torch.tensor(1.0)
    elif damage == "few ids":
        tensors["present"], ids = torch.tensor([True, True]), '["a"]'
    save_file(tensors, path, {"group_ids": ids})
    if damage == "half":
        path.write_bytes(path.read_bytes()[:-3])
    if damage == "not a list":
        json_path.write_text(json.dumps(json.loads(json_path.read_text()) | {"outcomes": 5}))
    with pytest.raises(DataError, match="own.00000.*not a readable batch"):
        journal.load("own", 0)


@pytest.mark.parametrize("text", ['{"a": ', "[1, 2]", "7", "\x00\x00"])
def test_a_journal_whose_settings_are_damaged_is_named(tmp_path, text):
    journal_in(tmp_path)
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(DataError, match="settings.json: not the settings"):
        journal_in(tmp_path)


def test_a_plain_model_is_evaluated_without_latents(tmp_path, reward_file):
    """Its greedy completions are those of `generate`."""
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(digits.WORDS)
    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="model.plain=true"):
        load_latent_model(tmp_path / "plain")
    plain = load_latent_model(tmp_path / "plain", plain=True)
    rows = digits.to_rows(digits.generate(3, stream="heldout", seed=0), "heldout")
    prompts = [encode_row(row, "", plain, "0") for row in rows]
    report = evaluate(plain, prompts, reward_file, EvalSettings(6))
    assert report["latents"]["frac_rollouts"] == 0 and report["verdict"]["verdict"] == "not used"
    e = Evaluator(plain, 6)
    never = sorted(
        e.adapter.vision_ids | set(plain.tokenizer.convert_tokens_to_ids(list(LVR_TOKENS)))
    )
    for prompt, mine in zip(prompts, e.greedy(prompts), strict=True):
        pixels = dict(
            pixel_values=prompt.images.pixel_values, image_grid_thw=prompt.images.image_grid_thw
        )
        ids = model.eval().generate(
            prompt.prompt_ids[None],
            **pixels,
            max_new_tokens=6,
            do_sample=False,
            suppress_tokens=never,
        )
        assert ids[0, len(prompt.prompt_ids) :].tolist() == mine.token_ids.tolist()


def test_moving_the_data_changes_no_draw(loaded):
    """Seeds are made of the row, not of where its file lies."""
    e, (row,) = Evaluator(loaded, 8), make_prompts(loaded, EvalSettings(8))[0][:1]
    decoding = Decoding("sampled", 3, temperature=2.0)
    first, second = e.generate(
        [row, dataclasses.replace(row, where="elsewhere/rows.parquet row 0")], decoding
    )
    assert [t.seed for t in first] == [t.seed for t in second] and torch.equal(
        first[0].token_ids, second[0].token_ids
    )
    assert {t.seed for t in first}.isdisjoint(
        t.seed for t in e.generate([dataclasses.replace(row, row_id="9")], decoding)[0]
    )
