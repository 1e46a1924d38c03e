"""Malformed configs, checkpoints, requests and trajectories of the core: typed errors.

Each names the field or file, what was got, what was expected, and, where there is one, the fix.
"""

import json
import shutil

import pytest
import torch
from latent_cases import build_case, case
from safetensors.torch import load_file, save_file

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.errors import CheckpointError, ConfigError, LatentMismatchError, RolloutError
from grpo_latent.latent.mechanisms import LATENT_CONFIG_FILE, LVR, load_mechanism
from grpo_latent.models.loading import load_latent_model, save_latent_model
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import LatentSequences, collate
from grpo_latent.models.tiny import LVR_TOKENS
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import LatentOverride, RolloutRequest, SamplingParams
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.trajectory import Trajectory

BASE = LVR("s", "l", "e", 1, 2, 3)


def check(error, where=None, got=None, expected=None, fix=None):
    for name, text in (("where", where), ("got", got), ("expected", expected), ("fix", fix)):
        if text is not None:
            assert text in str(getattr(error, name)), (
                f"{name}: {text!r} not in {getattr(error, name)!r}"
            )
    assert error.expected or error.fix, "says neither what was expected nor how to fix it"


@pytest.mark.parametrize(
    ("changes", "where", "got"),
    [
        (dict(exit="never"), "latent.exit", "never"),
        (dict(head="transformer"), "latent.head", "transformer"),
        (dict(visibility="none"), "latent.visibility", "none"),
        (dict(mechanism="telepathy"), "latent.mechanism", "telepathy"),
        (dict(steps=0), "latent.steps", "0"),
        (dict(steps=2.5), "latent.steps", "2.5"),
        (dict(steps=True), "latent.steps", "True"),
        (dict(steps="8"), "latent.steps", "8"),
        (dict(max_spans=-1), "latent.max_spans", "-1"),
        (dict(latent_end_threshold=0.0), "latent.latent_end_threshold", "0.0"),
        (dict(latent_end_threshold=float("nan")), "latent.latent_end_threshold", "nan"),
        (dict(latent_end_threshold="0.02"), "latent.latent_end_threshold", "0.02"),
        (dict(start_is_action="no"), "latent.start_is_action", "no"),
        (dict(end_id=1), "latent", "'end_id': 1"),
        (dict(latent_end_id=3), "latent", "'latent_end_id': 3"),
        (dict(latent_id=-2), "latent", "'latent_id': -2"),
        (dict(start_id=None), "latent", "'start_id': None"),
        (dict(exit="latent_end"), "latent.exit", "latent_end without latent_end_id"),
        (dict(visibility="latents_only", exit="end_token"), "latent.exit", "end_token"),
        (dict(stepz=4), "latent", "stepz"),
    ],
)
def test_latent_config(changes, where, got):
    with pytest.raises(ConfigError) as info:
        BASE.replace(**changes)
    check(info.value, where, got)


@pytest.mark.parametrize(
    ("text", "got", "expected"),
    [
        (None, None, "written by grpo_latent.sft"),
        ("{", "Expecting", "a JSON object"),
        ("[1, 2]", "[1, 2]", "an object"),
        ("{}", None, "1 or 2"),
        ('{"version": 99}', "99", "1 or 2"),
        ('{"version": 2, "steps": 3}', "None", "one of ('lvr'"),
        ('{"version": 2, "mechanism": "os:path"}', "os:path", "a Mechanism subclass"),
        ('{"version": 1, "steps": 3}', "start_token", "a value"),
        (json.dumps(BASE.to_dict() | {"stepz": 1}), "stepz", "of mechanism lvr"),
        (json.dumps(BASE.to_dict() | {"top_k_image": 1}), "top_k_image", "of mechanism lvr"),
        (json.dumps(BASE.to_dict() | {"steps": 0}), "0", "int >= 1"),
        (json.dumps(BASE.to_dict() | {"version": 1, "trigger": "always"}), "always", "emitted"),
    ],
)
def test_latent_config_file(tmp_path, text, got, expected):
    if text is not None:
        (tmp_path / LATENT_CONFIG_FILE).write_text(text)
    with pytest.raises(CheckpointError) as info:
        load_mechanism(tmp_path)
    check(info.value, str(tmp_path), got, expected)


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    folder, c = tmp_path_factory.mktemp("checkpoint") / "good", build_case("qwen2")
    c.model.lm_head.bias = None
    config = c.mechanism(head="mlp", exit="latent_end")
    config.attach(c.model)
    save_latent_model(folder, c.model, c.tokenizer, None, config)
    return folder


