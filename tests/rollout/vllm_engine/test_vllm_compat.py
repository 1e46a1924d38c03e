"""What the engine relies on in vLLM, and what it refuses; the first half runs without vLLM."""

import json

import pytest
from vllm_cases import build_vllm_case

from grpo_latent.errors import CheckpointError, ConfigError, PluginError
from grpo_latent.rollout.vllm.compat import RUNNER_VARIABLE, SYMBOLS, Symbol, check_symbols, check_version, pin_runner
from grpo_latent.rollout.vllm.skeleton import WorkerOptions, read_skeleton, worker_options


@pytest.mark.parametrize("version", ["0.24.0", "0.27.1", "0.27.1+cpu", "0.27.0"])
def test_supported_versions(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.24.1", "0.25.0", "0.28.0", "0.2.7", "1.27.1"])
def test_other_versions_are_refused_with_the_supported_ones(version):
    with pytest.raises(PluginError, match=f"{version}; expected 0.24.0 or 0.27.x"):
        check_version(version)


def test_the_runner_is_pinned(monkeypatch):
    monkeypatch.delenv(RUNNER_VARIABLE, raising=False)
    monkeypatch.setenv(RUNNER_VARIABLE, "1")
    with pytest.raises(ConfigError, match="V1 model runner.*Unset"):
        pin_runner()
    monkeypatch.delenv(RUNNER_VARIABLE)
    pin_runner()
    pin_runner()


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        (Symbol("json", "load.gone"), "json.load.gone.*no attribute"),
        (Symbol("no_such_module_here", "x"), "no_such_module_here.x.*No module"),
        (Symbol("json", "dump", ("obj", "speed")), r"json.dump.*no parameter \['speed'\]"),
        (Symbol("json", "dump", (), ("iterable", "frobnicate")), r"json.dump.*no longer mentions \['frobnicate'\]"),
    ],
)
def test_a_changed_symbol_is_named(symbol, message):
    with pytest.raises(PluginError, match=message):
        check_symbols((symbol,))


@pytest.mark.vllm
@pytest.mark.parametrize("symbol", SYMBOLS, ids=lambda symbol: f"{symbol.module}.{symbol.name}")
def test_the_installed_vllm_has_what_we_rely_on(symbol):
    check_symbols((symbol,))


@pytest.fixture
def folder(tmp_path):
    build_vllm_case("qwen2", tmp_path)
    return tmp_path


def test_a_skeleton_holds_what_engine_hf_would(folder):
    skeleton = read_skeleton(folder, {"steps": 7})
    assert skeleton.config.steps == 7 and skeleton.adapter.device.type == "meta"
    assert skeleton.eos_ids == (skeleton.tokenizer.eos_token_id,)
    banned = skeleton.banned_ids([5, skeleton.eos_ids[0]])
    assert {5, skeleton.config.latent_id, skeleton.config.end_id} <= set(banned)
    assert skeleton.config.start_id not in banned and skeleton.eos_ids[0] not in banned


def test_mechanisms_that_need_engine_hf_are_refused(folder):
    with pytest.raises(ConfigError, match="visibility.*latents_only.*rollout.engine=hf"):
        read_skeleton(folder, {"visibility": "latents_only"})
    with pytest.raises(CheckpointError, match="no such folder"):
        read_skeleton(folder / "nowhere")


def test_qwen3_vl_without_interleaved_sections_is_refused(tmp_path):
    """vLLM and transformers would number image positions differently, without a word."""
    build_vllm_case("qwen3_vl", tmp_path)
    read_skeleton(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["text_config"]["rope_parameters"]["mrope_interleaved"]
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="mrope_interleaved: .*got nothing; expected true"):
        read_skeleton(tmp_path)


def test_worker_options_survive_json_and_are_read_from_the_folder_otherwise(folder):
    class Config:
        class model_config:
            model = str(folder)

    skeleton = read_skeleton(folder)
    options = WorkerOptions(skeleton.config, (1, 2), 64)
    Config.additional_config = {"grpo_latent": json.loads(json.dumps(options.to_json()))}
    assert worker_options(Config) == options
    Config.additional_config = {"grpo_latent": {"overrides": {"steps": 9}, "max_latents": 32}}
    served = worker_options(Config)
    assert served.config.steps == 9 and served.max_latents == 32 and served.banned_ids == tuple(skeleton.banned_ids())
    Config.additional_config = {"grpo_latent": {"step": 9}}
    with pytest.raises(ConfigError, match=r"unknown option.*\['step'\]"):
        worker_options(Config)


@pytest.mark.vllm
def test_a_worker_with_vllms_own_model_class_is_refused(folder, monkeypatch):
    """As in a worker process of its own, where vLLM resolves the class before our worker can register one."""
    from grpo_latent.rollout.vllm import model, worker
    from grpo_latent.rollout.vllm.engine import VllmRolloutEngine

    monkeypatch.setattr(worker, "register_latent_model", lambda architecture: None)
    monkeypatch.setattr(model, "register_latent_model", lambda architecture: None)
    with pytest.raises(PluginError, match="resolved its own model class"):
        VllmRolloutEngine(folder, max_model_len=128, enforce_eager=True)
