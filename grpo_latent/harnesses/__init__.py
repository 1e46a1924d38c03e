"""Latent checkpoints in the evaluation harnesses of others: lmms-eval and VLMEvalKit.

    lmms-eval    lmms_eval_model.py   a model by entry point: `lmms-eval --model grpo_latent`
    VLMEvalKit   vlmevalkit.py        a model class, and its OpenAI class against our server
    both         answers.py           questions to answers

Neither harness is needed by anything else here; docs/evaluation.md has the commands.
"""
