"""What a step's trajectories leave on disk: read from TransferQueue, written by `eval.dumps`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transfer_queue import KVBatchMeta

from grpo_latent import recorded_fields
from grpo_latent.eval.dumps import split_columns, write_step
from grpo_latent.recorded_fields import Wire
from grpo_latent.verl_plugin.trainer.step_rows import StepRows

# beside the recorded fields
COLUMNS = ("rm_scores", "extra_fields", "extra_info", "session_id", "reward_model")


def dump_step(batch: KVBatchMeta, step: int, folder: str | Path) -> tuple[list[dict], list[dict]]:
    """Writes all trajectories of a step by data row and index in the group.

    Returns:
        The lines that were written, and `extra_info["latent"]` of each.
    """
    rows = StepRows(batch, (*recorded_fields.columns(Wire.DUMP), *COLUMNS))
    extra_fields, infos = rows.objects("extra_fields"), rows.objects("extra_info")
    sessions = [int(session) for session in rows.objects("session_id")]
    truths = [model.get("ground_truth") for model in rows.objects("reward_model")]
    columns = {
        name: rows.tensors(name) for name in recorded_fields.columns(Wire.DUMP) if name in rows
    }
    scores = rows.tensors("rm_scores")
    records: list[dict] = []
    tensors: dict[str, Tensor] = {}
    order = sorted(
        range(len(batch)), key=lambda i: (str(infos[i]["index"]).zfill(12), sessions[i])
    )
    for i in order:
        record = {
            "step": step,
            "id": f"{infos[i]['index']}/{sessions[i]}",
            "ground_truth": truths[i],
        }
        record["text"] = extra_fields[i]["solution_str"]
        record["stop_reason"] = extra_fields[i]["stop_reason"]
        record["reward"] = float(scores[i].sum())
        record["reward_terms"] = jsonable(extra_fields[i].get("reward_extra_info", {}))
        line, matrices = split_columns(
            record["id"], {name: values[i] for name, values in columns.items()}
        )
        records.append(record | line)
        tensors |= matrices
    write_step(folder, step, records, tensors)
    return records, [extra_fields[i]["latent"] for i in order]


def jsonable(values: dict) -> dict:
    """Numbers as they are, everything else as text."""
    return {
        k: v if isinstance(v, (int, float, str, bool, type(None))) else str(v)
        for k, v in values.items()
    }
