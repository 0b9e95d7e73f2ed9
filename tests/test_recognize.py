"Recognition with the paper's local features: one DELF for queries and voters, nothing that does not fit it."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_ensemble import made

from landmark import recognize, verify
from landmark.parts.data.layout import read_images
from landmark.parts.data.worlds import make_world
from landmark.parts.images.reading import read_image
from landmark.parts.local.delf import load_delf
from landmark.parts.local.features import LocalFeatures, pack
from landmark.parts.local.kinds import rule_for
from landmark.parts.local.verification import verify as verify_one
from landmark.parts.nets.backbones import make_model
from landmark.parts.nets.checkpoints import save_model

SIZE = dict(world="tiny", max_keypoints=100, max_side=160)


@pytest.fixture(scope="module")
def cleaning(tmp_path_factory):
    "A trunk, a verification that trained DELF on it, and descriptors."
    d, world = tmp_path_factory.mktemp("recognize"), make_world("tiny")
    save_model(
        d / "trunk", make_model("test_resnet", d=8), dict(backbone="test_resnet", pooling="gem", dim=8)
    )
    cfg = verify.Config(
        **SIZE, kind="delf", trunk=str(d / "trunk"), stride=8, delf_epochs=1, compare_labels=0, residual=0.04
    )
    with pytest.MonkeyPatch.context() as m:
        m.setenv("LANDMARK_RUNS", str(d / "runs"))
        (d / "runs").mkdir()
        (d / "runs" / "worlds").symlink_to(world.parent)
        yield (
            cfg,
            verify.run(cfg),
            recognize.Config(
                **SIZE, descriptors=str(made(d / "two-12345678", world)), models=["a"], kind="delf"
            ),
        )


def inliers(out):
    return pd.read_csv(out / "voters.csv", dtype=dict(query_id=str, image_id=str))


def test_queries_and_voters_are_described_by_the_delf_of_cleaning(cleaning):
    cfg, verified, asks = cleaning
    again = recognize.run(replace(asks, delf=str(verified), verified=str(verified), name="again"))
    own = recognize.run(replace(asks, delf=str(verified), residual=0.04, name="own"))
    assert (own / "local_train").exists() and not (again / "local_train").exists()
    pd.testing.assert_frame_equal(inliers(again), inliers(own))  # also the thresholds are those of cleaning
    # one after the other, by the definition: read, describe, store, verify
    world = make_world("tiny")
    paths = {s: read_images(world, s).set_index("image_id").path for s in ("test", "v2_train")}
    delf, rule = (load_delf(verified / "delf"), rule_for("delf", residual=0.04))

    def one(path):
        f = delf.extract(read_image(path, max_side=160), 100)
        desc, xy, scores, _ = pack(f)
        return LocalFeatures(xy.astype(np.float32) / 16, desc, scores, f.size, "delf")

    table = inliers(again)
    assert table.n_inliers.max() > 3
    some = table.sort_values("n_inliers", ascending=False, kind="stable").iloc[[0, 1, len(table) // 2]]
    for r in some.itertuples():
        assert (
            abs(
                verify_one(one(paths["test"][r.query_id]), one(paths["v2_train"][r.image_id]), rule).n_inliers
                - r.n_inliers
            )
            <= 1
        )


def test_what_does_not_fit_is_refused_before_the_search(cleaning, monkeypatch, tmp_path):
    cfg, verified, asks = cleaning
    given = replace(asks, delf=str(verified), verified=str(verified))
    other, few = (
        verify.run(replace(cfg, min_score=0.5, labels=2, name="other")),
        verify.run(replace(cfg, delf=str(verified), labels=2, name="few")),
    )
    sift = verify.run(verify.Config(**SIZE, compare_labels=0, name="sift"))

    def search(*a, **k):
        raise AssertionError("searched")

    monkeypatch.setattr(recognize, "search", search)
    with pytest.raises(AssertionError, match="searched"):
        recognize.run(given)
    for change, says in (
        (dict(kind="sift"), "kind 'sift'; allowed: rootsift, delf"),
        (dict(delf=""), "kind is delf, which needs a trained one: give `delf`"),
        (dict(kind="rootsift"), "set `kind: delf`, or leave `delf` empty"),
        (dict(delf=str(sift)), "give the artifact of a verification that trained its DELF"),
        (dict(verified=str(sift)), "were made with {'kind': 'rootsift'}, this run asks for {'kind': 'delf'}"),
        (dict(delf=str(other)), "come from another DELF"),
        (dict(max_side=100), "{'max_side': 160}"),
        (dict(residual=-1.0), "residual > 0"),
        (dict(verified=str(few)), "the local features of .*few"),
    ):
        with pytest.raises(ValueError, match=says):
            recognize.run(replace(given, **change))
