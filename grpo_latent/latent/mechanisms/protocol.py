"""The protocol of the mechanism axis: what a latent *is*; twin of `treatments.protocol`.

    prompt     num_slots, top_k_image, positions             what stands before the text
    decoding   begin ─▶ RowStates: plan ▸ advance ▸ plan …   what stands next in each row
    feed       h_{t-1} ──make──▶ recorded at t ──compose──▶ input vector at t
    training   sources: which h made which recorded vector; make and compose again

The engine, replay, SFT, ablations and checks ask these methods and never a mechanism's name. A
mechanism is a frozen dataclass: *its fields are its settings*, which `latent_config.json` stores.
What is fixed for a system is a class attribute (`positions`, of spans the delimiter's kind, …); a
subclass that makes it a setting annotates it.

Legend: N rows of a batch, M of their positions, B x T sequences, H hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from grpo_latent.common.files import write_text
from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms.hidden_source import HiddenSource
from grpo_latent.latent.mechanisms.row_states import RowStates
from grpo_latent.trajectory import PositionKind, made_mask

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

VISIBILITIES = ("full", "latents_only")
POSITIONS = ("text_style", "1d")
UNBOUNDED = 2**62  # spans of a row without a bound
LATENT_CONFIG_FILE = "latent_config.json"
VERSION = 2  # of that file: see `stored`
CHECKPOINT_ONLY = {"checkpoint_only": True}  # metadata of a field that no section of a config sets


@dataclass(frozen=True)
class Refusal:
    """A setting that an engine cannot run: its name, what it is, what would run, and why."""

    setting: str
    got: Any
    expected: Any
    why: str


@dataclass(frozen=True)
class Mechanism:
    """Base of all mechanisms; by itself no latents. A subclass's fields are its settings.

    Attributes:
        name: in the registry; a class of a user's own has none and is stored as
            package.module:Class.
        published_tokens: role -> token, in the order in which the system adds them. Each role has
            the fields `<role>_token` and `<role>_id`, unless its token is None.
        parameter_prefixes: names (of `state_dict`) of all parameters that `attach` may make.
        structural: settings that decide which parameters there are; those of a checkpoint cannot
            change.
        steps: latent steps of a span (or their cap), slots of the prompt.
        max_spans: spans that a completion may open; None for no bound.
        visibility: `full` (published by all) or `latents_only` (text sees question and latents
            only).
        start_is_action, end_is_action: whether emitting the token that opens a span, or a sampled
            one that closes it, counts as an action of the policy.
        has_slots: whether completions begin with `num_slots` latent steps.
        top_k_image: image embeddings inserted before each slot, chosen by attention; 0 for none.
        selection_order: of those: `index`, as they stand in the image, or `attention`, best first.
        positions: `text_style` (the model's own for the prompt, latents count on as text) or `1d`
            (0, 1, 2, … for everything, images included).
        reads_logits, reads_latents: whether `plan` needs logits, `advance` the recorded vectors.
        state_size: number of columns of `RowStates.pack`.
    """

    name: ClassVar[str] = ""
    published_tokens: ClassVar[Mapping[str, str]] = {}
    parameter_prefixes: ClassVar[tuple[str, ...]] = ()
    structural: ClassVar[tuple[str, ...]] = ()
    state_size: ClassVar[int] = 0
    has_slots: ClassVar[bool] = False
    # not annotated: a subclass that annotates one makes it a setting
    steps = 0
    visibility = "full"
    start_is_action = True
    end_is_action = True
    top_k_image = 0
    selection_order = "index"
    positions = "text_style"

    # properties, since the settings decide in some systems
    @property
    def max_spans(self) -> int | None:
        return None

    @property
    def reads_logits(self) -> bool:
        return False

    @property
    def reads_latents(self) -> bool:
        return False

    # ---- tokens

    @property
    def roles(self) -> dict[str, tuple[str, int]]:
        """Role -> (token, id) of the roles that are in use."""
        pairs = {
            role: (getattr(self, f"{role}_token"), getattr(self, f"{role}_id"))
            for role in self.published_tokens
        }
        return {role: pair for role, pair in pairs.items() if pair != (None, None)}

    @property
    def token_ids(self) -> dict[str, int]:
        """Token -> id of all latent tokens."""
        return dict(self.roles.values())

    @property
    def banned_ids(self) -> frozenset[int]:
        """Latent tokens that are never sampled."""
        return frozenset(self.token_ids.values()) - self.opening_ids - self.closing_ids

    @property
    def opening_ids(self) -> frozenset[int]:
        """Tokens that open a span when they are sampled; banned in rows that may not open one."""
        return frozenset()

    @property
    def closing_ids(self) -> frozenset[int]:
        """Tokens that close a span where they are sampled, and are no text; banned elsewhere."""
        return frozenset()

    @property
    def feeds_start(self) -> bool:
        """Whether a sampled token that opens a span is fed as a vector (FED_START)."""
        return False

    def placeholder_id(self, kind: PositionKind) -> int:
        """The id at positions of `kind` where nothing is sampled; 0 for kinds that it lacks."""
        return 0

    # ---- parameters

    def new_parameters(
        self, text_config: PretrainedConfig, dtype: torch.dtype, device: torch.device
    ) -> dict[str, nn.Module | nn.Parameter]:
        """What this mechanism adds to a model, freshly initialised, by attribute name.

        They are drawn from torch's global generator.

        Args:
            text_config: of the decoder.
        """
        return {}

    def attach(self, model: PreTrainedModel) -> None:
        """Adds `new_parameters` to a Hugging Face model, in its dtype and on its device.

        They become submodules or parameters, so that optimizers, FSDP, `state_dict` and
        `save_pretrained` see them.
        """
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        text_config = model.config.get_text_config()
        for name, value in self.new_parameters(text_config, weight.dtype, weight.device).items():
            setattr(model, name, value)

    def own_modules(self, model: nn.Module) -> list[nn.Module]:
        """Modules of `attach` that `model` has, which run while decoding."""
        found = [getattr(model, prefix.rstrip("."), None) for prefix in self.parameter_prefixes]
        return [module for module in found if isinstance(module, nn.Module)]

    def check_model(self, model: nn.Module) -> None:
        """Raises `CheckpointError` where `model` lacks what these settings need."""

    # ---- prompt

    def num_slots(self, steps: int | None) -> int:
        """Latent steps that stand at the beginning of a completion.

        Args:
            steps: of the request; None for the checkpoint's.
        """
        return 0

    # ---- decoding and feed

    def begin(
        self, model: nn.Module, steps_N: Tensor, max_spans_N: Tensor | None = None
    ) -> RowStates:
        """The state of N rows behind their prompts (and slots).

        Args:
            model: has what `attach` made; a container of these alone will do.
            steps_N: int64 [N], latent steps a span, or their cap.
            max_spans_N: int64 [N], spans that each row may open (`UNBOUNDED` for no bound); None
                for the checkpoint's.
        """
        return RowStates(steps_N)

    def begin_at_prompt(self, model: nn.Module, steps_N: Tensor) -> RowStates:
        """The state of N rows right behind their prompts, with any slots still to be decoded."""
        return self.begin(model, steps_N)

    def make(self, model: nn.Module, source: HiddenSource) -> Tensor:
        """Makes what is recorded, in the shape of `source.hidden_MH`.

        By itself h; elsewhere a head's output, a soft mixture, an embedding of its own. In
        training with gradient to `source` and to the parameters of `attach`.
        """
        return source.hidden_MH

    def compose(self, model: nn.Module, embeds_MH: Tensor, recorded_MH: Tensor) -> Tensor:
        """The input vectors [M, H] where `recorded_MH` was recorded: by itself those vectors.

        A mechanism whose sampled tokens are MIXED overrides this, with gradient to what it mixes
        by. `embeds_MH` are the token embeddings at the same positions.
        """
        return recorded_MH

    @property
    def composes(self) -> bool:
        """Whether what is fed differs from what was recorded: sampled tokens are then MIXED."""
        return type(self).compose is not Mechanism.compose

    def sources(self, kinds_BT: Tensor, valid_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(rows, columns) of the hidden state that made each vector (`made_mask`), row-major.

        By default the last position before it that is neither padding nor SELECTED, which no
        hidden state makes.

        Args:
            kinds_BT: int64, `PositionKind`.
            valid_BT: bool, None where padding can only follow.
        """
        valid_BT = torch.ones_like(kinds_BT, dtype=torch.bool) if valid_BT is None else valid_BT
        columns_T = torch.arange(kinds_BT.shape[1], device=kinds_BT.device)
        is_source_BT = (kinds_BT != PositionKind.SELECTED) & valid_BT
        last_BT = columns_T.masked_fill(~is_source_BT, -1).cummax(-1).values
        before_BT = nn.functional.pad(last_BT[:, :-1], (1, 0), value=-1)
        is_made_BT = made_mask(kinds_BT) & valid_BT
        return is_made_BT.nonzero(as_tuple=True)[0], before_BT[is_made_BT]

    # ---- ablations

    def requests_without_latents(self) -> dict | None:
        """Fields of a `RolloutRequest` whose completion has no latents; None if none can."""
        return None

    def requests_with_markers_only(self) -> dict | None:
        """Fields of a `RolloutRequest` whose spans are empty; None without delimiters."""
        return None

    # ---- engines and checkpoints

    def refusals(self, engine: str) -> list[Refusal]:
        """What `engine` (`hf` or `vllm`) cannot run of this mechanism; engine `hf` runs all."""
        if engine == "hf":
            return []
        return [
            Refusal("mechanism", self.key(), "lvr", f"engine {engine} does not run this mechanism")
        ]

    @classmethod
    def official_layout(
        cls, config_json: dict, tokenizer: PreTrainedTokenizerBase, where: str
    ) -> Mechanism | None:
        """The mechanism of a published checkpoint without latent_config.json; None if not its own.

        Args:
            config_json: its config.json.
            where: names that file in messages.

        Raises:
            CheckpointError: it is one of this system, and damaged.
        """
        return None

    @classmethod
    def tokens_of(cls, settings: Mapping[str, Any]) -> dict[str, str]:
        """Role -> token of the roles that these settings use, in the order of their addition."""
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        tokens = {}
        for role, published in cls.published_tokens.items():
            # a role that a system has only at times (LVR's end vector) is in use where `settings`
            # name its token
            default = published if defaults[f"{role}_token"] is dataclasses.MISSING else None
            tokens[role] = settings.get(f"{role}_token", default)
        return {role: token for role, token in tokens.items() if token is not None}

    @classmethod
    def from_tokens(cls, ids: Mapping[str, int], **settings: Any) -> Mechanism:
        """The mechanism as published, but for `settings`.

        Args:
            ids: token -> id, of the published tokens or of those that `settings` name.

        Raises:
            ConfigError: an unknown setting, a token without id, or a combination that cannot run.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for role, token in cls.tokens_of(settings).items():
            settings.pop(f"{role}_token", None)
            if token not in ids:
                raise ConfigError(
                    "latent token without an id",
                    where="token_ids",
                    got=token,
                    expected=f"ids of {sorted(cls.published_tokens.values())}, "
                    "or of the tokens that replace them",
                    fix="Add them with models.tokens.add_latent_tokens.",
                )
            values |= {f"{role}_token": token, f"{role}_id": ids[token]}
        known = {name: settings.pop(name) for name in set(settings) & set(fields)}
        mechanism = cls(**values, **known)
        return mechanism.replace(**settings) if settings else mechanism

    @classmethod
    def key(cls) -> str:
        """How `latent_config.json` and configs name this class."""
        # its own, not a parent's: a user's subclass of LVR is no `lvr`
        return vars(cls).get("name") or f"{cls.__module__}:{cls.__qualname__}"

    def to_dict(self) -> dict[str, Any]:
        """What `latent_config.json` holds."""
        return {"version": VERSION, "mechanism": self.key()} | dataclasses.asdict(self)

    def save(self, folder: str | Path) -> Path:
        """Writes `latent_config.json`, whole or not at all; returns its path."""
        path = Path(folder) / LATENT_CONFIG_FILE
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    def replace(self, **changes: Any) -> Mechanism:
        """A copy with other settings.

        What is fixed for this mechanism may be "set" to the value that it has.

        Raises:
            ConfigError: not a setting, or a value or combination that cannot run.
        """
        known = {field.name for field in dataclasses.fields(self)}
        for name in sorted(set(changes) - known):
            value = changes[name]
            is_fixed = name in _FIXABLE and hasattr(self, name)
            if is_fixed and value == getattr(self, name):
                del changes[name]
                continue
            raise ConfigError(
                "fixed for this mechanism" if is_fixed else "unknown field",
                where=f"latent.{name}",
                got=value if is_fixed else f"{name}={value!r}",
                expected=f"{getattr(self, name)!r}, as {self.key()} has it"
                if is_fixed
                else f"a setting of {self.key()}: {sorted(known)}",
            )
        return dataclasses.replace(self, **changes)


_FIXABLE = (
    "steps",
    "max_spans",
    "visibility",
    "start_is_action",
    "end_is_action",
    "top_k_image",
    "positions",
    "exit",
    "head",
)
