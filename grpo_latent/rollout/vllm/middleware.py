"""What HTTP clients of a served latent model may ask: a middleware of vLLM's server (`--middleware`), plain ASGI.

vLLM's workers cannot refuse a request, and some would be answered wrongly: beam search sends a beam's placeholders back as a
prompt, without the latents that stood there.
"""

from __future__ import annotations

import json

STEPS_FIELD = "latent_steps"


class LatentRequests:
    """Answers 400 to what latents do not go through; passes everything else on, byte for byte.

    `"vllm_xargs": {"latent_steps": 4}` in a request is the number of latent steps a span for it.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
            messages.append(await receive())
        problem = refusal(b"".join(message.get("body", b"") for message in messages))
        if problem is not None:
            await _send_400(send, problem)
            return

        async def replayed():
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replayed, send)


def refusal(body: bytes) -> str | None:
    """Why a request's body is refused, None if it is not.

    >>> refusal(b'{"use_beam_search": true}')
    'use_beam_search: latents do not go through beam search'
    >>> refusal(b'{"vllm_xargs": {"latent_steps": 4}}')
    """
    try:
        values = json.loads(body)
    except ValueError:
        return None  # vLLM says what is wrong with it
    if not isinstance(values, dict):
        return None
    if values.get("use_beam_search"):
        return "use_beam_search: latents do not go through beam search"
    extra = values.get("vllm_xargs")
    if not isinstance(extra, dict):
        return None
    if "latent" in extra:
        return f"vllm_xargs.latent: reserved for rollouts; a request may set vllm_xargs.{STEPS_FIELD}"
    steps = extra.get(STEPS_FIELD, 1)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        return f"vllm_xargs.{STEPS_FIELD}: got {steps!r}, expected an integer >= 1"
    return None


async def _send_400(send, message: str) -> None:
    """In the form of OpenAI's errors, which their client raises as `BadRequestError`."""
    error = {"message": message, "type": "BadRequestError", "param": message.split(":")[0], "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
