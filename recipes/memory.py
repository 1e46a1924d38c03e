"""Bytes that a GPU needs in training, counted from a model's shapes.

Under FSDP2, beside what is there all the time (weights, gradients, AdamW's moments, a teacher, all in
shards but frozen vision, and the root's weights, which are gathered for the whole of a step), one
moment is the worst:

    loss     activations of all layers, logits
    layer    a layer's backward begins: its weights are gathered and the next one's are on their
             way, the gradients of the one before are being reduced, in float32
    reduce   it ends: so do its activations, but its gradients are there as well; of layers that run
             several times (over a cache) those of all were seen at once
    root     embeddings and head: their gradients, and these in float32 to be reduced

`sft/common/sharding.py` says what is the root's. The gradients' shards are there from the start, as
from a step's second micro-batch on. Left out: kernels' scratch space, fragmentation, the vision
tower's activations, what CUDA and NCCL have of their own (1 to 2 GB). gloo, which copies what it
gathers and reduces, needs two layers more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from grpo_latent.models.adapter import ModelAdapter

# of the gradients that are reduced, of weights and moments
FLOAT32 = 4
ADAMW = 2  # moments


@dataclass(frozen=True)
class Shapes:
    """Numbers of weights, and sizes of the decoder.

    Attributes:
        layer, head: trained weights of one decoder layer, and of the language-model head.
        root: trained weights that are of no decoder layer; `head` is among them.
        frozen: of the vision tower.
    """

    layer: int
    root: int
    head: int
    frozen: int
    num_layers: int
    hidden: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, model) -> Shapes:
        """Of a model whose frozen parameters are frozen already, on any device."""
        decoder = ModelAdapter(model).decoder
        text = model.config.get_text_config()
        trained, layers = _num_trained(model), [_num_trained(layer) for layer in decoder.layers]
        return cls(
            layer=max(layers),
            root=trained - sum(layers),
            head=model.get_output_embeddings().weight.numel(),
            frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
            num_layers=len(layers),
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            vocabulary=model.get_output_embeddings().weight.shape[0],
        )

    @property
    def trained(self) -> int:
        return self.root + self.layer * self.num_layers


def _num_trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Load:
    """What one process computes at a time.

    Attributes:
        positions: of a micro-batch's forward, latents and images among them.
        labels: positions with logits.
        num_bytes: of a number in computation: 2 in bfloat16.
        cached: positions of forwards over a cache, whose layers keep all in any case: prompt slots,
            and latents that are fed back with a gradient through them.
        looked_back: positions before each of these forwards, in sum: attention with a mask keeps
            their keys and values, of all heads, for its own backward.
    """

    positions: int
    labels: int
    num_bytes: int
    is_checkpointed: bool
    cached: int = 0
    looked_back: int = 0

    def of_layer(self, shapes: Shapes) -> int:
        """Bytes a position that a decoder layer keeps for its backward.

        Queries, keys, values, attention's output and that in order; gate, its activation, up and
        their product; of two norms what is scaled and the result, and their input, in float32.
        """
        inner = 5 * shapes.hidden + 4 * shapes.intermediate + 4 * shapes.hidden
        return self.num_bytes * inner + FLOAT32 * 2 * shapes.hidden

    def kept(self, shapes: Shapes, residual_bytes: int) -> float:
        """Bytes that each decoder layer keeps from the forward to its backward.

        Args:
            residual_bytes: of a number in the sums between layers.
        """
        whole = self.of_layer(shapes)
        kept = residual_bytes * shapes.hidden if self.is_checkpointed else whole
        over_cache = whole * self.cached + 2 * self.num_bytes * shapes.hidden * self.looked_back
        return kept * self.positions + over_cache

    def in_backward(self, shapes: Shapes) -> float:
        """Bytes of the layer whose backward runs: what is computed again, gradients in the MLP."""
        again = self.of_layer(shapes) if self.is_checkpointed else 0
        gradients = 2 * self.num_bytes * shapes.intermediate
        return again * self.positions + gradients * max(self.positions, self.cached)

    def logits(self, shapes: Shapes) -> int:
        """In the computation's type, in float32, their log-softmax and its gradient."""
        return (self.num_bytes + 3 * FLOAT32) * shapes.vocabulary * self.labels


