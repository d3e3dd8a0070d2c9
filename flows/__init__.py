"""Prefect flows: which tasks run, for which entries, in which order."""
