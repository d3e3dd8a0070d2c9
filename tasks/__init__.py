"""Prefect tasks: one file per stage of the factory. They start processes and keep records; no tensor is in sight."""