def step_bytes(shapes: Shapes, load: Load) -> float:
    """Bytes of the worst moment of a step in shards, beside what is there all the time."""
    gathered, layers = load.num_bytes, shapes.num_layers
    kept, running = load.kept(shapes, load.num_bytes), load.in_backward(shapes)
    head = gathered * shapes.head  # its gradient waits for the root's
    waiting = gathered * shapes.layer * (layers - 1) if load.cached else 0
    begins = (2 * gathered + FLOAT32) * shapes.layer + head
    ends = (3 * gathered + FLOAT32) * shapes.layer + head
    worst_of_layers = max(
        layers * kept + 2 * gathered * shapes.layer + head + running,  # of the last layer
        (layers - 1) * kept + begins + running,
        (layers - 2) * kept + ends,
    )
    return max(
        layers * kept + load.logits(shapes) + gathered * shapes.layer,
        worst_of_layers + waiting,
        (gathered + FLOAT32) * shapes.root + FLOAT32 * shapes.layer,
    )


def sharded_bytes(
    shapes: Shapes, load: Load, world_size: int, num_teachers: int = 0
) -> dict[str, float]:
    """Bytes a rank of FSDP2 at the peak of a step, by part; `total` is their sum."""
    shard = FLOAT32 * shapes.trained / world_size
    parts = {
        "weights": shard + FLOAT32 * shapes.frozen,
        "gradients": shard,
        "optimizer": ADAMW * shard,
        "teacher": num_teachers * shard,
        "gathered": load.num_bytes * shapes.root,
        "step": step_bytes(shapes, load),
    }
    return parts | {"total": sum(parts.values())}


def replicated_bytes(model: nn.Module, load: Load, num_teachers: int = 0) -> dict[str, float]:
    """Bytes a rank of DistributedDataParallel, by part; `total` is their sum.

    Gradients stand twice (its buckets). Autocast keeps bfloat16 copies of float32 linear layers
    until the forward ends.
    """
    shapes = Shapes.of(model)
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    copied = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and module.weight.dtype == torch.float32
    )
    # the embeddings train in float32, and so are the sums between layers
    kept = shapes.num_layers * load.kept(shapes, FLOAT32)
    parts = {
        "weights": sum(size for size, _ in sizes),
        "gradients": 2 * trained,
        "optimizer": ADAMW * trained,
        "teacher": num_teachers * trained,
        "autocast": load.num_bytes * copied if load.num_bytes < FLOAT32 else 0,
        "step": kept + max(load.in_backward(shapes), load.logits(shapes)),
    }
    return parts | {"total": sum(parts.values())}


def grpo_bytes(
    shapes: Shapes, load: Load, world_size: int, engine: float, guest: float = 0
) -> dict[str, float]:
    """Bytes a GPU of verl's FSDP2 actor beside a rollout engine, by part.

    All but the gathered weights is sharded, frozen vision too. The reference's weights are in host
    memory (verl's forward-only engines). `total` is that of the larger phase: in the update the
    engine sleeps, in the rollout the actor's shards stay.

    Args:
        engine: bytes that the engine takes while it is awake.
        guest: of another model on the GPU while it is: engine hf, which measures the use of latents.
    """
    shard = FLOAT32 * shapes.trained / world_size
    frozen = FLOAT32 * shapes.frozen / world_size
    parts = {
        "weights": shard + frozen,
        "gradients": shard,
        "optimizer": ADAMW * shard,
        "step": load.num_bytes * shapes.root + step_bytes(shapes, load),
        "engine": engine + guest,
    }
    states = parts["weights"] + parts["optimizer"]
    update = states + parts["gradients"] + parts["step"]
    return parts | {"total": max(update, states + parts["engine"])}
