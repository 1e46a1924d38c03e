"""Small runs of LVR's SFT on the rows of `inputs`."""

from run_cases import compose_sft, settings_from

from grpo_latent.sft.run import run_sft

SMALL = {
    "data.format": "parquet",
    "data.min_image_tokens": None,
    "data.max_image_tokens": None,
    "model.vision_cache_bytes": 1 << 20,
    "latent.head": "mlp",
    "latent.steps": 2,
    "trainer.max_steps": 6,
    "trainer.per_device_train_batch_size": 4,
    "trainer.gradient_accumulation_steps": 1,
    "trainer.learning_rate": 1e-2,
    "trainer.warmup_steps": 2,
    "trainer.save_steps": 3,
    "trainer.save_total_limit": None,
    "schedule.horizon_steps": 10,
}


def config_of(inputs, output_dir, name="sft", **overrides):
    values = {
        "model.path": str(inputs / "base"),
        "data.train_files": str(inputs / "rows.parquet"),
        "trainer.output_dir": str(output_dir),
    }
    return compose_sft(values | SMALL | overrides, name)


def run(inputs, output_dir, **overrides):
    return run_sft(settings_from(config_of(inputs, output_dir, **overrides)))