def edit_json(name, **changes):
    def edit(folder):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(
            json.dumps({k: v for k, v in (values | changes).items() if v is not ...})
        )

    return edit


def edit_weights(name, tensor=None):
    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def official(**changes):
    """An official LVR config.json instead of ours, then `changes`."""
    ids = {"lvr_start_id": 7, "lvr_id": 8, "lvr_latent_end_id": 9, "lvr_end_id": 10}

    def edit(folder):
        (folder / LATENT_CONFIG_FILE).unlink()
        edit_json(
            "config.json", **(ids | {"lvr_head": False, "latent_end_token": False} | changes)
        )(folder)

    return edit


def truncate_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def unlink(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("damage", "got", "expected"),
    [
        (shutil.rmtree, None, "a folder written by"),
        (unlink("config.json"), "tokenizer.json", "Hugging Face folder"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "not a valid JSON",
            "Hugging Face folder",
        ),
        (edit_json("config.json", model_type="zzz"), "zzz", "Hugging Face folder"),
        (unlink("model.safetensors"), "model.safetensors", "Hugging Face folder"),
        (truncate_weights, "Safetensor", "Hugging Face folder"),
        (
            edit_weights("model.norm.weight"),
            "'missing': ['model.norm.weight']",
            "Qwen2ForCausalLM",
        ),
        (
            edit_weights("surprise", torch.zeros(1)),
            "'unexpected': ['surprise']",
            "Qwen2ForCausalLM",
        ),
        (
            edit_weights("model.norm.weight", torch.zeros(3)),
            "model.norm.weight",
            "Qwen2ForCausalLM",
        ),
        (unlink("tokenizer.json", "tokenizer_config.json"), "'<|lvr_start|>' -> None", "-> 7"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{"),
            "JSON",
            "Hugging Face folder",
        ),
        (edit_json(LATENT_CONFIG_FILE, end_id=12), "'<|lvr_end|>' -> 10", "-> 12"),
        (edit_json(LATENT_CONFIG_FILE, start_token="<s>"), "'<s>' -> None", "-> 7"),
        (edit_json(LATENT_CONFIG_FILE, latent_end_token=None), "None -> None", "-> 9"),
        (edit_weights("lvr_head.mlp.2.bias"), "lvr_head.mlp.2.bias", "latent_config.json names"),
        (edit_weights("lvr_head.ln_q.weight", torch.zeros(4)), "(4,)", "[32]"),
        (edit_weights("lvr_latent_end_emb"), "lvr_latent_end_emb", "latent_config.json names"),
        (
            edit_json(LATENT_CONFIG_FILE, head="glu"),
            "lvr_head.down_proj",
            "latent_config.json names",
        ),
        (unlink(LATENT_CONFIG_FILE), None, "a folder written by"),
        (official(lvr_id=...), "lvr_id", "token ids"),
        (official(lvr_id="8"), "lvr_id", "token ids"),
        (official(lvr_head=True, lvr_head_type="odd"), "odd", "simple or glu"),
        (official(lvr_end_id=10**6), "None -> None", "-> 1000000"),
    ],
)
def test_checkpoint_folder(good_folder, tmp_path, damage, got, expected):
    folder = tmp_path / "damaged"
    shutil.copytree(good_folder, folder)
    load_latent_model(folder)
    damage(folder)
    with pytest.raises(CheckpointError) as info:
        load_latent_model(folder)
    check(info.value, str(folder), got, expected)


def test_saving_with_a_tokenizer_that_disagrees(tmp_path):
    c = case("qwen2")
    with pytest.raises(CheckpointError) as info:
        save_latent_model(tmp_path, c.model, c.tokenizer, None, c.mechanism().replace(end_id=20))
    check(info.value, str(tmp_path), "'<|lvr_end|>' -> 10", "-> 20", "same SFT run")


@pytest.mark.parametrize(
    ("values", "where"),
    [
        (dict(max_new_tokens=0), "sampling.max_new_tokens"),
        (dict(max_new_tokens=1.5), "sampling.max_new_tokens"),
        (dict(temperature=-1.0), "sampling.temperature"),
        (dict(temperature=float("nan")), "sampling.temperature"),
        (dict(temperature=float("inf")), "sampling.temperature"),
        (dict(top_p=0.0), "sampling.top_p"),
        (dict(top_p=1.5), "sampling.top_p"),
        (dict(top_k=2.5), "sampling.top_k"),
    ],
)
def test_sampling_params(values, where):
    with pytest.raises(ConfigError) as info:
        SamplingParams(**({"max_new_tokens": 4} | values))
    check(info.value, where, repr(*values.values()))


@pytest.mark.parametrize(
    ("values", "got"),
    [
        (dict(prompt_ids=torch.zeros(1, 3, dtype=torch.long)), "(1, 3)"),
        (dict(prompt_ids=torch.zeros(0, dtype=torch.long)), "(0,)"),
        (dict(prompt_ids=torch.zeros(3)), "float32"),
        (dict(seeds=[]), "[]"),
        (dict(seeds=[1, -1]), "-1"),
        (dict(seeds=[2**64]), str(2**64)),
        (dict(seeds=[0.5]), "0.5"),
        (dict(steps=-1), "-1"),
        (dict(max_spans=-1), "-1"),
        (dict(max_spans=0.5), "0.5"),
    ],
)
def test_request(values, got):
    with pytest.raises(RolloutError) as info:
        RolloutRequest(
            **(
                dict(prompt_ids=torch.ones(3, dtype=torch.long), seeds=[1], group_id="row-7")
                | values
            )
        )
    check(info.value, "request of group 'row-7'", got)


VL, TEXT = "qwen2_5_vl", "qwen2"


@pytest.mark.parametrize(
    ("name", "change", "got", "expected"),
    [
        (TEXT, lambda r: dict(prompt_ids=torch.tensor([1, 10**6])), "1..1000000", "0..37"),
        (TEXT, lambda r: dict(prompt_ids=torch.tensor([-1, 3])), "-1..3", "0..37"),
        (TEXT, lambda r: dict(images=case(VL).images(1)), "Qwen2ForCausalLM", "no images"),
        (VL, lambda r: dict(images=None), "6 placeholders", "0, one for each"),
        (VL, lambda r: dict(images=case(VL).images(2)), "6 placeholders", "12, one for each"),
        (
            VL,
            lambda r: dict(prompt_ids=r.prompt_ids[r.prompt_ids != 5]),
            "0 placeholders",
            "6, one for each",
        ),
        (
            VL,
            lambda r: dict(
                images=ImageInputs(r.images.pixel_values[:-1], r.images.image_grid_thw)
            ),
            "23 patches",
            "24 patches",
        ),
        (TEXT, lambda r: dict(latent_override=LatentOverride(torch.zeros(4))), "(4,)", "[K, 32]"),
        (
            TEXT,
            lambda r: dict(latent_override=LatentOverride(torch.zeros(4, 1))),
            "(4, 1)",
            "[K, 32]",
        ),
    ],
)
def test_request_that_does_not_fit_the_model(name, change, got, expected):
    """A second, sound request in the batch keeps totals from being compared only."""
    c = case(name)
    good = c.request(images=c.images(1) if name == VL else None, group_id="row-3")
    values = {field: getattr(good, field) for field in RolloutRequest.__dataclass_fields__}
    with pytest.raises(RolloutError) as info:
        c.engine().generate([good, RolloutRequest(**(values | change(good)))], SamplingParams(2))
    check(info.value, "request of group 'row-3'", got, expected)


def engine(c, config=None, eos_ids=(2,), **kwargs):
    return HFRolloutEngine(c.model, config or c.mechanism(), eos_ids, **kwargs)


@pytest.mark.parametrize(
    ("make", "error", "where", "got"),
    [
        (lambda c: engine(c, eos_ids=[]), ConfigError, "eos_ids", None),
        (lambda c: engine(c, eos_ids=[2, 10]), ConfigError, "eos_ids", "10"),
        (lambda c: engine(c, eos_ids=[10**6]), ConfigError, "eos_ids", "1000000"),
        (lambda c: engine(c, banned_ids=[-1]), ConfigError, "banned_ids", "-1"),
        (
            lambda c: engine(c, c.mechanism().replace(latent_id=500)),
            ConfigError,
            "latent config",
            "500",
        ),
        (lambda c: engine(c, max_batch_rows=0), ConfigError, "max_batch_rows", "0"),
        (lambda c: engine(c, c.mechanism(exit="latent_end")), CheckpointError, "model", None),
    ],
)
def test_engine(make, error, where, got):
    with pytest.raises(error) as info:
        make(case(TEXT))
    check(info.value, where, got)


def test_engine_refuses_an_attention_without_additive_bias():
    c = build_case(TEXT)
    c.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError) as info:
        engine(c)
    check(
        info.value,
        "attn_implementation",
        "flash_attention_2",
        "sdpa or eager",
        "attn_implementation=sdpa",
    )


