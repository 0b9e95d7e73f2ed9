"""The weighted ensemble against the original's numbers (image sizes: test_golden_batching.py)."""
import numpy as np
import pytest

from golden_data import load
from landmark.parts.store import concat_stores, ensemble, write_store

G = load('extract')


@pytest.fixture
def stores(tmp_path):
    return [write_store(tmp_path/str(i), G[f'ids_in{i}'], G[f'feats_in{i}'], dict(model=i), dtype='float32') for i in range(len(G['weights']))]


@pytest.mark.parametrize('key, weights, normalise', [('feats_out', True, True), ('feats_out_raw', True, False), ('feats_out_w1', False, True)])
@pytest.mark.parametrize('shard_size', [7, 1000])
def test_ensemble(stores, tmp_path, key, weights, normalise, shard_size):
    out = concat_stores(stores, tmp_path/'out', G['weights'] if weights else None, normalise, sort=True, shard_size=shard_size, dtype='float32')
    np.testing.assert_array_equal(out.ids, G['ids_out'])
    np.testing.assert_allclose(out[:], G[key], atol=1e-6)


def test_single(stores, tmp_path):
    out = concat_stores(stores[:1], tmp_path/'out', sort=True, dtype='float32')
    np.testing.assert_allclose(out[:], G['feats_out_single'], atol=1e-6)
    np.testing.assert_allclose(ensemble([stores[0][:]]), stores[0][:]/np.linalg.norm(stores[0][:], axis=1, keepdims=True), atol=1e-6)
