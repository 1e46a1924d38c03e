"""Tiny checkpoints, recorded trajectories and engine batches, shared by this folder's tests."""

import os
import socket

import torch
import torch.distributed as dist
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry

from grpo_latent.backbones.registry import backbone_of_processor
from grpo_latent.latent.mechanisms import LVR, MECHANISMS, Mechanism
from grpo_latent.models import tiny
from grpo_latent.models.groups import number_groups
from grpo_latent.models.loading import load_latent_model, save_latent_model
from grpo_latent.models.plain import add_latents
from grpo_latent.models.replay import replay
from grpo_latent.models.sequences import collate
from grpo_latent.models.sources import latent_log_densities
from grpo_latent.rollout.hf import HFRolloutEngine
from grpo_latent.rollout.protocol import RolloutRequest, SamplingParams
from grpo_latent.rollout.sampling import trajectory_seed
from grpo_latent.verl_plugin.boot.options import LatentOptions
from grpo_latent.verl_plugin.boot.registration import register_all
from grpo_latent.verl_plugin.worker.finite import GROUPS

TEMPERATURE = 0.9
WORDS = ("read", "red", "blue", "?")


def make_mechanism(tokenizer, mechanism="lvr", **changes) -> Mechanism:
    """Of LVR's tokens, whatever the mechanism."""
    tokens = {f"{role}_token": LVR.published_tokens[role] for role in ("start", "latent", "end")}
    defaults = {"steps": 3, "max_spans": 2} if mechanism == "lvr" else {"steps": 3}
    return MECHANISMS[mechanism].from_tokens(tokenizer.get_vocab(), **tokens, **defaults | changes)


# two slots, in front of each two image embeddings; `top_k_image=0` and a text model make Coconut
SLOTS = dict(mechanism="ivt_lr", steps=2, top_k_image=2)


def make_checkpoint(folder, build=tiny.tiny_qwen2_5_vl, **changes) -> str:
    """A random tiny model whose policy opens spans often enough to be tested."""
    model, tokenizer, processor = build(words=WORDS)
    mechanism = make_mechanism(tokenizer, **changes)
    torch.manual_seed(
        4
    )  # of head and end vector: with these the embedded rows open spans greedily, too
    mechanism.attach(model)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head.mul_(4.0)  # random logits are nearly flat; steeper ones make a wrong latent visible
        head[mechanism.start_id] = 2 * head.abs().mean(0)
    save_latent_model(folder, model, tokenizer, processor, mechanism)
    return str(folder)


def make_gate_checkpoint(folder, build=tiny.tiny_qwen2_5_vl, **settings) -> str:
    """A plain model with steeper logits that was given HRPO's gate, as RL is begun with it."""
    model, tokenizer, processor = build(WORDS, latent_tokens=())
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4.0)
        model.get_input_embeddings().weight.mul_(4.0)
    plain = folder / "plain"
    for part in (model, processor or tokenizer, tokenizer):
        part.save_pretrained(plain)
    settings = dict(answer_token="<answer>") | settings
    add_latents(str(plain), folder / "model", "hybrid_gate", settings)
    return str(folder / "model")


def make_requests(loaded, num_prompts=3, group_size=2, seed=0) -> list[RolloutRequest]:
    """Prompts of different lengths, each with its own image if the model has vision."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    requests = []
    for row in range(num_prompts):
        text = " ".join(["read", "red", "?"][: 1 + row % 3])
        content = text
        images = None
        if loaded.processor is not None:
            content = [{"type": "text", "text": text}, {"type": "image"}]
        prompt = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False
        )
        if loaded.processor is None:
            ids = loaded.tokenizer(prompt).input_ids
        else:
            pixels = torch.randint(
                0, 255, (28, 28 + 14 * (row % 2), 3), generator=generator, dtype=torch.uint8
            )
            inputs = loaded.processor(
                text=[prompt], images=[Image.fromarray(pixels.numpy())], return_tensors="pt"
            )
            ids = inputs["input_ids"][0].tolist()
            images = backbone_of_processor(loaded.processor).image_inputs(inputs, loaded.processor)
        seeds = [trajectory_seed(seed, 0, row, i) for i in range(group_size)]
        requests.append(RolloutRequest(torch.tensor(ids), seeds, images, group_id=str(row)))
    return requests


def roll_out(folder, visibility="full", treatment=None, selection_temperature=None, **kwargs):
    """(loaded model, trajectories, images of each, replayed log-probs of each completion).

    With a treatment that acts, the log-densities stand at the latents. The replay here is the
    package's own on the plain Hugging Face model, run before verl patches its classes.
    """
    loaded = load_latent_model(folder, overrides={"visibility": visibility}, treatment=treatment)
    requests = make_requests(loaded, **kwargs)
    engine = HFRolloutEngine(
        loaded.model,
        loaded.mechanism,
        loaded.eos_ids,
        treatment=treatment,
        selection_temperature=selection_temperature,
    )
    groups = engine.generate(requests, SamplingParams(max_new_tokens=14, temperature=TEMPERATURE))
    trajectories = [t for group in groups for t in group]
    images = [r.images for r, group in zip(requests, groups, strict=True) for _ in group]
    adapter = engine.adapter
    with torch.no_grad():
        batch = collate(trajectories, images, adapter, visibility)
        log_probs_BT, hidden_BTH = replay(adapter, batch, temperature=TEMPERATURE)
        if engine.treatment.is_action:
            log_probs_BT += latent_log_densities(
                adapter, batch, hidden_BTH, treatment, TEMPERATURE
            )
    rows = [
        log_probs_BT[i, len(t.prompt_ids) :][: len(t.token_ids)]
        for i, t in enumerate(trajectories)
    ]
    positions = [
        row_positions(adapter, t, image) for t, image in zip(trajectories, images, strict=True)
    ]
    return loaded, trajectories, images, rows, positions


def row_positions(adapter, trajectory, images):
    """int64 [L] or, for mRoPE, [4, L] with text positions first, as in verl's agent loop."""
    ids = torch.cat([trajectory.prompt_ids, trajectory.token_ids])[None]
    positions = adapter.position_ids(ids, torch.ones_like(ids, dtype=torch.bool), images)
    if not adapter.has_mrope:
        return positions[0]
    return torch.cat([torch.arange(ids.shape[1])[None], positions[:, 0]])


