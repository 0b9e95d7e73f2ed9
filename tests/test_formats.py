"Files of others: what hloc's own readers see in ours, and whole models under the names of their own code."

import re
import sys
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from landmark.parts.core import ParameterError
from landmark.parts.data.layout import image_paths, read_ids
from landmark.parts.data.worlds import make_world
from landmark.parts.descriptors.store import StoreError, l2n, write_store
from landmark.parts.exchange import hloc, models
from landmark.parts.local.features import extract, extract_many, open_local
from landmark.parts.local.verification import verify
from landmark.parts.nets.checkpoints import load_model
from landmark.parts.nets.fishnet import fishnet150
from landmark.parts.nets.pooling import gem
from landmark.parts.nets.state_dicts import load_weights
from landmark.parts.search.knn import search

# hloc's readers, written down from its format (hloc/utils/io.py, parsers.py, pairs_from_retrieval.py)


def list_h5_names(path):
    names = []
    with h5py.File(str(path), "r") as fd:
        fd.visititems(
            lambda _, x: names.append(x.parent.name.strip("/")) if isinstance(x, h5py.Dataset) else None
        )
    return list(set(names))


def names_to_pair(name0, name1):
    return "/".join((name0.replace("/", "-"), name1.replace("/", "-")))


def get_matches(path, name0, name1):
    with h5py.File(str(path), "r") as f:
        pair, back = names_to_pair(name0, name1), names_to_pair(name1, name0)
        reverse = pair not in f
        group = f[back if reverse else pair]
        matches, scores = group["matches0"].__array__(), group["matching_scores0"].__array__()
    idx = np.where(matches != -1)[0]
    pairs = np.stack([idx, matches[idx]], -1)
    return (np.flip(pairs, -1) if reverse else pairs), scores[idx]


def parse_retrieval(path):
    found = {}
    for line in Path(path).read_text().rstrip("\n").split("\n"):
        q, r = line.split()
        found.setdefault(q, []).append(r)
    return found


