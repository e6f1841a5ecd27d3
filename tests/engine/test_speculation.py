"""Speculation: depths that no search beats, batches that leave room for bad luck, acceptance as it was seen."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cost import Piece, StepCost
from engine.speculation import (
    MAX_DEPTH,
    AcceptanceEstimate,
    Depths,
    TierLoad,
    allowed_s,
    choose_depths,
    depth_for_request,
    expected_tokens,
    theta_for,
)

# OPT-7B on an A100 with a 125M draft model: paper.md, section 2, with drafts.
PAPER = StepCost((Piece(24.8e-3, 6.88e-5, 1.2e-6), Piece(3.0e-3, 7.52e-5, 3.46e-3)))
CHATBOT = TierLoad(0.1, 0.7, 45, 40_000)
PROMPT_PER_OUTPUT = 763 / 266
BATCH_TOKENS = 2048

acceptances = st.sampled_from([None, 0.0, 0.3, 0.7, 0.9, 1.0])
costs = st.builds(
    StepCost,
    st.lists(
        st.builds(Piece, st.floats(1e-3, 0.05), st.floats(1e-6, 3e-4), st.floats(0.0, 0.01)),
        min_size=1,
        max_size=2,
    ).map(tuple),
    per_context_token_s=st.sampled_from([0.0, 1e-7]),
    per_seq_s=st.sampled_from([0.0, 2e-5]),
    drift=st.sampled_from([1.0, 1.3]),
)
loads = st.builds(
    TierLoad,
    st.sampled_from([0.03, 0.05, 0.1, 0.2]) | st.floats(0.02, 0.3),
    acceptances,
    st.integers(0, 60),
    st.sampled_from([0, 20_000]),
)


def random_case(rng: random.Random, tiers: int) -> tuple[StepCost, list[TierLoad]]:
    pieces = tuple(
        Piece(rng.uniform(1e-3, 0.04), rng.uniform(1e-6, 2e-4), rng.choice([0.0, 1e-6, 4e-3]))
        for _ in range(rng.randint(1, 2))
    )
    cost = StepCost(pieces, per_context_token_s=rng.choice([0.0, 1e-7]), drift=rng.choice([1.0, 1.2]))
    choices = [0.0, 0.3, 0.7, 0.9, 1.0]
    return cost, [
        TierLoad(rng.choice([0.03, 0.05, 0.07, 0.1]), rng.choice(choices), rng.randint(1, 50), 10_000)
        for _ in range(tiers)
    ]


def vectors(tiers: Sequence[TierLoad], max_depth: int) -> Iterator[tuple[int, ...]]:
    """Every vector of depths; a tier that is empty or never drafted for has one depth."""
    yield from product(
        *[range(1, 2 if t.decodes == 0 or t.acceptance is None else max_depth + 1) for t in tiers]
    )


def paces(tiers: Sequence[TierLoad], depths: Sequence[int], theta: float) -> list[float]:
    return [
        allowed_s(t.tpot_s, expected_tokens(s, t.acceptance or 0.0), theta)
        for t, s in zip(tiers, depths, strict=True)
        if t.decodes > 0
    ]


def prefill_rate(
    cost: StepCost, tiers: Sequence[TierLoad], depths: Sequence[int], batch_s: float, theta: float, cap: int
) -> float:
    """Tokens per second left for prompts by batches of `batch_s`, written out once more."""
    context = sum(t.context_tokens for t in tiers if t.decodes)
    room = cost.tokens_in(
        batch_s, seqs=sum(t.decodes for t in tiers), context_tokens=context, draft_steps=max(depths) - 1
    )
    verified = 0.0
    for t, s in zip(tiers, depths, strict=True):
        a = t.acceptance or 0.0
        share = batch_s / (t.tpot_s * max(1.0, theta * sum(a**j for j in range(s))))
        verified += t.decodes * s * share
    return (min(room, cap) - verified) / batch_s


def searched_prefill(
    cost: StepCost, tiers: Sequence[TierLoad], theta: float, max_depth: int, cap: int
) -> float:
    """The best over every vector of depths and every batch time that any tier at any depth asks for."""
    busy = [t for t in tiers if t.decodes > 0]
    context = sum(t.context_tokens for t in busy)
    seqs = sum(t.decodes for t in busy)
    times = {p for s in range(1, max_depth + 1) for p in paces(busy, [s] * len(busy), theta)}
    full = {
        cost.predict(cap, seqs=seqs, context_tokens=context, draft_steps=drafts) for drafts in range(max_depth)
    }
    best = -math.inf
    for depths in vectors(busy, max_depth):
        longest = min(paces(busy, depths, theta))
        for batch_s in times | full:
            if batch_s <= longest:
                best = max(best, prefill_rate(cost, busy, depths, batch_s, theta, cap))
    return best


def batch_time(
    cost: StepCost, tiers: Sequence[TierLoad], depths: Sequence[int], per_output: float, step_s: float = 0.0
) -> tuple[float, float, float]:
    """Seconds, output and tokens of a batch that all decodes are in."""
    output = sum(
        t.decodes * expected_tokens(s, t.acceptance or 0.0) for t, s in zip(tiers, depths, strict=True)
    )
    tokens = sum(t.decodes * s for t, s in zip(tiers, depths, strict=True)) + per_output * output
    seconds = cost.predict(
        tokens,  # type: ignore[arg-type]  # an average
        seqs=sum(t.decodes for t in tiers),
        context_tokens=sum(t.context_tokens for t in tiers if t.decodes),
        draft_steps=max(depths) - 1,
    )
    return seconds + step_s * (max(depths) - 1), output, tokens


def searched_output(
    cost: StepCost, tiers: Sequence[TierLoad], theta: float, max_depth: int, per_output: float, cap: int
) -> tuple[bool, float]:
    """Whether any vector keeps every pace, and the best output per second (or, if none does, pace margin)."""
    kept, margins = [], []
    plain = batch_time(cost, tiers, [1] * len(tiers), per_output)[2]
    for depths in vectors(tiers, max_depth):
        seconds, output, tokens = batch_time(cost, tiers, depths, per_output)
        if tokens > max(cap, plain):
            continue
        due = [
            t.tpot_s * expected_tokens(s, t.acceptance or 0.0)
            for t, s in zip(tiers, depths, strict=True)
            if t.decodes
        ]
        margins.append(min(due) / seconds)
        if seconds <= min(paces(tiers, depths, theta)):
            kept.append(output / seconds)
    return bool(kept), max(kept, default=max(margins))


def check_prefill(cost: StepCost, tiers: Sequence[TierLoad], theta: float, max_depth: int, cap: int) -> Depths:
    chosen = choose_depths(cost, tiers, max_batch_tokens=cap, theta=theta, max_depth=max_depth)
    best = searched_prefill(cost, tiers, theta, max_depth, cap)
    assert chosen.prefill_tokens_per_s == pytest.approx(best, rel=1e-9, abs=1e-6)
    itself = prefill_rate(cost, tiers, chosen.depths, chosen.batch_s, theta, cap)
    assert itself == pytest.approx(best, rel=1e-9, abs=1e-6)
    assert chosen.batch_s <= min(paces(tiers, chosen.depths, theta)) * (1 + 1e-12)
    return chosen


def check_output(cost: StepCost, tiers: Sequence[TierLoad], theta: float, max_depth: int, cap: int) -> Depths:
    chosen = choose_depths(
        cost,
        tiers,
        max_batch_tokens=cap,
        theta=theta,
        max_depth=max_depth,
        kv_bound=True,
        prefill_per_output=PROMPT_PER_OUTPUT,
    )
    keeps, best = searched_output(cost, tiers, theta, max_depth, PROMPT_PER_OUTPUT, cap)
    seconds, output, _ = batch_time(cost, tiers, chosen.depths, PROMPT_PER_OUTPUT)
    assert chosen.keeps_pace == keeps
    assert chosen.batch_s == pytest.approx(seconds)
    if keeps:
        assert chosen.output_tokens_per_s == pytest.approx(best)
        assert output / seconds == pytest.approx(best)
    else:
        due = [
            t.tpot_s * expected_tokens(s, t.acceptance or 0.0)
            for t, s in zip(tiers, chosen.depths, strict=True)
            if t.decodes
        ]
        assert min(due) / seconds == pytest.approx(best)
    return chosen


@given(a=st.floats(0.0, 1.0), depth=st.integers(1, MAX_DEPTH))
def test_expected_tokens_is_the_mean_of_what_a_verify_gives(a: float, depth: int) -> None:
    chances = [a ** (k - 1) * (1 - a) for k in range(1, depth)] + [a ** (depth - 1)]
    assert sum(chances) == pytest.approx(1.0)
    assert expected_tokens(depth, a) == pytest.approx(sum(k * p for k, p in enumerate(chances, 1)))
    assert 1.0 <= expected_tokens(depth, a) <= depth
    if a < 0.999:
        assert expected_tokens(depth, a) == pytest.approx((1 - a**depth) / (1 - a))


def test_expected_tokens_at_the_ends() -> None:
    assert [expected_tokens(s, 0.0) for s in (1, 4)] == [1.0, 1.0]
    assert [expected_tokens(s, 1.0) for s in (1, 4)] == [1.0, 4.0]
    for depth, a in ((0, 0.5), (2, 1.5), (2, math.nan)):
        with pytest.raises(ValueError, match="no verify"):
            expected_tokens(depth, a)


@pytest.mark.parametrize("seed", range(20))
def test_no_search_over_depths_and_batch_times_leaves_more_for_prompts(seed: int) -> None:
    rng = random.Random(seed)
    for tiers in (1, 2, 3) * 4:
        cost, case = random_case(rng, tiers)
        check_prefill(cost, case, rng.choice([0.6, 0.7, 1.0]), 4 if tiers == 3 else 6, rng.choice([256, 2048]))


@pytest.mark.parametrize("seed", range(20))
def test_no_search_over_depths_makes_more_output_where_memory_binds(seed: int) -> None:
    rng = random.Random(seed)
    for tiers in (1, 2, 3) * 4:
        cost, case = random_case(rng, tiers)
        check_output(cost, case, rng.choice([0.6, 0.7, 1.0]), 4 if tiers == 3 else 6, rng.choice([512, 4096]))


@settings(max_examples=100, deadline=None)
@given(cost=costs, tiers=st.lists(loads, min_size=1, max_size=3), theta=st.floats(0.3, 1.0))
def test_both_regimes_agree_with_the_search_on_any_case(
    cost: StepCost, tiers: list[TierLoad], theta: float
) -> None:
    if any(tier.decodes for tier in tiers):
        check_prefill(cost, tiers, theta, 4, 2048)
        check_output(cost, tiers, theta, 4, 2048)


@settings(max_examples=100, deadline=None)
@given(
    cost=costs,
    tiers=st.lists(loads.filter(lambda t: t.decodes > 0), min_size=1, max_size=3),
    theta=st.floats(0.3, 1.0),
    part=st.floats(0.02, 1.0),
)
def test_no_shorter_batch_is_better_but_for_the_fraction_of_a_token(
    cost: StepCost, tiers: list[TierLoad], theta: float, part: float
) -> None:
    chosen = choose_depths(cost, tiers, max_batch_tokens=2048, theta=theta, max_depth=4)
    for depths in vectors(tiers, 4):
        batch_s = part * min(paces(tiers, depths, theta))
        rate = prefill_rate(cost, tiers, depths, batch_s, theta, 2048)
        rounding = 1 / chosen.batch_s  # the longest batch loses up to one token to rounding down
        assert rate <= chosen.prefill_tokens_per_s + rounding * (1 + 1e-9)


@given(cost=costs, tiers=st.lists(loads, min_size=1, max_size=4), theta=st.floats(0.3, 1.0))
def test_speculation_is_never_worse_than_none(cost: StepCost, tiers: list[TierLoad], theta: float) -> None:
    for kv_bound in (False, True):
        chosen, plain = (
            choose_depths(
                cost, tiers, max_batch_tokens=2048, theta=theta, max_depth=depth, kv_bound=kv_bound,
                prefill_per_output=PROMPT_PER_OUTPUT,
            )
            for depth in (6, 1)
        )  # fmt: skip
        assert set(plain.depths) == {1}
        if not kv_bound:
            assert chosen.prefill_tokens_per_s >= plain.prefill_tokens_per_s - 1e-6
        elif plain.keeps_pace:
            assert chosen.keeps_pace
            assert chosen.output_tokens_per_s >= plain.output_tokens_per_s * (1 - 1e-9)


def test_stretched_batches_starve_a_memory_bound_replica() -> None:
    """Paper profile, ChatBot: the paper's objective and the corrected one choose apart."""
    stretched = choose_depths(PAPER, [CHATBOT], max_batch_tokens=BATCH_TOKENS, theta=1.0)
    full = choose_depths(
        PAPER,
        [CHATBOT],
        max_batch_tokens=BATCH_TOKENS,
        kv_bound=True,
        prefill_per_output=PROMPT_PER_OUTPUT,
    )
    assert stretched.depths == (2,)
    assert full.depths == (5,)
    assert stretched.output_tokens_per_s / 266 == pytest.approx(1.68, rel=0.02)  # requests per second
    assert full.output_tokens_per_s / 266 == pytest.approx(7.21, rel=0.02)


