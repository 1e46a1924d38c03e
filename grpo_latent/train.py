"""`python -m grpo_latent.train`: latent GRPO on verl's trainer, on two CPU cores or a cluster.

config (verl's keys plus `latent:`) ──check──▶ Ray (own, or the running one) ──▶ verl's TaskRunner
                                                          │ reports
                                                          ▼
                                        one progress bar, one line a step; the rest in train.log
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from grpo_latent.common import collector
from grpo_latent.common.collector import collect_rarely
from grpo_latent.common.command import config_command
from grpo_latent.common.paths import (
    READ,
    WRITTEN,
    check_output_folder,
    for_all_nodes,
    is_remote,
)
from grpo_latent.common.provenance import append_provenance
from grpo_latent.common.settings import section
from grpo_latent.common.sockets import check_ray_folder
from grpo_latent.errors import ConfigError, DataError

LOG_FILE, METRICS_FILE, CONFIG_FILE = "train.log", "metrics.jsonl", "config.yaml"
PLUGIN = "grpo_latent.verl_plugin"
HOOK = "worker_process_setup_hook"  # of Ray's runtime environment


class VerlConfigs(SearchPathPlugin):
    """Lets every config find verl's.

    Hydra takes `hydra.searchpath` from a primary config only, and recipes are primary.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("verl", "pkg://verl.trainer.config")


Plugins.instance().register(VerlConfigs)


def check_only(config: DictConfig) -> None:
    """Checks what `train` does before Ray starts, and the checkpoint to resume; writes nothing.

    Raises:
        GrpoLatentError: as `train`.
    """
    check_output_folder(OmegaConf.select(config, "latent.output_dir"), "latent.output_dir")
    resolve_paths(config)
    set_environment(config, Path(config.latent.output_dir))
    import torch

    from grpo_latent.verl_plugin.trainer.console import output_to_file
    from grpo_latent.verl_plugin.trainer.plan import check_resume, plan
    from grpo_latent.verl_plugin.trainer.trial import report_trial, try_checkpoint

    with output_to_file(Path(os.devnull)) as console:
        _check_all(config, console)
        for note in check_resume(config):
            console.print(f"warning: {note}")
        can_run = config.trainer.device == "cpu" or torch.cuda.is_available()
        if can_run:
            report_trial(try_checkpoint(config), console)
        else:
            console.print("warning: no GPU here: the checkpoint was not loaded (latent.preflight)")
        for line in plan(config):
            console.print(line)
        found = "nothing is wrong" if can_run else "nothing else is wrong; it cannot run here"
        console.print(f"{found}; nothing was started or written")


@config_command("grpo", check_only)
def main(config: DictConfig) -> None:
    train(config)


def train(config: DictConfig) -> None:
    """Runs training to its end.

    Raises:
        GrpoLatentError: the config, the data or the checkpoint cannot be used, or training stopped
            on a typed error.
        RuntimeError: training failed otherwise; the log has the traceback.
    """
    check_output_folder(OmegaConf.select(config, "latent.output_dir"), "latent.output_dir")
    resolve_paths(config)
    output_dir = Path(config.latent.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    set_environment(config, output_dir)
    # after the environment: this imports verl
    from grpo_latent.verl_plugin.trainer.console import output_to_file
    from grpo_latent.verl_plugin.trainer.wandb_run import continue_run

    with output_to_file(output_dir / LOG_FILE) as console:
        _check_all(config, console)
        OmegaConf.save(config, output_dir / CONFIG_FILE, resolve=True)
        append_provenance(output_dir, config.latent.seed)
        continue_run(config, output_dir)
        console.print(f"output {output_dir}  log {LOG_FILE}")
        _run(config, console, output_dir / LOG_FILE)
        console.print(f"done: {config.trainer.default_local_dir}")


def _check_all(config: DictConfig, console: Console) -> None:
    """Checks config, rows and rewards, and says what the user should know."""
    from grpo_latent.verl_plugin.rewards.start_check import check_rewards
    from grpo_latent.verl_plugin.trainer.data_check import check_data

    if not is_attached():
        check_ray_folder(OmegaConf.select(config, "ray_kwargs.ray_init._temp_dir"))
    notes = [*check(config), *check_data(config, console), *check_rewards(config)]
    for note in notes:
        console.print(f"warning: {note}")


def resolve_paths(config: DictConfig) -> None:
    """Makes every local path of the config good for all processes (`common.paths`), in place."""
    for key in (*WRITTEN, *READ):
        value = OmegaConf.select(config, key)
        if isinstance(value, str):
            usable = for_all_nodes(value, key)
            if usable != value:  # else an interpolation stays one
                OmegaConf.update(config, key, usable)
        elif OmegaConf.is_list(value):
            for index, item in enumerate(value):
                if isinstance(item, str):
                    value[index] = for_all_nodes(item, key)
                # one of several reward functions
                elif OmegaConf.is_dict(item) and isinstance(item.get("path"), str):
                    item.path = for_all_nodes(item.path, key)


def environment(config: DictConfig, output_dir: Path) -> dict[str, str]:
    """Environment of the driver and of every worker; what the user has set stays.

    It goes into Ray's runtime environment, which dashboards and logs show: no secret belongs
    in it. A Ray of our own inherits the driver's environment; on a cluster, wandb's key comes from
    `wandb login` on its nodes or from the environment that the job is submitted with.

    Raises:
        ConfigError: VERL_PLATFORM is set, and is of another device than the config's.
    """
    wanted = {
        "VERL_FILE_LOGGER_PATH": str(output_dir / METRICS_FILE),
        "TENSORBOARD_DIR": str(output_dir / "tensorboard"),
        "WANDB_DIR": str(output_dir),
        "TOKENIZERS_PARALLELISM": "false",
        "HYDRA_FULL_ERROR": "1",
    }
    if config.trainer.device == "cpu":
        # idle OpenMP threads spin, which costs more than they give as soon as processes share
        # cores
        wanted["OMP_NUM_THREADS"] = str(config.latent.cpu_threads)
    values = {name: os.environ.get(name, value) for name, value in wanted.items()}
    values["VERL_PLATFORM"] = _platform(config.trainer.device)
    modules = [name for name in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",") if name]
    values["VERL_USE_EXTERNAL_MODULES"] = ",".join(dict.fromkeys([PLUGIN, *modules]))
    passed_on = ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_RESUME", "HF_HOME", "GRPO_LATENT_BACKBONES")
    values |= {name: os.environ[name] for name in passed_on if name in os.environ}
    return values


