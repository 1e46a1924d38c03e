"""Prompt to group and back, in one process, with the real server object and engine.

Without Ray or TransferQueue.
"""

import asyncio
import copy
import dataclasses
import io
from types import SimpleNamespace

import engine_helpers as helpers
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from grpo_latent.errors import DataError, RolloutError
from grpo_latent.models import tiny
from grpo_latent.models.adapter import ModelAdapter
from grpo_latent.models.loading import load_latent_model
from grpo_latent.rollout.protocol import SamplingParams
from grpo_latent.sft.common.images import set_image_tokens
from grpo_latent.trajectory import PositionKind
from grpo_latent.verl_plugin.rollout.group_rows import reward_input, row_index
from grpo_latent.verl_plugin.rollout.prompt_to_group import LatentAgentLoop
from grpo_latent.verl_plugin.rollout.replica import LatentRolloutClient
from grpo_latent.verl_plugin.rollout.server import LatentRolloutServer
from grpo_latent.verl_plugin.rollout.waves import Ticket
from grpo_latent.verl_plugin.trainer.dataset import LatentDataset

SAMPLING = SamplingParams(max_new_tokens=12, temperature=1.0)
ROLLOUT = {"prompt_length": 64, "response_length": 12, "dtype": "float32"}


class LocalClient(LatentRolloutClient):
    """Calls the server object instead of an actor."""

    def __init__(self, server):
        self.servers = [server]

    async def generate_group(self, ticket, request, sampling):
        return await self.servers[ticket.replica].generate_group(ticket, request, sampling)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3"])
def parts(request, tmp_path_factory):
    build = {"qwen2_5_vl": tiny.tiny_qwen2_5_vl, "qwen3": tiny.tiny_qwen3}[request.param]
    folder = helpers.make_checkpoint(tmp_path_factory.mktemp("model"), build)
    server = LatentRolloutServer(folder, ROLLOUT, 0, "cpu", "sdpa")
    return load_latent_model(folder), server


def make_loop(loaded, server):
    config = OmegaConf.create(
        {"actor_rollout_ref": {"rollout": ROLLOUT}, "data": {"image_patch_size": 7}}
    )
    return LatentAgentLoop(
        trainer_config=SimpleNamespace(config=config),
        server_manager=LocalClient(server),
        tokenizer=loaded.tokenizer,
        processor=loaded.processor,
        dataset_cls=LatentDataset,
        data_config=SimpleNamespace(config=config.data),
        mechanism=loaded.mechanism,
    )


def prompt_row(index, loaded, text="read red ?", size=(28, 42)):
    content = [{"type": "text", "text": text}]
    if loaded.processor is not None:
        buffer = io.BytesIO()
        Image.new("RGB", size, (index * 40, 10, 99)).save(buffer, "PNG")
        content.append(
            {
                "type": "image",
                "bytes": buffer.getvalue(),
                "path": None,
                "image": Image.open(buffer),
            }
        )
    return {
        "uid": f"uid{index}",
        "index": index,
        "data_source": "test",
        "raw_prompt": [{"role": "user", "content": content}],
        "extra_info": {"index": index},
        "reward_model": {"ground_truth": "7"},
    }


def run_groups(loaded, server, rows, seeds=(11, 12, 13), order=None):
    async def scenario():
        loop = make_loop(loaded, server)
        tickets = [Ticket("w", i, tuple(range(len(rows))), 0) for i in range(len(rows))]
        tasks = {
            i: loop.run_group(SAMPLING, tickets[i], list(seeds), rows[i])
            for i in order or range(len(rows))
        }
        results = dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
        return [results[i] for i in range(len(rows))]

    return asyncio.run(scenario())


