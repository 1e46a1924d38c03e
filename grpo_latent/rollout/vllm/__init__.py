"""Engine `vllm`: latent rollouts in stock vLLM, through its own plug-in points.

    VllmRolloutEngine, or vLLM's HTTP server (`python -m grpo_latent.serve`)
           │ requests                             ▲ trajectories, by latent_pop (RPC); or text
           ▼                                      │
    LLMEngine ▸ LatentScheduler ▸ latent worker ▸ LatentSteps ▸ LatentTable
                                        │           ▲ before the forward: recorded vectors go in
                                        ▼           │ after it: next positions are chosen, recorded
                         V1 runner with LatentRunner's hooks, or V2 runner with LatentModelState

Only this package (and verl's side of it) imports vllm. `symbols` names every vLLM symbol that is
relied on, and the release that renamed it.
"""
