"""The service keeps its OpenAPI document: Schemathesis, all checks, all phases, a few examples of each operation.

`make test-contract` is the long run.
"""

from pathlib import Path

import pytest

from semantic_ids.bundle import Bundle
from service.app import create_app
from service.security import hash_key
from service.settings import Settings
from tests.service.contract import KEY, schemathesis, served


@pytest.mark.timeout(300)
def test_no_request_meets_a_5xx_or_breaks_the_schema(reciting: Bundle, tmp_path: Path):
    settings = Settings(
        bundles=reciting.path.parent,
        data_dir=tmp_path / "redis",
        api_key_hashes=(hash_key(KEY),),
        admin_key_hashes=(hash_key(KEY),),
        think_max_seconds=0.05,
    )
    with served(create_app(settings)) as url:
        done = schemathesis(url, tmp_path / "report", "--seed", "1", "--max-examples", "12", capture=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
