"""Choosing a token: transformers' processors as the measure, distributions by their counts, rows apart from each other."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cluster.errors import BadInput, MetierError
from serving.engine.base import Grammar, Sampling
from serving.engine.native.grammar import Grammars, unpack
from serving.engine.native.sampling import Choice, Chooser, choose, draw, narrow

VOCABULARY = 259
EOS = frozenset({2})


def chooser(prompt: Sequence[int] = (5,), index: int = 0, vocabulary: int = VOCABULARY, **sampling: Any) -> Chooser:
    return Chooser(Sampling(64, **sampling), prompt, index, EOS, vocabulary)


def scores(seed: int, rows: int = 1, vocabulary: int = VOCABULARY, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def narrowed(logits: torch.Tensor, asked: Sequence[Sampling]) -> torch.Tensor:
    """What :func:`narrow` leaves, ``[rows, vocabulary]``."""
    left, ids = narrow(logits.clone(), asked)
    return left if ids is None else torch.full_like(logits, -math.inf).scatter(1, ids, left)


def tokens(choices: Sequence[Choice]) -> list[int]:
    assert not any(choice.error for choice in choices)
    return [choice.token for choice in choices]


# -- against transformers


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.floats(0.05, 2.0),
    top_k=st.integers(0, 300),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    scale=st.floats(0.1, 10.0),
)
def test_what_is_left_to_draw_from_is_what_transformers_leaves(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, scale: float
) -> None:
    logits = scores(seed, scale=scale)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0.0:
        warpers.append(MinPLogitsWarper(min_p))
    wanted = warpers(torch.tensor([[5]]), logits.clone()).softmax(-1)
    got = narrowed(logits, [Sampling(1, temperature, top_p, top_k, min_p)]).softmax(-1)
    # Where a sum or a share lies on the border by less than rounding, one token more or less is right too.
    assert ((got > 0) != (wanted > 0)).sum() <= 1
    torch.testing.assert_close(got, wanted, atol=0.02 if ((got > 0) != (wanted > 0)).any() else 1e-6, rtol=1e-4)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 10.0), st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40))
def test_the_repetition_penalty_is_transformers(seed: int, penalty: float, seen: list[int]) -> None:
    logits = scores(seed)
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits.clone())
    half = len(seen) // 2 + 1
    row = chooser(seen[:half], repetition_penalty=penalty)
    for token in seen[half:]:
        row.take(token)
    ours = logits[0].clone()
    row.edit(ours)
    torch.testing.assert_close(ours, wanted[0])


def test_penalties_count_the_answer_and_not_the_prompt() -> None:
    row = chooser([7, 7, 8], presence_penalty=0.5, frequency_penalty=0.25)
    for token in (9, 9, 10):
        row.take(token)
    logits = scores(1)[0]
    ours = logits.clone()
    row.edit(ours)
    changed = {token: round(float(logits[token] - ours[token]), 4) for token in range(VOCABULARY)}
    assert {token: change for token, change in changed.items() if change} == {9: 1.0, 10: 0.75}


def test_bias_comes_before_the_penalties() -> None:
    row = chooser([7], repetition_penalty=2.0, logit_bias=((7, 10.0), (8, -100.0)))
    logits = torch.full((VOCABULARY,), -1.0)
    row.edit(logits)
    assert (float(logits[7]), float(logits[8]), float(logits[9])) == (4.5, -101.0, -1.0)


# -- greedy


def test_rows_that_ask_for_nothing_get_the_likeliest() -> None:
    logits = scores(3, rows=9)
    assert tokens(choose(logits, [chooser() for _ in range(9)])) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-300])
def test_no_temperature_to_speak_of_is_greedy(temperature: float) -> None:
    logits = scores(4)
    assert tokens(choose(logits, [chooser(temperature=temperature)])) == logits.argmax(-1).tolist()


def test_bias_moves_a_greedy_answer() -> None:
    assert tokens(choose(scores(5), [chooser(logit_bias=((42, 100.0),))])) == [42]


def test_the_logits_stay_as_they_are() -> None:
    logits = scores(6, rows=3)
    before = logits.clone()
    asking = [chooser(logit_bias=((1, 9.0),)), chooser(temperature=1.0, top_p=0.5, repetition_penalty=2.0), chooser()]
    choose(logits, asking)
    assert torch.equal(logits, before)


def test_the_end_waits_for_min_tokens() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 2], logits[0, 9] = 5.0, 4.0
    row = chooser(min_tokens=2)
    made = []
    for _ in range(3):
        made += tokens(choose(logits, [row]))
        row.take(made[-1])
    assert made == [9, 9, 2]


# -- draws


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 1.0, "top_k": 6, "top_p": 0.8, "min_p": 0.05, "presence_penalty": 0.3},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(asked: dict[str, Any]) -> None:
    vocabulary, rows = 12, 4000
    logits = scores(8, vocabulary=vocabulary, scale=1.5)
    choosers = [chooser(seed=seed, vocabulary=vocabulary, **asked) for seed in range(rows)]
    counts = np.bincount(tokens(choose(logits.expand(rows, -1), choosers)), minlength=vocabulary)
    expected = narrowed(logits, [Sampling(1, **asked)]).softmax(-1)[0].double().numpy()
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    there = expected > 0
    assert chisquare(counts[there], expected[there] / expected.sum() * rows).pvalue > 0.001


def test_one_row_draws_a_sequence_that_follows_the_distribution() -> None:
    logits = scores(9, vocabulary=8, scale=1.0)
    row = chooser(seed=1, vocabulary=8, temperature=1.0)
    made = [tokens(choose(logits, [row]))[0] for _ in range(3000)]
    assert chisquare(np.bincount(made, minlength=8), logits.softmax(-1)[0].double().numpy() * 3000).pvalue > 0.001
    pairs = np.histogram2d(made[:-1], made[1:], bins=8)[0]
    both = np.outer(pairs.sum(1), pairs.sum(0)) / pairs.sum()
    assert chisquare(pairs.ravel(), both.ravel(), ddof=14).pvalue > 0.001  # one draw tells nothing of the next


def test_a_flat_row_has_all_its_tokens_sorted_for_top_p() -> None:
    vocabulary = 5000
    logits = scores(10, vocabulary=vocabulary, scale=0.01)
    ours = narrowed(logits, [Sampling(1, 1.0, top_p=0.9)])
    wanted = TopPLogitsWarper(0.9)(torch.tensor([[5]]), logits.clone())
    kept, right = int(ours.isfinite().sum()), int(wanted.isfinite().sum())
    assert abs(kept - right) <= 1
    assert kept > 4000


def test_rows_are_narrowed_each_as_it_asks() -> None:
    logits = scores(17, rows=5)
    asked = [
        Sampling(1, 1.0),
        Sampling(1, 0.5, top_k=3),
        Sampling(1, 2.0, top_p=0.4),
        Sampling(1, 1.0, min_p=0.3),
        Sampling(1, 1.5, top_k=9, top_p=0.9, min_p=0.1),
    ]
    together = narrowed(logits, asked)
    for row, sampling in enumerate(asked):
        assert torch.equal(together[row], narrowed(logits[row : row + 1], [sampling])[0])
    assert together.isfinite().sum(-1).tolist()[:2] == [VOCABULARY, 3]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.data())
def test_a_seed_gives_the_same_token_in_any_batch(seed: int, data: Any) -> None:
    asked = st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.0, 0.7, 1.3])},
        optional={
            "top_k": st.integers(1, 30),
            "top_p": st.floats(0.2, 0.99),
            "min_p": st.floats(0.01, 0.3),
            "repetition_penalty": st.floats(0.5, 2.0),
            "logprobs": st.integers(0, 3),
        },
    )
    rows = data.draw(st.lists(asked, min_size=1, max_size=6))
    logits = scores(seed, rows=len(rows))
    together = [chooser(seed=seed + row, **sampling) for row, sampling in enumerate(rows)]
    alone = [chooser(seed=seed + row, **sampling) for row, sampling in enumerate(rows)]
    for _ in range(3):
        batch = choose(logits, together)
        single = [choose(logits[row : row + 1], [alone[row]])[0] for row in range(len(rows))]
        assert tokens(batch) == tokens(single)
        for row, choice in enumerate(batch):
            together[row].take(choice.token)
            alone[row].take(choice.token)


def test_choices_of_one_request_draw_with_seeds_of_their_own() -> None:
    flat = torch.zeros(1, VOCABULARY)
    second = [tokens(choose(flat, [chooser(index=1, seed=4, temperature=1.0)])) for _ in range(2)]
    assert second[0] == second[1] == tokens(choose(flat, [chooser(index=0, seed=5, temperature=1.0)]))
    drawn = {tokens(choose(flat, [chooser(index=index, seed=4, temperature=1.0)]))[0] for index in range(8)}
    assert len(drawn) > 4


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_seeds_reach_from_end_to_end(seed: int) -> None:
    drawn = [tokens(choose(torch.zeros(1, VOCABULARY), [chooser(index=3, seed=seed, temperature=1.0)])) for _ in "ab"]
    assert drawn[0] == drawn[1]


def test_without_a_seed_answers_differ() -> None:
    flat = torch.zeros(20, VOCABULARY)
    assert len(set(tokens(choose(flat, [chooser(temperature=1.0) for _ in range(20)])))) > 10


def test_what_was_ruled_out_is_never_drawn() -> None:
    logits = torch.zeros(4000, VOCABULARY)
    logits[:, ::2] = -math.inf
    drawn = tokens(choose(logits, [chooser(seed=seed, temperature=2.0) for seed in range(4000)]))
    assert all(token % 2 for token in drawn)
    assert len(set(drawn)) == VOCABULARY // 2


def test_the_only_token_is_always_drawn() -> None:
    rows = [chooser(seed=seed, temperature=1.0) for seed in range(1000)]
    logits = torch.full((1000, 4), -math.inf)
    logits[:, 1] = 0.0
    assert set(draw(logits, rows).tolist()) == {1}


# -- log probabilities


def test_log_probabilities_are_those_before_anything_was_asked() -> None:
    logits = scores(11, rows=3)
    asked: dict[str, Any] = {
        "temperature": 0.3,
        "top_k": 2,
        "repetition_penalty": 5.0,
        "logit_bias": ((8, 50.0),),
        "seed": 1,
    }
    rows = [chooser(logprobs=3, **asked), chooser(logprobs=0), chooser()]
    natural = logits.log_softmax(-1)
    first, second, third = choose(logits, rows)
    assert first.logprob is not None
    assert second.logprob is not None
    assert first.logprob.logprob == pytest.approx(float(natural[0, first.token]), abs=1e-5)
    assert [token for token, _ in first.logprob.top] == natural[0].topk(3).indices.tolist()
    assert [value for _, value in first.logprob.top] == pytest.approx(natural[0].topk(3).values.tolist(), abs=1e-5)
    assert (second.logprob.token, second.logprob.top) == (int(logits[1].argmax()), ())
    assert third.logprob is None


# -- rows that cannot go on


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("asked", [{}, {"temperature": 1.0, "top_p": 0.5}, {"logprobs": 2}], ids=str)
def test_a_row_that_is_no_numbers_ends_alone(broken: float, asked: dict[str, Any]) -> None:
    logits = scores(12, rows=3)
    logits[1, 40] = broken
    well, ill, other = choose(logits, [chooser(), chooser(**asked), chooser(seed=3, temperature=1.0)])
    assert well.token == int(logits[0].argmax())
    assert other.token == choose(logits[2:], [chooser(seed=3, temperature=1.0)])[0].token
    assert isinstance(ill.error, MetierError)
    assert "adapter" in str(ill.error)
    assert well.error is other.error is None


def test_a_row_without_any_token_ends_alone() -> None:
    logits = scores(13, rows=2)
    logits[0] = -math.inf
    none, well = choose(logits, [chooser(temperature=1.0), chooser()])
    assert none.error is not None
    assert well.token == int(logits[1].argmax())


# -- grammars


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_binds_its_own_row_alone(tokenizer: Any, temperature: float) -> None:
    grammars = Grammars(tokenizer, VOCABULARY, EOS)
    logits = scores(14, rows=2)
    matcher = grammars.matcher(Grammar("regex", "yes|no"))
    bound = Chooser(Sampling(8, temperature, seed=2), (5,), 0, EOS, VOCABULARY, matcher)
    made = []
    while not bound.finished:
        choice, other = choose(logits, [bound, chooser()])
        assert other.token == int(logits[1].argmax())
        bound.take(choice.token)
        made.append(choice.token)
    assert tokenizer.decode(made) in ("yes", "no")
    assert tokens(choose(logits, [bound, chooser()]))[0] in EOS


def test_a_complete_grammar_ends_before_min_tokens(tokenizer: Any) -> None:
    matcher = Grammars(tokenizer, VOCABULARY, EOS).matcher(Grammar("regex", "a"))
    row = Chooser(Sampling(8, min_tokens=5), (5,), 0, EOS, VOCABULARY, matcher)
    row.take(tokens(choose(scores(15), [row]))[0])
    assert row.finished
    assert tokens(choose(scores(15), [row])) == [2]


def test_a_grammar_that_gives_up_ends_its_row_alone(tokenizer: Any) -> None:
    matcher = Grammars(tokenizer, VOCABULARY, EOS).matcher(Grammar("regex", "yes|no"))
    matcher.take(int(tokenizer.encode("z", add_special_tokens=False)[0]))
    bound = Chooser(Sampling(8), (5,), 0, EOS, VOCABULARY, matcher)
    logits = scores(16, rows=2)
    choice, other = choose(logits, [bound, chooser()])
    assert isinstance(choice.error, BadInput)
    assert other.token == int(logits[1].argmax())


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_bits_are_read_lowest_first(wanted: list[bool]) -> None:
    words = np.packbits(np.array(wanted), bitorder="little")
    words = np.concatenate([words, np.zeros(-len(words) % 4, np.uint8)]).view(np.int32)
    assert unpack(torch.from_numpy(words)[None], len(wanted))[0].tolist() == wanted
