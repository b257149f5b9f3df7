"""What all tests share: the same random numbers in every order, one thread."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    # The tensors of the tests are small: threads would only wait for one another, and for other processes.
    torch.set_num_threads(1)
