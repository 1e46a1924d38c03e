"""What dumped latents look at, by a checkpoint.

Cosines to visual tokens, logit lens, nearest embeddings, replay gap.

N latent steps of one trajectory, M visual tokens of its prompt, V vocabulary, H hidden size. All
values describe the recorded vectors; only the replay gap and `new` log-probs describe the
checkpoint's policy, which may be of another step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.data.boxes import box_to_prompt_tokens
from grpo_latent.data.files import RowKeys, iter_verl_rows
from grpo_latent.data.image_refs import ImageRef
from grpo_latent.data.rows import check_prompt
from grpo_latent.errors import LatentMismatchError
from grpo_latent.eval.dumps import DumpedTrajectory
from grpo_latent.latent.treatments import Treatment
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import LatentModel
from grpo_latent.models.prompts import Prompt, encode_prompt
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import LatentSequences, collate
from grpo_latent.models.sources import source_of_latents
from grpo_latent.trajectory import Trajectory

NUM_TOKENS = 5  # of the logit lens and of the nearest embeddings


@dataclass(frozen=True)
class PromptRow:
    """The data row of a group: its question, images and boxes.

    Boxes are normalised; `box_images` index the images.
    """

    messages: list[dict]
    image_refs: list[ImageRef]
    boxes: list[tuple[float, ...]]
    box_images: list[int]

    def images(self) -> list[Image.Image]:
        return [ref.open() for ref in self.image_refs]

    @property
    def text(self) -> str:
        parts = [part for message in self.messages for part in message["content"]]
        return " ".join(
            part["text"].strip() if part["type"] == "text" else "[image]" for part in parts
        )


@dataclass(frozen=True)
class Probe:
    """One trajectory's latents.

    Attributes:
        cosines: float [N, M].
        lens, nearest: for each step, (token, probability) of the output layer and (token, cosine)
            of input embeddings.
        replay_gaps: for each step, ||recorded - z|| / ||recorded||, z what the treatment feeds
            there greedily, all latents before it as recorded. NaN where nothing can be expected to
            agree: at chosen image embeddings, and where the treatment draws its latents.
        new_log_probs: float [T], of the checkpoint, 0 where nothing acted.
    """

    cosines: Tensor
    lens: list[list[tuple[str, float]]]
    nearest: list[list[tuple[str, float]]]
    replay_gaps: list[float]
    new_log_probs: Tensor


@dataclass(frozen=True)
class GroupProbe:
    """A group's probes, and where their visual tokens lie.

    `grids`: (rows, columns) of visual tokens of each image; `roi`: indices among the M tokens
    that boxes overlap.
    """

    grids: list[tuple[int, int]]
    roi: list[int]
    probes: list[Probe]


def find_rows(
    files: Iterable[Path], indices: Iterable[str], keys: RowKeys | None = None
) -> dict[str, PromptRow]:
    """Rows of verl's files by `extra_info.index`, those wanted only.

    Args:
        keys: names of the columns of prompts and images.

    Raises:
        DataError: a file is missing, cannot be read, or a wanted row is malformed.
    """
    wanted = set(indices)
    rows: dict[str, PromptRow] = {}
    for file in files:
        for row, _ in iter_verl_rows(file, keys, rows_per_batch=256):
            index = str((row.get("extra_info") or {}).get("index"))
            if index in wanted and index not in rows:
                rows[index] = _prompt_row(row, f"{file} row with index {index}")
    return rows


def _prompt_row(row: dict, where: str) -> PromptRow:
    messages, images = check_prompt(row, where)
    extra_info = row.get("extra_info") or {}
    boxes = [tuple(box) for box in extra_info.get("bboxes") or []]
    return PromptRow(
        messages, images, boxes, list(extra_info.get("bbox_images") or [0] * len(boxes))
    )


def draws(treatment: Treatment, hidden_size: int) -> bool:
    """Says whether a rollout's latents have noise in them, so that no replay makes them again."""
    return treatment.num_uniforms(hidden_size) > 0


