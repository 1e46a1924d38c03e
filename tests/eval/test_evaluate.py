"""`evaluate` against a recount by hand, reading rows, and the entry point on the embedded task's files."""

import dataclasses
import json
import textwrap

import pytest
import torch
from hydra import compose, initialize_config_module
from latent_cases import build_case, case

from grpo_latent.data import digits
from grpo_latent.errors import ConfigError, DataError
from grpo_latent.eval.ablations import donors
from grpo_latent.eval.evaluate import EvalSettings, Evaluator, accuracy, evaluate, latent_statistics
from grpo_latent.eval.prompts import EvalPrompt, encode_row, read_prompts
from grpo_latent.evaluate import main, parse_dtype, run
from grpo_latent.latent.config import LatentConfig
from grpo_latent.models import tiny
from grpo_latent.models.loading import LatentModel, save_latent_model
from grpo_latent.rewards.functions import FunctionSpec
from grpo_latent.rewards.runner import RewardResult, RewardRunner
from grpo_latent.rollout.protocol import LatentOverride

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
    own = Evaluator(loaded, settings).greedy(rows)
    truths = [text_of(loaded, t) if index % 2 == 0 else f"no {index}" for index, t in enumerate(own)]
    return [dataclasses.replace(row, ground_truth=truth) for row, truth in zip(rows, truths, strict=True)], own


def test_report_against_a_recount(loaded, reward_file):
    settings = EvalSettings(max_new_tokens=8, num_sampled=3, temperature=2.0, prompts_per_batch=4, seed=3)
    prompts, own = make_prompts(loaded, settings)
    phases = []
    with RewardRunner([FunctionSpec(str(reward_file))]) as runner:
        report = evaluate(loaded, prompts, runner, settings, progress=lambda *event: phases.append(event))
    assert report["greedy"] == {"accuracy": 0.5, "score": 0.25} and report["ablations"]["own"] == 0.5
    assert sum(count for phase, count in phases if phase == "shuffle") == sum(c for p, c in phases if p == "own") == 10

    e = Evaluator(loaded, settings)
    sources = donors([len(t.latents) for t in own], 3)
    shuffled = e.greedy(prompts, [None if s is None else override(own[s].latents) for s in sources])
    answers = [text_of(loaded, t) for t in shuffled]
    right = [answer == p.ground_truth for answer, p in zip(answers, prompts, strict=True)]
    follows = [answers[i] == prompts[s].ground_truth for i, s in enumerate(sources) if s is not None]
    assert report["ablations"]["shuffle"] == pytest.approx(sum(right) / 10)
    assert report["follow"] == pytest.approx(sum(follows) / len(follows))
    zeroed = e.greedy(prompts, [override(torch.zeros(1, 32)) if len(t.latents) else None for t in own])
    assert report["num_changed"]["zero"] == sum(len(t.latents) > 0 for t in own)
    assert report["ablations"]["zero"] == pytest.approx(
        sum(text_of(loaded, t) == p.ground_truth for t, p in zip(zeroed, prompts, strict=True)) / 10
    )
    sampled = [t for p, group in zip(prompts, e.generate(prompts, None, 3), strict=True) for t in group]
    assert len({t.seed for t in sampled}) == 30, "no two trajectories share their draws"
    truths = [p.ground_truth for p in prompts for _ in range(3)]
    expected = sum(text_of(loaded, t) == truth for t, truth in zip(sampled, truths, strict=True)) / 30
    assert report["sampled"] == {"accuracy": pytest.approx(expected), "n": 3}
    assert set(report["ablations"]) == {"own", "zero", "noise", "shuffle", "oracle"}
    assert report["leak"] > 0 and 0 <= report["hit"] <= 1
    json.dumps(report)


def test_same_seed_same_report_and_batches_do_not_matter(loaded, reward_file):
    reports = []
    for size in (3, 100):
        settings = EvalSettings(max_new_tokens=8, num_sampled=2, prompts_per_batch=size)
        prompts, _ = make_prompts(loaded, settings)
        with RewardRunner([FunctionSpec(str(reward_file))]) as runner:
            report = evaluate(loaded, prompts, runner, settings)
        del report["seconds"], report["leak"], report["latents"]["norm_mean"]
        reports.append(report)
    assert reports[0] == reports[1]


def test_without_latents_nothing_can_be_ablated(loaded, reward_file):
    """A model that never opens a span: accuracies of ablations are null, not copies of `own`."""
    settings = EvalSettings(max_new_tokens=6)
    silent = dataclasses.replace(loaded, config=loaded.config.replace(max_spans=0))
    prompts, _ = make_prompts(silent, settings)
    with RewardRunner([FunctionSpec(str(reward_file))]) as runner:
        report = evaluate(silent, prompts, runner, settings)
    assert report["ablations"] == {"own": 0.5, "zero": None, "noise": None, "shuffle": None, "oracle": None}
    assert report["follow"] is report["hit"] is report["leak"] is report["sampled"] is None
    assert report["latents"]["frac_rollouts"] == 0 and report["latents"]["norm_mean"] is None


def test_accuracy_prefers_acc_and_leaves_dropped_out():
    results = [
        RewardResult(0.3, {"digits": 0.3}, {"accuracy": 1.0}),
        RewardResult(0.0, {"digits": 0.0}, {"accuracy": 0.0}),
        RewardResult(9.0, {"digits": None}, {"accuracy": 1.0}, dropped=True, error_kind="nan"),
    ]
    assert accuracy(results) == 0.5
    assert accuracy([RewardResult(0.25, {"mine": 0.25}, {})]) == 0.25, "else the score"
    assert accuracy(results[2:]) is None


def test_latent_statistics_by_hand():
    c = build_case("qwen2")
    group = c.engine(c.config(steps=2)).generate([c.request(seeds=range(6))], EvalSettings(9).sampled_params())[0]
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
    assert json.loads((folder / "report.json").read_text()) == report
    assert report["num_prompts"] == 5 and report["latent_config"]["visibility"] == "latents_only"
    assert report["latents"]["frac_rollouts"] > 0 and report["leak"] in (0.0, None)
    assert not list(folder.glob("*.part"))


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
    ],
)
def test_entry_point_prints_typed_errors(files, monkeypatch, capsys, request, override, message):
    folder, _, _ = files
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(SystemExit) as info:
        main.__wrapped__(config_for(folder, override))
    assert info.value.code == 1 and message in capsys.readouterr().err


def test_dtypes():
    assert parse_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(ConfigError, match="float99"):
        parse_dtype("float99")
