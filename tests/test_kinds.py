"Kinds of local features: one interface, the same counts on every path, and a sentence for what does not fit."

import numpy as np
import pytest
from PIL import Image
from test_verification import VIEWS, moved, wall

from landmark.parts.core import read_json, write_json
from landmark.parts.local.features import (
    LocalFeatures,
    extract,
    extract_many,
    open_local,
    open_meta,
    write_shard,
)
from landmark.parts.local.kinds import kind_of, rule_for
from landmark.parts.local.verification import verify, verify_pairs
from landmark.parts.nets.weights import WEIGHTS, weights_here

KINDS = ("rootsift", "xfeat", "aliked", "delf")
needs_xfeat = pytest.mark.skipif("xfeat" not in weights_here(), reason="the weights of XFeat are not here")


def drawn(kind, k, seed, xy=None, same=False):
    "Local features at random, or all of them one."
    rng = np.random.default_rng(seed)
    d = kind_of(kind).d
    desc = (
        np.abs(rng.normal(size=(1 if same else k, d)))
        if kind == "rootsift"
        else rng.normal(size=(1 if same else k, d))
    )
    desc = np.broadcast_to(desc / np.linalg.norm(desc, axis=1, keepdims=True), (k, d))
    xy = rng.uniform(0, 300, (k, 2)) if xy is None else xy
    return LocalFeatures(np.float32(xy), np.float32(desc), np.ones(k), (320, 240), kind)


def stored(folder, kind, fs):
    open_meta(folder, range(len(fs)), len(fs), kind=kind, max_keypoints=max(len(f) for f in fs))
    write_shard(folder / "00000", [(f, 1, "") for f in fs], kind, kind_of(kind).d)
    return open_local(folder)


def everybody(n):
    return np.array([(i, j) for i in range(n) for j in range(n)])


@pytest.mark.parametrize("kind", KINDS)
def test_every_path_counts_alike(kind, tmp_path):
    "Noisy copies with ties and strangers; the loop, one thread or three, and batched PyTorch."
    base = drawn(kind, 300, 0)
    fs = [base, drawn(kind, 0, 1), drawn(kind, 1, 2)]
    for seed in (3, 4):
        rng = np.random.default_rng(seed)
        keep = rng.permutation(300)[:200]
        noisy = base.desc[keep] + rng.normal(0, 0.03, (200, base.desc.shape[1]))
        desc = np.concatenate([noisy / np.linalg.norm(noisy, axis=1, keepdims=True), base.desc[keep[:40]]])
        xy = np.concatenate([base.xy[keep] * 0.8 + 20, base.xy[keep[:40]]])
        fs.append(LocalFeatures(np.float32(xy), np.float32(desc), np.ones(240), (320, 240), kind))
    store, pairs = stored(tmp_path / "s", kind, fs), everybody(len(fs))
    want = verify_pairs(store, pairs, n_threads=1, desc="")
    assert want[1].reshape(5, 5)[0, 3] > 150
    for how in (dict(n_threads=3), dict(device="torch"), dict(device="torch", memory_mib=1)):
        for a, b in zip(want, verify_pairs(store, pairs, desc="", **how)):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_thousands_of_identical_keypoints_verify_nothing(kind, tmp_path):
    at_one_place = drawn(kind, 4000, 0, np.full((4000, 2), 100.0), same=True)
    all_alike = drawn(kind, 4000, 0, same=True)
    store = stored(tmp_path / "s", kind, [at_one_place, all_alike, drawn(kind, 500, 1)])
    _, loop = verify_pairs(store, everybody(3), desc="")
    _, batched = verify_pairs(store, everybody(3), device="torch", desc="")
    np.testing.assert_array_equal(loop, batched)
    assert (loop.reshape(3, 3)[:2, :2] < 12).all() and loop[-1] >= 490


