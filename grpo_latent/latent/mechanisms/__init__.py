"""The mechanism axis: what makes a vector the next input. Each system is a row of settings, not a code path of its own.

    system    trigger        fed at a latent step               exit               positions
    lvr       emitted start  h (through a head, if any)         N steps            text-style     2509.24251
    ilvr      emitted start  h; spans repeat between texts      end token, at K    text-style     2512.05665
    ivt_lr    prompt slots   K image embeddings, then h         n slots            1-D            2510.12603
    coconut   prompt slots   h                                  n slots            1-D            2412.06769

A new mechanism of this family is a new row; what a row can say is `LatentConfig`.
"""

from __future__ import annotations

from grpo_latent.errors import ConfigError
from grpo_latent.latent.config import LatentConfig

# (start, latent, end); the slot mechanisms add Coconut's three tokens and use the middle one, as placeholder
LVR_TOKENS = ("<|lvr_start|>", "<|lvr|>", "<|lvr_end|>")
LVR_LATENT_END_TOKEN = "<|lvr_latent_end|>"  # stands for the learned end vector
LVR_ADDED_TOKENS = (*LVR_TOKENS[:2], LVR_LATENT_END_TOKEN, LVR_TOKENS[2])  # in the order in which LVR adds them
ILVR_TOKENS = ("<|latent_start|>", "<|latent_pad|>", "<|latent_end|>")
SLOT_TOKENS = ("<|start-latent|>", "<|latent|>", "<|end-latent|>")

TOKENS = {"lvr": LVR_TOKENS, "ilvr": ILVR_TOKENS, "ivt_lr": SLOT_TOKENS, "coconut": SLOT_TOKENS}
PUBLISHED = {
    "lvr": dict(steps=8),
    "ilvr": dict(steps=8, exit="end_token"),
    "ivt_lr": dict(trigger="prompt_slots", steps=3, top_k_image=32, positions="1d"),
    "coconut": dict(trigger="prompt_slots", steps=3, positions="1d"),
}


def mechanism_config(mechanism: str, token_ids: dict[str, int], **changes) -> LatentConfig:
    """The published settings of a mechanism.

    Args:
        mechanism: `lvr`, `ilvr`, `ivt_lr` or `coconut`.
        token_ids: of the mechanism's `TOKENS`.
        changes: fields of `LatentConfig` that differ from the published ones.

    Raises:
        ConfigError: unknown mechanism, a token without id, or a combination that cannot run.

    >>> config = mechanism_config("ivt_lr", {token: i for i, token in enumerate(SLOT_TOKENS)}, top_k_image=4)
    >>> config.trigger, config.steps, config.top_k_image, config.latent_id
    ('prompt_slots', 3, 4, 1)
    """
    if mechanism not in PUBLISHED:
        raise ConfigError(
            "unknown mechanism", where="latent.mechanism", got=mechanism, expected=f"one of {tuple(PUBLISHED)}"
        )
    tokens = TOKENS[mechanism]
    missing = [token for token in tokens if token not in token_ids]
    if missing:
        raise ConfigError(
            "latent tokens without an id",
            where="token_ids",
            got=missing,
            expected=f"ids of {tokens}",
            fix="Add them with models.tokens.add_latent_tokens.",
        )
    roles = dict(zip(("start", "latent", "end"), tokens, strict=True))
    values = {f"{role}_token": token for role, token in roles.items()}
    values |= {f"{role}_id": token_ids[token] for role, token in roles.items()}
    return LatentConfig(**values, mechanism=mechanism).replace(**PUBLISHED[mechanism] | changes)
