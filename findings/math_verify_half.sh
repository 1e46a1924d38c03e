#!/usr/bin/env bash
# math-verify 0.9.0 (with latex2sympy2_extended 1.11.0, sympy 1.14.0, antlr4-python3-runtime 4.9.3), seen on 2026-11-28.
#
# Guess: between marks of maths a decimal is read as it is written, and `parse` reports the text that it read.
# Seen:  one decimal alone is rewritten before it is read: $0.5$ (and $.5$) becomes an exact fraction and is reported as
#        "\frac{1}{2}", while $0.50$, $0.25$ and $-0.5$ stay decimals and are reported as written. And a percent sign is
#        read only where it is written as LaTeX does not allow: 50% is a half, 50\% and $50\%$ are 50, so `verify` takes
#        0.5 for the first and not for the others.
#
# Means: a guard that compares the digits of a text with those of what was read refuses the most frequent decimal of all;
#        and a percentage that is typeset right scores 0. reward/accuracy.py hands plain numbers over without marks
#        (PLAIN_NUMBER), and grpo_latent/answers reads numbers and percents itself (tests/answers/test_same_answer.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check math-verify==0.9.0 latex2sympy2_extended==1.11.0 \
  sympy==1.14.0 antlr4-python3-runtime==4.9.3
"$folder/venv/bin/python" - <<'PYTHON'
import sys

from math_verify import parse, verify

# typeset -> the text that is reported as read
texts = {
    "$0.5$": r"\frac{1}{2}",
    "$.5$": r"\frac{1}{2}",
    "$0.50$": "0.50",
    "$0.25$": "0.25",
    "$-0.5$": "-0.5",
}
changed = False
for text, reported in texts.items():
    parsed = parse(text)
    print(f"{text:8} -> {parsed}")
    changed |= parsed[-1] != reported
# percentage -> whether it equals a half
for text, is_half in {"50%": True, r"50\%": False, r"$50\%$": False}.items():
    parsed = parse(text)
    equals = verify(parse("0.5"), parsed)
    print(f"{text:8} -> {parsed}: equals 0.5: {equals}")
    changed |= equals != is_half
sys.exit("changed: see above" if changed else 0)
PYTHON
