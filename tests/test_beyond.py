"""What goes beyond the original, against plain versions that share no line with it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from landmark.parts.descriptors.store import l2n
from landmark.parts.nets.losses import MarginHead, frequency_margins, make_head
from landmark.parts.rerank.beyond import k_reciprocal_distances, superglobal_scores
from landmark.parts.rerank.local_first import embed
from landmark.parts.rerank.methods import METHODS, Problem, first_self, rank
from landmark.parts.rerank.voting import minus_non_landmarks, recognise
from landmark.parts.search.knn import search


def clusters(n, seed, d=12, noise=0.8):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(2, n // 9), d))
    return l2n(centres[rng.integers(0, len(centres), n)] + noise * rng.normal(size=(n, d)))


def dense_k_reciprocal(x, k1, k2, weight):
    "All against all, as the published code does it: one matrix of every image's vector."
    d = 2 - 2 * x.astype(np.float64) @ x.T
    np.fill_diagonal(d, -1)
    order = np.argsort(d, 1, kind="stable")
    np.fill_diagonal(d, 0)

    def mutual(k):
        near = np.zeros(d.shape, bool)
        np.put_along_axis(near, order[:, : k + 1], True, 1)
        return near & near.T

    whole, half = mutual(k1), mutual(int(np.around(k1 / 2)))
    grows = (whole[:, None] & half[None]).sum(2) > 2 / 3 * half.sum(1)[
        None
    ] + 1e-9  # [i, j]: most of j's half set lies in i's
    star = whole | ((whole & grows).astype(int) @ half > 0)
    V = np.where(star, np.exp(-d), 0)
    V /= V.sum(1, keepdims=True)
    V = np.stack([V[row[:k2]].mean(0) for row in order])
    jaccard = 1 - np.minimum(V[:, None], V[None]).sum(2) / np.maximum(V[:, None], V[None]).sum(2)
    return (1 - weight) * jaccard + weight * d


@pytest.mark.parametrize("seed", range(6))
def test_k_reciprocal_like_dense_matrices(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(30, 70))
    x = clusters(n, seed)
    k1, k2, weight = int(rng.integers(1, 21)), int(rng.integers(1, 8)), float(rng.random())
    k2 = min(k2, k1 + 1)
    idxs = first_self(search(x, x, k1 + 1, "cpu")[1])
    query = rng.integers(0, n, 5)
    listed = np.stack([rng.permutation(n)[:12] for _ in query])
    want = dense_k_reciprocal(x, k1, k2, weight)[query[:, None], listed]
    np.testing.assert_allclose(
        k_reciprocal_distances(x, idxs, query, listed, k1, k2, weight), want, atol=2e-6
    )


def test_k_reciprocal_as_a_method():
    "The order of the retrieved images is that of the dense distances."
    x = clusters(60, 3)
    n, topk = 6, 20
    ranks = rank(Problem(x[:n], x[n:]), "k_reciprocal", topk)
    d, listed = (
        dense_k_reciprocal(x, 20, 6, 0.3)[:n, n:],
        np.argsort(-(x[:n] @ x[n:].T), 1, kind="stable")[:, :topk],
    )
    for row, near, ours in zip(d, listed, ranks):
        assert set(ours) == set(near) and (np.diff(row[ours]) > -1e-6).all()


def test_k_reciprocal_looks_at_a_few_queries_at_a_time():
    "The listed descriptors of all queries would be 146 MiB here, and 144 GB on Google Landmarks."
    import tracemalloc

    x, rng = clusters(2000, 1)[:, :4], np.random.default_rng(0)
    n, q = len(x), 1500
    x = np.ascontiguousarray(np.tile(x, 64), np.float32)
    idxs, listed = np.c_[np.arange(n), rng.integers(0, n, (n, 10))], rng.integers(0, n, (q, 100))
    k_reciprocal_distances(x[:30], idxs[:30] % 30, np.arange(5), listed[:5] % 30, 5, 3, 0.3)  # compiled
    tracemalloc.start()
    k_reciprocal_distances(x, idxs, np.arange(q), listed, 5, 3, 0.3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * 2**20


def torch_superglobal(q, x, k, beta):
    "One query: refined descriptors of the retrieved, the query's largest values, the mean of both scores."
    q, x = torch.as_tensor(q, dtype=torch.float64), torch.as_tensor(x, dtype=torch.float64)
    k = min(k, len(x) - 1)
    sims = (x @ x.T).fill_diagonal_(-torch.inf)
    near = sims.topk(k).indices if k else torch.zeros(len(x), 0, dtype=torch.long)
    refined = (x + beta * x[near].sum(1)) / (1 + beta * k)
    expanded = torch.cat([q[None], x[: max(k, 1)]]).amax(0)
    return ((refined @ q + x @ expanded) / 2).numpy()


@pytest.mark.parametrize("m, k", [(1, 9), (2, 9), (10, 9), (40, 9), (40, 0), (40, 3)])
def test_superglobal_like_torch(m, k):
    x = clusters(60, m)
    q = x[:4]
    near = x[4:][np.argsort(-(q @ x[4:].T), 1)[:, :m]]
    want = [torch_superglobal(a, b, k, 0.15) for a, b in zip(q, near)]
    np.testing.assert_allclose(superglobal_scores(q, near, k, 0.15), want, atol=1e-5)


def test_superglobal_as_a_method():
    "Batches change nothing, and only the first m images are reordered."
    x = clusters(80, 1)

    def p():
        return Problem(x[:10], x[10:])

    a, b = (rank(p(), "superglobal", 70, m_superglobal=15, batch=n) for n in (3, 64))
    a15 = METHODS["superglobal"].fn(p(), 70, 15, 9, 0.15, 3)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, a15)
    plain = rank(p(), "baseline", 70)
    np.testing.assert_array_equal(a[:, 15:], plain[:, 15:])
    for row, near, q in zip(a, plain, x[:10]):
        s = torch_superglobal(q, x[10:][near[:15]], 9, 0.15)
        np.testing.assert_array_equal(row[:15], near[:15][np.argsort(-s.round(9), kind="stable")])


# verified inliers


def drawn_counts(n, seed):
    "Symmetric counts of n images, most of them chance; and a function that looks them up."
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 8, (n, n)) + rng.integers(8, 90, (n, n)) * (rng.random((n, n)) < 0.15)
    table = np.triu(table, 1) + np.triu(table, 1).T
    asked = []

    def counts(a, b, pairs):
        asked.extend(map(tuple, pairs.tolist()) if a == b else ())
        return table[pairs[:, 0] + (a == "queries") * (n - 10), pairs[:, 1]]

    return table, counts, asked


@pytest.mark.parametrize("m", [1, 15, 40])
def test_geometric_verification_word_by_word(m):
    x = clusters(50, 1)
    table, counts, _ = drawn_counts(50, m)
    q, index = x[40:], x[:40]
    ours = rank(Problem(q, index, counts=counts), "geometric", 40, m_verify=m)
    for i, row in enumerate(ours):
        near = sorted(range(40), key=lambda j: -float(q[i] @ index[j]))
        assert row.tolist() == sorted(near[:m], key=lambda j: -table[40 + i, j]) + near[m:]


@pytest.mark.parametrize("m, d", [(1, 8), (15, 2), (40, 8)])
def test_local_first_word_by_word(m, d):
    "Power iteration finds the embedding, everything else is loops; every pair is asked for once."
    x, k = clusters(50, 2), 6
    table, counts, asked = drawn_counts(50, 10 + m)
    q, index = x[40:], x[:40]
    ours = rank(Problem(q, index, counts=counts), "local_first", 40, m_verify=m, k_partners=k, d_counts=d)
    assert len(asked) == len(set(asked)) and all(i < j for i, j in asked)

    def similar(n):
        return n / (n + 20) if n >= 8 else 0.0

    partners = [set(sorted(range(40), key=lambda j: -float(index[i] @ index[j]))[: k + 1]) for i in range(40)]
    for i, row in enumerate(ours):
        near = sorted(range(40), key=lambda j: -float(q[i] @ index[j]))
        short, S = near[:m], np.eye(m + 1)
        for a, j in enumerate(short):
            S[0, a + 1] = S[a + 1, 0] = similar(table[40 + i, j])
            for b, other in enumerate(short):
                if a != b and (other in partners[j] or j in partners[other]):
                    S[a + 1, b + 1] = similar(table[j, other])
        points, rest = [], S + 50 * np.eye(m + 1)  # all eigenvalues above zero: the largest come first
        for _ in range(min(d, m + 1)):
            v = np.random.default_rng(0).normal(size=m + 1)
            for _ in range(20000):
                v = rest @ v
                v /= np.linalg.norm(v)
            value = v @ rest @ v
            rest = rest - value * np.outer(v, v)
            if value - 50 > 1 + 1e-6:
                points.append(v * (value - 50) ** 0.5)
        points = np.array(points).reshape(-1, m + 1).T
        length = np.linalg.norm(points, axis=1)
        score = [
            S[0, a + 1] + max(0, points[0] @ points[a + 1] / max(length[0] * length[a + 1], 1e-12))
            for a in range(m)
        ]
        got = [score[short.index(j)] for j in row[:m]]
        assert (np.diff(got) < 1e-3).all() and row[m:].tolist() == near[m:]


def test_equal_eigenvalues_stay_together():
    "Two pairs as near as each other: one dimension would have to choose between them."
    sims = np.eye(5)
    for i, j in ((0, 1), (2, 3)):
        sims[i, j] = sims[j, i] = 0.5
    points = embed(sims, 1)
    assert points.shape == (5, 2) and not points[4].any()
    np.testing.assert_allclose(
        points @ points.T, np.kron(np.diag([1, 1, 0]), np.ones((2, 2)))[:5, :5], atol=1e-9
    )


# sub-centre ArcFace with margins from class frequency


@pytest.mark.parametrize("centers", [1, 2, 3, 5])
def test_sub_centre_arcface_by_its_definition(centers):
    "Loss and both gradients, in float64: the nearest centre of a class, its margin as an angle, a softmax."
    gen = torch.Generator().manual_seed(centers)
    counts = torch.randint(1, 500, (7,), generator=gen)
    head = MarginHead(
        6, 7, "arcface", s=20.0, n_centers=centers, margins=frequency_margins(counts).double()
    ).double()
    x, labels = (
        torch.randn(9, 6, generator=gen, dtype=torch.float64, requires_grad=True),
        torch.randint(0, 7, (9,), generator=gen),
    )
    loss, _ = head.loss(x, labels)
    got = torch.autograd.grad(loss, (x, head.weight))
    margins = 0.05 + 0.45 * (counts.double() ** -0.25 - counts.max() ** -0.25) / (
        counts.min() ** -0.25 - counts.max() ** -0.25
    )
    rows = []
    for xi, label in zip(x, labels.tolist()):
        cos = torch.stack(
            [
                F.cosine_similarity(xi[None], head.weight[c * centers : (c + 1) * centers]).max()
                for c in range(7)
            ]
        )
        theta, m = cos[label].arccos(), margins[label]
        hard = theta + m < torch.pi
        target = (theta + m).cos() if hard else cos[label] - m * m.sin()
        z = 20 * torch.cat([cos[:label], target[None], cos[label + 1 :]])
        rows.append(z.logsumexp(0) - z[label])
    want = torch.stack(rows).mean()
    plain = torch.autograd.grad(want, (x, head.weight))
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    for a, b in zip(got, plain):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_margins_by_class_frequency():
    m = frequency_margins(torch.tensor([1, 16, 81, 10000]))
    torch.testing.assert_close(
        m, torch.tensor([0.5, 0.05 + 0.45 * (1 / 2 - 0.1) / 0.9, 0.05 + 0.45 * (1 / 3 - 0.1) / 0.9, 0.05])
    )
    assert (frequency_margins(torch.tensor([7, 7])) == 0.275).all()  # equal classes, equal margins
    assert (frequency_margins(torch.tensor([0, 5])).isfinite()).all()  # a class without images
    head = make_head("subcenter_arcface", 6, torch.tensor([1, 16, 81]))
    assert (
        head.n_centers == 3
        and head.margins.tolist() == frequency_margins(torch.tensor([1, 16, 81])).tolist()
        and head.kind == "arcface"
    )


# similarity to images without landmark


def test_subtracting_non_landmarks_by_loops():
    rng = np.random.default_rng(0)
    q, train, non, labels = clusters(8, 1), clusters(25, 2), clusters(10, 3), rng.integers(0, 6, 25)
    sims, idxs = search(q, train, 4, "cpu")

    def top(v):
        return np.sort(non @ v)[::-1][:3].mean()

    adjusted, order = minus_non_landmarks(
        sims, idxs, search(q, non, 3, "cpu")[0], search(train, non, 3, "cpu")[0]
    )
    names, scores = recognise(adjusted, labels[order], vote="similarity")
    for i in range(len(q)):
        pairs = sorted(((q[i] @ train[j] - top(q[i]) - top(train[j]), j) for j in idxs[i]), reverse=True)
        np.testing.assert_allclose(adjusted[i], [v for v, _ in pairs], atol=1e-5)
        assert order[i].tolist() == [j for _, j in pairs]
        votes = {}
        for v, j in pairs[:3]:
            votes[labels[j]] = votes.get(labels[j], 0) + v
        assert votes[names[i]] == pytest.approx(max(votes.values()), abs=1e-5) and scores[i] == pytest.approx(
            max(votes.values()), abs=1e-5
        )


def test_centres_and_class_margins_of_a_config_reach_the_head(tmp_path, monkeypatch):
    from landmark import train
    from landmark.parts.core import ParameterError

    asked = []
    monkeypatch.setattr(
        train,
        "make_head",
        lambda *args: asked.append(make_head(*args)) or (_ for _ in ()).throw(InterruptedError),
    )
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path))

    def head(**kw):
        with pytest.raises(InterruptedError):
            train.train_model((train.Config(world="tiny", **kw), f"{kw['loss']}_v1", tmp_path, False))
        return asked[-1]

    plain, both = head(loss="arcface"), head(loss="cosface", n_centers=2, class_margins=[0.1, 0.4])
    assert plain.n_centers == 1 and plain.margins is None and plain.m == 0.3
    assert (
        both.kind == "cosface"
        and len(both.weight) == 2 * len(both.margins) == 2 * len(plain.weight)
        and 0.1 <= float(both.margins.min()) <= float(both.margins.max()) <= 0.4 + 1e-6
    )
    for wrong in (
        dict(loss="triplet", n_centers=2),
        dict(class_margins=[0.4, 0.1]),
        dict(margin=0.3, class_margins=[0.1, 0.4]),
    ):
        with pytest.raises(ParameterError, match="^train: `(n_centers|class_margins|margin)` is"):
            train.run(train.Config(world="tiny", **wrong))
