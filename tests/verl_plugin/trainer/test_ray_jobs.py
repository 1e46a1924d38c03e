"""Training by the commands that a user gives, with the tiniest model. Slow.

world size 1, a Ray head on loopback with token authentication:
    D  `ray job submit -- python -m grpo_latent.train`, steps 1-3, wandb offline
    E  stock `python -m verl.trainer.main_ppo`, resumed from D, steps 4-6
    F  `python -m grpo_latent.train` on a Ray of its own, steps 1-6: equal to D + E
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
import tiny_run
from engine_helpers import free_port
from omegaconf import DictConfig, OmegaConf, open_dict

from grpo_latent.common.provenance import read_provenance
from grpo_latent.verl_plugin.trainer import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.long]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny_run.write_inputs(tmp_path_factory.mktemp("inputs"))


def run_command(command, cwd, **env):
    env = {**tiny_run.clean_environment(), **env}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_observed(command, cwd) -> tuple[str, set[tuple[str, str]]]:
    """What a command prints, and who of its processes listens on which address, all the while."""
    listening = set()
    with open(cwd / "out.txt", "w+") as out:
        process = psutil.Popen(
            command,
            cwd=cwd,
            env=tiny_run.clean_environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            for member in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    listening |= {
                        (member.name(), c.laddr.ip.removeprefix("::ffff:"))
                        for c in member.net_connections("inet")
                        if c.status == psutil.CONN_LISTEN
                    }
            time.sleep(0.5)
        out.seek(0)
        text = out.read()
    assert process.returncode == 0, text[-3000:]
    return text, listening


def wait_for_jobs(
    script: str, dashboard: str, folder: Path, auth: dict, timeout_s: float = 180
) -> None:
    """Waits until the cluster takes jobs, some seconds after its head answers.

    ("No available agent to submit job".)
    """
    deadline = time.monotonic() + timeout_s
    command = [script, "job", "submit", "--address", dashboard, "--", "true"]
    while True:
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, **auth}, capture_output=True, text=True
        )
        if done.returncode == 0:
            return
        assert time.monotonic() < deadline, done.stdout + done.stderr
        time.sleep(1)


class RayHead:
    """A Ray head on loopback, with its own token, in the foreground of a process of ours.

    `ray stop` would not do: it ends every Ray of this user on this machine.
    """

    def __init__(self, folder: Path):
        token = folder / "token"
        token.write_text("f00d" * 16)
        self.auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.script = str(Path(sys.executable).parent / "ray")
        port, dashboard, agent = free_port(), free_port(), free_port()
        self.address, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        self.process = subprocess.Popen(
            [
                self.script,
                "start",
                "--head",
                "--block",
                "--node-ip-address=127.0.0.1",
                f"--port={port}",
                "--num-cpus=4",
            ]
            + [
                f"--dashboard-port={dashboard}",
                "--dashboard-host=127.0.0.1",
                "--disable-usage-stats",
            ]
            + [f"--dashboard-agent-listen-port={agent}"],
            cwd=folder,
            env={**tiny_run.clean_environment(), **self.auth},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_for_jobs(self.script, self.dashboard, folder, self.auth)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self.process.terminate()  # the command then ends the processes that it has started
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def ray_head(tmp_path, local_ray):
    ray.shutdown()  # the other one: two at a time are too much for two cores
    head = RayHead(tmp_path)
    yield head
    head.stop()


def test_jobs_stock_trainer_and_own_ray_continue_each_other(ray_head, inputs, tmp_path):
    job, own, cwd = tmp_path / "job", tmp_path / "own", tmp_path / "cwd"
    cwd.mkdir()
    # the gap bound then also says that rollout and replay have the same attention
    masked = "latent.visibility=latents_only"
    arguments = tiny_run.overrides(
        inputs, job, masked, "trainer.total_training_steps=3", "trainer.logger=[file,wandb]"
    )
    check_a_job_without_the_token_is_denied(ray_head, arguments)
    out = run_command(
        [*submit(ray_head, WANDB_MODE="offline", OMP_NUM_THREADS="1"), *arguments],
        cwd,
        **ray_head.auth,
    )
    assert "succeeded" in out and out.count("step 3/3") == 1 and "TaskRunner" not in out
    check_board(job)
    assert checkpoint.read_tracker(job / "checkpoints") == 3
    assert (job / "train.log").stat().st_size > 1000
    assert len(read_provenance(job)) == 1

    go_on_by_the_stock_trainer(ray_head, tiny_run.make_config(inputs, job, masked), job, cwd)
    ray_head.stop()

    own_args = tiny_run.overrides(inputs, own, masked)
    out, listening = run_observed([sys.executable, "-m", "grpo_latent.train", *own_args], cwd)
    # Ray's processes, TransferQueue's actors, torch's store of the training worker
    assert len(listening) > 5 and {host for _, host in listening} == {"127.0.0.1"}, listening
    lines = [line for line in out.splitlines() if line.startswith("step") and "ALARM" not in line]
    assert [line.split()[1] for line in lines] == [f"{s}/6" for s in range(7)]
    tiny_run.assert_equal_runs(own, job, range(1, 7), checkpoint=6)
    shutil.rmtree(own)


def submit(head: RayHead, **env_vars: str) -> list[str]:
    """`ray job submit` of `grpo_latent.train`, without its arguments."""
    command = [head.script, "job", "submit", "--address", head.dashboard]
    if env_vars:
        command += ["--runtime-env-json", json.dumps({"env_vars": env_vars})]
    return [*command, "--", sys.executable, "-m", "grpo_latent.train"]


def check_a_job_without_the_token_is_denied(head: RayHead, arguments: list[str]) -> None:
    denied = subprocess.run(
        [*submit(head), *arguments],
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "beef" * 16},
        capture_output=True,
        text=True,
    )
    # 401/403, whatever ray calls it
    assert denied.returncode != 0 and "uth" in denied.stdout + denied.stderr


def check_board(job: Path) -> None:
    (board,) = (job / "wandb").glob("offline-run-*")
    logged = [
        path.relative_to(board / "files" / "media").parts[:3]
        for path in board.rglob("media/**/*.*")
    ]
    for kind, name in (("table", "rollouts"), ("table", "groups"), ("html", "inspector")):
        found = [parts for parts in logged if parts[0] == kind and name in str(parts)]
        assert found, (kind, name, logged)


def go_on_by_the_stock_trainer(head: RayHead, config: DictConfig, job: Path, cwd: Path) -> None:
    """`python -m verl.trainer.main_ppo` on the config that the job had."""
    env = {
        "VERL_USE_EXTERNAL_MODULES": "grpo_latent.verl_plugin",
        "VERL_PLATFORM": "cpu",
        "VERL_FILE_LOGGER_PATH": str(job / "metrics.jsonl"),
    }
    with open_dict(config):
        config.ray_kwargs.ray_init = {
            "address": head.address,
            "runtime_env": {"env_vars": dict(env)},
        }
    OmegaConf.save(config, cwd / "stock.yaml")
    stock = ["-m", "verl.trainer.main_ppo", "--config-dir", ".", "--config-name", "stock"]
    run_command([sys.executable, *stock], cwd, **env, **head.auth)
