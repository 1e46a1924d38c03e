"""Every recorded field through every wire and back, to the bit.

And one field more that only this file knows.

Does not cover: TransferQueue and Ray themselves (verl_plugin/trainer/test_training.py trains
through them).
"""

import dataclasses
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_latent import recorded_fields
from grpo_latent.errors import ConfigError, LatentMismatchError
from grpo_latent.eval.dumps import read_step
from grpo_latent.eval.journal import pack, unpack
from grpo_latent.inspect.payload import GroupData, group_block
from grpo_latent.recorded_fields import ALL, Field, Wire
from grpo_latent.trajectory import PositionKind as K
from grpo_latent.trajectory import Trajectory

PROMPT_KINDS = torch.tensor([K.PROMPT, K.VISION, K.VISION, K.PROMPT])
COMPLETIONS = [
    [
        K.SELECTED,
        K.LATENT,
        K.SELECTED,
        K.SELECTED,
        K.LATENT,
        K.TEXT,
        K.START,
        K.LATENT,
        K.FORCED,
        K.TEXT,
    ],
    [K.TEXT, K.TEXT],  # no latents
    [K.MIXED, K.MIXED, K.LATENT, K.TEXT],
]
H, A = 5, 3
OWN = Field(
    "gate_values", torch.float32, "MA", ALL, column="gate_column", dump="gates", is_optional=True
)
OWN_T = Field("surprise", torch.float32, "T", ALL, is_optional=True)
OWN_NUMBER = Field("search_depth", torch.int64, "", ALL, is_optional=True)
OWN_FIELDS = (OWN, OWN_T, OWN_NUMBER)


@pytest.fixture
def own_fields():
    """Fields that no module names, as a mechanism's class would declare them."""
    for field in OWN_FIELDS:
        recorded_fields.register(field)
    yield
    for field in OWN_FIELDS:
        del recorded_fields._FIELDS[field.name]


def make_trajectories(with_aux=True) -> list[Trajectory]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    trajectories = []
    for row, completion in enumerate(COMPLETIONS):
        kinds, length = torch.tensor(completion), len(completion)
        num_made = completion.count(K.LATENT) + completion.count(K.MIXED)
        trajectories.append(
            Trajectory(
                prompt_ids=torch.arange(4) + row,
                token_ids=torch.randint(0, 50, (length,), generator=generator),
                kinds=kinds,
                latents=draw(num_made + completion.count(K.SELECTED), H),
                rollout_log_probs=-draw(length).abs(),
                sampling_log_probs=-draw(length).abs(),
                stop_reason=("eos", "length")[row % 2],
                group_id="7",
                seed=row,
                policy_version=3,
                selected_idx=torch.randint(
                    0, 2, (completion.count(K.SELECTED),), generator=generator
                ),
                **({"latent_aux": draw(num_made, A)} if with_aux else {}),
                extra={
                    OWN.name: draw(num_made, A),
                    OWN_T.name: draw(length),
                    OWN_NUMBER.name: torch.tensor(7 + row),
                }
                if with_aux
                else {},
            )
        )
    return trajectories


def rows_in_queue(trajectories):
    """What the agent loop writes, with what training adds, one dict a trajectory."""
    pytest.importorskip("verl")
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics

    from grpo_latent.verl_plugin.rollout.prompt_to_group import LatentAgentLoopOutput

    rows = []
    for index, t in enumerate(trajectories):
        output = LatentAgentLoopOutput(
            prompt_ids=t.prompt_ids.tolist(),
            response_ids=t.token_ids.tolist(),
            response_mask=t.response_mask().long().tolist(),
            response_logprobs=t.rollout_log_probs.tolist(),
            reward_score=0.25 * index,
            num_turns=2,
            metrics=AgentLoopMetrics(),
            extra_fields={
                "solution_str": f"text {index}",
                "stop_reason": t.stop_reason,
                "latent": {},
            },
            recorded=t.columns(PROMPT_KINDS),
            position_ids=torch.arange(4 + len(t.token_ids)),
        )
        row = {
            "extra_info": {"index": 7},
            "session_id": index,
            "reward_model": {"ground_truth": "x"},
        }
        made = {"old_log_probs": t.rollout_log_probs - 1, "ref_log_prob": t.rollout_log_probs - 2}
        rows.append(
            {
                **output.as_dict(),
                **row,
                **made,
                "advantages": torch.full(t.kinds.shape, 0.5 - index),
            }
        )
    return rows


