"""The latents of the checkpoint that SFT writes: the `latent` section of each method.

Its keys are the settings of the method's mechanism, declared there and nowhere else, without the
ids, which the tokenizer gives; its defaults are the published ones. Tokens that the tokenizer
lacks are added.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from grpo_latent.latent.mechanisms import ILVR, IVTLR, LVR, Coconut, Mechanism
from grpo_latent.latent.mechanisms.spans import SAMPLED_END


@dataclass(frozen=True)
class LatentSettings:
    """Base of what `latent_settings` makes; the fields are settings of `mechanism`."""

    mechanism: ClassVar[type[Mechanism]]

    @property
    def tokens(self) -> tuple[str, ...]:
        """In the order in which they are added."""
        return tuple(self.token_of(role) for role in self.mechanism.published_tokens)

    def token_of(self, role: str) -> str:
        """The token of a role of the mechanism's."""
        return getattr(self, f"{role}_token")

    @property
    def writes_latent_end(self) -> bool:
        """Whether spans end by a token of their own before `end`, which the model writes."""
        is_sampled = getattr(self, "span_end", None) == SAMPLED_END
        return is_sampled and "latent_end" in self.mechanism.published_tokens

    @property
    def rules(self) -> dict[str, Any]:
        """Settings that SFT may change on a checkpoint that has latents already.

        All but its tokens and its parameters, which are in its weights.
        """
        kept = {f"{role}_token" for role in self.mechanism.published_tokens} | set(
            self.mechanism.structural
        )
        return {name: value for name, value in vars(self).items() if name not in kept}

    def make(self, ids: Mapping[str, int], **more: Any) -> Mechanism:
        """The mechanism of a model that has no latents yet.

        Args:
            ids: of `tokens`.
            more: further settings, such as the token of a role that is not always in use.
        """
        optional = {
            field.name for field in dataclasses.fields(self.mechanism) if field.default is None
        }
        optional &= {f"{role}_token" for role in self.mechanism.published_tokens}
        # a role that is not always in use counts as used once it has a token
        settings = {name: value for name, value in vars(self).items() if name not in optional}
        return self.mechanism.from_tokens(ids, **settings | more)


def latent_settings(mechanism: type[Mechanism]) -> type[LatentSettings]:
    """The type of the `latent` section of methods that train `mechanism`.

    >>> vars(latent_settings(Coconut)(steps=4))["steps"], latent_settings(Coconut)().tokens
    (4, ('<|start-latent|>', '<|latent|>', '<|end-latent|>'))
    """
    published = {f"{role}_token": token for role, token in mechanism.published_tokens.items()}
    ids = {f"{role}_id" for role in mechanism.published_tokens}
    hints = typing.get_type_hints(mechanism)
    fields = [
        (
            field.name,
            str if field.name in published else hints[field.name],
            published.get(field.name, field.default),
        )
        for field in dataclasses.fields(mechanism)
        if field.name not in ids and not field.metadata.get("checkpoint_only")
    ]
    return dataclasses.make_dataclass(
        f"{mechanism.__name__}Latents",
        [(name, hint, dataclasses.field(default=default)) for name, hint, default in fields],
        bases=(LatentSettings,),
        frozen=True,
        namespace={"mechanism": mechanism, "__doc__": mechanism.__doc__, "__module__": __name__},
    )


LVRLatents = latent_settings(LVR)
ILVRLatents = latent_settings(ILVR)
IVTLRLatents = latent_settings(IVTLR)
CoconutLatents = latent_settings(Coconut)
