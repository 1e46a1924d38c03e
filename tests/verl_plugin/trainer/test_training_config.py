"""The composed config is accepted as it is, and every unusable change of it is refused by name."""

import functools
import re
import sys
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_helpers import SLOTS, make_checkpoint
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict

from grpo_latent.common.settings import build
from grpo_latent.errors import ConfigError
from grpo_latent.latent.mechanisms import LVR, MECHANISMS
from grpo_latent.latent.treatments import LatentTerms, Mask
from grpo_latent.latent.treatments.gumbel_soft import GumbelSoft
from grpo_latent.models import tiny
from grpo_latent.train import check  # imported, it lets hydra find verl's configs
from grpo_latent.trajectory import PositionKind
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.trainer.alarm_settings import AlarmSettings
from grpo_latent.verl_plugin.trainer.config_check import check_config, check_latents

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from config_check import with_overrides  # noqa: E402

BASE = (
    "actor_rollout_ref.model.path=/model",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
)


@functools.cache
def shipped(*groups):
    """hydra reads dozens of files for it, which takes longer than all that is tested here."""
    with initialize_config_module("grpo_latent.config", version_base=None):
        return compose("grpo", overrides=[*groups, *BASE])


def composed(*overrides):
    groups = [override for override in overrides if override.startswith("device=")]
    values = [override for override in overrides if override not in groups]
    config = shipped(*groups)
    for key in re.findall(r"(?:^| )([\w.]+)=", " ".join(values)):  # others have a +, as in hydra
        section, _, name = key.rpartition(".")
        assert name in (OmegaConf.select(config, section) if section else config), key
    config = with_overrides(config, " ".join(values)) if values else deepcopy(config)
    OmegaConf.resolve(config)
    return config


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_defaults_are_usable(device):
    options = check_config(composed(f"device={device}"))
    assert options.seed == 0 and options.visibility is None
    assert LatentOptions(replay_logp_gap_bound=None).replay_logp_gap_bound is None, (
        "never stops the run"
    )


@pytest.mark.parametrize("num_gpus", [1, 4])
def test_helpers_are_as_many_as_gpus(num_gpus):
    config = composed("device=cuda", f"trainer.n_gpus_per_node={num_gpus}")
    storage = config.transfer_queue.backend.SimpleStorage
    assert config.actor_rollout_ref.rollout.agent.num_workers == num_gpus
    assert config.reward.num_workers == storage.num_data_storage_units == num_gpus


def test_the_config_file_has_the_guards_own_defaults():
    """YAML takes a key `off` or `on` for a truth value: each has to arrive by its name."""
    options = LatentOptions.from_rollout(composed().actor_rollout_ref.rollout)
    assert dict(options.alarm).keys() == asdict(AlarmSettings()).keys()
    assert build(AlarmSettings, options.alarm, "latent.alarm") == AlarmSettings()
    assert options.keep_best == LatentOptions().keep_best


@pytest.mark.parametrize("pinned", ["cpu", "cuda"])
def test_the_pinned_sets_have_what_the_loggers_need(pinned):
    lines = (Path(__file__).parents[3] / "requirements" / f"{pinned}.txt").read_text().splitlines()
    assert {"wandb", "plotly", "tensorboard"} <= {re.split(r"\W", line)[0] for line in lines}


def test_wandbs_page_is_not_missed_after_training_only(monkeypatch):
    """As where plotly is not installed."""

    def not_installed(package):
        raise ModuleNotFoundError(package)

    monkeypatch.setattr("grpo_latent.inspect.page.resources", SimpleNamespace(files=not_installed))
    config = composed()
    check_config(config)
    for loggers in (["file", "wandb"], "wandb"):
        config.trainer.logger = loggers
        with pytest.raises(ConfigError, match="plotly is not installed"):
            check_config(config)


def test_options_reach_every_process():
    """Workers get `actor_rollout_ref` only: `latent:` is in there, with the user's overrides."""
    config = composed(
        "latent.seed=5", "latent.visibility=latents_only", "latent.reward.timeout_s=3"
    )
    options = LatentOptions.from_rollout(config.actor_rollout_ref.rollout)
    assert (options.seed, options.visibility, options.reward["timeout_s"]) == (
        5,
        "latents_only",
        3,
    )
    assert config.data.seed == 5 and config.actor_rollout_ref.actor.data_loader_seed == 5


