"""Coconut's and CODI's files on Llama and GPT-2: loaded, decoded as published, replayed."""

import copy
import importlib

import pytest
import torch
from text_file_cases import NUM_POSITIONS, QUESTIONS, write_file

from grpo_latent.backbones.registry import find_backbone
from grpo_latent.common.command import DONE, REFUSED
from grpo_latent.errors import CheckpointError, ConfigError, RolloutError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model
from grpo_latent.models.prompts import encode_prompt
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.models.state_dicts import load_weights_file, merged
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.vllm.skeleton import read_skeleton
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.verl_plugin.boot.layout import check_model

main = importlib.import_module("grpo_latent.import").main
FILES = [(system, family) for system in ("Coconut", "CODI") for family in ("llama", "gpt2")]


@pytest.fixture(params=FILES, ids="-".join, scope="module")
def imported(request, tmp_path_factory):
    """A published file, and the folder that the command writes of it, loaded."""
    folder = tmp_path_factory.mktemp("text")
    published = write_file(folder, *request.param)
    arguments = [str(published.path), "--base", str(published.base), "--dtype", "float32"]
    assert main([*arguments, "--out", str(folder / "out")]) == DONE
    return published, load_latent_model(folder / "out"), folder / "out"


def requests_of(loaded, seeds=(0,)):
    requests = []
    for question in QUESTIONS:
        content = [{"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        prompt = encode_prompt(loaded.tokenizer, None, chat, [], "here")
        requests.append(RolloutRequest(prompt.ids, list(seeds)))
    return requests


def engine_of(loaded):
    return HFRolloutEngine(loaded.model, loaded.mechanism, loaded.eos_ids)


def test_it_says_what_the_authors_code_says(imported):
    """The prompt, the span, the text and its log-probs, against an uncached loop over the file."""
    published, loaded, _ = imported
    num_tokens = 12
    requests = requests_of(loaded)
    groups = engine_of(loaded).generate(requests, SamplingParams(8 + num_tokens, temperature=0.0))
    lengths, texts = set(), set()
    for question, request, (trajectory,) in zip(QUESTIONS, requests, groups, strict=True):
        assert request.prompt_ids.tolist() == published.prompt(question)
        span = [K.START, *[K.LATENT] * 6, K.FORCED]
        assert trajectory.kinds.tolist()[:8] == [int(kind) for kind in span]
        assert trajectory.token_ids[[0, 7]].tolist() == [published.start, published.end]
        said, log_probs = published.decode(question, num_tokens)
        num_said = len(trajectory.token_ids) - 8  # it ends at EOS, which the loop does not
        assert num_said >= 1 and trajectory.token_ids[8:].tolist() == said[:num_said]
        gap_T = trajectory.rollout_log_probs[8:] - torch.tensor(log_probs[:num_said])
        assert float(gap_T.abs().max()) <= 1e-4
        lengths.add(num_said)
        texts.add(tuple(said))
    assert max(lengths) >= 6 and len(texts) >= 2, "questions matter"


@pytest.mark.parametrize("side", ["left", "right"])
def test_rollouts_replay(side, imported):
    """Sampled rows, prompts of different lengths, padded on either side."""
    published, loaded, _ = imported
    requests = requests_of(loaded, range(4))
    groups = engine_of(loaded).generate(requests, SamplingParams(30))
    trajectories = [trajectory for group in groups for trajectory in group]
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    sequences = collate(trajectories, [None] * len(trajectories), adapter, "full", side)
    with torch.no_grad():
        log_probs_BT, hidden_BTH = replay(adapter, sequences, None, 1.0, start_is_action=False)
        rows, columns = loaded.mechanism.sources(sequences.kinds_BT, sequences.valid_BT)
        latents_NH = published.wrapper.project(hidden_BTH[rows, columns])
    assert len(latents_NH) == 6 * len(trajectories)
    assert float((latents_NH - sequences.latents_NH).abs().max()) <= 1e-4
    for row, trajectory in enumerate(trajectories):
        acted_T = trajectory.response_mask(False)
        length = len(trajectory.token_ids)
        start = 0 if side == "left" else len(trajectory.prompt_ids)
        replayed_T = (
            log_probs_BT[row, -length:] if not start else log_probs_BT[row, start:][:length]
        )
        assert acted_T.any() and not acted_T[:8].any()
        assert float((replayed_T - trajectory.rollout_log_probs)[acted_T].abs().max()) <= 1e-4


def test_a_folder_of_it_is_described(imported, capsys):
    published, loaded, folder = imported
    assert main([str(folder)]) == DONE
    said = " ".join(capsys.readouterr().out.split())
    has_head = hasattr(published.wrapper, "prj")
    assert "mechanism ilvr" in said and "forced" in said and "6" in said
    assert ("projection" in said) == has_head
    mechanism = loaded.mechanism
    assert (mechanism.steps, mechanism.max_spans, mechanism.start) == (6, 1, "forced")
    assert mechanism.head == ("projection" if has_head else "none")
    assert not mechanism.start_is_action
    skeleton = read_skeleton(folder)
    assert skeleton.mechanism == mechanism


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    published = write_file(folder, "Coconut", "gpt2")
    return load_weights_file(published.path, published.base, torch.float32)


def test_positions_that_gpt2_has_not_are_refused(gpt2):
    """By engine hf before it decodes, and by a forward over sequences from elsewhere."""
    (request, *_) = requests_of(gpt2)
    room = NUM_POSITIONS - len(request.prompt_ids)
    engine = engine_of(gpt2)
    assert (
        len(engine.generate([request], SamplingParams(room, temperature=0.0))[0][0].kinds) <= room
    )
    message = (
        f"more positions than the model has.*got {NUM_POSITIONS + 1}; expected <= {NUM_POSITIONS}"
    )
    with pytest.raises(RolloutError, match=message):
        engine.generate([request], SamplingParams(room + 1))
    adapter = ModelAdapter(gpt2.model, gpt2.mechanism)
    ids = torch.zeros(1, NUM_POSITIONS + 1, dtype=torch.long)
    positions = torch.arange(NUM_POSITIONS + 1)[None]
    with pytest.raises(RolloutError, match=message):
        adapter.forward_hidden(ids, torch.ones_like(ids), positions)


def test_what_other_engines_cannot_run_of_gpt2(gpt2):
    with pytest.raises(ConfigError, match="num_key_value_heads.*GPT-2"):
        check_model(gpt2.model.config)
    odd = copy.deepcopy(gpt2.model.config)
    odd.scale_attn_by_inverse_layer_idx = True
    find_backbone(odd).check_vllm(gpt2.model.config, "here")
    with pytest.raises(ConfigError, match="here: scale_attn_by_inverse_layer_idx"):
        find_backbone(odd).check_vllm(odd, "here")


def test_adapters_of_layers_that_are_stored_the_other_way_round():
    """r = 2, alpha 8, by hand: W [in, out] + 4 · (B A)ᵀ."""
    state = {
        "codi.base_model.model.transformer.h.0.mlp.c_fc.base_layer.weight": torch.zeros(1, 2),
        "codi.base_model.model.transformer.h.0.mlp.c_fc.lora_A.default.weight": torch.tensor(
            [[1.0], [2.0]]
        ),
        "codi.base_model.model.transformer.h.0.mlp.c_fc.lora_B.default.weight": torch.tensor(
            [[1.0, 0.0], [0.0, 0.25]]
        ),
    }
    found = merged(state, 8.0, {"transformer.h.0.mlp.c_fc"})
    assert found["transformer.h.0.mlp.c_fc.weight"].tolist() == [[4.0, 2.0]]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model.embed_tokens.weight": torch.zeros(1)}, "weights of no system that is known"),
        ({"base_causallm.lm_head.weight": torch.zeros(1)}, "weights do not match"),
        ({"codi.base_model.model.lm_head.weight": torch.zeros(1)}, "weights do not match"),
    ],
)
@pytest.mark.parametrize("imported", FILES[:1], ids="-".join, indirect=True)
def test_files_of_no_system_or_of_another_base(state, message, imported, tmp_path):
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        load_weights_file(tmp_path / "a.pth", imported[0].base, torch.float32)


@pytest.mark.parametrize("imported", FILES[3:], ids="-".join, indirect=True)
def test_a_projection_of_another_shape_is_named(imported, tmp_path, capsys):
    published, _, _ = imported
    state = published.wrapper.state_dict()
    torch.save(state | {"prj.1.weight": torch.zeros(3, 2)}, tmp_path / "a.bin")
    arguments = ["--base", str(published.base), "--out", str(tmp_path / "out")]
    assert main([str(tmp_path / "a.bin"), *arguments]) == REFUSED
    said = " ".join(capsys.readouterr().err.split())
    assert "another projection" in said and "prj.1.weight" in said and "prj_dim" in said
    without = {name: value for name, value in state.items() if not name.startswith("prj.")}
    torch.save(without, tmp_path / "b.bin")
    loaded = load_weights_file(tmp_path / "b.bin", published.base, torch.float32)
    assert loaded.mechanism.head == "none"
