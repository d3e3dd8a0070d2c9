"""A Hub for tests and for trying things out: real HTTP for the real `huggingface_hub` client, everything in a folder.

    python -m tests.hub_like --root .specbundle/hub --port 8900

It knows what publishing and reading back need: repositories of models and data sets, LFS, commits with parents, tags,
collections. It does not know Xet, by which the client of the public Hub uploads: HF_HUB_DISABLE_XET=1 turns that off.
`injection.py` has its faults.
"""
