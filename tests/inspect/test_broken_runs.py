"""A run of which one file is broken: a problem names the file, and the page shows the rest."""

import json
import math
import shutil

import pytest
import run_folder
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from grpo_latent.inspect.__main__ import main
from grpo_latent.inspect.run import read_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run_folder.make_run(
        tmp_path_factory.mktemp("whole") / "grpo", num_groups=1, steps=(1, 2)
    )


@pytest.fixture
def folder(whole, tmp_path):
    """A copy that can be broken; its config has the data's place of the original."""
    return shutil.copytree(whole, tmp_path / "grpo")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def page_of(folder, tmp_path, capsys) -> tuple[str, str]:
    assert main([str(folder), "--out", str(tmp_path / "page.html"), "--probe", "1"]) == 0
    return capsys.readouterr().err, (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts": [{"question": "1"}]},
        {"prompts": ["one"] * 100},
        {"outcomes": [1.0, 0.0]},
        {"outcomes": {"own": ["right"] * 100}},
        {"usage": ["shuffle"]},
        {"usage": {"shuffle": "used"}},
        {"usage": {"shuffle": {"gap_interval": [0.1]}}},
    ],
)
def test_a_malformed_evaluation_is_named(folder, changes):
    edit(folder / "evaluation.json", **changes)
    shutil.copy(run_folder_evaluation(folder), folder / "other.json")
    run = read_run(folder)
    (problem,) = run.problems
    assert "evaluation.json: malformed evaluation" in str(problem) and list(run.evaluations) == [
        "other.json"
    ]


def run_folder_evaluation(folder):
    run_folder.write_evaluation(folder.parent / "good.json")
    return folder.parent / "good.json"


def test_what_is_not_finite_in_an_evaluation_is_left_out_of_the_page(folder, tmp_path, capsys):
    path = folder / "evaluation.json"
    edit(
        path,
        ablations={"own": math.nan, "shuffle": 0.1},
        outcomes={"own": [math.nan] * 100},
        leak=math.inf,
    )
    (evaluation,) = read_run(folder).evaluations.values()
    assert evaluation["ablations"] == {"own": None, "shuffle": 0.1}
    _, page = page_of(folder, tmp_path, capsys)
    assert "NaN" not in page.split("plotly")[0]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "data": [1]}',
        '{"step": Infinity, "data": {}}',
        f'{{"step": 1, "data": {{"critic/score/mean": 1{"0" * 400}}}}}',
        "null",
        "7",
    ],
)
def test_a_malformed_line_of_metrics_is_named(folder, line):
    (folder / "metrics.jsonl").write_text(f'{line}\n{{"step": 2, "data": {{}}}}\n')
    (problem,) = read_run(folder).problems
    assert "metrics.jsonl line 1: malformed metrics" in str(problem)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("1: 2\ntrainer: {3: 4, name: x}", ""),
        ("data: {train_files: 5}", "5: not a readable parquet file"),
        (
            "actor_rollout_ref: {rollout: {temperature: hot}}",
            "actor_rollout_ref.rollout.temperature: no temperature",
        ),
        ("latent: {treatment: 5}", ""),
        ("latent: {treatment: [mask]}", ""),
    ],
)
def test_an_odd_config_costs_what_it_says(folder, tmp_path, capsys, config, problem):
    text = (folder / "config.yaml").read_text()
    data = text[: text.index("latent:")]
    (folder / "config.yaml").write_text(
        ("" if config.startswith("data") else data) + config + "\n"
    )
    err, _ = page_of(folder, tmp_path, capsys)
    assert problem in err and ("Error: " in err) == bool(problem)


@pytest.mark.parametrize(
    "changes",
    [{"advantages": []}, {"reward": math.nan}, {"reward": -math.inf}, {"response_mask": []}],
)
def test_a_malformed_trajectory_is_named_and_other_steps_are_read(folder, changes):
    path = folder / "rollouts" / "step_1.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(lines[0]) | changes), *lines[1:]]) + "\n")
    run = read_run(folder)
    (problem,) = run.problems
    assert "step_1.jsonl line 1: malformed trajectory" in str(problem)
    assert {dumped.step for dumped in run.dump.trajectories} == {2}


def test_latents_without_a_dimension_are_named(folder):
    path = folder / "rollouts" / "step_1.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    save_file(
        {
            name: torch.tensor(1.0) if index == 0 else t
            for index, (name, t) in enumerate(tensors.items())
        },
        path,
    )
    (problem,) = read_run(folder).problems
    assert "step_1.jsonl line" in str(problem) and "malformed trajectory" in str(problem)


@pytest.mark.parametrize("token_id", [-1, 10**9])
def test_tokens_of_another_vocabulary_are_no_crash_in_the_embedding(
    folder, tmp_path, capsys, token_id
):
    path = folder / "rollouts" / "step_1.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["token_ids"] = [token_id] * len(lines[0]["token_ids"])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert "token ids of another model" in capsys.readouterr().err