def make_batch(trajectories, images, positions, adapter, **meta):
    """The TensorDict that verl's workers get from TransferQueue."""
    rows, mm_inputs = [], []
    for t, image, position_ids in zip(trajectories, images, positions, strict=True):
        mask = t.response_mask().long()
        row = {
            "prompts": t.prompt_ids,
            "responses": t.token_ids,
            "input_ids": torch.cat([t.prompt_ids, t.token_ids]),
            **t.columns(adapter.prompt_kinds(t.prompt_ids)),
            "response_mask": mask,
            "loss_mask": mask,
            "position_ids": position_ids,
        }
        rows.append(row)
        pixels = (
            {}
            if image is None
            else {"pixel_values": image.pixel_values, "image_grid_thw": image.image_grid_thw}
        )
        mm_inputs.append(pixels)
    fields = {
        name: torch.nested.as_nested_tensor([r[name] for r in rows], layout=torch.jagged)
        for name in rows[0]
    }
    if positions[0].ndim == 2:
        fields["position_ids"] = tu.nested_tensor_from_tensor_list(positions, ragged_idx=2)
    fields[GROUPS] = torch.tensor(number_groups([t.group_id for t in trajectories]))
    meta = {
        "temperature": TEMPERATURE,
        "compute_loss": False,
        "calculate_entropy": False,
        "pad_token_id": 0,
        **meta,
    }
    batch = tu.get_tensordict(fields, meta)
    from tensordict.tensorclass import NonTensorStack

    if any(mm_inputs):
        batch["multi_modal_inputs"] = NonTensorStack(*mm_inputs)
    return batch


def start_process_group(rank=0, world_size=1, store=None):
    """Lets the ranks meet over gloo.

    Args:
        store: path of a file that is not there yet; None for one rank. A port would have to be
            chosen before the ranks have imported torch, and may be another's by then.
    """
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1"
    )
    if dist.is_initialized():
        return
    meeting = dist.HashStore() if store is None else dist.FileStore(store, world_size)
    dist.init_process_group("cpu:gloo", store=meeting, rank=rank, world_size=world_size)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def make_engine(
    folder,
    packed=False,
    forward_only=False,
    freeze_vision=False,
    dtype="fp32",
    micro=2,
    lr=1e-2,
    checkpointing=False,
    lora=None,
    fsdp_size=-1,
    reshards=True,
    **options,
):
    """verl's way to an engine, without Ray.

    Args:
        lora: settings of verl's model config, such as `dict(lora_rank=4)`.
        reshards: False keeps gathered weights after a forward.
    """
    register_all()
    os.environ["VERL_ENGINE_VENDOR"] = "latent"
    model_config = HFModelConfig(
        path=folder,
        use_remove_padding=packed,
        enable_gradient_checkpointing=checkpointing,
        override_config={"attn_implementation": "sdpa"},
        lora={"merge": True},
        **lora or {},
    )
    engine_config = FSDPEngineConfig(
        strategy="fsdp2",
        fsdp_size=fsdp_size,
        reshard_after_forward=reshards,
        forward_only=forward_only,
        use_torch_compile=False,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=micro,
        infer_micro_batch_size_per_gpu=micro,
        mixed_precision={"param_dtype": dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
    )
    engine = EngineRegistry.new(
        "language_model",
        "fsdp2",
        model_config=model_config,
        engine_config=engine_config,
        optimizer_config=None
        if forward_only
        else FSDPOptimizerConfig(lr=lr, total_training_steps=10, clip_grad=1e6),
        checkpoint_config=CheckpointConfig(
            save_contents=["model", "optimizer", "extra", "hf_model"]
        ),
    )
    engine.configure(LatentOptions.from_mapping(options), freeze_vision)
    engine.initialize()
    return engine


def lay_out(batch, packed=False, micro=2, **settings):
    """Tells the engine how to cut the batch; further settings of a batch, such as its size."""
    tu.assign_non_tensor(
        batch,
        use_remove_padding=packed,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=micro,
        use_fused_kernels=False,
        **settings,
    )
    return batch


def infer(engine, batch, packed=False, micro=2):
    """Log-probs of each row, label-aligned over its completion."""
    lay_out(batch, packed, micro)
    with engine.eval_mode(disable_auto_offload=True):
        output = engine.infer_batch(batch)
    rows = output["model_output"]["log_probs"].unbind()
    prompt_lengths = batch["prompts"].offsets().diff().tolist()
    return [row[length - 1 : -1] for row, length in zip(rows, prompt_lengths, strict=True)]


def gap(rows, expected, trajectories) -> float:
    """Largest difference over actions."""
    pairs = zip(rows, expected, trajectories, strict=True)
    return max((a - b)[t.response_mask()].abs().max().item() for a, b, t in pairs)
