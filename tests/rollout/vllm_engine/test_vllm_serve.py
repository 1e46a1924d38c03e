"""vLLM's own HTTP server, started by `grpo_latent.serve`, against engine hf.

On the same folder.

Not covered: structured outputs, several API processes, data parallelism, a GPU.
"""

import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vllm_cases import MAX_MODEL_LEN, build_vllm_case

from grpo_latent import serve
from grpo_latent.errors import PluginError
from grpo_latent.rollout.llm import LatentLLM
from grpo_latent.rollout.protocol import SamplingParams
from grpo_latent.rollout.vllm import supported
from grpo_latent.rollout.vllm.middleware import LatentRequests

ROOT = Path(__file__).parents[3]
IMAGE_TEXT, TEXT = (
    "read read blue 9 9 ?",
    "red red",
)  # engine hf answers with three spans; with an early end
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    build_vllm_case("qwen2_5_vl", folder)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 42, 3), dtype=np.uint8)).save(
        folder / "picture.png"
    )
    return folder


def start(folder, port, log):
    flags = [
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max-model-len",
        str(MAX_MODEL_LEN),
        "--max-num-seqs",
        "8",
    ]
    # VLLM_SERVER_DEV_MODE: for the worker's counters over HTTP
    env = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_SERVER_DEV_MODE": "1"}
    command = [
        sys.executable,
        "-m",
        "grpo_latent.serve",
        str(folder),
        "--max-latents",
        "64",
        "--enforce-eager",
        *flags,
    ]
    return subprocess.Popen(
        command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


@pytest.fixture(scope="module")
def server(folder):
    """(port, log) of a server that has answered its health check; it is stopped by one SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = folder / "server.log"
    with open(path, "w") as log:
        process = start(folder, port, log)
    try:
        for _ in range(600):
            assert process.poll() is None, path.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        else:
            raise AssertionError(path.read_text()[-3000:])
        yield port
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def client(server):
    import openai

    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{server}/v1", api_key="none", timeout=120, max_retries=0
    )


def chat(client, folder, text, image=None, **options):
    content = [{"type": "text", "text": text}]
    if image is not None:
        data = base64.b64encode(image.read_bytes()).decode()
        content.insert(
            0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        )
    options = {
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "extra_body": {"return_token_ids": True},
    } | options
    return client.chat.completions.create(
        model=str(folder), messages=[{"role": "user", "content": content}], **options
    )


def worker_stats(server):
    body = json.dumps({"method": "latent_stats"}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{server}/collective_rpc",
        body,
        headers={"Content-Type": "application/json"},
    )
    return json.loads(urllib.request.urlopen(request, timeout=30).read())["results"][0]


@pytest.fixture(scope="module")
def reference(folder):
    """Engine hf's greedy trajectories of the two prompts."""
    images = [[Image.open(folder / "picture.png").convert("RGB")], []]
    params = SamplingParams(max_new_tokens=MAX_TOKENS, temperature=0.0)
    llm = LatentLLM(folder)
    trajectories = [
        group[0] for group in llm.generate([f"<image>{IMAGE_TEXT}", TEXT], images, params)
    ]
    assert len(trajectories[0].spans) == 3 and trajectories[1].stop_reason == "eos"
    return [(trajectory, llm.text(trajectory)) for trajectory in trajectories]


@pytest.mark.slow
@pytest.mark.vllm
def test_a_chat_with_an_image_runs_the_spans_that_engine_hf_runs(
    server, client, folder, reference
):
    """Token by token: a span whose latents were not fed back would go on with other text."""
    picture = folder / "picture.png"
    # vLLM takes n > 1 for sampling only: one candidate is as good as greedy
    body = {"return_token_ids": True, "top_k": 1}
    answers = [
        chat(
            client, folder, IMAGE_TEXT, picture, logprobs=True, n=2, temperature=1, extra_body=body
        ),
        chat(client, folder, TEXT),
    ]
    for answer, (trajectory, text) in zip(answers, reference, strict=True):
        assert answer.prompt_token_ids == trajectory.prompt_ids.tolist()
        for choice in answer.choices:
            assert choice.token_ids == trajectory.token_ids.tolist()
            assert choice.message.content.split() == text.split() and "<|lvr" not in text
            assert (
                choice.finish_reason == {"eos": "stop", "length": "length"}[trajectory.stop_reason]
            )
    reported = [entry.logprob for entry in answers[0].choices[0].logprobs.content]
    acted = reference[0][0].response_mask().tolist()
    assert all(
        value == 0 for value, is_action in zip(reported, acted, strict=True) if not is_action
    )
    assert sum(value < 0 for value in reported) > 4


@pytest.mark.slow
@pytest.mark.vllm
def test_what_clients_may_do(server, client, folder, reference):
    """Stop strings, a least number of tokens, latent steps of their own, a client that hangs up.

    Nothing piles up.
    """
    trajectory, text = reference[1]
    word = text.split()[1]
    stopped = chat(client, folder, TEXT, stop=[word]).choices[0]
    assert stopped.finish_reason == "stop" and word not in stopped.message.content
    longer = chat(
        client, folder, TEXT, extra_body={"min_tokens": MAX_TOKENS, "return_token_ids": True}
    ).choices[0]
    assert len(longer.token_ids) == MAX_TOKENS
    with chat(
        client, folder, TEXT, stream=True, max_tokens=90, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    assert chat(client, folder, TEXT).choices[0].token_ids == trajectory.token_ids.tolist()
    body = {"return_token_ids": True, "vllm_xargs": {"latent_steps": 5}}
    longer_spans = chat(
        client, folder, IMAGE_TEXT, folder / "picture.png", extra_body=body
    ).choices[0]
    latent_id = LatentLLM(folder).mechanism.latent_id
    runs = "".join("L" if token == latent_id else "." for token in longer_spans.token_ids).split(
        "."
    )
    assert {len(run) for run in runs[:-1] if run} == {5}  # the last one may be cut
    stats = worker_stats(server)
    assert (
        stats["num_records"] == 0 and stats["num_seats"] <= 1
    )  # the last one's end is announced with the next step


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"use_beam_search": True}, "beam search"),
        ({"vllm_xargs": {"latent_steps": 0}}, "latent_steps: got 0, expected an integer >= 1"),
        ({"vllm_xargs": {"latent": "x"}}, "reserved"),
    ],
)
def test_what_would_be_answered_wrongly_is_refused(client, folder, body, message):
    import openai

    with pytest.raises(openai.BadRequestError, match=message):
        chat(client, folder, TEXT, extra_body=body)


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_middleware_passes_bodies_on(chunks):
    body, seen = b'{"model": "x", "messages": [], "n": 2}', []

    async def app(scope, receive, send):
        message = await receive()
        seen.append(message["body"])
        while message.get("more_body"):
            message = await receive()
            seen.append(message["body"])
        seen.append((await receive())["type"])

    pieces = [
        body[idx::1] if chunks == 1 else body[idx * 13 : (idx + 1) * 13] for idx in range(chunks)
    ]
    messages = [
        {"type": "http.request", "body": piece, "more_body": idx < chunks - 1}
        for idx, piece in enumerate(pieces)
    ] + [{"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    asyncio.run(LatentRequests(app)({"type": "http", "method": "POST"}, receive, None))
    assert (
        b"".join(seen[:-1]) == body and len(seen) == chunks + 1 and seen[-1] == "http.disconnect"
    )


LATENT = {"key": "a", "steps": 2, "seed": 1, "temperature": 0.5, "top_k": -1, "top_p": 1.0}


@pytest.mark.parametrize("place", ["vllm_xargs", "sampling_params.extra_args"])
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"latent": {}}, "latent: reserved for rollouts"),
        ({"latent": LATENT}, "latent: reserved for rollouts"),
        ({"latent_steps": True}, "latent_steps: got True, expected an integer >= 1"),
        ({"latent_steps": 10}, "latent_steps: got 10, expected <= 9, the server's max_latents"),
        ({"latent_steps": 9}, None),
        ({}, None),
    ],
)
def test_the_middleware_refuses_by_the_room_of_the_server(folder, place, extra, message):
    """As vLLM keeps its config: the application's state."""
    body, sent, passed = {}, [], []
    inner = body
    for name in place.split(".")[:-1]:
        inner = inner.setdefault(name, {})
    inner[place.split(".")[-1]] = extra
    namespace = types.SimpleNamespace
    vllm_config = namespace(
        additional_config={"grpo_latent": {"max_latents": 9}},
        model_config=namespace(model=str(folder), max_model_len=MAX_MODEL_LEN),
    )

    async def receive():
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(event):
        sent.append(event)

    async def app(scope, receive, send):
        passed.append(await receive())

    scope = {
        "type": "http",
        "method": "POST",
        "app": namespace(state=namespace(vllm_config=vllm_config)),
    }
    asyncio.run(LatentRequests(app)(scope, receive, send))
    assert bool(passed) is (message is None)
    if message is not None:
        assert sent[0]["status"] == 400
        assert json.loads(sent[1]["body"])["error"]["message"].startswith(f"{place}.{message}")


