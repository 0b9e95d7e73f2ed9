"""The cleaning rule against an independent restatement, and the two stages on odd collections.

The original's numbers are checked in test_golden.py."""

import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from landmark.parts.local.cleaning import (
    clean_images,
    count_verified,
    first_copies,
    needed_pairs,
    partners_among_all,
    partners_within,
    quality_table,
)


def test_restated_in_words():
    r = np.random.default_rng(0)
    labels = r.integers(0, 8, 60)
    i, j = r.integers(0, 60, (2, 900))
    n = r.integers(0, 60, 900)
    i, j, n = (x[(labels[i] == labels[j]) & (i != j)] for x in (i, j, n))
    for v in (10, 30, 50):
        for f in (1, 2, 4):
            has = [sum(1 for x, c in zip(i, n) if x == a and c >= v) for a in range(60)]
            needs = [min(f, max(1, sum(labels == labels[a]) - 1)) for a in range(60)]
            passed = {a for a in range(60) if has[a] >= needs[a]}
            want = {a for a in passed if sum(labels[b] == labels[a] for b in passed) >= 2}
            keep, alone = clean_images(count_verified(i, n, 60, v), labels, needed_pairs(labels, f))
            assert set(np.flatnonzero(keep)) == want and set(np.flatnonzero(alone)) == passed - want


def test_a_label_of_fifty_thousand_images():
    "The pairs of a block are all that is ever held; every row has its partners."
    labels = np.zeros(50_000, int)
    pairs = partners_within(np.arange(100), labels, None, 99)
    assert len(pairs) == 9900 and (np.bincount(pairs[:, 0]) == 99).all() and pairs[:, 1].max() > 49_000
    x = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    near = partners_within(np.arange(5), np.zeros(3000, int), x, 10)
    order = np.argsort(-(x[:5].astype(float) @ x.T), 1, kind="stable")
    want = [[j for j in o if j != i][:10] for i, o in enumerate(order)]
    np.testing.assert_array_equal(near[:, 1].reshape(5, 10), want)
    among = partners_among_all(np.arange(5), x, np.zeros(3000, int), 11, 10)
    np.testing.assert_array_equal(among, near)  # with one label both ways are one


def test_partners_need_few_passes_over_all_images(monkeypatch):
    "As many images are searched at a time as the memory holds neighbours of; blocks change nothing."
    from landmark.parts.local import cleaning

    x = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    labels = np.arange(3000) // 20
    asked, original = [], cleaning.search

    def search(q, base, k, **how):
        asked.append((len(q), how["memory_mib"]))
        return original(q, base, k, **how)

    monkeypatch.setattr(cleaning, "search", search)
    want = partners_among_all(np.arange(3000), x, labels, 1000, 10)
    assert asked == [(3000, 1024)]
    for half in (False, True):
        asked.clear()
        y = x.astype("f2") if half else x
        got = partners_among_all(np.arange(3000), y, labels, 1000, 10, memory_mib=31)
        assert asked == [(1013, 31)] * 2 + [(974, 31)] and (half or (got == want).all())
    row_bytes = 1000 * (4 + 8 + 17)  # similarities, positions, labels and what is compared with them
    assert 1013 * row_bytes < 31 * 2**20


def test_partners_keep_to_the_memory():
    from pathlib import Path

    from landmark.parts.bench.side_by_side import PeakMemory

    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell mapped files from memory")
    x = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32)
    labels = np.arange(4000) // 20
    partners_among_all(np.arange(9), x, labels, 1000, 10)
    with PeakMemory() as memory:  # 4,000 × 1,000 neighbours are 46 MiB, and 65 more while compared
        partners_among_all(np.arange(4000), x, labels, 1000, 10, memory_mib=32)
    assert memory.mib < 80, f"{memory.mib:.0f} MiB"


def test_copies_are_no_witnesses():
    labels = np.array([1, 1, 1, 1])
    copy_of = first_copies(np.array([5, 5, 6, 0]), labels)
    assert copy_of.tolist() == [0, 0, 2, 3] and needed_pairs(labels, 3, True, copy_of).tolist() == [2] * 4
    apart = first_copies(np.array([5, 5]), np.array([1, 2]))
    assert apart.tolist() == [0, 1]  # another label, another question


def test_quality_counts_everything_once():
    r = np.random.default_rng(1)
    kinds = r.choice(["landmark", "people", "lookalike"], 200)
    right = kinds == "landmark"
    keep = r.random(200) < np.where(right, 0.8, 0.1)
    q = quality_table(kinds, right, keep)
    assert q.n.sum() == 200 and q.kept.sum() == keep.sum() and q[~q.right].recall.min() > 0.7


