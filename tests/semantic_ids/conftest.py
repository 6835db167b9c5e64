"""Fixtures shared by the contract's tests."""

from pathlib import Path

import pytest

from semantic_ids.bundle import BundleParts
from semantic_ids.catalog import Catalog
from tests.semantic_ids.factories import bundle_parts, random_catalog


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """Forty items with shared SIDs, ties and categories."""
    return random_catalog()


@pytest.fixture
def parts(tmp_path: Path) -> BundleParts:
    """A complete, publishable bundle."""
    return bundle_parts(tmp_path)