class Prober:
    """Probes groups with one checkpoint.

    Args:
        temperature: of the rollout, for `new_log_probs`.
        treatment: of the run; None where it is not known, which leaves the replay gaps out.
    """

    def __init__(
        self, loaded: LatentModel, temperature: float = 1.0, treatment: Treatment | None = None
    ):
        self.loaded = loaded
        self.temperature = temperature
        self.treatment = treatment
        self.adapter = ModelAdapter(loaded.model, loaded.mechanism)
        embeddings = self.adapter.backbone.embedding.weight.detach()
        self._directions_VH = normalize(embeddings.float(), dim=-1)

    @torch.no_grad()
    def probe(self, row: PromptRow, group: Sequence[DumpedTrajectory]) -> GroupProbe:
        """Probes a group's trajectories, in its order.

        Raises:
            LatentMismatchError: hidden size, vocabulary or number of image tokens differ from the
                dump's.
        """
        where = f"step {group[0].step}, group {group[0].group_id}"
        trajectories = [dumped.trajectory for dumped in group]
        prompt = encode_prompt(
            self.loaded.tokenizer, self.loaded.processor, row.messages, row.images(), where
        )
        self._check(prompt, trajectories[0], where)
        self._check_vocabulary(trajectories, where)
        visual_MH = torch.zeros(0, self.adapter.hidden_size)
        grids: list[tuple[int, int]] = []
        roi: list[int] = []
        if prompt.images is not None:
            visual_MH = self.adapter.encode_images(prompt.images).float()
            grids, roi = self._layout(prompt.images, row)
        images = [prompt.images] * len(group)
        mechanism = self.loaded.mechanism
        sequences = collate(
            trajectories, images, self.adapter, mechanism.visibility, "both", shares_prompts=True
        )
        log_probs_BT, hidden_BTH = replay(
            self.adapter,
            sequences,
            temperature=self.temperature,
            start_is_action=mechanism.start_is_action,
            end_is_action=mechanism.end_is_action,
        )
        expected_NH = self._expected_latents(sequences, hidden_BTH).float().cpu()
        counts = [len(t.latents) for t in trajectories]
        # padded on both sides, all completions begin in one column
        start = max(len(t.prompt_ids) for t in trajectories)
        probes = []
        for row_idx, (trajectory, expected) in enumerate(
            zip(trajectories, expected_NH.split(counts), strict=True)
        ):
            stop = start + len(trajectory.token_ids)
            log_probs_T = log_probs_BT[row_idx, start:stop].cpu()
            probes.append(
                self._probe_latents(trajectory.latents, visual_MH, expected, log_probs_T)
            )
        return GroupProbe(grids, roi, probes)

    def _expected_latents(self, sequences: LatentSequences, hidden_BTH: Tensor) -> Tensor:
        """Makes what `Probe.replay_gaps` compares with: [N, H], NaN where there is nothing."""
        expected_NH = torch.full_like(sequences.latents_NH, torch.nan)
        if self.treatment is None or draws(self.treatment, self.adapter.hidden_size):
            return expected_NH
        source = source_of_latents(
            self.adapter, sequences, hidden_BTH, self.temperature, self.treatment
        )
        made_MH, _ = self.treatment.draw(source, None, self.adapter.embed)
        expected_NH[sequences.is_made_N] = made_MH.to(expected_NH.dtype)
        return expected_NH

    def _check(self, prompt: Prompt, trajectory: Trajectory, where: str) -> None:
        hidden = trajectory.latents.shape[1]
        if hidden != self.adapter.hidden_size:
            raise LatentMismatchError(
                "latents of another model",
                where=where,
                got=f"hidden size {hidden}",
                expected=f"{self.adapter.hidden_size} of the checkpoint",
                fix="Pass the run's own checkpoint with --checkpoint.",
            )
        image_id = self.adapter.image_token_id
        if image_id is None:
            return
        dumped, encoded = (
            int((ids == image_id).sum()) for ids in (trajectory.prompt_ids, prompt.ids)
        )
        if dumped != encoded:
            raise LatentMismatchError(
                "the data row has another image than the dump",
                where=where,
                got=f"{encoded} image tokens",
                expected=str(dumped),
                fix="Pass the file that the run trained on with --data.",
            )

    def _check_vocabulary(self, trajectories: Sequence[Trajectory], where: str) -> None:
        """Checks the ids that an embedding is read for: all but placeholders at latents."""
        size = len(self._directions_VH)
        ids = torch.cat(
            [ids for t in trajectories for ids in (t.prompt_ids, t.token_ids[~t.latent_mask])]
        )
        if bool(((ids < 0) | (ids >= size)).any()):
            raise LatentMismatchError(
                "token ids of another model",
                where=where,
                got=f"{int(ids.min())} to {int(ids.max())}",
                expected=f"0 to {size - 1}, the checkpoint's vocabulary",
                fix="Pass the run's own checkpoint with --checkpoint.",
            )

    def _layout(
        self, images: ImageInputs, row: PromptRow
    ) -> tuple[list[tuple[int, int]], list[int]]:
        backbone = self.adapter.backbone
        roi: set[int] = set()
        for box, image_idx in zip(row.boxes, row.box_images, strict=True):
            roi |= set(box_to_prompt_tokens(box, image_idx, images, backbone))
        # tiles of an image, where it has several, are shown one below the other
        grids = [
            (tiles * height // backbone.merge_size, width // backbone.merge_size)
            for tiles, height, width in images.image_grid_thw.tolist()
        ]
        return grids, sorted(roi)

    def _probe_latents(
        self, latents_NH: Tensor, visual_MH: Tensor, expected_NH: Tensor, log_probs_T: Tensor
    ) -> Probe:
        device = visual_MH.device
        directions_NH = normalize(latents_NH.to(device), dim=-1)
        cosines_NM = (directions_NH @ normalize(visual_MH, dim=-1).T).cpu()
        lens_NV = (
            self.adapter.logits(latents_NH.to(self.adapter.device, self.adapter.dtype))
            .float()
            .softmax(-1)
        )
        nearest_NV = directions_NH.to(self._directions_VH.device) @ self._directions_VH.T
        gaps = (latents_NH - expected_NH).norm(dim=-1) / latents_NH.norm(dim=-1).clamp(min=1e-12)
        return Probe(
            cosines_NM, self._top(lens_NV), self._top(nearest_NV), gaps.tolist(), log_probs_T
        )

    def _top(self, scores_NV: Tensor) -> list[list[tuple[str, float]]]:
        size = min(NUM_TOKENS, len(self.loaded.tokenizer), scores_NV.shape[1])
        # rows of the matrix beyond the tokenizer are padding
        values_NK, ids_NK = scores_NV[:, : len(self.loaded.tokenizer)].topk(size, dim=-1)
        tokens = [self.loaded.tokenizer.convert_ids_to_tokens(ids) for ids in ids_NK.tolist()]
        return [
            list(zip(row, values, strict=True))
            for row, values in zip(tokens, values_NK.tolist(), strict=True)
        ]
