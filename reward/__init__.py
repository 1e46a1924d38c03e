"""Reward functions: a file each, complete in itself, to be copied as the start of one's own.

Each is verl's `compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs)`.
`solution_str` is the text of the completion with latent spans and their delimiters left out;
`extra_info["latent"]` says what was left out: `num_spans`, `num_steps`, `num_forced_ends`,
`span_offsets` (character of `solution_str` at which each span stood) and `stop_reason` ("eos" or
"length"). Tokens that a mechanism mixes with a vector (HRPO) are text: nothing of them is left out,
so they count in none of these. Nothing here depends on how a tokenizer prints special tokens.
"""
