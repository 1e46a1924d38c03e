"""Files of weights of IVT-LR, Coconut and CODI: read weights-only, adapters merged, written as a folder."""

import importlib
import json

import pytest
import torch
from latent_cases import WORDS

from grpo_latent.common.command import DONE, REFUSED
from grpo_latent.errors import CheckpointError
from grpo_latent.models import tiny
from grpo_latent.models.loading import load_latent_model
from grpo_latent.models.state_dicts import merged, read_state_dict

main = importlib.import_module("grpo_latent.import").main


class Mischief:
    """What a pickle may hold beside tensors."""

    def __reduce__(self):
        return (print, ("unpickled",))


def test_merged_by_hand():
    """r = 2, alpha 16: W + 8 · B A, on names as peft and data parallelism wrap them."""
    prefix = "module.base_causallm.base_model.model.model.layers.0.mlp.up_proj"
    state = {
        f"{prefix}.base_layer.weight": torch.tensor([[1.0, 2.0]]),
        f"{prefix}.lora_A.default.weight": torch.tensor([[0.5, 0.0], [0.0, 1.0]]),
        f"{prefix}.lora_B.default.weight": torch.tensor([[1.0, 0.25]]),
        "module.base_causallm.base_model.model.lm_head.weight": torch.ones(1),
        "module.embedding.weight": torch.zeros(1),
    }
    state["embedding.weight"] = state.pop("module.embedding.weight")
    found = merged(state)
    assert set(found) == {"model.layers.0.mlp.up_proj.weight", "lm_head.weight"}
    assert found["model.layers.0.mlp.up_proj.weight"].tolist() == [[1 + 8 * 0.5, 2 + 8 * 0.25]]
    del state[f"{prefix}.lora_B.default.weight"]
    with pytest.raises(CheckpointError, match="half an adapter"):
        merged(state)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base folder, a published file of it with adapters, and the weights that they make."""
    folder = tmp_path_factory.mktemp("ivt_lr")
    model, tokenizer, processor = tiny.tiny_qwen2_vl(WORDS, latent_tokens=())
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model.resize_token_embeddings(len(tokenizer) + 3)
    generator = torch.Generator().manual_seed(0)
    expected, state = {}, {}
    for name, tensor in model.state_dict().items():
        # names as transformers had them when the file was written
        published = name.replace("model.language_model.", "model.").replace(
            "model.visual.", "visual."
        )
        published = f"base_causallm.base_model.model.{published}"
        expected[name] = tensor.clone()
        if name.endswith("q_proj.weight") and "visual" not in name:
            layer = published.removesuffix(".weight")
            a_RI = torch.randn(4, tensor.shape[1], generator=generator)
            b_OR = torch.randn(tensor.shape[0], 4, generator=generator)
            state |= {
                f"{layer}.base_layer.weight": tensor,
                f"{layer}.lora_A.default.weight": a_RI,
                f"{layer}.lora_B.default.weight": b_OR,
            }
            bias = f"{layer}.bias"
            state.pop(bias, None)
            expected[name] += 16 / 4 * b_OR @ a_RI
        else:
            state[published] = tensor
    state = {
        name.replace("q_proj.bias", "q_proj.base_layer.bias"): value
        for name, value in state.items()
    }
    state["embedding.weight"] = model.get_input_embeddings().weight.detach()
    torch.save(state, folder / "model.pth")
    return folder, expected


def test_a_published_file_becomes_a_folder(files, tmp_path, capsys):
    folder, expected = files
    arguments = [str(folder / "model.pth"), "--base", str(folder / "base"), "--dtype", "float32"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == DONE
    assert "ivt_lr" in capsys.readouterr().out
    loaded = load_latent_model(tmp_path / "out")
    assert (loaded.mechanism.steps, loaded.mechanism.top_k_image) == (3, 32)
    ids = loaded.tokenizer.convert_tokens_to_ids(
        ["<|start-latent|>", "<|end-latent|>", "<|latent|>"]
    )
    assert ids == list(range(ids[0], ids[0] + 3)), "the published order"
    own = loaded.model.state_dict()
    assert own.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(own[name], tensor, rtol=0, atol=1e-5)
    assert main([*arguments, "--out", str(tmp_path / "out")]) == REFUSED
    assert "the folder exists" in capsys.readouterr().err


def test_a_file_needs_its_base(files, tmp_path, capsys):
    folder, _ = files
    assert main([str(folder / "model.pth"), "--out", str(tmp_path / "out")]) == REFUSED
    assert "a file of weights is no model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(files, tmp_path):
    folder, _ = files
    state = torch.load(folder / "model.pth", weights_only=True)
    state["base_causallm.base_model.model.more.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "more.pth")
    arguments = [str(tmp_path / "more.pth"), "--base", str(folder / "base")]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == REFUSED


@pytest.mark.parametrize("content", [{"a": Mischief()}, {"a": 1}, [torch.zeros(1)], {}])
def test_anything_but_tensors_is_refused_and_not_run(content, tmp_path, capsys):
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError):
        read_state_dict(tmp_path / "bad.pth")
    (tmp_path / "text.pth").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="not a file of weights"):
        read_state_dict(tmp_path / "text.pth")
    assert "unpickled" not in capsys.readouterr().out


def test_a_folder_is_described(tmp_path, capsys):
    model, tokenizer, processor = tiny.tiny_qwen2_5_vl(
        WORDS, latent_tokens=("<|skila|>", "<|sketch_start|>", "<|sketch_end|>")
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    vocab = tokenizer.get_vocab()
    path = tmp_path / "config.json"
    fields = {
        "skila_id": vocab["<|skila|>"],
        "sketch_start_id": vocab["<|sketch_start|>"],
        "sketch_end_id": vocab["<|sketch_end|>"],
        "sketch_token_num": 27,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert main([str(tmp_path)]) == DONE
    out = " ".join(capsys.readouterr().out.split())
    assert "qwen2_5_vl, mechanism ilvr" in out and "54" in out and "<|sketch_start|>" in out
    assert main([str(tmp_path), "--out", str(tmp_path / "ours")]) == DONE
    assert load_latent_model(tmp_path / "ours").mechanism == load_latent_model(tmp_path).mechanism
    path.write_text(json.dumps(json.loads(path.read_text()) | {"slvr_id": 3}))
    assert main([str(tmp_path)]) == REFUSED
    assert "S-LVR" in capsys.readouterr().err
