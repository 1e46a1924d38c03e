"""RL over the nodes of a Ray cluster: network namespaces of this machine. `make test-cluster`.

That runs `many` alone; `make test-long` all, and compares them. Each node has an address, a raylet,
an object store and CPUs of its own. Of one config, without any validation:

    one    a Ray of its own on one node, two ranks: steps 1-6
    many   by `ray job submit`: rank 0 on node 1, rank 1 on node 2, each with its rollout server;
           node 2 is unplugged in step 5
    rest   the same command on what is left, both ranks on node 1: steps 4-6
    apart  a cluster that is whole again: both ranks on node 1, the rollout server on node 2,
           steps 1-3; then node 2 is killed
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "recipes" / "cluster"), str(ROOT / "tests" / "verl_plugin")]

import namespaces  # noqa: E402
import tiny_run  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.ray]

LIMIT_S = 60.0  # from a cut to the end of the command
RUN_LIMIT_S = 600.0
TOLERANCE = 1e-6
SETTINGS = (
    "trainer.total_training_steps=6",
    "trainer.save_freq=3",
    "trainer.test_freq=-1",
    "trainer.val_before_train=false",
    "latent.usage.num_prompts=0",
    "latent.preflight.num_prompts=0",
)
CPUS = [8, 4, 4]
RAYS_OWN = ("ray::DashboardA", "ray::RuntimeEnv", "ray::JobSupervi")
RUNTIME_ENV = {"env_vars": {"OMP_NUM_THREADS": "1"}}


@pytest.fixture(scope="module", autouse=True)
def can_be_made():
    try:
        namespaces.check_available()
    except namespaces.Unavailable as reason:
        pytest.skip(f"no cluster of namespaces: {reason}")


@pytest.fixture(scope="module")
def cluster():
    with namespaces.NamespaceCluster(CPUS) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny_run.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def one(inputs, tmp_path_factory):
    """The run on one node, before a cluster is up."""
    folder = tmp_path_factory.mktemp("one")
    arguments = tiny_run.overrides(inputs, folder, *SETTINGS, "trainer.n_gpus_per_node=2")
    command = [sys.executable, "-m", "grpo_latent.train", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=RUN_LIMIT_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The working directory that jobs are submitted with: the package and a reward file."""
    folder = tmp_path_factory.mktemp("shipped")
    shutil.copytree(
        ROOT / "grpo_latent", folder / "grpo_latent", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "own_reward.py").write_text(tiny_run.REWARD)
    return folder


class Job:
    """A submitted run; `text` is what the submission printed."""

    def __init__(self, cluster, shipped, inputs, output, *more):
        self.output, self._log = output, output.parent / f"{output.name}.txt"
        ray = str(Path(sys.executable).parent / "ray")
        submit = [ray, "job", "submit", "--working-dir", str(shipped)]
        submit += ["--runtime-env-json", json.dumps(RUNTIME_ENV), "--"]
        reward = "reward.custom_reward_function.path=own_reward.py"  # each node has its own copy
        arguments = tiny_run.overrides(inputs, output, *SETTINGS, reward, *more)
        command = [*submit, sys.executable, "-m", "grpo_latent.train", *arguments]
        with open(self._log, "ab") as log:
            self.process = cluster.popen(0, command, stdout=log, stderr=subprocess.STDOUT)

    def wait_for_step(self, step):
        path = self.output / "metrics.jsonl"
        deadline = time.monotonic() + RUN_LIMIT_S
        while not path.exists() or len(path.read_text().splitlines()) < step:
            assert self.process.poll() is None and time.monotonic() < deadline, self.text[-3000:]
            time.sleep(0.1)

    def wait(self, timeout_s=RUN_LIMIT_S):
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the command still ran after {timeout_s} s: {self.text[-3000:]}")

    def loss(self):
        """The one error of a lost node: Ray prints a job's last lines twice."""
        lost = {line for line in self.text.splitlines() if line.startswith("NodeLostError: ")}
        assert len(lost) == 1, self.text[-3000:]
        return lost.pop()

    @property
    def text(self):
        return self._log.read_text()


@pytest.fixture(scope="module")
def many(cluster, shipped, inputs, tmp_path_factory):
    """The run over two nodes, one of which is lost."""
    check_refusals(cluster, inputs)
    output = tmp_path_factory.mktemp("of_many") / "many"
    job = Job(cluster, shipped, inputs, output, "trainer.nnodes=2")
    job.wait_for_step(2)
    check_who_listens_where(cluster)
    job.wait_for_step(4)
    cut = time.monotonic()
    cluster.unplug(2)
    assert job.wait(LIMIT_S) != 0
    print(f"unplugged: {time.monotonic() - cut:.1f} s")
    return job


@pytest.mark.long
def test_servers_apart_and_a_killed_node(one, shipped, inputs, tmp_path):
    """The other cut: a machine without power, whose kernel no longer answers for its sockets."""
    left = ("trainer.nnodes=1", "trainer.n_gpus_per_node=2", "latent.placement=apart")
    pool = ("actor_rollout_ref.rollout.nnodes=1", "actor_rollout_ref.rollout.n_gpus_per_node=1")
    # in front of the other tests: two clusters of one process would have the same names
    with namespaces.NamespaceCluster(CPUS) as cluster:
        job = Job(cluster, shipped, inputs, tmp_path / "apart", *left, *pool)
        job.wait_for_step(4)
        cluster.kill(2)
        cut = time.monotonic()
        assert job.wait(LIMIT_S) != 0
        print(f"killed: {time.monotonic() - cut:.1f} s")
    lost = job.loss()
    # the node may die before the driver has heard of the step that is in the metrics
    assert re.search(r"node 10\.77\.0\.3, last step [34]/6: ", lost), lost
    assert "rollout server" in lost and "training worker" not in lost
    check_equal_runs(one, job.output, range(1, 5), checkpoint=3)


