"""Exact search: every method returns the list of the definition, with equal similarities by lowest position."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from landmark.parts import knn
from landmark.parts.knn import SearchError, has_faiss, keep_best, search, settle, slow_search, top_of_rows, without_self
from landmark.parts.store import l2n, write_store

METHODS = ['numpy', 'torch', 'torch32'] + (['faiss'] if has_faiss() else [])
rng = np.random.default_rng(0)


def tied(n, d=5): return l2n(rng.integers(-1, 2, (n, d)) + 1e-3)          # few different vectors


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('k', [1, 7, 60])
def test_ties_by_lowest_position(method, k):
    queries, base = tied(15), tied(60)
    sims, idxs = search(queries, base, k, 'cpu', method)
    want = slow_search(queries, base, k)
    np.testing.assert_array_equal(idxs, want[1]); np.testing.assert_allclose(sims, want[0], atol=1e-6)


@pytest.mark.parametrize('method', METHODS)
def test_many_equal_rows(method):
    "A thousand copies, of which the first k count."
    base = np.tile(l2n(rng.normal(size=(1, 8))), (1000, 1))
    _, idxs = search(base[:3], base, 10, 'cpu', method)
    np.testing.assert_array_equal(idxs, np.tile(np.arange(10), (3, 1)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**31), st.sampled_from(METHODS))
def test_any_small_search(q, n, d, seed, method):
    r = np.random.default_rng(seed)
    queries, base = (r.integers(-2, 3, (m, d)).astype(np.float32)/2 for m in (q, n))     # zeros and duplicates included
    k = int(r.integers(1, n+1))
    np.testing.assert_array_equal(search(queries, base, k, 'cpu', method)[1], slow_search(queries, base, k)[1])


@pytest.mark.parametrize('method', METHODS)
def test_blocks_and_passes(method, tmp_path):
    base, queries = l2n(rng.normal(size=(5000, 24))), l2n(rng.normal(size=(900, 24)))
    store = write_store(tmp_path/'s', [str(i) for i in range(5000)], base, {}, 1200)
    want = search(queries, store[:], 40, 'cpu', 'numpy')
    for memory in (1, 64):
        got = search(queries, store, 40, 'cpu', method, memory_mib=memory)
        np.testing.assert_array_equal(got[1], want[1]); np.testing.assert_allclose(got[0], want[0], atol=1e-6)


def test_a_base_on_disk_larger_than_the_limit(tmp_path):
    np.save(tmp_path/'x.npy', l2n(rng.normal(size=(40000, 64))))
    x = np.load(tmp_path/'x.npy', mmap_mode='r')                              # 10 MiB, searched with 4 MiB
    np.testing.assert_array_equal(search(x[:50], x, 5, 'cpu', memory_mib=4)[1], search(np.array(x[:50]), np.array(x), 5, 'cpu')[1])
    assert (search(x[:50], x, 5, 'cpu', memory_mib=4)[1][:, 0] == np.arange(50)).all()


@pytest.mark.parametrize('k', [2048, 5000])
def test_large_k(k):
    base, queries = l2n(rng.normal(size=(6000, 16))), l2n(rng.normal(size=(4, 16)))
    np.testing.assert_array_equal(search(queries, base, k, 'cpu')[1], np.argsort(-(queries.astype('d') @ base.T.astype('d')).astype('f'), 1, kind='stable')[:, :k])


def test_bfloat16_candidates_are_searched_again_where_they_do_not_suffice(monkeypatch):
    base = l2n(rng.normal(size=(1, 32)) + 1e-4*rng.normal(size=(3000, 32)))   # closer together than bfloat16 can tell
    seen = []
    original = knn._torch_candidates
    monkeypatch.setattr(knn, '_torch_candidates', lambda *a: seen.append(a[6]) or original(*a))
    np.testing.assert_array_equal(search(base[:20], base, 5, 'cpu', 'torch')[1], search(base[:20], base, 5, 'cpu', 'numpy')[1])
    assert seen[0] and False in seen                                          # bfloat16 first, then float32


def test_settling_is_needed():
    "Without it the same rows come in another order: float32 products of equal rows differ."
    base = np.repeat(l2n(rng.normal(size=(400, 333))), 3, 0)[rng.permutation(1200)]
    queries = l2n(rng.normal(size=(50, 333)))
    want = search(queries, base, 30, 'cpu')[1]
    sims = queries @ base.T
    plain = np.argsort(-(sims + rng.normal(size=sims.shape)*1e-8), 1, kind='stable')[:, :30]
    assert (plain != want).any()
    exact = np.sort(-(queries.astype('d') @ base.T.astype('d')), 1)
    same = np.diff(want, axis=1)[np.abs(np.diff(exact[:, :30], axis=1)) < 1e-12]
    assert len(same) and (same > 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 9), st.integers(0, 2**31))
def test_top_of_wide_rows(n, k, seed):
    torch = pytest.importorskip('torch')
    scores = torch.from_numpy(np.random.default_rng(seed).permutation(3*n).reshape(3, n).astype(np.float32))
    k = min(k, n)
    np.testing.assert_array_equal(top_of_rows(scores, k, 4)[1].numpy(), scores.topk(k).indices.numpy())


def test_without_self():
    x = l2n(rng.normal(size=(30, 4))); x[7] = x[3]
    sims, idxs = without_self(*search(x, x, 6, 'cpu'))
    assert idxs.shape == (30, 5) and not (idxs == np.arange(30)[:, None]).any()
    assert idxs[7, 0] == 3 and idxs[3, 0] == 7


@pytest.mark.parametrize('change, said', [(dict(k=0), 'k is 0'), (dict(k=51), 'k is 51; the base has 50 rows'), (dict(queries=np.ones((2, 3))), 'queries have 3 dimensions'),
                                          (dict(base=np.full((50, 4), np.nan)), 'base row 0 is not finite'), (dict(queries=np.full((2, 4), np.inf)), 'query 0 is not finite'),
                                          (dict(queries=np.ones(4)), r'queries must be \[n, d\]'), (dict(method='annoy'), 'method is')])
def test_named_errors(change, said):
    args = dict(queries=np.ones((2, 4)), base=np.ones((50, 4)), k=3, device='cpu') | change
    with pytest.raises(SearchError, match=said): search(**args)


def test_a_gpu_too_small_goes_on_with_smaller_blocks(monkeypatch, capsys):
    torch = pytest.importorskip('torch')
    calls = []
    def small(scores, k, group=32):
        calls.append(scores.shape[1])
        if scores.shape[1] > 2000: raise torch.cuda.OutOfMemoryError('block')
        return scores.topk(k, dim=1)
    monkeypatch.setattr(knn, 'top_of_rows', small)
    base, queries = l2n(rng.normal(size=(5000, 8))), l2n(rng.normal(size=(10, 8)))
    np.testing.assert_array_equal(search(queries, base, 5, 'cpu', 'torch32')[1], search(queries, base, 5, 'cpu', 'numpy')[1])
    assert max(calls) > 2000 and 'too small for this block' in capsys.readouterr().err
