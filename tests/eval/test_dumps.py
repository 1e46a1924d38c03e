"""Round trip with the trainer's own writer, and files as crashes leave them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from grpo_latent.errors import DataError
from grpo_latent.eval.dumps import read_dump, read_step, write_step
from grpo_latent.trajectory import PositionKind as K

KINDS = [K.PROMPT, K.VISION, K.START, K.LATENT, K.LATENT, K.FORCED, K.TEXT, K.TEXT]


def record(step=3, trajectory_id="17/2", **changes):
    values = {
        "step": step,
        "id": trajectory_id,
        "ground_truth": "7",
        "text": " <answer> 7 </answer>",
        "stop_reason": "eos",
        "reward": 1.1,
        "reward_terms": {"accuracy": 1.0},
        "prompt_ids": [5, 6],
        "token_ids": [1, 2, 2, 3, 7, 9],
        "kinds": [int(kind) for kind in KINDS],
        "response_mask": [1, 0, 0, 0, 1, 1],
        "advantages": [0.5, 0, 0, 0, 0.5, 0.5],
        "rollout_log_probs": [-0.1, 0, 0, 0, -0.2, -0.3],
        "sampling_log_probs": [-0.05, 0, 0, 0, -0.1, -0.2],
        "old_log_probs": [-0.1, 0, 0, 0, -0.2, -0.4],
        "ref_log_probs": [-0.5, 0, 0, 0, -0.6, -0.7],
    }
    return {name: value for name, value in (values | changes).items() if value is not ...}


def write(folder, records, step=3, size=2):
    """By the trainer's writer, so that the two cannot drift apart."""
    latents = {r["id"]: torch.arange(size * 4.0).reshape(size, 4) for r in records if "id" in r}
    write_step(folder, step, records, latents)
    return folder / f"step_{step}.jsonl"


def test_chosen_image_positions_round_trip(tmp_path):
    kinds = [K.PROMPT, K.VISION, K.SELECTED, K.LATENT, K.SELECTED, K.LATENT, K.TEXT, K.TEXT]
    slots = record(
        kinds=[int(kind) for kind in kinds], selected_idx=[-1, -1, 3, -1, 0, -1, -1, -1]
    )
    dumped = read_step(write(tmp_path, [slots], size=4))[0]
    assert dumped.trajectory.selected_idx.tolist() == [3, 0] and len(dumped.trajectory.spans) == 1


def test_round_trip(tmp_path):
    dumped = read_step(write(tmp_path, [record()]))[0]
    assert (dumped.step, dumped.group_id, dumped.trajectory_idx) == (3, "17", 2)
    assert (dumped.reward, dumped.reward_terms, dumped.ground_truth) == (
        1.1,
        {"accuracy": 1.0},
        "7",
    )
    assert dumped.advantage == 0.5
    assert dumped.trajectory.kinds.tolist() == [int(kind) for kind in KINDS[2:]]
    assert torch.equal(dumped.trajectory.latents, torch.arange(8.0).reshape(2, 4))
    assert dumped.response_mask.tolist() == [True, False, False, False, True, True]
    assert dumped.log_probs["old"].tolist() == pytest.approx([-0.1, 0, 0, 0, -0.2, -0.4])
    assert dumped.log_probs["ref"][0].item() == pytest.approx(-0.5)
    assert dumped.trajectory.sampling_log_probs[0].item() == pytest.approx(-0.05)
    assert dumped.trajectory.rollout_log_probs[5].item() == pytest.approx(-0.3)


def test_a_trajectory_without_latents(tmp_path):
    kinds = [int(K.PROMPT), int(K.VISION)] + [int(K.TEXT)] * 6
    (dumped,) = read_step(write(tmp_path, [record(kinds=kinds)], size=0))
    assert dumped.trajectory.latents.shape == (0, 4)


def test_without_reference_and_advantages(tmp_path):
    (dumped,) = read_step(write(tmp_path, [record(ref_log_probs=..., advantages=...)]))
    assert set(dumped.log_probs) == {"rollout", "sampling", "old"} and dumped.advantage is None


