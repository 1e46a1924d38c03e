#!/usr/bin/env bash
# math-verify 0.9.0 (with latex2sympy2_extended 1.11.0, sympy 1.14.0, antlr4-python3-runtime 4.9.3), seen on 2026-11-27.
#
# Guess: a number whose thousands LaTeX sets apart, as in $1\,200$, is read as 1200, or not at all.
# Seen:  it is read as a mixed number, whose groups are added: $1\,200$ is 201, $1\,234\,567$ is 802; a group of zeros
#        multiplies instead: $12\,000$ is 0. With {,} or \! between the groups it is read right. No warning is given, and
#        `verify` says True for 201, 802 and 0, False for the number that stands there.
#
# Means: an accuracy reward that hands a model's answer to math-verify punishes a right answer that is typeset well, and
#        rewards a wrong one. reward/accuracy.py joins such groups first (THOUSANDS; tests/reward/test_accuracy_reward.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check math-verify==0.9.0 latex2sympy2_extended==1.11.0 \
  sympy==1.14.0 antlr4-python3-runtime==4.9.3
"$folder/venv/bin/python" - <<'PYTHON'
import sys

from math_verify import parse, verify

# typeset -> (what stands there, what is read)
cases = {
    r"$1\,200$": ("1200", "201"),
    r"$1\,234\,567$": ("1234567", "802"),
    r"$12\,000$": ("12000", "0"),
    r"$12\;000$": ("12000", "0"),
    r"$12{,}000$": ("12000", "12000"),
    r"$12\!000$": ("12000", "12000"),
}
changed = False
for text, (meant, read) in cases.items():
    parsed = parse(text)
    equals_meant, equals_read = (verify(parse(number), parsed) for number in (meant, read))
    print(f"{text:18} -> {parsed}: equals {meant}: {equals_meant}; equals {read}: {equals_read}")
    changed |= not equals_read or equals_meant != (meant == read)
sys.exit("changed: see above" if changed else 0)
PYTHON
