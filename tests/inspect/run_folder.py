"""A run folder as training leaves it, made by engine `hf` on a tiny model.

It has checkpoint, data, dumps, metrics and evaluation.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from latent_cases import Case, build_case
from safetensors.torch import save_file

from grpo_latent.data.embedded import digits
from grpo_latent.data.rows import write_verl_parquet
from grpo_latent.eval.dumps import read_dump
from grpo_latent.eval.journal import PhaseBatch
from grpo_latent.eval.prompts import EvalPrompt
from grpo_latent.eval.report import Findings, build_report
from grpo_latent.eval.scoring import Outcome
from grpo_latent.eval.verdict import VerdictSettings
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import save_latent_model
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.trajectory import PositionKind, Trajectory

XSS = (
    '<script>window.hacked = true</script><img src=x onerror="window.hacked = true"></script><!--'
)
G = 4
_KINDS = torch.tensor(
    [PositionKind.START, PositionKind.LATENT, PositionKind.FORCED, PositionKind.TEXT]
)
LATENT = Trajectory(
    torch.ones(1).long(), _KINDS, _KINDS, torch.ones(1, 4), torch.zeros(4), torch.zeros(4), "eos"
)


def make_run(
    folder: Path, num_groups: int = 3, steps=(1, 2), steps_a_span: int = 3, xss: bool = False
) -> Path:
    """Writes the folder and returns it."""
    case = build_case("qwen2_5_vl")
    mechanism = case.mechanism(steps=steps_a_span)
    # the tests scale the tiny model up and give its head a bias, which a Hugging Face folder
    # cannot carry
    case.model.lm_head.bias = None
    checkpoint = folder / "checkpoints" / f"global_step_{max(steps)}" / "actor" / "huggingface"
    save_latent_model(checkpoint, case.model, case.tokenizer, case.processor, mechanism)
    examples = digits.generate(num_groups, stream="rl", seed=0)
    rows = digits.to_rows(examples, "train_rl")
    if xss:
        rows[0]["prompt"][0]["content"] = f"{XSS} ?<image>"
    write_verl_parquet(folder / "train.parquet", rows)
    for step in steps:
        write_dump(folder / "rollouts", step, *roll_out(case, mechanism, rows, step, xss))
    write_metrics(folder / "metrics.jsonl", steps=20)
    settings = {"latent.output_dir": str(folder), "actor_rollout_ref.rollout.n": G}
    (folder / "config.yaml").write_text(
        f"data:\n  train_files: {folder / 'train.parquet'}\n"
        f"latent:\n  dump_every: 1\n  visibility: full\n"
        f"actor_rollout_ref:\n  rollout:\n    temperature: 1.0\n"
        f"    n: {settings['actor_rollout_ref.rollout.n']}\n"
        + (f"trainer:\n  experiment_name: '{XSS.replace(chr(39), '')}'\n" if xss else "")
    )
    write_evaluation(folder / "evaluation.json")
    return folder


def roll_out(
    case: Case, mechanism, rows: list[dict], step: int, xss: bool
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Records and latents as `verl_plugin.trainer` dumps them."""
    engine = case.engine(mechanism)
    adapter = ModelAdapter(case.model, mechanism)
    records, latents = [], {}
    for row in rows:
        index = row["extra_info"]["index"]
        question = row["prompt"][0]["content"].removesuffix("<image>")
        words = "read red ?" if xss and index == 0 else question
        messages = [
            {"role": "user", "content": [{"type": "text", "text": words}, {"type": "image"}]}
        ]
        prompt = encode_prompt(
            case.tokenizer, case.processor, messages, [_image(row)], f"row {index}"
        )
        seeds = [1000 * step + 10 * index + i for i in range(G)]
        request = RolloutRequest(prompt.ids, seeds, prompt.images, group_id=str(index))
        group = engine.generate([request], SamplingParams(max_new_tokens=14))[0]
        batch = collate(group, [prompt.images] * G, adapter, mechanism.visibility, "both")
        with torch.no_grad():
            old_BT, _ = replay(adapter, batch)
        start = len(prompt.ids)
        for i, trajectory in enumerate(group):
            text = case.tokenizer.decode(trajectory.text_ids) if not (xss and index == 0) else XSS
            mask = trajectory.response_mask().long()
            reward = float(i % 2 == step % 2)
            records.append(
                {
                    "step": step,
                    "id": f"{index}/{i}",
                    "ground_truth": row["reward_model"]["ground_truth"],
                    "text": text,
                    "stop_reason": trajectory.stop_reason,
                    "reward": reward,
                    "reward_terms": {
                        "accuracy": reward,
                        "format": 0.1,
                        "pred": XSS if xss else "7",
                    },
                    "prompt_ids": trajectory.prompt_ids.tolist(),
                    "token_ids": trajectory.token_ids.tolist(),
                    "kinds": [int(PositionKind.PROMPT)] * start + trajectory.kinds.tolist(),
                    "response_mask": mask.tolist(),
                    "advantages": ((reward - 0.5) * 2 * mask).tolist(),
                    "rollout_log_probs": trajectory.rollout_log_probs.tolist(),
                    "old_log_probs": old_BT[i, start : start + len(trajectory.token_ids)].tolist(),
                    "ref_log_probs": (trajectory.rollout_log_probs * 1.1).tolist(),
                }
            )
            latents[f"{index}/{i}"] = trajectory.latents
    return records, latents