@pytest.mark.parametrize("kv_bound", [False, True])
def test_dear_drafts_are_not_made(kv_bound: bool) -> None:
    tiers = [TierLoad(0.05, 0.9, 20), TierLoad(0.1, 0.7, 20)]
    dear = StepCost((Piece(24.8e-3, 6.9e-5, 0.2),))
    line = StepCost.line(24.8e-3, 6.9e-5)

    def depths(cost: StepCost, draft_step_s: float) -> tuple[int, ...]:
        return choose_depths(
            cost, tiers, max_batch_tokens=BATCH_TOKENS, kv_bound=kv_bound, draft_step_s=draft_step_s
        ).depths

    assert max(depths(line, 0.0)) > 1
    assert depths(dear, 0.0) == (1, 1)
    assert depths(line, 0.2) == (1, 1)


@pytest.mark.parametrize("kv_bound", [False, True])
@pytest.mark.parametrize("acceptance", [None, 0.0])
def test_drafts_that_are_never_right_are_not_made(kv_bound: bool, acceptance: float | None) -> None:
    tiers = [TierLoad(0.05, acceptance, 20), TierLoad(0.1, acceptance, 20)]
    chosen = choose_depths(PAPER, tiers, max_batch_tokens=BATCH_TOKENS, kv_bound=kv_bound)
    assert chosen.depths == (1, 1)


