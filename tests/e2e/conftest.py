"""A terminal over the indexed trade, for the tests of one file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import trade


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[trade.Desk]:
    """Each test takes names of its own in the registry."""
    with trade.desk(trade.write_config(tmp_path_factory.mktemp("trade"))) as made:
        made.ok("index")
        yield made


@pytest.fixture
def nothing_left(desk: trade.Desk) -> Iterator[None]:
    """Fails a test after which something that it started still runs."""
    yield
    desk.assert_nothing_left()