def trajectory(**changes):
    kinds = torch.tensor([K.START, K.LATENT, K.FORCED, K.TEXT])
    fields = dict(
        prompt_ids=torch.ones(3, dtype=torch.long),
        token_ids=torch.ones(4, dtype=torch.long),
        kinds=kinds,
        latents=torch.zeros(1, 32),
        rollout_log_probs=torch.zeros(4),
        sampling_log_probs=torch.zeros(4),
        stop_reason="eos",
        group_id="row-5",
    )
    return Trajectory(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "got", "expected"),
    [
        (dict(token_ids=torch.ones(5, dtype=torch.long)), "'token_ids': 5", "one length"),
        (dict(rollout_log_probs=torch.zeros(3)), "'rollout_log_probs': 3", "one length"),
        (dict(latents=torch.zeros(2, 32)), "(2, 32)", "[1, hidden]"),
        (dict(latents=torch.zeros(32)), "(32,)", "[1, hidden]"),
        (
            dict(kinds=torch.tensor([K.START, K.LATENT, K.FORCED, K.VISION])),
            "[1]",
            "kinds in [2, 3, 4, 5, 6, 7]",
        ),
        (
            dict(kinds=torch.tensor([K.START, K.LATENT, K.FORCED, 9])),
            "[9]",
            "kinds in [2, 3, 4, 5, 6, 7]",
        ),
        (dict(stop_reason="tired"), "'tired'", "('eos', 'length')"),
    ],
)
def test_trajectory(changes, got, expected):
    with pytest.raises(LatentMismatchError) as info:
        trajectory(**changes)
    check(info.value, got=got, expected=expected)


