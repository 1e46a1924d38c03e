"""Paths, environment and old names in a config, before any worker starts; without Ray."""

import json
import os
import pickle
from pathlib import Path

import pytest
import ray
from engine_helpers import make_checkpoint
from omegaconf import OmegaConf
from ray.exceptions import RayTaskError
from tiny_run import make_config

from grpo_latent import train
from grpo_latent.common.provenance import read_provenance
from grpo_latent.errors import CheckpointError, ConfigError, PreflightError
from grpo_latent.inspect.payload import SECRET
from grpo_latent.train import check, environment, ray_arguments, resolve_paths, set_environment
from grpo_latent.verl_plugin.boot import remote_errors, renamed
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.boot.registration import MANAGER_PATH
from grpo_latent.verl_plugin.trainer.config_check import check_config, check_folder


@pytest.fixture
def clean(monkeypatch):
    """Without what this process may have inherited."""
    for name in (
        "RAY_ADDRESS",
        "RAY_JOB_CONFIG_JSON_ENV_VAR",
        "VERL_PLATFORM",
        "WANDB_API_KEY",
        "WANDB_MODE",
    ):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_every_path_of_the_config_is_local_and_absolute_or_remote(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.chdir(tmp_path)
    config = make_config(tmp_path, tmp_path)
    config.latent.output_dir, config.latent.dump_dir = "out", "s3://bucket/rollouts"
    config.data.train_files, config.data.val_files = (
        ["~/a.parquet", "hdfs://b.parquet"],
        "gs://c.parquet",
    )
    config.actor_rollout_ref.model.path = "~/model"
    config.reward.custom_reward_function.path = "reward.py"
    config.latent.reward.functions = [{"path": "~/r.py"}, {"path": "pkg://reward.digits"}]
    config.trainer.default_local_dir, config.trainer.resume_from_path = "/abs", "~/global_step_3"
    resolve_paths(config)
    assert (
        config.latent.output_dir == str(tmp_path / "out")
        and config.latent.dump_dir == "s3://bucket/rollouts"
    )
    assert config.data.train_files == ["/home/user/a.parquet", "hdfs://b.parquet"]
    assert (
        config.data.val_files == "gs://c.parquet"
        and config.actor_rollout_ref.model.path == "/home/user/model"
    )
    assert config.reward.custom_reward_function.path == str(tmp_path / "reward.py")
    assert [f.path for f in config.latent.reward.functions] == [
        "/home/user/r.py",
        "pkg://reward.digits",
    ]
    assert (
        config.trainer.default_local_dir == "/abs"
        and config.trainer.resume_from_path == "/home/user/global_step_3"
    )
    assert config.data.custom_cls.path.startswith("pkg://")
    before = OmegaConf.to_container(config)
    resolve_paths(config)
    assert OmegaConf.to_container(config) == before


def test_remote_checkpoints_of_any_kind_are_left_to_the_workers(tmp_path):
    """`gs://` passed one of two rules only, and ended in an error of the hub's."""
    config = make_config(tmp_path, tmp_path, "actor_rollout_ref.model.path=gs://bucket/model")
    for name in ("train", "val"):
        (tmp_path / f"{name}.parquet").touch()
    assert check(config) == []


def damage(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage("config.json", "{"), "config.json cannot be read"),
        (damage("config.json", '{"model_type": "no_such_model"}'), "config.json cannot be read"),
        (damage("tokenizer.json", '{"version": "1.0"}'), "the tokenizer cannot be read"),
        (damage("tokenizer_config.json", "["), "the tokenizer cannot be read"),
        (damage("latent_config.json", "{"), "not valid JSON"),
    ],
)
def test_a_damaged_folder_is_an_error_of_the_checkpoint(tmp_path, change, message):
    make_checkpoint(tmp_path / "model")
    config = make_config(tmp_path, tmp_path)
    check_folder(config, LatentOptions())
    change(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        check_folder(config, LatentOptions())


def test_modules_of_adapters_are_known_by_last_names(tmp_path):
    """Files say model.layers where the model says model.language_model.layers."""
    make_checkpoint(tmp_path / "model")
    config = make_config(tmp_path, tmp_path)
    model = config.actor_rollout_ref.model
    model.lora_rank = 4
    for asked in (
        ["q_proj"],
        ["language_model.layers.0.self_attn.q_proj"],
        r".*language_model\.layers\.\d+\.self_attn\.q_proj",
    ):
        model.target_modules = asked
        check_folder(config, LatentOptions())
    model.target_modules = ["q_proj", "nothing_such"]
    with pytest.raises(ConfigError, match="no such module in the model; got nothing_such"):
        check_folder(config, LatentOptions())


def test_no_secret_enters_rays_runtime_environment(tmp_path, clean):
    """Dashboards and logs show it."""
    for name in (
        "WANDB_API_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "MY_PASSWORD",
        "HUGGING_FACE_HUB_TOKEN",
    ):
        clean.setenv(name, "sesame")
    clean.setenv("WANDB_MODE", "offline")
    config = make_config(tmp_path, tmp_path)
    for address in (None, "127.0.0.1:6379"):
        if address:
            clean.setenv("RAY_ADDRESS", address)
        arguments = ray_arguments(config)
        env_vars = arguments["runtime_env"]["env_vars"]
        assert "sesame" not in json.dumps(arguments)
        assert not [name for name in env_vars if SECRET.search(name) or name.endswith("_TOKEN")]
        assert env_vars["WANDB_MODE"] == "offline"


def test_a_key_that_a_cluster_does_not_get_is_told(tmp_path, clean):
    make_checkpoint(tmp_path / "model")
    config = make_config(tmp_path, tmp_path)
    for name in ("train", "val"):
        (tmp_path / f"{name}.parquet").touch()
    config.trainer.logger = ["file", "wandb"]
    clean.setenv("WANDB_API_KEY", "sesame")
    assert check(config) == [], "a Ray of our own inherits it"
    clean.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    (note,) = check(config)
    assert "wandb login" in note and "sesame" not in note
    clean.setenv(
        "RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {"WANDB_API_KEY": "sesame"}}}'
    )
    assert check(config) == []


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cpu", None, "cpu"),
        ("cpu", "cpu", "cpu"),
        ("cuda", None, "nvidia"),
        ("cuda", "amd", "amd"),
    ],
)
def test_the_users_platform_stays(tmp_path, clean, device, given, expected):
    if given:
        clean.setenv("VERL_PLATFORM", given)
    assert (
        environment(make_config(tmp_path, tmp_path, f"device={device}"), tmp_path)["VERL_PLATFORM"]
        == expected
    )


