"""What would flatter a result is refused or said: un-cropped queries, images and landmarks seen before."""

import json
import pickle

import cv2
import numpy as np
import pandas as pd
import pytest
from test_train import SMALL, folder_world

from landmark import data, extract, rerank, tables, train
from landmark.parts.core import ParameterError, read_json
from landmark.parts.data.layout import benchmarks, read_boxes, read_ids
from landmark.parts.data.leakage import shared_files, shared_ids
from landmark.parts.data.worlds import make_world
from landmark.parts.descriptors.store import open_store
from landmark.parts.nets.backbones import make_model
from landmark.parts.nets.checkpoints import save_model
from landmark.parts.photos.album import find_bench

BENCH = ["all_souls_000013", "all_souls_000026", "oxford_002985", "ashmolean_000058"]


def photo(path, seed):
    "A small photo of noise."
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    cv2.imwrite(str(path), cv2.resize(noise, (80, 60)))


def ground_truth(world, boxes):
    "ROxford with two queries, whose boxes are given; `...` stands for none at all."
    judged = [dict(easy=[2], hard=[3], junk=[]), dict(easy=[3], hard=[], junk=[2])]
    gnd = [j if box is ... else j | dict(bbx=box) for j, box in zip(judged, boxes)]
    home = world / "revisited/roxford5k"
    (home / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(dict(imlist=BENCH, qimlist=BENCH[:2], gnd=gnd)))
    return home


@pytest.fixture
def world(tmp_path, monkeypatch):
    "Twelve training photos, a benchmark with two queries, and an untrained model."
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    world = folder_world(tmp_path / "world", n=12)
    for seed, name in enumerate(BENCH):
        photo(world / f"revisited/roxford5k/jpg/{name}.jpg", seed)
    ground_truth(world, [[10, 10, 60, 50], [0, 0, 40, 30]])
    card = dict(backbone="test_resnet", pooling="gem", dim=8)
    save_model(tmp_path / "models/a_v1", make_model("test_resnet", d=8), card)
    (tmp_path / "models/manifest.json").write_text('{"outputs": {}}')
    return world


def extracting(world, **more):
    how = dict(sizes="64", min_side=32, bench_side=64, device="cpu", n_workers=1)
    models = str(world.parent / "models")
    return extract.Config(world=str(world), models=models, splits=["benchmarks"], **how | more)


NO_BOX = {  # what the ground truth says of the second query's box → what is said of it
    "left out": (..., r"has no box \(bbx\)"),
    "None": (None, r"has no box \(bbx\)"),
    "an empty list": ([], r"has no box \(bbx\)"),
    "an empty array": (np.zeros(0), r"has no box \(bbx\)"),
    "a point": ([7, 7, 7, 7], r"has the box \[7.0, 7.0, 7.0, 7.0\], in which nothing lies"),
    "a line": ([7, 7, 30, 7], r"has the box \[7.0, 7.0, 30.0, 7.0\], in which nothing lies"),
    "the corners exchanged": ([40, 30, 0, 0], "has the box .*, in which nothing lies"),
    "corner, width, height": ([40, 30, 20, 20], "has the box .*, in which nothing lies"),
}


@pytest.mark.parametrize("box, says", NO_BOX.values(), ids=NO_BOX)
def test_a_query_without_a_box_is_refused_by_name_before_any_work(world, box, says):
    home = ground_truth(world, [[10, 10, 60, 50], box])
    says = f"roxford5k: the query all_souls_000026 {says}.*crop_queries: false"
    cfg = extracting(world)
    with pytest.raises(ParameterError, match=says):
        extract.run(cfg)
    assert not list(world.parent.rglob("*.npy"))
    watched = train.Config(world=str(world), loss="arcface", evaluate=True, **SMALL)
    with pytest.raises(ParameterError, match=says):
        train.run(watched)
    assert not list(world.parent.rglob("metrics.csv"))
    with pytest.raises(ParameterError, match=f"bench: {says}"):
        find_bench(home)
    problems = data.check_world(world, n_workers=1)  # 00 lists it: whole queries may be wanted
    assert (
        problems[problems.split == "roxford5k_query"].problem.str.contains("crop_queries: false").sum() == 1
    )


def test_a_box_is_four_finite_numbers(world):
    for box in ([1, 2, 3], [1, 2, 3, float("nan")], ["1", "2", "3", "4"], [[1, 2, 3, 4]], "1234"):
        ground_truth(world, [[10, 10, 60, 50], box])
        with pytest.raises(ValueError, match=r"gnd\[1\]\['bbx'\]"):
            extract.run(extracting(world))


def ranked(world, extracted):
    cfg = rerank.Config(world=str(world), descriptors=str(extracted), methods=["baseline", "aqe"])
    return pd.read_csv(rerank.run(cfg) / "metrics.csv").assign(seed=1)


