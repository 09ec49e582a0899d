"""Shared fixtures: a fresh, printed seed for each run, and poisoned memory for kernels under test."""

import os
import secrets
from collections.abc import Iterator

import pytest
import torch

SEED = int(os.environ.get("LCATTN_TEST_SEED", secrets.randbelow(2**31)))


def pytest_report_header() -> str:
    return f"lcattn: LCATTN_TEST_SEED={SEED} repeats this run's random inputs"


@pytest.fixture
def seed() -> int:
    """The seed of this run."""
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every tensor from torch.empty, and every scratch buffer of the kernels, starts as NaN."""
    from lcattn import _C

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    _C.poison_scratch(True)
    yield
    _C.poison_scratch(False)
    torch.use_deterministic_algorithms(False)