def features(path, name):
    "As its matchers get them."
    with h5py.File(path, "r") as f:
        group = f[name]
        out = {k: torch.from_numpy(v.__array__()).float() for k, v in group.items()}
        out["image"] = torch.empty((1, *tuple(group["image_size"])[::-1]))
        out["uncertainty"] = group["keypoints"].attrs.get("uncertainty")
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Two halves of one drawn photo that share most of it, another photo, and their local features."
    home, world = tmp_path_factory.mktemp("photos"), make_world("tiny")
    paths = image_paths(world, "index", read_ids(world, "index")[:2])
    whole = Image.open(paths[0]).convert("RGB")
    whole = whole.resize((2 * whole.width, 2 * whole.height), Image.LANCZOS)
    names = ["db/one.jpg", "db/two.jpg", "query/one.jpg"]
    w, h = whole.size
    for name, im in zip(names, (whole, Image.open(paths[1]).convert("RGB"), whole.crop((w // 8, 0, w, h)))):
        (home / name).parent.mkdir(exist_ok=True)
        im.save(home / name, quality=95)
    out = extract_many(
        [home / n for n in names], hloc.ids_of(names), home / "local", max_side=w // 2, n_workers=1
    )
    return home, names, open_local(out), w // 8


def test_hloc_reads_our_local_features(photos, tmp_path):
    home, names, store, _ = photos
    assert hloc.write_local(store, tmp_path / "f.h5", names, hloc.sizes_of(home, names)) == 3
    assert sorted(list_h5_names(tmp_path / "f.h5")) == sorted(names)
    for i, name in enumerate(names):
        f, size = features(tmp_path / "f.h5", name), Image.open(home / name).size
        n = len(store[i])
        assert (
            f["keypoints"].shape == (n, 2)
            and f["descriptors"].shape == (128, n)
            and f["scores"].shape == (n,)
        )
        assert f["image"].shape == (1, size[1], size[0]) and f["image_size"].tolist() == list(size)
        assert (f["keypoints"] >= 0).all() and (f["keypoints"] < f["image_size"]).all()
        assert f["uncertainty"] == pytest.approx(size[0] / store[i].size[0], rel=0.01)
    # its nearest neighbours (both ways, ratio 0.8) find what the shift of the crop says
    a, b = features(tmp_path / "f.h5", names[0]), features(tmp_path / "f.h5", names[2])
    sim = a["descriptors"].T @ b["descriptors"]
    near = sim.topk(2, 1)
    both = sim.argmax(0)[near.indices[:, 0]] == torch.arange(len(sim))
    clear = 2 * (1 - near.values[:, 0]) <= 0.8**2 * 2 * (1 - near.values[:, 1])
    at = torch.nonzero(both & clear).flatten()
    shift = a["keypoints"][at] - b["keypoints"][near.indices[at, 0]]
    assert len(at) > 30 and (shift - torch.tensor([photos[3], 0.0])).abs().median(0).values.max() < 2


def test_hloc_reads_our_matches(photos, tmp_path):
    home, names, store, _ = photos
    pairs = np.array([[2, 0], [0, 2], [0, 1]])
    table = hloc.write_matches(store, pairs, tmp_path / "m.h5", names, min_inliers=15)
    assert parse_retrieval(tmp_path / "m.txt") == {names[2]: [names[0]]}
    assert table[["name0", "name1"]].values.tolist() == [[names[2], names[0]]]
    there, scores = get_matches(tmp_path / "m.h5", names[2], names[0])
    back, _ = get_matches(tmp_path / "m.h5", names[0], names[2])
    assert there.tolist() == back[:, ::-1].tolist() and len(there) == table.n_matches[0]
    inliers = {tuple(p) for p in verify(store[2], store[0]).inliers.tolist()}
    assert {tuple(p) for p in there.tolist()} <= inliers
    assert len({p[0] for p in inliers}) == len(there)  # every keypoint that has an inlier has one match
    assert (scores > 0.5).all() and (scores <= 1).all()


def test_hloc_retrieves_by_our_descriptors(tmp_path):
    rng = np.random.default_rng(0)
    x, ids = l2n(rng.normal(size=(40, 16))), [f"{i:04d}" for i in range(40)]
    store = write_store(tmp_path / "d", ids, x, {}, shard_size=16, dtype="float32")
    names = [f"{'query' if i < 5 else 'db'}/{ids[i]}.jpg" for i in range(40)]
    hloc.write_global(store, tmp_path / "g.h5", names, "float32")
    assert sorted(list_h5_names(tmp_path / "g.h5")) == sorted(names)
    with h5py.File(tmp_path / "g.h5") as f:
        q, db = (
            torch.from_numpy(np.stack([f[n]["global_descriptor"].__array__() for n in some])).float()
            for some in (names[:5], names[5:])
        )
    top = torch.topk(torch.einsum("id,jd->ij", q, db), 10, dim=1).indices.numpy()
    assert (top == search(x[:5], x[5:], 10)[1]).all()


def test_descriptors_of_hloc_are_searched_here(tmp_path):
    rng = np.random.default_rng(1)
    x = l2n(rng.normal(size=(30, 64)))
    with h5py.File(tmp_path / "global-feats-netvlad.h5", "a", libver="latest") as f:
        for i in rng.permutation(30):
            group = f.create_group(f"{'q' if i < 4 else 'db'}/sub/{i}.jpg")
            group.create_dataset("global_descriptor", data=x[i].astype(np.float16))
            group.create_dataset("image_size", data=np.array([640, 480]))
    s = hloc.read_global(tmp_path / "global-feats-netvlad.h5", tmp_path / "s", dtype="float32")
    assert sorted(s.ids, key=int) == [str(i) for i in range(30)]
    order = np.array(s.ids, int)
    assert np.abs(s[:] - x[order]).max() < 1e-3
    near = order[search(s[:], s[:], 3)[1]]
    half = x.astype(np.float16).astype(np.float32)
    assert (near[np.argsort(order)] == np.argsort(-half @ half.T, 1, kind="stable")[:, :3]).all()
    hloc.write_global(s, tmp_path / "back.h5")
    assert sorted(list_h5_names(tmp_path / "back.h5")) == sorted(
        list_h5_names(tmp_path / "global-feats-netvlad.h5")
    )


def test_local_features_of_hloc_are_verified_here(photos, tmp_path):
    "Written as hloc writes them: found in a reduced photo, told in the photo's own pixels, halved."
    home, names, _, shift = photos
    with h5py.File(tmp_path / "feats-sift.h5", "a", libver="latest") as f:
        for name in names:
            photo = Image.open(home / name)
            small = photo.resize((round(photo.width * 0.6), round(photo.height * 0.6)), Image.BOX)
            found = extract(np.asarray(small))
            scale = np.divide(photo.size, small.size).astype(np.float32)
            group = f.create_group(name)
            pred = dict(
                keypoints=(found.xy + 0.5) * scale - 0.5, descriptors=found.desc.T, scores=found.scores
            )
            for k, v in pred.items():
                group.create_dataset(k, data=v.astype(np.float16))
            group.create_dataset("image_size", data=np.array(photo.size))
            group["keypoints"].attrs["uncertainty"] = scale.mean()
    store = hloc.read_local(tmp_path / "feats-sift.h5", tmp_path / "local", "rootsift")
    assert (
        store.ids == ["db-one", "db-two", "query-one"] and store[0].size == Image.open(home / names[0]).size
    )
    same, other = verify(store[0], store[2]), verify(store[0], store[1])
    assert same.n_inliers > 30 > 3 * other.n_inliers
    assert same.affine == pytest.approx(np.array([[1, 0, -shift], [0, 1, 0]]), abs=3)
    hloc.write_local(store, tmp_path / "back.h5")
    a, b = (features(tmp_path / f, names[1]) for f in ("feats-sift.h5", "back.h5"))
    assert (a["keypoints"] - b["keypoints"]).abs().max() < 1 and a["image_size"].equal(b["image_size"])


def test_a_file_that_hloc_was_killed_over_leaves_nothing(photos, tmp_path):
    home, names, store, _ = photos
    hloc.write_local(store, tmp_path / "f.h5", names)
    content = (tmp_path / "f.h5").read_bytes()
    for n in (0, 100, len(content) // 2, len(content) - 50):
        (tmp_path / "cut.h5").write_bytes(content[:n])
        with pytest.raises(StoreError, match=r"cut\.h5"):
            hloc.read_local(tmp_path / "cut.h5", tmp_path / "out", "rootsift")
        assert not (tmp_path / "out").exists()


def test_hloc_as_a_command(photos, tmp_path, capsys):
    home, names, store, _ = photos
    for line, says in (
        (f"out {store.path} {tmp_path / 'o'} --photos {home}", "local.h5"),
        (f"in {tmp_path / 'o/local.h5'} {tmp_path / 'i'} --kind rootsift", "i"),
    ):
        with mock.patch.object(sys, "argv", ["landmark_hloc", *line.split()]):
            hloc.main()
        assert capsys.readouterr().out.rstrip().endswith(says)
    assert len(open_local(tmp_path / "i")) == 3


# whole models


def saved(path, state, **beside):
    torch.save(dict(state_dict=state, **beside), path)
    return path


def trained(net, seed=0):
    "A network as if it had learned something."
    torch.manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, 0.1), m.running_var.uniform_(0.8, 1.2), m.weight.data.uniform_(0.8, 1.2)
    return net.eval()


@pytest.fixture(scope="module")
def resnet():
    "A ResNet of torchvision with bottlenecks; timm calls it resnet26."
    return trained(torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [2, 2, 2, 2]))


@pytest.fixture(scope="module")
def head():
    return trained(nn.ModuleDict(dict(fc=nn.Linear(2048, 64), bn=nn.BatchNorm1d(64))), 1)


IMAGES = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def maps(resnet):
    "What a ResNet of torchvision makes of RGB photos."
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        return nn.Sequential(*list(resnet.children())[:-2])((IMAGES / 255 - mean) / std)


def same(model, wanted):
    with torch.inference_mode():
        got = model(IMAGES)
    assert wanted.isfinite().all() and torch.allclose(got, wanted, rtol=1e-3, atol=1e-4), (
        (got - wanted).abs().max()
    )


def numbered(net):
    "What is left of a network, as the original and cirtorch cut it."
    return nn.Sequential(*list(net.children())[:-2]).state_dict()


@pytest.mark.parametrize("wrapped", ["", "module."])
def test_the_originals_resnet(resnet, head, tmp_path, wrapped):
    "LandmarkNet: `backbone.0.weight`, `backbone.4.0.conv1.weight` …, `pooling.p`, `fc`, `bn`, `final`."
    state = {f"backbone.{k}": v for k, v in numbered(resnet).items()} | head.state_dict()
    state |= {"pooling.p": torch.tensor([2.5]), "final.weight": torch.ones(7, 64)}
    state = {wrapped + k: v for k, v in state.items()}
    assert wrapped + "backbone.7.1.bn3.running_var" in state and wrapped + "backbone.1.weight" in state
    path = saved(tmp_path / "ep4.pth", state, epoch=4, optimizer={}, params=dict(model_name="resnet26"))
    model = load_model(models.take_model(path, tmp_path / "m", "resnet26"))
    with torch.inference_mode():
        same(model, head["bn"](head["fc"](gem(maps(resnet), torch.tensor([2.5])))))
    bare = timm.create_model("resnet26", num_classes=0)
    assert any(
        "final" in k for k in load_weights(bare, path, quiet=True)
    )  # 03_train's `weights` takes it, too
    assert torch.equal(bare.layer4[1].bn3.running_var, resnet.layer4[1].bn3.running_var)


def test_the_originals_senet(tmp_path, capsys):
    "pretrainedmodels' SE-ResNeXt, cut: `backbone.0.conv1`, `backbone.1.0.se_module.fc1`; GeM is fixed."
    net = trained(timm.create_model("legacy_seresnext26_32x4d"))
    state = {
        re.sub(r"^layer(\d)", r"backbone.\1", k): v
        for k, v in net.state_dict().items()
        if "last_linear" not in k
    }
    assert "backbone.1.0.se_module.fc1.weight" in state and "backbone.0.conv1.weight" in state
    own = nn.ModuleDict(dict(fc=nn.Linear(2048, 32), bn=nn.BatchNorm1d(32))).state_dict()
    path = saved(tmp_path / "ep6.pth", state | own | {"final.W": torch.ones(7, 32)})
    model = load_model(models.take_model(path, tmp_path / "m", "legacy_seresnext26_32x4d"))
    for k, v in net.state_dict().items():
        assert k.startswith("last_linear") or torch.equal(model.backbone.net.state_dict()[k], v), k
    assert model.pool.p.item() == 3 and "stays 3" in "".join(capsys.readouterr())


def test_the_originals_fishnet(tmp_path):
    "LandmarkFishNet pools 2,112 channels of the last map; what made the scores lies in the file, unused."
    state = {f"backbone.{k}": v for k, v in fishnet150().state_dict().items()}
    state |= {
        "backbone.fish.fish.9.4.1.weight": torch.ones(1000, 1056, 1, 1),
        "backbone.fish.fish.9.4.1.bias": torch.ones(1000),
    }
    own = nn.ModuleDict(dict(fc=nn.Linear(4864, 512), bn=nn.BatchNorm1d(512))).state_dict()
    path = saved(tmp_path / "ep4.pth", state | own | {"final.weight": torch.ones(7, 512)})
    model = load_model(models.take_model(path, tmp_path / "m", "fishnet150_wide", "G,G,G,G"))
    for k, v in model.backbone.net.state_dict().items():
        assert torch.equal(v, state[f"backbone.{k}"]), k
    assert torch.equal(model.fc.weight, own["fc.weight"])
    with pytest.raises(ParameterError, match=r"fc\.weight \(512, 4864\) instead of \(512, 3808\)"):
        models.take_model(path, tmp_path / "n", "fishnet150", "G,G,G,G")
    assert not (tmp_path / "n").exists()


def as_delg(net, blocks=(2, 2, 2, 2)):
    "A ResNet under pycls' names, for photos from blue to red."
    state, own = {}, net.state_dict()

    def put(theirs, ours):
        for k, v in own.items():
            if k.startswith(f"{ours}."):
                state[f"{theirs}.{k.removeprefix(ours + '.')}"] = v

    put("stem.conv", "conv1"), put("stem.bn", "bn1")
    state["stem.conv.weight"] = state["stem.conv.weight"].flip(1)
    for s, n in enumerate(blocks, 1):
        for b in range(n):
            there, here = f"s{s}.b{b + 1}", f"layer{s}.{b}"
            put(f"{there}.proj", f"{here}.downsample.0"), put(f"{there}.bn", f"{here}.downsample.1")
            for x, i in zip("abc", "123"):
                put(f"{there}.f.{x}", f"{here}.conv{i}"), put(f"{there}.f.{x}_bn", f"{here}.bn{i}")
    return state


def test_a_trunk_that_kept_its_classifier(resnet, head, tmp_path):
    "`self.backbone = resnet50()` keeps ImageNet's thousand classes; the head is the layer beside it."
    state = {f"backbone.{k}": v for k, v in resnet.state_dict().items()} | head.state_dict()
    path = saved(tmp_path / "own.pth", state | {"pool.p": torch.tensor([3.0])})
    assert "backbone.fc.weight" in state and models.head_size(path) == 64
    model = load_model(models.take_model(path, tmp_path / "m", "resnet26"))
    assert torch.equal(model.fc.weight, state["fc.weight"])


def test_delg(resnet, head, tmp_path):
    "feymanpriv/DELG: `globalmodel.s1.b1.f.a.weight` …, its head in the trunk, no batch norm behind it."
    state = as_delg(resnet) | {"head.pool.p": torch.tensor([2.7])}
    state |= {f"head.fc.{k}": v for k, v in head["fc"].state_dict().items()}
    alone = saved(tmp_path / "alone.pyth", state)
    state = {f"globalmodel.{k}": v for k, v in state.items()}
    local = nn.ModuleDict(
        dict(conv1=nn.Conv2d(1024, 512, 1), bn=nn.BatchNorm2d(512), conv2=nn.Conv2d(512, 1, 1))
    )
    state |= {f"localmodel.{k}": v for k, v in local.state_dict().items()}
    state |= {"desc_cls.weight": torch.ones(9, 64), "desc_cls.t": torch.zeros(1)}
    state |= {f"att_cls.fc.{k}": v for k, v in nn.Linear(512, 9).state_dict().items()}
    torch.save(
        dict(model_state=state, epoch=3, optimizer_state={}, cfg="MODEL: {}"),
        tmp_path / "model_epoch_0100.pyth",
    )
    with torch.inference_mode():
        wanted = head["fc"](gem(maps(resnet), torch.tensor([2.7])))
    for k, path in enumerate((tmp_path / "model_epoch_0100.pyth", alone)):
        same(load_model(models.take_model(path, tmp_path / f"m{k}", "resnet26")), wanted)


def test_cirtorch_without_its_whitening(resnet, tmp_path):
    "ImageRetrievalNet: `features.0.weight` …, `pool.p`, `whiten`; a length of 1 before that is not here."
    state = {f"features.{k}": v for k, v in numbered(resnet).items()} | {"pool.p": torch.tensor([2.9])}
    path = saved(tmp_path / "gl18.pth", state, meta=dict(architecture="resnet26", mean=[0.485, 0.456, 0.406]))
    same(
        load_model(models.take_model(path, tmp_path / "m", "resnet26")),
        gem(maps(resnet), torch.tensor([2.9])),
    )
    white = {f"whiten.{k}": v for k, v in nn.Linear(2048, 2048).state_dict().items()}
    path = saved(tmp_path / "gl18w.pth", state | white)
    with pytest.raises(
        ParameterError, match=r"2 of \d+ entries have no place here: whiten\.weight, whiten\.bias"
    ):
        models.take_model(path, tmp_path / "n", "resnet26")
    assert models.take_model(path, tmp_path / "n", "resnet26", strict=False).exists()


def test_torchvisions_and_timms_trunks(resnet, tmp_path):
    torch.save(resnet.state_dict(), tmp_path / "tv.pth")
    assert {"layer1.0.downsample.1.running_mean", "fc.weight"} <= resnet.state_dict().keys()
    same(
        load_model(models.take_model(tmp_path / "tv.pth", tmp_path / "m", "resnet26")),
        gem(maps(resnet), torch.tensor([3.0])),
    )
    with pytest.raises(
        ParameterError, match=r"is another model: \d+ of \d+ entries are missing: .*have other shapes"
    ):
        models.take_model(tmp_path / "tv.pth", tmp_path / "n", "resnet50")
