"""Images through TransferQueue once a group: bytes counted, and the numbers that they had a row.

TransferQueue's own encoding, without its processes; the real engine. That a run passes them on,
test_training.py shows.
"""

import engine_helpers as helpers
import pytest
import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from test_two_ranks import actor_loss
from transfer_queue.utils.serial_utils import decode, encode
from verl.utils import tensordict_utils as tu

from grpo_latent.errors import LatentMismatchError
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.verl_plugin.worker import group_images
from grpo_latent.verl_plugin.worker.finite import KEYS, NUMBERS, PARTITION
from grpo_latent.verl_plugin.worker.group_images import IMAGES, GroupImages

NUM_GROUPS, GROUP_SIZE, MICRO = 3, 4, 6
# groups in no order, torn over two ranks and over micro-batches; the first rows of groups anywhere
ORDER = [5, 0, 9, 4, 1, 11, 2, 8, 3, 6, 10, 7]


class Queue:
    """One column in TransferQueue; what a read sends is counted."""

    def __init__(self, rows):
        self.rows, self.reads, self.num_bytes = rows, [], 0

    def kv_batch_get(self, keys, partition_id, select_fields):
        assert partition_id == "train" and select_fields == [IMAGES]
        self.reads.append(keys)
        frames = encode([self.rows[key] for key in keys])
        self.num_bytes += sum(memoryview(frame).nbytes for frame in frames)
        return TensorDict({IMAGES: NonTensorStack(*decode(frames))}, batch_size=len(keys))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = helpers.make_checkpoint(tmp_path_factory.mktemp("model"))
    return folder, helpers.roll_out(folder, num_prompts=NUM_GROUPS, group_size=GROUP_SIZE)


def batch_of(rolled, rows):
    """Rows of the whole batch, with a row's images in the row, as verl has them."""
    loaded, trajectories, images, log_probs, positions = rolled
    pick = lambda values: [values[i] for i in rows]  # noqa: E731
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    batch = helpers.make_batch(
        pick(trajectories), pick(images), pick(positions), adapter, calculate_entropy=True
    )
    nested = lambda values: torch.nested.as_nested_tensor(values, layout=torch.jagged)  # noqa: E731
    batch["old_log_probs"] = nested(pick(log_probs))
    batch["ref_log_prob"] = nested([p - 0.1 for p in pick(log_probs)])
    masks = [trajectories[i].response_mask().float() for i in rows]
    batch["advantages"] = nested(
        [(1 - 0.2 * i) * mask for i, mask in zip(rows, masks, strict=True)]
    )
    return helpers.lay_out(batch, micro=MICRO, global_batch_size=len(ORDER))


def keys_of_all():
    return [f"uid_{i // GROUP_SIZE}_{i % GROUP_SIZE}_0" for i in range(len(ORDER))]


def without_images(batch, rows, keys=None):
    """The same rows as the trainer sends them; the queue that has what they lack."""
    of_group = {i // GROUP_SIZE: each for i, each in zip(rows, images_of(batch), strict=True)}
    del batch[IMAGES]
    keys = keys or keys_of_all()
    batch[NUMBERS] = torch.tensor(rows)
    tu.assign_non_tensor(batch, **{KEYS: " ".join(keys), PARTITION: "train"})
    return Queue(
        {
            key: of_group.get(i // GROUP_SIZE, {}) if i % GROUP_SIZE == 0 else {}
            for i, key in enumerate(keys)
        }
    )


def images_of(batch):
    return [getattr(each, "data", each) for each in batch[IMAGES]]


def num_bytes(inputs):
    return sum(tensor.nbytes for each in inputs for tensor in each.values())


@pytest.mark.parametrize("share", [ORDER, ORDER[:6], ORDER[6:]], ids=["one", "first", "second"])
def test_a_group_is_fetched_once_a_step(recorded, monkeypatch, share):
    """By a rank with all rows, and by each of two; old, ref and two mini-batches of an update."""
    whole = batch_of(recorded[1], share)
    a_row = images_of(whole)
    queue = without_images(whole, share)
    monkeypatch.setattr(group_images, "tq", queue)
    images = GroupImages()
    groups = {i // GROUP_SIZE for i in share}
    once = num_bytes({id(each): each for each in queue.rows.values()}.values())
    for part in (whole, whole, *tu.chunk_tensordict(whole, 2)):  # verl's mini-batches
        images.add_to(part)
    (keys,) = queue.reads
    assert sorted(keys) == [f"uid_{group}_0_0" for group in sorted(groups)]
    assert once <= queue.num_bytes < once + 2_000
    # in the rows, as it was, each of the three passes got that much
    assert num_bytes(a_row) * len(groups) >= once * len(groups) and num_bytes(a_row) > 1.9 * once
    for got, expected in zip(images_of(whole), a_row, strict=True):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got)
    rows = images_of(whole)
    assert len({row["pixel_values"].data_ptr() for row in rows}) == len(groups)


def test_a_new_batch_takes_the_place_of_the_old_one(recorded, monkeypatch):
    images = GroupImages()
    for names in ("a", "b", "a"):
        batch = batch_of(recorded[1], ORDER)
        keys = [f"{names}{key}" for key in keys_of_all()]
        queue = without_images(batch, ORDER, keys)
        monkeypatch.setattr(group_images, "tq", queue)
        images.add_to(batch)
        assert len(queue.reads) == 1 and len(images._inputs) == NUM_GROUPS


def test_rows_without_names_are_refused(recorded):
    batch = batch_of(recorded[1], ORDER)
    with pytest.raises(LatentMismatchError, match="without the names of its trajectories"):
        GroupImages().add_to(batch)


@pytest.mark.parametrize("shares", [True, False], ids=["shared", "alone"])
def test_the_engine_gets_the_same_numbers(recorded, gloo, monkeypatch, shares):
    """Scores and gradients, to the bit, of an engine whose batches lack their images."""
    folder, rolled = recorded
    found = []
    for is_once in (False, True):
        engine = helpers.make_engine(folder, micro=MICRO, share_prompt=shares)
        old, update = batch_of(rolled, ORDER), batch_of(rolled, ORDER)
        if is_once:
            engine.group_images = GroupImages()
            queue = [without_images(batch, ORDER) for batch in (old, update)][0]
            monkeypatch.setattr(group_images, "tq", queue)
        with engine.eval_mode(disable_auto_offload=True):
            output = engine.infer_batch(old)["model_output"]
        with engine.train_mode(disable_auto_offload=True):
            engine.optimizer_zero_grad()
            loss = engine.forward_backward_batch(update, actor_loss())["loss"]
            named = engine.module.named_parameters()
            grads = {n: p.grad.full_tensor().clone() for n, p in named if p.grad is not None}
        scores = {name: output[name].values() for name in ("log_probs", "entropy")}
        found.append({**scores, **grads, "loss": torch.tensor(loss)})
        assert any("visual" in name and grad.abs().max() > 0 for name, grad in grads.items())
    a_row, once = found
    assert a_row.keys() == once.keys() and len(queue.reads) == 1
    assert all(torch.equal(a_row[name], once[name]) for name in a_row)
