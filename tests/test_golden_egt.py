"""Explore-exploit graph traversal against the original's lists."""
import numpy as np
import pytest

from golden_data import load
from landmark.parts.graph_rerank import egt
from landmark.parts.knn import search

G = load('egt')


@pytest.mark.parametrize('key, t, k', [('out_inf', np.inf, 100), ('out_inf_k50', np.inf, 50), ('out_t06', .6, 100), ('out_t08', .8, 100),
                                       ('out_t06_k20', .6, 20), ('out_t08_k20', .8, 20)])
def test_egt(key, t, k):
    want = G[key]
    np.testing.assert_array_equal(egt(G['ti_sims'], G['ti_ids'], G['ii_sims'], G['ii_ids'], t, k, want.shape[1]), want)


def test_neighbour_lists():
    for queries, key in (('feats_test', 'ti'), ('feats_index', 'ii')):
        sims, idxs = search(G[queries], G['feats_index'], G[f'{key}_ids'].shape[1], 'cpu')
        np.testing.assert_allclose(sims, G[f'{key}_sims'], atol=1e-6)
        assert (idxs == G[f'{key}_ids']).mean() > .999
