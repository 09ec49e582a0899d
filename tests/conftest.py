"""Shared fixtures: a printed seed, fresh with each change of a kernel, and poisoned memory for kernels under test."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# modules in which tests share code, so that their asserts say what they compared
for _module in ("hf_models", "hf_window_models", "hf_content_models"):
    pytest.register_assert_rewrite(f"tests.{_module}")

SEED_FILE = Path(__file__).with_name("seed.txt")


def _seed() -> int:
    """LCATTN_TEST_SEED, or else the recorded one: `make seed` draws another, which each change of a kernel asks for.

    It stays while tests are mended, so that the inputs that broke one are those that it is mended with.
    """
    if given := os.environ.get("LCATTN_TEST_SEED"):
        return int(given)
    return int(SEED_FILE.read_text().split()[0])


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