def test_groups_and_order(tmp_path):
    write(tmp_path, [record(10, "0/0"), record(10, "0/1"), record(10, "1/0")], 10)
    write(tmp_path, [record(9, "0/0")], 9)
    (tmp_path / "step_x.jsonl").write_text("not ours")
    groups = read_dump(tmp_path).groups()
    assert {key: [d.trajectory_idx for d in group] for key, group in groups.items()} == {
        (9, "0"): [0],
        (10, "0"): [0, 1],
        (10, "1"): [0],
    }
    assert list(groups) == [(9, "0"), (10, "0"), (10, "1")]


BROKEN = [
    ({"reward": ...}, "reward"),
    ({"token_ids": [1, 2]}, "2 tokens"),
    ({"reward": "good"}, "good"),
    ({"id": "17"}, "no latents"),
    ({"old_log_probs": [0.0]}, "old"),
    ({"kinds": [int(K.TEXT)] * 8}, "latent positions"),
    ({"kinds": "TTSL"}, "malformed"),
]


@pytest.mark.parametrize(("changes", "named"), BROKEN)
def test_a_malformed_line_is_named(changes, named, tmp_path):
    path = write(tmp_path, [record(), record(trajectory_id="17/3")])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], json.dumps(record(**changes))]) + "\n")
    with pytest.raises(DataError, match=f"step_3.jsonl line 2.*{named}"):
        read_step(path)


def corrupt_json(path):
    path.write_text(path.read_text()[:-30])


def corrupt_latents(path):
    tensors = path.with_suffix(".safetensors")
    tensors.write_bytes(tensors.read_bytes()[:40])


def no_latents(path):
    path.with_suffix(".safetensors").unlink()


def other_latents(path):
    write(path.parent, [record(trajectory_id="99/0")], 3)
    path.write_text(json.dumps(record()) + "\n")


@pytest.mark.parametrize("damage", [corrupt_json, corrupt_latents, no_latents, other_latents])
def test_a_damaged_file_is_named_and_the_others_still_come(damage, tmp_path):
    damage(write(tmp_path, [record()], 3))
    write(tmp_path, [record(4, "17/2")], 4)
    dump = read_dump(tmp_path)
    assert [dumped.step for dumped in dump.trajectories] == [4]
    (problem,) = dump.problems
    assert isinstance(problem, DataError) and "step_3" in str(problem)


@pytest.mark.parametrize(
    "damage",
    [lambda lines: lines[:1], lambda lines: [], lambda lines: [lines[0], *lines]],
    ids=["cut at a line's end", "emptied", "a line twice"],
)
def test_lines_that_are_each_right_are_still_counted(damage, tmp_path):
    path = write(tmp_path, [record(), record(trajectory_id="17/3")])
    path.write_text("".join(damage(path.read_text().splitlines(keepends=True))))
    with pytest.raises(DataError, match="step_3.jsonl: changed since it was dumped"):
        read_step(path)


def test_latents_without_their_lines_are_named(tmp_path):
    write(tmp_path, [record()]).unlink()
    (problem,) = read_dump(tmp_path).problems
    assert "step_3.safetensors: latents without their lines, step_3.jsonl" in str(problem)


def test_no_folder_is_an_empty_dump(tmp_path):
    assert read_dump(tmp_path / "rollouts").trajectories == []


def test_both_files_are_written_whole(tmp_path):
    latents = {"7/0": torch.randn(2, 4), "7/1": torch.zeros(0, 4)}
    write_step(
        tmp_path / "new", 3, [{"id": "7/0", "reward": 0.5}, {"id": "7/1", "reward": 0.0}], latents
    )
    lines = (tmp_path / "new" / "step_3.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["7/0", "7/1"]
    loaded = load_file(tmp_path / "new" / "step_3.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in latents.items())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "step_3.jsonl",
        "step_3.safetensors",
    ]
