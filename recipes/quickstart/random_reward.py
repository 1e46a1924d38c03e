"""The random-reward control: a reward that no completion can earn. What still improves under it is not learned from it."""

import random

_GENERATOR = random.Random(0)


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs) -> float:
    return _GENERATOR.random()
