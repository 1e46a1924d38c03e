"""`evaluate` against a recount by hand, reading rows, and the entry point on the embedded task's files."""

import dataclasses
import json
import textwrap

import pytest
import torch
from hydra import compose, initialize_config_module
from latent_cases import build_case, case

from grpo_latent.data import digits
from grpo_latent.errors import CheckpointError, ConfigError, DataError
from grpo_latent.eval.ablations import donors
from grpo_latent.eval.benchmarks import BenchmarkItem, load_benchmark
from grpo_latent.eval.decode import GREEDY, Decoding, Evaluator
from grpo_latent.eval.evaluate import EvalSettings, Evaluation
from grpo_latent.eval.journal import Journal
from grpo_latent.eval.prompts import EvalPrompt, benchmark_prompts, encode_row, read_prompts
from grpo_latent.eval.report import (
    Findings,
    VerdictSettings,
    chance,
    decoding_report,
    latent_statistics,
    usage_report,
)
from grpo_latent.eval.scoring import Outcome, RewardScorer, accuracy, as_outcome
from grpo_latent.eval.statistics import bootstrap_difference, bootstrap_interval
from grpo_latent.evaluate import main, run
from grpo_latent.latent.config import LatentConfig
from grpo_latent.latent.mechanisms import LVR_ADDED_TOKENS
from grpo_latent.models import tiny
from grpo_latent.models.loading import LatentModel, load_latent_model, parse_dtype, save_latent_model
from grpo_latent.rewards.functions import FunctionSpec
from grpo_latent.rewards.runner import RewardResult, RewardRunner
from grpo_latent.rollout.protocol import LatentOverride, SamplingParams

# accuracy: the completion is the ground truth; also reports what it was given, by a row's index
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    right = float(solution_str.strip() == str(ground_truth))
    return {"score": 0.5 * right, "accuracy": right, "num_spans": float(extra_info["latent"]["num_spans"])}
