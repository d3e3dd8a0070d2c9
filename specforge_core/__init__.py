"""The factory behind SpecBundle: data, capture, draft training, export and benchmark, free of any orchestrator."""

__version__ = "0.1.0"