def made_up(folder, n_labels=60, size=12, wrong=0.2, mistaken=0.5, seed=0):
    "A verification without photos: counts by chance, half the pairs of one landmark have more; the truth."
    from landmark.parts.local.chance import different_pairs
    from landmark.parts.local.cleaning import write_pairs
    from landmark.parts.local.features import LocalFeatures, open_meta, write_shard

    r, n = np.random.default_rng(seed), n_labels * size
    labels = np.repeat(np.arange(n_labels) * 7, size)
    shown = labels.copy()
    noise = r.permutation(n)[: int(wrong * n)]
    shown[noise] = np.where(r.random(len(noise)) < mistaken, r.permutation(labels)[noise], -1)
    wild = np.where(r.random(n) < 0.1, 3.0, 1.0)

    def counted(pairs):
        i, j = np.sort(pairs, 1).T
        same = (shown[i] == shown[j]) & (shown[i] >= 0) & ((i * 7 + j * 3) % 2 == 0)
        by_chance = 4 + np.maximum(wild[i], wild[j]) * r.exponential(1, len(i))
        return (by_chance + same * (6 + r.exponential(15, len(i)))).astype(int)

    one = LocalFeatures(np.ones((1, 2)), np.eye(1, 128), np.ones(1), (64, 64))
    open_meta(folder / "local", range(n), n, kind="rootsift", max_keypoints=1, max_side=64)
    write_shard(folder / "local" / "00000", [(one, k + 1, "") for k in range(n)], "rootsift", 128)
    ids = [f"{k:016x}" for k in range(n)]
    pd.DataFrame(dict(image_id=ids, landmark_id=labels)).to_csv(folder / "ids.csv", index=False)
    for name, pairs in (
        ("pairs", partners_within(np.arange(n), labels)),
        ("different", different_pairs(labels, 4000)),
    ):
        write_pairs(folder / name / "00000.npz", pairs, counted(pairs), counted(pairs))
    facts = dict(landmark_id=labels, right=labels == shown, kind="landmark", aspect="front")
    return pd.DataFrame(facts, index=ids)


@pytest.mark.parametrize("mistaken", [0, 1])  # wrong photos show nothing, or the landmarks of other labels
def test_the_threshold_is_found_without_the_truth(tmp_path, mistaken):
    from landmark import clean

    truth = made_up(tmp_path / "verify", mistaken=mistaken)
    cfg, metrics = clean.Config(min_inliers=0, min_verified=1), {}
    clean._write(cfg, tmp_path, clean.evidence(tmp_path / "verify"), truth, metrics)
    assert metrics["recall"] > 0.95 and metrics["precision"] > 0.97, metrics
    images = pd.read_csv(tmp_path / "images.csv")
    false = images.kept[~truth.right.to_numpy()].mean()
    assert false < 0.08, false  # stated: 5 % of what has no partner
    assert ((images.accident <= cfg.max_false) == (images.verified >= 1)).all()
    curve = pd.read_csv(tmp_path / "curve.csv")
    assert curve.images.is_monotonic_increasing and curve.recall.is_monotonic_increasing
    assert curve.set_index("max_false").images[cfg.max_false] == images.kept.sum()
    lost, sizes = pd.read_csv(tmp_path / "lost.csv"), pd.read_csv(tmp_path / "sizes.csv")
    assert lost.n.sum() == (~images.kept).sum() == (lost.right + lost.wrong).sum()
    assert sizes["size"].tolist() == ["10 to 19"] and sizes.kept.sum() == images.kept.sum()
    table = pd.read_csv(tmp_path / "chance.csv")
    assert table.same.iloc[40] > 10 * table.different.iloc[40]


def test_a_given_number_decides_as_before(tmp_path):
    "The papers' rule reads no pairs of different labels, and a folder without them will do."
    from landmark import clean

    truth = made_up(tmp_path / "verify")
    shutil.rmtree(tmp_path / "verify" / "different")
    e = clean.evidence(tmp_path / "verify")
    clean._write(clean.Config(min_inliers=20), tmp_path, e, truth, {})
    images = pd.read_csv(tmp_path / "images.csv")
    verified = count_verified(e["image"], e["n_inliers"], len(truth), 20)
    keep, _ = clean_images(verified, e["labels"], needed_pairs(e["labels"], 3))
    assert (images.kept == keep).all() and images.columns.tolist()[2:] == ["verified", "needed", "kept"]
    assert not (tmp_path / "chance.csv").exists() and (tmp_path / "sizes.csv").exists()
    with pytest.raises(ValueError, match="holds 0 of them and 1,000 are needed; give min_inliers"):
        clean._write(clean.Config(min_inliers=0), tmp_path, e, truth, {})


