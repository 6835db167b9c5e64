"""Fixtures shared by the contract's tests."""

from pathlib import Path

import pytest
from hypothesis import settings

from semantic_ids.bundle import BundleParts
from semantic_ids.catalog import Catalog
from tests.semantic_ids.factories import bundle_parts, random_catalog

# An example may take long on a busy machine; what it must not do is decide by the clock.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """Forty items with shared SIDs, ties and categories."""
    return random_catalog()


@pytest.fixture
def parts(tmp_path: Path) -> BundleParts:
    """A complete, publishable bundle."""
    return bundle_parts(tmp_path)