def _image(row: dict):
    import io

    from PIL import Image

    return Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB")


def write_dump(
    folder: Path, step: int, records: list[dict], latents: dict[str, torch.Tensor]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in latents.items()},
        folder / f"step_{step}.safetensors",
    )
    (folder / f"step_{step}.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )


def write_metrics(path: Path, steps: int, offset: float = 0.0) -> None:
    lines = []
    for step in range(1, steps + 1):
        values = {
            "critic/score/mean": offset + step / steps,
            "rewards/format/mean": 0.1,
            "latent/frac_rollouts": 1.0,
            "latent/steps_mean": 3.0,
            "actor/entropy": 1 / step,
            "actor/grad_norm": float("nan") if step == 3 else 0.5,
        }
        if step % 5 == 0:
            values["val-core/digits/acc/mean@1"] = offset + 0.9 * step / steps
        lines.append(json.dumps({"step": step, "data": values}))
    path.write_text("\n".join(lines) + "\n")


def write_evaluation(path: Path, num_right: int = 95) -> None:
    """Writes an evaluation's report made of outcomes: shuffle takes everything, noise nothing."""
    own = [1.0] * num_right + [0.0] * (100 - num_right)
    outcomes = {
        "own": own,
        "shuffle": [1.0] * 10 + [0.0] * 90,
        "noise": [1.0] * (num_right - 1) + [0.0] * (101 - num_right),
    }
    prompts = [EvalPrompt(torch.ones(1), None, "digits", "7", "", str(i)) for i in range(100)]
    findings = Findings(prompts, VerdictSettings(chance=0.1), leak=0.0)
    for name, values in outcomes.items():
        batches = [PhaseBatch([[Outcome(value, value)] for value in values], 100, 1.0)]
        if name == "own":
            findings.add_own([LATENT] * 100, batches)
        else:
            findings.add_ablation(name, batches, [True] * 100)
    path.write_text(json.dumps(build_report(findings) | {"checkpoint": "here", "seconds": 1.0}))


def repeat_dump(folder: Path, times: int) -> int:
    """Many trajectories out of few, for the size and the speed of the page: copies of the steps.

    Returns their number.
    """
    first = read_dump(folder / "rollouts")
    steps = sorted({dumped.step for dumped in first.trajectories})
    for copy in range(times):
        step, new = steps[copy % len(steps)], max(steps) + 1 + copy
        text = (folder / "rollouts" / f"step_{step}.jsonl").read_text()
        records = [json.loads(line) | {"step": new} for line in text.splitlines()]
        (folder / "rollouts" / f"step_{new}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in records)
        )
        tensors = (folder / "rollouts" / f"step_{step}.safetensors").read_bytes()
        (folder / "rollouts" / f"step_{new}.safetensors").write_bytes(tensors)
    return len(read_dump(folder / "rollouts").trajectories)