def arguments(folder, platform, *flags):
    skeleton = serve.read_skeleton(folder)
    return serve.vllm_command(skeleton, str(folder), platform, list(flags), {}, None)


def value_of(command, flag):
    return command[len(command) - command[::-1].index(flag)]


def test_the_command_names_worker_and_scheduler(folder):
    command = arguments(folder, "cpu", "--port", "1")
    assert command[:2] == ["serve", str(folder)] and command[-2:] == ["--port", "1"]
    assert value_of(command, "--worker-cls") == supported.WORKER_CLASSES["cpu"]
    assert value_of(command, "--scheduler-cls") == supported.SCHEDULER_CLASSES[False]
    assert value_of(command, "--host") == "127.0.0.1" and "--no-async-scheduling" in command
    command = arguments(folder, "cuda", "--host", "0.0.0.0")
    assert value_of(command, "--scheduler-cls") == supported.SCHEDULER_CLASSES[True]
    assert command.count("--host") == 1 and "--additional-config" not in command
    assert (
        value_of(arguments(folder, "cuda", "--no-async-scheduling"), "--scheduler-cls")
        == supported.SCHEDULER_CLASSES[False]
    )


def test_the_command_can_be_printed(folder, capsys, monkeypatch):
    monkeypatch.setattr(supported, "installed_vllm", lambda: ("0.27.1", "cpu"))
    monkeypatch.setattr(serve, "pin_runner", lambda: False)
    assert (
        serve.main(
            [str(folder), "--steps", "5", "--max-latents", "9", "--print-command", "--port", "7"]
        )
        == 0
    )
    line = capsys.readouterr().out
    assert line.startswith(
        "VLLM_USE_V2_MODEL_RUNNER=0 python -m grpo_latent.rollout.vllm.cli serve "
    )
    assert line.endswith(" --port 7\n")
    assert '{"grpo_latent": {"overrides": {"steps": 5}, "max_latents": 9}}' in line


