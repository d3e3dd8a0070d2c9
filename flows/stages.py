"""The tasks that flows call for one entry, in one place: a test of a flow replaces this module and nothing else."""

from tasks.benchmark import benchmark
from tasks.capture import capture
from tasks.champion import champion
from tasks.export import export
from tasks.gates import check_gates
from tasks.publish import publish
from tasks.regenerate import regenerate
from tasks.registry import promote, register, standing
from tasks.report import report
from tasks.train import train
from tasks.vocabulary import vocabulary

__all__ = [
    "benchmark",
    "capture",
    "champion",
    "check_gates",
    "export",
    "promote",
    "publish",
    "regenerate",
    "register",
    "report",
    "standing",
    "train",
    "vocabulary",
]