@needs_xfeat
def test_a_folder_of_all_sorts(tmp_path):
    "Walls, a blank wall, a picture smaller than the stride, a text file; one process or two."
    photos = dict(
        a=wall(0), b=moved(wall(0), VIEWS[1]), blank=np.full((64, 64, 3), 99, np.uint8), tiny=wall(1)[:20]
    )
    for name, im in photos.items():
        Image.fromarray(im).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no image")
    ids = [*photos, "text"]
    paths = [tmp_path / f"{i}.png" for i in ids]
    one = open_local(extract_many(paths, ids, tmp_path / "one", "xfeat", 500, shard_size=3, n_workers=1))
    two = open_local(extract_many(paths, ids, tmp_path / "two", "xfeat", 500, shard_size=3, n_workers=2))
    for i in range(5):
        for a, b in zip((one[i].desc, one[i].xy), (two[i].desc, two[i].xy)):
            np.testing.assert_array_equal(a, b)
    reasons = dict(zip(one.skipped().image_id, one.skipped().reason))
    assert reasons["tiny"] == "320×20 pixels: xfeat needs a side of 32 at least"
    assert reasons["blank"] == "no keypoints" and "not an image" in reasons["text"]
    n = verify_pairs(one, [(0, 1), (1, 0), (0, 2), (3, 4)], desc="")[1]
    assert n[:2].min() > 40 and n[2:].max() == 0
    assert one.meta["weights"] == WEIGHTS["xfeat"].sha256


@needs_xfeat
def test_other_weights_are_refused(tmp_path):
    Image.fromarray(wall(0)).save(tmp_path / "a.png")
    stores = [tmp_path / "new", tmp_path / "old"]
    for s in stores:
        extract_many([tmp_path / "a.png"], ["a"], s, "xfeat", 100, n_workers=1)
    write_json(stores[1] / "meta.json", read_json(stores[1] / "meta.json") | dict(weights="0123"))
    with pytest.raises(ValueError, match="made otherwise"):
        extract_many([tmp_path / "a.png"], ["a"], stores[1], "xfeat", 100, n_workers=1)
    with pytest.raises(ValueError, match="of weights 0f51.*cannot be compared"):
        verify_pairs(open_local(stores[0]), [(0, 0)], store_b=open_local(stores[1]), desc="")


def test_what_does_not_fit_gets_a_sentence(tmp_path):
    Image.fromarray(wall(0)).save(tmp_path / "a.png")
    for kind, says in (
        ("surf", "no local features of kind 'surf'; allowed: rootsift"),
        ("delf", "trained here"),
    ):
        with pytest.raises(ValueError, match=says):
            extract_many([tmp_path / "a.png"], ["a"], tmp_path / "no", kind, n_workers=1)
    assert not (tmp_path / "no").exists()
    extract_many([tmp_path / "a.png"], ["a"], tmp_path / "sift", n_workers=1)
    for changed in (dict(kind="xfeat"), dict(max_keypoints=2000), dict(min_side=480)):
        with pytest.raises(ValueError, match="made otherwise"):
            extract_many([tmp_path / "a.png"], ["a"], tmp_path / "sift", **changed)
    sift, other = open_local(tmp_path / "sift"), stored(tmp_path / "x", "xfeat", [drawn("xfeat", 5, 0)])
    for device in ("cpu", "torch"):
        with pytest.raises(ValueError, match="of kind rootsift, .* of xfeat: they cannot be compared"):
            verify_pairs(sift, [(0, 0)], store_b=other, device=device, desc="")


def test_an_enlarged_picture_has_places_of_its_own_size():
    small = wall(3, 160, 200)
    plain, large = extract(small), extract(small, min_side=400)
    assert large.size == plain.size == (200, 160) and len(large) > len(plain)
    assert (large.xy >= 0).all() and (large.xy < large.size).all()
    assert verify(plain, large).n_inliers > 15
    centre = verify(plain, large).affine @ [100, 80, 1]
    np.testing.assert_allclose(centre, [100, 80], atol=1)


@needs_xfeat
def test_a_network_may_match():
    a, b, c = (extract(im, "xfeat", 400) for im in (wall(0), moved(wall(0), VIEWS[1]), wall(9)))
    by_network = rule_for("xfeat", matcher="lighterglue")
    right, wrong = (verify(a, x, by_network).n_inliers for x in (b, c))
    assert right > 60 and right > 5 * wrong
