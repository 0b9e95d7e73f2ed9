"""Losses against the original's numbers, and a regression test for each of its defects that concerns them."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from golden_data import load
from landmark.parts import losses

G = load('losses')
def T(key): x = G[key]; return torch.as_tensor(x)
def near(ours, key, tol): np.testing.assert_allclose(ours.detach().numpy() if torch.is_tensor(ours) else ours, G[key], rtol=0, atol=tol, err_msg=key)

def head_with_weights(make):
    weight = T('weight'); head = make(weight.shape[1], weight.shape[0])
    head.weight.data = weight.clone()
    return head

def check_head(head, key, x, labels, call=''):
    "Logits, cross-entropy and both gradients."
    x = x.clone().requires_grad_(); logits = head(x, labels); ce = F.cross_entropy(logits, labels)
    gx, gw = torch.autograd.grad(ce, (x, head.weight))
    near(logits, f'{key}_logits{call}', 5e-5); near(ce, f'{key}_ce{call}', 1e-5)
    near(gx, f'{key}_gfeat{call}', 2e-6); near(gw, f'{key}_gweight{call}', 2e-6)

def test_cosines():
    near(losses.cosine_logits(T('features'), T('weight')), 'cosine', 1e-6)

@pytest.mark.parametrize('key,kind,m,easy', [('arc_s30_m03', 'arcface', .3, False), ('arc_s30_m03_easy', 'arcface', .3, True),
                                             ('cos_s30_m035', 'cosface', .35, False), ('cos_default', 'cosface', .40, False)])
def test_margin_heads(key, kind, m, easy):
    head = head_with_weights(lambda d, n: losses.MarginHead(d, n, kind, 30, m, easy))
    check_head(head, key, T('features'), T('labels'))
    loss, _ = head.loss(T('features'), T('labels')); near(loss, f'{key}_ce', 1e-5)

def test_defect_7_label_smoothing_of_the_margin_mask():
    "The original's ls_eps smooths the blend of margin and cosine; ours smooths the targets, which is another loss."
    x, w, labels = T('features').requires_grad_(), T('weight').requires_grad_(), T('labels')
    cos = losses.cosine_logits(x, w)
    logits = 30*losses.smoothed_mask_logits(cos, labels, losses.arcface_margin(cos, .3), .1); ce = F.cross_entropy(logits, labels)
    gx, gw = torch.autograd.grad(ce, (x, w))
    near(logits, 'arc_s30_m03_ls01_logits', 5e-5); near(ce, 'arc_s30_m03_ls01_ce', 1e-5)
    near(gx, 'arc_s30_m03_ls01_gfeat', 2e-6); near(gw, 'arc_s30_m03_ls01_gweight', 2e-6)
    head = head_with_weights(lambda d, n: losses.MarginHead(d, n, label_smoothing=.1))
    ours, _ = head.loss(x, labels); plain = head(x, labels)
    target = torch.full_like(plain, .1/plain.shape[1]).scatter_(1, labels[:, None], .9 + .1/plain.shape[1])
    torch.testing.assert_close(ours, -(target*plain.log_softmax(1)).sum(1).mean(), rtol=1e-6, atol=1e-5)
    assert abs(ours.item() - G['arc_s30_m03_ls01_ce']) > 1e-2

def test_defect_7_arcface_of_a_parallel_descriptor_is_finite():
    "sqrt(1 - cos²) goes NaN where rounding makes cos > 1; the unclamped formula shows that these rows would."
    w = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)); labels = torch.arange(500)
    cos = F.linear(F.normalize(w), F.normalize(w)).diag()
    assert (1 - cos*cos).sqrt().isnan().any(), 'the test no longer meets the dangerous rounding'
    head = losses.MarginHead(64, 500); head.weight.data = w.clone(); x = (2*w).requires_grad_()
    loss, _ = head.loss(x, labels); loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and head.weight.grad.isfinite().all()

THETAS = {'tz125': 1.25, 'tzpi4': math.pi/4}

def adacos(theta, m, over): return head_with_weights(lambda d, n: losses.AdaCos(d, n, m, THETAS[theta], over))

@pytest.mark.parametrize('theta', THETAS)
@pytest.mark.parametrize('m,name', [(0., 'm00'), (.5, 'm05')])
def test_adacos_as_published_in_the_code(theta, m, name):
    head, key, labels = adacos(theta, m, 'all'), f'ada_{theta}_{name}', T('labels')
    near(head.scale, f'{key}_s0', 1e-5)
    for call, x in (('1', 'features'), ('2', 'features2')):
        check_head(head, key, T(x), labels, call); near(head.scale, f'{key}_s{call}', 1e-5)

def test_adacos_with_the_smoothed_mask():
    "With ls_eps the target also enters B."
    head, cos, labels = adacos('tzpi4', .5, 'all'), T('cosine'), T('labels')
    every = (head.scale*cos).exp(); mask = torch.full_like(cos, .1/cos.shape[1]).scatter_(1, labels[:, None], .9 + .1/cos.shape[1])
    s = math.log(torch.where(mask < 1, every, 0).sum()/len(cos))/math.cos(min(math.pi/4, cos.arccos().median()))
    near(torch.tensor(s), 'ada_tzpi4_m05_ls01_s1', 1e-4)
    near(s*losses.smoothed_mask_logits(cos, labels, (cos.clamp(-1+1e-7, 1-1e-7).arccos() + .5).cos(), .1), 'ada_tzpi4_m05_ls01_logits1', 2e-4)

@pytest.mark.parametrize('theta', THETAS)
def test_defect_6_adacos_reacts_to_the_target_angles(theta):
    ours, old = adacos(theta, 0., 'target'), adacos(theta, 0., 'all')
    for call, x in (('1', 'features'), ('2', 'features2')):
        for head in (ours, old): head(T(x), T('labels'))
        near(ours.scale, f'textbook_ada_{theta}_s{call}', 1e-4)
    near(old.scale, f'ada_{theta}_m00_s2', 1e-5)
    before = ours.scale.item(); ours.eval(); ours(T('features'), T('labels'))
    assert ours.scale.item() == before, 'evaluation must not adapt the scale'
    again = losses.AdaCos(*reversed(ours.weight.shape)); again.load_state_dict(ours.state_dict())
    assert again.scale.item() == before, 'the scale is part of the saved state'
    near_targets = F.normalize(T('weight'))[T('labels')]
    scales = {}
    for head in (ours.train(), old): head.theta_zero = 1.5; head.scale.fill_(10.); head(near_targets, T('labels')); scales[head.median_over] = head.scale.item()
    assert scales['target'] < 0.5*scales['all'], 'with all targets at angle 0 the published scale falls, the original\'s does not see them'

def triplet(fn, key, **kw):
    x = T('trip_emb').requires_grad_(); value = fn(x, T('trip_labels'), **kw)
    near(value, key, 1e-6); near(torch.autograd.grad(value, x)[0], f'{key}_g', 1e-6)

@pytest.mark.parametrize('dist,squared', [('eu', False), ('sq', True)])
def test_triplets(dist, squared):
    triplet(losses.batch_hard_triplet, f'trip_hard_m01_{dist}', margin=.1, squared=squared)
    triplet(losses.batch_hard_triplet, f'trip_hard_m03_{dist}', margin=.1, squared=squared)        # the original ignores 0.3
    triplet(losses.batch_all_triplet, f'trip_all_m01_{dist}', margin=.1, squared=squared)
    triplet(losses.batch_all_triplet, f'trip_all_m03_{dist}', margin=.3, squared=squared)

def test_defect_8_batch_hard_triplet_honours_its_margin():
    ours = losses.batch_hard_triplet(T('trip_emb'), T('trip_labels'), .3)
    near(ours, 'textbook_trip_hard_m03_eu', 1e-6)
    assert abs(ours.item() - G['trip_hard_m03_eu']) > 1e-2

def tuples():
    "cirtorch's columns as [tuples, size, d]; a tuple starts at each label −1."
    x, label = T('tuple_x'), T('tuple_label')
    return x.clone().requires_grad_(), int((label == -1).sum())

@pytest.mark.parametrize('fn,key,margin', [('contrastive_loss', 'contrastive_m07', .7), ('contrastive_loss', 'contrastive_m085', .85), ('contrastive_loss', 'contrastive_m12', 1.2),
                                           ('tuple_triplet_loss', 'cirtriplet_m01', .1), ('tuple_triplet_loss', 'cirtriplet_m05', .5)])
def test_tuple_losses(fn, key, margin):
    x, n = tuples(); value = getattr(losses, fn)(x.T.reshape(n, -1, len(x)), margin)
    np.testing.assert_allclose(value.item(), G[key], rtol=1e-6, atol=1e-6)
    near(torch.autograd.grad(value, x)[0], f'{key}_g', 1e-6)
