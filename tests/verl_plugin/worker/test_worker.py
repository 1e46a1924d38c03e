"""What a training worker makes sure of, whatever verl built for it. No Ray is started here."""

from types import SimpleNamespace

import pytest
from verl.workers.engine_workers import TrainingWorker

from grpo_latent.errors import PluginError
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.boot.registration import register_all
from grpo_latent.verl_plugin.worker import worker
from grpo_latent.verl_plugin.worker.engine import LatentFSDPEngine


def build(engine, monkeypatch, **arguments):
    """A worker whose verl half makes `engine`."""
    register_all()
    monkeypatch.setattr(worker, "prepare_process", lambda options: None)
    monkeypatch.setattr(
        TrainingWorker, "__init__", lambda self, config: setattr(self, "engine", engine)
    )
    # verl's `__new__` asks for the environment of a Ray worker
    made = object.__new__(worker.LatentTrainingWorker)
    made.__init__(config=None, **arguments)
    return made


def test_an_engine_without_latents_is_refused(monkeypatch):
    message = "training worker: verl built another engine; got SimpleNamespace.*strategy=fsdp2"
    with pytest.raises(PluginError, match=message):
        build(SimpleNamespace(), monkeypatch)


def test_the_engine_gets_the_options(monkeypatch):
    engine = LatentFSDPEngine.__new__(LatentFSDPEngine)
    options = LatentOptions(seed=7)
    build(engine, monkeypatch, options=options, freeze_vision=True)
    assert engine.options is options and engine.freeze_vision
