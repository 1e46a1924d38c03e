"""Published layouts in vLLM: the folder as it is, class name of the authors' own included."""

import json

import pytest
import torch
from latent_cases import Case
from published_cases import LAYOUTS, write
from vllm_cases import MAX_MODEL_LEN, VllmCase, compare, sampling

from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.vllm.engine import VllmRolloutEngine
from grpo_latent.trajectory import PositionKind

pytestmark = pytest.mark.vllm
# what only some have
KINDS = {
    "LVR": PositionKind.END,
    "Monet": PositionKind.FED_START,
    "Laser": PositionKind.START,
}
SCALES = {"embed_tokens": 40.0, "lm_head": 8.0}


def write_for_vllm(folder, system):
    """Spans are frequent; LVR's logits are tied to the embeddings, as transformers 4.5x saves it."""
    tokens, keys = LAYOUTS[system][2:4]
    start = next(token for token, key in zip(tokens, keys, strict=True) if "start" in key)
    end = tokens[-1]

    @torch.no_grad()
    def change(model, vocab):
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(next((s for part, s in SCALES.items() if part in name), 6.0))
        model.lm_head.weight[vocab[start]] *= 1.6
        model.lm_head.weight[vocab[end]] *= 1.3
        if system == "LVR":
            model.config.tie_word_embeddings = True
            model.tie_weights()
            model.lm_head.weight.data.div_(5.0)

    # heads that vLLM's CPU kernels take
    write(folder, system, change=change, sizes=tiny.TinySizes(hidden=64), seed=1)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    if values.pop("tie_word_embeddings", False):
        values["text_config"]["tie_word_embeddings"] = True
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("system", list(LAYOUTS))
def test_both_engines_decode_a_published_folder_alike(system, tmp_path):
    write_for_vllm(tmp_path, system)
    loaded = load_latent_model(tmp_path)
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    case = Case(system, loaded.model, loaded.tokenizer, loaded.processor, adapter)
    requests = VllmCase(case, loaded.mechanism, tmp_path).requests(16)
    own = VllmRolloutEngine(
        tmp_path, max_model_len=MAX_MODEL_LEN, max_num_seqs=16, enforce_eager=True, max_latents=128
    )
    try:
        ours = own.generate(requests, sampling())
        reference = HFRolloutEngine(loaded.model, loaded.mechanism, loaded.eos_ids)
        result = compare(ours, reference.generate(requests, sampling()))
        assert result.different == []
        assert result.latent_gap <= 1e-4 and result.log_prob_gap <= 1e-4, result
        kinds = torch.cat([t.kinds for group in ours for t in group])
        kind = KINDS.get(system, PositionKind.FORCED)
        assert bool((kinds == kind).any()) and result.num_latents > 8
    finally:
        own.close()
