"""The reward manager as verl builds and calls it: from config, row by row, in an event loop."""

import asyncio
import logging

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo.reward import load_reward_manager

from grpo_latent.errors import ConfigError, PluginError, RewardError
from grpo_latent.verl_plugin.rewards import manager as reward_manager  # noqa: F401, registers

LATENT = {
    "num_spans": 1,
    "num_steps": 2,
    "num_forced_ends": 1,
    "span_offsets": [0],
    "stop_reason": "eos",
}


def config(custom=None, **reward):
    return OmegaConf.create(
        {
            "reward": {
                "custom_reward_function": custom or {"path": None, "name": "compute_score"},
                "reward_manager": {"source": "register", "name": "grpo_latent"},
            },
            "latent": {"reward": {"timeout_s": 5, **reward}},
        }
    )


def row(text="<answer> 7 </answer>", truth="7", extra_fields=None, **more):
    """A row as verl's agent loop worker packs it.

    `responses` are garbage, which no reward may depend on.
    """
    reported = {"solution_str": text, "latent": LATENT} if extra_fields is None else extra_fields
    values = {
        "data_source": "digits",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": 5, "split": "train"},
        "tool_extra_fields": reported,
        "__num_turns__": 2,
        "uid": "u17",
        "session_id": 3,
        **more,
    }
    arrays = {}
    for key, value in values.items():
        arrays[key] = np.empty(1, dtype=object)
        arrays[key][0] = value
    batch = TensorDict(
        {"responses": torch.randint(0, 99, (1, 4)), "attention_mask": torch.ones(1, 4)},
        batch_size=1,
    )
    return DataProto(batch=batch, non_tensor_batch=arrays)


def load(settings):
    asyncio.set_event_loop(asyncio.new_event_loop())
    return load_reward_manager(
        settings, tokenizer=None, reward_router_address=None, reward_model_tokenizer=None
    )


def run(manager, data):
    return manager.loop.run_until_complete(manager.run_single(data))


@pytest.fixture
def two_functions():
    manager = load(
        config(
            functions=[
                {"path": "pkg://reward.accuracy"},
                {"path": "pkg://reward.format", "weight": 0.5},
            ]
        )
    )
    yield manager
    manager.runner.close()


def test_weighted_functions_reach_verls_extra_info(two_functions):
    result = run(two_functions, row())
    assert result["reward_score"] == 1.5
    assert result["reward_extra_info"] == {
        "score": 1.5,
        "accuracy": 1.0,
        "format": 1.0,
        "acc": 1.0,
        "dropped": 0.0,
        "reward_error": "",
    }
    assert run(two_functions, row("<answer> 8 </answer>"))["reward_score"] == 0.5
    keys = [
        list(run(two_functions, row(t))["reward_extra_info"]) for t in ("", "<answer> 7 </answer>")
    ]
    assert keys[0] == keys[1], "verl reads the keys of the first row for all"


def test_rows_are_scored_concurrently_and_not_changed(two_functions):
    data = [row(f"<answer> {i} </answer>", "3") for i in range(8)]
    extra_infos = [d.non_tensor_batch["extra_info"][0] for d in data]

    async def together():
        return await asyncio.gather(*(two_functions.run_single(d) for d in data))

    results = two_functions.loop.run_until_complete(together())
    assert [r["reward_score"] for r in results] == [1.5 if i == 3 else 0.5 for i in range(8)]
    assert extra_infos == [{"index": 5, "split": "train"}] * 8


def test_the_custom_function_is_one_override(tmp_path, caplog):
    path = tmp_path / "mine.py"
    path.write_text(
        "def short(data_source, solution_str, ground_truth, extra_info=None, scale=1):\n"
        "    assert extra_info['num_turns'] == 2 and extra_info['index'] == 5\n"
        "    return {'score': scale * extra_info['latent']['num_steps'], 'length': len(solution_str)}\n"
    )
    custom = {"path": str(path), "name": "short", "reward_kwargs": {"scale": 10}}
    with caplog.at_level(logging.WARNING):
        manager = load(config(custom, functions=[{"path": "pkg://reward.accuracy"}]))
    assert "replaces latent.reward.functions (pkg://reward.accuracy)" in caplog.text
    info = run(manager, row("abc"))["reward_extra_info"]
    manager.runner.close()
    assert (info["score"], info["short"], info["length"]) == (20.0, 20.0, 3.0)


