"""The inspector: `python -m grpo_latent.inspect outputs/<run> [outputs/<other> …]` writes one
self-contained report.html.

run folder ──run.py──▶ Run ──┬─ probes.py: what each latent looks at, by the checkpoint ─┐
                             └───────────────────────────────────────────────────────────┴─ payload.py ─ page.py ▶ html
"""
