import gc

import pytest
import ray
import tiny_run
import torch.distributed as dist
from engine_helpers import start_process_group
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

from grpo_latent.train import environment


@pytest.fixture(scope="session", autouse=True)
def unpatched_transformers():
    """verl replaces methods of transformers' classes; other tests of this process need them back."""
    saved = []
    for module in (modeling_qwen2_vl, modeling_qwen2_5_vl, modeling_qwen3_vl):
        for value in list(vars(module).values()):
            if isinstance(value, type) and "forward" in vars(value):
                saved.append((value, {k: v for k, v in vars(value).items() if callable(v) and not k.startswith("__")}))
    yield
    for owner, attributes in saved:
        for name, value in attributes.items():
            setattr(owner, name, value)


@pytest.fixture(scope="module")
def gloo():
    """A process group of one rank."""
    start_process_group()
    yield
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory):
    """One Ray for all runs of this process."""
    folder = tmp_path_factory.mktemp("ray")
    own = environment(tiny_run.make_config(folder, folder), folder)
    env_vars = {name: own[name] for name in ("VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES", "OMP_NUM_THREADS")}
    ray.init(
        address="local",  # not one that happens to run on this machine
        num_cpus=16,
        include_dashboard=False,
        object_store_memory=300_000_000,
        log_to_driver=False,
        runtime_env={"env_vars": {**env_vars, "TRANSFER_QUEUE_ENABLE": "1"}},
    )
    yield
    ray.shutdown()
