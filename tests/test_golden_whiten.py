"""Supervised and PCA whitening against the original's numbers."""
import numpy as np
import pytest

from golden_data import load
from landmark.parts.whitening import learn_pca, learn_whitening

G = load('whiten')
X = G['X'].T.astype(np.float64)


def same_rows(ours, theirs, rtol=1e-4):
    "Equal up to the sign of every row."
    theirs = theirs*np.sign((ours*theirs).sum(1, keepdims=True))
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol*np.abs(theirs).max())


@pytest.mark.parametrize('kind', ['lw', 'pca'])
def test_cirtorch(kind):
    w = learn_whitening(X, G['qidxs'], G['pidxs']) if kind == 'lw' else learn_pca(X)
    d = X.shape[1]
    np.testing.assert_allclose(w.mean, G[f'{kind}_m'][:, 0], rtol=1e-4, atol=1e-6)
    same_rows(w.P, G[f'{kind}_P'])
    same_rows(w(X).T, G[f'{kind}_apply'])
    same_rows(w(X, d//2).T, G[f'{kind}_apply_half'])
    gram = G[f'{kind}_gram_half']
    y = w(X, d//2)[:len(gram)]
    np.testing.assert_allclose(y @ y.T, gram, atol=1e-5)


def test_pca_is_what_the_original_meant():
    w = learn_pca(X)
    same_rows(w.P, G['fixed_wpca_P'])
    same_rows(w(X, normalise=False).T, G['fixed_wpca_apply'].T)
    np.testing.assert_allclose(1/np.square(w.P @ w.P.T).diagonal()**.5, G['eigvals'], rtol=1e-4)
    np.testing.assert_allclose(w.mean, G['orig_wpca_m'], rtol=1e-4, atol=1e-6)


def test_defect_5_pca_output_is_white():
    y = learn_pca(X)(X, normalise=False)
    white = lambda y: np.abs(np.cov(y.T, bias=True) - np.eye(y.shape[1])).max() < 1e-3
    assert white(y)
    assert not white(G['orig_wpca_apply'])                               # the original's own output
    np.testing.assert_allclose(np.cov(G['orig_wpca_apply'].T, bias=True), G['orig_wpca_cov'], atol=1e-3)
    values, vectors = np.linalg.eigh(np.cov(X.T, bias=True))             # its mistake made again: rows ordered, not transposed
    order = np.argsort(-values)
    wrong = vectors[order]/np.sqrt(values[order])[:, None]
    assert not white((X - X.mean(0)) @ wrong.T)
    assert G['orig_wpca_P'].shape == wrong.shape
