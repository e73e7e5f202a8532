"""Question + history + passages -> messages -> token ids, and marks in an answer -> citations.

Training and serving both come here, and nowhere else, so that the tokens an adapter learned on are the tokens it
is served with. What a prompt looks like is decided by :class:`cluster.config.PromptConfig` and by the code below;
``cluster.release.prompt_hash`` covers both, and serving refuses an adapter with another hash.

Retrieved text is data: it stands in the last user message between numbered marks, never in the system message, and
what is spelled like a control token of the model in any message is text to the model (:func:`neutral`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.config import PromptConfig
from cluster.errors import BadInput, ContextTooLong
from retrieval.types import Passage

MARK = re.compile(r"\s*\[(\d{1,3})\]")
Message = Mapping[str, str]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token_id: int
    all_special_tokens: list[str]

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Grounded:
    """A prompt ready to be rendered."""

    messages: list[dict[str, str]]
    passages: tuple[Passage, ...]
    """The passages that fitted, in the order of their numbers: ``passages[0]`` is ``[1]``."""


@dataclass(frozen=True)
class Citation:
    """One mark of an answer that points at a retrieved passage."""

    number: int
    start: int
    end: int
    """Character span of the mark in the answer, end exclusive."""
    passage: Passage


def ground(
    prompt: PromptConfig,
    messages: Sequence[Message],
    passages: Sequence[Passage] | None,
    count_tokens: Callable[[str], int],
) -> Grounded:
    """The messages a model sees for a conversation whose last message is the user's.

    Args:
        prompt: the words around it.
        messages: ``{"role", "content"}``, oldest first. A system message of the caller is kept, after ours.
        passages: best first; ``None`` asks without retrieval (closed book).
        count_tokens: length of a text in tokens of the base model, for the passage budget.

    Raises:
        BadInput: the last message is not the user's.
    """
    if not messages or messages[-1]["role"] != "user":
        raise BadInput("messages: the last message must have role 'user'", param="messages")
    question = messages[-1]["content"]
    kept = () if passages is None else fit(passages, prompt.passage_tokens, count_tokens)
    system = prompt.system_closed if passages is None else prompt.system
    theirs = [message["content"] for message in messages[:-1] if message["role"] in ("system", "developer")]
    turns = [
        {"role": message["role"], "content": message["content"]}
        for message in messages[:-1]
        if message["role"] in ("user", "assistant")
    ]
    body = question if passages is None else _with_passages(question, kept)
    return Grounded(
        [{"role": "system", "content": "\n\n".join([system, *theirs])}, *turns, {"role": "user", "content": body}],
        kept,
    )


def fit(passages: Sequence[Passage], budget: int, count_tokens: Callable[[str], int]) -> tuple[Passage, ...]:
    """The longest run of best passages whose rendered text stays within `budget` tokens; passages are never cut."""
    kept: list[Passage] = []
    for number, passage in enumerate(passages, 1):
        budget -= count_tokens(_render(number, passage))
        if budget < 0:
            break
        kept.append(passage)
    return tuple(kept)


def token_counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    """How :func:`ground` counts for its budget; training and serving must fit the same passages."""
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of `messages` through the model's own chat template, up to where the answer begins.

    Only the template writes control tokens: what is spelled like one in a message is broken first (:func:`neutral`).
    """
    plain = [{**message, "content": neutral(tokenizer, message["content"])} for message in messages]
    ids = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=True, return_dict=False)
    return [int(token) for token in ids]


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Token ids of an answer as the model is to write it: the text, then the end of turn."""
    return [*tokenizer.encode(neutral(tokenizer, answer), add_special_tokens=False), tokenizer.eos_token_id]


def neutral(tokenizer: Tokenizer, text: str) -> str:
    """`text` with a space after the first character of whatever is spelled like a control token of the model.

    A chat template is rendered to one string before it is tokenized, so ``<|im_end|>`` inside a passage or a message
    would end the user's turn and let the text write a system message of its own. Other text stays as it is.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    control = {token for token in (*tokenizer.all_special_tokens, *added) if len(token) > 1 and token in text}
    if not control:
        return text
    # A look-ahead at every position, so that tokens that overlap are all broken.
    return re.sub(rf"(?=(?:{'|'.join(map(re.escape, control))}))(.)", r"\1 ", text, flags=re.DOTALL)


def check_length(prompt_tokens: int, answer_tokens: int, context_tokens: int) -> None:
    """Raise :class:`ContextTooLong` if prompt and answer do not fit the model's context together."""
    if prompt_tokens + answer_tokens > context_tokens:
        raise ContextTooLong(
            f"the prompt has {prompt_tokens} tokens and {answer_tokens} are asked for the answer, "
            f"but the model reads {context_tokens}; shorten messages or lower max_tokens",
            param="messages",
        )


def with_marks(answer: str, numbers: Sequence[int]) -> str:
    """A reference answer with its citation marks: ``("18.50 crowns", [2]) -> "18.50 crowns [2]"``."""
    return " ".join([answer, *(f"[{number}]" for number in sorted(set(numbers)))])


def citations(answer: str, passages: Sequence[Passage]) -> list[Citation]:
    """Marks of `answer` that name a passage which was given; a number out of range cites nothing."""
    return [
        Citation(number, match.end() - len(f"[{match[1]}]"), match.end(), passages[number - 1])
        for match in MARK.finditer(answer)
        if 1 <= (number := int(match[1])) <= len(passages)
    ]


def without_marks(answer: str) -> str:
    """The answer as a person would say it."""
    return MARK.sub("", answer).strip()


def is_decline(prompt: PromptConfig, answer: str) -> bool:
    """Whether `answer` is the sentence that says the documents hold no answer, give or take case and marks."""
    return without_marks(answer).casefold().rstrip(".") == prompt.decline.casefold().rstrip(".")


def _with_passages(question: str, passages: Sequence[Passage]) -> str:
    blocks = [_render(number, passage) for number, passage in enumerate(passages, 1)]
    return "\n\n".join([*blocks, f"Question: {question}"])


def _render(number: int, passage: Passage) -> str:
    title = passage.title if not passage.heading else f"{passage.title} > {passage.heading}"
    return f"[{number}] {title}\n{passage.text}"
