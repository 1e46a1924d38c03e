"""Coconut's and CODI's files in vLLM, through the folder that the import writes."""

import importlib

import pytest
import torch
from text_file_cases import QUESTIONS, write_file
from vllm_cases import compare, sampling

from grpo_latent.common.command import DONE
from grpo_latent.models.loading import load_latent_model
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import RolloutRequest
from grpo_latent.rollout.vllm.engine import VllmRolloutEngine

pytestmark = pytest.mark.vllm
main = importlib.import_module("grpo_latent.import").main
NUM_TOKENS = 12
# GPT-2 has Conv1D layers, tied logits and learned positions; CODI a head, and adapters
FILES = (("CODI", "gpt2"), ("CODI", "llama"), ("Coconut", "gpt2"))


@pytest.mark.parametrize(("system", "family"), FILES)
def test_vllm_says_what_the_authors_code_says(system, family, tmp_path):
    """As engine hf, and as an uncached loop over the file; again after all weights came anew."""
    published = write_file(tmp_path, system, family, hidden=64)
    out = tmp_path / "out"
    arguments = [str(published.path), "--base", str(published.base), "--dtype", "float32"]
    assert main([*arguments, "--out", str(out)]) == DONE
    loaded = load_latent_model(out)
    requests = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        prompt = encode_prompt(loaded.tokenizer, None, chat, [], "here")
        requests.append(RolloutRequest(prompt.ids, [0]))
    reference = HFRolloutEngine(loaded.model, loaded.mechanism, loaded.eos_ids)
    wanted = reference.generate(requests, sampling(8 + NUM_TOKENS))
    engine = VllmRolloutEngine(out, max_model_len=96, max_num_seqs=4, enforce_eager=True)
    try:
        for version in (0, 1):
            ours = engine.generate(requests, sampling(8 + NUM_TOKENS))
            for group in ours:
                assert group[0].policy_version == version
            reference.policy_version = version
            wanted = reference.generate(requests, sampling(8 + NUM_TOKENS))
            result = compare(ours, wanted)
            assert result.different == []
            assert result.latent_gap <= 1e-4 and result.log_prob_gap <= 1e-4, result
            assert result.num_latents == 6 * len(QUESTIONS)
            if version == 0:
                engine.load_weights(loaded.model.state_dict().items(), 1)
        for question, (trajectory,) in zip(QUESTIONS, ours, strict=True):
            said, log_probs = published.decode(question, NUM_TOKENS)
            num_said = len(trajectory.token_ids) - 8
            assert num_said >= 1 and trajectory.token_ids[8:].tolist() == said[:num_said]
            gap_T = trajectory.rollout_log_probs[8:] - torch.tensor(log_probs[:num_said])
            assert float(gap_T.abs().max()) <= 1e-4
    finally:
        engine.close()
