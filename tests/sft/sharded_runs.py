"""Runs of SFT in one of several processes: torchrun … tests/sft/sharded_runs.py FOLDER RUNS.json

RUNS.json holds the overrides of each run; they are made one after the other, "@" stands for FOLDER.
Beside its own files a run leaves the gradients of each step, whole, and how many whole tensors each
process had at a time when the model was exported; with "profile", memory.json instead. Without a
launcher, a run with shards is the last: its process becomes the one process of a group.
"""

import gc
import json
import os
import sys
import weakref
from collections import defaultdict, deque
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from run_cases import compose_sft, settings_from  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch._C._profiler import _EventType  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from grpo_latent.models.adapter import ModelAdapter  # noqa: E402
from grpo_latent.sft import run as sft_run  # noqa: E402
from grpo_latent.sft.common.callbacks import ProgressBar  # noqa: E402


class RecordsGradients(ProgressBar):
    """In the progress bar's place."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        whole = {
            name.removeprefix("module."): (
                gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            )
            for name, gradient in gradients.items()
        }
        if state.is_world_process_zero:
            path = Path(args.output_dir) / f"gradients-{state.global_step + 1}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in whole.items()}, path)


class RecordsMemory(ProgressBar):
    """In the progress bar's place: the most bytes of tensors at once, and what was computed.

    The profiler does not report when tensors from before it are freed: here none is while a model
    in shards trains. Of data parallelism's first buckets, which nobody sees, neither is reported.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        gc.collect()
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in gc.get_objects()
            if issubclass(type(tensor), torch.Tensor) and not issubclass(type(tensor), DTensor)
        }
        self.before = sum(storages.values())
        self.load = dict.fromkeys(("positions", "labels", "cached", "looked_back"), 0)
        ModelAdapter(model).decoder.register_forward_pre_hook(self.count, with_kwargs=True)
        model.get_output_embeddings().register_forward_pre_hook(self.count_labels)
        activities = [torch.profiler.ProfilerActivity.CPU]
        self.profile = torch.profiler.profile(activities=activities, profile_memory=True)
        self.profile.__enter__()

    def count(self, module, args, kwargs):
        if torch.is_grad_enabled():
            rows, length, _ = kwargs["inputs_embeds"].shape
            is_cached = kwargs.get("past_key_values") is not None
            self.load["cached" if is_cached else "positions"] += rows * length
            num_before = kwargs["attention_mask"].shape[-1] - length
            self.load["looked_back"] += rows * num_before

    def count_labels(self, module, args):
        self.load["labels"] += args[0].shape[:-1].numel()

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        self.profile.__exit__(None, None, None)
        most = self.before + most_allocated(self.profile.profiler.kineto_results)
        path = Path(args.output_dir) / f"memory-{args.process_index}.json"
        path.write_text(json.dumps({"most": most, "load": self.load}))


def most_allocated(results):
    """The largest sum over the allocator's events, without copies that gloo makes of its own."""
    changes = []
    events = [(root, False) for root in results.experimental_event_tree()]
    while events:
        event, is_gloos = events.pop()
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            changes.append((event.start_time_ns, fields.ptr, fields.alloc_size, is_gloos))
        is_gloos |= event.name.startswith(("c10d::", "gloo:"))
        events += [(child, is_gloos) for child in event.children]
    total = most = 0
    alive = defaultdict(deque)
    for _, place, size, is_gloos in sorted(changes):
        if size > 0:
            alive[place].append(is_gloos)
        elif alive[place]:
            is_gloos = alive[place].popleft()
        if not is_gloos:
            total += size
            most = max(most, total)
    return most


def count_whole(gather):
    """`gathered_weights` that says how many of its tensors were alive at once."""

    def counted(model, is_main):
        gathered, most = [], 0
        full_tensor = DTensor.full_tensor

        def counting(self):
            nonlocal most
            whole = full_tensor(self)
            gathered.append(weakref.ref(whole))
            most = max(most, sum(reference() is not None for reference in gathered))
            return whole

        DTensor.full_tensor = counting
        try:
            return gather(model, is_main)
        finally:
            DTensor.full_tensor = full_tensor
            counts[os.environ.get("RANK", "0")] = (most, len(gathered))

    return counted


counts: dict[str, tuple[int, int]] = {}


def be_a_group():
    """Makes of this process, which had none, a group of one."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    AcceleratorState._reset_state(reset_partial_state=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def main(folder: str, runs: str) -> None:
    sft_run.gathered_weights = count_whole(sft_run.gathered_weights)
    for run in json.loads(Path(runs).read_text()):
        method = run.pop("method")
        sft_run.ProgressBar = RecordsMemory if run.pop("profile", False) else RecordsGradients
        if run["trainer.fsdp"] and "RANK" not in os.environ:
            be_a_group()
        values = {
            name: value.replace("@", folder + "/") if isinstance(value, str) else value
            for name, value in run.items()
        }
        sft_run.run_sft(settings_from(compose_sft(values, overrides=[f"method={method}"])))
        out = Path(values["trainer.output_dir"])
        for rank, count in counts.items():
            (out / f"whole-{rank}.json").write_text(json.dumps(count))


if __name__ == "__main__":
    main(*sys.argv[1:])