def test_treatments_reach_every_process():
    config = composed(
        "latent.treatment.name=gumbel_soft", "latent.treatment.gumbel_soft.clamp=[-1,2]"
    )
    options = LatentOptions.from_rollout(config.actor_rollout_ref.rollout)
    assert options.treatment == GumbelSoft(clamp=(-1, 2)) and options.act_kinds == {
        PositionKind.LATENT
    }
    assert options.density_gap_bound == options.replay_logp_gap_bound == 1e-3
    masked = check_config(composed())
    assert (
        masked.treatment == Mask()
        and masked.act_kinds == frozenset()
        and masked.terms == LatentTerms()
    )


def test_without_the_group_the_options_are_the_defaults():
    """Stock `verl.trainer.main_ppo` has no `latent:`."""
    assert (
        LatentOptions.from_rollout({})
        == LatentOptions()
        == LatentOptions.from_rollout({"custom": None})
    )


@pytest.mark.parametrize(
    "override, where",
    [
        ("actor_rollout_ref.rollout.n=1", "rollout.n"),
        ("actor_rollout_ref.rollout.temperature=0", "rollout.temperature"),
        ("actor_rollout_ref.rollout.name=vllm", "rollout.name"),
        ("actor_rollout_ref.rollout.tensor_model_parallel_size=2", "tensor_model_parallel_size"),
        ("actor_rollout_ref.rollout.calculate_log_probs=false", "calculate_log_probs"),
        (
            "actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent",
            "default_agent_loop",
        ),
        (
            "actor_rollout_ref.rollout.agent.agent_loop_manager_class=null",
            "agent_loop_manager_class",
        ),
        ("actor_rollout_ref.actor.strategy=fsdp", "actor.strategy"),
        ("actor_rollout_ref.ref.strategy=fsdp", "ref.strategy"),
        ("trainer.v1.trainer_mode=colocate_async", "cuts trajectories off"),
        ("trainer.v1.trainer_mode=separate_async", "a worker that replays none"),
        ("trainer.v1.trainer_mode=one_step_off", "trainer_mode"),
        (
            "data.train_batch_size=30 actor_rollout_ref.actor.ppo_mini_batch_size=32",
            "ppo_mini_batch_size",
        ),
        ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=7", "ppo_micro_batch_size_per_gpu"),
        (
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=null",
            "ppo_micro_batch_size_per_gpu",
        ),
        (
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=9",
            "log_prob_micro_batch_size_per_gpu",
        ),
        ("data.gen_batch_size=5", "gen_batch_size"),
        ("trainer.n_gpus_per_node=3", "number of ranks"),
        ("algorithm.filter_groups.enable=true", "filter_groups"),
        ("critic.enable=true", "critic.enable"),
        ("algorithm.rollout_correction.bypass_mode=true", "bypass_mode"),
        ("actor_rollout_ref.rollout.multi_turn.enable=true", "multi_turn"),
        ("actor_rollout_ref.rollout.ignore_eos=true", "ignore_eos"),
        ("reward.reward_manager.name=naive", "reward_manager"),
        ("reward.reward_model.enable=true", "reward_model.enable"),
        (
            "reward.reward_model.enable=true reward.reward_model.enable_resource_pool=true",
            "enable_resource_pool",
        ),
        ("latent.reward.on_error=drop algorithm.adv_estimator=grpo", "adv_estimator"),
        (
            "actor_rollout_ref.actor.use_kl_loss=true actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=3",
            "ref.log_prob_micro",
        ),
        ("actor_rollout_ref.model.use_fused_kernels=true", "use_fused_kernels"),
        (
            "latent.selection=plackett_luce actor_rollout_ref.model.enable_gradient_checkpointing=true",
            "model.enable_gradient_checkpointing: .*a checkpointed layer computes again",
        ),
        (
            "latent.selection=plackett_luce actor_rollout_ref.model.use_remove_padding=true",
            "model.use_remove_padding",
        ),
        ("distillation.enabled=true", "distillation.enabled"),
        (
            "actor_rollout_ref.model.lora_rank=8 actor_rollout_ref.model.lora.merge=false",
            "model.lora.merge: .*merged weights only",
        ),
        ("actor_rollout_ref.model.lora.rank=8", "lora.rank: .*FSDP2 reads model.lora_rank"),
        ("actor_rollout_ref.model.lora_adapter_path=adapter", "lora_adapter_path: .*merged"),
        (
            "actor_rollout_ref.model.lora_rank=8 "
            "+actor_rollout_ref.model.target_parameters=[experts.weight]",
            "target_parameters: .*adapters stand on linear layers",
        ),
        (
            "actor_rollout_ref.model.lora_rank=8 "
            "+actor_rollout_ref.actor.checkpoint.save_lora_only=true",
            "save_lora_only: .*lora_trains=.*would not be saved",
        ),
        ("latent.lora_trains=[head]", "latent.lora_trains"),
        ("actor_rollout_ref.actor.ulysses_sequence_parallel_size=2", "ulysses"),
        ("+data.apply_chat_template_kwargs.enable_thinking=true", "apply_chat_template_kwargs"),
        (
            "latent.visibility=latents_only actor_rollout_ref.model.use_remove_padding=true",
            "use_remove_padding",
        ),
        ("latent.cpu_threads=0", "latent.cpu_threads"),
        ("latent.dump_every=-1", "latent.dump_every"),
        ("latent.replay_logp_gap_bound=0", "replay_logp_gap_bound"),
        ("latent.rollout_timeout_s=-3", "rollout_timeout_s"),
        ("latent.rollout_timeout_s=null", "latent.rollout_timeout_s: wrong type"),
        (
            "latent.selection=plackett_luce latent.selection_temperature=null",
            "latent.selection_temperature: wrong type",
        ),
        ("latent.usage.ablations=[zero,shuffle]", "latent.usage.ablations"),
        ("latent.usage.prompts_per_batch=0", "latent.usage.prompts_per_batch"),
        ("+latent.alarm.patients=3", "latent.alarm: unknown key"),
        ("latent.alarm.rollback_on=[solved]", "latent.alarm.rollback_on: unknown value"),
        ("latent.alarm.rollback=true", "trainer.save_freq: there are no checkpoints to go back"),
        (
            "latent.alarm.rollback=true trainer.save_freq=5 "
            "actor_rollout_ref.actor.checkpoint.save_contents=[model,hf_model]",
            "checkpoint.save_contents: .*Add optimizer, extra",
        ),
        ("latent.keep_best=best", "latent.keep_best: wrong type"),
        ("+latent.vizibility=full", "vizibility"),
        ("latent.treatment.name=vlpo", "unknown treatment"),
        ("latent.treatment.name=gaussian latent.treatment.gaussian.sigma=0", "gaussian.sigma"),
        ("+latent.treatment.gaussian.width=1", "treatment.gaussian: unknown key"),
        (
            "latent.treatment.anchor_weight=1 actor_rollout_ref.actor.use_kl_loss=false",
            "anchor_weight: there is no reference",
        ),
        (
            "latent.treatment.name=gaussian latent.treatment.kl_coef=1 "
            "actor_rollout_ref.actor.use_kl_loss=false",
            "kl_coef: there is no reference",
        ),
        (
            "latent.treatment.kl_coef=1 actor_rollout_ref.actor.use_kl_loss=true",
            "latents without a density",
        ),
        (
            "latent.treatment.name=vmf latent.treatment.kl_coef=1 "
            "actor_rollout_ref.actor.use_kl_loss=false",
            "kl_coef: there is no reference",
        ),
        (
            "latent.treatment.name=gaussian algorithm.adv_estimator=gae",
            "takes its trajectory's advantage",
        ),
    ],
)
def test_unusable_configs_are_refused(override, where):
    with pytest.raises(ConfigError, match=where):
        check_config(composed(*override.split()))