def test_a_tight_tier_drafts_so_that_loose_ones_get_long_batches() -> None:
    tiers = [TierLoad(0.05, 0.7, 5), TierLoad(0.1, 0.7, 40)]
    chosen = choose_depths(PAPER, tiers, max_batch_tokens=BATCH_TOKENS)
    tight, loose = chosen.depths
    assert tight > 1 == loose
    assert chosen.batch_s > 0.05


def test_a_tier_that_cannot_keep_up_with_long_batches_bounds_them() -> None:
    tiers = [TierLoad(0.05, None, 5), TierLoad(0.1, 1.0, 40)]
    chosen = choose_depths(PAPER, tiers, max_batch_tokens=BATCH_TOKENS)
    assert chosen.depths == (1, 1)
    assert chosen.batch_s == pytest.approx(0.05)


def test_empty_tiers_neither_bind_nor_draft() -> None:
    busy = TierLoad(0.1, 0.7, 40)
    alone = choose_depths(PAPER, [busy], max_batch_tokens=BATCH_TOKENS)
    beside = choose_depths(PAPER, [TierLoad(0.02, 0.7, 0), busy], max_batch_tokens=BATCH_TOKENS)
    assert beside.depths == (1, *alone.depths)
    assert beside.batch_s == alone.batch_s
    for kv_bound in (False, True):
        idle = choose_depths(PAPER, [TierLoad(0.02, 0.7, 0)], max_batch_tokens=512, kv_bound=kv_bound)
        assert idle.depths == (1,)
        assert idle.batch_s == pytest.approx(PAPER.predict(512))


