"""Answers bound to a JSON schema or a regular expression, a token mask at a time, by llguidance.

A grammar is compiled anew for every answer: that takes about a millisecond, and copies of one compiled grammar would
share the states that its regular expressions come to, and the bound on them. What explodes is refused while it is
compiled or, where that shows only later, in the middle of the answer: both are bounded by llguidance's own limits, and
the length of what is literal by :data:`LITERAL_CHARS`, on which the time of a single step depends.

Not covered: context-free grammars of the user's own; tokenizers that are not "fast" ones; schema keywords that
llguidance refuses (``not``, ``if``, ``uniqueItems``, …). Look-around, ``\\b`` and back references are no part of its
regular expressions, and an expression has to match the whole answer.
"""

from __future__ import annotations

import json
import re
import threading
from typing import TYPE_CHECKING, Any

import torch

from cluster.errors import BadInput
from serving.engine.base import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LITERAL_CHARS = 4096
"""Longest regular expression, string within a schema, and count of a repetition."""
WHITESPACE = r"[ \t\n\r]{1,20}"
"""Between the parts of a JSON text; without a bound, a model that has nothing to say writes spaces to the end."""
LEXER_STATES = 100_000
"""Of one answer's regular expressions, under half a kilobyte each."""
REPETITION = re.compile(r"\{(\d*)(?:,(\d*))?\}")


class Grammars:
    """Compiles grammars for one tokenizer; may be used by several threads.

    Args:
        tokenizer: a "fast" tokenizer of transformers.
        vocabulary: columns of the logits.
        eos: ids that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos: frozenset[int]) -> None:
        self.source, self.vocabulary, self.eos = tokenizer, vocabulary, eos
        self.lock = threading.Lock()
        self.tokenizer: LLTokenizer | None = None

    def matcher(self, grammar: Grammar) -> Matcher:
        """The state of `grammar` before the first token; takes a millisecond, for large ones some hundred.

        Raises:
            BadInput: it is none, has something that is not supported, or explodes.
        """
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(self._tokenizer(), _text(grammar), log_level=0, limits=limits)
        made = Matcher(matcher, grammar)
        made.allowed(torch.zeros((self.vocabulary + 31) // 32, dtype=torch.int32))
        return made

    def _tokenizer(self) -> LLTokenizer:
        """Made when the first grammar comes: it takes some tenths of a second."""
        from llguidance.hf import from_tokenizer

        with self.lock:
            if self.tokenizer is None:
                try:
                    self.tokenizer = from_tokenizer(self.source, n_vocab=self.vocabulary, eos_token=sorted(self.eos))
                except ValueError as error:
                    raise BadInput(
                        f"this model's tokenizer serves no grammars ({error}); leave response_format out",
                        param="response_format",
                    ) from None
            return self.tokenizer


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher, grammar: Grammar) -> None:
        self.state, self.grammar = matcher, grammar

    @property
    def finished(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self.state.is_stopped())

    def allowed(self, out_row: torch.Tensor) -> None:
        """Write which tokens may come next into ``out_row [vocabulary / 32]``, int32 on the CPU, a bit each.

        Raises:
            BadInput: the grammar needs more than its bounds.
        """
        if not self.state.is_error():
            self.state.unsafe_compute_mask_ptr(out_row.data_ptr(), out_row.numel() * out_row.element_size())
        if self.state.is_error():
            raise _unusable(self.grammar, self.state.get_error())

    def take(self, token: int) -> None:
        """`token` was chosen; what the grammar has against it is told by :meth:`allowed`."""
        self.state.consume_token(token)


def unpack(bits: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Bits ``[rows, vocabulary / 32]`` (int32) as ``[rows, vocabulary]`` (bool), lowest bit first."""
    places = torch.arange(32, device=bits.device, dtype=torch.int32)
    return ((bits[:, :, None] >> places) & 1).bool().flatten(1)[:, :vocabulary]


def _text(grammar: Grammar) -> str:
    """`grammar` in llguidance's own words; ``\\d`` is an ASCII digit, not one of any script."""
    from llguidance import LLMatcher, regex_to_lark

    if grammar.kind == "regex":
        _check_regex(grammar, grammar.text)
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(grammar.text, 'd')}/")
    schema = grammar.text if grammar.kind == "json_schema" else '{"type": "object"}'
    _check_schema(grammar, schema)
    try:
        return LLMatcher.grammar_from_json_schema(
            schema,
            overrides={
                "whitespace_pattern": WHITESPACE,
                "whitespace_flexible": True,
                "item_separator": ",",
                "key_separator": ":",
                "lenient": False,
                "coerce_one_of": False,
            },
        )
    except ValueError as error:
        raise _unusable(grammar, str(error)) from None


def _check_schema(grammar: Grammar, schema: str) -> None:
    try:
        left: list[Any] = [json.loads(schema)]
    except (ValueError, RecursionError) as error:
        raise _unusable(grammar, f"it is not JSON: {error}") from None
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value, *(each for key, each in value.items() if key != "description")]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str):
            _check_regex(grammar, value)


def _check_regex(grammar: Grammar, text: str) -> None:
    if len(text) > LITERAL_CHARS:
        raise _unusable(grammar, f"a text in it has {len(text)} characters; at most {LITERAL_CHARS} are allowed")
    for match in REPETITION.finditer(text):
        if any(count and (len(count) > 9 or int(count) > LITERAL_CHARS) for count in match.groups()):
            raise _unusable(grammar, f"{match[0][:40]} repeats too often; at most {LITERAL_CHARS} times are allowed")


def _unusable(grammar: Grammar, reason: str) -> BadInput:
    what, param = "regular expression", "structured_outputs.regex"
    if grammar.kind != "regex":
        what, param = "schema", "response_format"
    first = reason.strip().replace("<non-verbose/>", "").split("\n")[0][:200]
    return BadInput(f"{param}: the {what} cannot be used: {first}; make it simpler", param=param)
