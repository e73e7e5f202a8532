"""A small typed client of the HTTP API, used by the command line and the evaluation. Thread-safe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

from cluster.errors import BadInput, MetierError, Mismatch, NotFound, Overloaded, Unavailable

BY_STATUS: dict[int, type[MetierError]] = {
    400: BadInput,
    404: NotFound,
    409: Mismatch,
    429: Overloaded,
    503: Unavailable,
}


@dataclass(frozen=True)
class Cited:
    """One citation of an answer."""

    number: int
    doc_id: str
    filename: str


@dataclass(frozen=True)
class Reply:
    """An answer with all that came beside it."""

    text: str
    model: str
    """The full name of what answered: ``support@3f9a12345678``."""
    finish_reason: str
    citations: tuple[Cited, ...]
    passages: tuple[dict[str, Any], ...]
    """What the model was given, in the order of the numbers."""
    declined: bool
    release: str | None
    seconds: dict[str, float] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)


class Client:
    """Talks to one metier server, for example ``Client("http://127.0.0.1:8000")``."""

    def __init__(self, url: str, timeout_s: float = 120.0) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=timeout_s, limits=httpx.Limits(max_connections=None))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def ask(self, model: str, messages: Sequence[dict[str, str]], **options: Any) -> Reply:
        """One answer.

        Args:
            options: further fields of the request, such as ``max_tokens``, ``temperature``, ``rag``.

        Raises:
            MetierError: what the server said, as the class of its status; Unavailable if nothing listens.
        """
        data = self._json("POST", "/v1/chat/completions", {"model": model, "messages": list(messages), **options})
        choice = data["choices"][0]
        message = choice["message"]
        return _reply(
            data,
            message["content"],
            choice["finish_reason"],
            message["annotations"],
            message["context"],
            data["metier"],
        )

    def stream(self, model: str, messages: Sequence[dict[str, str]], **options: Any) -> Iterator[str | Reply]:
        """Pieces of the answer's text as they come, then the whole as a :class:`Reply`."""
        body = {"model": model, "messages": list(messages), "stream": True, "stream_options": {"include_usage": True}}
        text, finish = "", "stop"
        notes: list[dict[str, Any]] = []
        given: dict[str, Any] = {"citations": []}
        metier: dict[str, Any] = {}
        usage: dict[str, int] = {}
        last: dict[str, Any] = {}
        try:
            with self.http.stream("POST", "/v1/chat/completions", json=body | options) as response:
                if response.status_code != 200:
                    response.read()
                    raise _error(response)
                for line in response.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    last = json.loads(line.removeprefix("data: "))
                    if "error" in last:
                        raise MetierError(last["error"]["message"], param=last["error"]["param"])
                    usage = last.get("usage") or usage
                    metier = last.get("metier") or metier
                    for choice in last["choices"]:
                        delta = choice["delta"]
                        given = delta.get("context", given)
                        notes = delta.get("annotations", notes)
                        finish = choice["finish_reason"] or finish
                        if piece := delta.get("content"):
                            text += piece
                            yield piece
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        yield _reply({**last, "usage": usage}, text, finish, notes, given, metier)

    def models(self) -> list[dict[str, Any]]:
        """What the server serves."""
        return list(self._json("GET", "/v1/models")["data"])

    def healthy(self) -> bool:
        """Whether the server answers."""
        try:
            return self.http.get("/health", timeout=2.0).status_code == 200
        except httpx.TransportError:
            return False

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = self.http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise _error(response)
        data: dict[str, Any] = response.json()
        return data

    def _unreachable(self, error: Exception) -> Unavailable:
        return Unavailable(f"no metier server answers at {self.url} ({error}); start one with `metier up`")


def _error(response: httpx.Response) -> MetierError:
    kind = BY_STATUS.get(response.status_code, MetierError)
    try:
        body = response.json()["error"]
        return kind(body["message"], param=body["param"])
    except (ValueError, KeyError, TypeError):
        return kind(f"the server answered {response.status_code}: {response.text[:200]}")


def _reply(
    data: dict[str, Any],
    text: str,
    finish_reason: str,
    notes: Sequence[dict[str, Any]],
    given: dict[str, Any],
    metier: dict[str, Any],
) -> Reply:
    return Reply(
        text=text,
        model=data["model"],
        finish_reason=finish_reason,
        citations=tuple(Cited(note["index"], note["file_id"], note["filename"]) for note in notes),
        passages=tuple(given["citations"]),
        declined=metier["declined"],
        release=metier["release"],
        seconds=metier["seconds"],
        usage=data["usage"],
    )
