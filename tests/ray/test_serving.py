"""The pipeline on a real local Ray, over real HTTP: answers, streams, names, moved aliases, hang-ups, lost stores.

One server for all tests of this file; the last ones take its Milvus away. Scaling under load is not covered, and
neither is Serve's local testing mode, which does not live beside a real Serve in one process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.config import Config
from cluster.errors import BadInput, MetierError, NotFound, ResourcesShort, Unavailable
from cluster.registry import AdapterVersion, Registry, ReleaseVersion
from serving.client import Client, Reply
from serving.up import running
from tests import trade

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # the libraries', of themselves
QUESTION = [{"role": "user", "content": "What glass has the elm lamp?"}]
BASE = "tiny-llama"
FIRST, SECOND = f"{BASE}:first", f"{BASE}:second"


@dataclass(frozen=True)
class Up:
    """The server of this file and what was published for it."""

    config: Config
    url: str
    registry: Registry
    first: AdapterVersion
    second: AdapterVersion
    released: ReleaseVersion


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Knowledge, two adapters, a release of the first one on ``prod``; served."""
    directory = tmp_path_factory.mktemp("served")
    config = trade.configure(
        directory,
        "store.timeout_s=3",
        "ray.num_cpus=2",
        "serving.generator.batch_size=2",
        "serving.generator.max_replicas=1",
        "serving.generator.target_ongoing_requests=2",
        "serving.retriever.max_replicas=2",
        "serving.retriever.target_ongoing_requests=4",
        "serving.ingress.max_replicas=3",
        "serving.ingress.target_ongoing_requests=16",
    )
    assert trade.index(config) == 1
    first = trade.publish(config, trade.write_adapter(config, directory / "first", seed=1), "first")
    second = trade.publish(config, trade.write_adapter(config, directory / "second", seed=2), "second")
    released = trade.registry(config).promote("lamps", trade.release(config, first).ref)
    said: list[str] = []
    with running(config, said.append):
        assert any(line.startswith("Milvus at http://127.0.0.1:") for line in said)
        url = f"http://{config.serving.host}:{config.serving.port}"
        yield Up(config, url, trade.registry(config), first, second, released)
    trade.assert_no_children()
    with pytest.raises(Unavailable, match="metier up"), Client(url) as client:
        client.models()


@pytest.fixture
def client(up: Up) -> Iterator[Client]:
    with Client(up.url) as made:
        yield made


def body(error: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = error.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def test_a_release_answers_whole_with_its_passages_and_its_digest(up: Up, client: Client) -> None:
    reply = client.ask("lamps", QUESTION, max_tokens=16)
    assert reply.release == up.released.digest
    assert reply.model == f"lamps@{up.released.digest[:12]}"
    assert len(reply.passages) == 3
    assert any(passage["file_id"] == "lamp-elm" and "blue glass" in passage["content"] for passage in reply.passages)
    assert reply.usage["completion_tokens"] == 16 or reply.finish_reason == "stop"
    assert client.ask("lamps", QUESTION, max_tokens=16).text == reply.text


def test_a_stream_says_the_same_as_the_whole_answer(up: Up, client: Client) -> None:
    whole = client.ask("lamps", QUESTION, max_tokens=16)
    *pieces, reply = client.stream("lamps", QUESTION, max_tokens=16)
    assert isinstance(reply, Reply)
    assert len(pieces) > 1
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == reply.text == whole.text
    assert (reply.passages, reply.release, reply.usage) == (whole.passages, whole.release, whole.usage)


def test_the_openai_client_works_without_knowing_us(up: Up) -> None:
    with openai.OpenAI(base_url=f"{up.url}/v1", api_key="unused", max_retries=0) as ours:
        whole = ours.chat.completions.create(model="lamps@prod", messages=QUESTION, max_tokens=8)
        assert "lamp-elm" in {passage["file_id"] for passage in whole.choices[0].message.context["citations"]}
        with ours.chat.completions.create(model="lamps@prod", messages=QUESTION, max_tokens=8, stream=True) as stream:
            chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
        assert chunks[-1].metier["release"] == up.released.digest
        assert {BASE, f"{FIRST}@1", "lamps", "lamps@prod"} <= {model.id for model in ours.models.list()}
        with pytest.raises(openai.NotFoundError) as missing:
            ours.chat.completions.create(model="lanterns", messages=QUESTION)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="unknown field 'colour'"):
            ours.chat.completions.create(model="lamps", messages=QUESTION, extra_body={"colour": "blue"})


def test_base_and_adapters_answer_each_in_their_own_words(up: Up, client: Client) -> None:
    answers = {model: client.ask(model, QUESTION, max_tokens=24) for model in (BASE, FIRST, SECOND)}
    assert len({reply.text for reply in answers.values()}) == 3
    assert answers[FIRST].model == f"{FIRST}@1"
    assert all(reply.release is None and reply.passages == () for reply in answers.values())
    opened = client.ask(FIRST, QUESTION, max_tokens=24, rag={"enabled": True})
    assert opened.passages and opened.text == client.ask("lamps", QUESTION, max_tokens=24).text