"""
TEXTS = ("read red ?", "read blue ?", "? green", "read ? ?", "red", "blue ? read", "green", "? ?", "read", "? blue")


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "match.py"
    path.write_text(textwrap.dedent(REWARD))
    return path


@pytest.fixture(scope="module")
def loaded():
    c = build_case("qwen2_5_vl")
    return LatentModel(c.model, c.tokenizer, c.processor, c.config(steps=1), (c.eos_id,))


def override(vectors):
    return {"latent_override": LatentOverride(vectors)}


def evaluate(loaded, prompts, reward_file, settings, **kwargs):
    with RewardRunner([FunctionSpec(str(reward_file))]) as runner:
        return Evaluation(loaded, prompts, RewardScorer(runner, loaded), settings, **kwargs).run()


def text_of(loaded, trajectory):
    ids = [int(i) for i, kind in zip(trajectory.token_ids, trajectory.kinds, strict=True) if kind == 2]
    ids = ids[:-1] if ids and ids[-1] in loaded.eos_ids else ids
    return loaded.tokenizer.decode(ids)


def make_prompts(loaded, settings):
    """Ten prompts; the ground truth of the even ones is what the model says, so that own accuracy is known."""
    c, rows = case("qwen2_5_vl"), []
    for index, text in enumerate(TEXTS):
        images = c.images(1, seed=index)
        ids = c.request(text, images).prompt_ids
        rows.append(EvalPrompt(ids, images, "test", "?", f"row {index}", str(index), (0,)))
    own = Evaluator(loaded, settings.max_new_tokens, settings.seed).greedy(rows)
    truths = [text_of(loaded, t) if index % 2 == 0 else f"no {index}" for index, t in enumerate(own)]
    return [dataclasses.replace(row, ground_truth=truth) for row, truth in zip(rows, truths, strict=True)], own


def test_report_against_a_recount(loaded, reward_file):
    settings = EvalSettings(max_new_tokens=8, num_sampled=3, temperature=2.0, prompts_per_batch=4, seed=3)
    prompts, own = make_prompts(loaded, settings)
    phases = []
    report = evaluate(loaded, prompts, reward_file, settings, progress=lambda *event: phases.append(event))
    assert report["greedy"]["accuracy"] == report["ablations"]["own"] == 0.5 and report["greedy"]["score"] == 0.25
    assert report["greedy"]["tokens_per_question"] == sum(len(t.token_ids) for t in own) / 10
    low, high = report["greedy"]["interval"]
    assert 0.1 <= low < 0.5 < high <= 0.9 and report["outcomes"]["own"] == [1.0, 0.0] * 5
    assert sum(count for phase, count in phases if phase == "shuffle") == sum(c for p, c in phases if p == "own") == 10

    e = Evaluator(loaded, settings.max_new_tokens, settings.seed)
    sources = donors([len(t.latents) for t in own], [p.row_id for p in prompts], 3)
    shuffled = e.greedy(prompts, [None if s is None else override(own[s].latents) for s in sources])
    answers = [text_of(loaded, t) for t in shuffled]
    right = [answer == p.ground_truth for answer, p in zip(answers, prompts, strict=True)]
    follows = [answers[i] == prompts[s].ground_truth for i, s in enumerate(sources) if s is not None]
    assert report["ablations"]["shuffle"] == pytest.approx(sum(right) / 10)
    assert report["outcomes"]["shuffle"] == right
    changed = [i for i, s in enumerate(sources) if s is not None]
    entry = report["usage"]["shuffle"]
    assert entry["num_changed"] == len(changed) and entry["verdict"] == "undecided at this n"
    assert entry["gap"] == pytest.approx(sum((i % 2 == 0) - right[i] for i in changed) / len(changed))
    discordant = [(i % 2 == 0, right[i]) for i in changed if (i % 2 == 0) != right[i]]
    assert entry["mcnemar"]["only_own"] == discordant.count((True, False))
    assert entry["mcnemar"]["only_other"] == discordant.count((False, True))
    assert report["verdict"]["sentence"] == entry["sentence"] and report["usage"]["oracle"]["verdict"] is None
    assert report["follow"] == pytest.approx(sum(follows) / len(follows))
    zeroed = e.greedy(prompts, [override(torch.zeros(1, 32)) if len(t.latents) else None for t in own])
    assert report["num_changed"]["zero"] == sum(len(t.latents) > 0 for t in own)
    assert report["ablations"]["zero"] == pytest.approx(
        sum(text_of(loaded, t) == p.ground_truth for t, p in zip(zeroed, prompts, strict=True)) / 10
    )
    sampled = [t for group in e.generate(prompts, settings.sampled) for t in group]
    assert len({t.seed for t in sampled}) == 30, "no two trajectories share their draws"
    truths = [p.ground_truth for p in prompts for _ in range(3)]
    hits = [text_of(loaded, t) == truth for t, truth in zip(sampled, truths, strict=True)]
    assert report["sampled"]["accuracy"] == pytest.approx(sum(hits) / 30) and report["sampled"]["n"] == 3
    any_right = sum(any(hits[3 * i : 3 * i + 3]) for i in range(10)) / 10
    assert report["sampled"]["pass_at_k"]["3"]["estimate"] == pytest.approx(any_right)
    assert report["sampled"]["pass_at_k"]["1"]["estimate"] == pytest.approx(sum(hits) / 30)
    assert report["sampled"]["accuracy_by_seed"] == [pytest.approx(sum(hits[j::3]) / 10) for j in range(3)]
    assert set(report["ablations"]) == {"own", "zero", "noise", "shuffle", "oracle"}
    assert report["leak"] > 0 and 0 <= report["hit"] <= 1
    json.dumps(report)


def without_times(report):
    """A report without its run times."""
    if isinstance(report, dict):
        return {k: without_times(v) for k, v in report.items() if k not in ("seconds", "seconds_per_question")}
    return report


def test_same_seed_same_report_and_batches_do_not_matter(loaded, reward_file):
    reports, shapes = [], []
    for size in (3, 100):
        settings = EvalSettings(max_new_tokens=8, num_sampled=2, prompts_per_batch=size)
        prompts, _ = make_prompts(loaded, settings)
        report = without_times(evaluate(loaded, prompts, reward_file, settings))
        shape = report.pop("latents")
        shapes.append([shape["norm_mean"], shape["effective_rank"], shape["steps_mean"], report.pop("leak")])
        reports.append(report)
    assert reports[0] == reports[1] and shapes[0] == pytest.approx(shapes[1], rel=1e-4)


def test_without_latents_nothing_can_be_ablated(loaded, reward_file):
    """A model that never opens a span: accuracies of ablations are null, not copies of `own`."""
    settings = EvalSettings(max_new_tokens=6)
    silent = dataclasses.replace(loaded, config=loaded.config.replace(max_spans=0))
    prompts, _ = make_prompts(silent, settings)
    report = evaluate(silent, prompts, reward_file, settings)
    assert report["verdict"]["sentence"] == "not used: no trajectory has latents"
    assert report["ablations"] == {"own": 0.5, "zero": None, "noise": None, "shuffle": None, "oracle": None}
    assert report["follow"] is report["hit"] is report["leak"] is report["sampled"] is None
    assert report["latents"]["frac_rollouts"] == 0 and report["latents"]["norm_mean"] is None


def test_accuracy_prefers_acc_and_leaves_dropped_out():
    results = [
        RewardResult(0.3, {"digits": 0.3}, {"accuracy": 1.0}),
        RewardResult(0.0, {"digits": 0.0}, {"accuracy": 0.0}),
        RewardResult(9.0, {"digits": None}, {"accuracy": 1.0}, dropped=True, error_kind="nan"),
    ]
    correct = [as_outcome(result).correct for result in results]
    assert correct == [1.0, 0.0, None] and accuracy(correct) == 0.5 and accuracy(correct[2:]) is None
    assert as_outcome(RewardResult(0.25, {"mine": 0.25}, {})).correct == 0.25, "else the score"


ALL = ("zero", "noise", "shuffle", "mean", "image_swap", "markers_only", "no_span", "image_blind_after_span", "oracle")


def journal_in(folder, **settings):
    return Journal(folder, {"a": 1} | settings)


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_report(loaded, reward_file, tmp_path):
    """Interrupted after 1, 2, … parts. What was done is not done again."""
    decodings = (Decoding.from_dict({"steps": 2}, "here"), Decoding.from_dict({"n": 2, "temperature": 2.0}, "there"))
    settings = EvalSettings(8, num_sampled=2, decodings=decodings, ablations=ALL, prompts_per_batch=4)
    prompts, _ = make_prompts(loaded, settings)
    expected = without_times(evaluate(loaded, prompts, reward_file, settings))
    folder, calls = tmp_path / "parts", []

    def interrupt_at(num_parts):
        def progress(phase, count):
            calls.append(phase)
            if len(calls) == num_parts:
                raise KeyboardInterrupt

        return progress

    for num_parts in (1, 2, 6, 11, 12, 20, 33):
        calls.clear()
        before = {path: path.stat().st_mtime_ns for path in folder.glob("*") if path.name != "settings.json"}
        with pytest.raises(KeyboardInterrupt):
            evaluate(
                loaded, prompts, reward_file, settings, progress=interrupt_at(num_parts), journal=journal_in(folder)
            )
        assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "done once"
    report = evaluate(loaded, prompts, reward_file, settings, journal=journal_in(folder))
    assert without_times(report) == expected
    with pytest.raises(ConfigError, match=r"parts: the unfinished evaluation here is another one.*\['a'\]"):
        journal_in(folder, a=2)
    part = folder / "shuffle.00001.json"
    part.write_text(part.read_text()[:20])
    with pytest.raises(DataError, match=r"shuffle.00001.json: not a readable part.*Delete the file"):
        journal_in(folder).load("shuffle", 1)


def test_latent_statistics_by_hand():
    c = build_case("qwen2")
    group = c.engine(c.config(steps=2)).generate([c.request(seeds=range(6))], SamplingParams(9))[0]
    statistics = latent_statistics(group)
    assert statistics["frac_rollouts"] == sum(4 in t.kinds for t in group) / 6
    assert statistics["steps_mean"] == sum(t.kinds.tolist().count(4) for t in group) / 6
    assert statistics["steps_max"] == max(t.kinds.tolist().count(4) for t in group)
    norms = [float(row.square().sum()) ** 0.5 for t in group for row in t.latents]
    assert statistics["norm_mean"] == pytest.approx(sum(norms) / len(norms))
    assert statistics["frac_stopped_by_length"] == sum(t.token_ids[-1] != c.eos_id for t in group) / 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The embedded task's held-out rows, and a random model of its architecture that likes to open spans."""
    folder = tmp_path_factory.mktemp("digits")
    for kind in ("read", "sum"):
        rows = digits.to_rows(digits.generate(6, stream="heldout", seed=0, kinds=(kind,)), "heldout")
        digits.write_verl_parquet(folder / f"{kind}.parquet", rows)
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(digits.WORDS)
    ids = tokenizer.get_vocab()
    with torch.no_grad():  # the final norm's output is roughly along this row, so `start` is the arg-max at first
        probe = processor(text=["<|im_start|> read <|im_end|>"], return_tensors="pt").input_ids
        hidden = model.model(input_ids=probe).last_hidden_state[0, -1]
        model.lm_head.weight[ids["<|lvr_start|>"]] = hidden
    names = dict(start_token="<|lvr_start|>", latent_token="<|lvr|>", end_token="<|lvr_end|>")
    config = LatentConfig(**names, **{k.replace("token", "id"): ids[v] for k, v in names.items()}, steps=1, max_spans=1)
    save_latent_model(folder / "model", model, tokenizer, processor, config)
    return folder, rows, LatentModel(model, tokenizer, processor, config, (tokenizer.eos_token_id,))


