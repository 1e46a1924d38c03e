"""Latent GRPO in one process: the steps of `grpo_latent.train` without verl and Ray, for many runs.

    config of a recipe ──▶ model, prompts, rewards
    each step    engine hf ▸ rewards ▸ group advantages ▸ replay with gradient ▸ loss ▸ AdamW
    validation   greedy, on held-out rows

It reads the same config, and rollouts, rewards, advantages, replay and losses are the product's
own; what verl adds is done here in a few lines: workers, FSDP, micro-batches, the optimizer. A
trajectory's seed is made as in training. Not here: resume, several devices, drawn selections,
rollout correction, several updates a rollout, policy losses other than `grpo_latent`.

Legend: B trajectories, T positions, M latents or actions, S statistics of a latent, V vocabulary.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VERL_PLATFORM", "cpu")

import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.core.config_search_path import ConfigSearchPath  # noqa: E402
from hydra.core.plugins import Plugins  # noqa: E402
from hydra.plugins.search_path_plugin import SearchPathPlugin  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402
from verl.trainer.ppo.core_algos import kl_penalty  # noqa: E402
from verl.utils.torch_functional import (  # noqa: E402
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
)

import grpo_latent.train  # noqa: E402, F401  lets hydra find verl's configs
from grpo_latent.algo.advantages import group_advantages  # noqa: E402
from grpo_latent.algo.losses import Denominators, aggregate, policy_loss  # noqa: E402
from grpo_latent.backbones.images import ImageInputs  # noqa: E402
from grpo_latent.errors import ConfigError  # noqa: E402
from grpo_latent.eval.decode import Evaluator  # noqa: E402
from grpo_latent.eval.prompts import EvalPrompt, read_prompts  # noqa: E402
from grpo_latent.eval.scoring import RewardScorer, accuracy  # noqa: E402
from grpo_latent.latent.treatments import LatentSource, Treatment, parse_treatment  # noqa: E402
from grpo_latent.latent.treatments.components import Acts, LatentView  # noqa: E402
from grpo_latent.models.adapter import ModelAdapter  # noqa: E402
from grpo_latent.models.kv_cache import caching_layers  # noqa: E402
from grpo_latent.models.loading import LatentModel, load_latent_model  # noqa: E402
from grpo_latent.models.recompute import recompute_latents  # noqa: E402
from grpo_latent.models.replay import replay_hidden  # noqa: E402
from grpo_latent.models.sequences import LatentSequences, collate  # noqa: E402
from grpo_latent.models.shift import token_sources  # noqa: E402
from grpo_latent.models.vision_cache import VisionCache  # noqa: E402
from grpo_latent.rewards.functions import specs_from_config  # noqa: E402
from grpo_latent.rewards.runner import RewardRunner  # noqa: E402
from grpo_latent.rollout.hf import HFRolloutEngine  # noqa: E402
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams  # noqa: E402
from grpo_latent.rollout.sampling import trajectory_seed  # noqa: E402
from grpo_latent.trajectory import PositionKind, Trajectory  # noqa: E402
from grpo_latent.verl_plugin.rewards.manager import reward_settings  # noqa: E402

VISION_BYTES = 1 << 28  # of a frozen tower's features, kept over all steps
AGGREGATIONS = {"token-mean": "token_mean", "seq-mean-token-mean": "grpo"}


class ProductConfigs(SearchPathPlugin):
    """Lets recipes find `grpo.yaml`, as the entry point's own config path does."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("grpo_latent", "pkg://grpo_latent.config")


Plugins.instance().register(ProductConfigs)


