"""Size tables, aspect-ratio groups, the grouped batch sampler and multi-scale rounding against the original's numbers."""
import numpy as np
import pytest

from golden_data import load
from landmark.parts.batching import BINS3, BINS5, aspect_groups, grouped_batches, scaled_size, size_table

G, E = load('batching'), load('extract')

def test_bins_and_groups():
    np.testing.assert_allclose(G['bins5'], BINS5, rtol=1e-6); np.testing.assert_allclose(G['bins3'], BINS3, rtol=1e-6)
    ratio = G['edge_ratio'].astype(float).round(6)                      # as doubles the edges are hit exactly
    for n, bins in ((5, BINS5), (3, BINS3)):
        np.testing.assert_array_equal(aspect_groups(G['height'], G['width'], bins), G[f'gid{n}'])
        np.testing.assert_array_equal(aspect_groups(ratio, np.ones_like(ratio), bins), G[f'edge_gid{n}'])

def test_size_tables():
    for name, n, sizes in zip(G['scales'], G['n_groups'], G['size_wh']):
        bins, ours = size_table(str(name))
        assert len(ours) == n == len(bins)+1
        np.testing.assert_array_equal(ours, sizes[:n]); assert (sizes[n:] == -1).all()

@pytest.mark.parametrize('order', ['full', 'part'])
@pytest.mark.parametrize('n', [3, 5])
@pytest.mark.parametrize('rule', ['keep', 'drop'])
def test_grouped_batches(order, n, rule):
    ours = grouped_batches(G[f'order_{order}'], G[f'gid{n}'], G['batch_size'], drop_uneven=rule == 'drop')
    theirs = G.ragged(f'{order}_g{n}_{rule}', f'{order}_g{n}_{rule}_off')
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs): np.testing.assert_array_equal(a, b)

def test_defect_14_a_group_without_images():
    order = G['order_full'][G['gid5'][G['order_full']] != 2]
    batches = grouped_batches(order, G['gid5'], G['batch_size'])
    assert sorted(np.concatenate(batches).tolist()) == sorted(order.tolist())

def test_scaled_sizes():
    scales = E['predict_scales'].astype(float).tolist(), [2**-.5, 1., 2**.5]
    np.testing.assert_allclose(E['eval_scales'], scales[1], rtol=1e-6)
    for key, ss, least in (('predict_size', scales[0], 128), ('eval_size', scales[1], 0)):
        for (h, w), sizes in zip(E['hw'], E[key]):
            ours = np.array([scaled_size(h, w, s, min_side=least) for s in ss])
            np.testing.assert_array_equal(np.where(sizes == 0, 0, ours), sizes)       # where the original collapses to 0 ours keeps one step
            assert (ours >= 32).all()
