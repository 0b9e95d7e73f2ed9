"""Recognition scoring and the distractor rule against the original's numbers."""
import numpy as np
import pytest

from golden_data import load
from landmark.parts.knn import search
from landmark.parts.recognition import distractor_rule, inliers_of, recognise

G = load('recognition')


def predict(sims):
    idxs = G['topk_idx']
    return recognise(sims, G['train_landmark'][idxs], inliers_of(idxs, G['ransac_test'], G['ransac_train'], G['ransac_inliers']))


def test_scoring():
    labels, scores = predict(1 - G['dists']/2)                           # squared distance of unit vectors
    np.testing.assert_array_equal(labels, G['pred_landmark'])
    np.testing.assert_allclose(scores, G['pred_score'], atol=3e-6)


def test_scoring_with_our_search():
    sims, idxs = search(G['feats_test'], G['feats_train'], G['topk_idx'].shape[1], 'cpu')
    np.testing.assert_array_equal(idxs, G['topk_idx'])
    np.testing.assert_allclose(predict(sims)[1], G['pred_score'], atol=3e-6)
    assert len(set(G['ids_test'])) == len(idxs) and len(set(G['ids_train'])) == len(G['feats_train'])


@pytest.mark.parametrize('most', [30, 6])
def test_defect_9_the_distractor_rule_compares_labels_as_numbers(most):
    labels, scores = G['pred_landmark'], G['pred_score']
    ours, banned = distractor_rule(labels, scores, most)
    np.testing.assert_array_equal(labels, G[f'ban{most}_exact_landmark'])
    np.testing.assert_allclose(ours, G[f'ban{most}_exact_score'], atol=3e-6)
    np.testing.assert_array_equal(np.sort(banned), np.sort(G[f'ban{most}_banned']))
    order = G[f'ban{most}_orig_order']                                   # the original returns rows by descending score
    assert sorted(order.tolist()) == list(range(len(scores))) and (np.diff(scores[order]) <= 1e-6).all()
    wrong_labels, wrong = by_substring(labels, scores, most)
    np.testing.assert_array_equal(wrong_labels, G[f'ban{most}_orig_landmark'])
    np.testing.assert_allclose(wrong, G[f'ban{most}_orig_score'], atol=3e-6)
    assert (wrong_labels != labels).any()


def by_substring(labels, scores, most):
    "The original's rule: a printed prediction that contains `7 ` is overwritten with label 7."
    names, counts = np.unique(labels, return_counts=True)
    text, out = [f'{l} ' for l in labels], np.array(scores, np.float32)
    out_labels = labels.copy()
    for name, count in sorted(zip(names[counts > most], counts[counts > most]), key=lambda x: -x[1]):
        for i, t in enumerate(text):
            if f'{name} ' in t: text[i], out_labels[i], out[i] = f'{name} ', name, -count
    return out_labels, out
