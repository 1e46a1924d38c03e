"""The table of keys against the installed verl, and against every config that is shipped.

What it refuses is `tests/benchmarks/test_config_check.py`.
"""

import dataclasses
import inspect
import sys
import types
import typing
from pathlib import Path

import pytest
import ray
import torch
from drawn import REPEAT, drawing
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.utils import get_class
from omegaconf import OmegaConf, open_dict

import grpo_latent.train  # noqa: F401  (lets hydra find verl's configs)
from grpo_latent.common.kinds import kind_of
from grpo_latent.common.references import references
from grpo_latent.errors import ConfigError
from grpo_latent.evaluate import check_values
from grpo_latent.sft.settings import SFTSettings
from grpo_latent.verl_plugin.trainer import keys_of_ours, keys_of_verl
from grpo_latent.verl_plugin.trainer.config_check import check_config
from grpo_latent.verl_plugin.trainer.config_schema import check_schema, schema

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

from config_check import with_overrides  # noqa: E402

RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
# verl fills them in while it runs, or they are other engines' than FSDP's
SET_BY_VERL = {
    "engine",
    "model_config",
    "global_batch_info",
    "local_path",
    "local_hf_config_path",
    "local_tokenizer_path",
    "hf_config",
    "generation_config",
    "tokenizer",
    "processor",
    "architectures",
    "qat",
}


# null is verl's for "none chosen", where here one always is
NEVER_NULL = ("actor_rollout_ref.rollout.name", "actor_rollout_ref.model.target_modules")
# what recipes leave to the command line
FILLED = (
    "model.path",
    "data.train_files",
    "data.val_files",
    "data.max_response_length",
    "trainer.output_dir",
    "actor_rollout_ref.model.path",
)


def compose_shipped(name, *overrides):
    with initialize_config_module("grpo_latent.config", version_base=None):
        return compose(name, overrides=list(overrides))


@pytest.fixture(scope="module")
def grpo():
    return compose_shipped("grpo", "actor_rollout_ref.model.path=/model")


@pytest.fixture(scope="module")
def sft():
    return compose_shipped("sft", "trainer.output_dir=out", "model.path=m", "data.train_files=f")


@pytest.fixture(scope="module")
def evaluation():
    return compose_shipped(
        "evaluate", "model.path=m", "data.val_files=f", "data.max_response_length=8"
    )


def check_sft(config):
    settings = SFTSettings.from_dict(OmegaConf.to_container(config, resolve=True))
    settings.latent.make({token: 7 + i for i, token in enumerate(settings.latent.tokens)})
    settings.training_arguments()


@pytest.fixture(scope="module")
def fields(grpo):
    return list(verl_fields(grpo))


def verl_fields(config):
    """(key, type) of each field of the dataclasses behind verl's groups that are in use."""

    def of(node, where):
        if "_target_" in node:
            kind = get_class(node["_target_"])
            hints = typing.get_type_hints(kind)
            for field in dataclasses.fields(kind):
                if not field.name.startswith("_") and field.name not in SET_BY_VERL:
                    yield f"{where}.{field.name}", hints[field.name]
        for name in node:
            child = node._get_node(name)
            if OmegaConf.is_dict(child) and not OmegaConf.is_missing(node, name):
                yield from of(child, f"{where}.{name}")

    for group in ("actor_rollout_ref", "algorithm", "reward.reward_manager"):
        yield from of(OmegaConf.select(config, group), group)


def test_every_field_that_verl_reads_is_known(fields):
    """Else `+key=value` would be refused where verl takes it."""
    known, reference = set(), schema().reference

    def walk(node, where):
        for name, value in node.items():
            known.add(f"{where}{name}")
            if isinstance(value, dict):
                walk(value, f"{where}{name}.")

    walk(reference, "")
    missing = [key for key, _ in fields if key not in known and schema().kind(key) is None]
    # what verl's workers set themselves, what profilers read, and all of training in the reference
    runtime = ("use_", "max_token_len", "micro_batch", "infer_", "ppo_infer_", "router_replay")
    others = (".profiler.", "actor_rollout_ref.ref.")
    assert [
        key
        for key in missing
        if not key.rpartition(".")[2].startswith(runtime) and not any(o in key for o in others)
    ] == []


def test_types_are_verls(fields):
    """A float may be one, and null where verl says so."""
    wrong = []
    reference = OmegaConf.create(schema().reference)
    for key, hint in fields:
        kind = schema().kind(key)
        default = OmegaConf.select(reference, key)
        if kind is None and default is None:
            continue
        kind = kind or kind_of(default)
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        options = typing.get_args(hint) or options
        if hint is float and not kind.is_typed(0.5):
            wrong.append(f"{key}: {kind.words()} for a float")
        takes_null = kind.or_null or kind.is_typed(None) or key in NEVER_NULL
        if type(None) in options and not takes_null:
            wrong.append(f"{key}: null is refused")
    assert wrong == []


def test_names_are_verls_and_rays():
    from verl.trainer.ppo.core_algos import kl_penalty
    from verl.utils.torch_dtypes import PrecisionType
    from verl.utils.tracking import Tracking

    assert set(keys_of_verl.LOGGERS) == set(Tracking.supported_backend)
    parameters = set(inspect.signature(ray.init).parameters)
    assert set(keys_of_ours.RAY_INIT) == parameters - {"kwargs"}
    zero = torch.zeros(2)
    for name in keys_of_verl.KL_PENALTIES:
        assert kl_penalty(zero, zero, name).shape == (2,)
    for name in keys_of_verl.DTYPE_NAMES:
        assert isinstance(PrecisionType.to_dtype(name), torch.dtype)


