"""The routes in one process: OpenAI's shapes, errors and streams, read by httpx and by the official client."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from cluster.config import Config, RetrievalConfig
from cluster.errors import BadInput, Overloaded, Unavailable
from cluster.models import base_ref
from cluster.registry import Registry
from cluster.release import EmbedderRef, KnowledgeRef, Release
from cluster.storage import Storage
from retrieval.types import Passage, Retrieved
from serving.engine.base import Delta, GenerateRequest, Grammar, TokenLogprob
from serving.http import routes
from serving.names import Names
from serving.pipeline import Pipeline
from tests import trade

CONTRACT = Path(__file__).resolve().parents[4] / "shared" / "contracts" / "openai-openapi-2.3.0.json"
PASSAGES = (
    Passage("c0", "fees", "Fees", "Trailers", "A trailer costs 5 crowns.", "fees.md", 0, 0.91234, {"dense": 0.9}),
    Passage("c1", "dogs", "Dogs", "", "Dogs stay on a lead.", "dogs.md", 3, 0.5),
)
QUESTION = [{"role": "user", "content": "What does a trailer cost on the ferry?"}]
ANSWER = "5 crowns [1]"
ERROR_KEYS = {"message", "type", "param", "code"}


class Backend:
    """What the routes stand on, with a retriever and a generator that do as they are told."""

    def __init__(self, config: Config, directory: Path, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.passages = PASSAGES
        self.answer = ANSWER
        self.fail_after: int | None = None
        self.error: Exception = Unavailable("the engine stopped")
        self.sent: list[GenerateRequest] = []
        self.refuses: Exception | None = None
        registry = Registry(Storage(config.storage.url))
        registry.knowledge_append("docs", trade.knowledge_entry())
        base = base_ref(config.base, directory)
        made = registry.create_release(
            "support",
            Release(
                base=base,
                knowledge=KnowledgeRef(name="docs"),
                embedder=EmbedderRef(source="tiny:bert"),
                prompt=config.prompt,
                retrieval=RetrievalConfig(),
            ),
        )
        self.release = made.digest
        names = Names(config, registry, base)
        self.api = routes(Pipeline(config, registry, names, tokenizer, self.retrieve, self.generate))

    async def retrieve(self, *_: Any) -> Retrieved:
        return Retrieved(self.passages, "docs", 1, {"search": 0.01})

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        self.sent.append(request)
        if self.refuses is not None:
            raise self.refuses
        width = request.sampling.logprobs
        for place, token in enumerate(self.tokenizer.encode(self.answer, add_special_tokens=False)):
            if place == self.fail_after:
                raise self.error
            for index in range(request.sampling.n):
                told = () if width is None else (TokenLogprob(token, -0.5, ((token, -0.5), (5, -math.inf))[:width]),)
                yield Delta((token,), index=index, logprobs=told, cached_tokens=0 if place else 48)
        for index in range(request.sampling.n):
            yield Delta((), "stop", index)

    def transport(self) -> httpx.ASGITransport:
        return httpx.ASGITransport(self.api, raise_app_exceptions=False)

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            async with httpx.AsyncClient(transport=self.transport(), base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(run())

    def chat(self, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        asked = {"model": "support", "messages": QUESTION} | body
        return self.call("POST", "/v1/chat/completions", json=asked, headers=headers)

    def events(self, **body: Any) -> list[Any]:
        """The events of a stream; JSON is read, ``[DONE]`` is not."""
        response = self.chat(stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.text.split("\n\n")
        assert lines.pop() == ""
        data = [line.removeprefix("data: ") for line in lines]
        return [line if line == "[DONE]" else json.loads(line) for line in data]


@pytest.fixture
def backend(make_config: Callable[..., Config], tiny_llama: Path, tokenizer: Any) -> Backend:
    return Backend(make_config("base.name=small"), tiny_llama, tokenizer)


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of a refusal; it always has all four keys."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == ERROR_KEYS
    return error


# -- whole answers


def test_a_completion_has_openais_shape(backend: Backend) -> None:
    response = backend.chat()
    assert response.status_code == 200
    body = response.json()
    assert (body["object"], body["model"]) == ("chat.completion", f"support@{backend.release[:12]}")
    (choice,) = body["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    message = choice["message"]
    assert (message["role"], message["content"], message["refusal"]) == ("assistant", ANSWER, None)


def test_usage_counts_prompt_and_answer(backend: Backend) -> None:
    usage = backend.chat().json()["usage"]
    prompt, made = len(backend.sent[0].token_ids), len(ANSWER)
    total = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
    assert usage == total | {"prompt_tokens_details": {"cached_tokens": 48}}


def test_annotations_say_where_and_what_is_cited(backend: Backend) -> None:
    message = backend.chat().json()["choices"][0]["message"]
    (note,) = message["annotations"]
    assert (note["type"], note["file_id"], note["filename"], note["index"]) == ("file_citation", "fees", "fees.md", 1)
    assert message["content"][note["start_index"] : note["end_index"]] == "[1]"


def test_the_context_holds_the_passages_in_order(backend: Backend) -> None:
    given = backend.chat().json()["choices"][0]["message"]["context"]["citations"]
    assert [passage["chunk_id"] for passage in given] == ["c0", "c1"]
    assert given[0] == {
        "content": "A trailer costs 5 crowns.",
        "title": "Fees > Trailers",
        "filepath": "fees.md",
        "url": None,
        "chunk_id": "c0",
        "file_id": "fees",
        "score": 0.9123,
    }


def test_every_answer_names_its_release(backend: Backend) -> None:
    response = backend.chat()
    metier = response.json()["metier"]
    assert response.headers["x-metier-release"] == metier["release"] == backend.release
    assert metier["knowledge"] == {"name": "docs", "version": 1}
    assert (metier["chunks"], metier["declined"], metier["adapter"]) == (["c0", "c1"], False, None)


def test_the_bare_base_has_no_release_and_no_passages(backend: Backend) -> None:
    response = backend.chat(model="small")
    assert "x-metier-release" not in response.headers
    body = response.json()
    assert (body["model"], body["metier"]["release"], body["metier"]["knowledge"]) == ("small", None, None)
    assert body["choices"][0]["message"]["context"] == {"citations": []}


def test_the_request_id_of_the_caller_comes_back(backend: Backend) -> None:
    response = backend.chat(headers={"x-request-id": "mine-1"})
    assert (response.headers["x-request-id"], response.json()["id"]) == ("mine-1", "chatcmpl-mine-1")
    assert backend.chat().json()["id"].startswith("chatcmpl-")


def test_a_decline_generates_nothing(backend: Backend) -> None:
    backend.passages = ()
    body = backend.chat().json()
    assert body["choices"][0]["message"]["content"] == "The documents do not say."
    assert body["metier"]["declined"] is True
    assert backend.sent == []


@pytest.mark.parametrize(
    ("body", "sampling"),
    [
        ({}, (128, 0.0, 1.0, None)),
        ({"max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "seed": 3}, (5, 0.7, 0.9, 3)),
        ({"max_tokens": 5, "max_completion_tokens": 6}, (6, 0.0, 1.0, None)),
    ],
)
def test_sampling_is_what_the_request_says(backend: Backend, body: dict[str, Any], sampling: tuple[Any, ...]) -> None:
    assert backend.chat(**body).status_code == 200
    sent = backend.sent[0].sampling
    assert (sent.max_tokens, sent.temperature, sent.top_p, sent.seed) == sampling


def test_text_parts_are_joined(backend: Backend) -> None:
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "much?"}]
    assert backend.chat(messages=[{"role": "user", "content": parts}]).status_code == 200
    assert "Question: How much?" in backend.tokenizer.decode(backend.sent[0].token_ids)


def test_rag_can_be_turned_off_and_on(backend: Backend) -> None:
    assert backend.chat(rag={"enabled": False}).json()["metier"]["chunks"] == []
    assert backend.chat(model="small", rag={"knowledge": "docs"}).json()["metier"]["chunks"] == ["c0", "c1"]


# -- how the answer is made

OPENAI: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "presence_penalty": 0.1,
    "frequency_penalty": -0.2,
    "logit_bias": {"7": -3, "8": 2.5},
    "seed": 11,
    "stop": ["###", "END"],
    "max_completion_tokens": 9,
    "n": 2,
}
VLLM: dict[str, Any] = {"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1}


def test_every_field_reaches_the_engine(backend: Backend) -> None:
    assert backend.chat(**OPENAI, **VLLM).status_code == 200
    sent = backend.sent[0].sampling
    assert (sent.temperature, sent.top_p, sent.presence_penalty, sent.frequency_penalty) == (0.5, 0.9, 0.1, -0.2)
    assert (sent.logit_bias, sent.seed, sent.stop) == (((7, -3.0), (8, 2.5)), 11, ("###", "END"))
    assert (sent.max_tokens, sent.n, sent.top_k, sent.min_p, sent.repetition_penalty) == (9, 2, 40, 0.05, 1.1)


def test_null_is_as_good_as_nothing(backend: Backend) -> None:
    fields = [*OPENAI, *VLLM, "logprobs", "top_logprobs", "response_format", "structured_outputs"]
    assert backend.chat(**dict.fromkeys(fields)).status_code == backend.chat().status_code == 200
    assert backend.sent[0].sampling == backend.sent[1].sampling


def test_one_stop_string_needs_no_list_and_is_cut(backend: Backend) -> None:
    choice = backend.chat(stop=" [").json()["choices"][0]
    assert backend.sent[0].sampling.stop == (" [",)
    assert (choice["message"]["content"], choice["message"]["annotations"]) == ("5 crowns", [])
    events = backend.events(stop=" [")
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == "5 crowns"


def test_several_answers_are_several_choices(backend: Backend) -> None:
    body = backend.chat(n=3, temperature=1.0).json()
    assert [(choice["index"], choice["message"]["content"]) for choice in body["choices"]] == [
        (index, ANSWER) for index in range(3)
    ]
    assert body["usage"]["completion_tokens"] == 3 * len(ANSWER)
    assert all(choice["message"]["annotations"][0]["file_id"] == "fees" for choice in body["choices"])


def test_streamed_choices_each_begin_and_end(backend: Backend) -> None:
    *events, done = backend.events(n=2, temperature=1.0)
    for index in range(2):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == ANSWER
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
        assert mine[-1]["delta"]["annotations"][0]["file_id"] == "fees"
    assert (["metier" in event for event in events].count(True), "metier" in events[-1], done) == (1, True, "[DONE]")


def test_a_decline_is_told_once_a_choice(backend: Backend) -> None:
    backend.passages = ()
    choices = backend.chat(n=2, temperature=1.0).json()["choices"]
    assert [choice["message"]["content"] for choice in choices] == ["The documents do not say."] * 2


def test_log_probabilities_have_openais_shape(backend: Backend) -> None:
    backend.answer = "5 é"
    content = backend.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["5", " ", "\ufffd", "\ufffd"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "5 é"
    first, second = content[0]["top_logprobs"]
    assert (content[0]["logprob"], first["token"], first["logprob"], second["logprob"]) == (-0.5, "5", -0.5, -9999.0)
    bare = backend.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in bare] == [[]] * 4
    assert backend.chat(logprobs=False).json()["choices"][0]["logprobs"] is None


def test_streamed_log_probabilities_go_with_their_text(backend: Backend) -> None:
    backend.answer = "5 é"
    events = backend.events(logprobs=True, top_logprobs=1)
    told = [
        (choice["delta"]["content"], [entry["token"] for entry in choice["logprobs"]["content"]])
        for event in events[:-1]
        if (choice := event["choices"][0])["logprobs"]
    ]
    assert told == [("5", ["5"]), (" ", [" "]), ("é", ["\ufffd", "\ufffd"])]


SCHEMA = {"type": "object", "properties": {"fee": {"type": "number"}}}


@pytest.mark.parametrize(
    ("body", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "fee", "strict": True, "description": "what it costs", "schema": SCHEMA},
                }
            },
            Grammar("json_schema", json.dumps(SCHEMA)),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Grammar("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"regex": "[a-z]+"}}, Grammar("regex", "[a-z]+")),
        ({"structured_outputs": {"choice": ["yes", "a.b"]}}, Grammar("regex", r"yes|a\.b")),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}, Grammar("regex", "a")),
    ],
    ids=str,
)
def test_the_form_of_the_answer_reaches_the_engine(
    backend: Backend, body: dict[str, Any], grammar: Grammar | None
) -> None:
    assert backend.chat(**body).status_code == 200
    assert backend.sent[0].sampling.grammar == grammar


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "root ::= a"}}, "structured_outputs.grammar"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"n": 10**6}, "n"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_tokens"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"3": 200}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]"),
        ({"seed": 2**63}, "seed"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs.regex"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_asked_of_the_generator_is_refused_by_field(
    backend: Backend, body: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        assert refused(backend.chat(stream=stream, **body), 400)["param"] == param
    assert backend.sent == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    ("field", "param"),
    [
        ('"temperature": {}', "temperature"),
        ('"top_p": {}', "top_p"),
        ('"min_p": {}', "min_p"),
        ('"presence_penalty": {}', "presence_penalty"),
        ('"frequency_penalty": {}', "frequency_penalty"),
        ('"repetition_penalty": {}', "repetition_penalty"),
        ('"logit_bias": {{"1": {}}}', "logit_bias"),
        ('"max_tokens": {}', "max_tokens"),
        ('"seed": {}', "seed"),
        ('"n": {}', "n"),
        ('"rag": {{"top_k": {}}}', "rag.top_k"),
        (
            '"response_format": {{"type": "json_schema", "json_schema": {{"name": "x", "schema": {{"maximum": {}}}}}}}',
            "response_format.json_schema",
        ),
    ],
)
def test_what_is_no_number_is_refused_by_field(backend: Backend, field: str, param: str, number: str) -> None:
    messages = json.dumps(QUESTION)
    content = f'{{"model": "support", "messages": {messages}, {field.format(number)}}}'.encode()
    response = backend.call(
        "POST", "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
    )
    assert refused(response, 400)["param"] == param


@pytest.mark.parametrize("asked", [{"response_format": {"type": "json_object"}}, {"logit_bias": {"3": 1}}], ids=str)
def test_what_the_engine_refuses_keeps_its_status_in_a_stream_too(backend: Backend, asked: dict[str, Any]) -> None:
    backend.refuses = BadInput("the schema cannot be used", param="response_format")
    assert refused(backend.chat(stream=True, **asked), 400)["param"] == "response_format"


# -- streams


def test_a_stream_has_role_and_context_first_and_done_last(backend: Backend) -> None:
    first, *middle, end, done = backend.events()
    assert done == "[DONE]"
    delta = first["choices"][0]["delta"]
    assert (delta["role"], delta["content"]) == ("assistant", "")
    assert [passage["chunk_id"] for passage in delta["context"]["citations"]] == ["c0", "c1"]
    assert "".join(event["choices"][0]["delta"]["content"] for event in middle) == ANSWER
    assert all(event["choices"][0]["finish_reason"] is None for event in (first, *middle))
    assert end["choices"][0]["finish_reason"] == "stop"
    assert [note["file_id"] for note in end["choices"][0]["delta"]["annotations"]] == ["fees"]
    assert end["metier"]["release"] == backend.release


def test_all_chunks_of_a_stream_have_one_id(backend: Backend) -> None:
    events = backend.events()[:-1]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1


def test_a_stream_tells_its_usage_only_when_asked(backend: Backend) -> None:
    assert not any("usage" in event for event in backend.events()[:-1])
    *chunks, usage, done = backend.events(stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in chunks)
    assert (usage["choices"], done) == ([], "[DONE]")
    assert usage["usage"]["completion_tokens"] == len(ANSWER)


def test_a_streamed_decline_is_a_whole_answer(backend: Backend) -> None:
    backend.passages = ()
    events = backend.events()
    assert [event["choices"][0]["delta"].get("content") for event in events[:-1]] == [
        "",
        "The documents do not say.",
        None,
    ]
    assert events[-1] == "[DONE]"


def test_what_fails_before_the_first_byte_keeps_its_status(backend: Backend) -> None:
    messages = [{"role": "user", "content": "x" * 3000}]
    error = refused(backend.chat(stream=True, messages=messages), 400)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("fail_after", [0, 3])
def test_what_fails_later_is_an_error_event_and_no_done(backend: Backend, fail_after: int) -> None:
    backend.fail_after = fail_after
    events = backend.events()
    assert len(events) == 1 + fail_after + 1
    assert set(events[-1]["error"]) == ERROR_KEYS
    assert (events[-1]["error"]["message"], events[-1]["error"]["code"]) == ("the engine stopped", "unavailable")


def test_an_unforeseen_failure_in_a_stream_is_told_without_its_details(backend: Backend) -> None:
    backend.fail_after, backend.error = 3, RuntimeError("/secret/path")
    *_, last = backend.events()
    assert last["error"]["type"] == "server_error"
    assert "/secret" not in json.dumps(last)


# -- refusals


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": []}, "tools"),
        ({"rag": {"top": 3}}, "rag.top"),
        ({"messages": [{"role": "user", "content": "a", "image": 1}]}, "messages.0.image"),
    ],
)
def test_an_unknown_field_is_refused_by_name(backend: Backend, body: dict[str, Any], param: str) -> None:
    error = refused(backend.chat(**body), 400)
    assert error == {
        "message": f"unknown field '{param}'; remove it",
        "type": "invalid_request_error",
        "param": param,
        "code": None,
    }


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"n": 5}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"rag": {"top_k": 0}}, "rag.top_k"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
        ({"rag": {"knowledge": "nothing"}}, "rag.knowledge"),
    ],
)
def test_a_wrong_value_is_refused_by_field(backend: Backend, body: dict[str, Any], param: str) -> None:
    error = refused(backend.chat(**body), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize("content", [b'{"model": ', b"", b"[]", b'"text"'])
def test_a_body_that_is_no_json_object_is_refused(backend: Backend, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    error = refused(backend.call("POST", "/v1/chat/completions", content=content, headers=headers), 400)
    assert error["param"] is None
    assert "body" in error["message"]


@pytest.mark.parametrize("model", ["nothing", "GPT-4o", "small:nothing", "support@9"])
def test_an_unknown_model_is_a_404(backend: Backend, model: str) -> None:
    error = refused(backend.chat(model=model), 404)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_not_found")


def test_a_prompt_beyond_the_context_is_a_400(backend: Backend) -> None:
    error = refused(backend.chat(messages=[{"role": "user", "content": "x" * 3000}]), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize(("error", "status"), [(Overloaded("the queue is full"), 429), (Unavailable("gone"), 503)])
def test_who_may_try_again_is_told_when(backend: Backend, error: Exception, status: int) -> None:
    backend.fail_after, backend.error = 0, error
    response = backend.chat()
    refused(response, status)
    assert response.headers["retry-after"] == "1"


def test_an_unforeseen_failure_is_a_500_without_its_details(backend: Backend) -> None:
    backend.fail_after, backend.error = 0, RuntimeError("/secret/path")
    error = refused(backend.chat(), 500)
    assert error["type"] == "server_error"
    assert "/secret" not in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)]
)
def test_a_wrong_route_is_refused_in_the_same_shape(backend: Backend, method: str, path: str, status: int) -> None:
    assert path in refused(backend.call(method, path), status)["message"]


# -- models and health


def test_models_are_listed_with_root_and_parent(backend: Backend) -> None:
    body = backend.call("GET", "/v1/models").json()
    assert body["object"] == "list"
    first, *_ = body["data"]
    assert first == {
        "id": "small",
        "object": "model",
        "created": 0,
        "owned_by": "metier",
        "root": "small",
        "parent": None,
    }
    made = {entry["id"]: entry for entry in body["data"]}
    assert made["support"]["parent"] == f"support@{backend.release[:12]}"
    assert made["support"]["created"] > 1_700_000_000


def test_one_model_is_told_by_its_name(backend: Backend) -> None:
    name = f"support@{backend.release[:12]}"
    assert backend.call("GET", f"/v1/models/{name}").json()["id"] == name
    assert refused(backend.call("GET", "/v1/models/nothing"), 404)["code"] == "model_not_found"


def test_health_answers(backend: Backend) -> None:
    assert backend.call("GET", "/health").json() == {"status": "ok"}


# -- the official client


def official(backend: Backend, act: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    """What `act` gives with the client of the ``openai`` package."""

    async def run() -> Any:
        http = httpx.AsyncClient(transport=backend.transport())
        async with openai.AsyncOpenAI(
            api_key="none", base_url="http://test/v1", http_client=http, max_retries=0
        ) as client:
            return await act(client)

    return asyncio.run(run())


def test_the_official_client_reads_an_answer(backend: Backend) -> None:
    answer = official(backend, lambda client: client.chat.completions.create(model="support", messages=QUESTION))
    assert answer.choices[0].message.content == ANSWER
    assert answer.usage.completion_tokens == len(ANSWER)
    assert answer.metier["release"] == backend.release


def test_the_official_client_reads_a_stream(backend: Backend) -> None:
    async def act(client: openai.AsyncOpenAI) -> list[Any]:
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        stream = await client.chat.completions.create(model="support", messages=QUESTION, **options)  # type: ignore[call-overload]
        return [chunk async for chunk in stream]

    *chunks, usage = official(backend, act)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert usage.usage.completion_tokens == len(ANSWER)


def test_the_official_client_reads_choices_and_log_probabilities(backend: Backend) -> None:
    options: Any = {"n": 2, "temperature": 1.0, "logprobs": True, "top_logprobs": 1, "extra_body": {"top_k": 5}}
    answer = official(
        backend, lambda client: client.chat.completions.create(model="support", messages=QUESTION, **options)
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert "".join(entry.token for entry in answer.choices[1].logprobs.content) == ANSWER
    assert answer.usage.prompt_tokens_details.cached_tokens == 48
    assert backend.sent[0].sampling.top_k == 5


def test_the_official_client_lists_models(backend: Backend) -> None:
    page = official(backend, lambda client: client.models.list())
    assert {"small", "support"} <= {model.id for model in page.data}


def test_the_official_client_sees_errors_as_its_own(backend: Backend) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        official(backend, lambda client: client.chat.completions.create(model="nothing", messages=QUESTION))
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError):
        official(backend, lambda client: client.chat.completions.create(model="support", messages=QUESTION, n=9))


def test_the_official_client_sees_an_error_within_a_stream(backend: Backend) -> None:
    backend.fail_after = 3

    async def act(client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(model="support", messages=QUESTION, stream=True)
        async for _ in stream:
            pass

    with pytest.raises(openai.APIError, match="the engine stopped"):
        official(backend, act)


# -- OpenAI's own description


def valid(name: str, value: Any) -> None:
    """Raise unless `value` is of OpenAI's schema `name`; fields beyond it are not looked at."""
    if not CONTRACT.is_file():
        pytest.skip(f"{CONTRACT} is not here")
    document = _nullable(json.loads(CONTRACT.read_text(encoding="utf-8")))
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


