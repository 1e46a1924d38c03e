# The stages that the recipes' run.sh share; sourced from the repository's root. Each recipe sets
#   SEED, OUT      of the run; everything it writes lies in $OUT
#   DATA           its rows: train_rl, dev and heldout.parquet
#   CONFIGS        the folder of its configs, which the functions take by name
# Further arguments of sft, evaluate and grpo are hydra overrides. ONLY_SFT=1 ends a recipe where GRPO would begin, without
# evaluations: `benchmarks/robustness.py` starts there.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

source recipes/last_checkpoint.sh

begin() { # starts anew
  rm -rf "$OUT"
  mkdir -p "$OUT"
  STARTED=$(date +%s)
}

sft() { # config, model, rows, output folder
  python -m grpo_latent.sft --config-dir "$CONFIGS" --config-name "$1" model.path="$2" data.train_files="$3" \
    trainer.output_dir="$4" trainer.seed="$SEED" "${@:5}"
}

grpo() { # config, checkpoint: trains into $OUT/grpo
  if [ -n "${ONLY_SFT:-}" ]; then exit 0; fi # what runs beside ends with the script
  local started
  started=$(date +%s)
  python -m grpo_latent.train --config-dir "$CONFIGS" --config-name "$1" actor_rollout_ref.model.path="$2" \
    data.train_files="$DATA/train_rl.parquet" data.val_files="$DATA/dev.parquet" \
    latent.output_dir="$OUT/grpo" latent.seed="$SEED" "${@:3}"
  GRPO_SECONDS=$(($(date +%s) - started))
}

evaluate() { # config, checkpoint, name: writes $OUT/evaluation_<name>.json
  if [ -n "${ONLY_SFT:-}" ]; then return 0; fi
  python -m grpo_latent.evaluate --config-dir "$CONFIGS" --config-name "$1" model.path="$2" \
    data.val_files="$DATA/heldout.parquet" output="$OUT/evaluation_$3.json" seed="$SEED" "${@:4}"
}

evaluate_rl() { # config: the last checkpoint of $OUT/grpo and, greedily, the best one where that is another
  local last best
  last=$(last_checkpoint "$OUT/grpo")
  evaluate "$1" "$last" grpo "${@:2}"
  best=$(best_checkpoint "$OUT/grpo")
  if [ -n "$best" ] && ! [ "$best" -ef "$last" ]; then
    evaluate "$1" "$best" best "${@:2}" 'ablations=[]' rollout.n=0 leak_prompts=0
  fi
}

summarize() { # arguments of summarize.py
  python recipes/summarize.py "$OUT" --seed "$SEED" --grpo-seconds "$GRPO_SECONDS" \
    --seconds-total $(($(date +%s) - STARTED)) "$@"
}

beside() { # log, command: runs beside what follows, as a group of processes that ends with the script
  set -m
  "${@:2}" > "$1" 2>&1 &
  set +m
  BESIDE=$! BESIDE_LOG=$1
  trap 'kill -- -$BESIDE 2> /dev/null || true' EXIT
}

join() { # waits for it
  wait "$BESIDE" || { cat "$BESIDE_LOG" >&2; exit 1; }
  trap - EXIT
}