def test_no_row_stands_for_a_key_that_nobody_reads():
    """Of rows that verl's config does not list, verl's code or ours has the name."""
    import verl

    sources = [*Path(verl.__file__).parent.rglob("*.py"), *(ROOT / "grpo_latent").rglob("*.py")]
    texts = [path.read_text() for path in sources if path.name != "keys_of_verl.py"]
    reference = OmegaConf.create(schema().reference)
    for key in keys_of_ours.KEYS:
        name = key.rpartition(".")[2]
        listed = OmegaConf.select(reference, key.rpartition(".")[0] or key)
        if "*" in key or key.startswith("ray_kwargs") or (listed is not None and name in listed):
            continue
        assert any(name in text for text in texts), key


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_passes(path):
    with initialize_config_dir(str(path.parent), version_base=None):
        searched = ["hydra.searchpath=[pkg://grpo_latent.config]"]
        config = compose(path.stem, overrides=searched)
    with open_dict(config):
        for key in FILLED:
            section, _, name = key.rpartition(".")
            node = OmegaConf.select(config, section)
            if node is not None and OmegaConf.is_missing(node, name):
                OmegaConf.update(config, key, 64 if "length" in key else "given")
    if "actor_rollout_ref" in config:
        check_config(config)
    elif "ablations" in config:
        check_values(config)
    elif "method" in config:
        SFTSettings.from_dict(OmegaConf.to_container(config, resolve=True)).training_arguments()


@pytest.mark.parametrize("method", ["lvr", "ilvr_stage1", "ilvr_stage2", "ivt_lr", "coconut"])
def test_every_method_of_sft_passes(method, tmp_path):
    given = (f"trainer.output_dir={tmp_path}", "model.path=m", "data.train_files=f")
    check_sft(compose_shipped("sft", f"method={method}", *given))


@pytest.mark.parametrize(
    "mistake",
    [
        "trainer.learning_rate=nan",
        "trainer.learning_rate=-1",
        "trainer.learning_rate=fast",
        "trainer.per_device_train_batch_size=0",
        "trainer.gradient_accumulation_steps=0",
        "trainer.max_steps=0",
        "trainer.save_steps=0",
        "trainer.lr_scheduler_type=cosin",
        "trainer.save_strategy=sometimes",
        "trainer.bf16=maybe",
        "+trainer.learning_rat=1",
        "+trainer.logging_first_step=maybe",
        "+trainer.adam_beta2=1.5",
        "model.lora.r=0",
        "model.dtype=float8",
        "model.attn_implementation=flash",
        "data.max_rows=0",
        "data.max_length=-1",
        "data.train_files=[]",
        "data.cache_bytes=-1",
        "loss.latent_weight=nan",
        "loss.latent_loss=mss",
        "latent.steps=-1",
        "latent.latent_end_threshold=nan",
        "schedule.horizon_steps=0",
        "data=f",
    ],
)
def test_mistakes_of_sft_are_named(sft, mistake):
    check_sft(sft)
    key = mistake.split("=")[0].lstrip("+")
    with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
        check_sft(with_overrides(sft, mistake))


@pytest.mark.parametrize(
    "mistake",
    [
        "model.dtype=float8",
        "data.max_response_length=0",
        "data.max_rows=0",
        "data.val_files=[]",
        "latent.cpu_threads=0",
        "latent.max_batch_rows=none",
        "latent.exit=step",
        "rollout.n=-1",
        "rollout.temperature=nan",
        "rollout.top_p=0",
        "verdict.margin=nan",
        "verdict.level=2",
        "ablations=zero",
        "decodings=[4]",
        "leak_prompts=-1",
        "prompts_per_batch=0",
        "+rollout.temprature=1",
        "+ablation=zero",
        "seed=x",
        "output=3",
    ],
)
def test_mistakes_of_evaluation_are_named(evaluation, mistake):
    check_values(evaluation)
    with pytest.raises(ConfigError, match=mistake.split("=")[0].lstrip("+")):
        check_values(with_overrides(evaluation, mistake))


def test_a_reference_that_leads_nowhere_is_named(grpo):
    config = with_overrides(grpo, "trainer.experiment_name=${latent.sed}")
    with pytest.raises(ConfigError, match="experiment_name: does not resolve"):
        check_schema(config)


@pytest.mark.parametrize("count", [8, pytest.param(None, marks=pytest.mark.long)])
def test_a_value_that_others_take_over_is_told_of_the_key_that_was_typed(grpo, count):
    """Of keys that verl's config or ours refers to: so many of them, or each."""
    taken = references(OmegaConf.to_container(grpo, resolve=False))
    sources = sorted(set(taken.values()) - set(taken))
    certain = {"actor_rollout_ref.rollout.n", "data.max_prompt_length"}
    assert len(sources) > 20 and certain < set(sources)
    if count is not None:
        sources = sorted({*drawing().sample(sources, count), *certain})
    told = {}
    for key in sources:
        config = with_overrides(grpo, f"{key}=four_words")
        try:
            check_schema(config)
        except ConfigError as error:
            told[key] = error.where
    # others are texts that may be any
    assert certain <= set(told) and (count or certain != set(told))
    assert {key: where for key, where in told.items() if where != key} == {}, count and REPEAT


def test_stock_verls_config_is_read_where_it_has_the_options(grpo):
    config = with_overrides(grpo, "latent.cpu_threads=0")
    stock = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    del stock["latent"]
    with pytest.raises(ConfigError, match="latent.cpu_threads"):
        check_schema(stock)
    stock.actor_rollout_ref.rollout.custom.latent.cpu_threads = 2
    check_schema(stock)
