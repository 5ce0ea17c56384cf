"""What all tests on a GPU need once."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def awake() -> None:
    """A first kernel in the thread of the backward pass: cuBLAS warns where it is to be the first."""
    if torch.cuda.is_available():
        torch.ones(1, device="cuda", requires_grad=True).mul(2).sum().backward()
