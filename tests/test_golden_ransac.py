"""Matches and inlier counts against the original's numbers, whose own random streams say how far counts may differ."""
import numpy as np
import pytest

from golden_data import load
from landmark.parts.local_features import LocalFeatures
from landmark.parts.matching import ORIGINAL, Prepared, match, rule_for
from landmark.parts.verification import verify, verify_prepared

G = load('ransac')
SHIFT = 1000    # the synthetic views have places left of and above zero, real images have none


def views(quantize):
    out = []
    for desc, loc in zip(G.ragged('desc', 'feat_off'), G.ragged('loc', 'feat_off')):
        out.append(Prepared(LocalFeatures(loc + SHIFT, desc.astype(np.float32), np.ones(len(loc)), (800, 800), 'delf'), quantize))
    return out


@pytest.fixture(scope='module')
def floats(): return views(False)

@pytest.fixture(scope='module')
def whole(): return views(True)

def counts(v, rule): return np.array([verify_prepared(v[i], v[j], rule)[0] for i, j in G['pairs']])


def test_matches_are_the_originals(floats):
    m1, m2 = G.ragged('match_1', 'match_off'), G.ragged('match_2', 'match_off')
    rows = [len(set(zip(*match(floats[i], floats[j], ORIGINAL))) ^ set(zip(a, b))) for (i, j), a, b in zip(G['pairs'], m1, m2)]
    assert sum(rows) <= 6                                               # float32 ties; 0 here
    np.testing.assert_allclose([len(match(floats[i], floats[j], ORIGINAL)[0]) for i, j in G['pairs']], G['n_tentative'], atol=2)


@pytest.mark.parametrize('kind', ['floats', 'whole'])
def test_same_decision_wherever_the_originals_streams_agree(kind, request):
    rule = ORIGINAL if kind == 'floats' else rule_for('delf')            # as the original, and as we do it by default
    n = counts(request.getfixturevalue(kind), rule)
    streams = np.column_stack([G['inliers_seeds'], G['inliers']])
    for threshold in (15, 20, 30, 50):
        yes, no = streams.min(1) >= threshold, streams.max(1) < threshold
        slack = 0 if kind == 'floats' else 2                            # 8-bit descriptors move a few matches at the margin
        wrong = (yes & (n < threshold - slack)) | (no & (n >= threshold + slack))
        assert not wrong.any(), (threshold, n[wrong], streams[wrong])
        assert (yes | no).sum() > .8*len(n)                             # the rule is not empty


def test_easy_pairs_reach_the_oracle(floats, whole):
    true = np.flatnonzero(G['is_true']); np.testing.assert_array_equal(true, np.arange(len(true)))
    easy = G['oracle_inliers'] / G['n_tentative'][true] > .2
    assert easy.sum() >= 10
    for v in (floats, whole):
        for rule in (ORIGINAL, rule_for('delf')):                       # rejecting degenerate maps costs true pairs nothing
            np.testing.assert_allclose(counts(v, rule)[true][easy]/G['oracle_inliers'][easy], 1, atol=.03)


def test_false_pairs_stay_at_chance(floats):
    n, false = counts(floats, ORIGINAL), G['is_true'] == 0
    assert n[false].max() <= G['inliers_seeds'][false].max()
    assert counts(floats, rule_for('delf'))[false].sum() < n[false].sum()  # fewer by chance when degenerate maps are out
    assert (G['n_correct'][false] == 0).all() and (G['n_correct'][~false] <= G['oracle_inliers'] + 5).all()


def test_the_planted_map_is_found(floats):
    scene = G['scene']
    for (i, j), M, planted, oracle, n in zip(G['pairs'], G['affine'], G['planted'], G['oracle_inliers'], G['n_tentative']):
        assert scene[i] == scene[j] and planted > 0
        if oracle/n < .2: continue
        model = verify_prepared(floats[i], floats[j], ORIGINAL)[1].reshape(2, 3)
        grid = np.stack(np.meshgrid([200, 400, 600], [200, 400, 600]), -1).reshape(-1, 2)
        ours = (grid + SHIFT) @ model[:, :2].T + model[:, 2] - SHIFT
        assert np.linalg.norm(ours - (grid @ M[:, :2].T + M[:, 2]), axis=1).max() < 20


def test_degenerate_cases():
    desc, loc = G['edge_desc'].astype(np.float32), G['edge_loc']
    f = lambda d, rows: LocalFeatures(loc[rows], d[rows], np.ones(len(loc[rows])), (800, 800), 'delf')
    everything, two = slice(None), slice(2)
    got = [verify(f(desc, a), f(d, a), ORIGINAL, quantize=q).n_inliers for q in (False, True) for d, a in ((desc, two), (-desc, everything), (desc, everything))]
    np.testing.assert_array_equal(got, [*G['edge_counts']]*2)
