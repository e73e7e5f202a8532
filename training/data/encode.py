"""Examples -> token ids and loss mask, through the same prompt code that serving uses (`retrieval.prompt`).

Every answer is encoded as serving would see it come: the prompt that leads to it, rendered with the model's own chat
template, then the text and the end of turn. Earlier answers of a conversation share one sequence with the last where
the template renders history that way; where it does not (some drop what an earlier turn thought), each learned answer
becomes a sequence of its own, so that what is learned is what will be asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from cluster.errors import BadInput
from retrieval.prompt import Tokenizer, answer_ids, neutral, prompt_ids
from training.data.examples import Example

TooLong = Literal["refuse", "drop", "truncate"]
PROBE = "Zq7"
"""An answer no template writes by itself."""


class Encoded(TypedDict):
    """One sequence for the trainer; the lists have one length (tokens)."""

    input_ids: list[int]
    completion_mask: list[int]
    """1 where the loss is taken: an answer and its end of turn, or all of a raw text."""


@dataclass(frozen=True)
class Encoding:
    """What a dataset came to."""

    sequences: list[Encoded]
    ids: list[str]
    """The example of each sequence."""
    dropped: int = 0
    """Examples longer than the limit, left out."""
    truncated: int = 0
    """Examples longer than the limit, cut."""

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together, without padding."""
        return sum(len(sequence["input_ids"]) for sequence in self.sequences)


def encode(
    examples: Iterable[Example], tokenizer: Tokenizer, max_tokens: int, too_long: TooLong = "refuse"
) -> Encoding:
    """Encode `examples`; raw text is cut into pieces of `max_tokens`, which is never too long.

    Raises:
        BadInput: rows longer than `max_tokens` where `too_long` refuses them (the message names the longest and how
            many there are); nothing is left to learn; the chat template does not announce answers.
    """
    sequences: list[Encoded] = []
    ids: list[str] = []
    refused: list[tuple[int, str]] = []
    dropped = truncated = 0
    checked = False
    for example in examples:
        if example.text is not None:
            made = list(_text(example.text, tokenizer, max_tokens))
        else:
            if not checked:
                check_template(tokenizer)
                checked = True
            made = list(_conversation(example, tokenizer))
            length = max((len(sequence["input_ids"]) for sequence in made), default=0)
            if length > max_tokens:
                if too_long == "truncate":
                    made = list(_conversation(example, tokenizer, max_tokens))
                    truncated += bool(made)
                    dropped += not made
                elif too_long == "drop":
                    made = []
                    dropped += 1
                else:
                    refused.append((length, example.id))
        sequences += made
        ids += [example.id] * len(made)
    if refused:
        length, worst = max(refused)
        raise BadInput(
            f"{len(refused)} rows are longer than training.max_tokens ({max_tokens}), the longest is {worst} with "
            f"{length} tokens; raise training.max_tokens, lower retrieval.top_k, or set training.too_long to drop or truncate",
            param=worst,
        )
    if not any(any(sequence["completion_mask"]) for sequence in sequences):
        raise BadInput(
            "no row has anything to learn: every answer has train: false"
            if not dropped
            else f"no row is left to learn from: all {dropped} are longer than training.max_tokens ({max_tokens}); raise it",
            param="data.train",
        )
    return Encoding(sequences, ids, dropped, truncated)


def check_template(tokenizer: Tokenizer) -> None:
    """Raise :class:`BadInput` if prompts for generation miss the header that the chat template writes before an answer.

    A template that ignores ``add_generation_prompt`` leaves the model to write that header itself, which it would be
    served with but never learned. One that writes no header (``[/INST]``) needs no marker.
    """
    question = {"role": "user", "content": "?"}
    whole = tokenizer.apply_chat_template([question, {"role": "assistant", "content": PROBE}], tokenize=False)
    plain, marked = (
        tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=flag) for flag in (False, True)
    )
    header = whole.partition(PROBE)[0].removeprefix(plain).strip()
    if plain == marked and header:
        raise BadInput(
            f"the chat template of the base has no generation marker: it writes {header!r} before an answer, but does not "
            "end a prompt with it; add {% if add_generation_prompt %} with that header to chat_template.jinja of the base",
            param="base.source",
        )


def _conversation(example: Example, tokenizer: Tokenizer, max_tokens: int | None = None) -> Iterator[Encoded]:
    """The sequences of a conversation; with `max_tokens`, cut to it, or nothing if its question alone is too long."""
    messages, turns = list(example.messages), list(example.turns)
    prompt = prompt_ids(tokenizer, messages)
    answer = answer_ids(tokenizer, example.answer)
    if max_tokens is not None:
        while len(prompt) + len(answer) > max_tokens and (oldest := _oldest_exchange(messages)):
            begin, end = oldest
            del messages[begin:end]
            turns = [turn - (end - begin) for turn in turns if turn >= end]
            prompt = prompt_ids(tokenizer, messages)
        answer = answer[: max(0, max_tokens - len(prompt))]
        if not answer:
            return
    ids, mask = prompt + answer, [0] * len(prompt) + [int(example.learned)] * len(answer)
    for turn in turns:
        before = prompt_ids(tokenizer, messages[:turn])
        reply = answer_ids(tokenizer, messages[turn]["content"])
        end = len(before) + len(reply)
        if ids[:end] == before + reply:
            mask[len(before) : end] = [1] * len(reply)
        elif max_tokens is None or end <= max_tokens:
            yield {"input_ids": before + reply, "completion_mask": [0] * len(before) + [1] * len(reply)}
    if any(mask):
        yield {"input_ids": ids, "completion_mask": mask}


def _oldest_exchange(messages: Sequence[dict[str, str]]) -> tuple[int, int] | None:
    """Where the oldest question and its answers stand, the last question aside."""
    users = [place for place, message in enumerate(messages) if message["role"] == "user"]
    return (users[0], users[1]) if len(users) > 1 else None


def _text(text: str, tokenizer: Tokenizer, max_tokens: int) -> Iterator[Encoded]:
    ids = [*tokenizer.encode(neutral(tokenizer, text), add_special_tokens=False), tokenizer.eos_token_id]
    for start in range(0, len(ids), max_tokens):
        piece = ids[start : start + max_tokens]
        if len(piece) > 1:  # one token has nothing before it to be told from
            yield {"input_ids": piece, "completion_mask": [0] + [1] * (len(piece) - 1)}