def test_whole_queries_are_asked_for_and_marked(world):
    cropped = extract.run(extracting(world))
    ground_truth(world, [[10, 10, 60, 50], ...])
    whole = extract.run(extracting(world, crop_queries=False, name="whole"))
    query, index = (open_store(whole / f"a_v1/roxford5k_{kind}") for kind in ("query", "index"))
    assert query.card["made_by"]["crop_queries"] is False and "crop_queries" not in index.card["made_by"]
    assert np.abs(query[:] - index[:2]).max() < 1e-3  # the same photos, whole
    assert np.abs(query[:] - open_store(cropped / "a_v1/roxford5k_query")[:]).max() > 1e-2
    ground_truth(world, [[10, 10, 60, 50], [0, 0, 40, 30]])
    names = {"roxford5k": ranked(world, cropped), "roxford5k un-cropped": ranked(world, whole)}
    for name, metrics in names.items():
        assert set(metrics.benchmark) == {name}
    titles = [list(tables.columns_of(m).values()) for m in names.values()]
    assert titles == [["ROxf M", "ROxf H"], ["ROxf un-cropped M", "ROxf un-cropped H"]]
    assert "ROxf un-cropped M" in tables.table_reranking(names["roxford5k un-cropped"])


def test_an_ensemble_of_whole_queries_is_marked(world):
    card = dict(backbone="test_resnet", pooling="gem", dim=8)
    save_model(world.parent / "models/b_v1", make_model("test_resnet", d=8), card)
    whole = extract.run(extracting(world, crop_queries=False))
    cfg = rerank.Config(world=str(world), descriptors=str(whole), methods=["baseline"], weights=[1, 0.5])
    metrics = pd.read_csv(rerank.run(cfg) / "metrics.csv")
    assert set(metrics.model) == {"ensemble"} and set(metrics.benchmark) == {"roxford5k un-cropped"}


def test_a_training_that_looks_at_whole_queries_says_so(world):
    ground_truth(world, [[10, 10, 60, 50], ...])
    cfg = train.Config(world=str(world), loss="arcface", evaluate=True, crop_queries=False, **SMALL)
    out = train.run(cfg)
    assert "roxford5k un-cropped M" in pd.read_csv(out / "arcface_v1/metrics.csv")
    assert list(read_json(out / "arcface_v1/card.json")["metrics"]) == ["roxford5k un-cropped M"]


def test_drawn_benchmarks_are_cropped():
    drawn = make_world("tiny", 1)
    for name in benchmarks(drawn):
        assert (np.diff(read_boxes(drawn, f"{name}_query").reshape(-1, 2, 2), axis=1) > 0).all()


# seen before

SEEN = {  # which evaluation image has what of which training image → what is said
    "an id, in the index": ("index", "id", "1 of index in v1_train"),
    "an id, in the test set": ("test", "id", "1 of test in v1_train"),
    "a file, in the index": ("index", "file", "1 of index in v1_train"),
    "a file, in the test set": ("test", "file", "1 of test in v1_train"),
    "a file, in a benchmark": ("roxford5k", "file", "1 of roxford5k_index in v1_train"),
}


def evaluated(world, split, ids):
    "Index or test images of noise."
    for n, i in enumerate(ids):
        photo(world / f"v2/{split}/{i[0]}/{i[1]}/{i[2]}/{i}.jpg", 100 + n)
    pd.DataFrame(dict(id=ids)).to_csv(world / f"v2/{split}.csv", index=False)


def leak(world, split, what):
    "Let one evaluation image be a training image; its two ids."
    taught = read_ids(world, "v1_train")[3]
    own = "f" * 16 if what == "file" else taught
    source = world / f"v1/train/{taught[0]}/{taught[1]}/{taught[2]}/{taught}.jpg"
    if split == "roxford5k":
        own, target = BENCH[2], world / f"revisited/roxford5k/jpg/{BENCH[2]}.jpg"
    else:
        evaluated(world, split, ["e" * 16, own])
        target = world / f"v2/{split}/{own[0]}/{own[1]}/{own[2]}/{own}.jpg"
    if what == "file":
        target.write_bytes(source.read_bytes())
    return own, taught


@pytest.mark.parametrize("split, what, says", SEEN.values(), ids=SEEN)
def test_an_evaluation_image_in_a_training_set_is_refused(world, split, what, says):
    own, taught = leak(world, split, what)
    named = own if what == "id" else f"{own} as {taught}"
    cfg = data.Config(world=str(world), n_workers=1)
    with pytest.raises(ParameterError, match=rf"data: .*{says} \({named}\). Take them out"):
        data.run(cfg)
    assert not list(world.parent.rglob("datasets.csv"))
    out = data.run(data.Config(world=str(world), n_workers=1, shared="list"))
    listed = pd.read_csv(out / "shared.csv", dtype=str)
    assert [own, taught] in listed[["image_id", "train_id"]].values.tolist()
    if what == "id":  # the cheap question is asked again before any training
        with pytest.raises(ParameterError, match=rf"train, v1: .*{says} \({own}\)"):
            train.run(train.Config(world=str(world), loss="arcface", **SMALL))
        assert not list((world.parent / "runs").rglob("*.safetensors"))