@pytest.mark.parametrize("address", [None, "127.0.0.1:6379"])
def test_only_a_ray_of_our_own_starts_no_spare_workers(clean, address):
    """That Ray heeds the variable, the release that is installed says by its name."""
    name = "RAY_prestart_worker_first_driver"
    clean.delenv(name, raising=False)
    if address:
        clean.setenv("RAY_ADDRESS", address)
    train.start_no_spare_workers()
    assert os.environ.pop(name, None) == (None if address else "0")
    raylet = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"
    assert b"prestart_worker_first_driver" in raylet.read_bytes()


@pytest.mark.parametrize(("device", "given"), [("cpu", "nvidia"), ("cuda", "cpu")])
def test_a_platform_of_another_device_is_refused(tmp_path, clean, device, given):
    clean.setenv("VERL_PLATFORM", given)
    with pytest.raises(ConfigError, match=f"VERL_PLATFORM.* got {given}"):
        set_environment(make_config(tmp_path, tmp_path, f"device={device}"), tmp_path)
    assert os.environ["VERL_PLATFORM"] == given


def test_each_start_of_a_run_says_where_it_was(tmp_path, monkeypatch):
    """A resumed run may be on another machine than it was begun on."""
    for name in ("set_environment", "_check_all", "_run"):
        monkeypatch.setattr(train, name, lambda *args: None)
    config = make_config(tmp_path, tmp_path / "out")
    for seed in (3, 4):
        config.latent.seed = seed
        train.train(config)
    records = read_provenance(tmp_path / "out")
    assert [record["seed"] for record in records] == [3, 4] and records[0]["processor"]


OLD = (
    "data.custom_cls.path=pkg://grpo_latent.verl_plugin.dataset",
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class="
    "grpo_latent.verl_plugin.agent_loop.LatentAgentLoopManager",
)


def test_configs_of_yesterday_load(tmp_path):
    make_checkpoint(tmp_path / "model")
    for name in ("train", "val"):
        (tmp_path / f"{name}.parquet").touch()
    config, today = make_config(tmp_path, tmp_path, *OLD), make_config(tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=f"not a manager for latents.*expected {MANAGER_PATH}"):
        check_config(config)
    notes = check(config)
    assert len(notes) == 2 and all("is called" in note for note in notes)
    assert config == today and check(config) == []


def test_the_new_names_exist():
    from verl.utils.import_utils import load_class_from_fqn, load_extern_object

    names = renamed.RENAMED
    (dataset,) = names["data.custom_cls.path"].values()
    assert load_extern_object(dataset, "LatentDataset").__name__ == "LatentDataset"
    (manager,) = names["actor_rollout_ref.rollout.agent.agent_loop_manager_class"].values()
    assert manager == MANAGER_PATH
    assert load_class_from_fqn(manager).__name__ == "LatentAgentLoopManager"


def raising(cause):
    """`ray.get` of a task that raised `cause`, as Ray hands it over."""

    def get(reference):
        error = RayTaskError("check_checkpoint", "Traceback …\nlast line", cause)
        raise error.as_instanceof_cause()

    return get


def test_the_cause_of_a_failed_task_is_raised_itself(monkeypatch, capsys):
    cause = PreflightError("the policy opens no span", where="preflight", fix="Train longer.")
    monkeypatch.setattr(ray, "get", raising(cause))
    with pytest.raises(PreflightError) as caught:
        remote_errors.get(None, "the preflight", "train.log")
    assert not isinstance(caught.value, RayTaskError) and str(caught.value) == str(cause)
    assert pickle.loads(pickle.dumps(caught.value)).fix == "Train longer."
    assert "last line" in capsys.readouterr().out, "the log has the worker's traceback"
    monkeypatch.setattr(ray, "get", raising(MemoryError("no room")))
    with pytest.raises(RuntimeError, match=r"the preflight failed: .*; see train\.log") as caught:
        remote_errors.get(None, "the preflight", Path("train.log"))
    assert not isinstance(caught.value, RayTaskError)