# the stages


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Three labels: four views of a wall with a stranger, a copy and a broken file; a pair; a single image."
    from test_verification import VIEWS, moved, wall

    d = tmp_path_factory.mktemp("world")
    rows = []

    def add(label, im):
        i = f"{len(rows):016x}"
        p = d / "v2" / "train" / i[0] / i[1] / i[2] / f"{i}.jpg"
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(b"broken") if im is None else Image.fromarray(im).save(p, quality=95)
        rows.append((i, label))

    for k in range(4):
        add(7, moved(wall(0), VIEWS[k % 3], k))
    add(7, wall(50))
    add(7, moved(wall(0), VIEWS[0], 0))
    add(7, None)
    for k in range(2):
        add(8, moved(wall(1), VIEWS[k], k))
    add(9, wall(2))
    pd.DataFrame(rows, columns=["id", "landmark_id"]).sample(frac=1, random_state=0).to_csv(
        d / "v2" / "train.csv", index=False
    )
    return d


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def configs(world, **kw):
    from landmark import clean, verify

    return verify, verify.Config(world=str(world), n_workers=1, chunk_pairs=10, **kw), clean


def test_an_odd_collection_is_cleaned_and_explained(world, runs):
    verify, cfg, clean = configs(world)
    v = verify.run(cfg)
    with pytest.raises(ValueError, match="holds 23 of them"):  # ten photos of three labels
        clean.run(clean.Config(world=str(world), verified=str(v), min_inliers=0))
    out = clean.run(clean.Config(world=str(world), verified=str(v), min_inliers=20))
    table = pd.read_csv(out / "train_clean.csv", dtype=str)
    why = pd.read_csv(out / "dropped.csv", dtype=str).set_index("image_id").reason
    assert table.landmark_id.tolist() == ["7", "8"]
    assert [len(ids.split()) for ids in table["images"]] == [5, 2]
    assert "verified pairs" in why[f"{4:016x}"] and "image" in why[f"{6:016x}"]
    assert why[f"{9:016x}"] == "the only image of its label"
    copies = pd.read_csv(v / "copies.csv", dtype=str)
    assert copies[["image_id", "copy_of"]].values.tolist() == [[f"{5:016x}", f"{0:016x}"]]
    assert not (out / "quality.csv").exists()  # nobody knows the truth here
    grid = pd.read_csv(out / "grid.csv")
    assert grid.images.is_monotonic_decreasing is False and len(grid) == 70


def test_a_killed_run_goes_on_with_the_same_result(world, runs):
    verify, cfg, _ = configs(world)
    v = verify.run(cfg)
    files = {p.name: p.read_bytes() for p in (v / "pairs").iterdir()}
    assert len(files) > 2
    (v / "manifest.json").unlink()
    gone, stays = sorted(files)[1], v / "pairs" / sorted(files)[0]
    (v / "pairs" / gone).unlink()
    shutil.rmtree(v / "local" / "00000")
    stamp = stays.stat().st_mtime_ns
    assert verify.run(cfg) == v
    assert {p.name: p.read_bytes() for p in (v / "pairs").iterdir()} == files
    assert stays.stat().st_mtime_ns == stamp


def test_shards_make_the_whole(world, runs):
    verify, cfg, clean = configs(world)
    whole = verify.run(cfg)
    from dataclasses import replace

    parts = [verify.run(replace(cfg, n_shards=3, shard=s)) for s in (0, 2)]  # one shard is lost
    names = [{p.name for p in (d / "pairs").iterdir()} for d in parts]
    assert not names[0] & names[1]
    alone = {p.name: p.read_bytes() for p in (whole / "pairs").iterdir()}
    assert verify.run(replace(cfg, n_shards=3)) == whole
    assert all(p.stat().st_nlink == 1 for p in (whole / "pairs").iterdir())  # finished alone: none gathered
    shutil.rmtree(whole)
    together = verify.run(replace(cfg, n_shards=3))
    assert {p.name: p.read_bytes() for p in (together / "pairs").iterdir()} == alone
    linked = [p for p in (together / "pairs").iterdir() if p.stat().st_nlink > 1]
    assert {p.name for p in linked} == names[0] | names[1]
    with pytest.raises(ValueError, match="one shard"):
        clean.run(clean.Config(world=str(world), verified=str(parts[0])))


