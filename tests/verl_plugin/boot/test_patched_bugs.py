"""Every bug that is worked around is still in the installed verl.

A failure here is good news: the work-around can go.

Stock modules are loaded anew beside the ones that this process may have patched already. Not
covered: what verl's vLLM backend is patched for, which only shows where vLLM runs.
"""

import importlib
import importlib.util
import inspect
import json
import sys
import warnings
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from grpo_latent.models import tiny
from grpo_latent.verl_plugin.boot import compat

GONE = "the bug is gone: delete the patch ({}) and this test"


def stock(name: str):
    """A module as it is on disk, whatever was replaced in the imported one."""
    source = importlib.import_module(name).__file__
    package, _, last = name.rpartition(".")
    spec = importlib.util.spec_from_file_location(f"{package}._stock_{last}", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def rows_survive(fix) -> bool:
    """Whether [4, L] rows of equal length come out of `fix` as they were."""
    rows = [torch.arange(4 * 5).reshape(4, 5) + 100 * i for i in range(3)]
    for arrived in (torch.nested.as_nested_tensor(rows, layout=torch.jagged), torch.stack(rows)):
        data = {"position_ids": arrived}
        try:
            fix(data)
            # what the engine does with them: nested rows of the length of the ids
            found = [row.clone() for row in data["position_ids"].unbind()]
            lengths = data["position_ids"].offsets().diff().tolist()
        except Exception:  # however it breaks
            return False
        if lengths != [5, 5, 5] or not all(
            torch.equal(a, b) for a, b in zip(found, rows, strict=True)
        ):
            return False
    return True


def text_only_micro_batches_pass(module) -> bool:
    model = tiny.tiny_qwen2_5_vl(["red"])[0].model
    ids = torch.tensor([[1, 2, 3]])
    try:
        embeds, _ = module._get_input_embeds(model, ids, torch.ones_like(ids))
    except AttributeError as error:
        assert "mean" in str(error), error
        return False
    return embeds.shape[:2] == ids.shape


def history_survives(module, folder, monkeypatch) -> bool:
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 1, "data": {}}\n')
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(path))
    logger = module.FileLogger("project", "experiment")
    logger.log({"x": 1.0}, 2)
    logger.finish()
    return len(path.read_text().splitlines()) == 2


def other_processors_load(module, folder) -> bool:
    model, _, processor = tiny.tiny_chameleon(["red"])
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = module.hf_processor(str(folder))
    assert loaded is not None or any(
        "Unsupported processor type" in str(item.message) for item in caught
    )
    return loaded is not None


def runs_no_code_of_a_folder(module, tmp_path, monkeypatch) -> bool:
    """Whether the reward worker leaves a tokenizer's own module alone."""
    folder, flag = tmp_path / module.__name__, tmp_path / f"{module.__name__}.ran"
    tiny.tiny_qwen3(["red"])[1].save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["own.Own", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(flag)!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(module, "load_reward_manager", lambda *args, **kwargs: None)
    config = OmegaConf.create(
        {
            "actor_rollout_ref": {"model": {"tokenizer_path": None, "path": str(folder)}},
            "reward": {"reward_model": {"enable": False}},
        }
    )
    worker = SimpleNamespace(config=config, reward_router_address=None)
    with suppress(Exception):  # whether it then has a tokenizer is another question
        module.RewardLoopWorker._init_reward_fn(worker)
    return not flag.exists()


CHECKS = {
    "processors of other families": (
        "verl.utils.tokenizer.tokenizer",
        lambda module, folder, _: other_processors_load(module, folder),
    ),
    "equal-length mRoPE rows": (
        "verl.utils.tensordict_utils",
        lambda module, *_: rows_survive(module.maybe_fix_3d_position_ids),
    ),
    "text-only micro-batch of a vision model": (
        "verl.models.transformers.qwen2_vl",
        lambda module, *_: text_only_micro_batches_pass(module),
    ),
    "jsonl metrics on resume": ("verl.utils.tracking", history_survives),
    "code in the folder of a tokenizer": (
        "verl.experimental.reward_loop.reward_loop",
        runs_no_code_of_a_folder,
    ),
}


def test_every_patch_has_a_test_here():
    assert set(CHECKS) == set(compat._PATCHES)


@pytest.mark.parametrize("name", CHECKS)
def test_stock_verl_has_the_bug_and_the_patch_mends_it(name, tmp_path, monkeypatch):
    module_name, behaves = CHECKS[name]
    assert not behaves(stock(module_name), tmp_path, monkeypatch), GONE.format(
        f"compat._PATCHES[{name!r}]"
    )
    compat.apply_patches()
    assert behaves(importlib.import_module(module_name), tmp_path, monkeypatch), (
        "the patch does not mend it"
    )


# ---- verl on CPU --------------------------------------------------------------------------------


def test_verl_names_a_backend_that_torch_refuses(monkeypatch):
    asked = []
    module = stock("verl.utils.distributed")
    monkeypatch.setattr(module, "get_device_name", lambda: "cpu")
    monkeypatch.setattr(module, "get_nccl_backend", lambda: "gloo")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda **options: asked.append(options["backend"])
    )
    module.initialize_global_process_group_ray()
    gone = GONE.format("compat.init_cpu_process_group")
    assert asked == ["cpu:gloo,cpu:gloo"], gone
    refused = True
    try:
        torch.distributed.distributed_c10d.BackendConfig(torch.distributed.Backend(asked[0]))
        refused = False
    except ValueError:
        pass
    assert refused, gone


