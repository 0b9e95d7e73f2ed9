"""What can be known about GPUs where there is none: what the kernels become, and where every tensor is.

The device is pretended (`pretend.py`): stages walk through their GPU code and must give the CPU's numbers."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from pretend import There, pretended_gpu
from torch import nn

from landmark import verify
from landmark.parts.core import ParameterError
from landmark.parts.descriptors import extraction
from landmark.parts.descriptors.store import write_store
from landmark.parts.images.loading import Photos
from landmark.parts.local import delf, verification_torch
from landmark.parts.local import verification_triton as kernels
from landmark.parts.local.cleaning import partners_among_all
from landmark.parts.local.features import extract_many, open_local
from landmark.parts.local.kinds import rule_for
from landmark.parts.local.verification import verify_pairs
from landmark.parts.nets.backbones import make_model
from landmark.parts.nets.checkpoints import load_model, save_model
from landmark.parts.nets.losses import make_head
from landmark.parts.search import knn
from landmark.parts.search.knn_settle import settle
from landmark.parts.training import engine
from landmark.parts.training.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Twelve photos of two walls, in two shapes."
    folder, r = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    walls = [cv2.resize(r.integers(0, 255, (12, 16, 3), np.uint8), (128, 96)) for _ in range(2)]
    for i in range(12):
        noisy = np.clip(walls[i % 2] + r.normal(0, 5, (96, 128, 3)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{i:02d}.png"), noisy if i % 3 else noisy.transpose(1, 0, 2))
    return sorted(folder.glob("*.png")), np.arange(12) % 2


# the instrument


def test_a_pretended_gpu_refuses_what_a_real_one_refuses(monkeypatch):
    x = torch.arange(6.0).view(2, 3)
    with pretended_gpu(monkeypatch):
        y = x.to("cuda")
        assert isinstance(y, There) and str((y + 1).device) == "cuda:0" and y.sum().item() == 15
        assert str(torch.zeros(2, device="cuda").device) == str(y.new_empty(1).device) == "cuda:0"
        assert y.cpu().device.type == "cpu" and torch.equal(y.cpu(), x)
        assert torch.equal(y[torch.tensor([1])].cpu(), x[1:])  # rows may be told by the CPU
        net = nn.Conv2d(3, 4, 3).to("cuda")  # the mistake of a network that is tried with a tensor of the CPU
        for mistake in (lambda: net(torch.zeros(1, 3, 8, 8)), lambda: y * x, lambda: torch.cat([x, y])):
            with pytest.raises(RuntimeError, match="tensors on one device"):
                mistake()
        with pytest.raises(TypeError, match="copy it to host memory"):
            y.numpy()


# stages walk


def test_a_model_is_loaded_and_describes_photos(monkeypatch, tmp_path, photos):
    paths, _ = photos
    sizes = [(128, 96) if i % 3 else (96, 128) for i in range(12)]
    card = dict(backbone="test_resnet", pooling="gem", dim=16)
    save_model(tmp_path / "m", make_model("test_resnet", "gem", 16), card)
    how = dict(scales=(0.75, 1), min_side=32, batch_size=3)
    want = extraction.extract(load_model(tmp_path / "m"), paths, sizes, **how)
    fetched, fetch = [], extraction._fetch
    monkeypatch.setattr(extraction, "_FETCH", 2)
    monkeypatch.setattr(extraction, "_fetch", lambda made, x: (fetched.append(len(made)), fetch(made, x)))
    with pretended_gpu(monkeypatch):
        model = load_model(tmp_path / "m", "cuda")
        assert {str(p.device) for p in (*model.parameters(), *model.buffers())} == {"cuda:0"}
        got = extraction.extract(model, paths, sizes, **how)
    assert fetched == [2, 2, 1]  # of five batches
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)
    assert got[1].tolist() == want[1].tolist() and got[2] == want[2]


def toy_trunk():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, stride=8, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
    return nn.Sequential(*layers).eval()


def test_delf_is_trained_kept_loaded_and_used(monkeypatch, tmp_path, photos):
    paths, labels = photos

    def features(device, folder):
        trunk = delf.Trunk(toy_trunk(), 8, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
        made, losses = delf.make_delf(trunk, paths, labels, 1, side=64, d=8, device=device, n_pca=2)
        delf.save_delf(made, folder, "toy")
        again = delf.load_delf(folder, device, toy_trunk().to(device))
        torch.testing.assert_close(again.trunk.mean.cpu(), made.trunk.mean.cpu())  # and not ImageNet's
        delf.extract_many_delf(again, paths[:4], range(4), folder / "local", device=device, n_threads=1)
        return losses, open_local(folder / "local")

    want_losses, want = features("cpu", tmp_path / "cpu")
    with pretended_gpu(monkeypatch):
        losses, got = features("cuda", tmp_path / "cuda")
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    for i in range(4):
        a, b = ({tuple(xy) for xy in f[i].xy.tolist()} for f in (got, want))
        assert len(b) > 10 and len(a & b) > 0.9 * max(len(a), len(b))


def trained(paths, labels, device, folder, optimizer, seen):
    "Weights after a few steps, a benchmark's look after each epoch, and a checkpoint."
    torch.manual_seed(0)
    net = engine.Training(make_model("test_resnet", "gem", 8), make_head("arcface", 8, torch.tensor([6, 6])))
    net.register_forward_pre_hook(lambda *_: seen.append(("step", torch.backends.cudnn.benchmark)))

    def look(model, epoch):
        seen.append(("look", torch.backends.cudnn.benchmark))
        return {}

    recipe = Recipe(epochs=2, batch_size=4, optimizer=optimizer, lr=1e-2, clip=1.0, n_loaders=0)
    trainer = engine.Trainer(net, Photos(paths, "64", "soft"), labels, recipe, folder, device, on_epoch=look)
    table = trainer.run()
    return {k: v.cpu() for k, v in net.state_dict().items()}, table


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_walks_and_looks_without_trying_out_convolutions(monkeypatch, tmp_path, photos, optimizer):
    from accelerate import Accelerator

    class OnGpu(Accelerator):
        device = torch.device("cuda", 0)

    seen = []
    want, table = trained(*photos, "cpu", tmp_path / "cpu", optimizer, [])
    monkeypatch.setattr(engine, "_accelerator", lambda recipe, device: OnGpu(cpu=True))
    with pretended_gpu(monkeypatch):
        got, again = trained(*photos, "cuda", tmp_path / "cuda", optimizer, seen)
    np.testing.assert_allclose(again.loss, table.loss, rtol=1e-3)
    for (
        k,
        v,
    ) in want.items():  # a bias before batch norm has a gradient of rounding alone, which AdamW enlarges
        if k not in ("model.fc.bias", "model.bn.running_mean"):
            torch.testing.assert_close(got[k], v, rtol=1e-3, atol=1e-4)
    assert {what for what, _ in seen} == {"step", "look"}
    assert all(tried == (what == "step") for what, tried in seen)  # sizes of a benchmark are too many to try


def test_a_base_that_fits_is_searched_and_settled_on_the_gpu(monkeypatch, tmp_path):
    r = np.random.default_rng(0)
    x = r.normal(size=(300, 24)).astype(np.float32)
    x[7] = x[250]  # two that are equal
    labels = np.sort(r.integers(0, 9, 300))
    ids = np.array([f"{i:016x}" for i in range(300)])
    store = write_store(tmp_path / "s", ids, x, dict(), 128, "float16")
    half = np.asarray(store.stored(slice(0, 300)))
    want, pairs = knn.search(x, half, 12, "cpu"), partners_among_all(np.arange(300), half, labels, 40, 9)
    settled = []
    monkeypatch.setattr(knn, "settle", lambda *a: settled.append(1) or settle(*a))
    for base in (half, store):
        with pretended_gpu(monkeypatch):
            got = knn.search(x, base, 12, "cuda", memory_mib=64)
            assert not settled and isinstance(got[1], np.ndarray)
            assert (partners_among_all(np.arange(300), base, labels, 40, 9, "cuda", 64) == pairs).all()
            assert not settled  # 2,032 candidates of each of four million images stay off the host
        np.testing.assert_array_equal(got[1], want[1])
        np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    with pretended_gpu(monkeypatch, mem_get_info=lambda *_: (half.nbytes, half.nbytes)):
        full = knn.search(x, half, 12, "cuda", memory_mib=64)
    assert settled  # no room: on the host
    np.testing.assert_array_equal(full[1], want[1])


def test_pairs_are_verified(monkeypatch, tmp_path, photos):
    paths, _ = photos
    store = open_local(extract_many(paths, range(12), tmp_path / "local", shard_size=5, n_workers=1))
    pairs = np.array([(i, j) for i in range(0, 12, 2) for j in range(12)])
    rule = replace(rule_for("rootsift"), n_trials=50, mutual=True)
    want = verify_pairs(store, pairs, rule, desc="")
    with pretended_gpu(monkeypatch):
        for cached in (verification_torch.fused, verification_torch.why_plain):
            cached.cache_clear()
        got = verify_pairs(store, pairs, rule, device="cuda", desc="")
        with pytest.raises(ParameterError, match="the fused kernels do not work on cuda .*set fused: false"):
            verify.run(verify.Config(world="tiny", device="cuda"))
        plain = verify._kernels(verify.Config(device="cuda", fused=False), rule)
    for cached in (verification_torch.fused, verification_torch.why_plain):
        cached.cache_clear()
    assert want[0].any() and plain["kernels"].startswith("plain PyTorch: ")  # the manifest says so
    for a, b in zip(got, want):
        np.testing.assert_array_equal(a, b)


# several GPUs


@pytest.mark.parametrize("share, frozen_bn, joined", [(4, False, True), (16, False, False), (4, True, False)])
def test_batch_norms_count_together_where_a_gpu_has_few_photos(share, frozen_bn, joined):
    torch.manual_seed(0)
    net = engine.Training(
        make_model("test_efficientnet", "gem", 8), make_head("arcface", 8, torch.tensor([3, 3]))
    ).eval()
    images, plain = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8), copy.deepcopy(net)
    before = list(net.parameters())
    self = SimpleNamespace(
        acc=SimpleNamespace(num_processes=8, device=torch.device("cuda", 0)),
        recipe=Recipe(batch_size=8 * share, frozen_bn=frozen_bn),
        net=net,
    )
    engine.Trainer.join_norms(self)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and {isinstance(m, nn.SyncBatchNorm) for m in norms} == {joined}
    assert all(a is b for a, b in zip(before, net.parameters()))  # the optimizer's
    assert net.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(net.model(images), plain.model(images))  # activations inside norms are kept


class Launches:
    "In the place of a kernel: notes on which GPU it is launched."

    def __init__(self):
        self.on = []

    def __getitem__(self, grid):
        return lambda *args, **how: self.on.append(torch.cuda.current_device())


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch):
    near, count = Launches(), Launches()
    monkeypatch.setattr(kernels, "_nearest", near)
    monkeypatch.setattr(kernels, "_count", count)
    a, n = torch.ones(2, 5, 40, dtype=torch.int8), torch.tensor([5, 4])
    maps, p, limit = torch.ones(2, 3, 6), torch.ones(2, 5, 2), torch.ones(2)
    with pretended_gpu(monkeypatch, 2):
        for device in ("cuda:1", "cuda:0"):
            kernels.two_nearest(a.to(device), n.to(device), a.to(device))
            kernels.count(maps.to(device), p.to(device), p.to(device), limit.to(device))
        assert torch.cuda.current_device() == 0
    assert near.on == count.on == [1, 0]


# kernels

COUNT = dict(maps="*fp32", p="*fp32", q="*fp32", limit="*fp32", out="*i32", t="i32", m="i32")
NEAREST = dict(a="*i8", b="*i8", na="*i64", out="*i64", ka="i32", kb="i32", d="i32")
BUILT = dict(  # kernel, types, constants, options; registers and bytes of shared memory at most
    count=("_count", COUNT, dict(T=64, B=32), dict(enable_fp_fusion=False), 128, 1024),
    delf=("_nearest", NEAREST, dict(D=64, B=64), {}, 160, 12288),
    rootsift=("_nearest", NEAREST, dict(D=128, B=64), {}, 192, 20480),
)


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("name", BUILT)
def test_kernels_compile_and_stay_in_registers(name, arch, tmp_path):
    "For Hopper and Blackwell, by Triton and its ptxas, which need no GPU."
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton has no cuobjdump")
    kernel, types, const, options, most_registers, most_shared = BUILT[name]
    types = {**types, **dict.fromkeys(const, "constexpr")}
    source = ASTSource(fn=getattr(kernels, kernel), signature=types, constexprs=const)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    (tmp_path / "k.cubin").write_bytes(made.asm["cubin"])
    said = subprocess.run(
        [tool, "-res-usage", tmp_path / "k.cubin"], capture_output=True, text=True, check=True
    )
    used = dict(x.split(":")[:2] for x in said.stdout.split() if x.startswith(("REG:", "STACK:", "LOCAL:")))
    assert int(used["REG"]) <= most_registers and made.metadata.shared <= most_shared, said.stdout
    assert int(used["STACK"]) == int(used["LOCAL"]) == 0, f"spilled: {said.stdout}"


def test_kernels_give_the_plain_numbers_at_odd_sizes():
    "In Triton's interpreter, which has to be chosen before Triton is imported."
    pytest.importorskip("triton")
    code = """
from landmark.parts.local import verification_triton as kernels, verification_torch as plain
for sizes in ((1, 2, 4, 128), (2, 66, 62, 40), (3, 20, 70, 33)):
    print(kernels.same_numbers('cpu', plain.two_nearest, plain.count_plain, sizes))"""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=600)
    assert r.stdout.split() == ["True"] * 3, r.stderr[-2000:]
