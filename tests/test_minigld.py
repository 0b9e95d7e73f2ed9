"MiniGLD: the drawn world is complete, the same on any number of processes, and does what its knobs say."

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from landmark.parts.data import layout
from landmark.parts.minigld import world
from landmark.parts.minigld.plan import Knobs, plan_world

SMALL = replace(
    world.WORLDS["tiny"],
    n_v1_landmarks=2,
    n_v1=8,
    n_landmarks=3,
    n_train=12,
    n_unseen=1,
    n_index=8,
    n_test=8,
    n_queries=2,
    n_bench=6,
    side=160,
)


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return world.draw_world(tmp_path_factory.mktemp("minigld") / "world", SMALL, seed=3, n_workers=1)


def test_two_processes_draw_the_same_bytes(small, tmp_path):
    again = world.draw_world(tmp_path / "world", SMALL, seed=3, n_workers=2)
    a, b = contents(small), contents(again)
    assert a.keys() == b.keys()
    assert [k for k in a if a[k] != b[k]] == []


def test_another_seed_is_another_world():
    a, b = ({r["image_id"] for r in plan_world(seed, SMALL)[0]} for seed in (1, 2))
    assert not a & b


def test_layout_is_complete(small):
    for name in (
        "v1/train.csv",
        "v1/train_label_to_category.csv",
        "v2/train.csv",
        "v2/index.csv",
        "v2/test.csv",
        "v2/index_image_to_landmark.csv",
        "v2/train_label_to_category.csv",
        "v2/retrieval_solution.csv",
        "v2/recognition_solution.csv",
        "truth.csv",
        "world.json",
    ):
        assert (small / name).exists(), name
    assert layout.benchmarks(small) == ["rnorth", "rsouth"]
    listed = [p for split in layout.splits(small) for p in layout.read_images(small, split).path]
    assert all(Path(p).exists() for p in listed)
    assert len(listed) == len(set(listed)) == len(list(small.rglob("*.jpg"))) == len(layout.read_truth(small))
    names = layout.landmark_names(small)
    assert {
        i for split in ("v1_train", "v2_train") for i in layout.read_images(small, split).landmark_id
    } <= names.keys()


def test_solutions_agree_with_the_truth(small):
    truth = layout.read_truth(small).set_index("image_id").true_landmark
    for r in layout.read_retrieval_solution(small).itertuples():
        assert all(truth[i] == truth[r.image_id] for i in r.images)
        assert bool(r.images) == (r.usage != "Ignored")
    for r in layout.read_recognition_solution(small).itertuples():
        assert r.landmarks == ([truth[r.image_id]] if truth[r.image_id] >= 0 else [])


def test_benchmarks_show_landmarks_that_training_never_saw():
    rows, *_ = plan_world(1, world.WORLDS["mini"])
    t = pd.DataFrame(rows)
    trained = set(t.building[t.split.isin(["v1_train", "v2_train"])].str.removeprefix("look/"))
    assert not trained & set(t.building[t.split.str.startswith("r")])


def test_easy_hard_and_junk_are_disjoint(small):
    for bench in layout.benchmarks(small):
        gnd = layout.read_revisited(small, bench)
        for g in gnd["gnd"]:
            kinds = [set(g[k]) for k in ("easy", "hard", "junk")]
            assert sum(map(len, kinds)) == len(set.union(*kinds))
            assert all(0 <= i < len(gnd["imlist"]) for k in kinds for i in k)
            assert g["bbx"][0] < g["bbx"][2] and g["bbx"][1] < g["bbx"][3]


@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_no_image_id_twice(name):
    ids = [r["image_id"] for r in plan_world(1, world.WORLDS[name])[0]]
    assert len(ids) == len(set(ids))


def test_one_aspect_and_no_noise():
    rows, *_ = plan_world(1, replace(world.WORLDS["mini"], n_aspects=1, noise=0.0))
    labelled = [r for r in rows if r["split"] in ("v1_train", "v2_train", "index")]
    assert {r["aspect"] for r in rows if r["kind"] == "landmark"} == {"front"}
    assert all(r["kind"] == "landmark" and r["landmark_id"] == r["true_landmark"] for r in labelled)
    noisy = [r for r in plan_world(1, world.WORLDS["mini"])[0] if r["split"] == "v2_train"]
    assert 0.15 < sum(r["kind"] != "landmark" for r in noisy) / len(noisy) < 0.35


def test_most_test_images_show_no_landmark():
    shown = [r["true_landmark"] >= 0 for r in plan_world(1, world.WORLDS["mini"])[0] if r["split"] == "test"]
    assert 0.3 < sum(shown) / len(shown) < 0.5


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(n_aspects=5), "allowed are 1 to 4"),
        (dict(noise=0.9), "allowed are 0.0 to 0.6"),
        (dict(n_v1=10), "two images per landmark"),
    ],
)
def test_impossible_knobs_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Knobs(**wrong)


def test_an_existing_world_is_complete_or_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "write_tables", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.draw_world(tmp_path / "world", SMALL, seed=3, n_workers=1)
    assert list(tmp_path.iterdir()) == []