def test_prompts_of_the_embedded_task(files):
    folder, rows, loaded = files
    prompts = read_prompts([folder / "sum.parquet"], loaded)
    examples = digits.generate(6, stream="heldout", seed=0, kinds=("sum",))
    assert len(read_prompts([folder / "read.parquet", folder / "sum.parquet"], loaded, max_rows=8)) == 8
    for index, (prompt, example) in enumerate(zip(prompts, examples, strict=True)):
        assert prompt.ground_truth == example.answer and prompt.where.endswith(f"row {index}")
        # a cell of the 4 x 4 grid is a visual token
        assert prompt.roi == tuple(4 * item.row + item.column for item in example.asked)
        assert int((prompt.prompt_ids == loaded.model.config.image_token_id).sum()) == 16
        assert prompt.extra_info["index"] == index


def test_roi_of_the_second_image_is_offset_and_bad_boxes_are_named(files):
    _, rows, loaded = files
    row = json.loads(json.dumps({k: v for k, v in rows[0].items() if k != "images"}))
    row["images"] = [rows[0]["images"][0], rows[1]["images"][0]]
    row["prompt"] = [{"role": "user", "content": "<image> read red ? <image>"}]
    row["extra_info"] |= {"bboxes": [[0.0, 0.0, 0.2, 0.2], [0.3, 0.0, 0.45, 0.2]], "bbox_images": [1, 0]}
    assert encode_row(row, "rows.parquet row 4", loaded, "4").roi == (16, 1)
    for changes, message in (
        ({"bbox_images": [2, 0]}, r"rows.parquet row 4: extra_info.bbox_images.*\[2, 0\] for 2 boxes, 2 images"),
        ({"bboxes": [[0.0, 0.0, 2.0, 0.2], [0, 0, 1, 1]]}, "rows.parquet row 4: extra_info.bboxes.*outside the image"),
    ):
        with pytest.raises(DataError, match=message):
            encode_row(row | {"extra_info": row["extra_info"] | changes}, "rows.parquet row 4", loaded, "4")