def test_a_job_trains_on_two_nodes_until_one_is_lost(many):
    lost = many.loss()
    # a step's metrics are on disk a moment before the driver has heard of it
    assert re.search(r"node 10\.77\.0\.3, last step [34]/6: ", lost), lost
    assert "rollout server, training worker" in lost
    metrics = tiny_run.metrics_of(many.output)
    assert all(metrics[step]["latent/replay_logp_gap_max"] < 1e-4 for step in range(1, 5))
    parts = {name for name in tiny_run.states_of(many.output, 3) if name.startswith("model_")}
    assert parts == {f"model_world_size_2_rank_{rank}.pt" for rank in (0, 1)}


@pytest.mark.long
def test_steps_over_nodes_are_those_on_one_and_go_on_without_the_lost_one(
    one, many, cluster, shipped, inputs
):
    check_equal_runs(one, many.output, range(1, 5), checkpoint=3)
    left = ("trainer.nnodes=1", "trainer.n_gpus_per_node=2")
    rest = Job(cluster, shipped, inputs, many.output, *left)
    assert rest.wait() == 0, rest.text[-3000:]
    check_equal_runs(one, rest.output, range(1, 7), checkpoint=6)


ASK = """
import sys
import ray
from omegaconf import OmegaConf
from grpo_latent.errors import PreflightError
from grpo_latent.verl_plugin.boot.cluster import check_files
ray.init(address="auto", log_to_driver=False)
model, reward, output = sys.argv[1:]
config = {"latent": {"output_dir": output}, "actor_rollout_ref": {"model": {"path": model}}}
config["reward"] = {"custom_reward_function": {"path": reward}}
try:
    check_files(OmegaConf.create(config))
except PreflightError as error:
    print("refused", error)
else:
    print("ready")
"""


def check_refusals(cluster, inputs):
    """What one node lacks, has otherwise or would keep is found before any worker starts."""
    model, reward = str(inputs / "model"), str(inputs / "reward.py")
    own, output = cluster.local / "reward.py", str(inputs / "out")
    for node, text in enumerate(("def f(): 1", "def f(): 1", "def f(): 2")):
        (cluster.folder / f"node{node}" / "local" / "reward.py").write_text(text)

    def ask(*arguments):
        command = [sys.executable, "-c", ASK, *arguments]
        done = cluster.run(0, command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip().splitlines()[-1]

    (cluster.folder / "other_token").write_text("beef" * 16)
    other = ["env", f"RAY_AUTH_TOKEN_PATH={cluster.folder / 'other_token'}"]
    submit = [*other, str(Path(sys.executable).parent / "ray"), "job", "submit", "--", "true"]
    denied = cluster.run(0, submit, capture_output=True, text=True)
    assert denied.returncode != 0 and "uth" in denied.stdout + denied.stderr

    assert ask(model, reward, output) == "ready"
    answer = ask(model, str(own), str(cluster.local / "out"))
    assert answer.startswith("refused nodes 10.77.0.2, 10.77.0.3: the job cannot run on this")
    for problem in (
        f"10.77.0.2: output folder {cluster.local / 'out'} is not the driver's",
        f"10.77.0.3: not the driver's content: {own}",
        f"10.77.0.3: output folder {cluster.local / 'out'} is not the driver's",
    ):
        assert problem in answer, answer


def check_who_listens_where(cluster):
    """A worker of the run listens once on all interfaces, for Ray; else on its node's address.

    Its node has no interface but the cluster's and `lo`.
    """
    seen = set()
    for node, address in enumerate(cluster.addresses):
        on_all = Counter()
        for name, pid, host in cluster.listeners(node):
            # with the first letters of its class, as the kernel keeps a name
            if not name.startswith("ray::") or name in RAYS_OWN:
                continue
            seen.add(name)
            if host in ("*", "0.0.0.0"):
                on_all[name, pid] += 1
            else:
                assert host == address, (name, host)
        assert set(on_all.values()) == {1}, on_all
    assert {"ray::WorkerDict", "ray::TransferQu", "ray::TaskRunner"} <= seen, seen


def check_equal_runs(first, second, steps, checkpoint):
    """Same tokens and rewards in each step; parameters of both ranks within `TOLERANCE`."""
    for step in steps:
        rows = [
            [json.loads(line) for line in (run / f"rollouts/step_{step}.jsonl").open()]
            for run in (first, second)
        ]
        for name in ("id", "prompt_ids", "token_ids", "kinds", "reward"):
            assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]], (step, name)
        assert len(rows[0]) == 16
    states = [tiny_run.states_of(run, checkpoint) for run in (first, second)]
    assert states[0].keys() == states[1].keys() and len(states[0]) == 6  # of two ranks
    compared = 0
    for name, state in states[0].items():
        if name.startswith("model_"):
            for key, tensor in state.items():
                a, b = (as_local(t) for t in (tensor, states[1][name][key]))
                torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE, msg=f"{name} {key}")
                compared += 1
    assert compared > 40


def as_local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
