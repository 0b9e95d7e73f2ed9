"""Recognition with the paper's local features: one DELF for queries and voters, nothing that does not fit it.
Then confidences: right by slow definitions, and nothing of Private in them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from test_ensemble import made

from landmark import recognize, rerank, verify
from landmark.parts.data.layout import read_images
from landmark.parts.data.worlds import make_world
from landmark.parts.images.reading import read_image
from landmark.parts.local.delf import load_delf
from landmark.parts.local.features import LocalFeatures, pack
from landmark.parts.local.kinds import rule_for
from landmark.parts.local.verification import verify as verify_one
from landmark.parts.nets.backbones import make_model
from landmark.parts.nets.checkpoints import save_model
from landmark.parts.rerank import confidence
from landmark.parts.rerank.confidence import (
    choose_threshold,
    confidences,
    cross_fitted,
    isotonic,
    logistic,
    reliability,
)

SIZE = dict(world="tiny", max_keypoints=100, max_side=160)


def test_several_devices_search_and_one_of_them_describes(tmp_path):
    "`device: all`, or some by name, is of the search; local features are found on the first."
    several = dict(kind="rootsift", device="cpu,cpu")
    assert recognize.describer(recognize.Config(**several))
    cfg = rerank.Config(world="tiny", **several)
    assert rerank.local_counts(cfg, make_world("tiny"), [], []).how["device"] == "cpu"


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


def drawn(seed, n=300):
    "Two kinds of evidence, the chance they give, and answers drawn with it."
    rng = np.random.default_rng(seed)
    x = np.c_[rng.normal(size=n), rng.poisson(4, n)]
    chance = expit(x[:, 0] + 0.5 * x[:, 1] - 3)
    return x, chance, rng.random(n) < chance


@pytest.mark.parametrize("seed", range(4))
def test_calibrations_are_those_of_another_library(seed):
    x, _, right = drawn(seed)
    n, m = right.sum(), (~right).sum()
    targets = np.where(right, (n + 1) / (n + 2), 1 / (m + 2))
    twice, said = np.r_[x, x], np.r_[np.ones(300), np.zeros(300)]  # each answer a bit right, a bit wrong
    theirs = LogisticRegression(C=np.inf, tol=1e-9, max_iter=1000)
    theirs.fit(twice, said, sample_weight=np.r_[targets, 1 - targets])
    assert (theirs.coef_ > 0).all()
    np.testing.assert_allclose(logistic(x, right)(x), theirs.predict_proba(x)[:, 1], atol=2e-3)
    one = x[:, 0].round(1)  # with equal scores
    theirs = IsotonicRegression(out_of_bounds="clip").fit(one, targets)
    new = np.linspace(-4, 4, 99)
    np.testing.assert_allclose(isotonic(one, right)(new), theirs.predict(new), atol=1e-6)


def test_calibrations_find_the_chances_that_answers_were_drawn_with():
    x, chance, right = drawn(0, 20_000)
    assert np.abs(logistic(x, right)(x) - chance).max() < 0.03
    p = cross_fitted(logistic, x, right)
    assert np.sqrt(np.mean((p - chance) ** 2)) < 0.01
    tables = [reliability(*drawn(seed)[1:]) for seed in range(40)]  # true chances
    inside = pd.concat(tables).eval("low <= confidence <= high").mean()
    assert 0.92 < inside < 0.99  # a 95 % interval


@pytest.mark.parametrize("seed", range(4))
def test_more_evidence_is_never_less_sure(seed):
    rng = np.random.default_rng(seed)
    x, right = rng.normal(size=(40, 2)), rng.random(40) < 0.5  # nothing to learn
    more = x + rng.random((40, 2))
    fit, curve = logistic(x, right), isotonic(x[:, 0], right)
    assert (fit(more) >= fit(x)).all() and (curve(more[:, 0]) >= curve(x[:, 0])).all()
    assert ((fit(100 * x) >= 0) & (fit(100 * x) <= 1)).all()


def test_a_score_that_separates_completely_stays_modest():
    x, right = np.arange(20.0), np.arange(20) >= 10
    for fit in (logistic, isotonic):
        p = fit(x, right)(x)
        assert p.min() >= 1 / 12 - 0.08 and p.max() <= 1 - 1e-3 and p[0] < 0.2 < 0.8 < p[-1]
    assert np.isnan(confidences(logistic, np.r_[x, np.nan], np.r_[right, False], np.ones(21))[-1])


@pytest.mark.parametrize("seed", range(6))
def test_the_threshold_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    p = rng.random(40).round(1)
    right = rng.random(40) < p
    for max_wrong in (0, 0.05, 0.2, 0.5):
        got = {
            t: (right & (p >= t)).sum() for t in p if (~right & (p >= t)).sum() <= max_wrong * (p >= t).sum()
        }
        best = max(got.values(), default=0)
        want = max((t for t, k in got.items() if k == best), default=np.inf) if best else np.inf
        assert choose_threshold(p, right, max_wrong) == want


@pytest.fixture(scope="module")
def descriptors(tmp_path_factory):
    "Made-up descriptors of the tiny world."
    return str(made(tmp_path_factory.mktemp("made") / "two-12345678", make_world("tiny")))


@pytest.fixture
def named(tmp_path, monkeypatch, descriptors):
    "Names of the tiny world, with Private's truth as it is, or as somebody wants it: image_id → landmarks."
    world = make_world("tiny")
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))

    def run(name, private=None):
        folder = shutil.copytree(world, tmp_path / name)
        path = folder / "v2" / "recognition_solution.csv"
        df = pd.read_csv(path, dtype=str)
        if private is not None:
            rows = df.Usage == "Private"
            df.loc[rows, "landmarks"] = df.id[rows].map(private)
        df.to_csv(path, index=False)
        asks = dict(world=str(folder), name=name, descriptors=descriptors, models=["a"], kind="rootsift")
        return recognize.run(recognize.Config(**(SIZE | asks), max_wrong=0.4))

    return run


def test_nothing_of_private_is_chosen_on(named, monkeypatch):
    monkeypatch.setattr(confidence, "LEAST", 2)  # tiny has six photos to choose on
    true = named("true")
    answers = pd.read_csv(true / "names.csv", dtype=str).set_index("image_id").landmark_id
    outs = [true, named("all-right", answers), named("all-wrong", dict.fromkeys(answers.index, "1"))]
    same = [(o / "names.csv").read_text() + (o / "calibrations.csv").read_text() for o in outs]
    assert same[0] == same[1] == same[2]
    numbers = [json.loads((o / "manifest.json").read_text())["metrics"]["naming"] for o in outs]
    assert numbers[0] == numbers[1] == numbers[2] and numbers[0]["threshold"] > 0
    names, naming = (pd.read_csv(outs[0] / f"{f}.csv") for f in ("names", "naming"))
    assert names.confidence.between(0, 1).all() and names.named.any() and (names.name != "").all()
    assert naming.groupby("usage").n.sum().to_dict() == names.usage.value_counts().to_dict()
    others = [pd.read_csv(o / "naming.csv").query("usage == 'Private'").n.tolist() for o in outs]
    n = sum(others[0])  # what Private is measured by does change
    assert others[1][1:2] + others[1][3:] == [0, 0, 0] and others[2][0] == 0 and sum(others[2][:3]) == n


def test_too_few_answers_give_a_sentence_and_no_names(named, capsys):
    out = named("few")
    assert "no confidences and no names; on Public there are" in capsys.readouterr().err
    names = pd.read_csv(out / "names.csv")
    assert names.confidence.isna().all() and not names.named.any() and len(names) == 14
    assert [len(pd.read_csv(out / f"{f}.csv")) for f in ("reliability", "naming", "calibrations")] == [
        0,
        0,
        0,
    ]


def test_a_share_of_wrong_names_is_a_share():
    with pytest.raises(ValueError, match="max_wrong is 5.0; allowed: 0 or more, less than 1"):
        recognize.run(recognize.Config(**SIZE, max_wrong=5))