def config_for(folder, *overrides):
    base = [
        f"model.path={folder / 'model'}",
        f"data.val_files={folder / 'read.parquet'}",
        "data.max_response_length=6",
        "reward.custom_reward_function.path=reward/digits.py",
        f"output={folder / 'report.json'}",
    ]
    with initialize_config_module("grpo_latent.config", version_base=None):
        return compose("evaluate", overrides=[*base, *overrides])


def test_entry_point_writes_the_report(files, monkeypatch, request):
    folder, _, _ = files
    monkeypatch.chdir(request.config.rootpath)
    report = run(config_for(folder, "latent.visibility=latents_only", "rollout.n=2", "data.max_rows=5"))
    text = (folder / "report.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(report))
    assert report["num_prompts"] == 5 and report["latent_config"]["visibility"] == "latents_only"
    assert report["latents"]["frac_rollouts"] > 0 and report["leak"] in (0.0, None)
    assert not list(folder.glob("*.part*")), "no parts are left"
    assert f"[{', '.join(f'{v:.1f}' for v in report['outcomes']['own'])}]" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.path=nowhere", "CheckpointError: nowhere: no such folder"),
        ("ablations=[lobotomy]", "ConfigError: ablations: unknown ablation"),
        ("reward.custom_reward_function.path=null", "ConfigError: latent.reward.functions: no reward function"),
        ("data.val_files=nowhere.parquet", "DataError: nowhere.parquet"),
        ("model.dtype=int32", "ConfigError: model.dtype"),
        ("rollout.n=-1", "ConfigError: num_sampled"),
        ("data.max_response_length=0", "ConfigError: sampling.max_new_tokens"),
        ("decodings=[{stepps: 4}]", "ConfigError: decodings[0]: not a decoding strategy"),
        ("decodings=[{temperature: 0.7}]", "ConfigError: decodings[0]: sampling settings of a greedy"),
        ("verdict.primary=lobotomy", "ConfigError: ablations: unknown ablation"),
        ("data.benchmark.name=mmvp", "ConfigError: data.benchmark.path: no folder"),
        ("model.plain=true", "ConfigError: model.plain: a plain model has no latents"),
    ],
)
def test_entry_point_prints_typed_errors(files, monkeypatch, capsys, request, override, message):
    folder, _, _ = files
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(SystemExit) as info:
        main.__wrapped__(config_for(folder, override))
    assert info.value.code == 1 and message in capsys.readouterr().err