def test_nothing_is_refused_where_images_are_apart(world):
    evaluated(world, "index", ["e" * 16, "d" * 16])
    out = data.run(data.Config(world=str(world), n_workers=1))
    assert len(pd.read_csv(out / "shared.csv")) == 0
    assert json.loads((out / "manifest.json").read_text())["metrics"]["shared"] == 0
    train.run(train.Config(world=str(world), loss="arcface", **SMALL))


def test_files_of_one_size_and_one_end_are_told_apart(world):
    evaluated(world, "index", ["e" * 16])
    taught = read_ids(world, "v1_train")[0]
    a = world / f"v1/train/{taught[0]}/{taught[1]}/{taught[2]}/{taught}.jpg"
    b = world / f"v2/index/e/e/e/{'e' * 16}.jpg"
    for first, second, n in ((b"a", b"b", 0), (b"a", b"a", 1)):
        a.write_bytes(first + bytes(8000))
        b.write_bytes(second + bytes(8000))
        assert len(shared_files(world, 1)) == n
    for n in (2, 5):  # missing files say nothing, whatever there is beside
        b.unlink(missing_ok=True)
        assert len(shared_files(world, n)) == 0


@pytest.mark.parametrize("name", ["tiny"])
def test_a_drawn_world_keeps_its_images_apart(name):
    drawn = make_world(name, 1)
    trained = {s: read_ids(drawn, s) for s in ("v1_train", "v2_train")}
    assert len(shared_ids(drawn, trained)) == 0 and len(shared_files(drawn, 1)) == 0


# landmarks seen before


def overlap_of(world, text=None):
    args = dict(overlap=str(world.parent / "overlap.csv")) if text else {}
    if text:
        (world.parent / "overlap.csv").write_text(text)
    return data.run(data.Config(world=str(world), n_workers=1, check="files", **args))


def second_version(world):
    "Version 2 with three labels, one of them thrice, and a published clean set."
    (world / "v2").mkdir(exist_ok=True)
    rows = "".join(f"{i * 16},,{label}\n" for i, label in zip("abcde", (7, 7, 7, 8, 9)))
    (world / "v2/train.csv").write_text(f"id,url,landmark_id\n{rows}")
    (world / "v2/train_clean.csv").write_text(f"landmark_id,images\n7,{'a' * 16} {'b' * 16}\n")


def test_overlap_is_counted_where_a_list_is_given_and_else_not_known(world):
    second_version(world)
    for text, want in (
        (None, {"GLD-v2": ["not known"] * 2, "GLD-v2, train_clean.csv": ["not known"] * 2}),
        (
            "benchmark,landmark_id\nroxford5k,7\nroxford5k,9\nroxford5k,1234\n",
            {"GLD-v2": ["2", "4"], "GLD-v2, train_clean.csv": ["1", "2"]},
        ),
    ):
        out = overlap_of(world, text)
        found = pd.read_csv(out / "overlap.csv", dtype=str).set_index("training set")
        assert set(found.benchmark) == {"roxford5k"}
        assert {k: found.loc[k, ["labels", "images"]].tolist() for k in want} == want
        assert found.loc["GLD-v1", "labels"] == "not known"  # labels of its own


@pytest.mark.parametrize(
    "text, says",
    [
        ("benchmark,landmark_id\nrparis6k,7\n", "names the benchmark 'rparis6k'; .* has roxford5k"),
        ("benchmark,label\nroxford5k,7\n", "has no column landmark_id"),
        ("benchmark,landmark_id\nroxford5k,7.0\n", "the landmark_id is '7.0'"),
    ],
)
def test_a_list_of_overlap_is_looked_through(world, text, says):
    second_version(world)
    with pytest.raises(ValueError, match=says):
        overlap_of(world, text)


def test_the_table_adds_the_own_clean_set(world):
    second_version(world)
    out = overlap_of(world, "benchmark,landmark_id\nroxford5k,7\n")
    clean = world.parent / "clean"
    clean.mkdir()
    (clean / "train_clean.csv").write_text(f"landmark_id,images\n7,{'a' * 16}\n9,{'e' * 16}\n")
    (clean / "manifest.json").write_text(json.dumps(dict(config=dict(seed=1), metrics={}, outputs={})))
    made = tables.run(tables.Config(data=[str(out)], clean=[str(clean)]))
    t = pd.read_csv(made / "overlap.csv", dtype=str).set_index("training set")
    assert t.loc["GLD-v2 (clean)", ["labels", "images"]].tolist() == ["1", "1"]
    assert t.loc["GLD-v2", ["labels", "images"]].tolist() == ["1", "3"]
    assert "Training labels that show landmarks of a benchmark" in (made / "tables.md").read_text()