def check_equal(found: list[Trajectory], expected: list[Trajectory], wire: Wire) -> None:
    fields = recorded_fields.of_trajectory(wire)
    for a, b in zip(found, expected, strict=True):
        for field in fields:
            left, right = a.value(field), b.value(field)
            assert (left is None) == (right is None), field.name
            assert left is None or (left.dtype == field.dtype and torch.equal(left, right)), (
                field.name
            )


@pytest.mark.parametrize("with_aux", [True, False])
def test_journal(own_fields, with_aux):
    before = make_trajectories(with_aux)
    after = unpack(pack([before[0], None, *before[1:]]))
    assert after.pop(1) is None
    check_equal(after, before, Wire.JOURNAL)
    names = ("stop_reason", "group_id", "seed", "policy_version")
    assert all(
        getattr(a, n) == getattr(b, n) for a, b in zip(after, before, strict=True) for n in names
    )


def test_a_journal_of_which_some_trajectories_lack_a_field(own_fields):
    mixed = [make_trajectories()[0], make_trajectories(with_aux=False)[0]]
    check_equal(unpack(pack(mixed)), mixed, Wire.JOURNAL)


def test_a_journal_of_an_older_release_loads(monkeypatch):
    before = make_trajectories(with_aux=False)
    older = {
        name: field for name, field in recorded_fields._FIELDS.items() if name != "latent_aux"
    }
    monkeypatch.setattr(recorded_fields, "_FIELDS", older)
    content = pack(before)
    monkeypatch.undo()
    check_equal(unpack(content), before, Wire.JOURNAL)


@pytest.mark.parametrize("with_aux", [True, False])
def test_worker(own_fields, with_aux):
    """From the agent loop's rows to the engine's micro-batch.

    With the columns that workers fetch and no others.
    """
    trajectories = make_trajectories(with_aux)
    rows = rows_in_queue(trajectories)
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    from grpo_latent.verl_plugin.worker.micro_batch import MicroBatch

    fetched = [
        {name: row[name] for name in recorded_fields.columns(Wire.WORKER) if name in row}
        for row in rows
    ]
    batch = MicroBatch.of(list_of_dict_to_tensordict(fetched))
    assert torch.equal(
        batch.kinds_L, torch.cat([torch.cat([PROMPT_KINDS, t.kinds]) for t in trajectories])
    )
    for field in recorded_fields.of_trajectory(Wire.WORKER):
        values = [t.value(field) for t in trajectories]
        found = batch.recorded(field.name)
        if any(value is None for value in values):
            assert found is None and field.is_optional, field.name
        elif field.is_number:
            assert torch.equal(found, torch.stack(values)), field.name
        elif field.name != "kinds":
            assert torch.equal(found, torch.cat(values)), field.name
    if with_aux:
        assert torch.equal(batch.latent_aux_MA(A), torch.cat([t.latent_aux for t in trajectories]))
        with pytest.raises(
            LatentMismatchError, match=r"recorded aux .* got \(6, 3\); expected \(6, 2\)"
        ):
            batch.latent_aux_MA(2)


class FakeQueue:
    """TransferQueue of one partition."""

    def __init__(self, rows):
        self.rows = rows

    def kv_batch_get(self, keys, partition_id, select_fields):
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        chosen = [self.rows[int(key.split("_")[1])] for key in keys]
        present = [name for name in select_fields if name in chosen[0]]
        return list_of_dict_to_tensordict(
            [{name: row[name] for name in present} for row in chosen]
        )


def dump(trajectories, folder, monkeypatch):
    """Through the trainer's own dump."""
    rows = rows_in_queue(trajectories)
    from transfer_queue import KVBatchMeta

    from grpo_latent.verl_plugin.trainer import rollout_dump, step_rows

    monkeypatch.setattr(step_rows, "tq", FakeQueue(rows))
    keys = [f"uid_{index}_0" for index in range(len(rows))]
    rollout_dump.dump_step(
        KVBatchMeta(keys=keys, tags=[{} for _ in keys], partition_id="train"), 4, folder
    )
    return read_step(folder / "step_4.jsonl")


