# Where verl and the toolkit leave a model for Hugging Face; sourced from the repository's root.
last_checkpoint() { # folder of a GRPO run
  echo "$1/checkpoints/global_step_$(cat "$1/checkpoints/latest_checkpointed_iteration.txt")/actor/huggingface"
}
