"""The `latent:` group of the training config, as each process reads it.

It travels as `actor_rollout_ref.rollout.custom.latent`, verl's free-form field of the rollout
config, because that is the part of the config that reaches workers, rollout servers and agent
loops alike. `grpo_latent.train` copies the top-level `latent:` there; with stock
`verl.trainer.main_ppo` it is set directly, or left out for the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_latent.common.settings import build
from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import Mechanism
from grpo_latent.latent.treatments import LatentTerms, Mask, Treatment, parse_treatment
from grpo_latent.models.loading import check_tokens, read_mechanism
from grpo_latent.trajectory import PositionKind

CHECKPOINT_FIELDS = ("visibility", "steps", "exit", "max_spans", "start_is_action")
SELECTIONS = ("top_k", "plackett_luce")
TRAINED_LATENTS, LM_HEAD = LORA_TRAINS = ("latents", "lm_head")


@dataclass(frozen=True)
class LatentOptions:
    """Options of latent training.

    Attributes:
        seed: of sampling; a trajectory's own seed is made of it, the step, the row and its index
            in the group.
        visibility, steps, exit, max_spans, start_is_action: override the checkpoint's
            `latent_config.json`; None keeps it.
        settings: further settings of the checkpoint's mechanism that are overridden.
        selection: how prompt slots take image positions in training rollouts: `top_k`, those of
            most attention, or `plackett_luce`, drawn in proportion to attention^(1 /
            `selection_temperature`): then a choice acts.
        replay_logp_gap_bound: largest |rollout - replayed log-prob| over actions, in nats, before
            the run stops; None never stops it. bf16 needs a larger one than fp32.
        dump_every: dump rollouts each so many steps; 0 never.
        dump_dir: where; `rollouts` beside the checkpoints by default.
        cpu_threads: torch threads of each process on CPU. More than one is slower as soon as
            processes share cores.
        placement: of rollout servers: `beside` the training workers, one each, or `apart`, on
            nodes of their own (`rollout.apart`).
        max_batch_rows: trajectories that engine `hf` decodes together.
        max_latents: room for latent steps of a completion in engine `vllm`; None takes what
            `max_spans` allows, or 256.
        share_images: encode an image that several rows of a micro-batch have only once.
        share_prompt: the trajectories of a group that meet in a micro-batch run their prompt once;
            `boot.layout.sharing_notes` says where that does not apply. False runs each row alone.
        score_in_head: log-probs and entropies are made within `lm_head`, in chunks, of the tokens
            of completions; False makes logits of all positions, as verl does.
        max_skipped_updates: updates that may be skipped in a row, because the gradient's norm
            overflows, before the run ends.
        rollout_timeout_s: a rollout wave that is incomplete for so long fails the run.
        output_dir: of train.log; None where the driver does not collect logs.
        verify_digests: files of checkpoints and models are compared with their manifest before
            they are loaded; False compares names and sizes.
        lora_trains: what trains whole beside LoRA's adapters: `latents`, the mechanism's own
            parameters (head, end vector, gate, slots), `lm_head`; a treatment's always do.
        trust_pickles: what of a checkpoint cannot be loaded without running its code is loaded.
        preflight: of the checkpoint, before workers start.
        usage: `eval.usage.UsageSettings`, of the measurement at each validation.
        alarm: `trainer.alarm_settings.AlarmSettings`.
        keep_best: keep the checkpoint with the best held-out score, beside the last one.
        reward: settings of the reward manager.
        treatment: what the update makes of latents, and
        terms: the loss terms at their positions; the two halves of the group `latent.treatment`.
    """

    seed: int = 0
    visibility: str | None = None
    steps: int | None = None
    exit: str | None = None
    max_spans: int | None = None
    start_is_action: bool | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    selection: str = "top_k"
    selection_temperature: float = 1.0
    replay_logp_gap_bound: float | None = 1e-3
    dump_every: int = 0
    dump_dir: str | None = None
    cpu_threads: int = 1
    placement: str = "beside"
    max_batch_rows: int = 512
    max_latents: int | None = None
    share_images: bool = True
    share_prompt: bool = True
    score_in_head: bool = True
    max_skipped_updates: int = 3
    rollout_timeout_s: float = 1800.0
    output_dir: str | None = None
    verify_digests: bool = True
    lora_trains: tuple[str, ...] = (TRAINED_LATENTS,)
    trust_pickles: bool = False
    preflight: Mapping[str, Any] = field(default_factory=dict)
    usage: Mapping[str, Any] = field(default_factory=dict)
    alarm: Mapping[str, Any] = field(default_factory=dict)
    keep_best: bool = True
    reward: Mapping[str, Any] = field(default_factory=dict)
    treatment: Treatment = field(default_factory=Mask)
    terms: LatentTerms = field(default_factory=LatentTerms)

    def __post_init__(self):
        minima = {"dump_every": 0, "cpu_threads": 1, "max_batch_rows": 1, "max_latents": 1}
        minima["max_skipped_updates"] = 1
        for name, minimum in minima.items():
            value = getattr(self, name)
            if name == "max_latents" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ConfigError(
                    "not a valid count",
                    where=f"latent.{name}",
                    got=value,
                    expected=f"int >= {minimum}",
                )
        if self.selection not in SELECTIONS:
            expected = f"one of {SELECTIONS}"
            raise ConfigError(
                "unknown value", where="latent.selection", got=self.selection, expected=expected
            )
        unknown = sorted(set(self.lora_trains) - set(LORA_TRAINS))
        if unknown:
            raise ConfigError(
                "unknown value",
                where="latent.lora_trains",
                got=unknown,
                expected=f"some of {LORA_TRAINS}",
            )
        for name in ("replay_logp_gap_bound", "rollout_timeout_s", "selection_temperature"):
            value = getattr(self, name)
            if value is None and name == "replay_logp_gap_bound":
                continue
            if value is None or not value > 0:
                raise ConfigError(
                    "not a valid bound", where=f"latent.{name}", got=value, expected="> 0"
                )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any] | None) -> LatentOptions:
        """Raises `ConfigError` at an unknown key or a value of another type."""
        values = dict(values or {})
        treatment, terms = parse_treatment(values.pop("treatment", None))
        return build(cls, values, "latent", given={"treatment": treatment, "terms": terms})

    @classmethod
    def from_rollout(cls, rollout_config: Any) -> LatentOptions:
        """From verl's rollout config, as DictConfig or dataclass."""
        custom = rollout_config.get("custom", None) or {}
        return cls.from_mapping(custom.get("latent", None))

    @property
    def overrides(self) -> dict[str, Any]:
        """Settings of the checkpoint's mechanism to replace.

        `Mechanism.replace` refuses one that it lacks.
        """
        changes = {name: getattr(self, name) for name in CHECKPOINT_FIELDS}
        return {name: value for name, value in changes.items() if value is not None} | dict(
            self.settings
        )

    @property
    def act_kinds(self) -> frozenset[int]:
        """Kinds of positions that act and are not text.

        Their log-densities stand in `log_probs`, where `response_mask` is False, and they have a
        clipped ratio of their own.
        """
        latents = {int(PositionKind.LATENT)} if self.treatment.is_action else set()
        return frozenset(
            latents
            | ({int(PositionKind.SELECTED)} if self.draw_temperature is not None else set())
        )

    @property
    def draw_temperature(self) -> float | None:
        """Of the image positions that slots draw; None where the choice is deterministic."""
        return self.selection_temperature if self.selection == "plackett_luce" else None

    @property
    def density_gap_bound(self) -> float | None:
        bound = self.terms.density_gap_bound
        return self.replay_logp_gap_bound if bound is None else bound

    def mechanism(self, folder: str | Path, tokenizer) -> Mechanism:
        """The checkpoint's latents with these overrides.

        Raises:
            CheckpointError: the folder has no latents, or its tokenizer disagrees.
            ConfigError: an override is not usable with this checkpoint.
        """
        mechanism = read_mechanism(folder, tokenizer)
        check_tokens(mechanism, tokenizer, where=str(folder))
        mechanism = mechanism.replace(**self.overrides)
        if self.draw_temperature is not None and mechanism.top_k_image == 0:
            raise ConfigError(
                "there are no image positions to draw",
                where="latent.selection",
                got=f"{self.selection} with {mechanism.key()}, top_k_image 0",
                expected="top_k, or a checkpoint of ivt_lr",
            )
        return mechanism