def _platform(device: str) -> str:
    given = os.environ.get("VERL_PLATFORM")
    if given and (given == "cpu") != (device == "cpu"):
        raise ConfigError(
            "the environment asks for another device than the config",
            where="VERL_PLATFORM",
            got=given,
            expected="cpu"
            if device == "cpu"
            else f"nvidia, or unset, for trainer.device={device}",
            fix="Unset it, or choose the group device=cpu or device=cuda.",
        )
    return given or ("cpu" if device == "cpu" else "nvidia")


def set_environment(config: DictConfig, output_dir: Path) -> None:
    os.environ.update(environment(config, output_dir))


def check(config: DictConfig) -> list[str]:
    """Everything that can be found out before any worker starts.

    Returns:
        what the user should know.

    Raises:
        ConfigError, DataError, CheckpointError.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    from grpo_latent.common import manifest
    from grpo_latent.models.treatment_parameters import initialisation_notes
    from grpo_latent.rollout.vllm.supported import check_installed
    from grpo_latent.verl_plugin.boot import compat
    from grpo_latent.verl_plugin.boot.layout import sharing_notes
    from grpo_latent.verl_plugin.boot.registration import VLLM_ROLLOUT_NAME, verify, verify_device
    from grpo_latent.verl_plugin.boot.renamed import take_new_names
    from grpo_latent.verl_plugin.trainer.config_check import check_config, check_folder
    from grpo_latent.verl_plugin.trainer.config_schema import check_schema

    check_schema(config)  # before anything reads a value of it
    compat.select_platform(config.trainer.device)
    verify("driver")
    verify_device("driver", config.trainer.device)
    notes = take_new_names(config)
    options = check_config(config)
    if config.actor_rollout_ref.rollout.name == VLLM_ROLLOUT_NAME:
        check_installed()
    _check_files(config)
    notes += options.treatment.notes() + sharing_notes(config.actor_rollout_ref, options)
    folder = config.actor_rollout_ref.model.path
    if not is_remote(folder):
        notes += manifest.check_folder(folder, options.verify_digests)
        check_folder(config, options)
        notes += initialisation_notes(options.treatment, folder, options.seed)
    try:
        validate_config(config, need_reference_policy(config), need_critic(config))
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            "verl refuses the config", got=str(error), expected="see verl's message"
        ) from error
    return notes + _notes_on_wandb(config)


def _notes_on_wandb(config: DictConfig) -> list[str]:
    """Says where a key of this process does not reach a cluster's workers, which need it."""
    logger = config.trainer.logger
    logs = "wandb" in ([logger] if isinstance(logger, str) else logger)
    has_key = "WANDB_API_KEY" in os.environ and "WANDB_API_KEY" not in submitted_variables()
    if not (logs and has_key and is_attached()) or os.environ.get("WANDB_MODE") in (
        "offline",
        "disabled",
    ):
        return []
    return [
        "WANDB_API_KEY is not sent to the cluster: run wandb login on its nodes, or submit "
        "the job with the key"
    ]


