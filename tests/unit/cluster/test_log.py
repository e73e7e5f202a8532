"""Log lines: one per record, JSON that parses, extras kept, one handler however often it is set up."""

import json
import logging
from collections.abc import Iterator

import pytest

from cluster.config import LoggingConfig
from cluster.log import HumanFormatter, JsonFormatter, setup


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    return logging.getLogger("retrieval.ingest").makeRecord(
        "retrieval.ingest", 20, "f", 1, message, args, None, extra=extra
    )


def test_json_has_one_object_a_line_with_extras() -> None:
    line = JsonFormatter().format(record("%d documents\nread", 48, collection="corvane", größe=1.5))
    assert "\n" not in line
    entry = json.loads(line)
    assert entry["msg"] == "48 documents\nread"
    assert (entry["level"], entry["logger"], entry["collection"], entry["größe"]) == (
        "info",
        "retrieval.ingest",
        "corvane",
        1.5,
    )
    assert entry["ts"].endswith("Z")


def test_json_carries_the_traceback() -> None:
    try:
        raise ValueError("boom")
    except ValueError as error:
        failed = record("failed")
        failed.exc_info = (ValueError, error, error.__traceback__)
    assert "ValueError: boom" in json.loads(JsonFormatter().format(failed))["exception"]


def test_human_lines_end_with_the_extras() -> None:
    assert HumanFormatter().format(record("read", documents=48)).endswith("retrieval.ingest: read  documents=48")


def test_setup_twice_writes_each_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        setup(LoggingConfig(level="info", format="json"))
    logging.getLogger("cluster").info("hello")
    logging.getLogger("cluster").debug("not this")
    lines = capsys.readouterr().err.splitlines()
    assert [json.loads(line)["msg"] for line in lines] == ["hello"]


def test_libraries_that_talk_too_much_are_kept_to_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    setup(LoggingConfig(level="debug"))
    logging.getLogger("httpx").info("GET /")
    logging.getLogger("httpx").warning("slow")
    assert "GET /" not in capsys.readouterr().err


def test_marks_of_libraries_are_not_shown() -> None:
    marked = record("read", _library_mark=17, documents=48)
    assert "_library" not in HumanFormatter().format(marked)
    assert set(json.loads(JsonFormatter().format(marked))) == {"ts", "level", "logger", "msg", "documents"}