def test_a_group_carries_what_replays_it(parts):
    loaded, server = parts
    adapter = ModelAdapter(loaded.model, loaded.mechanism)
    (outputs, pixels), *_ = run_groups(
        loaded, server, [prompt_row(0, loaded), prompt_row(1, loaded, "read ?")]
    )
    assert len(outputs) == 3 and bool(pixels) == (loaded.processor is not None)
    for output in outputs:
        fields = output.as_dict()
        ids = torch.cat([fields["prompts"], fields["responses"]])
        kinds = fields["position_kinds"]
        assert kinds.shape == ids.shape and torch.equal(fields["input_ids"], ids)
        assert fields["latent_embeds"].shape == (
            int((kinds == PositionKind.LATENT).sum()),
            adapter.hidden_size,
        )
        assert torch.equal(
            kinds[: len(fields["prompts"])], adapter.prompt_kinds(fields["prompts"])
        )
        completion = kinds[len(fields["prompts"]) :]
        acted = (completion == PositionKind.TEXT) | (completion == PositionKind.START)
        assert torch.equal(fields["response_mask"].bool(), acted)
        assert (fields["rollout_log_probs"][~acted] == 0).all() and (
            fields["rollout_log_probs"][acted] < 0
        ).all()
        images = SimpleNamespace(**pixels) if pixels else None
        expected = adapter.position_ids(
            ids[None], torch.ones_like(ids, dtype=torch.bool)[None], images
        )
        positions = fields["position_ids"]
        assert torch.equal(
            positions[1:] if adapter.has_mrope else positions,
            expected[:, 0] if adapter.has_mrope else expected[0],
        )
        text = output.extra_fields["solution_str"]
        assert not any(token in text for token in ("<|lvr_start|>", "<|lvr|>", "<|lvr_end|>"))
        assert output.extra_fields["latent"]["num_steps"] == len(fields["latent_embeds"])


def test_the_order_of_arrival_changes_nothing(parts):
    loaded, server = parts
    rows = [prompt_row(i, loaded, ["read", "read red", "red ?"][i]) for i in range(3)]
    runs = [run_groups(loaded, server, rows, order=order) for order in ([0, 1, 2], [2, 0, 1])]
    for (first, _), (second, _) in zip(*runs, strict=True):
        for a, b in zip(first, second, strict=True):
            assert a.response_ids == b.response_ids and a.response_logprobs == b.response_logprobs
            assert torch.equal(a.recorded["latent_embeds"], b.recorded["latent_embeds"])
    assert len({tuple(output.response_ids) for outputs, _ in runs[0] for output in outputs}) > 3


def test_a_bad_row_is_named_and_ends_the_wave(parts):
    loaded, server = parts
    long = prompt_row(5, loaded, "read " * 80)
    with pytest.raises(DataError, match="row 5 of test: prompt is too long; got [0-9]+ tokens"):
        run_groups(loaded, server, [long])


def test_what_the_message_advises_shortens_a_prompt(parts):
    loaded, server = parts
    if loaded.processor is None:
        pytest.skip("no images")
    rows = [prompt_row(0, loaded, size=(140, 140))]  # 100 tokens
    with pytest.raises(
        DataError, match="lower size.longest_edge of the checkpoint's image processor"
    ):
        run_groups(loaded, server, rows)
    smaller = dataclasses.replace(loaded, processor=copy.deepcopy(loaded.processor))
    set_image_tokens(smaller.processor, None, 16)
    ((outputs, pixels),) = run_groups(smaller, server, rows)
    assert len(outputs) == 3 and int(pixels["image_grid_thw"].prod()) // 4 <= 16


def test_rows_without_an_index_are_refused():
    assert row_index({"extra_info": {"index": 0}}) == "0"
    with pytest.raises(DataError, match="a data row has no index"):
        row_index({"extra_info": {"split": "train"}, "data_source": "x"})


def test_reward_workers_get_the_group_row_by_row(parts):
    loaded, server = parts
    row = prompt_row(0, loaded)
    ((outputs, _),) = run_groups(loaded, server, [row])
    data = reward_input(outputs, row)
    for i, output in enumerate(outputs):
        one = data[i : i + 1][0]
        length = int(one.batch["attention_mask"][-one.batch["responses"].shape[-1] :].sum())
        assert one.batch["responses"][:length].tolist() == output.response_ids
        assert (
            one.non_tensor_batch["tool_extra_fields"]["solution_str"]
            == output.extra_fields["solution_str"]
        )
        assert one.non_tensor_batch["reward_model"]["ground_truth"] == "7"
        assert (
            one.non_tensor_batch["session_id"] == i
            and one.non_tensor_batch["data_source"] == "test"
        )


def test_single_requests_are_refused(parts):
    loaded, server = parts

    async def scenario():
        with pytest.raises(RolloutError, match="samples groups"):
            await make_loop(loaded, server).run({})
        with pytest.raises(RolloutError, match="serves whole groups"):
            await LocalClient(server).generate("id", prompt_ids=[1], sampling_params={})

    asyncio.run(scenario())