def batch(**changes):
    ids = torch.ones(1, 3, dtype=torch.long)
    kinds = torch.tensor([[K.PROMPT, K.START, K.LATENT]])
    fields = dict(
        input_ids_BT=ids, kinds_BT=kinds, valid_BT=ids.bool(), latents_NH=torch.zeros(1, 32)
    )
    fields |= dict(position_ids=torch.arange(3)[None], visibility="full")
    return LatentSequences(**(fields | changes))


@pytest.mark.parametrize(
    ("make", "error", "where", "got"),
    [
        (
            lambda c: batch(latents_NH=torch.zeros(2, 32)),
            LatentMismatchError,
            "LatentSequences",
            "(2, 32)",
        ),
        (
            lambda c: collate([], [], c.adapter, "full"),
            LatentMismatchError,
            "collate",
            "0 trajectories",
        ),
        (
            lambda c: collate([trajectory()], [], c.adapter, "full"),
            LatentMismatchError,
            "collate",
            "0 entries",
        ),
        (
            lambda c: collate([trajectory()], [None], c.adapter, "full", "up"),
            ConfigError,
            "padding_side",
            "up",
        ),
        (
            lambda c: collate([trajectory()], [case(VL).images(1)], case(VL).adapter, "full"),
            RolloutError,
            "trajectory 0 (group 'row-5')",
            "0 placeholders",
        ),
        (lambda c: replay(c.adapter, batch(), temperature=0), ConfigError, "replay", "0"),
        (lambda c: batch(visibility="half"), ConfigError, "latent.visibility", "half"),
    ],
)
def test_replay(make, error, where, got):
    with pytest.raises(error) as info, torch.no_grad():
        make(case(TEXT))
    check(info.value, where, got)


def test_lvr_token_ids_used_above():
    """`official` names them by number."""
    assert [case(TEXT).token_id(token) for token in LVR_TOKENS] == [7, 8, 9, 10]
