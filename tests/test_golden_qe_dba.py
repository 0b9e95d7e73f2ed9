"""αQE and DBA: the textbook's numbers, and the original's with its slice set right."""
import numpy as np
import pytest

from golden_data import load
from landmark.parts.expansion import alpha_qe, augment_index, expand

G = load('qe_dba')
Q, X, ALPHA, N = G['feats_test'], G['feats_index'], float(G['alpha']), int(G['n_qe'])
TOL = dict(atol=1e-6, rtol=0)


def test_textbook_aqe():
    np.testing.assert_allclose(alpha_qe(Q, X, ALPHA, N, (G['textbook_nb_sims'], G['textbook_nb_test'])), G['textbook_qe_test'], **TOL)
    np.testing.assert_allclose(alpha_qe(Q, X, ALPHA, N), G['textbook_qe_test'], **TOL)           # neighbours searched here
    np.testing.assert_allclose(alpha_qe(Q, X, 0, 5), G['textbook_aqe5_test'], **TOL)


def test_textbook_dba():
    near = G['textbook_nb_index']
    sims = np.einsum('nd,nkd->nk', X, X[near])
    np.testing.assert_allclose(augment_index(X, ALPHA, N, (sims, near)), G['textbook_dba_index'], **TOL)
    index = augment_index(X, ALPHA, N)
    np.testing.assert_allclose(index, G['textbook_dba_index'], **TOL)
    np.testing.assert_allclose(alpha_qe(Q, index, ALPHA, N), G['textbook_dba_then_qe_test'], **TOL)


@pytest.mark.parametrize('which', ['qe', 'dba', 'both'])
def test_defect_2_every_row_is_expanded(which):
    "The original on the union of queries and index, itself among its ten: columns sliced, and rows as published."
    union, sims, idxs = np.concatenate([Q, X]), G['sims'], G['topk_idx']
    out = expand(union, union, sims[:, :N], idxs[:, :N], ALPHA, own_weight=0)
    fixed = out[:len(Q)] if which != 'dba' else Q, out[len(Q):] if which != 'qe' else X
    for ours, key in zip(fixed, ('test', 'index')): np.testing.assert_allclose(ours, G[f'fixed_{which}_{key}'], **TOL)
    wrong = expand(union[:N], union, sims[:N], idxs[:N], ALPHA, own_weight=0)                     # rows: ten come out, with all neighbours
    published = wrong[:len(Q)] if which != 'dba' else Q, wrong[len(Q):] if which != 'qe' else X
    for ours, key in zip(published, ('test', 'index')): np.testing.assert_allclose(ours, G[f'orig_{which}_{key}'], **TOL)
    assert any(len(a) != len(b) for a, b in zip(fixed, published))