def compose_config(folder: str | Path, name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A recipe's config, as `grpo_latent.train --config-dir folder --config-name name` has it."""
    with initialize_config_dir(str(Path(folder).resolve()), version_base=None):
        return compose(name, list(overrides))


@dataclass
class Forward:
    """One forward over a batch: nats, 0 where the policy did not act.

    Attributes:
        log_probs_BT, entropies_BT: of text, at the sampling temperature.
        density_M: log-densities of latents, where they act.
        statistics_MS: `Treatment.statistics`, where the loss reads them.
    """

    log_probs_BT: Tensor
    entropies_BT: Tensor
    density_M: Tensor | None = None
    statistics_MS: Tensor | None = None


def run_forward(
    adapter: ModelAdapter,
    sequences: LatentSequences,
    recorded_MH: Tensor,
    treatment: Treatment,
    reads_statistics: bool,
    temperature: float,
    group_size: int,
) -> Forward:
    """Scores recorded trajectories by the adapter's model.

    Args:
        sequences: latents as they are fed: recorded, or made anew.
        recorded_MH: what the rollout recorded where a hidden state made it.
    """
    hidden_BTH = hidden_states(adapter, sequences, group_size)
    mask_BT = sequences.action_mask_BT(adapter.mechanism.start_is_action)
    logits_MV = adapter.logits(hidden_BTH[token_sources(mask_BT)]).float() / temperature
    log_probs_MV = logits_MV.log_softmax(-1)
    picked_M = log_probs_MV.gather(1, sequences.input_ids_BT[mask_BT][:, None])[:, 0]
    entropies_M = -(log_probs_MV.exp() * log_probs_MV).sum(-1)
    blank_BT = torch.zeros(mask_BT.shape)
    forward = Forward(
        blank_BT.masked_scatter(mask_BT, picked_M), blank_BT.masked_scatter(mask_BT, entropies_M)
    )
    if not (treatment.is_action or reads_statistics):
        return forward
    hidden_MH = hidden_BTH[sequences.sources(adapter.mechanism)]
    source = LatentSource(
        adapter.make(hidden_MH),
        lambda: adapter.logits(hidden_MH).float() / temperature,
        treatment.features(adapter.model, hidden_MH),
    )
    if treatment.is_action:
        forward.density_M = treatment.log_density(source, recorded_MH, sequences.latent_aux_MA)
    if reads_statistics:
        forward.statistics_MS = treatment.statistics(source).float()
    return forward


def hidden_states(adapter: ModelAdapter, sequences: LatentSequences, group_size: int) -> Tensor:
    """`replay_hidden` [B, T, H] of whole groups, each group's prompt once.

    Args:
        sequences: `padding_side="both"`, the rows of a group one after the other, images of each
            prompt once.
    """
    first = int((sequences.kinds_BT >= PositionKind.TEXT).any(0).nonzero()[0])
    if adapter.mechanism.composes:  # each token's input is composed: the injector knows how
        return replay_hidden(adapter, sequences)
    bias, position_ids = sequences.attention_bias(adapter.dtype), sequences.position_ids
    cache = DynamicCache(config=adapter.text_config)
    with caching_layers(adapter.model):
        prompt_PTH = adapter.forward_hidden(
            sequences.fed_ids_BT[::group_size, :first],
            bias[::group_size, :, :first, :first],
            position_ids[..., ::group_size, :first],
            images_of_prompts(sequences, group_size),
            cache,
        )
        cache.batch_repeat_interleave(group_size)
        recorded_BT = sequences.recorded_mask_BT[:, first:]
        embeds_BTH = adapter.embed(sequences.fed_ids_BT[:, first:])
        embeds_BTH = embeds_BTH.masked_scatter(recorded_BT[..., None], sequences.latents_NH)
        completion_BTH = adapter.decoder(
            inputs_embeds=embeds_BTH,
            attention_mask=bias[:, :, first:],
            position_ids=position_ids[..., first:],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    return torch.cat([prompt_PTH.repeat_interleave(group_size, 0), completion_BTH], 1)


def images_of_prompts(sequences: LatentSequences, group_size: int) -> ImageInputs | None:
    """Those of the first row of each group: one image a row, as the embedded tasks have."""
    images = sequences.images
    if images is None:
        return None
    num_rows, num_images = sequences.kinds_BT.shape[0], len(images.image_grid_thw)
    if num_images != num_rows:
        raise ConfigError(
            "not in the one-process loop",
            where="data.train_files",
            got=f"{num_images} images in {num_rows} rows",
            expected="one image a row, or none",
        )
    patches = images.pixel_values.split(images.image_grid_thw.prod(-1).tolist())[::group_size]
    return ImageInputs(torch.cat(patches), images.image_grid_thw[::group_size])


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
        group = OmegaConf.to_container(config.latent.treatment, resolve=True)
        self.treatment, self.terms = parse_treatment(group)
        self.advantages, self.keeps = advantages or self._config_advantages, keeps
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
        record, started = Record(), time.monotonic()
        rows = endless(train)
        record.held_out.append((0, self.validate(held_out, scorer)))
        for step in range(1, num_steps + 1):
            record.steps.append(self.step(step, rows, scorer))
            if step % validate_every == 0 or step == num_steps:
                record.held_out.append((step, self.validate(held_out, scorer)))
                if stop(record):
                    break
        record.seconds = time.monotonic() - started
        return record

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
        if torch.isfinite(norm):  # as verl's engine: the step is left out, the schedule goes on
            self.optimizer.step()
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
            is_last = self.keeps is None or draw == 2
            groups += [group for group in scored if is_last or self.keeps(group.rewards_G)]
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
        loss = loss - actor.entropy_coeff * entropy
        kl = torch.zeros(())
        if actor.use_kl_loss and reference is not None:
            # verl's own, as in training: its k3 is clamped at 10, algo.losses.kl_penalty's is not
            kl_BT = kl_penalty(forward.log_probs_BT, reference.log_probs_BT, actor.kl_loss_type)
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


@dataclass(frozen=True)
class Group:
    """The trajectories of one row, their rewards [G] and whether each is right."""

    prompt: EvalPrompt
    trajectories: list[Trajectory]
    rewards_G: Tensor
    correct: list[float]


@dataclass(frozen=True)
class Batch:
    """Groups of one step, in the order of their rows."""

    groups: list[Group]

    @property
    def trajectories(self) -> list[Trajectory]:
        return [trajectory for group in self.groups for trajectory in group.trajectories]

    @property
    def images(self) -> list:
        return [group.prompt.images for group in self.groups for _ in group.trajectories]

    @property
    def group_ids(self) -> list[str]:
        return [str(i) for i, group in enumerate(self.groups) for _ in group.trajectories]

    @property
    def rewards_B(self) -> Tensor:
        return torch.cat([group.rewards_G for group in self.groups])

    @property
    def correct(self) -> list[float]:
        return [value for group in self.groups for value in group.correct]


def score_groups(
    prompts: Sequence[EvalPrompt], groups: Sequence[list[Trajectory]], scorer: RewardScorer
) -> list[Group]:
    """All in one call: the reward process answers once."""
    rows = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    outcomes = iter(scorer(rows, [trajectory for group in groups for trajectory in group]))
    scored = []
    for prompt, group in zip(prompts, groups, strict=True):
        own = [next(outcomes) for _ in group]
        rewards_G = torch.tensor([outcome.score for outcome in own])
        scored.append(Group(prompt, group, rewards_G, [outcome.correct or 0.0 for outcome in own]))
    return scored


def check_config(config: DictConfig) -> None:
    """Raises `ConfigError` at settings that this loop would pass over in silence."""
    actor, batch_size = config.actor_rollout_ref.actor, config.data.train_batch_size
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
    warmup, total = optim.lr_warmup_steps, config.trainer.total_training_steps
    if warmup is None or warmup < 0:
        warmup = int(optim.lr_warmup_steps_ratio * total)
    if optim.lr_scheduler_type == "cosine":
        schedule = get_cosine_schedule_with_warmup(
            optimizer, warmup, total, min_lr_ratio=optim.min_lr_ratio or 0.0
        )
    else:
        schedule = get_constant_schedule_with_warmup(optimizer, warmup)
    return optimizer, schedule


def in_training_order(
    rows: Sequence[EvalPrompt], seed: int, permutation: int = 0
) -> list[EvalPrompt]:
    """The rows in the order in which verl's sampler draws them in the first epoch.

    Args:
        permutation: 0 for that one; others take further draws of the same generator.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(permutation + 1):
        order = torch.randperm(len(rows), generator=generator).tolist()
    return [rows[i] for i in order]


def endless(rows: Sequence[EvalPrompt]) -> Iterator[EvalPrompt]:
    while True:
        yield from rows


@contextmanager
def rewards_of(config: DictConfig, loaded: LatentModel) -> Iterator[RewardScorer]:
    """The config's reward functions, in their process."""
    entries = reward_settings(config)["functions"]
    with RewardRunner(specs_from_config(entries)) as runner:
        yield RewardScorer(runner, loaded)


def load(config: DictConfig, folder: str | Path) -> LatentModel:
    """The policy at its start, with the config's treatment."""
    treatment, _ = parse_treatment(OmegaConf.to_container(config.latent.treatment, resolve=True))
    overrides = {
        name: config.latent[name]
        for name in ("visibility", "steps", "exit", "max_spans", "start_is_action")
        if config.latent[name] is not None
    }
    return load_latent_model(
        folder, overrides=overrides, treatment=treatment, seed=config.latent.seed
    )


def read_rows(folder: str | Path, name: str, loaded: LatentModel, max_rows: int | None = None):
    return read_prompts([Path(folder) / f"{name}.parquet"], loaded, max_rows)
