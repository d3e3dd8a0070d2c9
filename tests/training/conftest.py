"""Features to train on, written once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.factory import write_features, write_vocabulary


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("training-inputs")
    write_features(directory / "features")
    write_vocabulary(directory / "vocabulary")
    return directory


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    # Tensors this small take many times longer on several threads of a busy machine.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
