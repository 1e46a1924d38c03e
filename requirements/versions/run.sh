#!/usr/bin/env bash
# Runs the tests that a package concerns under each bound of setup.py that the pinned set does not have: one file of this
# folder is one bound, laid over .venv in an environment of its own. `make versions` calls it with .venv's python.
#
#   requirements/versions/run.sh .venv/bin/python .venv-versions [transformers-5.9 …]
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=$1 FOLDER=$2
shift 2
[ $# -gt 0 ] || set -- $(cd requirements/versions && ls -- *.txt | sed 's/\.txt$//')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
SITE=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
FAST=(-m "not slow")

tests_of() { # name of a file without its end
  case $1 in
    transformers-5.13) echo tests/models/test_seams.py ;; # a change, to be named
    transformers-* | torch-*) echo tests/models tests/rollout tests/backbones tests/sft tests/latent tests/algo tests/testing ;;
    ray-*) echo tests/verl_plugin/boot tests/verl_plugin/trainer/test_follow.py ;;
    hydra-*) echo tests/common tests/verl_plugin/trainer/test_training_config.py tests/verl_plugin/trainer/test_plan.py ;;
    numpy-*) echo tests/data tests/rewards tests/algo tests/eval ;;
    plotly-*) echo tests/inspect ;;
    *) echo "no tests for $1" >&2; return 1 ;;
  esac
}

failed=()
for name in "$@"; do
  tests=$(tests_of "$name")
  env=$FOLDER/$name
  if ! [ -f "$env/.installed" ] || [ "requirements/versions/$name.txt" -nt "$env/.installed" ]; then
    rm -rf "$env"
    "$PYTHON" -m venv --without-pip "$env"
    "$PYTHON" -m pip --python "$env" install --quiet --disable-pip-version-check --no-deps -r "requirements/versions/$name.txt"
    # its own packages come first on sys.path, then .venv's
    "$env/bin/python" -c 'import sys, sysconfig; open(sysconfig.get_path("purelib") + "/zz_of_grpo_latent.pth", "w").write(f"import site; site.addsitedir({sys.argv[1]!r})\n")' "$SITE"
    touch "$env/.installed"
  fi
  echo "== $name: $tests"
  # PYTHONPATH: this checkout, whatever .venv has installed
  PYTHONPATH=$PWD "$env/bin/python" -m pytest "${FAST[@]}" -q $tests || failed+=("$name")
done
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
echo "all bounds hold: $*"
