"""Truncated offline diffusion against the original's numbers."""
import numpy as np
import pytest
import scipy.sparse as sp

from golden_data import load
from landmark.parts.graph_rerank import affinity, diffuse, diffusion_rank, gallery_scores, laplacian
from landmark.parts.knn import search

G = load('diffusion')
N = len(G['feats'])
KD = int(G['kd'])


def sparse(name): return sp.csr_matrix((G[f'{name}_val'], (G[f'{name}_row'], G[f'{name}_col'])), shape=(N, N)).toarray()


def graph(): return affinity(G['knn_sims'], G['knn_ids'][:, :KD])


def test_affinity_and_laplacian():
    np.testing.assert_allclose(graph().toarray(), sparse('aff'), atol=1e-6)
    np.testing.assert_allclose(laplacian(graph()).toarray(), sparse('lap'), atol=1e-6)


def test_defect_14_the_affinity_leaves_its_input_alone():
    sims = G['knn_sims'].copy(); sims[0, -1] = -.5
    before = sims.copy(); affinity(sims, G['knn_ids'][:, :KD])
    np.testing.assert_array_equal(sims, before)
    wrong = sims; wrong[wrong < 0] = 0                                   # what the original does
    assert (wrong != before).any()


@pytest.mark.parametrize('device', ['cpu', 'dense'])
def test_offline(device):
    ids, want = G['knn_ids'][:, :int(G['n_trunc'])], G['offline']
    got, missed = solve(laplacian(graph()), ids, device)
    assert np.abs((got - want)/np.abs(want).max(1, keepdims=True)).max() < 2e-6
    assert missed == G['cg_unconverged']


def solve(L, ids, device):
    if device == 'cpu': return diffuse(L, ids)
    from landmark.parts.graph_rerank import _diffuse_dense
    off = (L - sp.identity(L.shape[0])).tocsr(); off.eliminate_zeros()
    return _diffuse_dense(off, ids, np.arange(len(ids)), 1e-6, 20, 'cpu')


@pytest.mark.parametrize('device', ['cpu', 'dense'])
def test_ring_stops_at_twenty_steps(device):
    ids = G['ring_knn_ids'][:, :int(G['ring_n_trunc'])]
    sims, near = search(G['ring_feats'], G['ring_feats'], int(G['ring_kd']), 'cpu')
    np.testing.assert_allclose(sims, G['ring_knn_sims'], atol=1e-6)
    L = laplacian(affinity(G['ring_knn_sims'], ids[:, :int(G['ring_kd'])]))
    got, missed = solve(L, ids, device)
    want = G['ring_offline']
    assert np.abs((got - want)/np.abs(want).max(1, keepdims=True)).max() < 1e-5
    assert missed == G['ring_cg_unconverged']
    exact, _ = diffuse(L, ids, n_iter=2000)
    assert np.abs((exact - want)/np.abs(want).max(1, keepdims=True)).max() > 1e-3        # an exact solver would not pass


def test_rank():
    nq, want, top = int(G['n_query']), G['rank_scores'], G['rank_top100']
    scores, ranks = diffusion_rank(G['offline'], G['knn_ids'], nq, top.shape[1])
    reached = ranks >= 0
    np.testing.assert_allclose(scores[reached], np.take_along_axis(want, np.maximum(ranks, 0), 1)[reached], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(want, np.maximum(ranks, 0), 1)[reached], np.take_along_axis(want, top, 1)[reached], atol=2e-6)
    swapped = (ranks != top) & reached
    assert swapped.mean() < .01


def test_gallery_only():
    nq, k = int(G['n_query']), 10
    queries, gallery = G['feats'][:nq], G['feats'][nq:]
    sims, idxs = search(gallery, gallery, int(G['n_trunc']), 'cpu')
    values, _ = diffuse(laplacian(affinity(sims[:, :KD], idxs[:, :KD])), idxs)
    scores = gallery_scores(*search(queries, gallery, k, 'cpu'), values, idxs)
    np.testing.assert_allclose(scores, G['old_scores'], atol=1e-5*np.abs(G['old_scores']).max())
