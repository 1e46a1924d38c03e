"""Agent loop `latent_agent`: a prompt row becomes one request, its answer a group in verl's rows.

prompt row ──tokens, pixels──▶ request ──▶ server ──▶ G trajectories ──▶ G rows with kinds,
                                                        latents, positions and masks
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import torch
from pydantic import Field
from verl.experimental.agent_loop.agent_loop import (
    AgentLoopBase,
    AgentLoopMetrics,
    AgentLoopOutput,
    register,
)
from verl.utils.profiler import simple_timer

from grpo_latent.errors import DataError, RolloutError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.models.positions import extend_positions
from grpo_latent.rewards.view import reward_view
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.trajectory import Trajectory
from grpo_latent.verl_plugin.boot.registration import AGENT_LOOP_NAME, MANAGER_PATH
from grpo_latent.verl_plugin.boot.threads import in_thread
from grpo_latent.verl_plugin.rollout.group_rows import render_prompt, where
from grpo_latent.verl_plugin.rollout.replica import LatentRolloutClient
from grpo_latent.verl_plugin.rollout.server import GroupResult
from grpo_latent.verl_plugin.rollout.waves import Ticket


class LatentAgentLoopOutput(AgentLoopOutput):
    """verl's output of one trajectory, plus what replays it.

    Attributes:
        recorded: the trajectory's own columns, as `Trajectory.columns` makes them.
        position_ids: int64 [L], prompt and completion, or [4, L] for mRoPE, text positions first
            as verl has them.
    """

    recorded: Any = Field(default=None, exclude=True)
    position_ids: Any = None

    def as_dict(self) -> dict[str, Any]:
        """As verl's, with recorded columns and positions, without the timings, which nobody reads.

        verl's workers read some columns by a second name, which is added.
        """
        fields = super().as_dict()
        del fields["metrics"]
        fields["loss_mask"] = fields["response_mask"]
        fields["input_ids"] = torch.cat([fields["prompts"], fields["responses"]])
        # beside verl's columns: what stays in `extra_fields` never reaches the engine as a tensor
        return fields | self.recorded


@register(AGENT_LOOP_NAME)
class LatentAgentLoop(AgentLoopBase):
    """Prompt to group."""

    def __init__(
        self,
        trainer_config,
        server_manager,
        tokenizer,
        processor,
        dataset_cls,
        data_config,
        mechanism,
    ):
        # not verl's __init__: its token builder for multi-turn chats insists on tokens such as a
        # newline
        self.config = trainer_config.config
        self.rollout_config = self.config.actor_rollout_ref.rollout
        self.server_manager: LatentRolloutClient = server_manager
        self.tokenizer, self.processor = tokenizer, processor
        self.decode = tokenizer.decode
        self.dataset_cls, self.data_config = dataset_cls, data_config.config
        self.mechanism: Mechanism = mechanism
        self.loop = asyncio.get_running_loop()

    async def run(self, sampling_params: dict[str, Any], **kwargs) -> AgentLoopOutput:
        raise RolloutError(
            "latent_agent samples groups, not single trajectories",
            where="actor_rollout_ref.rollout.agent.agent_loop_manager_class",
            got="verl's manager",
            expected=MANAGER_PATH,
        )

    async def run_group(
        self, sampling: SamplingParams, ticket: Ticket, seeds: list[int], row: dict[str, Any]
    ) -> tuple[list[LatentAgentLoopOutput], dict[str, torch.Tensor]]:
        """The group of a prompt row, and the pixels that it shares, empty without images."""
        metrics: dict[str, float] = {}
        messages = list(row["raw_prompt"])
        media = await self.process_multi_modal_info(messages)
        if media.get("videos") or media.get("audios"):
            raise DataError(
                "videos and audio are not supported", where=where(row), expected="images and text"
            )
        # in a thread: the other prompts of this worker go on meanwhile
        prompt = await in_thread(
            None,
            render_prompt,
            self.tokenizer,
            self.processor,
            messages,
            media.get("images") or [],
            where(row),
        )
        if len(prompt.ids) > self.rollout_config.prompt_length:
            raise DataError(
                "prompt is too long",
                where=where(row),
                got=f"{len(prompt.ids)} tokens",
                expected=f"<= data.max_prompt_length={self.rollout_config.prompt_length}",
                fix="Raise data.max_prompt_length, set data.filter_overlong_prompts=True, "
                "or lower size.longest_edge of the checkpoint's image processor, which "
                "data.max_image_tokens of SFT sets.",
            )
        request = RolloutRequest(
            prompt_ids=prompt.ids, seeds=seeds, images=prompt.images, group_id=str(row["uid"])
        )
        pixels = {} if prompt.images is None else dict(vars(prompt.images))
        with simple_timer("generate_sequences", metrics):
            group = await self.server_manager.generate_group(ticket, request, sampling)
        return [
            self._output(trajectory, group, metrics) for trajectory in group.trajectories
        ], pixels

    def _output(
        self, trajectory: Trajectory, group: GroupResult, metrics: dict
    ) -> LatentAgentLoopOutput:
        view = reward_view(
            trajectory, partial(self.decode, skip_special_tokens=False), group.eos_ids
        )
        acted = trajectory.response_mask(
            self.mechanism.start_is_action, self.mechanism.end_is_action
        )
        return LatentAgentLoopOutput(
            prompt_ids=trajectory.prompt_ids.tolist(),
            response_ids=trajectory.token_ids.tolist(),
            response_mask=acted.long().tolist(),
            response_logprobs=trajectory.rollout_log_probs.tolist(),
            # as verl counts a question and its answer
            num_turns=2,
            metrics=AgentLoopMetrics(**metrics),
            extra_fields={
                "solution_str": view.solution_str,
                "latent": view.latent,
                "latent_norms": trajectory.latents.norm(dim=-1).numpy(),
                "stop_reason": trajectory.stop_reason,
                "min_global_steps": trajectory.policy_version,
                "max_global_steps": trajectory.policy_version,
                # empty, as verl's single-turn loop has both
                "turn_scores": [],
                "tool_rewards": [],
            },
            recorded=trajectory.columns(group.prompt_kinds),
            position_ids=extend_positions(group.prompt_positions, len(trajectory.token_ids)),
        )
