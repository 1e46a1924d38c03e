"""The inspector: `python -m grpo_latent.inspect outputs/<run> …` writes one report.html.

run folder ──run.py──▶ Run ──┬─ probes.py: what each latent looks at ┐
                             └───────────────────────────────────────┴─ payload.py ─ page.py ▶ html
"""
