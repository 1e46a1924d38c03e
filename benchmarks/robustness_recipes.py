"""The recipes that robustness.py runs: configs, checkpoints, and what makes these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The RL stage of a recipe, and what makes the checkpoint that it starts from.

    Attributes:
        folder, config: of its GRPO stage.
        checkpoint: of SFT, below the recipe's output folder.
        overrides: what run.sh adds to the config.
        script: makes all stages; `ONLY_SFT=1` ends it before GRPO.
        environment: of the script, besides SEED and OUT.
        output: its folder below --outputs is <output>_seed<seed>; empty for the recipe's own name.
            Recipes that start from one checkpoint share it.
    """

    folder: str
    config: str
    checkpoint: str
    overrides: tuple[str, ...] = ()
    script: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    output: str = ""
    data: str = "data"


def text(variant: str) -> Recipe:
    return Recipe(
        "recipes/quickstart",
        "digits_grpo",
        f"{variant}/sft/model",
        ("latent.reward.functions=[{path: reward/digits.py, kwargs: {variant: text}}]",),
        "recipes/text_grpo/run.sh",
        (("VARIANTS", variant),),
    )


def treated(*overrides: str) -> Recipe:
    return Recipe(
        "recipes/quickstart",
        "digits_grpo",
        "sft/model",
        ("trainer.total_training_steps=30", *overrides),
        "recipes/quickstart/run.sh",
        output="quickstart",
    )


# of a recipe's config: what --grpo-defaults takes from grpo.yaml; the rest is the task's
ALGORITHM_KEYS = (
    "algorithm",
    *(
        f"actor_rollout_ref.actor.{name}"
        for name in (
            "optim",
            "clip_ratio",
            "entropy_coeff",
            "loss_agg_mode",
            "use_kl_loss",
            "kl_loss_coef",
            "kl_loss_type",
        )
    ),
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.temperature",
    "data.train_batch_size",
)
# of one_process_remedies.py, which loads torch
REMEDY_NAMES = (
    "dynamic_sampling",
    "deviation_floor",
    "entropy_target",
    "spikes_skipped",
    "spikes_damped",
    "latents_damped",
)
GAUSSIAN = "latent.treatment.gaussian"
HEAD = "latent.treatment.gaussian_head"
RECIPES = {
    "quickstart": Recipe(
        "recipes/quickstart", "digits_grpo", "sft/model", script="recipes/quickstart/run.sh"
    ),
    "ilvr": Recipe("recipes/ilvr", "digits_grpo", "stage2/model", script="recipes/ilvr/run.sh"),
    "ivt_lr": Recipe("recipes/ivt_lr", "digits_grpo", "sft/model", script="recipes/ivt_lr/run.sh"),
    "coconut": Recipe(
        "recipes/coconut", "chains_grpo", "sft/model", script="recipes/coconut/run.sh"
    ),
    "one_hop": treated(
        "latent.treatment.name=recompute", "latent.treatment.recompute.gradient=one_hop"
    ),
    "gaussian": treated(
        "latent.treatment.name=gaussian", f"{GAUSSIAN}.sigma=0.1", f"{GAUSSIAN}.per_dimension=true"
    ),
    "gaussian_head": treated(
        "latent.treatment.name=gaussian_head", f"{HEAD}.sigma=0.1", f"{HEAD}.per_dimension=true"
    ),
    "vmf": treated("latent.treatment.name=vmf", "latent.treatment.vmf.kappa=2000"),
    "anchor": treated("latent.treatment.anchor_weight=0.1"),
    "text_direct": text("direct"),
    "text_boxes": text("text_boxes"),
}
