"""Engine `vllm`: latent rollouts in stock vLLM, through its own plug-in points.

    VllmRolloutEngine ──requests──▶ LLMEngine ▸ LatentScheduler ▸ latent worker ▸ V1 runner with LatentRunner's hooks
           ▲                                                                        │ _preprocess: recorded vectors go in
           └──────────trajectories────── latent_pop (RPC) ◀── LatentTable ◀─────────┘ _sample: next position is chosen

Only this package (and verl's side of it) imports vllm. `compat` names every vLLM symbol that is relied on.
"""
