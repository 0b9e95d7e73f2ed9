"The ensemble as the stages meet it: made once, the same for both, and no other one behind the same name."

import json

import numpy as np
import pandas as pd
import pytest

from landmark import recognize, rerank
from landmark.parts.core import ParameterError
from landmark.parts.data.layout import read_truth
from landmark.parts.data.worlds import make_world
from landmark.parts.descriptors import ensemble
from landmark.parts.descriptors.rows import ensemble as join_rows
from landmark.parts.descriptors.store import l2n, open_store, write_store

WEIGHTS = [1.0, 0.5]


@pytest.fixture
def extracted(tmp_path, monkeypatch):
    "An artifact as 04_extract leaves it: two models on everything."
    world = make_world("tiny")
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "worlds").symlink_to(world.parent)
    return made(tmp_path / "seed1" / "extract" / "two-12345678", world)


def made(folder, world, noise=0.3):
    truth, outputs = read_truth(world), {}
    for m, seed in (("a", 1), ("b", 2)):
        for split, part in truth.groupby("split"):
            rng = np.random.default_rng(seed)
            centres = rng.normal(size=(truth.true_landmark.max() + 2, 24))
            x = l2n(
                centres[part.true_landmark.to_numpy()] + noise * 24**0.5 * rng.normal(size=(len(part), 24))
            )
            write_store(folder / m / split, part.image_id.tolist(), x, dict(model=m, noise=noise))
            outputs[f"{m}/{split}"] = dict(size=1, sha256=f"{noise}")
    (folder / "manifest.json").write_text(json.dumps(dict(outputs=outputs)))
    return folder


def test_ranking_and_recognition_search_the_same_ensemble(extracted):
    args = dict(world="tiny", descriptors=str(extracted), weights=WEIGHTS)
    ranked = rerank.run(rerank.Config(**args, methods=["baseline"]))
    runs = ranked.parents[1]
    (made_once,) = runs.glob("ensemble/*/manifest.json")
    when = made_once.stat().st_mtime_ns
    named = recognize.run(recognize.Config(**args, max_keypoints=100, max_side=120))
    times = [p.stat().st_mtime_ns for p in runs.glob("ensemble/*/manifest.json")]
    assert times == [when], "the second finds what the first made"
    assert json.loads((named / "manifest.json").read_text())["metrics"]["model"] == "ensemble"
    assert pd.read_csv(ranked / "metrics.csv").model.unique().tolist() == ["ensemble"]
    assert not list(ranked.glob("ensemble*")) + list(named.glob("ensemble*"))
    index, test = (made_once.parent / "joined" / s for s in ("index", "test"))
    for s in (index, test):
        rows = [open_store(extracted / m / s.name) for m in "ab"]
        np.testing.assert_allclose(open_store(s)[:], join_rows([x[:] for x in rows], WEIGHTS), atol=1e-3)
    queries = pd.read_csv(ranked / "ranks" / "ensemble" / "queries.csv", dtype=str).query_id
    x, y = open_store(test), open_store(index)
    sims = x[[x.ids.tolist().index(q) for q in queries]] @ y[:].T
    got = np.load(ranked / "ranks" / "ensemble" / "baseline.npy")[:, : len(y)]
    np.testing.assert_allclose(
        np.take_along_axis(sims, got, 1), -np.sort(-sims, 1)[:, : got.shape[1]], atol=1e-6
    )


def test_other_weights_models_whitening_or_descriptors_are_another_ensemble(extracted):
    cfg = ensemble.Config(world="tiny", weights=WEIGHTS)

    def join(c, models="ab", of=extracted):
        return ensemble.join_models(c, of, list(models))["ensemble"]["index"]

    def with_(**more):
        return ensemble.Config(world="tiny", **{"weights": WEIGHTS, **more})

    first = join(cfg)
    others = [
        join(with_(weights=[1, 1])),
        join(cfg, "ba"),
        join(with_(pca_dims=12)),
        join(cfg, of=made(extracted.parent / "other-87654321", make_world("tiny"))),
    ]
    assert len({x.dir for x in [first, *others]}) == 5 and others[2].dim == 12
    again = made(extracted, make_world("tiny"), noise=0.4)
    fresh = join(cfg, of=again)  # the same folder, extracted again
    assert fresh.dir == first.dir and open_store(fresh.dir).card["made_by"]["ensemble"][0]["noise"] == 0.4


def test_whitening_in_both_stages(extracted):
    args = dict(world="tiny", descriptors=str(extracted), models=["a"], pca_dims=10)
    ranked = rerank.run(rerank.Config(**args, methods=["baseline", "sort+insert"]))
    recognize.run(recognize.Config(**args, max_keypoints=100, max_side=120))
    (white,) = ranked.parents[1].glob("ensemble/*/whitened/index")
    x = open_store(white)
    assert x.shape[1] == 10 and np.allclose(np.linalg.norm(x[:], axis=1), 1, atol=2e-3)
    train = open_store(white.parent / "v2_train")[:]
    spread = np.cov(train.T)
    assert np.linalg.cond(spread) < 3, "no direction speaks much louder than another"
    said = "recognize: there are no descriptors of test and v2_train by c in .* there are those by a, b"
    with pytest.raises(ParameterError, match=said):
        recognize.run(recognize.Config(**{**args, "models": ["c"]}))
