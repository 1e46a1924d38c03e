"""The same mathematics read slowly: one trajectory at a time, masks by double loop.

No batch, no padding, no hook.

Nothing here uses the package's injection, visibility, cache, position or sampling code; only plain
Hugging Face forwards on hand-built `inputs_embeds`.
"""

from __future__ import annotations

import math

import torch
from latent_cases import Case
from torch import Tensor
from transformers.cache_utils import DynamicCache

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.rollout.sampling import uniforms
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.trajectory import Trajectory

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def kinds_of_prompt(case: Case, prompt_ids: Tensor) -> list[int]:
    vision = {case.token_id(token) for token in VISION_TOKENS} if case.processor else set()
    return [
        int(K.VISION) if token_id in vision else int(K.PROMPT) for token_id in prompt_ids.tolist()
    ]


def positions(case: Case, prompt_ids: Tensor, images: ImageInputs | None, num_more: int) -> Tensor:
    """Positions [3, 1, T]: text counts up by one.

    An image of t x h x w merged tokens spans max(h, w) positions.
    """
    columns, now = [], 0
    ids, idx, grids = (
        prompt_ids.tolist(),
        0,
        [] if images is None else images.image_grid_thw.tolist(),
    )
    while idx < len(ids):
        if case.processor and ids[idx] == case.token_id("<|image_pad|>"):
            _, height, width = grids.pop(0)
            height, width = height // 2, width // 2
            columns += [
                (now, now + row, now + column) for row in range(height) for column in range(width)
            ]
            idx, now = idx + height * width, now + max(height, width)
        else:
            columns.append((now, now, now))
            idx, now = idx + 1, now + 1
    columns += [(now + more,) * 3 for more in range(num_more)]
    return torch.tensor(columns).T[:, None]


def may_see(kinds: list[int], row: int, column: int, visibility: str) -> bool:
    """The rules of `latents_only` and of `blind_after_span` in words, for one pair."""
    if column > row:
        return False
    if visibility == "full" or column == row:
        return True
    if visibility == "blind_after_span":
        text_after_it = K.FORCED in kinds[: row + 1] and kinds[row] in (K.TEXT, K.FORCED)
        return kinds[column] != K.VISION or not text_after_it
    image_side = kinds[column] in (K.VISION, K.START)
    another_latent_follows = (
        kinds[row] == K.LATENT and row + 1 < len(kinds) and kinds[row + 1] == K.LATENT
    )
    return not image_side or kinds[row] in (K.VISION, K.START) or another_latent_follows


def mask(kinds: list[int], visibility: str, rows: range | None = None) -> Tensor:
    rows = range(len(kinds)) if rows is None else rows
    table = [
        [may_see(kinds, row, column, visibility) for column in range(rows[-1] + 1)] for row in rows
    ]
    return torch.where(torch.tensor(table), 0.0, torch.finfo(torch.float32).min)[None, None]


def forward(
    case: Case, trajectory: Trajectory, images: ImageInputs | None, visibility: str
) -> tuple[Tensor, Tensor]:
    """Logits [T, V] and last hidden states [T, H] of prompt and completion, from `inputs_embeds`.

    No cache.
    """
    ids = torch.cat([trajectory.prompt_ids, trajectory.token_ids])
    kinds = kinds_of_prompt(case, trajectory.prompt_ids) + trajectory.kinds.tolist()
    table = case.model.get_input_embeddings().weight
    latents = list(trajectory.latents)
    embeds = torch.stack(
        [
            latents.pop(0) if kind == K.LATENT else table[i]
            for i, kind in zip(ids, kinds, strict=True)
        ]
    )
    inputs = dict(inputs_embeds=embeds[None], use_cache=False)
    if visibility != "full":
        inputs["attention_mask"] = mask(kinds, visibility)
    position_ids = positions(case, trajectory.prompt_ids, images, len(trajectory.token_ids))
    inputs["position_ids"] = position_ids if case.processor else position_ids[0]
    if images is not None:
        inputs |= dict(pixel_values=images.pixel_values, image_grid_thw=images.image_grid_thw)
    output = case.model(**inputs, output_hidden_states=True)
    return output.logits[0], output.hidden_states[-1][0]


