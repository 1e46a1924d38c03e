"""What can be seen of the recipes without running them.

Configs compose, shapes hold, and the summary keeps its contract.

Does not cover: run.sh and controls.sh, which are run by hand (README has their results).
"""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from grpo_latent.common.best_checkpoint import Best, write_best
from grpo_latent.common.provenance import append_provenance
from grpo_latent.common.step_folders import TRACKER_FILE
from grpo_latent.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes"
MODEL_7B = RECIPES / "lvr" / "models" / "qwen2_5_vl_7b.json"
FIRST_FREE_ID = 151665  # the size of Qwen2.5-VL's tokenizer before the latent tokens


def load(path):
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lvr():
    return load(RECIPES / "lvr" / "validate.py")


def test_lvr_validates_on_the_real_configs(lvr, capsys):
    """Qwen2.5-VL 3B and 7B as published, on the meta device: no weights."""
    lvr.main([])
    out = capsys.readouterr().out
    assert (
        "lvr_grpo and lvr_sft, published or not: valid (8 GPUs a node, rollouts by vllm_latent)"
        in out
    )
    assert "7b: patch [1176], visual token [32, 3584]" in out and "logits [1, 152064]" in out
    assert "3b: patch [1176], visual token [32, 2048]" in out and "logits [1, 151936]" in out
    assert out.count("lvr_sft of") == 4 and out.count("lvr_grpo of") == 2
    assert out.count(" GB a GPU\n") == 6, "all of them fit"


def test_lvr_as_published_sets_all_of_it():
    """What docs/checkpoints.md lists for LVR, and nothing else of the recipe."""
    paper_scale = load(RECIPES / "paper_scale.py")
    plain, published = (
        paper_scale.check_sft(RECIPES / "lvr", name) for name in ("lvr_sft", "lvr_published_sft")
    )
    assert (plain.latent.span_end, published.latent.span_end) == ("forced", "sampled")
    assert (plain.data.on_bad_box, published.data.on_bad_box) == ("refuse", "clamp")
    assert published == dataclasses.replace(plain, latent=published.latent, data=published.data)
    grpo = paper_scale.check_grpo(RECIPES / "lvr", "lvr_published_grpo", [])
    assert grpo.latent.start_is_action is False
    assert dict(grpo.latent.settings) == {"span_end": "sampled", "end_is_action": True}


def test_lvr_refuses_what_cannot_train(lvr):
    with pytest.raises(ConfigError, match="rollout.n: a group of one"):
        lvr.main(["actor_rollout_ref.rollout.n=1"])
    with pytest.raises(ConfigError, match="latent.visibility: engine vllm does not run this"):
        lvr.main(["latent.visibility=latents_only"])
    lvr.main(["latent.visibility=latents_only", "actor_rollout_ref.rollout.name=hf_latent"])


def test_ilvr_validates_its_three_stages_at_paper_scale(capsys):
    ilvr = load(RECIPES / "ilvr" / "validate.py")
    ilvr.main([])
    out = capsys.readouterr().out
    assert "ilvr_stage1, ilvr_stage2 and ilvr_grpo: valid (8 GPUs a node)" in out
    assert (
        "qwen2_5_vl_7b: patch [1176], visual token [32, 3584]" in out and "latent [1, 3584]" in out
    )
    for name in (
        "stage1 of qwen2_5_vl_7b, weights=sharded",
        "stage2 of qwen2_5_vl_7b, weights=sharded",
    ):
        assert f"ilvr_{name}, 8 GPUs: weights 6.5, gradients 3.8, optimizer 7.6" in out
    assert out.count(" GB a GPU\n") == 5, "all of them fit"
    with pytest.raises(ConfigError, match="rollout.n: a group of one"):
        ilvr.main(["actor_rollout_ref.rollout.n=1"])


