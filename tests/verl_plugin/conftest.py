import gc

import pytest
import ray
import tiny_run
import torch.distributed as dist
from engine_helpers import start_process_group
from unpatched import transformers_as_it_was

from grpo_latent.train import environment


@pytest.fixture(scope="module", autouse=True)
def unpatched_transformers():
    """Undoes verl's patches after each module, for tests of other folders in this process.

    verl patches anew for every engine.

    Not of the session: that ends after the last test of all folders.
    """
    with transformers_as_it_was():
        yield


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
    env_vars = {
        name: own[name]
        for name in ("VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES", "OMP_NUM_THREADS")
    }
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