def log_probs(
    case: Case,
    trajectory: Trajectory,
    images: ImageInputs | None,
    visibility: str,
    temperature: float = 1.0,
) -> list[float]:
    """Of each sampled token of the completion; 0 where nothing was sampled."""
    with torch.no_grad():
        logits, _ = forward(case, trajectory, images, visibility)
    values, prompt_length = [], len(trajectory.prompt_ids)
    for idx, (token_id, kind) in enumerate(
        zip(trajectory.token_ids.tolist(), trajectory.kinds.tolist(), strict=True)
    ):
        row = (logits[prompt_length + idx - 1].double() / temperature).tolist()
        largest = max(row)
        log_sum = largest + math.log(sum(math.exp(value - largest) for value in row))
        values.append(row[token_id] - log_sum if kind in (K.TEXT, K.START) else 0.0)
    return values


def draw(
    logits: list[float], u: float, temperature: float, top_k: int, top_p: float, allowed: set[int]
) -> int:
    """Inverse-CDF draw over the sorted-by-id allowed tokens, after brute-force top-k and top-p."""
    if temperature == 0:
        return max(sorted(allowed), key=lambda i: logits[i])
    weights = {i: math.exp(logits[i] / temperature) for i in allowed}
    by_weight = sorted(weights, key=lambda i: (-weights[i], i))
    if top_k > 0:
        by_weight = by_weight[:top_k]
    total, nucleus, mass = sum(weights[i] for i in by_weight), [], 0.0
    for i in by_weight:
        if mass >= top_p:
            break
        nucleus.append(i)
        mass += weights[i] / total
    total, mass = sum(weights[i] for i in nucleus), 0.0
    for i in sorted(nucleus):
        mass += weights[i] / total
        if u < mass:
            return i
    return sorted(nucleus)[-1]


@torch.no_grad()
def rollout(case: Case, config, request, seed: int, sampling, sampled_ids) -> dict:
    """One trajectory by a plain loop over a `DynamicCache`, fixed-length spans.

    The machinery an engine must match.
    """
    model, table = case.model, case.model.get_input_embeddings().weight
    text_config = model.config.get_text_config()
    decoder = model.model.language_model if case.processor else model.model
    kinds, cache = kinds_of_prompt(case, request.prompt_ids), DynamicCache(config=text_config)
    all_positions = positions(case, request.prompt_ids, request.images, sampling.max_new_tokens)
    prompt_length, vision = len(kinds), {}
    if request.images is not None:
        vision = dict(
            pixel_values=request.images.pixel_values, image_grid_thw=request.images.image_grid_thw
        )

    def position_ids(start, end):
        return all_positions[..., start:end] if case.processor else all_positions[0, :, start:end]

    hidden = model.model(
        input_ids=request.prompt_ids[None],
        attention_mask=mask(kinds, config.visibility),
        position_ids=position_ids(0, prompt_length),
        past_key_values=cache,
        use_cache=True,
        **vision,
    ).last_hidden_state[0, -1]
    tokens, completion, latents, steps_left, spans = [], [], [], None, 0
    num_steps = request.steps or config.steps
    for idx in range(sampling.max_new_tokens):
        if steps_left is None:
            allowed = set(sampled_ids)
            if config.max_spans is not None and spans >= config.max_spans:
                allowed -= {config.start_id}
            u = float(uniforms(torch.tensor([seed]).numpy(), idx)[0])
            logits = model.lm_head(hidden).tolist()
            token = draw(logits, u, sampling.temperature, sampling.top_k, sampling.top_p, allowed)
            kind, vector = K.TEXT, table[token]
            if token == config.start_id:
                kind, steps_left, spans = K.START, num_steps, spans + 1
        elif steps_left > 0:
            kind, token, vector = K.LATENT, config.latent_id, hidden
            latents.append(hidden)
            steps_left -= 1
        else:
            kind, token, vector, steps_left = K.FORCED, config.end_id, table[config.end_id], None
        tokens.append(token)
        completion.append(int(kind))
        if kind == K.TEXT and token == case.eos_id:
            break
        column = prompt_length + idx
        # a latent is "inner" if the loop will feed another one after it
        lookahead = [int(K.LATENT)] if kind == K.LATENT and steps_left else []
        known = kinds + completion + lookahead
        hidden = decoder(
            inputs_embeds=vector[None, None],
            attention_mask=mask(known, config.visibility, range(column, column + 1)),
            position_ids=position_ids(column, column + 1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[0, 0]
    return dict(token_ids=tokens, kinds=completion, latents=latents)
