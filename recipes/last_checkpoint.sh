# Where verl and the toolkit leave a model for Hugging Face; sourced from the repository's root.
last_checkpoint() { # folder of a GRPO run
  local tracker="$1/checkpoints/latest_checkpointed_iteration.txt" step
  step=$(cat "$tracker") || return 1
  local folder="$1/checkpoints/global_step_$step"
  if [[ ! $step =~ ^[0-9]+$ || ! -d $folder ]]; then
    echo "$tracker: got '$step'; expected the step of a folder $1/checkpoints/global_step_<n>" >&2
    return 1
  fi
  echo "$folder/actor/huggingface"
}

best_checkpoint() { # folder of a GRPO run; prints nothing where none is named
  python - "$1/checkpoints" << 'PYTHON'
import sys
from grpo_latent.common.best_checkpoint import read_best

best = read_best(sys.argv[1])
print("" if best is None else best.model_folder(sys.argv[1]))
PYTHON
}
