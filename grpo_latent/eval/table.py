"""An evaluation's report as tables for a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from grpo_latent.eval.benchmarks.presets import PUBLISHED
from grpo_latent.eval.verdict import LATENTS

HELD = {"used": "bold green", "not used": "yellow", "undecided at this n": "dim"}


def report_table(report: dict) -> Group:
    """Lists accuracies, then each ablation with its verdict, then the verdict on the latents."""
    title = f"{report['checkpoint']}: {report['num_prompts']} prompts, {report['seconds']:.1f} s"
    verdict = escape(f"latents: {report['verdict']['sentence']}")
    notes = [escape(f"note: {note}") for note in (report.get("benchmark") or {}).get("notes", [])]
    return Group(_accuracies(report, title), _ablations(report), verdict, *notes)


def _accuracies(report: dict, title: str) -> Table:
    table = Table(title=title)
    table.add_column("decoding", justify="left")
    for name in ("accuracy", "interval", "tokens", "s / question"):
        table.add_column(name, justify="right")
    sampled = (
        {}
        if report["sampled"] is None
        else {f"sampled, n = {report['sampled']['n']}": report["sampled"]}
    )
    for name, found in ({"greedy": report["greedy"]} | sampled | report["decodings"]).items():
        numbers = (f"{found['tokens_per_question']:.1f}", f"{found['seconds_per_question']:.3g}")
        table.add_row(name, number(found["accuracy"]), interval(found["interval"]), *numbers)
        for k, at_k in found.get("pass_at_k", {}).items():
            if k != "1":
                table.add_row(
                    f"  pass@{k}", number(at_k["estimate"]), interval(at_k["interval"]), "", ""
                )
        for key in ("row", "pair", "group"):
            if f"{key}_accuracy" in found:
                bounds = interval(found.get(f"{key}_interval"))
                table.add_row(f"  {key}s", number(found[f"{key}_accuracy"]), bounds, "", "")
        for category, value in found.get("by_category", {}).items():
            table.add_row(f"  {category}", number(value), "", "", "")
        if PUBLISHED in found:
            table.add_row("  as the paper counts", number(found[PUBLISHED]), "", "", "")
        for category, value in found.get("published_by_category", {}).items():
            table.add_row(f"    {category}", number(value), "", "", "")
    facts = {
        "trajectories with latents": report["latents"]["frac_rollouts"],
        "shuffle follows its donor": report["follow"],
        "nearest token is the box's": report["hit"],
        "leak (nats)": report["leak"],
    }
    table.add_section()
    for name, value in facts.items():
        table.add_row(name, number(value), "", "", "")
    return table


def _ablations(report: dict) -> Table:
    # 0 is also the default, and right for few tasks
    unsaid = "" if report["chance"] else " (verdict.chance)"
    table = Table(
        title=f"latents fed, chance {report['chance']:.3g}{unsaid}; gap over the changed prompts"
    )
    table.add_column("ablation", no_wrap=True)
    for name in ("accuracy", "changed", "gap", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for name, value in report["ablations"].items():
        entry = report["usage"].get(name, {})
        verdict = entry.get("verdict")
        words = "" if verdict is None else f"[{HELD[verdict]}]{verdict}[/]"
        if verdict is not None and entry["about"] != LATENTS:
            words = f"{entry['about']}: {words}"
        bounds = entry.get("gap_interval")
        gap = "" if bounds is None else f"{entry['gap']:+.3f} [{bounds[0]:+.3f}, {bounds[1]:+.3f}]"
        changed = report["num_changed"].get(name, "")
        table.add_row(
            name,
            number(value),
            str(changed),
            escape(gap),
            number(entry.get("p_value"), ".1g"),
            words,
        )
    return table


def number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def interval(bounds: list[float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.3f} … {bounds[1]:.3f}"