def test_memory_of_adapters_by_hand():
    """Qwen2.5-VL-7B has 8.29e9 weights; adapters and, for new tokens, both embeddings train."""
    shared = load(RECIPES / "paper_scale.py")
    stage = shared.check_sft(RECIPES / "ilvr", "ilvr_stage1", ["weights=adapters"])
    parts = shared.sft_memory(MODEL_7B, stage)
    adapters = 64 * 28 * (2 * (2 * 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    trained = adapters + 2 * 152064 * 3584
    assert parts["weights"] == pytest.approx(
        2 * (8.2922e9 - 2 * 152064 * 3584) + 4 * trained, rel=1e-3
    )
    assert parts["gradients"] == parts["optimizer"] == 8 * trained
    assert parts["teacher"] == 4 * trained
    assert parts["autocast"] == 2 * (adapters + 152064 * 3584)
    # bytes a position: the layers' inputs in float32, one layer again, two gradients in its MLP
    again = 2 * (9 * 3584 + 4 * 18944) + 8 * 3584
    assert parts["step"] == 16384 * (4 * 28 * 3584 + again + 4 * 18944)


def test_memory_of_shards_by_hand():
    """7.62e9 weights train, 0.68e9 of the frozen tower are whole on every GPU."""
    shared = load(RECIPES / "paper_scale.py")
    stage = shared.check_sft(RECIPES / "ilvr", "ilvr_stage1")
    layer = 4 * 3584 + 2 * 3584 * 3584 + 2 * 3584 * 512 + 2 * 512 + 3 * 3584 * 18944 - 3584
    head = 152064 * 3584
    trained = 28 * layer + 2 * head + 3584
    for num_gpus in (8, 16):
        parts = shared.sft_memory(MODEL_7B, stage, num_gpus)
        assert parts["weights"] == pytest.approx(4 * trained / num_gpus + 4 * 0.6766e9, rel=1e-3)
        assert parts["gradients"] == parts["teacher"] == 4 * trained / num_gpus
        assert parts["optimizer"] == 8 * trained / num_gpus
        assert parts["gathered"] == 2 * (2 * head + 3584)
        again = 2 * (9 * 3584 + 4 * 18944) + 8 * 3584
        running = 16384 * (27 * 2 * 3584 + again + 4 * 18944)
        # two layers in bfloat16, the gradients of a third in float32, the head's
        assert parts["step"] == running + 8 * layer + 2 * head


def test_what_does_not_fit_is_said(capsys):
    shared = load(RECIPES / "paper_scale.py")
    whole = shared.check_sft(RECIPES / "lvr", "lvr_sft", ["weights=whole", "trainer.bf16=true"])
    parts = shared.sft_memory(MODEL_7B, whole)
    shared.show_memory("whole", parts)
    out = capsys.readouterr().out
    assert out.startswith("whole: weights 33.2, gradients 60.9, optimizer 60.9")
    assert out.endswith(" GB a GPU, TOO MUCH for 80 GB\n")
    shared.show_memory("whole", parts | {"total": 72e9})
    assert capsys.readouterr().out.endswith(" GB a GPU\n")


def test_memory_of_rl_by_hand():
    """The actor's shards beside vLLM's share and, on the first GPU, engine hf's bfloat16 copy."""
    shared = load(RECIPES / "paper_scale.py")
    for num_nodes in (1, 4):
        grpo = shared.check_grpo(RECIPES / "lvr", "lvr_grpo", [f"trainer.nnodes={num_nodes}"])
        parts = shared.grpo_memory(MODEL_7B, grpo)
        shares = 8 * num_nodes
        assert parts["weights"] == pytest.approx(4 * 8.2922e9 / shares, rel=1e-3)
        keys_and_values = 2 * 2 * 512 * 28
        measured = 2 * 8.2922e9 + 16 * 6656 * keys_and_values
        assert parts["engine"] == pytest.approx(0.45 * 80e9 + measured, rel=1e-3)
        awake = parts["weights"] + parts["optimizer"] + parts["engine"]
        asleep = parts["weights"] + parts["optimizer"] + parts["gradients"] + parts["step"]
        assert parts["total"] == max(awake, asleep)


@pytest.mark.long
def test_treatments_validate_at_paper_scale(capsys):
    """Monet's VLPO, with the note that its first update needs, and every other treatment."""
    treatments = load(RECIPES / "treatments" / "validate.py")
    treatments.main([])
    out = capsys.readouterr().out
    assert "monet_vlpo: valid, Gaussian(sigma=10.0, sigma_rollout=0.0, per_dimension=False)" in out
    assert (
        "the first update after each rollout has no latent gradient" in out
        and "as gumbel_soft: valid" in out
    )
    with pytest.raises(ConfigError, match="kl_coef: there is no reference model"):
        treatments.main(["actor_rollout_ref.actor.use_kl_loss=false"])


def test_the_treatments_table(tmp_path):
    """One row a finished run, in the table's order; one that died is named."""
    module = load(RECIPES / "treatments" / "table.py")
    for name in ("recompute_bptt", "mask"):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name)
        (tmp_path / name / "run.json").write_text(
            json.dumps({"treatment": name, "overrides": "", "seed": 0, "seconds": 7})
        )
    (tmp_path / "gaussian").mkdir()
    summary = module.summarize(tmp_path, seed=0)
    assert [row["treatment"] for row in summary["rows"]] == ["mask", "recompute_bptt"]
    assert summary["unfinished"] == ["gaussian"]
    row = summary["rows"][0]
    assert row["sft"]["heldout_accuracy"] == 0.4 and row["grpo"]["heldout_accuracy"] == 0.95
    assert row["replay_logp_gap_max"] == 2e-6 and row["ablations"]["shuffle"] == 0.12
    module.show(summary)
    json.dumps(summary)


@pytest.mark.long
def test_ivt_lr_validates_its_curriculum_and_rl_at_paper_scale(capsys):
    """Qwen2-VL-7B on the meta device."""
    ivt_lr = load(RECIPES / "ivt_lr" / "validate.py")
    ivt_lr.main([])
    out = capsys.readouterr().out
    assert "ivt_lr_sft and ivt_lr_grpo: valid (8 GPUs a node)" in out
    assert (
        "qwen2_vl_7b: patch [1176], visual token [32, 3584]" in out and "logits [1, 152064]" in out
    )
    with pytest.raises(
        ConfigError,
        match="no room for text after the slots; got 99; expected more than the slots' 99",
    ):
        ivt_lr.main(["data.max_response_length=99"])
    with pytest.raises(ConfigError, match="SFT and RL differ in slots; got 3 in SFT, 2 in RL"):
        ivt_lr.main(["latent.steps=2"])


def test_coconut_validates_its_curriculum_and_rl_at_paper_scale(capsys):
    """Qwen3-0.6B on the meta device: c = 2, three steps, then answers alone."""
    coconut = load(RECIPES / "coconut" / "validate.py")
    coconut.main([])
    out = capsys.readouterr().out
    assert (
        "coconut_sft and coconut_grpo: valid (8 GPUs a node), slots by stage 0, 2, 4, 6, 6" in out
    )
    assert "latent [1, 1024]" in out and "logits [1, 151936]" in out and "patch" not in out
    with pytest.raises(ConfigError, match="SFT and RL differ in slots; got 6 in SFT, 3 in RL"):
        coconut.main(["latent.steps=3"])


def test_chains_of_the_coconut_recipe():
    chains = load(RECIPES / "coconut" / "arithmetic.py")
    parts = {
        name: chains.generate(300, stream=name, seed=0, num_steps=3) for name in chains.STREAMS
    }
    for chain in parts["sft"][:50]:
        start, *operations = chain.question.split()[:-1]
        assert len(chain.steps) == len(operations) == 3 and chain.steps[-1] == chain.answer
        for before, operation, after in zip(
            [start, *chain.steps], operations, chain.steps, strict=False
        ):
            assert int(after) == eval(before + operation) % 7  # noqa: S307  (digits and signs of our own)
    questions = {name: {chain.question for chain in part} for name, part in parts.items()}
    assert not questions["sft"] & questions["heldout"] and not questions["rl"] & questions["dev"]
    assert (
        parts["dev"] == chains.generate(300, stream="dev", seed=0, num_steps=3) != parts["heldout"]
    )
    direct = chains.to_rows(parts["sft"][:2], "sft", steps=False)
    assert [row["extra_info"]["steps"] for row in direct] == [[], []] and direct[0]["images"] == []


def test_ilvr_runs_its_stages_on_one_kind_of_latents():
    """Both SFT stages and GRPO agree on what `digits_sft.yaml` says of spans."""
    shared = load(RECIPES / "paper_scale.py")
    first, second = (
        shared.check_sft(RECIPES / "ilvr", f"digits_{stage}") for stage in ("stage1", "stage2")
    )
    assert first.latent == second.latent and (first.method, second.method) == (
        "ilvr_stage1",
        "ilvr_stage2",
    )
    assert (first.latent.steps, first.latent.exit, first.latent.visibility) == (
        1,
        "steps",
        "latents_only",
    )
    grpo = shared.check_grpo(RECIPES / "ilvr", "digits_grpo", [])
    assert grpo.latent.max_spans == 2 and grpo.latent.steps is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["vision_config"].update(out_hidden_size=1024),
            "visual tokens and latents differ in size",
        ),
        (lambda c: c.update(vocab_size=FIRST_FREE_ID), "no room for the latent tokens"),
    ],
    ids=["another vision tower", "a vocabulary without spare rows"],
)
def test_shapes_that_do_not_fit_are_named(lvr, change, message, tmp_path, monkeypatch):
    config = json.loads((RECIPES / "lvr" / "models" / "qwen2_5_vl_3b.json").read_text())
    change(config)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "qwen2_5_vl_3b.json").write_text(json.dumps(config))
    monkeypatch.setattr(lvr, "HERE", tmp_path)
    with pytest.raises(ConfigError, match=message):
        lvr.check_shapes("qwen2_5_vl_3b", 8)


