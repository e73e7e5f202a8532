"""What a request may ask of an engine: every value of :class:`serving.engine.base.Sampling` has its bounds.

The bounds that depend on the installation are :class:`cluster.config.LimitsConfig`; the others are those of OpenAI's
and vLLM's fields. NaN is in no range, so it is refused with the rest. Not covered: whether a grammar can be compiled
(:mod:`serving.engine.native.grammar`).
"""

from __future__ import annotations

from cluster.config import LimitsConfig
from cluster.errors import BadInput
from retrieval.prompt import check_length
from serving.engine.base import GenerateRequest, Sampling

SEEDS = (-(2**63), 2**63 - 1)
BIAS = 100.0


def check_request(request: GenerateRequest, limits: LimitsConfig, vocabulary: int, context: int) -> None:
    """Refuse `request` if an engine with so many token ids and so long a context cannot answer it.

    Raises:
        BadInput: a value is out of its bounds; the sentence names field and bound.
        ContextTooLong: prompt and answer do not fit the context.
    """
    check_sampling(request.sampling, limits)
    ids = request.token_ids
    if not ids:
        raise BadInput("the prompt has no tokens; write something into messages", param="messages")
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        raise BadInput(f"the prompt has token ids outside the model's {vocabulary}", param="messages")
    for token, _ in request.sampling.logit_bias:
        if not 0 <= token < vocabulary:
            raise BadInput(
                f"logit_bias names token {_short(token)}, but the model has ids 0 to {vocabulary - 1}",
                param="logit_bias",
            )
    check_length(len(ids), request.sampling.max_tokens, context)


def check_sampling(sampling: Sampling, limits: LimitsConfig) -> None:
    """The part of :func:`check_request` that needs no model.

    Raises:
        BadInput: a value is out of its bounds.
    """
    _within("max_tokens", sampling.max_tokens, 1, limits.max_tokens)
    _within("n", sampling.n, 1, limits.n)
    _within("temperature", sampling.temperature, 0, 2)
    if not 0.0 < sampling.top_p <= 1.0:
        raise BadInput(f"top_p is {sampling.top_p:g}; it must be more than 0 and at most 1", param="top_p")
    if sampling.top_k < 0:
        raise BadInput(f"top_k is {_short(sampling.top_k)}; it must be 0 (all tokens) or more", param="top_k")
    _within("min_p", sampling.min_p, 0, 1)
    _within("presence_penalty", sampling.presence_penalty, -2, 2)
    _within("frequency_penalty", sampling.frequency_penalty, -2, 2)
    if not 0.0 < sampling.repetition_penalty <= 10.0:
        raise BadInput(
            f"repetition_penalty is {sampling.repetition_penalty:g}; it must be more than 0 and at most 10",
            param="repetition_penalty",
        )
    if sampling.seed is not None:
        _within("seed", sampling.seed, *SEEDS)
    _within("min_tokens", sampling.min_tokens, 0, sampling.max_tokens)
    if sampling.logprobs is not None:
        _within("top_logprobs", sampling.logprobs, 0, limits.logprobs)
    _check_stop(sampling.stop, limits)
    if len(sampling.logit_bias) > limits.logit_bias:
        raise BadInput(
            f"logit_bias has {len(sampling.logit_bias)} tokens; at most {limits.logit_bias} are allowed",
            param="logit_bias",
        )
    for token, bias in sampling.logit_bias:
        if not -BIAS <= bias <= BIAS:
            raise BadInput(
                f"logit_bias of token {_short(token)} is {bias:g}; it must be from {-BIAS:g} to {BIAS:g}",
                param="logit_bias",
            )
    if sampling.grammar is not None:
        size = len(sampling.grammar.text.encode())
        if size > limits.grammar_bytes:
            param = "structured_outputs.regex" if sampling.grammar.kind == "regex" else "response_format"
            raise BadInput(f"{param} has {size} bytes; at most {limits.grammar_bytes} are allowed", param=param)


def _check_stop(stop: tuple[str, ...], limits: LimitsConfig) -> None:
    if len(stop) > limits.stop:
        raise BadInput(f"stop has {len(stop)} strings; at most {limits.stop} are allowed", param="stop")
    for text in stop:
        if not 1 <= len(text) <= limits.stop_chars:
            raise BadInput(
                f"a stop string has {len(text)} characters; it must have 1 to {limits.stop_chars}", param="stop"
            )


def _within(field: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise BadInput(f"{field} is {_short(value)}; it must be from {least} to {most}", param=field)


def _short(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) if abs(value) < 10**30 else "out of all bounds"