def test_dropping_is_refused_where_stock_verl_has_the_options_too():
    """Stock `verl.trainer.main_ppo` has the group in the rollout's config, not on top."""
    config = composed("latent.reward.on_error=drop", "algorithm.adv_estimator=rloo")
    with open_dict(config):
        del config["latent"]
    with pytest.raises(ConfigError, match="a dropped trajectory would count as reward 0"):
        check_config(config)
    config.algorithm.adv_estimator = "grpo_latent_rloo"
    check_config(config)


VLLM = ("actor_rollout_ref.rollout.name=vllm_latent",)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_engine_vllm_is_chosen_by_its_name(device):
    config = composed(f"device={device}", *VLLM)
    check_config(config)
    checkpoint = LVR("s", "l", "e", 0, 1, 2)
    check_latents(config, checkpoint)
    with pytest.raises(ConfigError, match="latent.visibility.*rollout.name=hf_latent"):
        check_latents(config, checkpoint.replace(visibility="latents_only"))
    check_latents(composed(f"device={device}"), checkpoint.replace(visibility="latents_only"))


@pytest.mark.parametrize("mechanism", ["ilvr", "coconut", "own_slots"])
def test_vllm_runs_spans_between_texts_and_slots(mechanism):
    check_latents(composed(*VLLM), MECHANISMS[mechanism]("s", "l", "e", 0, 1, 2))


