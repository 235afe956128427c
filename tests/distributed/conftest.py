"""The ranks that all tests here share."""

from collections.abc import Iterator

import pytest

from tests.distributed.rank_pool import Pool


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Up to three gloo processes: `ranks.run(function, size, ...)`."""
    pool = Pool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
