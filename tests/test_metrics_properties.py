"""The metrics against slow versions that follow the definitions word by word, on what hypothesis finds."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from landmark.parts.metrics import (
    MetricError,
    ap_at_k,
    gap,
    judge,
    map_at_k,
    map_of_submission,
    relevant_mask,
    revisited,
    trapezoid_ap,
)

ids = st.integers(0, 12)
quick = settings(max_examples=200, deadline=None)


def slow_ap(ranking, relevant, k):
    "Sum over the first k places of precision times relevance there; a repeated image is not relevant again."
    if not relevant:
        return None
    total = 0
    for i in range(1, min(k, len(ranking)) + 1):
        here = ranking[i - 1] in relevant and ranking[i - 1] not in ranking[: i - 1]
        if here:
            total += len(set(ranking[:i]) & relevant) / i
    return total / min(len(relevant), k)


@st.composite
def retrieval(draw):
    n = draw(st.integers(1, 5))
    width = draw(st.integers(0, 9))
    ranks = [draw(st.lists(st.integers(-1, 12), min_size=width, max_size=width)) for _ in range(n)]
    return ranks, [draw(st.sets(ids, max_size=8)) for _ in range(n)], draw(st.integers(1, 10))


@quick
@given(retrieval())
def test_map_at_k(case):
    ranks, relevant, k = case
    mean, aps = map_at_k(np.array(ranks, int).reshape(len(ranks), -1), relevant, k, per_query=True)
    slow = [slow_ap(r, p, k) for r, p in zip(ranks, relevant)]
    assert [None if math.isnan(a) else pytest.approx(a) for a in aps] == slow
    assert [
        None if math.isnan(ap_at_k(r, p, k)) else pytest.approx(ap_at_k(r, p, k))
        for r, p in zip(ranks, relevant)
    ] == slow
    scored = [s for s in slow if s is not None]
    assert math.isnan(mean) if not scored else mean == pytest.approx(sum(scored) / len(scored))


@quick
@given(
    st.dictionaries(ids, st.lists(ids, max_size=9), max_size=4),
    st.dictionaries(ids, st.sets(ids, min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_submission(submitted, truth):
    "A query without an answer counts 0, one that nobody asked for counts nothing."
    slow = [slow_ap(submitted.get(q, []), p, 100) for q, p in truth.items()]
    assert map_of_submission(submitted, truth) == pytest.approx(sum(slow) / len(slow))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 260), st.integers(0, 260), st.sampled_from([1, 99, 100, 101]))
def test_long_lists(seed, length, m, k):
    "More relevant images and longer lists than count, some of them not in the index."
    r = np.random.default_rng(seed)
    ranks, relevant = (
        [r.integers(-1, 300, length).tolist() for _ in range(3)],
        [set(r.integers(-9, 300, m).tolist()) - {-1} for _ in range(3)],
    )
    slow = [slow_ap(a, {p for p in b if p >= 0}, k) for a, b in zip(ranks, relevant)]
    want = [
        None if not b else 0 if s is None else s * min(len([p for p in b if p >= 0]), k) / min(len(b), k)
        for s, b in zip(slow, relevant)
    ]
    aps = map_at_k(np.array(ranks, int).reshape(3, length), [sorted(b) for b in relevant], k, per_query=True)[
        1
    ]
    assert [None if math.isnan(a) else pytest.approx(a) for a in aps] == want


@quick
@given(retrieval(), st.integers(1, 10**13))
def test_ids_or_positions(case, shift):
    "What images are called changes nothing."
    ranks, relevant, k = case
    ranks = np.array(ranks, int).reshape(len(ranks), -1)
    moved = np.where(ranks >= 0, ranks + shift, ranks)
    a, b = (
        map_at_k(x, p, k, per_query=True)[1]
        for x, p in ((ranks, relevant), (moved, [{i + shift for i in p} for p in relevant]))
    )
    np.testing.assert_array_equal(a, b)
    by_id = map_of_submission(
        {f"q{i}": [f"i{x}" for x in row] for i, row in enumerate(ranks.tolist())},
        {f"q{i}": {f"i{x}" for x in p} for i, p in enumerate(relevant)},
        k,
    )
    if (ranks >= 0).all():
        np.testing.assert_allclose(by_id, np.nan if np.isnan(a).all() else np.nanmean(a))


def test_more_than_a_hundred():
    assert map_at_k([list(range(150))], [set(range(150))]) == 1.0
    assert map_at_k([list(range(100, 200))], [set(range(150))]) == pytest.approx(0.5)


def slow_gap(predicted, scores, truth, keys):
    "Sort by score, ties by key, then class; add the precision at right answers; divide by landmark images."
    rows = sorted(
        (r for r in zip(predicted, scores, truth, keys) if not math.isnan(r[1])),
        key=lambda r: (-r[1], r[3], r[0]),
    )
    m, right, total = sum(bool(t) for t in truth), 0, 0
    for i, (p, _, t, _) in enumerate(rows, 1):
        if p >= 0 and p in t:
            right += 1
            total += right / i
    return None if m == 0 else total / m


scores = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(-5, 5))  # many ties


@quick
@given(
    st.lists(st.tuples(st.integers(0, 4), scores, st.sets(st.integers(0, 4), max_size=2)), max_size=12),
    st.randoms(use_true_random=False),
)
def test_gap(rows, random):
    keys = [f"{i:03d}" for i in range(len(rows))]
    random.shuffle(keys)
    predicted, score, truth = [[r[i] for r in rows] for i in range(3)]
    for j in range(len(rows)):
        if random.random() < 0.2:
            predicted[j], score[j] = -1, float("nan")
    got, slow = gap(predicted, score, truth, keys), slow_gap(predicted, score, truth, keys)
    assert math.isnan(got) if slow is None else got == pytest.approx(slow)
    order = list(range(len(rows)))
    random.shuffle(order)  # the order of the rows does not matter
    again = gap(
        [predicted[i] for i in order],
        [score[i] for i in order],
        [truth[i] for i in order],
        [keys[i] for i in order],
    )
    assert math.isnan(again) if slow is None else again == pytest.approx(slow)


def slow_judge(ranking, relevant, junk):
    "Remove junk, then trapezoids of the precision-recall curve one by one; a repeated image is wrong."
    kept = [x for x in ranking if x >= 0 and x not in junk]
    if not relevant:
        return None
    area, found = 0.0, 0
    for i, x in enumerate(kept):
        if x in relevant and x not in kept[:i]:
            before = 1.0 if i == 0 else found / i
            found += 1
            area += (before + found / (i + 1)) / 2 / len(relevant)
    return area


rankings = st.one_of(
    st.permutations(list(range(12))), st.lists(st.integers(-1, 13), max_size=20)
)  # whole, or with duplicates, gaps and strangers


@quick
@given(
    st.lists(
        st.tuples(
            rankings,
            st.integers(0, 20),
            st.dictionaries(st.integers(0, 11), st.sampled_from(["easy", "hard", "junk"]), max_size=12),
        ),
        max_size=4,
    )
)
def test_revisited(queries):
    "All protocols of several queries: truncated, empty, without positives, everything junk."
    gnd = [
        {k: [i for i, v in kinds.items() if v == k] for k in ("easy", "hard", "junk")}
        for _, _, kinds in queries
    ]
    width = max([len(r[:cut]) for r, cut, _ in queries], default=0)
    lists = [(r[:cut] + [-1] * width)[:width] for r, cut, _ in queries]
    got = revisited(np.array(lists, int).reshape(len(queries), width), gnd)
    for p, good, bad in (
        ("E", "easy", ("junk", "hard")),
        ("M", ("easy", "hard"), ("junk",)),
        ("H", ("hard",), ("junk", "easy")),
    ):
        means = []
        for ranking, (_, _, kinds), ours, pk in zip(lists, queries, got[p]["aps"], got[p]["pk"]):
            relevant = {i for i, v in kinds.items() if v in good}
            junk = {i for i, v in kinds.items() if v in bad}
            slow = slow_judge(ranking, relevant, junk)
            assert math.isnan(ours) if slow is None else ours == pytest.approx(slow)
            kept = [x for x in ranking if x >= 0 and x not in junk]
            hits = [i for i, x in enumerate(kept) if x in relevant and x not in kept[:i]]
            for k, value in zip((1, 5, 10), pk):
                if slow is None:
                    assert math.isnan(value)
                    continue
                limit = min(k, hits[-1] + 1) if hits else 0
                assert value == pytest.approx(len([h for h in hits if h < limit]) / limit if limit else 0)
            if slow is not None:
                means.append((slow, *pk))
        if not means:
            assert math.isnan(got[p]["map"]) and np.isnan(got[p]["mpk"]).all()
        else:
            np.testing.assert_allclose([got[p]["map"], *got[p]["mpk"]], np.mean(means, 0), atol=1e-9)


@quick
@given(st.lists(st.integers(0, 30), unique=True, max_size=8), st.integers(0, 10))
def test_trapezoid_bounds(ranks, more):
    n = len(ranks) + more
    ap = trapezoid_ap(sorted(ranks), n)
    assert math.isnan(ap) if n == 0 else 0 <= ap <= 1
    assert trapezoid_ap(range(n), n) == 1 if n else True


def test_a_wrong_metric_would_be_noticed():
    "The slow versions are no echoes: counting duplicates twice, forgetting junk, dividing by k all differ."
    assert slow_ap([1, 1], {1, 2}, 2) == 0.5 and relevant_mask([[1, 1]], [{1, 2}]).sum() == 1
    assert slow_judge([5, 1], {1}, {5}) == 1 != slow_judge([5, 1], {1}, set())
    assert judge([5, 1], [1], [5])[0] == 1


def test_named_errors():
    with pytest.raises(MetricError, match="2 rankings but 1 queries"):
        map_at_k([[1], [2]], [{1}])
    with pytest.raises(MetricError, match="2 rankings but 1 queries"):
        revisited([[1], [2]], [{}])
    with pytest.raises(MetricError, match="1 predictions, 2 scores"):
        gap([1], [1, 2], [1])
    with pytest.raises(MetricError, match="not finite"):
        gap([1], [math.inf], [1])