def _check_files(config: DictConfig) -> None:
    from grpo_latent.models.loading import check_is_model_folder

    for key in ("train_files", "val_files"):
        files = config.data[key]
        for path in [files] if isinstance(files, str) else files:
            if not is_remote(path) and not Path(path).is_file():
                raise DataError(
                    "no such file",
                    where=f"data.{key}",
                    got=path,
                    expected="a parquet or json file",
                )
    folder = config.actor_rollout_ref.model.path
    if not is_remote(folder):
        check_is_model_folder(folder)


def is_attached() -> bool:
    """Whether a Ray cluster is there already: inside `ray job submit`, or RAY_ADDRESS is set."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def submitted_environment() -> dict[str, Any]:
    """Ray's runtime environment of the submitted job; empty outside of one."""
    return json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})


def submitted_variables() -> dict[str, str]:
    """Environment that the submitted job was given, which reaches the job's workers anyway."""
    return submitted_environment().get("env_vars", {})


def stay_on_loopback() -> None:
    """Keeps a Ray of our own off the network.

    To be called before anything imports ray, which reads the variable on import.

    Ray replaces 127.0.0.1 by the machine's address, except where it believes that it cannot form
    clusters.
    """
    if not is_attached():
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def start_no_spare_workers() -> None:
    """Keeps a Ray of our own from starting workers, one a core, that no actor of a run will take.

    To be called before Ray starts. Those have not the run's environment, which all of its actors
    ask for, so that Ray starts a process for each actor whether or not some are idle.
    """
    if not is_attached():
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")


def ray_arguments(config: DictConfig) -> dict:
    """Arguments of `ray.init`. On a running cluster its resources are not ours to state."""
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    given = section(OmegaConf.select(config, "ray_kwargs.ray_init"), "ray_kwargs.ray_init")
    runtime_env = get_ppo_ray_runtime_env(config)
    runtime_env.update(
        {k: v for k, v in (given.pop("runtime_env", None) or {}).items() if v is not None}
    )
    own = environment(config, Path(config.latent.output_dir))
    env_vars = {**runtime_env.get("env_vars", {}), "TRANSFER_QUEUE_ENABLE": "1", **own}
    submitted = submitted_variables()  # Ray refuses to set one of them again
    runtime_env["env_vars"] = {
        name: value for name, value in env_vars.items() if name not in submitted
    }
    if HOOK not in submitted_environment():  # nor may it be set again
        runtime_env.setdefault(HOOK, f"{collector.__name__}.{collect_rarely.__name__}")
    arguments = {"runtime_env": runtime_env, "log_to_driver": True}
    if is_attached():
        return arguments
    # loopback only (see `stay_on_loopback`); token authentication is Ray's default, it makes the
    # token file itself
    return {
        # without an address, Ray would join whatever cluster runs on this machine
        "address": "local",
        "_node_ip_address": "127.0.0.1",
        "include_dashboard": False,
        **arguments,
        **given,
    }


def _run(config: DictConfig, console, log_path: Path) -> None:
    import ray
    import transfer_queue as tq
    from verl.trainer.main_ppo import TaskRunnerV1

    from grpo_latent.verl_plugin.boot import remote_errors
    from grpo_latent.verl_plugin.boot.actor_watch import ActorWatch
    from grpo_latent.verl_plugin.boot.cluster import check_files, join
    from grpo_latent.verl_plugin.boot.cluster_resources import check_resources
    from grpo_latent.verl_plugin.boot.start_queue import start_transfer_queue
    from grpo_latent.verl_plugin.trainer.console import StepPrinter
    from grpo_latent.verl_plugin.trainer.reports import follow, on_this_node, start_report_queue
    from grpo_latent.verl_plugin.trainer.trial import report_trial, try_checkpoint

    join(**ray_arguments(config))
    try:
        check_resources(config)
        check_files(config)
        if config.trainer.device != "cpu":
            # the driver may have no GPU, and must not keep one's memory
            on_gpu = ray.remote(num_gpus=1, max_calls=1)(try_checkpoint)
            report = remote_errors.get(on_gpu.remote(config), "the preflight", log_path)
            report_trial(report, console)
        board = start_report_queue()
        watch = ActorWatch()
        # beside the driver: one node less whose loss ends the run at once, and outputs of both in
        # one place
        # ray.remote, which decorates it, hides from type checkers that it has options
        placed = TaskRunnerV1.options(  # type: ignore[attr-defined]
            scheduling_strategy=on_this_node()
        )
        runner = placed.remote()
        if config.trainer.device == "cpu":  # while the runner's process imports
            report_trial(try_checkpoint(config), console)
        transfer_queue = start_transfer_queue(config)
        run_ref = runner.run.remote(config)
        with StepPrinter(console) as on_report:

            def on_wait(seconds: float) -> None:
                if transfer_queue.done():
                    transfer_queue.result()  # where it failed, the runner waits for ever
                on_report.wait(seconds)

            follow(board, run_ref, on_report, watch, log_path, on_wait)
        tq.close()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    collect_rarely()
    stay_on_loopback()
    start_no_spare_workers()
    sys.exit(main())
