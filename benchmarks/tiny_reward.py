"""Reward of tiny runs: the share of digits among the words, and a bit for each span."""


def compute_score(data_source, solution_str, ground_truth, extra_info):
    words = solution_str.split()
    digits = sum(word.isdigit() for word in words) / max(1, len(words))
    score = digits + 0.1 * extra_info["latent"]["num_spans"]
    return {"score": score, "accuracy": float(ground_truth in words)}
