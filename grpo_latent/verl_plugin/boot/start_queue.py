"""TransferQueue, started by the driver while the trainer's process still imports."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf

from grpo_latent.errors import PluginError


def start_transfer_queue(config: DictConfig) -> Future[None]:
    """Starts the controller and the storage units in a thread; verl's runner takes what it finds.

    Returns:
        done when they are there; raises `PluginError` where they cannot be had, for which the
        runner would wait.
    """

    def start() -> None:
        settings = OmegaConf.to_container(config.transfer_queue, resolve=True)
        try:
            tq.init(OmegaConf.create(settings))
        except Exception as error:
            raise PluginError(
                "TransferQueue does not start",
                where="transfer_queue",
                got=f"{type(error).__name__}: {error}",
                expected="its controller and its storage units",
            ) from error

    pool = ThreadPoolExecutor(1, thread_name_prefix="transfer_queue")
    started = pool.submit(start)
    pool.shutdown(wait=False)
    return started
