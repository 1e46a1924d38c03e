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