@pytest.mark.parametrize("policy", ["raise", "drop", "score"])
def test_policies(policy, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None): return None\n"
    )
    manager = load(
        config({"path": str(path), "name": "compute_score"}, on_error=policy, error_score=-1.0)
    )
    if policy == "raise":
        with pytest.raises(RewardError, match=r"group u17, trajectory 3 .*row 5.*NoneType"):
            run(manager, row())
    else:
        result = run(manager, row())
        info = result["reward_extra_info"]
        assert (result["reward_score"], info["dropped"]) == (
            (0.0, 1.0) if policy == "drop" else (-1.0, 0.0)
        )
        assert info["reward_error"] == "type" and info["mine"] is None
    manager.runner.close()


def test_a_row_without_answer_is_an_error_that_names_it(two_functions):
    with pytest.raises(RewardError, match="DataError.*row 5"):
        run(two_functions, row(truth=""))


@pytest.mark.parametrize(
    "extra_fields, missing",
    [
        ({}, r"\['solution_str', 'latent'\]"),
        ({"solution_str": "x"}, r"\['latent'\]"),
        ({"latent": LATENT}, "solution_str"),
    ],
)
def test_an_agent_loop_that_reports_no_view_is_an_error(two_functions, extra_fields, missing):
    with pytest.raises(PluginError, match=missing):
        run(two_functions, row(extra_fields=extra_fields))


@pytest.mark.parametrize(
    "reward, message",
    [
        ({}, "no reward function"),
        ({"functions": [{"path": "absent.py"}]}, "no such reward file"),
        (
            {"functions": [{"path": "pkg://reward.digits", "kwargs": {"a": 1}, "wieght": 2}]},
            "unknown key",
        ),
        ({"function": []}, r"latent\.reward.*\['function'\]"),
        ({"functions": [{"path": "pkg://reward.digits"}], "on_error": "skip"}, "on_error"),
        ({"functions": [{"path": "pkg://reward.digits"}], "timeout_s": -1}, "timeout_s"),
    ],
)
def test_malformed_configs(reward, message):
    with pytest.raises(ConfigError, match=message):
        load(config(**reward))


@pytest.mark.parametrize("name", ["latent.reward", "reward.custom_reward_function"])
@pytest.mark.parametrize("value", [5, ["pkg://reward.digits"]])
def test_what_is_no_section_is_named(name, value):
    settings = config(functions=[{"path": "pkg://reward.digits"}])
    OmegaConf.update(settings, name, value, merge=False)
    with pytest.raises(ConfigError, match=f"^{name}: not a section; got .*keys and values"):
        reward_manager.reward_settings(settings)


def test_settings_may_travel_with_the_rollout_config():
    """As stock `verl.trainer.main_ppo` has them: its config has no top-level `latent`."""
    settings = OmegaConf.create(
        {
            "actor_rollout_ref": {
                "rollout": {
                    "custom": {
                        "latent": {
                            "reward": {"functions": [{"path": "${file}"}], "timeout_s": None}
                        }
                    }
                }
            },
            "file": "pkg://reward.digits",
        }
    )
    assert reward_manager.reward_settings(settings) == {
        "functions": [{"path": "pkg://reward.digits"}]
    }


JUDGE = """
def compute_score(data_source, solution_str, ground_truth, extra_info, reward_router_address, reward_model_tokenizer):
    assert reward_router_address == "10.0.0.1:8000"
    return float(len(reward_model_tokenizer))
"""


def test_functions_get_the_judges_address_and_tokenizer(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(JUDGE)
    asyncio.set_event_loop(asyncio.new_event_loop())
    manager = load_reward_manager(
        config({"path": str(path), "name": "compute_score"}),
        tokenizer=None,
        reward_router_address="10.0.0.1:8000",
        reward_model_tokenizer="words",
    )
    assert run(manager, row())["reward_score"] == 5.0
    manager.runner.close()
