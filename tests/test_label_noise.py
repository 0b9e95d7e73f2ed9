"Cleaning without local features: cleanlab and the nearest descriptors, and the stage that chooses."

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from landmark.parts.local.cleaning import precision_recall
from landmark.parts.local.label_noise import WAYS, deal_folds, judge, likeliest, neighbor_vote


def collection(seed, n_labels=25, size=10, wrong=0.2, nothing=0.0):
    "Descriptors round a centre for each landmark; some labels swapped, some photos of no landmark."
    r = np.random.default_rng(seed)
    shown = np.repeat(np.arange(n_labels), size)
    labels, x = shown.copy(), r.normal(size=(n_labels, 48))[shown]
    some = r.permutation(len(shown))[: int(wrong * len(shown))]
    labels[some] = (shown[some] + r.integers(1, n_labels, len(some))) % n_labels
    clutter = r.permutation(len(shown))[: int(nothing * len(shown))]
    x[clutter] = r.normal(size=(len(clutter), 48))
    x += 0.6 * r.normal(size=x.shape)
    right = labels == shown
    right[clutter] = False
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels * 3 + 5, right


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("seed", range(3))
def test_swapped_labels_are_found(how, seed):
    x, labels, right = collection(seed)
    good, columns = judge(how, x, labels)
    found = precision_recall(good, right)
    assert found["precision"] > 0.94 and found["recall"] > 0.94, found
    swapped = ~right & ~good
    assert (columns["guess"][swapped] != labels[swapped]).mean() > 0.9


def test_what_shows_no_landmark_is_another_matter():
    "The nearest find it; cleanlab supposes that every photo shows one of the labels."
    x, labels, right = collection(0, wrong=0, nothing=0.2)
    kept = {how: judge(how, x, labels)[0][~right].mean() for how in WAYS}
    assert kept["neighbors"] < 0.2, kept


def test_the_vote_by_its_definition():
    x, labels, _ = collection(4, n_labels=6, size=5)
    good, columns = neighbor_vote(x, labels, 7)
    sims = x.astype(float) @ x.astype(float).T
    for i in range(len(x)):
        near = [j for j in np.argsort(-sims[i], kind="stable") if j != i][:7]
        votes = {k: [sims[i, j] for j in near if labels[j] == k] for k in labels[near].tolist()}
        want = max(votes, key=lambda k: (len(votes[k]), sum(votes[k])))
        assert columns["guess"][i] == want and good[i] == (want == labels[i])
        assert columns["votes"][i] == len(votes.get(labels[i], []))


def test_nobody_judges_itself():
    "A photo's own label never reaches the model that judges it."
    x, labels, _ = collection(1, n_labels=5, size=6)
    folds = deal_folds(labels, 3)
    before, c = likeliest(x, labels, folds, (1.0,))
    changed = labels.copy()
    changed[0] = labels[-1]
    after, _ = likeliest(x, changed, folds, (1.0,))
    same = folds == folds[0]
    np.testing.assert_array_equal(before[same], after[same])
    assert c == 1 and not np.array_equal(before[~same], after[~same])


def test_labels_smaller_than_the_folds():
    x, labels, _ = collection(2, n_labels=8, size=3, wrong=0)
    good, _ = judge("cleanlab", x, labels)
    assert good.mean() > 0.9
    folds = deal_folds(labels, 5)
    assert all(len(set(folds[labels == k])) == 3 for k in np.unique(labels))


@pytest.mark.parametrize(
    "how, given, says",
    [
        ("cleanlab", dict(n_folds=99), "99 folds of 24 images; allowed: 2 to 24"),
        ("cleanlab", dict(n_folds=1), "1 folds of 24 images"),
        ("cleanlab", dict(filter_by="most"), "allowed: prune_by_noise_rate, "),
        ("cleanlab", dict(memory_mib=0), "24 images × 8 labels are"),
        ("neighbors", dict(n_near=24), "n_near is 24 of 24 images; allowed: 1 to 23"),
        ("neighbors", dict(n_near=0), "n_near is 0"),
        ("verified", {}, "allowed here: cleanlab, neighbors"),
    ],
)
def test_bad_values_are_refused(how, given, says):
    x, labels, _ = collection(2, n_labels=8, size=3, wrong=0)
    with pytest.raises(ValueError, match=says):
        judge(how, x, labels, **given)


def test_one_label_alone_is_refused():
    x, labels, _ = collection(2, n_labels=8, size=3)
    with pytest.raises(ValueError, match="two labels are needed"):
        judge("cleanlab", x, np.full(len(x), 7))
    with pytest.raises(ValueError, match="each of the 24 images is alone in its label"):
        judge("cleanlab", x, np.arange(len(x)))


# the stage


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "One folder of runs, and so one drawn world, for all of them."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LANDMARK_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield


