"""What stands around a group: its data row on the way in, the rewards' batch on the way out.

data row ──render_prompt──▶ Prompt          row_index ──▶ seeds        where ──▶ messages
trajectories ──reward_input──▶ DataProto, as verl's reward managers read it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.protocol import DataProto

from grpo_latent import recorded_fields
from grpo_latent.errors import DataError, RolloutError
from grpo_latent.models.prompts import Prompt, encode_prompt


def render_prompt(tokenizer, processor, messages: list[dict], images: list, where: str) -> Prompt:
    """The prompt as SFT and evaluation make it.

    Contents are as verl's data set leaves them, text or lists of parts.
    """
    parts = [{**message, "content": parts_of(message["content"])} for message in messages]
    return encode_prompt(tokenizer, processor, parts, images, where)


def parts_of(content: str | list[dict]) -> list[dict]:
    """Content as text and image parts, without pixels."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [part if part.get("type") == "text" else {"type": part.get("type")} for part in content]


def where(row: dict[str, Any]) -> str:
    """How messages name a data row."""
    return f"row {row.get('index')} of {row.get('data_source', 'the data')}"


def row_index(prompt: dict) -> str:
    """The data row's `extra_info.index`, which seeds its trajectories.

    Raises:
        DataError: the row has none; rows without one would share their random numbers.
    """
    index = (prompt.get("extra_info") or {}).get("index")
    if index is None:
        raise DataError(
            "a data row has no index",
            where=f"data source {prompt.get('data_source')!r}, extra_info",
            got=prompt.get("extra_info"),
            expected="extra_info.index, unique in the data set",
        )
    return str(index)


def reward_input(outputs: Sequence[AgentLoopOutput], prompt: dict) -> DataProto:
    """The group as verl's reward managers read it, padded right; prompts of a group are equal."""
    pad = torch.nn.utils.rnn.pad_sequence
    prompts = torch.tensor([output.prompt_ids for output in outputs])
    responses = [torch.tensor(output.response_ids) for output in outputs]
    masks = [
        torch.ones(prompts.shape[1] + len(response), dtype=torch.long) for response in responses
    ]
    padded = pad(responses, batch_first=True)
    # verl's data set adds the dummy, for batches that would have no tensor
    columns = {name: value for name, value in prompt.items() if name != "dummy_tensor"}
    per_output: dict[str, list] = {
        "tool_extra_fields": [output.extra_fields for output in outputs],
        "__num_turns__": [output.num_turns for output in outputs],
        "session_id": list(range(len(outputs))),
        "prompt_len": [len(output.prompt_ids) for output in outputs],
        "response_len": [len(output.response_ids) for output in outputs],
    }
    non_tensors = {name: object_array([value] * len(outputs)) for name, value in columns.items()}
    return DataProto(
        batch=TensorDict(
            {
                "prompts": prompts,
                "responses": padded,
                "input_ids": torch.cat([prompts, padded], dim=1),
                "attention_mask": pad(masks, batch_first=True),
            },
            batch_size=len(outputs),
        ),
        non_tensor_batch={
            **non_tensors,
            **{name: object_array(values) for name, values in per_output.items()},
        },
    )


def object_array(values: list) -> np.ndarray:
    """object [B]; numpy itself would make a matrix of lists of one length."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def check_finite(
    columns: Mapping[str, Tensor], reward: float | None, key: str, step: object
) -> None:
    """Raises `RolloutError` where recorded latents or the reward of a trajectory are not finite.

    Its log-probs are asked when they are compared with the replay's, at actions only.
    """
    values = {"recorded latents": columns[recorded_fields.field("latents").column]}
    if reward is not None:
        values["reward"] = torch.tensor(float(reward))
    for name, tensor in values.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RolloutError(
                f"{name}: not finite",
                where=f"step {step}, trajectory {key}",
                got=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} numbers",
                expected="finite numbers",
                fix="The weights that the rollout ran on have overflowed, or its dtype has.",
            )
