"""Every value that a request may carry has its bounds, and a refusal names field and bound."""

import math
from dataclasses import replace
from typing import Any

import pytest

from cluster.config import LimitsConfig
from cluster.errors import BadInput, ContextTooLong
from serving.engine.base import GenerateRequest, Grammar, Sampling
from serving.engine.limits import check_request, check_sampling

LIMITS = LimitsConfig()
REQUEST = GenerateRequest("r", (1, 2, 3), Sampling(16))


def check(request: GenerateRequest = REQUEST, **sampling: Any) -> None:
    check_request(replace(request, sampling=replace(request.sampling, **sampling)), LIMITS, vocabulary=100, context=64)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_tokens", [0, -1, 4097, 10**9, 10**5000]),
        ("n", [0, -1, 5, 10**6]),
        ("temperature", [-0.1, 2.1, math.nan, math.inf, -math.inf]),
        ("top_p", [0.0, -0.1, 1.1, math.nan, math.inf]),
        ("top_k", [-1, -(10**5000)]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("presence_penalty", [-2.1, 2.1, math.nan, math.inf]),
        ("frequency_penalty", [-2.1, 2.1, math.nan, math.inf]),
        ("repetition_penalty", [0.0, -1.0, 10.1, math.nan, math.inf]),
        ("seed", [2**63, -(2**63) - 1, 10**5000]),
        ("min_tokens", [-1, 17]),
        ("stop", [("x",) * 5, ("x",) * 10_000, ("",), ("ok", "x" * 65)]),
        (
            "logit_bias",
            [((100, 1.0),), ((-1, 1.0),), ((10**5000, 1.0),), ((1, 101.0),), ((1, math.nan),), ((1, -math.inf),)],
        ),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_its_name(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(BadInput) as refused:
            check(**{field: value})
        assert refused.value.param == field
        assert len(str(refused.value)) < 200


def test_the_number_of_biases_is_bounded() -> None:
    check_sampling(Sampling(1, logit_bias=tuple((token, 1.0) for token in range(300))), LIMITS)
    with pytest.raises(BadInput, match="301 tokens; at most 300"):
        check(logit_bias=tuple((token, 1.0) for token in range(301)))


@pytest.mark.parametrize("logprobs", [-1, 21])
def test_log_probabilities_are_bounded_under_openais_name(logprobs: int) -> None:
    with pytest.raises(BadInput) as refused:
        check(logprobs=logprobs)
    assert refused.value.param == "top_logprobs"


@pytest.mark.parametrize(("kind", "param"), [("json_schema", "response_format"), ("regex", "structured_outputs.regex")])
def test_the_size_of_a_grammar_is_bounded_in_bytes(kind: Any, param: str) -> None:
    check(grammar=Grammar(kind, "é" * 32768))
    with pytest.raises(BadInput, match="65538 bytes; at most 65536") as refused:
        check(grammar=Grammar(kind, "é" * 32769))
    assert refused.value.param == param


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 2.0, "top_p": 1.0, "top_k": 10**9, "min_p": 1.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 10.0},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1, "n": 4},
        {"stop": ("x" * 64,) * 4},
        {"logit_bias": ((0, -100.0), (99, 100.0))},
        {"logprobs": 20, "min_tokens": 16},
        {"max_tokens": 61},
    ],
    ids=str,
)
def test_the_bounds_themselves_are_allowed(sampling: dict[str, Any]) -> None:
    check(**sampling)


def test_limits_are_those_of_the_configuration() -> None:
    wide = LimitsConfig(n=8, stop=0)
    check_sampling(Sampling(1, n=8), wide)
    with pytest.raises(BadInput, match="at most 0"):
        check_sampling(Sampling(1, stop=("x",)), wide)


def test_prompt_and_answer_have_to_fit_the_context() -> None:
    check(replace(REQUEST, token_ids=(1,) * 48))
    with pytest.raises(ContextTooLong, match="49 tokens and 16"):
        check(replace(REQUEST, token_ids=(1,) * 49))


@pytest.mark.parametrize("ids", [(), (1, 100), (-1,), (10**30,)])
def test_a_prompt_has_tokens_and_the_model_knows_them(ids: tuple[int, ...]) -> None:
    with pytest.raises(BadInput) as refused:
        check(replace(REQUEST, token_ids=ids))
    assert refused.value.param == "messages"
