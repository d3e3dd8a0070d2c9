"""What training costs: our path, its plain references and a conventional trainer, side by side on one GPU.

`python -m specforge_core.training.bench` measures; `python -m specforge_core.training.bench.make_lengths` made the
lengths of real conversations that it draws from.
"""