def test_image_positions_chosen_by_attention_point_to_engine_hf():
    mechanism = MECHANISMS["ivt_lr"]("s", "l", "e", 0, 1, 2, top_k_image=2)
    with pytest.raises(ConfigError, match="latent.top_k_image.*rollout.name=hf_latent"):
        check_latents(composed(*VLLM), mechanism)


@pytest.mark.parametrize("treatment", ["gaussian", "gumbel_soft", "vmf"])
def test_vllm_draws_latents(treatment):
    check_config(composed(*VLLM, f"latent.treatment.name={treatment}"))


@pytest.mark.parametrize(
    "override, where",
    [
        ("latent.visibility=latents_only", "latent.visibility"),
        ("latent.treatment.name=gaussian_head", "latent.treatment.name"),
        ("latent.selection=plackett_luce", "latent.selection"),
        ("actor_rollout_ref.rollout.load_format=dummy", "load_format"),
        ("actor_rollout_ref.rollout.data_parallel_size=2", "data_parallel_size"),
    ],
)
def test_what_vllm_cannot_do_points_to_engine_hf(override, where):
    with pytest.raises(ConfigError, match=f"{where}.*rollout.name=hf_latent"):
        check_config(composed(*VLLM, override))


def test_vllm_does_not_sleep_on_cpu():
    with pytest.raises(ConfigError, match="free_cache_engine"):
        check_config(composed(*VLLM, "actor_rollout_ref.rollout.free_cache_engine=true"))
    check_config(composed("device=cuda", *VLLM))


@pytest.mark.parametrize(
    ("build", "override", "message"),
    [
        (
            tiny.tiny_chameleon,
            "latent.steps=2",
            "model.path: its images are token ids .* got a Chameleon model",
        ),
        (tiny.tiny_qwen2_vl, "latent.treatment.name=gaussian", "slots are shared by the group"),
        (tiny.tiny_qwen2_vl, "actor_rollout_ref.actor.freeze_vision_tower=false", None),
    ],
    ids=["chameleon", "density of shared slots", "fine"],
)
def test_what_the_checkpoint_rules_out_is_refused_before_any_worker(
    build, override, message, tmp_path
):
    """IVT-LR checkpoints: `train.check` reads no weights and starts no Ray."""
    make_checkpoint(tmp_path / "model", build, **SLOTS)
    for name in ("train", "val"):
        (tmp_path / f"{name}.parquet").touch()
    paths = [f"data.{name}_files={tmp_path / name}.parquet" for name in ("train", "val")]
    config = composed(f"actor_rollout_ref.model.path={tmp_path / 'model'}", *paths, override)
    if message is None:
        assert check(config) == []
        return
    with pytest.raises(ConfigError, match=message):
        check(config)