def test_decodes_that_cannot_keep_their_pace_are_reported() -> None:
    hopeless = [TierLoad(0.03, 0.1, 500)]
    for kv_bound in (False, True):
        chosen = choose_depths(PAPER, hopeless, max_batch_tokens=BATCH_TOKENS, kv_bound=kv_bound)
        assert not chosen.keeps_pace
    assert choose_depths(PAPER, hopeless, max_batch_tokens=BATCH_TOKENS).prefill_tokens_per_s < 0


def test_many_tiers_take_bounded_work() -> None:
    tiers = [TierLoad(0.05 + 0.01 * index, 0.7, 5) for index in range(14)]
    chosen = choose_depths(PAPER, tiers, max_batch_tokens=BATCH_TOKENS, kv_bound=True)
    assert len(chosen.depths) == 14
    assert chosen.keeps_pace


def test_senseless_arguments_are_refused() -> None:
    for wrong in ({"theta": 0.0}, {"theta": 1.1}, {"max_depth": 0}, {"max_depth": 11}, {"draft_step_s": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            choose_depths(PAPER, [CHATBOT], max_batch_tokens=BATCH_TOKENS, **wrong)
    tier: tuple[float, float, int]
    for tier in ((0.0, 0.7, 1), (0.1, 1.5, 1), (0.1, 0.7, -1), (math.nan, 0.7, 1)):
        with pytest.raises(ValueError, match=r"tier|acceptance"):
            TierLoad(*tier)


def kept_strictly(depth: int, a: float, tokens: int, theta: float, slack: float) -> float:
    """Share of seeded walks in which no batch ends after the due time of the first token it makes."""
    draws = np.random.default_rng(7).random((4000, tokens))
    made = np.minimum(1 + np.floor(np.log(draws) / np.log(a)), depth)
    before = np.cumsum(made, axis=1) - made
    ends = np.arange(1, tokens + 1) * theta * expected_tokens(depth, a)
    late = (ends > before + 1 + slack + 1e-9) & (before < tokens)
    return 1 - float(late.any(axis=1).mean())


@pytest.mark.parametrize(("depth", "a"), [(2, 0.7), (4, 0.7), (8, 0.9), (3, 0.3)])
@pytest.mark.parametrize("slack", [0.0, 4.0, 25.0])
def test_theta_keeps_the_share_asked_for_on_every_token(depth: int, a: float, slack: float) -> None:
    for share in (0.9, 0.99):
        theta = theta_for(depth, a, 266, slack, share, grace_tokens=0.0)
        assert kept_strictly(depth, a, 266, theta, slack) >= share - 0.01


def test_without_theta_requests_walk_into_lateness() -> None:
    assert kept_strictly(4, 0.7, 266, 1.0, slack=4.0) < 0.4


@given(
    depth=st.integers(1, MAX_DEPTH),
    a=st.floats(0.0, 1.0),
    remaining=st.integers(1, 3000),
    slack=st.floats(-20.0, 200.0),
    more=st.floats(0.0, 50.0),
)
def test_theta_rises_with_slack_and_stays_in_range(
    depth: int, a: float, remaining: int, slack: float, more: float
) -> None:
    theta = theta_for(depth, a, remaining, slack)
    assert 1 / expected_tokens(depth, a) - 1e-12 <= theta <= 1.0
    assert theta <= theta_for(depth, a, remaining, slack + more) + 1e-12
    assert theta >= theta_for(depth, a, remaining, slack, share=0.99) - 1e-12


def test_theta_is_one_where_luck_plays_no_part() -> None:
    assert theta_for(1, 0.7, 266, -5.0) == 1.0  # plain decoding
    assert theta_for(4, 0.7, 0, 0.0) == 1.0  # nothing left
    assert theta_for(4, 0.7, 266, 500.0) == 1.0  # more slack than tokens
    with pytest.raises(ValueError, match="share"):
        theta_for(4, 0.7, 266, 0.0, share=1.0)


def observe(
    estimate: AcceptanceEstimate, chances: Sequence[float], depth: int, seed: int
) -> AcceptanceEstimate:
    """Verifies of `depth`, one for each chance that a draft token is right."""
    rng = random.Random(seed)
    for chance in chances:
        accepted = 0
        while accepted < depth - 1 and rng.random() < chance:
            accepted += 1
        estimate = estimate.verified(depth - 1, accepted)
    return estimate


@pytest.mark.parametrize("chance", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("depth", [2, 6])
def test_the_estimate_finds_the_chance_of_one_token_at_any_depth(chance: float, depth: int) -> None:
    """The share of drafted tokens that were accepted would be far lower at depth 6."""
    seen = observe(AcceptanceEstimate(), [chance] * 4000, depth, seed=1)
    assert seen.acceptance == pytest.approx(chance, abs=0.04)


def test_the_estimate_of_a_class_helps_a_new_request() -> None:
    of_class = observe(AcceptanceEstimate(), [0.2] * 500, 4, seed=2)
    informed, uninformed = of_class.for_request(), AcceptanceEstimate().for_request()
    assert informed.acceptance == pytest.approx(of_class.acceptance)
    errors = [abs(observe(e, [0.2] * 4, 4, seed=3).acceptance - 0.2) for e in (informed, uninformed)]
    assert errors[0] < errors[1] / 2


def test_the_estimate_follows_a_request_that_changes() -> None:
    request = observe(AcceptanceEstimate().for_request(), [0.9] * 300 + [0.1] * 150, 4, seed=4)
    assert request.acceptance < 0.3


def test_a_request_that_accepts_little_gets_no_drafts_and_is_tried_again() -> None:
    tier = TierLoad(0.1, 0.7, 45, 40_000)
    for kv_bound in (False, True):
        chosen = choose_depths(
            PAPER,
            [tier],
            max_batch_tokens=BATCH_TOKENS,
            kv_bound=kv_bound,
            prefill_per_output=PROMPT_PER_OUTPUT,
        )
        depth, price = chosen.depths[0], chosen.token_prices[0]
        assert depth > 1
        assert depth_for_request(depth, 0.7, price) == depth
        poor = observe(AcceptanceEstimate().for_request(), [0.0] * 40, depth, seed=5)
        assert depth_for_request(depth, poor.acceptance, price) == 1
        for _ in range(300):
            poor = poor.verified(0, 0)
        assert depth_for_request(depth, poor.acceptance, price) > 1


@given(depth=st.integers(1, MAX_DEPTH), a=st.floats(0.0, 1.0), price=st.floats(0.0, 1.0))
def test_the_depth_of_a_request_is_the_deepest_that_pays(depth: int, a: float, price: float) -> None:
    taken = depth_for_request(depth, a, price)
    assert 1 <= taken <= depth
    chances = [a**drafts for drafts in range(1, depth)]
    assert all(chance >= price * (1 - 1e-9) for chance in chances[: taken - 1])
    if taken < depth and chances[taken - 1] > 0:
        assert chances[taken - 1] < price * (1 + 1e-9)


def test_the_price_of_a_token_is_where_output_per_second_falls() -> None:
    """One request less deep or deeper than its price says makes the batch's output per second no better."""
    crowd = TierLoad(0.1, 0.7, 200, 0)
    chosen = choose_depths(
        PAPER, [crowd], max_batch_tokens=8192, kv_bound=True, prefill_per_output=PROMPT_PER_OUTPUT
    )
    crowd_s, output, tokens = batch_time(PAPER, [crowd], chosen.depths, PROMPT_PER_OUTPUT)
    assert crowd_s == pytest.approx(chosen.batch_s)
    for a in (0.1, 0.4, 0.6):
        rates = []
        for depth in range(1, chosen.depths[0] + 1):
            more = expected_tokens(depth, a)
            held = tokens + depth + PROMPT_PER_OUTPUT * more
            seconds = PAPER.predict(held, draft_steps=chosen.depths[0] - 1)  # type: ignore[arg-type]
            rates.append((output + more) / seconds)
        best = depth_for_request(chosen.depths[0], a, chosen.token_prices[0])
        assert rates[best - 1] == pytest.approx(max(rates), rel=1e-5)


def test_an_estimate_cannot_see_more_than_was_drafted() -> None:
    for drafted, accepted in ((2, 3), (2, -1)):
        with pytest.raises(ValueError, match="cannot accept"):
            AcceptanceEstimate().verified(drafted, accepted)
