"""The tests of this folder compare with the real transformers, in two versions, without a network."""

import os
from collections.abc import Callable, Iterator

import pytest

from tests.conformance.versions import VERSIONS, Reference

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture(scope="session")
def references() -> Iterator[dict[str, Reference]]:
    """One process for each version, for all tests; each starts when it is first asked."""
    processes = {version: Reference(version) for version in VERSIONS}
    yield processes
    for process in processes.values():
        process.close()


@pytest.fixture
def reference(references: dict[str, Reference]) -> Callable[[str], Reference]:
    """reference(version) -> Reference; the test is skipped where that version has no environment."""
    return references.__getitem__
