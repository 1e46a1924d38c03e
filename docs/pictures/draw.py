"""Draws the documentation's pictures: python docs/pictures/draw.py writes them beside this file.

No library: each picture is a list of SVG elements.
"""

from __future__ import annotations

from pathlib import Path

INK, PALE, TEXT, LATENT, IMAGE, PLACED = (
    "#24292f", "#8c959f", "#ddf4ff", "#ffd8b5", "#dafbe1", "#eaeef2",
)  # fmt: skip
ARROWHEAD = (
    '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
    f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{INK}"/></marker></defs>'
)


def label(x, y, text, size=13, anchor="middle", color=INK, style="") -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{color}" {style}>{text}</text>'


def box(x, y, width, height, fill, *lines) -> str:
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{INK}"/>'
    ]
    first = y + height / 2 + 5 - 8.5 * (len(lines) - 1)
    parts += [label(x + width / 2, first + 17 * i, line) for i, line in enumerate(lines)]
    return "".join(parts)


def arrow(path, color=INK) -> str:
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.6" marker-end="url(#head)"/>'


def svg(width, height, title, parts) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" role="img"><title>{title}</title>'
        f'<rect width="{width}" height="{height}" fill="white"/>{ARROWHEAD}{"".join(parts)}</svg>\n'
    )


def image(x, y, side) -> str:
    """The task's picture: digits of several colours on a grid."""
    cell = side / 4
    parts = [f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="#333" stroke="{INK}"/>']
    for column, row, digit, color in (
        (0, 0, "3", "#79c0ff"), (2, 0, "1", "#7ee787"), (1, 1, "7", "#ff7b72"),
        (3, 2, "8", "#f2cc60"), (0, 3, "5", "#d2a8ff"), (2, 3, "0", "#ffffff"),
    ):  # fmt: skip
        place = x + cell * (column + 0.5), y + cell * (row + 0.78)
        parts.append(label(*place, digit, 17, color=color, style='font-weight="bold"'))
    return "".join(parts)


def trajectory() -> str:
    """One completion, position by position."""
    width, gap, top, left = 88, 8, 118, 190
    positions = [
        ("<start>", "e(<start>)", "yes", TEXT),
        ("latent z", "z = head(h)", "no", LATENT),
        ("<end>", "e(<end>)", "no", PLACED),
        ("<answer>", "e(<answer>)", "yes", TEXT),
        ("7", "e(7)", "yes", TEXT),
        ("</answer>", "e(</answer>)", "yes", TEXT),
        ("<eos>", "–", "yes", TEXT),
    ]
    parts = [image(44, 22, 84), label(86, 128, "read red ?", 15)]
    parts += [label(86, 148, "image and question", 12, color=PALE)]
    for name, y in (("what is fed", 196), ("did the policy choose it?", 226)):
        parts.append(label(left - 12, y, name, 13, "end", PALE))
    for index, (what, fed, acts, fill) in enumerate(positions):
        x = left + index * (width + gap)
        middle = x + width / 2
        parts.append(box(x, top, width, 44, fill, what))
        parts.append(label(middle, 196, fed, 12))
        parts.append(
            label(middle, 226, acts, 13, style='font-weight="bold"' if acts == "yes" else "")
        )
    start, latent, end, answer = (left + i * (width + gap) + width / 2 for i in range(4))
    parts += [
        arrow(f"M132 64C{start - 60} 40 {start - 6} 60 {start} {top - 4}"),
        label((132 + start) / 2 + 8, 40, "sees the image", 12),
        arrow(f"M{start + 6} {top - 4}C{start + 20} 66 {latent - 20} 66 {latent - 4} {top - 4}"),
        label((start + latent) / 2, 70, "h", 14, style='font-style="italic"'),
        arrow(f"M{latent + 8} {top - 4}C{latent + 40} 40 {answer + 40} 40 {answer + 96} {top - 4}"),
        label((latent + answer) / 2 + 66, 50, "text reads z, not the image (latents_only)", 12),
        label(
            left, 268, "GRPO scores what was chosen. A latent is an input: recorded in the rollout,", 13, "start"
        ),
        label(left, 286, "fed again in training as it was. <end> is placed by the mechanism.", 13, "start"),
    ]  # fmt: skip
    return svg(880, 304, "One latent trajectory", parts)


def training_step() -> str:
    """A step: what goes from where to where."""
    parts = [
        box(20, 40, 150, 62, TEXT, "prompts", "(rows of a parquet)"),
        box(230, 40, 190, 62, LATENT, "rollout", "G trajectories a prompt"),
        box(480, 40, 170, 62, TEXT, "reward function", "sees text without spans"),
        box(710, 40, 150, 62, TEXT, "advantages", "within each group"),
        box(20, 190, 150, 62, PLACED, "new weights", "to the rollout engine"),
        box(230, 190, 190, 62, LATENT, "replay", "recorded latents fed again"),
        box(480, 190, 170, 62, TEXT, "clipped loss, KL", "over actions only"),
        box(710, 190, 150, 62, PLACED, "AdamW", "FSDP2, checkpoint"),
        arrow("M170 71H226"),
        arrow("M420 71H476"),
        arrow("M650 71H706"),
        arrow("M325 102V186"),
        label(332, 134, "ids, kinds, latents,", 12, "start"),
        label(332, 151, "log-probs of the rollout", 12, "start"),
        arrow("M420 221H476"),
        arrow("M650 221H706"),
        arrow("M785 102C785 150 600 130 570 186"),
        arrow("M785 252C785 306 95 306 95 256"),
        arrow("M95 190C95 130 250 150 262 106"),
        label(440, 272, "gap = |replayed − rollout log-prob|: above the bound the run stops", 12),
    ]
    return svg(880, 320, "One training step", parts)


def main() -> None:
    folder = Path(__file__).parent
    (folder / "trajectory.svg").write_text(trajectory())
    (folder / "training_step.svg").write_text(training_step())


if __name__ == "__main__":
    main()
