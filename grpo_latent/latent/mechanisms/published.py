"""What the field's checkpoints say about their latents, as one table of aliases.

A published folder is a Hugging Face folder whose config.json has fields of its system's own: ids
of tokens, a length, a head. A `Layout` names them, and what they are here; `official_layout` of a
mechanism does the same where a table does not reach (LVR's head and end vector). Folders of a
system that works otherwise, or that only looks like one of these, are refused by name.

    system    start, latent, end are in config.json as          a span's length, and its end
    LVR       lvr_start_id, lvr_id, lvr_end_id                   8; both closing tokens are sampled
    ILVR      latent_start_id, latent_token_id, latent_end_id    latent_size, or the end token
    Mirage    the same                                           the same
    Monet     the same, tokens <abs_vis_token>…, no latent_size  10, or the end token
    SkiLa     sketch_start_id, skila_id, sketch_end_id           twice sketch_token_num, or …
    HyLaR     canvas_start_id, canvas_id, canvas_end_id          canvas_token_num, or …
    SwimBird  latent_start_id, latent_id, latent_end_id          twice max_latent_token, or …
    Laser     laser_start_id, laser_id, laser_end_id             16, or …; `start` comes unasked

The sources of each are in docs/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_latent.errors import CheckpointError, ConfigError
from grpo_latent.latent.mechanisms.ilvr import ILVR
from grpo_latent.latent.mechanisms.protocol import Mechanism
from grpo_latent.latent.mechanisms.spans import AT_START, FORCED_START

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# modules that only SFT's targets came from; some folders still hold their weights
TARGET_MODULES = ("sketch_extractor.", "canvas_extractor.")


@dataclass(frozen=True)
class Layout:
    """One system's folder.

    Attributes:
        keys: role -> field of config.json that has the id.
        tokens: role -> the token itself, as published.
        steps: field of config.json with a span's length, or the length.
        cap: times `steps`: where spans end by a token, the published decoding waits that long.
        settings: further ones of the mechanism.
        lacks: a field that another system's folder has beside these.
    """

    system: str
    keys: Mapping[str, str]
    tokens: Mapping[str, str]
    steps: str | int
    cap: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    lacks: str | None = None

    def fits(self, fields: Mapping[str, Any], vocab: Mapping[str, int]) -> bool:
        """Whether a folder is this system's: its fields, and its opening token."""
        has_keys = all(key in fields for key in self.keys.values())
        return has_keys and self.lacks not in fields and self.tokens["start"] in vocab

    def read(self, fields: Mapping[str, Any], vocab: Mapping[str, int], where: str) -> Mechanism:
        """The mechanism. Raises `CheckpointError` where the folder disagrees with itself."""
        for role, key in self.keys.items():
            token = self.tokens[role]
            if vocab.get(token) != fields[key]:
                raise CheckpointError(
                    f"not a {self.system} checkpoint: the tokenizer has another id",
                    where=f"{where}: {key}",
                    got=f"{fields[key]}, and {token!r} -> {vocab.get(token)}",
                    expected="the tokenizer of the same checkpoint",
                )
        steps = fields.get(self.steps) if isinstance(self.steps, str) else self.steps
        try:
            # a bool is an int to Python, and True times two a length
            return ILVR.from_tokens(
                vocab,
                steps=steps * self.cap if type(steps) is int else steps,
                **{f"{role}_token": token for role, token in self.tokens.items()},
                **self.settings,
            )
        except ConfigError as error:
            raise CheckpointError(
                f"not a {self.system} checkpoint: {error.what}",
                where=f"{where}: {self.steps}",
                got=error.got,
                expected=error.expected,
            ) from error


def _keys(start: str, latent: str, end: str) -> dict[str, str]:
    return {"start": start, "latent": latent, "end": end}


LAYOUTS = (
    Layout(
        "Monet",
        _keys("latent_start_id", "latent_token_id", "latent_end_id"),
        _keys("<abs_vis_token>", "<abs_vis_token_pad>", "</abs_vis_token>"),
        steps=10,
        settings={"first_latent": AT_START},
        lacks="latent_size",
    ),
    Layout(
        "SkiLa",
        _keys("sketch_start_id", "skila_id", "sketch_end_id"),
        _keys("<|sketch_start|>", "<|skila|>", "<|sketch_end|>"),
        steps="sketch_token_num",
        cap=2,
    ),
    Layout(
        "HyLaR",
        _keys("canvas_start_id", "canvas_id", "canvas_end_id"),
        _keys("<|canvas_start|>", "<|canvas|>", "<|canvas_end|>"),
        steps="canvas_token_num",
    ),
    Layout(
        "SwimBird",
        _keys("latent_start_id", "latent_id", "latent_end_id"),
        _keys("<|latent_start|>", "<|latent|>", "<|latent_end|>"),
        steps="max_latent_token",
        cap=2,
    ),
    Layout(
        "Laser",
        _keys("laser_start_id", "laser_id", "laser_end_id"),
        _keys("<|laser_start|>", "<|laser|>", "<|laser_end|>"),
        steps=16,
        settings={"start": FORCED_START, "start_is_action": False},
    ),
)


