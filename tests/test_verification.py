"""Verification against OpenCV and scikit-image, and whatever a photo collection may contain."""

import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from landmark.parts.local.features import (
    LocalFeatures,
    extract,
    extract_many,
    open_local,
    open_meta,
    pack,
    write_shard,
)
from landmark.parts.local.kinds import rule_for
from landmark.parts.local.matching import Prepared, match, ransac, sample_stream
from landmark.parts.local.verification import draw_matches, verify, verify_pairs
from landmark.parts.local.verification_torch import verify_pairs_torch

rng = np.random.default_rng(5)
RULE = rule_for("rootsift")


def wall(seed, h=240, w=320):
    r = np.random.default_rng(seed)
    im = np.full((h, w, 3), 170, np.uint8)
    for _ in range(140):
        x, y, s = int(r.integers(0, w)), int(r.integers(0, h)), int(r.integers(4, 24))
        cv2.rectangle(im, (x, y), (x + 2 * s, y + s), tuple(int(c) for c in r.integers(20, 250, 3)), -1)
    return im


def moved(im, M, seed=0):
    out = cv2.warpAffine(im, np.float64(M), im.shape[1::-1], borderValue=(90, 90, 90)).astype(float)
    return np.clip(out + np.random.default_rng(seed).normal(0, 4, out.shape), 0, 255).astype(np.uint8)


VIEWS = [[[1, 0, 0], [0, 1, 0]], [[0.8, -0.2, 60], [0.2, 0.85, 5]], [[0.9, 0.15, 10], [-0.2, 0.85, 40]]]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    d = tmp_path_factory.mktemp("photos")
    for i in range(9):
        Image.fromarray(moved(wall(i // 3), VIEWS[i % 3], i)).save(d / f"{i}.png")
    return open_local(
        extract_many([d / f"{i}.png" for i in range(9)], range(9), d / "local", shard_size=4, n_workers=1)
    )


PAIRS = np.array([(i, j) for i in range(9) for j in range(9)])


# oracles


def test_matches_like_opencv():
    a, b = extract(wall(0)), extract(moved(wall(0), VIEWS[1]))
    da, db = pack(a)[0].astype(np.float32), pack(b)[0].astype(np.float32)
    want = [
        (m.trainIdx, m.queryIdx)
        for m, n in cv2.BFMatcher(cv2.NORM_L2).knnMatch(db, da, k=2)
        if m.distance < RULE.ratio * n.distance
    ]
    assert list(zip(*match(Prepared(a), Prepared(b), RULE))) == want and len(want) > 50
    want = [(m.trainIdx, m.queryIdx) for m in cv2.BFMatcher(cv2.NORM_L2, crossCheck=True).match(db, da)]
    ours = set(zip(*match(Prepared(a), Prepared(b), replace(RULE, ratio=0, mutual=True))))
    assert len(ours ^ set(want)) <= 0.02 * len(want)  # equal distances, broken differently


def planted(share, n=400, seed=0, M=((0.9, -0.2, 40), (0.1, 1.1, -25))):
    r = np.random.default_rng(seed)
    p = r.uniform(0, 800, (n, 2))
    M = np.array(M)
    good = int(share * n)
    q = p @ M[:, :2].T + M[:, 2] + r.normal(0, 1.5, p.shape)
    q[good:] = r.uniform(0, 800, (n - good, 2))
    return np.float32(p), np.float32(q), M


def columns(p, q):
    "x, y, u, v as `ransac` takes them."
    return np.ascontiguousarray(np.hstack([p, q]).astype(np.float32).T)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.8])
def test_ransac_like_opencv_and_scikit_image(share):
    from skimage.measure import ransac as sk_ransac
    from skimage.transform import AffineTransform

    p, q, M = planted(share, seed=int(share * 10))
    n, model, mask = ransac(*columns(p, q), sample_stream(1000), np.float32(100), True, 5.0, 4.0, 8)
    ours = model.reshape(2, 3)
    how = dict(method=cv2.RANSAC, ransacReprojThreshold=10, maxIters=1000, confidence=0.9999, refineIters=0)
    cv_mask = cv2.estimateAffine2D(p, q, **how)[1]
    how = dict(min_samples=3, residual_threshold=10, max_trials=1000, rng=0)
    sk = sk_ransac((p, q), AffineTransform, **how)[1]
    right = np.linalg.norm(p @ M[:, :2].T + M[:, 2] - q, axis=1) < 10
    for other in (cv_mask.sum(), sk.sum(), right.sum()):
        assert abs(int(n) - int(other)) <= 0.06 * right.sum() + 3
    assert mask.sum() == n and (mask & right).sum() >= 0.94 * right.sum()
    residual = np.linalg.norm(p[mask] @ ours[:, :2].T + ours[:, 2] - q[mask], axis=1)
    assert (residual < 10 + 1e-3).all()  # the mask belongs to the map


def test_ransac_is_the_best_of_its_samples():
    "Word by word: every sample's map, every residual, in float64."
    p, q, _ = planted(0.3, n=60)
    stream = sample_stream(200)
    from landmark.parts.local.matching import _three

    counts = []
    for r in stream:
        t = list(_three(r, 60))
        A = np.c_[p[t], np.ones(3)].astype(float)
        if abs(np.linalg.det(A)) < 1e-9:
            continue
        X = np.linalg.solve(A, q[t].astype(float))
        counts.append((np.linalg.norm(np.c_[p, np.ones(60)] @ X - q, axis=1) < 10).sum())
    n, _, _ = ransac(*columns(p, q), stream, np.float32(100), False, 5.0, 4.0, 0)
    assert n == max(counts)


# the same pair, the same count


def test_counts_depend_on_the_pair_alone(store):
    want = verify_pairs(store, PAIRS, n_threads=1, desc="")
    alike = PAIRS[:, 0] // 3 == PAIRS[:, 1] // 3
    assert want[1][alike].min() > 20 and want[1][~alike].max() < 14
    order = rng.permutation(len(PAIRS))
    for threads, kept in ((1, 1), (2, 64), (5, 2)):
        got = verify_pairs(store, PAIRS[order], n_threads=threads, n_kept=kept, desc="")
        for a, b in zip(got, want):
            np.testing.assert_array_equal(a, b[order])
    for cut in (1, 7):
        parts = [verify_pairs(store, x, desc="")[1] for x in np.array_split(PAIRS, cut)]
        np.testing.assert_array_equal(np.concatenate(parts), want[1])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(reject=False),
        dict(mutual=True),
        dict(ratio=0.0, max_dist=0.7),
        dict(n_trials=100, residual=0.03),
    ],
)
def test_pytorch_and_the_compiled_loop_agree(store, changes):
    rule = replace(RULE, **changes)
    want = verify_pairs(store, PAIRS, rule, desc="")
    for mib in (30, 1024):
        for a, b in zip(verify_pairs_torch(store, PAIRS, rule, memory_mib=mib), want):
            np.testing.assert_array_equal(a, b)