@pytest.mark.parametrize("how", ["verified", *WAYS])
def test_every_way_writes_the_same_tables(runs, how):
    from landmark import clean
    from landmark.parts.data.layout import train_set
    from landmark.parts.data.worlds import world_of

    cfg = clean.Config(world="tiny", how=how, min_inliers=10, min_verified=1)
    out = clean.run(cfg)
    ids = dict(image_id=str)
    images, dropped = (pd.read_csv(out / f"{k}.csv", dtype=ids) for k in ("images", "dropped"))
    man = json.loads((out / "manifest.json").read_text())
    m = man["metrics"]
    assert set(dropped.image_id) == set(images.image_id[~images.kept]) and dropped.reason.notna().all()
    assert m["kept"] == images.kept.sum() > 0.2 * m["images"] and m["made_up"] and m["how"] == how
    kept = train_set(world_of(cfg), "v2-clean", out / "train_clean.csv")
    assert set(kept.image_id) == set(images.image_id[images.kept])
    assert kept.groupby("landmark_id").size().min() >= 2
    lost, sizes, by_label = (pd.read_csv(out / f"{k}.csv") for k in ("lost", "sizes", "by_label"))
    assert lost.n.sum() == len(dropped) and sizes.kept.sum() == m["kept"] == by_label.kept.sum()
    quality = pd.read_csv(out / "quality.csv")
    assert quality.kept.sum() == m["kept"] and len(by_label) == m["labels"]
    assert by_label.right_kept.sum() / by_label.right.sum() == pytest.approx(m["recall"])
    assert by_label.right_kept.sum() / m["kept"] == pytest.approx(m["precision"]) and m["precision"] > 0.5
    assert (out / "grid.csv").exists() == (how == "verified")
    assert clean.run(cfg) == out and json.loads((out / "manifest.json").read_text()) == man


def finished(folder, **card):
    "A finished artifact of extraction."
    from landmark.parts.descriptors.store import write_store

    write_store(folder / "model" / "v2_train", **card, card={})
    man = dict(stage="extract", seconds=12.5, inputs={}, outputs={}, metrics={}, config=dict(seed=1))
    (folder / "manifest.json").write_text(json.dumps(man))
    return folder / "model" / "v2_train"


@pytest.mark.parametrize("how", WAYS)
def test_where_nobody_knows_the_truth(runs, tmp_path, how):
    "No precision, no table per landmark, no crash; a photo without a descriptor leaves with that reason."
    from landmark import clean

    x, labels, _ = collection(0, n_labels=8, size=6)
    labels[-1] = 999
    ids = [f"{k:016x}" for k in range(len(x))]
    home = tmp_path / "world"
    (home / "v2").mkdir(parents=True)
    pd.DataFrame(dict(id=ids, landmark_id=labels)).to_csv(home / "v2" / "train.csv", index=False)
    store = finished(tmp_path / "extract", ids=ids[1:], x=x[1:])
    out = clean.run(clean.Config(world=str(home), how=how, descriptors=str(store), n_near=5))
    man = json.loads((out / "manifest.json").read_text())["metrics"]
    why = pd.read_csv(out / "dropped.csv", dtype=str).set_index("image_id").reason
    assert why[ids[0]] == "no descriptor: it could not be read"
    assert why[ids[-1]] == "the only image of its label" and WAYS[how] in set(why)
    assert "recall" not in man and man["seconds_before"] == {"extract": 12.5} and man["unreadable"] == 1
    assert not (out / "by_label.csv").exists() and not (out / "quality.csv").exists()
    assert list(pd.read_csv(out / "lost.csv")) == ["reason", "n"]


def test_the_stage_refuses_in_a_sentence(runs, tmp_path):
    from landmark import clean

    with pytest.raises(ValueError, match="how is 'guess'; allowed: verified, cleanlab, neighbors"):
        clean.run(clean.Config(world="tiny", how="guess"))
    with pytest.raises(ValueError, match="`descriptors` is empty; give those of v2_train"):
        clean.run(clean.Config(world="mini", how="cleanlab"))
    x, _, _ = collection(0, n_labels=2, size=3)
    store = finished(tmp_path / "extract", ids=[f"{k:016x}" for k in range(len(x))], x=x)
    with pytest.raises(ValueError, match="holds no finished descriptor store"):
        clean.run(clean.Config(world="tiny", how="neighbors", descriptors=str(store.parent)))
    with pytest.raises(ValueError, match="describes none of the"):
        clean.run(clean.Config(world="tiny", how="neighbors", descriptors=str(store)))
    shutil.rmtree(store)
    with pytest.raises(ValueError, match="is not there"):
        clean.run(clean.Config(world="tiny", how="neighbors", descriptors=str(store)))


def test_the_tables_know_every_way():
    from landmark import tables

    assert set(tables.CLEANERS) == {"verified", *WAYS}
