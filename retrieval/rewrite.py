"""A follow-up written out as a question of its own by the generator: what it is asked, and what is taken of its answer.

The words here are no part of a release's prompt and of its hash: they change what is searched for, not what a model
was trained to read. A small model often writes something else than it was asked for, so its question is only taken
if it is made of words of the conversation, and it is only searched beside the one by rule (:mod:`retrieval.query`).
"""

from __future__ import annotations

from collections.abc import Sequence

from retrieval.prompt import Message
from retrieval.query import FUNCTION_WORDS, is_follow_up
from retrieval.words import words

SYSTEM = (
    "You rewrite the last question of a conversation so that it can be understood without the conversation. "
    "Keep its language. Write the question and nothing else."
)
TURNS = 6
"""Messages before the last that are shown; older ones are hardly ever meant."""
LONGEST = 600
"""Characters of each message that are shown, and of a question that is taken."""
KNOWN_SHARE = 0.7
"""Of the content words of a question that must stand in the conversation."""
QUESTION_MARKS = ("?", "？", "؟")
LABELS = {"user": "User", "assistant": "Assistant"}


def rewriting(conversation: Sequence[Message]) -> list[dict[str, str]] | None:
    """The messages that ask for a stand-alone question; None if the last turn is one, or the first of all."""
    turns = [message for message in conversation if message["role"] in LABELS]
    before = turns[:-1][-TURNS:]
    last = turns[-1]["content"] if turns else ""
    if not any(message["role"] == "user" for message in before) or not is_follow_up(last):
        return None
    shown = [f"{LABELS[message['role']]}: {message['content'].strip()[:LONGEST]}" for message in before]
    asked = [*shown, "", f"Last question: {last.strip()[:LONGEST]}", "Question that stands alone:"]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n".join(asked)}]


def stand_alone(answer: str, conversation: Sequence[Message]) -> str | None:
    """The question that a generator answered with; None if it is none, or not about this conversation."""
    line = next((line.strip() for line in answer.splitlines() if line.strip()), "")
    question = line.partition(": ")[2] if line.lower().startswith(("question", "user", "last question")) else line
    question = question.strip("\"'“” ")
    said = [word for word in words(question) if word not in FUNCTION_WORDS]
    known = {word for message in conversation for word in words(message["content"])}
    if (
        not said
        or not question.endswith(QUESTION_MARKS)
        or len(question) > LONGEST
        or sum(word in known for word in said) < KNOWN_SHARE * len(said)
    ):
        return None
    turns = [message["content"].strip() for message in conversation if message["role"] == "user"]
    return None if question in turns else question
