"""Bad input to the algorithms: a named error, or a defined result where the mathematics gives one.

No silent NaN leaves a function."""

import numpy as np
import pytest
import torch

from landmark.parts.descriptors.store import l2n, rows_of
from landmark.parts.descriptors.whitening import learn_pca, learn_whitening
from landmark.parts.metrics import MetricError, accuracy, gap, map_at_k, revisited
from landmark.parts.nets import losses
from landmark.parts.rerank import (
    beyond,  # noqa: F401  the first registers its methods
    local_first,  # noqa: F401  registers what is not the paper's
)
from landmark.parts.rerank.expansion import expand
from landmark.parts.rerank.graph import affinity, diffuse, diffusion_rank, egt, gallery_scores, laplacian
from landmark.parts.rerank.methods import METHODS, Problem, RerankError, rank, soft_vote, sort_insert
from landmark.parts.rerank.voting import (
    RecognitionError,
    choose_limit,
    distractor_rule,
    inliers_of,
    minus_non_landmarks,
    recognise,
)
from landmark.parts.training import recipe

rng = np.random.default_rng(0)
SETS = dict(
    queries=l2n(rng.normal(size=(4, 8))),
    index=l2n(rng.normal(size=(30, 8))),
    train=l2n(rng.normal(size=(20, 8))),
)
LABELS = rng.integers(0, 5, 20)
everyone = pytest.mark.parametrize("name", list(METHODS))


def inliers(a, b, pairs):
    "Counts in the place of local features."
    return pairs.sum(1) * 7 % 31


def problem(labels=LABELS, **changed):
    sets = {**SETS, **changed}
    return Problem(**sets, labels=labels[: len(sets["train"])], counts=inliers)


def spoilt(name, value):
    x = SETS[name].copy()
    x[2] = value
    return {name: x}


# descriptors