@pytest.mark.parametrize("with_aux", [True, False])
def test_dump_and_inspector(own_fields, with_aux, tmp_path, monkeypatch):
    trajectories = make_trajectories(with_aux)
    dumped = dump(trajectories, tmp_path, monkeypatch)
    check_equal([item.trajectory for item in dumped], trajectories, Wire.DUMP)
    assert [item.trajectory.stop_reason for item in dumped] == [
        t.stop_reason for t in trajectories
    ]
    for index, (item, t) in enumerate(zip(dumped, trajectories, strict=True)):
        assert (item.trajectory_idx, item.reward, item.advantage) == (
            index,
            0.25 * index,
            0.5 - index,
        )
        assert list(item.log_probs) == ["rollout", "sampling", "old", "ref"]
        assert torch.equal(item.log_probs["ref"], t.rollout_log_probs - 2)
        assert torch.equal(item.response_mask, t.response_mask())

    block = group_block(GroupData(0, 4, "7", dumped))
    for entry, t in zip(block["trajectories"], trajectories, strict=True):
        shown = [block["probes"][index].get("recorded", {}) for index in entry["probes"]]
        kinds = t.kinds[t.recorded_mask].tolist()
        assert len(shown) == len(kinds)
        tokens = (
            {OWN_T.name: pytest.approx(t.extra[OWN_T.name].tolist(), rel=1e-3)} if with_aux else {}
        )
        assert entry["recorded"] == tokens
        own_number = t.extra.get(OWN_NUMBER.name)
        assert entry["numbers"] == ({} if own_number is None else {OWN_NUMBER.name: own_number})
        assert [s["selected_idx"] for s in shown if "selected_idx" in s] == [
            [i] for i in t.selected_idx.tolist()
        ]
        for name in ("latent_aux", OWN.name) if with_aux else ():
            own = [s[name] for s, kind in zip(shown, kinds, strict=True) if kind != K.SELECTED]
            rows = t.value(recorded_fields.field(name)).tolist()
            assert [[pytest.approx(v, rel=1e-4) for v in row] for row in rows] == own
            assert not any(
                name in s for s, kind in zip(shown, kinds, strict=True) if kind == K.SELECTED
            )


def test_a_dump_of_an_older_release_loads(tmp_path, monkeypatch):
    """Without digests, aux, chosen positions, and with no latent position at all."""
    (item,) = dump(make_trajectories(with_aux=False)[1:2], tmp_path, monkeypatch)
    path = tmp_path / "step_4.jsonl"
    vectors = path.with_suffix(".safetensors")
    save_file(load_file(vectors), vectors)
    path.write_text(path.read_text().replace('"selected_idx"', '"unknown"'))
    (older,) = read_step(path)
    check_equal([older.trajectory], [item.trajectory], Wire.DUMP)


def test_between_processes(own_fields):
    before = make_trajectories()
    after = pickle.loads(pickle.dumps(before))
    for wire in Wire:
        check_equal(after, before, wire)
    after[0].extra[OWN.name].add_(1)  # its own memory, and writable


def test_a_field_is_checked_against_its_positions(own_fields):
    t = make_trajectories()[0]
    with pytest.raises(
        LatentMismatchError,
        match=r"gate_values does not match the positions whose vectors a hidden state made.*\(2, 3\); expected \[3, A\]",
    ):
        dataclasses.replace(t, extra={OWN.name: torch.zeros(2, A)})


@pytest.mark.parametrize("value", [torch.zeros(1), torch.zeros(2, 2)])
def test_a_number_has_no_dimensions(own_fields, value):
    t = make_trajectories()[0]
    with pytest.raises(LatentMismatchError, match=r"one number of it.*expected \[\]"):
        dataclasses.replace(t, extra={OWN_NUMBER.name: value})


def test_names_are_taken_once(own_fields):
    recorded_fields.register(OWN)  # a class that is loaded twice
    for clash in (
        dict(name="gate_values"),
        dict(name="x", column="latent_embeds"),
        dict(name="x", dump="advantages"),
    ):
        with pytest.raises(ConfigError, match="declared twice"):
            recorded_fields.register(Field(**{"dtype": torch.float32, "dims": "M", **clash}))
    with pytest.raises(ConfigError, match="not a recorded field"):
        Field("x", torch.float32, "Z")


def test_the_wires_of_today():
    """Columns that workers fetch cost time for every trajectory: whoever adds one says so here.

    To files goes all of it.
    """
    assert all(
        {Wire.DUMP, Wire.JOURNAL} <= field.wires for field in recorded_fields.of_trajectory()
    )
    made = {field.name for field in dataclasses.fields(Trajectory)} - {
        field.name for field in recorded_fields.of_trajectory()
    }
    assert made == {"stop_reason", "group_id", "seed", "policy_version", "extra"}
    assert sorted(recorded_fields.columns(Wire.WORKER)) == sorted(
        "input_ids position_ids position_kinds latent_embeds latent_aux selected_idx ref_latent_means "
        "prompts responses response_mask loss_mask old_log_probs ref_log_prob advantages rollout_is_weights".split()
    )
    assert {f.column: f.dump for f in recorded_fields.on(Wire.DUMP) if f.column != f.dump} == {
        "prompts": "prompt_ids",
        "responses": "token_ids",
        "position_kinds": "kinds",
        "latent_embeds": "latents",
        "ref_log_prob": "ref_log_probs",
    }