def test_fused_kernels_compile_for_a_gpu_without_fused_multiply_add():
    "Triton compiles for a GPU that is not there; what it writes must round like the plain path."
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from landmark.parts.local import verification_triton as kernels

    def made(fn, names, **const):
        return ASTSource(fn=fn, signature={**names, **dict.fromkeys(const, "constexpr")}, constexprs=const)

    places = dict(maps="*fp32", p="*fp32", q="*fp32", limit="*fp32", out="*i32", t="i32", m="i32")
    count = made(kernels._count, places, T=64, B=32)
    features = dict(a="*i8", b="*i8", na="*i64", out="*i64", ka="i32", kb="i32", d="i32")
    near = made(kernels._nearest, features, D=64, B=64)

    def compile(src, **options):
        return triton.compile(src, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

    try:
        plain, fused, ptx = compile(count, enable_fp_fusion=False), compile(count), compile(near)
    except Exception as e:
        pytest.skip(f"Triton cannot compile here: {e}")
    assert "fma.rn.f32" not in plain and "fma.rn.f32" in fused
    assert ".s32.s8.s8" in ptx  # 8-bit products, whole sums


def test_rescaled_photos_keep_their_rule():
    "Thresholds are shares of the side: the same photo at twice the size has about the same count."
    small = [wall(3), moved(wall(3), VIEWS[1])]
    large = [cv2.resize(x, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC) for x in small]
    n = [verify(*[extract(x, max_keypoints=400) for x in pair]).n_inliers for pair in (small, large)]
    assert 0.6 < n[1] / n[0] < 1.7


# degenerate maps


def points(p, q):
    return ransac(*columns(p, q), sample_stream(1000), np.float32(100), True, 5.0, 4.0, 8)[0]


@pytest.mark.parametrize(
    "M, fits",
    [
        ([[1, 0], [0, 1]], True),
        ([[0, -1], [1, 0]], True),
        ([[4, 0], [0, 4]], True),
        ([[0.25, 0], [0, 0.25]], True),
        ([[1.8, 0], [0, 0.6]], True),
        ([[-1, 0], [0, 1]], False),
        ([[8, 0], [0, 8]], False),
        ([[0.1, 0], [0, 0.1]], False),
        ([[1, 0], [0, 0.1]], False),
        ([[1, 5], [0, 1]], False),
    ],
)
def test_which_maps_are_degenerate(M, fits):
    p = rng.uniform(0, 1000, (80, 2))
    n = points(p, p @ np.array(M).T)
    assert n == 80 if fits else n < 60


# bad input


def features(k, kind="delf", d=40, xy=None):
    x = rng.normal(size=(k, d))
    desc = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    xy = rng.uniform(0, 500, (k, 2)).astype(np.float32) if xy is None else xy
    return LocalFeatures(xy, desc, np.ones(k), (500, 500), kind)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_fewer_than_three_features_are_no_inliers(k):
    a = features(k)
    assert verify(a, a).n_inliers == 0 and verify(a, features(30)).n_inliers == 0


def test_repeated_points_have_no_map():
    xy = np.full((20, 2), 77, np.float32)
    a = features(20, xy=xy)
    assert verify(a, a).n_matches == 20 and verify(a, a).n_inliers == 0


def test_nan_descriptors_are_left_out_and_reported(tmp_path):
    f = features(10)
    f.desc[3] = np.nan
    f.xy[5] = np.inf
    f.desc[7] = 0
    assert pack(f)[3] == 3 and len(pack(f)[0]) == 7
    open_meta(tmp_path, ["x"], 1, kind="delf")
    write_shard(tmp_path / "00000", [(f, 1, "")], "delf", 40)
    assert open_local(tmp_path).skipped().reason.tolist() == ["3 descriptors are not finite or zero"]


def test_unreadable_files_and_copies_are_told(tmp_path):
    Image.fromarray(wall(1)).save(tmp_path / "a.png")
    Image.fromarray(wall(1)).save(tmp_path / "b.png")
    (tmp_path / "c.jpg").write_bytes(b"")
    (tmp_path / "d.jpg").write_bytes(b"\xff\xd8 broken")
    files = [tmp_path / n for n in ("a.png", "b.png", "c.jpg", "d.jpg", "none.jpg")]
    s = open_local(extract_many(files, "abcde", tmp_path / "local", n_workers=1))
    told = dict(zip(s.skipped().image_id, s.skipped().reason))
    assert set(told) == set("cde") and "empty" in told["c"] and "no such file" in told["e"]
    h = s.column("hash")
    assert h[0] == h[1] > 0 and (h[2:] == 0).all()
    assert verify_pairs(s, [[0, 1], [0, 2], [3, 0]], desc="")[1].tolist()[1:] == [0, 0]


def test_places_outside_are_refused():
    f = features(5)
    f.xy[2] = -30
    with pytest.raises(ValueError, match="outside"):
        pack(f)
    with pytest.raises(ValueError, match="4095"):
        pack(LocalFeatures(f.xy, f.desc, f.scores, (5000, 10), "delf"))


def test_different_kinds_do_not_match():
    with pytest.raises(ValueError, match="different kinds"):
        verify(features(5), features(5, "rootsift", 128))


@pytest.mark.parametrize(
    "pairs, says",
    [([[0, 9]], "9 images"), ([[-1, 0]], "from -1"), ([0, 1], r"\[m, 2\]"), ([[0.5, 1.0]], "whole numbers")],
)
def test_pairs_that_do_not_exist(store, pairs, says):
    with pytest.raises(ValueError, match=says):
        verify_pairs(store, pairs, desc="")


def test_drawing_has_both_images_and_lines():
    ims = [wall(0), moved(wall(0), VIEWS[1])]
    a, b = map(extract, ims)
    out = draw_matches(*ims, a, b, verify(a, b))
    assert out.shape == (240, 648, 3)
    assert (out != np.concatenate([ims[0], np.full((240, 8, 3), 255, np.uint8), ims[1]], 1)).any()
    with pytest.raises(ValueError, match="inliers"):
        draw_matches(*ims, a, b, verify(a, b), show="all")


@pytest.mark.skipif(
    not os.environ.get("LANDMARK_PHOTOS"), reason="LANDMARK_PHOTOS names no folder of real photos"
)
def test_real_photos_separate():
    "Façade and castle pairs verify, photos of different labels do not."
    from landmark.parts.images.reading import read_image
    from landmark.parts.local.verification import verify_prepared

    root = Path(os.environ["LANDMARK_PHOTOS"])
    labels = ["sacre_coeur", "sceaux_castle", "oxford_trinity", "oxford_jesus"]
    photos = [(label, p) for label in labels for p in sorted((root / label).glob("*.*"))[:8]]
    ready = [(label, Prepared(extract(read_image(p, max_side=800)))) for label, p in photos]
    same, other = [], []
    for i, (label, a) in enumerate(ready):
        for partner_label, b in ready[:i]:
            if label != partner_label:
                other.append(verify_prepared(a, b, RULE)[0])
            elif label in labels[:2]:
                same.append(verify_prepared(a, b, RULE)[0])
    assert max(other) < 16 and np.mean(np.array(same) > 15) > 0.6