def _nullable(schema: Any) -> Any:
    """OpenAPI's ``nullable`` in JSON Schema's words."""
    if isinstance(schema, list):
        return [_nullable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _nullable(value) for key, value in schema.items() if key != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if schema.get("nullable") is True else plain


def test_a_completion_is_of_openais_schema(backend: Backend) -> None:
    body = backend.chat().json()
    # file_citation is the Responses API's annotation; Chat Completions' own schema knows url_citation only.
    body["choices"][0]["message"]["annotations"] = []
    valid("CreateChatCompletionResponse", body)


def test_every_chunk_is_of_openais_schema(backend: Backend) -> None:
    for event in backend.events(stream_options={"include_usage": True})[:-1]:
        valid("CreateChatCompletionStreamResponse", event)


def test_choices_with_log_probabilities_are_of_openais_schema(backend: Backend) -> None:
    asked: dict[str, Any] = {"n": 2, "temperature": 1.0, "logprobs": True, "top_logprobs": 2}
    body = backend.chat(**asked).json()
    for choice in body["choices"]:
        choice["message"]["annotations"] = []
    valid("CreateChatCompletionResponse", body)
    for event in backend.events(stream_options={"include_usage": True}, **asked)[:-1]:
        valid("CreateChatCompletionStreamResponse", event)


def test_the_list_of_models_is_of_openais_schema(backend: Backend) -> None:
    valid("ListModelsResponse", backend.call("GET", "/v1/models").json())


def test_an_error_is_of_openais_schema(backend: Backend) -> None:
    valid("ErrorResponse", backend.chat(model="nothing").json())


def test_the_schema_check_can_fail(backend: Backend) -> None:
    body = backend.chat().json()
    del body["choices"][0]["finish_reason"]
    with pytest.raises(jsonschema.ValidationError, match="finish_reason"):
        valid("CreateChatCompletionResponse", body)
