"""What the one-process loop is given: a recipe's config, the policy, rows, rewards, scored groups.

Legend: B trajectories, G of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig
from torch import Tensor

import grpo_latent.train  # noqa: F401  lets hydra find verl's configs
from grpo_latent.common.settings import section
from grpo_latent.eval.prompts import EvalPrompt, read_prompts
from grpo_latent.eval.scoring import RewardScorer
from grpo_latent.latent.treatments import parse_treatment
from grpo_latent.models.loading import LatentModel, load_latent_model
from grpo_latent.rewards.functions import specs_from_config
from grpo_latent.rewards.runner import RewardRunner
from grpo_latent.trajectory import Trajectory
from grpo_latent.verl_plugin.rewards.manager import reward_settings


class ProductConfigs(SearchPathPlugin):
    """Lets recipes find `grpo.yaml`, as the entry point's own config path does."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("grpo_latent", "pkg://grpo_latent.config")


Plugins.instance().register(ProductConfigs)


def compose_config(folder: str | Path, name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A recipe's config, as `grpo_latent.train --config-dir folder --config-name name` has it."""
    with initialize_config_dir(str(Path(folder).resolve()), version_base=None):
        return compose(name, list(overrides))


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
    treatment, _ = parse_treatment(section(config.latent.treatment, "latent.treatment"))
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