@everyone
@pytest.mark.parametrize("which", ["queries", "index", "train"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_descriptor_that_is_not_finite(name, which, value):
    if which == "train" and not METHODS[name].needs_labels:
        assert (rank(problem(**spoilt(which, value)), name, 30) >= 0).all()
        return  # never looks at it
    with pytest.raises(ValueError, match="finite"):
        rank(problem(**spoilt(which, value)), name, 10)


@everyone
@pytest.mark.parametrize("which", ["queries", "index", "train"])
def test_a_descriptor_of_zeros(name, which):
    "It is ranked, as similar to nothing, or refused by name; it never turns others into NaN."
    try:
        ranks = rank(problem(**spoilt(which, 0)), name, 30)
    except ValueError as e:
        assert "zero" in str(e)
    else:
        assert (np.sort(ranks, 1) == np.arange(30)).all()


@everyone
@pytest.mark.parametrize("topk", [1, 7, 30, 45])
def test_any_length_of_list(name, topk):
    "Shorter than the neighbour lists, or longer than the index."
    p = problem()
    for k in (topk, 30, topk):  # lists that were searched before are used again
        ranks = rank(p, name, k)
        assert ranks.shape == (4, k) and ((ranks >= 0).sum(1) == min(k, 30)).all()
        assert all(len(set(r[r >= 0])) == (r >= 0).sum() for r in ranks)


@everyone
def test_sets_that_are_empty(name):
    assert rank(problem(queries=SETS["queries"][:0]), name, 10).shape == (0, 10)
    np.testing.assert_array_equal(rank(problem(index=SETS["index"][:1]), name, 3), [[0, -1, -1]] * 4)
    with pytest.raises(ValueError, match="0 rows"):
        rank(problem(index=SETS["index"][:0]), name, 10)
    if METHODS[name].needs_labels:
        with pytest.raises(RerankError, match="no training images with labels"):
            rank(problem(train=SETS["train"][:0]), name, 10)


def test_sets_that_do_not_belong_together():
    with pytest.raises(RerankError, match="'index': 5"):
        problem(index=SETS["index"][:, :5])
    with pytest.raises(RerankError, match="20 training descriptors but 7 labels"):
        Problem(**SETS, labels=LABELS[:7])
    with pytest.raises(RerankError, match="no method"):
        rank(problem(), "aqee")
    with pytest.raises(ValueError, match="nobody"):
        rows_of(["a", "nobody"], np.array(["a", "b"]))


# neighbours and labels

NONE = np.full((3, 4), -1)


def test_queries_without_neighbours():
    x, empty = SETS["index"], np.zeros((3, 4))
    np.testing.assert_allclose(expand(x[:3], x, empty, NONE), x[:3], atol=1e-6)
    np.testing.assert_array_equal(
        egt(empty, NONE, np.zeros((30, 4)), np.full((30, 4), -1), length=5), np.full((3, 5), -1)
    )
    assert affinity(empty, NONE).nnz == 0
    np.testing.assert_array_equal(
        gallery_scores(empty, NONE, np.ones((30, 2)), np.zeros((30, 2), int)), np.zeros((3, 30))
    )
    np.testing.assert_array_equal(
        sort_insert(NONE, [1, 2, 9], [0.5] * 3, np.array([1, 2]), np.array([0.5, 0.2]), topk=2),
        [[0, -1], [1, -1], [-1, -1]],
    )
    values, missed = diffuse(
        laplacian(affinity(np.ones((3, 1)), np.arange(3)[:, None])), np.c_[np.arange(3), NONE[:, :2]]
    )
    np.testing.assert_array_equal(values, [[1, 0, 0]] * 3)
    assert missed == 0
    assert (diffusion_rank(values, np.c_[np.arange(3), NONE[:, :2]], 1, 2)[1] == -1).all()
    for vote in (soft_vote, recognise):
        with pytest.raises(ValueError, match="neighbour"):
            vote(np.zeros((3, 0)), np.zeros((3, 0), int))
    np.testing.assert_array_equal(inliers_of([[5], [-1]], [0], [5], [99]), [[99], [0]])


def test_labels_absent_from_training():
    "A query's label that no index image has changes nothing; a truth that nobody learned counts as missed."
    np.testing.assert_array_equal(
        sort_insert([[1, 0]], [99], [0.9], np.array([1, 2]), np.array([0.5, 0.5]), topk=2), [[1, 0]]
    )
    np.testing.assert_array_equal(
        sort_insert(np.zeros((1, 0), int), [99], [0.9], np.array([], int), np.array([]), topk=2), [[-1, -1]]
    )
    assert gap([4, 5], [0.9, 0.8], [[4], [77]]) == 0.5
    assert map_at_k([[0, 1]], [[-2, -3]]) == 0
    for loss in losses.LOSSES:
        head = losses.make_head(loss, 8, torch.ones(5))
        x = torch.randn(4, 8)
        if isinstance(head, losses.MetricHead):
            continue  # they know no classes
        with pytest.raises(ValueError, match="classes 0 to 4"):
            head.loss(x, torch.tensor([0, 1, 2, 9]))
        with pytest.raises(ValueError, match="classes 0 to 4"):
            head.loss(x, torch.tensor([0, -1, 2, 3]))


def test_neighbours_that_are_not_there():
    x, sims = SETS["index"], np.zeros((2, 3))
    far = np.full((2, 3), 30)
    for call in (
        lambda: expand(x[:2], x, sims, far),
        lambda: egt(sims, far, np.zeros((30, 3)), np.zeros((30, 3), int)),
        lambda: affinity(sims, far),
        lambda: gallery_scores(sims, far, np.ones((30, 1)), np.zeros((30, 1), int)),
        lambda: sort_insert(far, [1, 1], [1, 1], np.zeros(30), np.zeros(30)),
        lambda: learn_whitening(x, [0], [30]),
    ):
        with pytest.raises(ValueError, match="30"):
            call()
    with pytest.raises(RecognitionError, match="not there"):
        inliers_of([[1]], [3], [1], [9])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite(bad):
    one = np.array([[bad, 0.5]])
    for call in (
        lambda: soft_vote(one, [[1, 2]]),
        lambda: recognise(one, [[1, 2]]),
        lambda: recognise([[0.5]], [[1]], [[bad]]),
        lambda: expand(SETS["index"][:1], SETS["index"], one, [[0, 1]]),
        lambda: affinity(one, [[0, 0]]),
        lambda: egt(one, [[0, 1]], np.zeros((2, 1)), np.zeros((2, 1), int)),
        lambda: gallery_scores(one, [[0, 0]], np.ones((1, 1)), np.zeros((1, 1), int)),
        lambda: sort_insert([[0]], [1], [bad], np.array([1]), np.array([1.0])),
        lambda: sort_insert([[0]], [1], [1.0], np.array([1]), np.array([bad])),
        lambda: distractor_rule([1, 2], [bad, 1]),
        lambda: minus_non_landmarks([[0.5]], [[0]], [[bad]], [[0.5]]),
        lambda: gap([1], [bad], [1]),
        lambda: accuracy([[bad, 1]], [0]),
        lambda: learn_pca(np.where(np.arange(8) == 0, bad, SETS["index"])),
        lambda: l2n(one),
    ):
        with pytest.raises(ValueError, match="finite"):
            call()


def test_no_queries_at_all():
    "The mean over nobody is NaN, said so, and no error."
    assert (
        np.isnan(map_at_k(np.zeros((0, 5)), []))
        and np.isnan(gap([], [], []))
        and np.isnan(revisited(np.zeros((0, 5)), [])["M"]["map"])
    )
    with pytest.raises(MetricError, match="at least one"):
        accuracy(np.zeros((0, 3)), [])
    assert (
        choose_limit([1, 2], [0.1, 0.2], [[1], [2]], [False, False])[0] == 100
    )  # nothing to choose by: the laxest


# losses


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_losses_of_zeros_and_of_one_label(loss):
    "Descriptors without a direction, or a batch without negatives, give a finite loss and finite gradients."
    head = losses.make_head(loss, 8, torch.ones(5))
    tuples = loss in ("contrastive", "tuple_triplet")
    for x, labels in (
        (torch.zeros(4, 8), torch.arange(4)),
        (torch.randn(4, 8), torch.zeros(4, dtype=torch.long)),
        (torch.ones(4, 8), torch.arange(4)),
    ):
        x.requires_grad_()
        value, right = head.loss(x, torch.tensor([-1, 1, 0, 0]) if tuples else labels)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all() and 0 <= int(right) <= 4
    if tuples:
        with pytest.raises(ValueError, match="no tuples"):
            head.loss(torch.randn(4, 8), torch.zeros(4))


def test_a_loss_needs_its_classes():
    with pytest.raises(ValueError, match="at least 3"):
        losses.AdaCos(8, 2)
    with pytest.raises(ValueError, match="allowed are"):
        losses.make_head("archface", 8, torch.ones(5))
    with pytest.raises(ValueError, match="too few for 5 negatives"):
        recipe.mine_tuples(
            torch.tensor([0]),
            torch.tensor([1]),
            torch.arange(4),
            torch.randn(1, 4),
            torch.randn(4, 4),
            torch.tensor([0, 0, 1, 1]),
        )