def test_wrong_parameters_stop_at_once(world, runs):
    verify, cfg, clean = configs(world)
    from dataclasses import replace

    for change, says in (
        (dict(kind="surf"), "surf"),
        (dict(shard=3, n_shards=2), "shard is 3"),
        (dict(neighbors="some"), "all, label"),
        (dict(descriptors="nowhere"), "descriptor store"),
        (dict(world="nowhere"), "nowhere"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            verify.run(replace(cfg, **change))
    with pytest.raises(ValueError, match="upstream artifact"):
        clean.run(clean.Config(world=str(world)))


# DELF, subsets and how well counts separate


@pytest.fixture(scope="module")
def delf_world(world, tmp_path_factory):
    "The same photos, four more as the v1 training set, and an untrained model."
    from test_verification import VIEWS, moved, wall

    from landmark.parts.nets.backbones import make_model
    from landmark.parts.nets.checkpoints import save_model

    d = tmp_path_factory.mktemp("delf") / "world"
    shutil.copytree(world, d)
    ids = [f"{k:016x}" for k in range(100, 104)]
    for k, i in enumerate(ids):
        p = d / "v1" / "train" / i[0] / i[1] / i[2] / f"{i}.jpg"
        p.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(moved(wall(20 + k // 2), VIEWS[k % 2], k)).save(p)
    pd.DataFrame(dict(id=ids, landmark_id=[1, 1, 2, 2])).to_csv(d / "v1" / "train.csv", index=False)
    model = d.parent / "model"
    save_model(model, make_model("test_resnet", d=8), dict(backbone="test_resnet", pooling="gem", dim=8))
    small = dict(stride=8, delf_epochs=1, max_side=160, compare_labels=3)
    return d, dict(kind="delf", trunk=str(model), **small)


def test_delf_is_trained_once_and_used_again(delf_world, runs):
    from landmark.parts.local.features import open_local

    world, kw = delf_world
    verify, cfg, _ = configs(world, **kw)
    v = verify.run(cfg)
    store = open_local(v / "local")
    assert (v / "delf" / "card.json").exists() and store.kind == "delf"
    assert len(pd.read_csv(v / "delf_loss.csv")) == 1
    n = store.column("n_features")
    assert (n > 0).sum() >= 8
    least = min(store[i].scores.min() for i in np.flatnonzero(n))
    assert least >= 0.99  # nothing the attention finds less than usual
    from dataclasses import replace

    again = verify.run(replace(cfg, delf=str(v), labels=2, n_shards=2, shard=1))
    part = open_local(again / "local")
    assert not (again / "delf").exists()
    same = [i for i in part.ids if part.column("n_features")[part.ids.index(i)] > 0]
    assert same
    for i in same:
        np.testing.assert_array_equal(part[part.ids.index(i)].desc, store[store.ids.index(i)].desc)
    with pytest.raises(ValueError, match="of kind delf"):
        verify.run(replace(cfg, delf=str(again), name="wrong"))


def test_a_few_labels_and_how_well_they_separate(world, runs):
    from dataclasses import replace

    verify, cfg, _ = configs(world)
    whole = verify.run(replace(cfg, compare_labels=2))
    part = verify.run(replace(cfg, labels=2, compare_labels=2, name="part"))
    a, b = (pd.read_csv(d / "separation.csv") for d in (whole, part))
    pd.testing.assert_frame_equal(a, b)  # the same photos, whoever asks
    assert a.kind[0] == "rootsift" and 0.4 < a.found[0] < 1
    assert a.n_same[0] == 7 * 6 // 2 + 1 and a.n_different[0] == 7 * 2
    assert not (whole / "restriction.csv").exists()
    assert len(pd.read_csv(part / "ids.csv")) == 9 and len(pd.read_csv(whole / "ids.csv")) == 10


def test_what_the_nearest_of_all_leave_out(world, runs):
    from dataclasses import replace

    from landmark.parts.descriptors.store import write_store
    from landmark.parts.local.cleaning import read_pairs

    ids = pd.read_csv(world / "v2" / "train.csv", dtype={"id": str})
    x = np.random.default_rng(3).normal(size=(len(ids), 8)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    write_store(runs / "x", ids.id.tolist(), x, dict(model="random"))
    verify, cfg, _ = configs(world)
    v = verify.run(replace(cfg, descriptors=str(runs / "x"), n_neighbors=4))
    t = pd.read_csv(v / "restriction.csv").set_index("n_neighbors")
    assert t.pairs["4"] == len(read_pairs(v / "pairs")["image"]) < t.pairs["label"] == 7 * 6 + 2 * 1
    assert t.pairs_share["label"] == 1
