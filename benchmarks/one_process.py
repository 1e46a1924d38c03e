"""Latent GRPO in one process: the steps of `grpo_latent.train` without verl and Ray, for many runs.

    config of a recipe ──▶ model, prompts, rewards
    each step    engine hf ▸ rewards ▸ group advantages ▸ replay with gradient ▸ loss ▸ AdamW
    validation   greedy, on held-out rows

It reads the same config, and rollouts, rewards, advantages, replay and losses are the product's
own; what verl adds is done here in a few lines: workers, FSDP, micro-batches, the optimizer. A
trajectory's seed is made as in training. Not here: resume, several devices, drawn selections,
rollout correction, several updates a rollout, policy losses other than `grpo_latent`.

Beside it: one_process_inputs.py (config, policy, rows, rewards) and one_process_forward.py.

Legend: B trajectories, G of a group, P prompts, T positions, M latents or actions, N vectors of the
batch, H hidden size.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

# before torch and verl are imported, which read them then
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VERL_PLATFORM", "cpu")

import torch  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from one_process_forward import Forward, run_forward  # noqa: E402
from one_process_inputs import (  # noqa: E402
    Batch,
    Group,
    compose_config,
    endless,
    in_training_order,
    load,
    read_rows,
    rewards_of,
    score_groups,
)
from torch import Tensor  # noqa: E402
from verl.utils.torch_functional import (  # noqa: E402
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
)

from grpo_latent.algo.advantages import group_advantages  # noqa: E402
from grpo_latent.algo.losses import Denominators, aggregate, policy_loss  # noqa: E402
from grpo_latent.common.settings import section  # noqa: E402
from grpo_latent.errors import ConfigError  # noqa: E402
from grpo_latent.eval.decode import Evaluator  # noqa: E402
from grpo_latent.eval.prompts import EvalPrompt  # noqa: E402
from grpo_latent.eval.scoring import RewardScorer, accuracy  # noqa: E402
from grpo_latent.latent.treatments import parse_treatment  # noqa: E402
from grpo_latent.latent.treatments.loss_components import Acts, LatentView  # noqa: E402
from grpo_latent.models.adapter import ModelAdapter  # noqa: E402
from grpo_latent.models.loading import LatentModel  # noqa: E402
from grpo_latent.models.recompute import recompute_latents  # noqa: E402
from grpo_latent.models.sequences import LatentSequences, collate  # noqa: E402
from grpo_latent.models.vision_cache import VisionCache  # noqa: E402
from grpo_latent.rollout.hf import HFRolloutEngine  # noqa: E402
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams  # noqa: E402
from grpo_latent.rollout.sampling import trajectory_seed  # noqa: E402
from grpo_latent.verl_plugin.worker.algo import text_kl  # noqa: E402

# what scripts ask this module for
__all__ = [
    "OneProcess",
    "Record",
    "StepLog",
    "check_config",
    "compose_config",
    "endless",
    "in_training_order",
    "load",
    "read_rows",
    "rewards_of",
]

VISION_BYTES = 1 << 28  # of a frozen tower's features, kept over all steps
AGGREGATIONS = {"token-mean": "token_mean", "seq-mean-token-mean": "grpo"}


@dataclass(frozen=True)
class StepLog:
    """What a step did: means over its trajectories, `grad_norm` before clipping."""

    step: int
    reward: float
    accuracy: float
    silent_groups: float
    grad_norm: float
    entropy: float
    length: float
    kl: float


@dataclass
class Record:
    """One run: `held_out` is (step, greedy accuracy), step 0 before training."""

    held_out: list[tuple[int, float]] = field(default_factory=list)
    steps: list[StepLog] = field(default_factory=list)
    seconds: float = 0.0


Advantages = Callable[[Tensor, list[str]], Tensor]


class OneProcess:
    """Latent GRPO of one config on one model, which it trains in place.

    Args:
        advantages: rewards [B], group ids -> advantages [B]; None is the config's estimator.
        keeps: whether a group of rewards [G] is trained on; in place of the others the step draws
            groups of further rows (dynamic sampling of DAPO, 2503.14476). None keeps all.

    Raises:
        ConfigError: a setting that is not here.
    """

    def __init__(
        self,
        config: DictConfig,
        loaded: LatentModel,
        advantages: Advantages | None = None,
        keeps: Callable[[Tensor], bool] | None = None,
    ):
        self.config, self.loaded = config, loaded
        self.actor, self.rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
        check_config(config)
        group = section(config.latent.treatment, "latent.treatment")
        self.treatment, self.terms = parse_treatment(group)
        self.advantages = advantages or self._config_advantages
        self.keeps = keeps
        self.entropy_coeff = self.actor.entropy_coeff
        self.engine = HFRolloutEngine(
            loaded.model,
            loaded.mechanism,
            loaded.eos_ids,
            max_batch_rows=config.latent.max_batch_rows,
            treatment=self.treatment,
        )
        self.adapter = self.engine.adapter
        backbone = self.adapter.backbone
        if self.actor.freeze_vision_tower:
            for module in backbone.vision_modules:
                module.requires_grad_(False)
        if backbone.caches_tower:
            VisionCache.install(
                loaded.model, VISION_BYTES if self.actor.freeze_vision_tower else 0
            )
        self.reads_statistics = self.treatment.reads_statistics(self.terms)
        needs_reference = self.actor.use_kl_loss or any(
            self.treatment.reference_weights(self.terms).values()
        )
        self.reference = (
            ModelAdapter(copy.deepcopy(loaded.model).requires_grad_(False), loaded.mechanism)
            if needs_reference
            else None
        )
        self.parameters = [p for p in loaded.model.parameters() if p.requires_grad]
        self.optimizer, self.schedule = make_optimizer(self.parameters, config)

    def _config_advantages(self, rewards_B: Tensor, group_ids: list[str]) -> Tensor:
        algorithm = self.config.algorithm
        estimator = "grpo" if algorithm.norm_adv_by_std_in_grpo else "dr_grpo"
        return group_advantages(rewards_B, group_ids, estimator, algorithm.adv_eps)

    def run(
        self,
        train: Sequence[EvalPrompt],
        held_out: Sequence[EvalPrompt],
        scorer: RewardScorer,
        num_steps: int,
        validate_every: int,
        stop: Callable[[Record], bool] = lambda record: False,
    ) -> Record:
        """Trains on the rows in their order.

        Args:
            stop: asked after each validation.
        """
        record = Record()
        started = time.monotonic()
        rows = endless(train)
        record.held_out.append((0, self.validate(held_out, scorer)))
        self.end_step(0, is_last=False)
        for step in range(1, num_steps + 1):
            record.steps.append(self.step(step, rows, scorer))
            is_last = step == num_steps
            is_validated = step % validate_every == 0 or is_last
            if is_validated:
                record.held_out.append((step, self.validate(held_out, scorer)))
            ends = self.end_step(step, is_last)
            if ends or (is_validated and stop(record)):
                break
        record.seconds = time.monotonic() - started
        return record

    def end_step(self, step: int, is_last: bool) -> bool:
        """Whether the run ends behind a step and its validation; step 0 is before training."""
        return False

    def validate(self, prompts: Sequence[EvalPrompt], scorer: RewardScorer) -> float:
        """Greedy accuracy."""
        evaluator = Evaluator(self.loaded, self.config.data.max_response_length)
        outcomes = scorer(prompts, evaluator.greedy(prompts))
        value = accuracy([outcome.correct for outcome in outcomes])
        assert value is not None, "the recipes' rewards drop no trajectory"
        return value

    def step(self, step: int, rows: Iterator[EvalPrompt], scorer: RewardScorer) -> StepLog:
        """Rolls out, scores and updates once."""
        batch = self._sample(step, rows, scorer)
        advantages_B = self.advantages(batch.rewards_B, batch.group_ids)
        self.loaded.model.train()
        loss, grad_log = self._loss(batch, advantages_B)
        self.optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.actor.optim.clip_grad)
        self.update(norm)
        self.schedule.step()
        groups_PG = batch.rewards_B.view(-1, self.rollout.n)
        return StepLog(
            step,
            reward=float(batch.rewards_B.mean()),
            accuracy=fmean(batch.correct),
            silent_groups=float((groups_PG == groups_PG[:, :1]).all(1).float().mean()),
            grad_norm=float(norm),
            length=fmean(len(t.token_ids) for t in batch.trajectories),
            **grad_log,
        )

    def update(self, norm: Tensor) -> None:
        """The optimizer's step on clipped gradients; none, as in verl, if `norm` is not finite."""
        if torch.isfinite(norm):
            self.optimizer.step()

    def _sample(self, step: int, rows: Iterator[EvalPrompt], scorer: RewardScorer) -> Batch:
        """`train_batch_size` groups; with `keeps`, of as many rows as three draws take."""
        config = self.config
        sampling = SamplingParams(
            config.data.max_response_length,
            self.rollout.temperature,
            self.rollout.top_k,
            self.rollout.top_p,
        )
        groups: list[Group] = []
        # a policy that has learned or lost everything has no group with signal, however many are
        # drawn: as DAPO's, the draws are bounded, and what the last one gives is taken
        for draw in range(1 if self.keeps is None else 3):
            prompts = [next(rows) for _ in range(config.data.train_batch_size - len(groups))]
            requests = [self._request(step, prompt) for prompt in prompts]
            drawn = self.engine.generate(requests, sampling)
            scored = score_groups(prompts, drawn, scorer)
            groups += [
                group
                for group in scored
                if self.keeps is None or draw == 2 or self.keeps(group.rewards_G)
            ]
        return Batch(groups)

    def _request(self, step: int, prompt: EvalPrompt) -> RolloutRequest:
        index = prompt.extra_info["index"]
        seeds = [
            trajectory_seed(self.config.latent.seed, step, index, j) for j in range(self.rollout.n)
        ]
        return RolloutRequest(prompt.prompt_ids, seeds, prompt.images, group_id=str(index))

    def _loss(self, batch: Batch, advantages_B: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss with gradient, and what is logged of it."""
        actor = self.actor
        recorded = collate(
            batch.trajectories,
            batch.images,
            self.adapter,
            self.loaded.mechanism.visibility,
            padding_side="both",
        )
        recorded_MH = recorded.latents_NH[recorded.is_made_N]
        sequences = recorded
        if self.treatment.gradient is not None:
            made_NH = recompute_latents(self.adapter, recorded, self.treatment.gradient)
            sequences = recorded.with_latents(made_NH)
        forward = self._forward(self.adapter, sequences, recorded_MH)
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = self._forward(self.reference, recorded, recorded_MH)
        mask_BT = sequences.action_mask_BT(self.loaded.mechanism.start_is_action)
        denominators, aggregation = Denominators.of(mask_BT), AGGREGATIONS[actor.loss_agg_mode]
        # one update a rollout: the old policy is the current one
        loss = policy_loss(
            forward.log_probs_BT,
            forward.log_probs_BT.detach(),
            advantages_B,
            mask_BT,
            denominators=denominators,
            aggregation=aggregation,
        ).loss
        entropy = aggregate(forward.entropies_BT, mask_BT, aggregation, denominators)
        loss = loss - self.entropy_coeff * entropy
        kl = torch.zeros(())
        if actor.use_kl_loss and reference is not None:
            kl_BT = text_kl(forward.log_probs_BT, reference.log_probs_BT, actor.kl_loss_type)
            kl = aggregate(kl_BT, mask_BT, aggregation, denominators)
            loss = loss + actor.kl_loss_coef * kl
        loss = loss + self._latent_loss(forward, reference, sequences, advantages_B)
        return loss, {"entropy": float(entropy.detach()), "kl": float(kl.detach())}

    def _forward(
        self, adapter: ModelAdapter, sequences: LatentSequences, recorded_MH: Tensor
    ) -> Forward:
        return run_forward(
            adapter,
            sequences,
            recorded_MH,
            self.treatment,
            self.reads_statistics,
            self.rollout.temperature,
            self.rollout.n,
        )

    def _latent_loss(
        self,
        forward: Forward,
        reference: Forward | None,
        sequences: LatentSequences,
        advantages_B: Tensor,
    ) -> Tensor:
        """The treatment's components, each a mean over all latents (`token-mean`)."""
        acts = None
        if forward.density_M is not None:
            rows_M = sequences.sources(self.adapter.mechanism)[0]
            acts = Acts(
                forward.density_M,
                forward.density_M.detach(),
                None if reference is None else reference.density_M,
                advantages_B[rows_M],
            )
        view = LatentView(
            acts, forward.statistics_MS, None if reference is None else reference.statistics_MS
        )
        loss = torch.zeros(())
        for component in self.treatment.components(view, self.terms):
            if component.weight and component.values.numel():
                loss = loss + component.weight * component.values.mean()
        return loss


def check_config(config: DictConfig) -> None:
    """Raises `ConfigError` at settings that this loop would pass over in silence."""
    actor = config.actor_rollout_ref.actor
    batch_size = config.data.train_batch_size
    wanted = {
        "actor_rollout_ref.actor.policy_loss.loss_mode": "grpo_latent",
        "actor_rollout_ref.actor.ppo_mini_batch_size": batch_size,
        "actor_rollout_ref.actor.ppo_epochs": 1,
        "algorithm.adv_estimator": "grpo_latent",
        "algorithm.use_kl_in_reward": False,
        "latent.selection": "top_k",
    }
    for key, expected in wanted.items():
        got = OmegaConf.select(config, key)
        if got != expected:
            raise ConfigError("not in the one-process loop", where=key, got=got, expected=expected)
    if actor.loss_agg_mode not in AGGREGATIONS:
        raise ConfigError(
            "not in the one-process loop",
            where="actor_rollout_ref.actor.loss_agg_mode",
            got=actor.loss_agg_mode,
            expected=f"one of {tuple(AGGREGATIONS)}",
        )


def make_optimizer(parameters: list, config: DictConfig):
    """AdamW and its schedule, as verl builds them of `actor.optim`."""
    optim = config.actor_rollout_ref.actor.optim
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.lr, betas=tuple(optim.betas), weight_decay=optim.weight_decay
    )
    warmup = optim.lr_warmup_steps
    total = config.trainer.total_training_steps
    if warmup is None or warmup < 0:
        warmup = int(optim.lr_warmup_steps_ratio * total)
    if optim.lr_scheduler_type == "cosine":
        schedule = get_cosine_schedule_with_warmup(
            optimizer, warmup, total, min_lr_ratio=optim.min_lr_ratio or 0.0
        )
    else:
        schedule = get_constant_schedule_with_warmup(optimizer, warmup)
    return optimizer, schedule
