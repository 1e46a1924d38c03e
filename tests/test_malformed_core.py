"""Malformed configs, requests and trajectories of the core: typed errors.

Each names the field or file, what was got, what was expected, and, where there is one, the fix.
"""

import json

import pytest
import torch
from error_cases import check_message
from latent_cases import build_case, case

from grpo_latent.backbones.images import ImageInputs
from grpo_latent.errors import CheckpointError, ConfigError, LatentMismatchError, RolloutError
from grpo_latent.latent.mechanisms import LATENT_CONFIG_FILE, LVR, load_mechanism
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import LatentSequences, collate
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import LatentOverride, RolloutRequest, SamplingParams
from grpo_latent.trajectory import COMPLETION_KINDS, Trajectory
from grpo_latent.trajectory import PositionKind as K

BASE = LVR("s", "l", "e", 1, 2, 3)


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
        (dict(exit="latent_end"), "latent.exit", "latent_end, latent_end_id None"),
        (dict(visibility="latents_only", exit="end_token"), "latent.exit", "end_token"),
        (dict(stepz=4), "latent", "stepz"),
    ],
)
def test_latent_config(changes, where, got):
    with pytest.raises(ConfigError) as info:
        BASE.replace(**changes)
    check_message(info.value, where, got)


@pytest.mark.parametrize(
    ("text", "got", "expected"),
    [
        (None, None, "written by grpo_latent.sft"),
        ("{", "Expecting", "a JSON object"),
        ("[1, 2]", "[1, 2]", "an object"),
        ("{}", None, "1 or 2"),
        ('{"version": 99}', "99", "1 or 2"),
        ('{"version": 2, "steps": 3}', "None", "one of ['coconut'"),
        (
            '{"version": 2, "mechanism": "os:path"}',
            "os:path",
            "package.module:NAME of a mechanism",
        ),
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
    check_message(info.value, str(tmp_path), got, expected)


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
    check_message(info.value, where, repr(*values.values()))


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
    check_message(info.value, "request of group 'row-7'", got)


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
    check_message(info.value, "request of group 'row-3'", got, expected)


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
    check_message(info.value, where, got)


def test_engine_refuses_an_attention_without_additive_bias():
    c = build_case(TEXT)
    c.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError) as info:
        engine(c)
    check_message(
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
            f"kinds in {sorted(COMPLETION_KINDS)}",
        ),
        (
            dict(kinds=torch.tensor([K.START, K.LATENT, K.FORCED, len(K)])),
            f"[{len(K)}]",
            f"kinds in {sorted(COMPLETION_KINDS)}",
        ),
        (dict(stop_reason="tired"), "'tired'", "('eos', 'length')"),
    ],
)
def test_trajectory(changes, got, expected):
    with pytest.raises(LatentMismatchError) as info:
        trajectory(**changes)
    check_message(info.value, got=got, expected=expected)


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
    check_message(info.value, where, got)