def test_a_benchmark_is_graded_strictly_and_needs_no_reward(files, monkeypatch, tmp_path):
    """The embedded task's rows as a benchmark: the accuracy of its grader."""
    folder, rows, loaded = files
    options = ("data.val_files=null", "reward.custom_reward_function.path=null", "latent.reward.functions=[]")
    benchmark = ("data.benchmark.name=digits", f"data.benchmark.path={folder / 'read.parquet'}")
    report = run(
        config_for(
            folder, *options, *benchmark, "latent.steps=2", f"output={tmp_path / 'r.json'}", "verdict.chance=0.1"
        )
    )
    items = load_benchmark("digits", folder / "read.parquet")
    prompts = benchmark_prompts(items, loaded)
    e = Evaluator(dataclasses.replace(loaded, config=loaded.config.replace(steps=2)), 6)
    decode = loaded.tokenizer.decode
    expected = [item.grade(decode(t.text_ids)).correct for item, t in zip(items, e.greedy(prompts), strict=True)]
    assert report["outcomes"]["own"] == expected and report["data"] == [f"digits {folder / 'read.parquet'}"]
    assert report["chance"] == 0.1 and [p["row_id"] for p in report["prompts"]] == [item.item_id for item in items]


def test_pairs_categories_and_chance_of_a_benchmark():
    """MMVP's pair accuracy and a benchmark's categories, by hand: pairs (1, 1), (1, 0)."""
    items = [BenchmarkItem("mmvp", str(i), f"pair {i // 2}", "ab"[i % 2], (), (), ("yes", "no"), "A") for i in range(4)]
    prompts = [EvalPrompt(torch.ones(1), None, "mmvp", "A", "", str(i), item=item) for i, item in enumerate(items)]
    groups = [[Outcome(value, value)] for value in (1.0, 1.0, 1.0, 0.0)]
    report = decoding_report(prompts, GREEDY, groups, VerdictSettings())
    assert report["accuracy"] == 0.75 and report["pair_accuracy"] == 0.5
    assert report["by_category"] == {"a": 1.0, "b": 0.5}
    assert chance(Findings(prompts, VerdictSettings())) == 0.5


def rotations(sizes):
    """Prompts of a benchmark whose question q has `sizes[q]` rows."""
    names = [f"question {q}" for q, size in enumerate(sizes) for _ in range(size)]
    items = [
        BenchmarkItem("hrbench", str(i), name, "", (), (), ("7", "8", "9", "10"), "A") for i, name in enumerate(names)
    ]
    return [EvalPrompt(torch.ones(1), None, "hrbench", "A", "", item.item_id, item=item) for item in items]