def test_what_cannot_be_served_is_said_before_vllm_starts(folder, tmp_path, capsys, monkeypatch):
    def nothing(*args):
        raise PluginError("vLLM is not installed", where="engine vllm")

    monkeypatch.setattr(supported, "installed_vllm", lambda: ("0.27.1", "cpu"))
    monkeypatch.setattr(serve, "pin_runner", lambda: False)
    monkeypatch.setattr(serve.os, "execv", lambda *args: None)  # would make this process a server
    assert serve.main([str(folder), "--steps", "4", "--additional-config", "{}"]) == 2
    for flag in ("--additional_config={}", "--additional-config.grpo_latent.max_latents=9"):
        assert serve.main([str(folder), "--steps", "4", flag]) == 2
    assert capsys.readouterr().err.count("two places for the same options") == 3
    for room, message in (
        ("0", "--max-latents: out of range; got 0"),
        ("3", "no room for one latent span; got 3; expected >= latent.steps = 4"),
    ):
        assert serve.main([str(folder), "--steps", "4", "--max-latents", room]) == 2
        assert message in capsys.readouterr().err
    assert serve.main([str(tmp_path / "nowhere")]) == 2
    monkeypatch.setattr(supported, "installed_vllm", nothing)
    assert serve.main([str(folder)]) == 2
    monkeypatch.setattr(supported, "installed_vllm", lambda: ("0.23.0", "cpu"))
    assert serve.main([str(folder)]) == 2
    errors = capsys.readouterr().err
    assert (
        "CheckpointError" in errors
        and "not installed" in errors
        and "got 0.23.0; expected >=0.24.0" in errors
    )
