"""Tests: they mirror the tree of what they test."""

import os
import sys

# Programs among the tests inherit the variable, and start without the seconds that importing torch takes.
if "pytest" in sys.modules:
    import torch

    # Triton reads it when it is imported and when a kernel is decorated, so it is set before any test module is
    # imported. It changes nothing by itself: a kernel runs in the interpreter only inside `dispatch.interpreter()`.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
