"""Pooling and frozen batch norm against cirtorch's and the original's numbers."""
import numpy as np
import pytest
import torch
from torch import nn

from golden_data import load
from landmark.parts import pooling as P
from landmark.parts.backbones import freeze_batch_norm, train_mode

G = load('pooling')
def T(key): x = G[key]; return torch.as_tensor(x)
def near(ours, key, rtol=1e-6, atol=1e-6): np.testing.assert_allclose(ours.detach().numpy(), G[key], rtol=rtol, atol=atol, err_msg=key)

@pytest.fixture
def whiten():
    w = T('rpool_whiten_w'); fc = nn.Linear(w.shape[1], w.shape[0]); fc.weight.data, fc.bias.data = w, T('rpool_whiten_b')
    return fc

@pytest.mark.parametrize('shape', ['wide', 'tall', 'square'])
def test_poolings(shape, whiten):
    x = T(f'x_{shape}')
    near(P.mac(x), f'mac_{shape}'); near(P.spoc(x), f'spoc_{shape}')
    near(P.gem(x, 3.), f'gem_p3_{shape}'); near(P.gem(x, 2.3), f'gem_p23_{shape}'); near(P.gem(x, T('gemmp_p')), f'gemmp_{shape}')
    for levels in (2, 3): near(P.rmac(x, levels), f'rmac_l{levels}_{shape}', atol=3e-6)
    for name, fn in (('mac', P.mac), ('gem', P.gem)):
        near(P.rpool(x, fn), f'rpool_{name}_{shape}'); near(P.rpool(x, fn, whiten), f'rpool_{name}_whiten_{shape}')
    near(P.region_pool(x, P.gem), f'roi_gem_{shape}')

def test_gem_gradients():
    x, p = T('x_wide').requires_grad_(), torch.tensor([3.], requires_grad=True)
    y = P.l2n(P.gem(x, p)); near(y, 'gem_l2n_wide')
    gx, gp = torch.autograd.grad((T('gem_gradv')*y).sum(), (x, p))
    near(gx, 'gem_l2n_gx'); near(gp, 'gem_l2n_gp', rtol=1e-5)

def test_unit_vectors():
    near(P.l2n(T('vec')), 'l2n')

def test_defect_8_power_law():
    near(P.power_law(T('vec')), 'powerlaw_fixed')

def test_defect_8_frozen_batch_norm_keeps_eps():
    bn = nn.BatchNorm2d(len(T('bn_weight')))
    bn.weight.data, bn.bias.data, bn.running_mean, bn.running_var = T('bn_weight'), T('bn_bias'), T('bn_mean'), T('bn_var')
    net = nn.Sequential(bn); freeze_batch_norm(net); x = T('bn_x')
    for _ in range(2): train_mode(net, frozen_bn=True); near(net(x), 'bn_eval', 1e-5, 1e-5)          # stays frozen, in training mode too
    assert not any(p.requires_grad for p in net.parameters())
    inv = (bn.weight*bn.running_var.rsqrt())[:, None, None]; without_eps = (x - bn.running_mean[:, None, None])*inv + bn.bias[:, None, None]
    near(without_eps, 'bn_frozen', 1e-5, 1e-5)
    assert (net(x) - without_eps).abs().max() > 1e-2, 'dropping eps shows where the variance is tiny'