def write_run(out):
    """What a finished quickstart leaves.

    Step 1 is logged twice, as by a run that died and was resumed.
    """
    (out / "grpo").mkdir()
    steps = [
        (0, {"val-core/digits/acc/mean@1": 0.4}),
        (
            1,
            {
                "critic/score/mean": 0.1,
                "latent/replay_logp_gap_max": 9.0,
                "training/rollout_probs_diff_max": 0.1,
            },
        ),
        (
            1,
            {
                "critic/score/mean": 0.5,
                "latent/replay_logp_gap_max": 2e-6,
                "training/rollout_probs_diff_max": 1e-6,
            },
        ),
        (
            2,
            {
                "critic/score/mean": 0.9,
                "latent/replay_logp_gap_max": 1e-6,
                "training/rollout_probs_diff_max": 3e-6,
                "actor/silent_steps": 1.0,
            },
        ),
    ]
    lines = [json.dumps({"step": step, "data": data}) for step, data in steps]
    (out / "grpo" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (out / "grpo" / "config.yaml").write_text("actor_rollout_ref: {rollout: {name: hf_latent}}\n")
    ablations = {"own": 0.95, "zero": 0.1, "noise": 0.1, "shuffle": 0.12, "oracle": 0.97}
    for name, accuracy in (("sft", 0.4), ("grpo", 0.95)):
        report = {
            "greedy": {"accuracy": accuracy},
            "sampled": {"accuracy": accuracy},
            "ablations": ablations,
        }
        report |= {
            "verdict": {"sentence": "used: as shown"},
            "follow": 0.9,
            "hit": 1.0,
            "leak": 0.0,
            "chance": 0.19,
        }
        (out / f"evaluation_{name}.json").write_text(json.dumps(report))


def test_the_quickstarts_summary_keeps_its_contract(tmp_path):
    module = load(RECIPES / "summarize.py")
    write_run(tmp_path)
    summary = module.summarize(tmp_path, seed=3, grpo_seconds=80.0, seconds_total=240.0)
    assert summary["sft"]["heldout_accuracy"] == 0.4
    assert {name: summary["grpo"][name] for name in ("heldout_accuracy", "steps", "seconds")} == {
        "heldout_accuracy": 0.95,
        "steps": 2,
        "seconds": 80.0,
    }
    assert list(summary["ablations"]) == ["own", "zero", "noise", "shuffle", "oracle"]
    assert summary["replay_logp_gap_max"] == 2e-6 and summary["rollout_probs_diff_max"] == 3e-6
    assert (summary["seed"], summary["rollout_engine"], summary["seconds_total"]) == (
        3,
        "hf",
        240.0,
    )
    assert {"torch", "verl", "ray"} <= summary["versions"].keys() and summary["chance"] == 0.19
    json.dumps(summary)
    assert summary["provenance"] is None, "a run of before it was recorded"
    for seed in (3, 4):
        append_provenance(tmp_path / "grpo", seed)
    assert module.summarize(tmp_path, 3, 80.0, 240.0)["provenance"]["seed"] == 4
    (tmp_path / "evaluation_stage2.json").write_text(
        (tmp_path / "evaluation_grpo.json").read_text()
    )
    both = module.summarize(tmp_path, 3, 80.0, 240.0, stages=("sft", "stage2"))
    assert [(entry["stage"], entry["heldout_accuracy"]) for entry in both["sft"]] == [
        ("sft", 0.4),
        ("stage2", 0.95),
    ]
    assert both["sft"][1]["ablations"]["shuffle"] == 0.12
    assert "controls" not in both
    controlled = module.summarize(tmp_path, 3, 80.0, 240.0, controls=("stage2",))
    assert controlled["controls"] == {"stage2": 0.95}
    assert summary["best"] is None, "a run of before it was kept"
    assert module.plot(tmp_path, summary).read_bytes().startswith(b"\x89PNG")


def test_the_summary_names_the_best_checkpoint(tmp_path):
    """Where it is the last one, that one's evaluation is its own."""
    module = load(RECIPES / "summarize.py")
    write_run(tmp_path)
    root = tmp_path / "grpo" / "checkpoints"
    for step in (1, 2):
        (root / f"global_step_{step}").mkdir(parents=True)
    (root / TRACKER_FILE).write_text("2")
    write_best(root, Best.of_step(2, 0.9, "m"))
    summary = module.summarize(tmp_path, 3, 80.0, 240.0)
    assert summary["best"] == {"step": 2, "dev_score": 0.9, "heldout_accuracy": 0.95}
    assert summary["grpo"]["silent_steps"] == 1
    write_best(root, Best.of_step(1, 0.97, "m"))
    report = {"greedy": {"accuracy": 0.96}}
    (tmp_path / "evaluation_best.json").write_text(json.dumps(report))
    best = module.summarize(tmp_path, 3, 80.0, 240.0)["best"]
    assert best == {"step": 1, "dev_score": 0.97, "heldout_accuracy": 0.96}
