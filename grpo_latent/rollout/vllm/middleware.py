"""Refuses what HTTP clients of a served latent model may not ask: `--middleware` of vLLM's server.

vLLM's workers cannot refuse a request, and some would be answered wrongly: beam search sends a
beam's placeholders back as a prompt, without the latents that stood there.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

STEPS_FIELD = "latent_steps"
# ASGI's own types, as its specification has them
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class LatentRequests:
    """Answers 400 to what latents do not go through; passes everything else on, byte for byte.

    Plain ASGI.

    `"vllm_xargs": {"latent_steps": 4}` in a request is its number of latent steps a span; at
    `/inference/v1/generate`, which takes vLLM's own sampling parameters, it is `"sampling_params":
    {"extra_args": {"latent_steps": 4}}`.
    """

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
            messages.append(await receive())
        problem = refusal(
            b"".join(message.get("body", b"") for message in messages), lambda: _room(scope["app"])
        )
        if problem is not None:
            await _send_400(send, problem)
            return

        async def replayed() -> Message:
            """The messages that were read here, then those that still come."""
            # the server waits on `receive` for the client to hang up: it must not end
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replayed, send)


def _room(app: Any) -> int:
    """Latent steps that a completion of this server, a Starlette application, may hold."""
    # imports transformers
    from grpo_latent.rollout.vllm.skeleton import worker_options

    vllm_config = app.state.vllm_config
    return worker_options(vllm_config).room(vllm_config.model_config.max_model_len)


def refusal(body: bytes, room: Callable[[], int]) -> str | None:
    """Why a request's body is refused, None if it is not.

    Args:
        room: latent steps that a completion may hold; asked only if the request sets its own.

    >>> refusal(b'{"use_beam_search": true}', lambda: 256)
    'use_beam_search: latents do not go through beam search'
    >>> refusal(b'{"vllm_xargs": {"latent_steps": 4}}', lambda: 256)
    """
    try:
        values = json.loads(body)
    except ValueError:
        return None  # vLLM says what is wrong with it
    if not isinstance(values, dict):
        return None
    if values.get("use_beam_search"):
        return "use_beam_search: latents do not go through beam search"
    params = values.get("sampling_params")
    places = {"vllm_xargs": values.get("vllm_xargs")}
    if isinstance(params, dict):
        places["sampling_params.extra_args"] = params.get("extra_args")
    problems = (
        _extra_refusal(extra, where, room)
        for where, extra in places.items()
        if isinstance(extra, dict)
    )
    return next(filter(None, problems), None)


def _extra_refusal(extra: dict, where: str, room: Callable[[], int]) -> str | None:
    """Why the `extra_args` of a request are refused, None if they are not."""
    if "latent" in extra:
        return f"{where}.latent: reserved for rollouts; a request may set {where}.{STEPS_FIELD}"
    if STEPS_FIELD not in extra:
        return None
    steps = extra[STEPS_FIELD]
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        return f"{where}.{STEPS_FIELD}: got {steps!r}, expected an integer >= 1"
    if steps > room():
        return (
            f"{where}.{STEPS_FIELD}: got {steps}, expected <= {room()}, the server's max_latents"
        )
    return None


async def _send_400(send: Send, message: str) -> None:
    """Answers in the form of OpenAI's errors, which their client raises as `BadRequestError`."""
    error = {
        "message": message,
        "type": "BadRequestError",
        "param": message.split(":")[0],
        "code": 400,
    }
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
