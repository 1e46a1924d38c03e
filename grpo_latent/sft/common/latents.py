"""The latents of the checkpoint that SFT writes: the `latent` section of each method, with its published defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from grpo_latent.latent.config import LatentConfig
from grpo_latent.latent.mechanisms import ILVR_TOKENS, LVR_LATENT_END_TOKEN, LVR_TOKENS, PUBLISHED, SLOT_TOKENS

_NOT_RULES = ("start_token", "latent_token", "end_token", "latent_end_token", "head")


@dataclass(frozen=True)
class LatentSettings:
    """The latents of the checkpoint that SFT writes, see `LatentConfig`. Tokens that the tokenizer lacks are added."""

    mechanism: ClassVar[str] = "lvr"

    start_token: str = LVR_TOKENS[0]
    latent_token: str = LVR_TOKENS[1]
    end_token: str = LVR_TOKENS[2]
    steps: int = 8
    exit: str = "steps"
    max_spans: int | None = None
    head: str = "none"
    visibility: str = "full"
    start_is_action: bool = True

    @property
    def tokens(self) -> tuple[str, ...]:
        """In the order in which they are added."""
        return self.start_token, self.latent_token, self.end_token

    @property
    def rules(self) -> dict[str, Any]:
        """Fields of `LatentConfig` that SFT may change on a checkpoint that has latents already."""
        return {name: value for name, value in vars(self).items() if name not in _NOT_RULES}

    def make_config(self, ids: dict[str, int], **more) -> LatentConfig:
        """The `LatentConfig` of a model that has no latents yet.

        Args:
            ids: of `tokens`.
            more: further fields of `LatentConfig`.
        """
        roles = {"start": self.start_token, "latent": self.latent_token, "end": self.end_token}
        values = {f"{role}_token": token for role, token in roles.items()}
        values |= {f"{role}_id": ids[token] for role, token in roles.items()}
        rules = PUBLISHED[self.mechanism] | self.rules
        return LatentConfig(**values, mechanism=self.mechanism, head=self.head, **rules | more)


@dataclass(frozen=True)
class LVRLatents(LatentSettings):
    """With the token and the rule of the learned end vector."""

    latent_end_token: str = LVR_LATENT_END_TOKEN
    latent_end_threshold: float = 0.02

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.start_token, self.latent_token, self.latent_end_token, self.end_token


@dataclass(frozen=True)
class ILVRLatents(LatentSettings):
    """Spans repeat between texts and end by a token, or at `steps`."""

    mechanism: ClassVar[str] = "ilvr"

    start_token: str = ILVR_TOKENS[0]
    latent_token: str = ILVR_TOKENS[1]
    end_token: str = ILVR_TOKENS[2]
    exit: str = "end_token"


@dataclass(frozen=True)
class CoconutLatents(LatentSettings):
    """`steps` slots of the prompt in the last stage."""

    mechanism: ClassVar[str] = "coconut"

    start_token: str = SLOT_TOKENS[0]
    latent_token: str = SLOT_TOKENS[1]
    end_token: str = SLOT_TOKENS[2]
    steps: int = 3


@dataclass(frozen=True)
class IVTLRLatents(CoconutLatents):
    """With image embeddings in front of each slot."""

    mechanism: ClassVar[str] = "ivt_lr"

    top_k_image: int = 32
