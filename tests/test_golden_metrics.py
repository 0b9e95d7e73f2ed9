"""mAP@100, GAP, accuracy and the revisited protocol against the original's numbers."""
import numpy as np
import pytest

from golden_data import load
from landmark.parts.metrics import accuracy, gap, judge, map_at_k, relevant_mask, revisited, trapezoid_ap

G = load('metrics')
TOL = dict(atol=1e-6, rtol=0)


def test_map_at_100():
    mean, aps = map_at_k(G['kaggle_retrieved'], G.ragged('kaggle_rel', 'kaggle_rel_off'), 100, per_query=True)
    np.testing.assert_allclose(aps, G['textbook_kaggle_ap'], **TOL)
    np.testing.assert_allclose(mean, G['textbook_kaggle_map'], **TOL)


@pytest.mark.parametrize('k', [100, 20])
def test_defect_4_map_divides_by_what_can_be_found(k):
    hits = G['map_pred'][:, :k] == G['map_true'][:, None]
    by_k = ((hits.cumsum(1)/np.arange(1, hits.shape[1]+1))*hits).sum(1)/k            # the original's rule
    np.testing.assert_allclose(by_k.mean(), G[f'map_at_{k}'], **TOL)
    perfect = map_at_k([[3, *range(10, 109)]], [{3}], 100)
    assert perfect == 1.0 and relevant_mask([[3]], [{3}]).sum()/100 == 0.01           # which gives a perfect answer 0.01


@pytest.mark.parametrize('name', ['gap', 'gap2'])
def test_gap(name):
    np.testing.assert_allclose(gap(G[f'{name}_pred'], G[f'{name}_conf'], G[f'{name}_true']), G[name], **TOL)


def test_accuracy(): np.testing.assert_allclose(accuracy(G['acc_logits'], G['acc_labels']), G['acc'], **TOL)


def gnd(): return [dict(easy=e, hard=h, junk=j) for e, h, j in zip(*(G.ragged(f'rop_{x}', f'rop_{x}_off') for x in ('easy', 'hard', 'junk')))]


@pytest.mark.parametrize('protocol', 'EMH')
def test_revisited(protocol):
    got = revisited(G['rop_ranks'].T, gnd(), G['rop_kappas'])[protocol]
    np.testing.assert_allclose(np.nan_to_num(got['aps'], nan=-1), G[f'rop_{protocol}_ap'], **TOL)
    np.testing.assert_allclose(np.nan_to_num(got['pk'], nan=-1), G[f'rop_{protocol}_pk'], **TOL)
    np.testing.assert_allclose(got['map'], G[f'rop_{protocol}_map'], **TOL)
    np.testing.assert_allclose(got['mpk'], G[f'rop_{protocol}_mpk'], **TOL)


def means(rows):
    aps, pk = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    return aps, np.nanmean(aps), np.nanmean(pk, 0)


def test_without_junk():
    rows = [judge(r, np.concatenate([g['easy'], g['hard']]), (), G['rop_kappas']) for r, g in zip(G['rop_ranks'].T, gnd())]
    aps, mean, mpk = means(rows)
    np.testing.assert_allclose(np.nan_to_num(aps, nan=-1), G['rop_nojunk_ap'], **TOL)
    np.testing.assert_allclose(mean, G['rop_nojunk_map'], **TOL)
    np.testing.assert_allclose(mpk, G['rop_nojunk_mpk'], **TOL)


def test_truncated():
    got = revisited(G['rop_ranks'].T[:, :G['rop_trunc']], gnd(), G['rop_kappas'])['M']
    np.testing.assert_allclose(np.nan_to_num(got['aps'], nan=-1), G['rop_trunc_ap'], **TOL)
    np.testing.assert_allclose(got['map'], G['rop_trunc_map'], **TOL)
    np.testing.assert_allclose(got['mpk'], G['rop_trunc_mpk'], **TOL)


def test_trapezoid():
    got = [trapezoid_ap(r, n) for r, n in zip(G.ragged('ap_ranks', 'ap_off'), G['ap_nres'])]
    np.testing.assert_allclose(got, G['ap'], **TOL)
