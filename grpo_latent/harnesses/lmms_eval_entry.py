"""What lmms-eval finds by the entry point `lmms_eval.models`: where the model's class is."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "grpo_latent"


def manifest() -> ModelManifest:
    return ModelManifest(
        model_id=MODEL_ID,
        chat_class_path="grpo_latent.harnesses.lmms_eval_model.GrpoLatent",
    )
