"""The control of random rewards: no completion can earn them.

What still improves is not learned from the reward.

Accuracy and form are reported as they are, so that the run's held-out curve shows them.
"""

import random

from reward.digits import compute_score as digits_score

_GENERATOR = random.Random(0)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> dict:
    terms = digits_score(data_source, solution_str, ground_truth, extra_info, **kwargs)
    return {**terms, "score": _GENERATOR.random()}
