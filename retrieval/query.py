"""The text to search for, from a conversation: by rule, so that training and serving agree and no model is asked.

A follow-up ("And at Tolloway?", "How long does it take?") says too little to be searched for alone: the user turns
it leans on are put before it, back to the nearest one that stands alone. English and Vietnamese. Not covered: long
detours, for which a model can write the question out (:mod:`retrieval.rewrite`).

The turns are one query and not several: on the sample trade the gold passage is among the first three for 14 of 14
follow-ups so, and for 6 when the last turn is searched for alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from cluster.errors import BadInput

WORD = re.compile(r"\w[\w'’.:-]*")
FEW_CONTENT_WORDS = 3
OPENERS = (
    "and ",
    "but ",
    "or ",
    "also ",
    "what about",
    "how about",
    "what if",
    "còn ",
    "thế ",
    "vậy ",
    "và ",
    "nếu vậy",
)
POINTERS = frozenset(
    WORD.findall(
        "he her hers him his it its she that their them then there these they this those nó họ đó ấy này kia vậy"
    )
)
"""Words that point at something said before."""
FUNCTION_WORDS = frozenset(
    WORD.findall(
        """a about am an and any are at be been but by can could did do does for from had has have how i if in into is
        may me might much many must my no not of off on or our out over shall should so than the to up us was we were
        what when where which who whom whose why will with would you your
        ai bao bị các cho có của cái được gì hay hỏi khi không là lâu mấy một nào như nhiêu nhiều những nếu phải ra
        sao sẽ tại thì thế trong trên tôi từ và vào về với vì đâu để ở"""
    )
)


def search_query(messages: Sequence[Mapping[str, str]]) -> str:
    """The last user message, with the user turns before it that it leans on, oldest first, one a line.

    Args:
        messages: ``{"role", "content"}`` in order; only user turns are read.

    Raises:
        BadInput: there is no user message.
    """
    turns = [message["content"].strip() for message in messages if message["role"] == "user"]
    if not turns:
        raise BadInput("messages holds no user message to search for", param="messages")
    start = len(turns) - 1
    while start > 0 and is_follow_up(turns[start]):
        start -= 1
    return "\n".join(turns[start:])


def is_follow_up(turn: str) -> bool:
    """Whether `turn` opens like a follow-up, points back with a pronoun, or holds few words of its own."""
    text = turn.strip().lower()
    words = WORD.findall(text)
    content = [word for word in words if word not in FUNCTION_WORDS]
    return text.startswith(OPENERS) or not POINTERS.isdisjoint(words) or len(content) <= FEW_CONTENT_WORDS
