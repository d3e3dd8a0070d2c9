"""What a build of an entry takes, from the target's config and measured rates alone. Torch-free.

`configs` and `hub_facts.json` know the target; `target_model` counts its weights, bytes and FLOPs, `draft_model` those
of the draft and its training; `conversations` says what is assumed about the data; `rates` reads `reports/`, `hardware`
has the data sheets; `serving` and `estimate` put them together by stage, `fit` says what will not work and what to
change, `entry`, `table` and `command` make it one answer, `check` holds it against measured runs, `recorded`
against a build that left a report, `scaling` against trainings on several GPUs and on live features; a prediction
beside a measurement is a `comparison`.
"""