def test_what_cannot_be_answered_is_refused_by_name(up: Up, client: Client) -> None:
    with pytest.raises(NotFound, match="there is no release 'lanterns'"):
        client.ask("lanterns", QUESTION)
    with pytest.raises(NotFound, match="lamps@canary"):
        client.ask("lamps@canary", QUESTION)
    with pytest.raises(BadInput, match="unknown field 'colour'") as unknown:
        client.ask("lamps", QUESTION, colour="blue")
    assert unknown.value.param == "colour"
    with pytest.raises(BadInput, match="the model reads 2048"):
        client.ask("lamps", QUESTION, max_tokens=2000)
    with pytest.raises(BadInput, match="the last message must have role 'user'"):
        client.ask("lamps", [*QUESTION, {"role": "assistant", "content": "Blue."}])

    response = httpx.post(f"{up.url}/v1/chat/completions", json={"model": "lanterns", "messages": QUESTION})
    assert (response.status_code, body(response)["code"]) == (404, "model_not_found")
    response = httpx.post(f"{up.url}/v1/chat/completions", json={"model": "lamps", "messages": QUESTION, "tools": []})
    assert (response.status_code, body(response)["param"]) == (400, "tools")
    assert httpx.post(f"{up.url}/v1/chat/completions", content=b"{").status_code == 400


def test_an_adapter_of_another_prompt_is_refused_with_the_field(up: Up, client: Client, tmp_path: Path) -> None:
    files = trade.write_adapter(up.config, tmp_path / "stranger", seed=3)
    trade.publish(up.config, files, "stranger", prompt="0" * 16)
    with pytest.raises(MetierError, match="prompt is 0000000000000000 in the adapter"):
        client.ask(f"{BASE}:stranger", QUESTION)


def test_a_moved_alias_counts_from_the_next_request_and_goes_back(up: Up, client: Client) -> None:
    before = client.ask("lamps", QUESTION, max_tokens=24)
    other = trade.release(up.config, up.second)
    assert client.ask("lamps", QUESTION, max_tokens=24).release == up.released.digest, "made is not promoted"

    up.registry.promote("lamps", other.ref)
    after = client.ask("lamps", QUESTION, max_tokens=24)
    assert after.release == other.digest != before.release
    assert after.text != before.text
    assert client.ask(f"lamps@{up.released.digest[:12]}", QUESTION, max_tokens=24).text == before.text

    up.registry.rollback("lamps")
    back = client.ask("lamps", QUESTION, max_tokens=24)
    assert (back.release, back.text) == (before.release, before.text)


def test_the_three_stages_scale_each_by_itself(up: Up) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client

    deployments = serve.status().applications["lamps"].deployments
    assert set(deployments) == {"ingress", "retriever", "generator"}
    assert all(deployment.status == "HEALTHY" for deployment in deployments.values())
    details = _get_global_client().get_serve_details()["applications"]["lamps"]["deployments"]
    bounds = {
        name: (each["min_replicas"], each["max_replicas"], each["target_ongoing_requests"])
        for name in details
        for each in [details[name]["deployment_config"]["autoscaling_config"]]
    }
    assert bounds == {"ingress": (1, 3, 16), "retriever": (1, 2, 4), "generator": (1, 1, 2)}
    assert {len(details[name]["replicas"]) for name in details} == {1}


def test_clients_that_hang_up_leave_their_places_to_others(up: Up, client: Client) -> None:
    asked = {"model": FIRST, "messages": QUESTION, "stream": True, "max_tokens": 1500}
    for _ in range(4):  # twice the places of the generator
        with httpx.stream("POST", f"{up.url}/v1/chat/completions", json=asked, timeout=60) as response:
            lines = (line for line in response.iter_lines() if line.startswith("data: "))
            assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
            next(lines)
    assert client.ask(FIRST, QUESTION, max_tokens=8).usage["completion_tokens"] == 8


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = trade.configure(tmp_path / "trade", f"serving.port={port}")
        said: list[str] = []
        with pytest.raises(ResourcesShort, match=f"port {port} on 127.0.0.1 is in use"), running(config, said.append):
            raise AssertionError("it must not start")
    assert said == []
    assert not Path(config.store.data_dir).exists()


def test_a_milvus_that_hangs_is_a_503_for_what_needs_it_and_nothing_else(up: Up, client: Client) -> None:
    state = json.loads(Path(up.config.store.data_dir, "server.json").read_text())
    os.kill(state["pid"], signal.SIGSTOP)
    try:
        response = httpx.post(
            f"{up.url}/v1/chat/completions", json={"model": "lamps", "messages": QUESTION}, timeout=60
        )
        assert response.status_code == 503
        assert (body(response)["code"], response.headers["retry-after"]) == ("unavailable", "1")
        with pytest.raises(Unavailable, match=r"Milvus at http://127\.0\.0\.1:"):
            list(client.stream("lamps", QUESTION))
        assert client.ask("lamps", QUESTION, rag={"enabled": False}, max_tokens=8).text
    finally:
        os.kill(state["pid"], signal.SIGCONT)


def test_a_milvus_that_dies_comes_back_and_questions_are_answered_again(up: Up, client: Client) -> None:
    state = json.loads(Path(up.config.store.data_dir, "server.json").read_text())
    os.kill(state["pid"], signal.SIGKILL)

    def answered() -> bool:
        try:
            return bool(client.ask("lamps", QUESTION, max_tokens=8).passages)
        except Unavailable:
            return False

    trade.wait_for("an answer with passages", answered)
