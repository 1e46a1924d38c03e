"""What ILVR's momentum teacher does for a batch: one forward, then the targets of every span.

    examples, latents as placeholders ──teacher, one forward──▶ h [B, T, H], last layer's q and k
    helper images ──teacher's vision──▶ candidates of each span
    span by span: query ──select──▶ targets [K*, H]      (pure functions of `distillation.py`)

The header that opens the assistant's turn asks nothing and answers nothing: it is neither part of
the question nor of the first span's text. The published code differs in four places, of which a
checkpoint of its own carries the effect: it counts the header as the first span's text, pools
without the last P mod 256 tokens, weighs image positions by final hidden states without rotary
positions, and takes the choice of the last span only for "previously selected".

A later span's query looks at the targets of earlier ones, but needs no forward of its own: the
published recipe's choice depends on earlier targets through their mean only.

Legend: B rows, T positions, S keys of a forward, M visual tokens or candidates, N and K* targets,
A attention heads, D head dim, H hidden states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_latent.errors import LatentMismatchError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.attention_rows import RecordedAttention, recording_last_row
from grpo_latent.models.sequences import LatentSequences
from grpo_latent.sft.common.images import batch_images, visual_embeddings
from grpo_latent.sft.ilvr.distillation import (
    pool_candidates,
    question_vector,
    question_weights,
    select_candidates,
    span_query,
)
from grpo_latent.sft.ilvr.rows import helper_images, span_numbers
from grpo_latent.trajectory import PositionKind, recorded_mask


@torch.no_grad()
def teacher_targets(
    teacher: ModelAdapter,
    batch: dict[str, Tensor],
    visibility: str,
    top_k: int = 8,
    top_p: float = 0.9,
    reads_always: bool = False,
) -> list[Tensor]:
    """Chooses the targets [K*, H] of each span of a batch, in row-major order, best first.

    Args:
        teacher: adapter of the teacher's model.
        batch: of `collate_rows`.
        reads_always: runs the forward of a batch without spans, too: other ranks' may have some,
            whose teacher's shards meet in it.

    Raises:
        LatentMismatchError: helper images and spans differ in number.
    """
    candidates = helper_candidates(teacher, batch)
    numbers_BT = span_numbers(batch["kinds"])
    num_spans = int(numbers_BT.max()) + 1
    if len(candidates) != num_spans:
        raise LatentMismatchError(
            "helper images do not match the spans",
            where="teacher_targets",
            got=len(candidates),
            expected=str(num_spans),
        )
    if num_spans == 0 and not reads_always:
        return []
    images = batch_images(batch)
    input_ids_BT, kinds_BT, valid_BT = batch["input_ids"], batch["kinds"], batch["valid"]
    # the teacher reads placeholders as the words that they are: their embeddings are the latents
    placeholders_NH = teacher.embed(input_ids_BT[recorded_mask(kinds_BT) & valid_BT])
    sequences = LatentSequences.build(
        teacher, input_ids_BT, kinds_BT, valid_BT, placeholders_NH, visibility, images
    )
    # a bias in `full`, too: the recorder reads the last row of an explicit mask
    bias = sequences.attention_bias(teacher.dtype)
    with recording_last_row(teacher.text_config, keep_last_layer=True) as recorder:
        hidden_BTH = teacher.forward_hidden(input_ids_BT, bias, sequences.position_ids, images)
    targets: list[Tensor] = []
    for row in range(numbers_BT.shape[0]):
        targets += _targets_of_row(
            teacher,
            batch,
            row,
            numbers_BT[row],
            hidden_BTH[row],
            recorder,
            candidates,
            top_k,
            top_p,
        )
    return targets


def helper_candidates(teacher: ModelAdapter, batch: dict[str, Tensor]) -> list[Tensor]:
    """Makes the candidates [M, H] of each helper image: its embeddings, pooled to at most 256."""
    images = helper_images(batch)
    if images is None:
        return []
    counts = teacher.num_image_tokens(images).tolist()
    return [pool_candidates(tokens) for tokens in visual_embeddings(teacher, images).split(counts)]


def _targets_of_row(
    teacher: ModelAdapter,
    batch: dict[str, Tensor],
    row: int,
    numbers_T: Tensor,
    hidden_TH: Tensor,
    recorder: RecordedAttention,
    candidates: list[Tensor],
    top_k: int,
    top_p: float,
) -> list[Tensor]:
    """Chooses the targets of the spans of one row, in order."""
    kinds_T, valid_T = batch["kinds"][row], batch["valid"][row]
    is_question_T = (kinds_T == PositionKind.PROMPT) & valid_T
    header_length = int(batch["header_lengths"][row])
    if header_length:
        prompt_columns = ((kinds_T <= PositionKind.VISION) & valid_T).nonzero()[:, 0]
        is_question_T[prompt_columns[-header_length:]] = False
    image_token_id = teacher.image_token_id
    assert image_token_id is not None, "loading for this method refuses a text-only model"
    is_image_T = (
        (batch["input_ids"][row] == image_token_id) & (kinds_T == PositionKind.VISION) & valid_T
    )
    weights_M = None
    if bool(is_image_T.any()):
        queries_BATD, keys_BASD = recorder.queries_BATD, recorder.keys_BASD
        assert queries_BATD is not None and keys_BASD is not None, "recorded with keep_last_layer"
        weights_M = question_weights(
            queries_BATD[row][:, is_question_T],
            keys_BASD[row][:, is_image_T],
            recorder.scaling,
        )
    question_H = question_vector(hidden_TH[is_question_T], hidden_TH[is_image_T], weights_M)
    targets: list[Tensor] = []
    end_of_last = 0
    for number in numbers_T[numbers_T >= 0].unique().tolist():
        columns = (numbers_T == number).nonzero()[:, 0]
        start = int(columns[0])
        is_text_T = kinds_T == PositionKind.TEXT
        is_text_T[:end_of_last] = False
        is_text_T[start:] = False
        # of this row only: a query knows what its own response has shown so far
        # of all earlier spans, as the paper has it; the published code keeps the last span's alone
        earlier_NH = torch.cat(targets) if targets else hidden_TH[:0]
        query_H = span_query(question_H, hidden_TH[is_text_T], earlier_NH)
        chosen = select_candidates(query_H, candidates[number], min(top_k, len(columns)), top_p)
        targets.append(candidates[number][chosen])
        end_of_last = int(columns[-1]) + 1
    return targets
