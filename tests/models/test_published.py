"""Published layouts as tiny folders: fields of config.json, names of tokens, class names.

Each is loaded, decoded, and replayed.
"""

import functools
import hashlib

import pytest
import slow_reading
import torch
from latent_cases import Case
from published_cases import LAYOUTS, write
from safetensors.torch import load_file, save_file

from grpo_latent.errors import CheckpointError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import SamplingParams
from grpo_latent.rollout.vllm.skeleton import read_skeleton
from grpo_latent.testing.cases import sharpen
from grpo_latent.trajectory import PositionKind as K

T, S, Z, F, E, P = (
    int(kind) for kind in (K.TEXT, K.START, K.LATENT, K.FORCED, K.END, K.FED_START)
)


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@functools.cache
def loaded_of(folder):
    """The folder, loaded, its weights scaled so that it reacts to its inputs."""
    loaded = load_latent_model(folder)
    sharpen(loaded.model, loaded.mechanism.opening_ids, loaded.tokenizer.eos_token_id, eos_bias=-1)
    return loaded


@pytest.fixture(params=list(LAYOUTS), scope="module")
def published(request, tmp_path_factory):
    return request.param, write(tmp_path_factory.mktemp("published"), request.param)


def test_layout_loads_and_is_left_alone(published):
    system, folder = published
    before = digests(folder)
    loaded = load_latent_model(folder)
    assert digests(folder) == before
    for name, value in LAYOUTS[system][-1].items():
        assert getattr(loaded.mechanism, name) == value, name
    assert set(loaded.mechanism.token_ids) == set(LAYOUTS[system][2])
    assert loaded.mechanism.visibility == "full" and loaded.mechanism.head == "none"


def test_vllm_reads_the_same(published):
    """The mechanism, and the name of a class that vLLM has."""
    system, folder = published
    skeleton = read_skeleton(folder)
    assert skeleton.mechanism == load_latent_model(folder).mechanism
    stock = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}
    names = skeleton.adapter.model.config.architectures
    assert names == [stock.get(LAYOUTS[system][0], "Qwen3VLForConditionalGeneration")]
    assert not set(skeleton.banned_ids()) & skeleton.mechanism.closing_ids


def test_layout_decodes_and_replays(published):
    """Sampled rows in different modes at once: the same log-probs and latents in one forward."""
    system, folder = published
    loaded = loaded_of(folder)
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    c = Case(system, loaded.model, loaded.tokenizer, loaded.processor, adapter)
    requests = [
        c.request("read red ?", c.images(1), range(6)),
        c.request("? blue", seeds=range(6, 12)),
    ]
    engine = HFRolloutEngine(loaded.model, loaded.mechanism, loaded.eos_ids)
    groups = engine.generate(requests, SamplingParams(max_new_tokens=28))
    rows = [(t, request) for request, group in zip(requests, groups, strict=True) for t in group]
    assert sum(len(t.spans) for t, _ in rows) >= 6
    trajectories = [t for t, _ in rows]
    mechanism = loaded.mechanism
    sequences = collate(trajectories, [r.images for _, r in rows], adapter, "full", "left")
    with torch.no_grad():
        log_probs_BT, hidden_BTH = replay(
            adapter, sequences, None, 1.0, mechanism.start_is_action, mechanism.end_is_action
        )
    source_rows, columns = mechanism.sources(sequences.kinds_BT, sequences.valid_BT)
    gap = (hidden_BTH[source_rows, columns] - sequences.latents_NH).abs().max()
    assert float(gap) <= 1e-4, "a latent is h of the position before it"
    for row, trajectory in enumerate(trajectories):
        replayed_T = log_probs_BT[row, -len(trajectory.token_ids) :]
        acted = trajectory.response_mask(mechanism.start_is_action, mechanism.end_is_action)
        gap_T = (replayed_T - trajectory.rollout_log_probs)[acted].abs()
        assert not len(gap_T) or float(gap_T.max()) <= 1e-4  # sixteen latents may be all of a row
        is_placed = (trajectory.kinds == K.LATENT) | (trajectory.kinds == K.FORCED)
        assert not trajectory.rollout_log_probs[is_placed].any()


