"""What each run draws anew, for tests whose whole table takes minutes."""

import os
import random

_SEED = int(os.environ.get("GRPO_LATENT_SEED", random.randrange(2**32)))
# what an assertion says: with it in the environment a run draws the same
REPEAT = f"GRPO_LATENT_SEED={_SEED}"


def drawing() -> random.Random:
    return random.Random(_SEED)
