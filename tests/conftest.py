"""Shared fixtures: a printed seed, fresh with each change of the code, and poisoned memory for kernels under test."""

import hashlib
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def _seed() -> int:
    """LCATTN_TEST_SEED, or else one drawn from the committed code, so that running a commit again finds the same."""
    if given := os.environ.get("LCATTN_TEST_SEED"):
        return int(given)
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD:csrc", "HEAD:lcattn", "HEAD:tests"]
    try:
        trees = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return secrets.randbelow(2**31)
    return int(hashlib.sha256(trees).hexdigest(), 16) % 2**31


SEED = _seed()


def pytest_report_header() -> str:
    return f"lcattn: LCATTN_TEST_SEED={SEED} repeats this run's random inputs"


@pytest.fixture(autouse=True)
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
