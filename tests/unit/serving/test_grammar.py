"""Constrained answers: whatever a model without sense says, it keeps to the grammar; what explodes is refused."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from cluster.errors import BadInput
from serving.engine.base import Grammar, Sampling
from serving.engine.native.grammar import Grammars, Matcher
from serving.engine.native.sampling import Chooser, choose

EOS = frozenset({0, 2})
COLUMNS = 320
"""More than the tokenizer has tokens, as many models do."""

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["guest", "crew", "naïve 🚚"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["v", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
DATED = {
    "type": "object",
    "properties": {"on": {"type": "string", "pattern": "^[0-9]{4}-[01][0-9]$"}, "fee": {"type": "number"}},
    "required": ["on", "fee"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, COLUMNS, EOS)


def allowed(matcher: Matcher, columns: int = COLUMNS) -> set[int]:
    bits = torch.zeros((columns + 31) // 32, dtype=torch.int32)
    matcher.allowed(bits)
    return {token for token in range(columns) if int(bits[token // 32]) >> token % 32 & 1}


def write(grammars: Grammars, grammar: Grammar, seed: int, *, temperature: float = 1.0, tokens: int = 400) -> list[int]:
    """What a model of random scores answers, without its end; it has to come to one."""
    row = Chooser(Sampling(tokens, temperature, seed=seed), (5,), 0, EOS, COLUMNS, grammars.matcher(grammar))
    chance = torch.Generator().manual_seed(seed)
    made: list[int] = []
    while len(made) < tokens:
        (choice,) = choose(torch.randn(1, COLUMNS, generator=chance) * 2, [row])
        assert choice.error is None
        if choice.token in EOS:
            return made
        row.take(choice.token)
        made.append(choice.token)
    pytest.fail(f"no end after {tokens} tokens")


def refusal(grammars: Grammars, kind: Any, text: str) -> BadInput:
    with pytest.raises(BadInput) as caught:
        grammars.matcher(Grammar(kind, text))
    return caught.value


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("schema", [PERSON, TREE, DATED], ids=["person", "tree", "dated"])
def test_whatever_is_said_parses_and_is_valid(
    grammars: Grammars, tokenizer: Any, schema: dict[str, Any], seed: int
) -> None:
    made = write(grammars, Grammar("json_schema", json.dumps(schema)), seed)
    value = json.loads(tokenizer.decode(made))
    jsonschema.Draft202012Validator(schema).validate(value)


def test_answers_differ_within_the_schema(grammars: Grammars, tokenizer: Any) -> None:
    grammar = Grammar("json_schema", json.dumps(PERSON))
    said = [json.loads(tokenizer.decode(write(grammars, grammar, seed))) for seed in range(20)]
    assert {value["kind"] for value in said} == {"guest", "crew", "naïve 🚚"}
    assert len({value["name"] for value in said}) > 10


@pytest.mark.parametrize("seed", range(5))
def test_a_json_object_is_one(grammars: Grammars, tokenizer: Any, seed: int) -> None:
    row_made = write(grammars, Grammar("json_object"), seed, tokens=3000)
    assert isinstance(json.loads(tokenizer.decode(row_made)), dict)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("pattern", [r"(yes|no), [0-9]{2,4}\.", r"[a-zé]{3}|🚚{2}", r"^\d+ (crowns|öre)$"])
def test_the_whole_answer_matches_the_expression(grammars: Grammars, tokenizer: Any, pattern: str, seed: int) -> None:
    said = tokenizer.decode(write(grammars, Grammar("regex", pattern), seed))
    assert re.fullmatch(pattern, said)


def test_a_complete_grammar_allows_the_end_alone(grammars: Grammars, tokenizer: Any) -> None:
    matcher = grammars.matcher(Grammar("regex", "ab?"))
    a, b = tokenizer.encode("ab", add_special_tokens=False)
    assert (allowed(matcher), matcher.finished) == ({a}, False)
    matcher.take(a)
    assert (allowed(matcher), matcher.finished) == ({b} | EOS, False)
    matcher.take(b)
    assert (allowed(matcher), matcher.finished) == (set(EOS), True)


def test_control_tokens_and_columns_without_a_token_are_never_allowed(grammars: Grammars, tokenizer: Any) -> None:
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    matcher = grammars.matcher(Grammar("regex", "(?s:.*)"))
    assert allowed(matcher) & ({start} | set(range(len(tokenizer), COLUMNS))) == set()
    assert allowed(matcher) >= EOS


def test_matchers_of_one_grammar_know_nothing_of_each_other(grammars: Grammars, tokenizer: Any) -> None:
    first, second = (grammars.matcher(Grammar("regex", "ab")) for _ in range(2))
    before = allowed(second)
    first.take(next(iter(allowed(first))))
    assert allowed(first) != before == allowed(second)


def test_spaces_between_the_parts_have_an_end(grammars: Grammars, tokenizer: Any) -> None:
    matcher = grammars.matcher(Grammar("json_schema", '{"type": "array", "items": {"type": "null"}}'))
    bracket, space = tokenizer.encode("[ ", add_special_tokens=False)
    matcher.take(bracket)
    spaces = 0
    while space in allowed(matcher):
        matcher.take(space)
        spaces += 1
    assert spaces == 20


def test_a_users_own_options_do_not_count(grammars: Grammars) -> None:
    error = refusal(grammars, "json_schema", '{"x-guidance": {"lenient": true}, "not": {"type": "string"}}')
    assert "not" in str(error)


# -- what cannot be used


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ("true", "object"),
        ('{"type": "strin"}', "strin"),
        ('{"not": {"type": "string"}}', "not"),
        ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ('{"$ref": "https://example.com/schema"}', "https://example.com/schema"),
        ('{"$ref": "#"}', "schema"),
        ('{"type": "string", "pattern": "(?=a)b"}', "regex"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(grammars: Grammars, schema: str, says: str) -> None:
    error = refusal(grammars, "json_schema", schema)
    assert error.param == "response_format"
    assert says in str(error)
    assert len(str(error)) < 400


@pytest.mark.parametrize("pattern", ["a(", r"(a)\1", r"\bword\b", "(?=a)b", "x^y", "a{99999999999999999999}"])
def test_an_expression_that_cannot_be_used_is_refused(grammars: Grammars, pattern: str) -> None:
    assert refusal(grammars, "regex", pattern).param == "structured_outputs.regex"


BOMBS = {
    "nested repeats": ("regex", "(a{1,1000}){1,1000}"),
    "deeper repeats": ("regex", "((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}"),
    "a huge repeat": ("regex", "a{4294967295}"),
    "many states": ("regex", "(a|b)*a(a|b){60}"),
    "words in words": ("regex", r"(\w{1,100}){1,100}"),
    "options": ("regex", "a?" * 1365 + "a" * 1365),
    "stars": ("regex", "(a*)*" * 800),
    "parentheses": ("regex", "(" * 2000 + "a" + ")" * 2000),
    "a long literal": ("regex", "x" * 60_000),
    "a long enum value": ("json_schema", json.dumps({"enum": ["x" * 60_000]})),
    "long enum values": ("json_schema", json.dumps({"enum": ["x" * 4000 + str(n) for n in range(15)]})),
    "a huge enum": ("json_schema", json.dumps({"enum": [f"value {n * 7919 % 1_000_003}" for n in range(4000)]})),
    "deep arrays": ("json_schema", '{"type": "array", "items": ' * 2000 + "{}" + "}" * 2000),
    "many properties": (
        "json_schema",
        json.dumps({"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(1500)}}),
    ),
    "doubling references": (
        "json_schema",
        json.dumps(
            {
                "$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(25)}
                | {"d25": {"type": "object"}},
                "$ref": "#/$defs/d0",
            }
        ),
    ),
    "products of alternatives": (
        "json_schema",
        json.dumps(
            {
                "allOf": [
                    {"anyOf": [{"type": "object", "properties": {f"p{n}{m}": {"type": "integer"}}} for m in range(4)]}
                    for n in range(12)
                ]
            }
        ),
    ),
    "intersected patterns": (
        "json_schema",
        json.dumps({"allOf": [{"type": "string", "pattern": f"^.*{chr(97 + n)}.*$"} for n in range(20)]}),
    ),
    "a huge multiple": ("json_schema", '{"type": "integer", "multipleOf": 999999937}'),
    "a huge count of items": (
        "json_schema",
        '{"type": "array", "minItems": 1000000000, "items": {"type": "array", "maxItems": 1000000000}}',
    ),
}
STEPS = 64
MEBIBYTES = 256


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_explodes_is_refused_or_stays_small(tokenizer: Any, grammars: Grammars, bomb: str) -> None:
    kind, text = BOMBS[bomb]
    held = resident_mebibytes()
    chance = torch.Generator().manual_seed(1)
    try:
        matcher = grammars.matcher(Grammar(kind, text))  # type: ignore[arg-type]
        for _ in range(STEPS):
            left = sorted(allowed(matcher) - EOS)
            if not left:
                break
            matcher.take(left[int(torch.randint(len(left), (1,), generator=chance))])
    except BadInput as error:
        assert error.param in ("response_format", "structured_outputs.regex")
        assert len(str(error)) < 400
    assert resident_mebibytes() - held < MEBIBYTES


@pytest.mark.parametrize("bomb", ["nested repeats", "a huge repeat", "parentheses", "a long literal", "deep arrays"])
def test_the_worst_are_refused_at_once_or_within_a_few_tokens(grammars: Grammars, tokenizer: Any, bomb: str) -> None:
    kind, text = BOMBS[bomb]
    with pytest.raises(BadInput):
        matcher = grammars.matcher(Grammar(kind, text))  # type: ignore[arg-type]
        for _ in range(1000):
            matcher.take(min(allowed(matcher) - EOS))


def resident_mebibytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20


# -- other tokenizers


@pytest.mark.parametrize("seed", range(3))
def test_tokens_may_span_the_parts_of_a_json_text(seed: int, merged: Any) -> None:
    columns = len(merged)
    eos = frozenset({merged.eos_token_id})
    grammars = Grammars(merged, columns, eos)
    matcher = grammars.matcher(Grammar("json_schema", json.dumps(DATED)))
    row = Chooser(Sampling(100, 1.0, seed=seed), (5,), 0, eos, columns, matcher)
    chance = torch.Generator().manual_seed(seed)
    made: list[int] = []
    while not row.finished:
        (choice,) = choose(torch.randn(1, columns, generator=chance), [row])
        row.take(choice.token)
        made.append(choice.token)
    jsonschema.Draft202012Validator(DATED).validate(json.loads(merged.decode(made)))


@pytest.fixture(scope="module")
def merged() -> Any:
    """A byte-level BPE tokenizer with merges, so that tokens span the parts of a JSON text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    corpus = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    raw.train_from_iterator([*corpus, json.dumps(PERSON), json.dumps(TREE)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


def test_a_tokenizer_that_cannot_be_read_is_refused_when_a_grammar_comes() -> None:
    class Slow:
        eos_token_id = 2

    error = refusal(Grammars(Slow(), COLUMNS, EOS), "regex", "a")
    assert "tokenizer" in str(error)