@torch.no_grad()
def plain_decoding(c, request, rule, max_new_tokens):
    """Greedy, an uncached forward a position; `rule` says what is fed next.

    Args:
        rule: (kinds so far, token, h) -> kind of what follows, its id, its vector or None.
    """
    table = c.model.get_input_embeddings().weight
    vectors, tokens, kinds = list(table[request.prompt_ids]), [], []
    positions = slow_reading.positions(c, request.prompt_ids, None, max_new_tokens)
    for _ in range(max_new_tokens):
        output = c.model(
            inputs_embeds=torch.stack(vectors)[None],
            position_ids=positions[..., : len(vectors)],
            output_hidden_states=True,
            use_cache=False,
        )
        hidden = output.hidden_states[-1][0, -1]
        kind, token, vector = rule(kinds, output.logits[0, -1], hidden)
        kinds.append(int(kind))
        tokens.append(token)
        vectors.append(table[token] if vector is None else vector)
        if kind == K.TEXT and token == c.eos_id:
            break
    return tokens, kinds


def best(logits, banned):
    """Arg-max without the tokens that are never drawn."""
    return int(logits.index_fill(0, torch.tensor(sorted(banned)), -torch.inf).argmax())


def monet_rule(mechanism, banned):
    """The state that sampled `start` replaces its embedding; nine more follow, or the end token."""

    def rule(kinds, logits, hidden):
        fed = 0
        while fed < len(kinds) and kinds[-1 - fed] == Z:
            fed += 1
        in_span = fed < len(kinds) and kinds[-1 - fed] == P
        if in_span and fed + 1 < mechanism.steps and int(logits.argmax()) != mechanism.end_id:
            return K.LATENT, mechanism.latent_id, hidden
        if in_span:
            return K.FORCED, mechanism.end_id, None
        token = best(logits, banned)
        if token == mechanism.start_id:
            return K.FED_START, token, hidden
        return K.TEXT, token, None

    return rule


def laser_rule(mechanism, banned):
    """The first token is `start` whatever the logits say; then h, until the end or sixteen."""

    def rule(kinds, logits, hidden):
        if not kinds:
            return K.START, mechanism.start_id, None
        fed = 0
        while kinds[-1 - fed] == Z:
            fed += 1
        in_span = kinds[-1 - fed] == S
        is_over = fed > 0 and int(logits.argmax()) == mechanism.end_id
        if in_span and fed < mechanism.steps and not is_over:
            return K.LATENT, mechanism.latent_id, hidden
        if in_span:
            return K.FORCED, mechanism.end_id, None
        token = best(logits, banned)
        return (K.START if token == mechanism.start_id else K.TEXT), token, None

    return rule


@pytest.mark.parametrize(("system", "rule_of"), [("Monet", monet_rule), ("Laser", laser_rule)])
def test_decoding_is_the_published_one(system, rule_of, tmp_path):
    loaded = load_latent_model(write(tmp_path, system))
    mechanism = loaded.mechanism
    sharpen(loaded.model, frozenset({mechanism.start_id}), loaded.tokenizer.eos_token_id, -1)
    with torch.no_grad():
        loaded.model.lm_head.bias[mechanism.end_id] += 1.0
    adapter = ModelAdapter(loaded.model, mechanism)
    c = Case(system, loaded.model, loaded.tokenizer, loaded.processor, adapter)
    engine = HFRolloutEngine(loaded.model, mechanism, loaded.eos_ids)
    banned = (set(mechanism.banned_ids) | adapter.vision_ids) - set(loaded.eos_ids)
    requests = [c.request(text, seeds=[0]) for text in ("read red ?", "? ?", "blue", "green ?")]
    groups = engine.generate(requests, SamplingParams(max_new_tokens=40, temperature=0))
    spans = 0
    for request, (trajectory,) in zip(requests, groups, strict=True):
        tokens, kinds = plain_decoding(c, request, rule_of(mechanism, banned), 40)
        assert trajectory.kinds.tolist() == kinds and trajectory.token_ids.tolist() == tokens
        spans += len(trajectory.spans)
        lengths = [span.length for span in trajectory.spans if span.start + span.length < 40]
        assert all(length <= mechanism.steps for length in lengths)
        if system == "Laser":
            assert kinds[0] == S and not trajectory.response_mask(False)[0]
    assert spans >= 4


def test_weights_of_targets_only_are_passed_over(tmp_path):
    """SkiLa's folder may still hold the frozen encoder that SFT's targets came from."""
    folder = write(tmp_path, "SkiLa")
    weights = load_file(folder / "model.safetensors")
    weights["sketch_extractor.vision.weight"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_latent_model(folder)
    weights["sketch_decoder.weight"] = torch.zeros(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="sketch_decoder.weight"):
        load_latent_model(folder)
