"""The page: template, styles, scripts and data in one file that fetches nothing.

Values of rollouts cannot act: they stand in `application/json` blocks with every `<` escaped, the
scripts write them with `textContent`, and a content security policy allows the page's own scripts
by hash, no others, and no network at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources

import jinja2
from markupsafe import Markup

from grpo_latent.errors import ConfigError
from grpo_latent.inspect.report import Report

SCRIPTS = ("core.js", "charts.js", "heat.js", "trajectory.js", "groups.js", "main.js")


def render(report: Report, title: str) -> str:
    """Renders the page's HTML."""
    scripts = [plotly_bundle(), "\n".join(_asset(name) for name in SCRIPTS)]
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data: blob:",
            "style-src 'unsafe-inline'",
            f"script-src {' '.join(script_hash(script) for script in scripts)}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_asset("report.html.j2")).render(
        title=title,
        policy=policy,
        style=Markup(_asset("report.css")),
        plotly=Markup(scripts[0]),
        script=Markup(scripts[1]),
        overview=Markup(embed(json.dumps(report.overview, allow_nan=False))),
        blocks={index: Markup(embed(text)) for index, text in report.blocks.items()},
    )


def embed(json_text: str) -> str:
    """Escapes JSON for a script element: `</script>` and `<!--` cannot occur in it.

    >>> embed('"</script>"')
    '"\\\\u003c/script\\\\u003e"'
    """
    for character in "<>&":
        json_text = json_text.replace(character, f"\\u{ord(character):04x}")
    return json_text


def script_hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def plotly_bundle() -> str:
    """Reads plotly.js as its Python package ships it.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        script = (
            resources.files("plotly")
            .joinpath("package_data", "plotly.min.js")
            .read_text(encoding="utf-8")
        )
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ConfigError(
            "plotly is not installed",
            where="inspector",
            expected="plotly",
            fix='In the checkout: pip install -e ".[inspect]"',
        ) from error
    return script.replace("\r\n", "\n").replace(
        "\r", "\n"
    )  # as browsers read it before they hash it


def _asset(name: str) -> str:
    return (
        resources.files("grpo_latent.inspect").joinpath("assets", name).read_text(encoding="utf-8")
    )
