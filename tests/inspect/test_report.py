"""What the page's data says, against a naive computation.

And what happens where a run is incomplete.
"""

import base64
import json
import math

import pytest
import run_folder
import torch
from torch.nn.functional import cosine_similarity

from grpo_latent.errors import DataError
from grpo_latent.eval.dumps import read_dump
from grpo_latent.eval.geometry import geometry
from grpo_latent.inspect.__main__ import main, progress_bar
from grpo_latent.inspect.evaluation import ablation_rows
from grpo_latent.inspect.payload import flatten, thin
from grpo_latent.inspect.probes import find_rows
from grpo_latent.inspect.report import Limits, build_report, spread
from grpo_latent.inspect.run import label_runs, read_metrics, read_run
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model
from grpo_latent.models.prompts import encode_prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_folder.make_run(tmp_path_factory.mktemp("runs") / "lvr_seed3")


@pytest.fixture(scope="module")
def report(folder):
    return build_report([read_run(folder)], Limits())


def opened(report, index):
    return json.loads(report.blocks[index])


def test_it_says_what_it_does_and_how_much(folder):
    told = []
    read_and_built = read_run(folder, progress=lambda *what: told.append(what))
    build_report([read_and_built], Limits(), progress=lambda *what: told.append(what))
    steps = len(list((folder / "rollouts").glob("*.jsonl")))
    assert told[0] == (f"{folder}: reading rollouts of steps", 0, steps)
    assert told.count(("lvr_seed3: heat maps, by group", 5, 6)) == 1
    whats = list(dict.fromkeys(what for what, _, _ in told))
    assert [what.split(": ")[-1].split(" ")[0] for what in whats] == [
        "reading",
        "loading",
        "texts",
        "reading",
        "heat",
        "writing",
    ]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_line_is_for_terminals(is_terminal, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR" if is_terminal else "NO_COLOR", "1")
    with progress_bar() as progress:
        progress("reading [a]", 3, 8)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("reading [a]" in captured.err and "3/8" in captured.err) == is_terminal
    assert is_terminal or captured.err == ""


def test_nothing_is_missing(report):
    run = report.overview["runs"][0]
    assert run["problems"] == [] and report.overview["notes"] == []
    assert (run["name"], run["family"]) == ("lvr_seed3", "lvr")
    assert run["num_trajectories"] == 6 * run_folder.G
    assert len(report.overview["groups"]) == len(report.blocks) == 6
    assert all(group["probed"] and group["open"] for group in report.overview["groups"])


def test_probes_against_a_naive_computation(folder, report):
    loaded = load_latent_model(read_run(folder).checkpoint)
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    dumped = {
        (d.step, d.group_id, d.trajectory_idx): d
        for d in read_dump(folder / "rollouts").trajectories
    }
    rows = find_rows([folder / "train.parquet"], ["0", "1", "2"])
    num_steps = 0
    loaded.model.requires_grad_(False)
    for index, group in enumerate(report.overview["groups"]):
        row, block = rows[group["group"]], opened(report, index)
        prompt = encode_prompt(loaded.tokenizer, loaded.processor, row.messages, row.images(), "")
        with torch.no_grad():
            visual = adapter.encode_images(prompt.images)
        for entry in block["trajectories"]:
            latents = dumped[group["step"], group["group"], entry["idx"]].trajectory.latents
            assert len(entry["probes"]) == len(latents) == entry["kinds"].count("L")
            for latent, probe in zip(
                latents, (block["probes"][i] for i in entry["probes"]), strict=True
            ):
                expected = torch.stack(
                    [cosine_similarity(latent, token, dim=0) for token in visual]
                )
                found = (
                    torch.frombuffer(
                        bytearray(base64.b64decode(probe["cosines"])), dtype=torch.int8
                    )
                    / 127
                )
                torch.testing.assert_close(found, expected, atol=0.5 / 127 + 1e-4, rtol=0)
                assert probe["top"] == int(expected.argmax())
                assert probe["norm"] == pytest.approx(float(latent.norm()), rel=1e-4)
                assert probe["gap"] < 1e-4  # the checkpoint is the policy that acted
                lens = loaded.model.lm_head(latent).softmax(-1)
                assert probe["lens"][0][0] == loaded.tokenizer.convert_ids_to_tokens(
                    int(lens.argmax())
                )
                assert probe["lens"][0][1] == pytest.approx(float(lens.max()), rel=1e-3)
                num_steps += 1
    assert num_steps > 10


def test_the_hit_is_the_box(report):
    """Digits: the asked object's cell is exactly one token."""
    for index, group in enumerate(report.overview["groups"]):
        block = opened(report, index)
        (x0, y0, _, _) = block["boxes"][0]["box"]
        cell = int(y0 * 4 + 1e-6) * 4 + int(x0 * 4 + 1e-6)
        assert block["roi"] == [cell]
        hits = [
            block["probes"][i]["hit"] for entry in block["trajectories"] for i in entry["probes"]
        ]
        assert hits == [
            block["probes"][i]["top"] == cell for e in block["trajectories"] for i in e["probes"]
        ]
        if hits:
            assert group["hit"] == pytest.approx(sum(hits) / len(hits), rel=1e-4)


def test_new_log_probs_are_the_old_ones_where_the_checkpoint_acted(report):
    for index in report.blocks:
        for entry in opened(report, index)["trajectories"]:
            assert entry["log_probs"]["new"] == pytest.approx(entry["log_probs"]["old"], abs=1e-3)


def test_a_run_without_checkpoint_shows_the_rest(folder, tmp_path):
    copy = copy_without(folder, tmp_path, "checkpoints")
    report = build_report([read_run(copy)], Limits())
    assert "no checkpoint" in report.overview["runs"][0]["problems"][0]
    block = opened(report, 0)
    assert block["images"] == [] and block["trajectories"][0]["tokens"][0].startswith("#")
    assert len(report.overview["groups"]) == 6


def test_a_run_without_data_names_the_file(folder, tmp_path):
    copy = copy_without(folder, tmp_path, "train.parquet")
    (copy / "config.yaml").write_text(f"data:\n  train_files: [{copy}/train.parquet]\n")
    report = build_report([read_run(copy)], Limits())
    assert "train.parquet" in report.overview["runs"][0]["problems"][0]
    assert opened(report, 0)["trajectories"][0]["tokens"][0].startswith("<")  # tokens need no data


def test_data_that_lack_a_row_are_named(folder, tmp_path):
    copy = copy_without(folder, tmp_path)
    (other,) = run_folder.digits.to_rows(run_folder.digits.generate(1, stream="rl", seed=0), "rl")
    other["extra_info"]["index"] = 10_000
    run_folder.write_verl_parquet(copy / "train.parquet", [other])
    (copy / "config.yaml").write_text(f"data:\n  train_files: [{copy}/train.parquet]\n")
    (problem,) = build_report([read_run(copy)], Limits()).overview["runs"][0]["problems"]
    assert "extra_info.index" in problem and "--data" in problem


def test_a_corrupt_dump_is_named_and_the_others_show(folder, tmp_path, capsys):
    copy = copy_without(folder, tmp_path)
    path = copy / "rollouts" / "step_1.jsonl"
    path.write_text(path.read_text()[:200])
    assert main([str(copy)]) == 0
    assert "step_1.jsonl line 1" in capsys.readouterr().err
    assert "step_1.jsonl line 1" in (copy / "report.html").read_text()
    assert {g["step"] for g in build_report([read_run(copy)], Limits()).overview["groups"]} == {2}


def test_another_models_checkpoint_is_refused(folder, tmp_path):
    from latent_cases import WORDS, build_case

    from grpo_latent.models import tiny
    from grpo_latent.models.loading import save_latent_model

    sizes = tiny.TinySizes(hidden=64)
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(WORDS, sizes=sizes)
    save_latent_model(
        tmp_path / "other", model, tokenizer, processor, build_case("qwen2_5_vl").mechanism()
    )
    run = read_run(folder, checkpoint=tmp_path / "other")
    assert "hidden size 32" in build_report([run], Limits()).overview["runs"][0]["problems"][0]


def test_limits(folder):
    report = build_report(
        [read_run(folder)], Limits(trajectories=3 * run_folder.G, probed_groups=1)
    )
    groups = report.overview["groups"]
    assert (
        len(groups) == 3
        and {g["step"] for g in groups} == {1, 2}
        and sum(g["probed"] for g in groups) == 1
    )
    assert any("12 of 24" in note for note in report.overview["notes"])
    size = max(map(len, report.blocks.values()))
    small = build_report([read_run(folder)], Limits(block_bytes=size + 10))
    assert 0 < len(small.blocks) < 6 and sum(map(len, small.blocks.values())) <= size + 10
    assert [g["open"] for g in small.overview["groups"]] == [i in small.blocks for i in range(6)]
    assert any("to keep the page small" in note for note in small.overview["notes"])


def test_spread_reaches_all_parts():
    assert spread(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert spread(list(range(3)), 5) == [0, 1, 2] and spread([1, 2], 0) == []


def test_geometry_by_hand():
    x, y = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    values = geometry([[torch.stack([x, y]), torch.stack([x, x])], [torch.stack([y, y])]])
    assert values["norm_mean"] == pytest.approx((3 + 4 + 3 + 3 + 4 + 4) / 6)
    assert values["cosine_step_to_step"] == pytest.approx(2 / 3)  # 0, 1 and 1
    assert values["cosine_within_group"] == pytest.approx(1.0)
    assert values["cosine_across_groups"] == pytest.approx(0.0, abs=1e-6)
    assert values["effective_rank"] == pytest.approx(2.0, rel=1e-4)
    collapsed = geometry([[x[None]], [2 * x[None]]])
    assert collapsed["cosine_across_groups"] == pytest.approx(1.0)
    assert collapsed["effective_rank"] == pytest.approx(1.0, abs=1e-3)
    assert geometry([[torch.zeros(0, 2)]]) == {}


def test_ablation_rows():
    """Own first; intervals from outcomes, verdicts as the evaluation gave them.

    An old report without them has neither.
    """
    outcomes = {"own": [1] * 90 + [0] * 10, "shuffle": [0] * 90 + [1] * 9 + [None]}
    usage = {
        "shuffle": {
            "gap": 0.8,
            "gap_interval": [0.7, 0.9],
            "num_changed": 99,
            "verdict": "used",
            "sentence": "s",
        }
    }
    report = {
        "num_prompts": 100,
        "ablations": {"shuffle": 0.1, "own": 0.9, "oracle": None},
        "follow": 0.5,
        "leak": None,
    }
    full = ablation_rows("x", report | {"outcomes": outcomes, "usage": usage, "chance": 0.1})
    own, shuffle = full["rows"]
    assert (own["name"], shuffle["name"], full["chance"]) == ("own", "shuffle", 0.1)
    assert own["low"] < 0.9 < own["high"] and own["high"] - own["low"] == pytest.approx(
        4 * math.sqrt(0.09 / 100), abs=0.03
    )
    assert (shuffle["gap_low"], shuffle["gap_high"], shuffle["verdict"], shuffle["changed"]) == (
        0.7,
        0.9,
        "used",
        99,
    )
    assert [value for _, value in full["facts"]] == [0.5]
    pairs = [{"question": str(i // 2)} for i in range(100)]
    paired = ablation_rows("x", report | {"outcomes": outcomes, "prompts": pairs})["rows"][0]
    assert paired["high"] - paired["low"] == pytest.approx(4 * math.sqrt(0.09 / 50), abs=0.03), (
        "50 questions, not 100"
    )
    old = ablation_rows("x", report)["rows"][1]
    assert old["accuracy"] == 0.1 and old["verdict"] is old["low"] is old["gap"] is None


def test_runs_of_one_family_differ_by_seed_only(tmp_path):
    """Folders of one name are told apart by their parents.

    A config that differs beyond seeds and places: another family.
    """
    runs = []
    for name, rate in (("seed0", 1), ("seed1", 1), ("lower", 0.5)):
        folder = tmp_path / name / "grpo"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(
            f"latent: {{seed: {len(runs)}, output_dir: {folder}}}\n"
            f"optim: {{lr: {rate}}}\ndata: {{val_n: {len(runs)}}}\n"
        )
        runs.append(read_run(folder))
    assert label_runs(runs) == [
        ("seed0/grpo", "grpo"),
        ("seed1/grpo", "grpo"),
        ("lower/grpo", "lower/grpo"),
    ]
    assert label_runs(runs[:1]) == [("grpo", "grpo")]


def test_an_evaluation_beside_the_run_is_found(folder, tmp_path):
    copy = copy_without(folder, tmp_path, "evaluation.json")
    report = {"num_prompts": 9, "greedy": {}, "ablations": {"own": 1.0}}
    (tmp_path / "mine.json").write_text(
        json.dumps(report | {"checkpoint": "/moved/copy/checkpoints/global_step_2/x"})
    )
    (tmp_path / "other.json").write_text(json.dumps(report | {"checkpoint": "/moved/sft/model"}))
    (tmp_path / "broken.json").write_text("{")
    run = read_run(copy)
    assert list(run.evaluations) == ["mine.json"] and run.problems == []


def test_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run_folder.write_metrics(path, steps=4)
    path.write_text(path.read_text() + '{"step": 5, "da')  # the line that a dying run was writing
    assert read_metrics(path)["actor/entropy"][0] == [1, 2, 3, 4]
    path.write_text('{"step": 5, "da\n' + path.read_text())
    with pytest.raises(DataError, match="line 1"):
        read_metrics(path)


def test_thin_keeps_the_ends_and_json_has_no_nan():
    steps, values = thin(list(range(1201)), [float(i) for i in range(1201)])
    assert len(steps) <= 502 and (steps[0], steps[-1]) == (0, 1200)
    assert thin([1, 2], [float("nan"), float("inf")])[1] == [None, None] and thin([], []) == [
        [],
        [],
    ]


def test_secrets_of_a_config_are_not_shown():
    flat = flatten({"a": {"wandb_api_key": "abc", "tokenizer": "x"}, "n": 3, "e": {}})
    assert flat == {"a.wandb_api_key": "(not shown)", "a.tokenizer": "x", "n": "3", "e": "{}"}


@pytest.mark.parametrize("name", ["none", "empty"])
def test_no_run_is_an_error(name, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / name)]) == 2
    assert "DataError" in capsys.readouterr().err


def test_a_run_that_has_only_begun_has_a_page(folder, tmp_path, capsys):
    begun = copy_without(folder, tmp_path, "rollouts", "checkpoints")
    assert main([str(begun)]) == 0
    assert capsys.readouterr().out.endswith(" MB, no trajectories in it so far\n")


def copy_without(folder, target, *names):
    import shutil

    copy = target / "copy"
    shutil.copytree(
        folder, copy, ignore=lambda _, entries: [entry for entry in entries if entry in names]
    )
    return copy


def test_wandb_gets_the_page_and_its_tables(folder, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main([str(folder), "--out", str(tmp_path / "page.html"), "--wandb", "latents"]) == 0
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media")
    (page,) = media.rglob("inspector*.html")
    assert page.read_text() == (tmp_path / "page.html").read_text()
    tables = {
        path.name.split("_")[0]: json.loads(path.read_text())
        for path in media.rglob("*.table.json")
    }
    assert len(tables["groups"]["data"]) == 6 and "disagreement" in tables["groups"]["columns"]
    assert [row[2] for row in tables["ablations"]["data"]] == ["own", "shuffle", "noise"]
