"""What a build of an entry takes, from the target's config and measured rates alone. Torch-free.

`configs` and `hub_facts.json` know the target, `target_model` counts its weights, bytes and FLOPs, `draft_model` those
of the draft, `conversations` says what is assumed about the data, `rates` reads `reports/`, `hardware` the data sheets;
`estimate` puts them together by stage, `fit` says what does not fit, and `check` holds it against measured runs.
"""
