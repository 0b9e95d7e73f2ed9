"""Soft voting, sort-step and insert-step against the original's lists."""
import numpy as np
import pytest

from golden_data import load
from landmark.parts.metrics import map_at_k
from landmark.parts.knn import search
from landmark.parts.rerank import Problem, rank, soft_vote, sort_insert

G = load('rerank')


def problem(): return Problem(G['feats_query'], G['feats_index'], G['feats_train'], G['train_landmark'], dict(device='cpu'))


@pytest.mark.parametrize('which', ['query', 'index'])
def test_soft_voting(which):
    sims, idxs = search(G[f'feats_{which}'], G['feats_train'], G['voting_k'], 'cpu')
    labels, scores = soft_vote(sims, G['train_landmark'][idxs], G['voting_k'])
    np.testing.assert_array_equal(labels, G[f'pred_{which}_landmark'])
    np.testing.assert_allclose(scores, G[f'pred_{which}_score'], atol=1e-6)


def test_baseline(): np.testing.assert_array_equal(rank(problem(), 'baseline', G['baseline_top100'].shape[1]), G['baseline_top100'])


@pytest.mark.parametrize('name, thresh', [('t06_k100', .6), ('t06_k50', .6), ('t04_k100', .4), ('t04_k50', .4)])
def test_sort_insert(name, thresh):
    want = G[f'rerank_{name}']
    topk = want.shape[1]
    labels, scores, index_labels, index_scores = (G[f'pred_{a}_{b}'] for a in ('query', 'index') for b in ('landmark', 'score'))
    listed = G['baseline_top100'][:, :topk]
    np.testing.assert_array_equal(sort_insert(listed, labels, scores, index_labels, index_scores, thresh, topk), want)
    positives = (index_labels[listed] == labels[:, None]).sum(1)
    np.testing.assert_array_equal(positives, G[f'n_pos_{name}'])
    room = len(G['ids_index'])
    everything = sort_insert(listed, labels, scores, index_labels, index_scores, thresh, room)
    np.testing.assert_array_equal((everything >= 0).sum(1) - topk, G[f'n_insert_{name}'])
    if topk == G['baseline_top100'].shape[1]:
        np.testing.assert_array_equal(rank(problem(), 'sort+insert', topk, insert_thresh=thresh, voting_k=G['voting_k']), want)


def test_defect_1_the_list_is_cut_after_inserting():
    "Images of the query's landmark at places behind topk come back without passing the threshold."
    labels, scores, index_labels, index_scores = (G[f'pred_{a}_{b}'] for a in ('query', 'index') for b in ('landmark', 'score'))
    whole, topk = G['baseline_top100'], G['rerank_t06_k50'].shape[1]
    ours = sort_insert(whole, labels, scores, index_labels, index_scores, .6, topk)
    wrong = sort_insert(whole[:, :topk], labels, scores, index_labels, index_scores, .6, topk)
    behind = (index_labels[whole] == labels[:, None])
    assert (ours != wrong).any()
    for o, row, same in zip(ours, whole, behind): assert set(row[same][:topk]) <= set(o)
    assert any(not set(row[same][:topk]) <= set(w) for w, row, same in zip(wrong, whole, behind))
    np.testing.assert_array_equal(ours, sort_insert(whole, labels, scores, index_labels, index_scores, .6, whole.shape[1])[:, :topk])


def test_the_steps_help_where_the_truth_is_known():
    truth = [np.flatnonzero(G['true_landmark_index'] == l) for l in G['true_landmark_query']]
    k = G['baseline_top100'].shape[1]
    assert map_at_k(G['rerank_t06_k100'], truth, k) > map_at_k(G['baseline_top100'], truth, k)
    assert len(set(G['ids_query'])) == len(G['feats_query']) and len(set(G['ids_train'])) == len(G['feats_train'])