def test_verdicts_count_a_question_once():
    """Four questions of two rows. Under zero two questions are lost: gap 2/4, McNemar 2 * 1/2^2 = 0.5 over questions (over
    rows it would be 2 * 1/2^4). Under noise one row of each of two is lost: means 1/2, 1/2, 1, 1, so no McNemar. Under
    shuffle three rows of two questions changed: means (1 + 0) / 2 and 0 against 1 and 1."""
    findings = Findings(rotations([2] * 4), VerdictSettings(level=0.95))
    findings.outcomes = {
        "own": [1.0] * 8,
        "zero": [0.0] * 4 + [1.0] * 4,
        "noise": [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0],
        "shuffle": [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    }
    findings.changed = {"zero": [True] * 8, "noise": [True] * 8, "shuffle": [True, True, True] + [False] * 5}
    usage = usage_report(findings)
    zero, noise, shuffle = (usage[name] for name in ("zero", "noise", "shuffle"))
    assert (zero["num_changed"], zero["num_questions"], zero["ablated"], zero["gap"]) == (8, 4, 0.5, 0.5)
    assert zero["mcnemar"] == {"only_own": 2, "only_other": 0, "p_value": 0.5} and "n = 4" in zero["sentence"]
    assert noise["gap"] == 0.25 and noise["mcnemar"] is None and noise["num_questions"] == 4
    assert (shuffle["num_changed"], shuffle["num_questions"], shuffle["gap"]) == (3, 2, 0.75)
    level = 1 - 0.05 / 3
    expected = bootstrap_difference([1, 1, 1, 1], [0.5, 0.5, 1, 1], level=level)
    assert noise["gap_interval"] == [expected.low, expected.high]
    over_rows = bootstrap_difference(findings.outcomes["own"], findings.outcomes["zero"], level=level)
    assert zero["gap_interval"][1] - zero["gap_interval"][0] > over_rows.high - over_rows.low


def test_intervals_count_a_question_once():
    """Rows (1, 1, 0) and (0): question means 2/3 and 0. A row without a score is left out."""
    prompts, settings = rotations([3, 1]), VerdictSettings()
    expected = bootstrap_interval([2 / 3, 0.0])
    groups = [[Outcome(value, value)] for value in (1.0, 1.0, 0.0, 0.0)]
    assert decoding_report(prompts, GREEDY, groups, settings)["interval"] == [expected.low, expected.high]
    groups[2] = [Outcome(None, 0.0)]
    expected = bootstrap_interval([1.0, 0.0])
    assert decoding_report(prompts, GREEDY, groups, settings)["interval"] == [expected.low, expected.high]
    sampled = Decoding("sampled", 2)
    groups = [[Outcome(float(value), 0.0) for value in pair] for pair in ((1, 0), (1, 1), (0, 0), (0, 0))]
    report = decoding_report(prompts, sampled, groups, settings)["pass_at_k"]["2"]
    expected = bootstrap_interval([2 / 3, 0.0])
    assert report["estimate"] == 0.5 and report["interval"] == [expected.low, expected.high]


def test_a_plain_model_is_evaluated_without_latents(tmp_path, reward_file, files):
    """Its greedy completions are those of `generate`."""
    _, rows, _ = files
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(digits.WORDS)
    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="model.plain=true"):
        load_latent_model(tmp_path / "plain")
    plain = load_latent_model(tmp_path / "plain", plain=True)
    prompts = [encode_row(row, "", plain, "0") for row in rows[:3]]
    report = evaluate(plain, prompts, reward_file, EvalSettings(6))
    assert report["latents"]["frac_rollouts"] == 0 and report["verdict"]["verdict"] == "not used"
    e = Evaluator(plain, 6)
    never = sorted(e.adapter.vision_ids | set(plain.tokenizer.convert_tokens_to_ids(list(LVR_ADDED_TOKENS))))
    for prompt, mine in zip(prompts, e.greedy(prompts), strict=True):
        pixels = dict(pixel_values=prompt.images.pixel_values, image_grid_thw=prompt.images.image_grid_thw)
        ids = model.eval().generate(
            prompt.prompt_ids[None], **pixels, max_new_tokens=6, do_sample=False, suppress_tokens=never
        )
        assert ids[0, len(prompt.prompt_ids) :].tolist() == mine.token_ids.tolist()


def test_moving_the_data_changes_no_draw(loaded):
    """Seeds are made of the row, not of where its file lies."""
    e, (row,) = Evaluator(loaded, 8), make_prompts(loaded, EvalSettings(8))[0][:1]
    decoding = Decoding("sampled", 3, temperature=2.0)
    first, second = e.generate([row, dataclasses.replace(row, where="elsewhere/rows.parquet row 0")], decoding)
    assert [t.seed for t in first] == [t.seed for t in second] and torch.equal(first[0].token_ids, second[0].token_ids)
    assert {t.seed for t in first}.isdisjoint(
        t.seed for t in e.generate([dataclasses.replace(row, row_id="9")], decoding)[0]
    )


def test_dtypes():
    assert parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ConfigError, match="float99"):
        parse_dtype("float99")