@dataclass(frozen=True)
class LookAlike:
    """A folder that is refused by name.

    Attributes:
        is_it: asked of a folder, its config.json ({} without one) and its vocabulary.
        is_text: its latents are tokens with embeddings of their own.
    """

    system: str
    is_it: Callable[[Path, Mapping[str, Any], Mapping[str, int]], bool]
    why: str
    fix: str = ""
    is_text: bool = False

    def error(self, folder: Path) -> CheckpointError:
        """What is raised."""
        return CheckpointError(
            f"a checkpoint of {self.system}, which is not one of ours to load",
            where=str(folder),
            got=self.why,
            expected="a layout of docs/checkpoints.md",
            fix=self.fix,
        )


def _has_field(*names: str) -> Callable[[Path, Mapping[str, Any], Mapping[str, int]], bool]:
    return lambda folder, fields, vocab: any(name in fields for name in names)


def _has_token(*tokens: str) -> Callable[[Path, Mapping[str, Any], Mapping[str, int]], bool]:
    return lambda folder, fields, vocab: any(token in vocab for token in tokens)


def _has_file(*names: str) -> Callable[[Path, Mapping[str, Any], Mapping[str, int]], bool]:
    return lambda folder, fields, vocab: all((folder / name).exists() for name in names)


_AS_TEXT = (
    "Nothing is fed back: evaluate it as a plain model (model.plain=true), or write it as a policy "
    "of text by python -m grpo_latent.import FOLDER --as-text --out NEW_FOLDER, with its slots as "
    "--prefill if a prefill of the answer holds them."
)

LOOK_ALIKES = (
    LookAlike(
        "the LVR pipeline (a bundle)",
        _has_file("lvr_config.json"),
        "lvr_config.json beside the model: Qwen3-VL with a latent action model of its own",
    ),
    LookAlike(
        "S-LVR",
        _has_field("slvr_id", "slvr_start_id"),
        "spans of two kinds, one of them over text, with tokens of their own",
    ),
    LookAlike(
        "Mull-Tokens",
        _has_field("imagelatent_token_id"),
        "slots that an assistant prefill holds, with the placeholder's own embedding",
        _AS_TEXT,
        is_text=True,
    ),
    LookAlike(
        "CoVT",
        _has_token("<|anchor_start|>", "<|sam_pad|>"),
        "anchors that are ordinary tokens, whose hidden states frozen experts decode",
        _AS_TEXT,
        is_text=True,
    ),
    LookAlike(
        "LaViT",
        _has_field("v_top_dim", "use_trajectory_supervision"),
        "slots with own embeddings at the end of the prompt, which its own template writes",
        _AS_TEXT,
        is_text=True,
    ),
    LookAlike(
        "VisMem",
        _has_token("<ms_I>", "<ml_I>"),
        "a module that makes several vectors of the whole context at once",
    ),
    LookAlike(
        "a SwimBird with a projection head",
        lambda folder, fields, vocab: bool(fields.get("use_projection_head")),
        "a head of its own between hidden states and latents",
    ),
    LookAlike(
        "an adapter alone",
        lambda folder, fields, vocab: (folder / "adapter_config.json").is_file() and not fields,
        "adapter_config.json without the model that it adapts",
        "Merge it into its base model with peft's merge_and_unload, and save that.",
    ),
)


def find_look_alike(
    folder: Path, fields: Mapping[str, Any], vocab: Mapping[str, int]
) -> LookAlike | None:
    """The system that is not ours to load, or None.

    Args:
        fields: of config.json, {} without one.
        vocab: token -> id, {} where nobody has read it.
    """
    return next((each for each in LOOK_ALIKES if each.is_it(folder, fields, vocab)), None)


def refuse_look_alikes(folder: Path, fields: Mapping[str, Any], vocab: Mapping[str, int]) -> None:
    """Raises `CheckpointError` for a folder of such a system; arguments as `find_look_alike`."""
    look_alike = find_look_alike(folder, fields, vocab)
    if look_alike is not None:
        raise look_alike.error(folder)


def published_mechanism(
    fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str
) -> Mechanism | None:
    """The mechanism of a published folder; None of one that no layout fits.

    Args:
        fields: of config.json.
        where: names that file in messages.

    Raises:
        CheckpointError: the folder disagrees with itself, or could be two systems'.
    """
    vocab = tokenizer.get_vocab()
    found = [layout for layout in LAYOUTS if layout.fits(fields, vocab)]
    if len(found) > 1:
        raise CheckpointError(
            "a checkpoint of two systems",
            where=where,
            got=[layout.system for layout in found],
            expected="the fields of one",
            fix="Take the fields of the other one out of a copy of config.json.",
        )
    return found[0].read(fields, vocab, where) if found else None


def has_latent_fields(fields: Mapping[str, Any]) -> bool:
    """Whether config.json has the fields of a published system."""
    own = {"lvr_start_id", "latent_size"}
    return not own.isdisjoint(fields) or any(
        all(key in fields for key in layout.keys.values()) for layout in LAYOUTS
    )
