"""Loud when the plug-in is not loaded, cheap when verl loads it itself, in fresh interpreters."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from verl.plugin import platform

from grpo_latent.errors import PluginError
from grpo_latent.verl_plugin.boot import compat, registration


def run(code, **env):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_verl_loads_the_platform_by_entry_point_and_nothing_else():
    code = """
import sys, verl
from verl.utils.device import get_device_name
print(get_device_name(), "grpo_latent.verl_plugin.trainer.trainer" in sys.modules)
"""
    assert run(code, VERL_PLATFORM="cpu").split()[-2:] == ["cpu", "False"]


def test_verl_loads_everything_by_environment():
    """But scikit-learn, which transformers would bring, and which is there for whoever uses it."""
    code = """
import sys, verl
from verl.trainer.ppo.v1 import get_trainer_cls
from grpo_latent.verl_plugin.boot import compat
print(get_trainer_cls("latent_sync").__name__, sorted(compat.registered_names()["rollout replica"]))
print({"sklearn", "scipy.stats", "joblib"} & set(sys.modules))
import sklearn.metrics
from transformers import AutoModelForCausalLM, Trainer
"""
    out = run(code, VERL_USE_EXTERNAL_MODULES="grpo_latent.verl_plugin")
    assert "LatentPPOTrainer" in out and "hf_latent" in out and "set()" in out


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("trainer", "latent_sync"),
        ("rollout adapter", "hf_latent"),
        ("rollout adapter", "vllm_latent"),
        ("rollout replica", "vllm_latent"),
    ],
)
def test_a_missing_registry_entry_is_named(kind, name, monkeypatch):
    registration.verify("here")
    names = compat.registered_names()
    names[kind] -= {name}
    monkeypatch.setattr(compat, "registered_names", lambda: names)
    message = re.escape(
        f"server 3: the verl plug-in is not loaded; got no {{'{kind}': ['{name}']}}; expected"
    )
    with pytest.raises(PluginError, match=message):
        registration.verify("server 3")


def test_another_device_is_named():
    with pytest.raises(
        PluginError, match="trainer: verl settled on another device; got c.*VERL_PLATFORM"
    ):
        registration.verify_device("trainer", "tpu")


def test_a_platform_that_verl_lacks_is_named(monkeypatch):
    monkeypatch.setattr(platform, "get_platform", lambda: SimpleNamespace(device_name="cpu"))
    monkeypatch.setattr(platform.PlatformRegistry, "get", lambda name: None)
    compat.select_platform("cpu")  # the one that runs is not asked for again
    message = r"trainer.device=cuda: verl has no such platform; got \[.*'cpu'.*\]; expected nvidia"
    with pytest.raises(PluginError, match=message):
        compat.select_platform("cuda")


@pytest.mark.parametrize(
    "version", ["0.10.0", "0.9.0", "0.9.1.dev0", "0.10.0.dev0", "0.8.9", "0.90.0"]
)
def test_another_verl_is_refused(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(
        PluginError, match=f"unsupported verl; got {version}; expected >=0.9.1,<0.10"
    ):
        compat.check_verl_version()


@pytest.mark.parametrize("version", ["0.9.1", "0.9.1+cpu", "0.9.2.dev0", "0.9.12"])
def test_the_supported_verl_is_what_setup_asks_for(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    compat.check_verl_version()
    assert f'"verl{compat.SUPPORTED_VERL}"' in (Path(__file__).parents[3] / "setup.py").read_text()