def test_verl_pins_the_memory_of_a_reference_on_cpu():
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    source = inspect.getsource(FSDPEngine._build_fsdp_module)
    condition = "self.engine_config.offload_policy or self.engine_config.forward_only"
    assert condition in source and "CPUOffloadPolicy(pin_memory=True)" in source, GONE.format(
        "compat.without_pinned_offload"
    )


def test_verls_pools_are_of_gpus():
    from verl.single_controller.ray import base

    manager = base.ResourcePoolManager({"pool": [2]}, {})
    made = SimpleNamespace()
    original = base.RayResourcePool
    try:
        base.RayResourcePool = lambda **options: made.__dict__.update(options)
        try:
            manager.create_resource_pool()
        except Exception:  # it goes on to ask Ray for what it has
            pass
    finally:
        base.RayResourcePool = original
    assert made.use_gpu is True, GONE.format("compat.cpu_pool_manager")


def test_verl_has_no_register_for_rollout_adapters():
    from verl.workers.rollout import base

    found = [name for name in dir(base) if "register" in name.lower()]
    assert not found, GONE.format(f"compat.register_rollout_adapter; verl has {found}")


def test_verls_workers_do_not_freeze_the_vision_tower():
    """verl has `actor.freeze_vision_tower` in its config and reads it nowhere; our engine does."""
    from verl.workers.config import actor
    from verl.workers.engine.fsdp import transformer_impl

    assert "freeze_vision_tower" in inspect.getsource(actor)
    assert "freeze_vision_tower" not in inspect.getsource(transformer_impl), GONE.format(
        "worker.freeze_vision"
    )


def test_verl_casts_merged_adapters_to_bfloat16():
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    source = inspect.getsource(FSDPEngine._merged_lora_per_tensor_param)
    assert ".to(torch.bfloat16" in source, GONE.format("WeightsEngine.get_per_tensor_param")


def test_verl_exports_adapted_models_under_pefts_names():
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    source = inspect.getsource(FSDPCheckpointManager.save_checkpoint)
    assert (
        "state_dict = get_fsdp_full_state_dict(self.model" in source and "merge" not in source
    ), GONE.format("compat.exporting")


def test_verls_reference_of_adapters_keeps_what_else_has_trained():
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    source = inspect.getsource(FSDPEngine.disable_adapter)
    assert "return self.module.disable_adapter()" in source, GONE.format(
        "WeightsEngine.disable_adapter"
    )


def test_verl_writes_its_tracker_in_place():
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    source = inspect.getsource(PPOTrainer._save_checkpoint)
    assert 'open(local_latest_checkpointed_iteration, "w")' in source, GONE.format(
        "trainer.checkpoint.write_tracker"
    )


def test_verls_checkpoints_know_nothing_of_latents():
    from verl.utils.checkpoint import fsdp_checkpoint_manager

    assert "latent" not in inspect.getsource(fsdp_checkpoint_manager), GONE.format(
        "WeightsEngine.save_checkpoint"
    )
