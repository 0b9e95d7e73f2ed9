"A re-ranker in a few lines, with a parameter of its own: what CONTRIBUTING.md shows, and no line more."

import functools
import json
from dataclasses import replace

import pandas as pd
import pytest
from conftest import contributing

from landmark import rerank
from landmark.parts.artifacts import stage_dir
from landmark.parts.config import make_config, parameter_help
from landmark.parts.core import ParameterError
from landmark.parts.rerank import beyond
from landmark.parts.rerank.problem import METHODS, RerankError, method, needs_of

told = []  # what the method was given


@pytest.fixture(autouse=True)
def mine():
    "Registered as a cell of rerank/beyond would, watched for what it is given."
    exec(contributing("mine"), dict(vars(beyond)))
    registered = METHODS["mine"]

    @functools.wraps(registered.fn)
    def watched(problem, topk, **params):
        told.append(params["strength"])
        return registered.fn(problem, topk, **params)

    METHODS["mine"] = replace(registered, fn=watched)
    yield
    told.clear()
    del METHODS["mine"]


def config(**more):
    return make_config(rerank.Config, dict(methods=["baseline", "mine"], world="tiny") | more)


def test_its_parameter_reaches_it_and_is_part_of_the_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path))
    out = rerank.run(config(strength=0.5))
    assert set(told) == {0.5}
    assert "rerank: strength is 0.5, for mine" in capsys.readouterr().err
    assert json.loads((out / "manifest.json").read_text())["config"]["options"] == {"strength": 0.5}
    metrics = pd.read_csv(out / "metrics.csv")
    assert set(metrics.method) == {"baseline", "mine"}
    assert metrics.groupby("method").title.first().to_dict() == dict(
        baseline="baseline", mine="shuffled a little"
    )
    told.clear()
    assert rerank.run(config(strength="0.5")) == out and not told  # nothing to do


def test_another_value_is_another_artifact_and_the_default_is_none():
    places = [stage_dir("rerank", config(**x)) for x in ({}, dict(strength=1), dict(strength=0.5))]
    assert places[0] == places[1] != places[2]


def test_it_is_refused_when_misspelt_or_of_the_wrong_type():
    with pytest.raises(ParameterError, match="no parameter `strenght`, did you mean `strength`"):
        config(strenght=0.5)
    with pytest.raises(ParameterError, match="`strength` is 'much'"):
        config(strength="much")
    assert "strength = 1.0" in parameter_help(rerank.Config)  # landmark_rerank --help


def test_parameters_of_other_methods_are_found_in_the_same_way():
    cfg = config(k1=30, alpha=2.0)  # k1 belongs to k_reciprocal; alpha has a line in the config
    assert cfg.options == dict(k1=30) and cfg.alpha == 2.0
    params = rerank.parameters_of(cfg)
    assert params["k1"] == 30 and params["alpha"] == 2.0
    assert needs_of(["k_reciprocal"], 100, **params)["everything", "everything"] == 31


def test_a_parameter_needs_a_type_and_a_default():
    with pytest.raises(RerankError, match="`strength` needs a type and a default"):
        method("other", "other")(lambda problem, topk, strength: None)
    assert "other" not in METHODS


def test_methods_that_verify_need_a_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path))
    with pytest.raises(ParameterError, match="geometric among `methods` needs local features; give `kind`"):
        rerank.run(config(methods=["baseline", "geometric"]))
    with pytest.raises(ParameterError, match="rerank: .*'surf'; allowed"):
        rerank.run(config(kind="surf"))
    assert not [*tmp_path.rglob("state.json")]
    what = dict(kind="rootsift", max_keypoints=300, n_workers=1)
    out = rerank.run(config(methods=["baseline", "geometric"], **what))
    metrics = pd.read_csv(out / "metrics.csv")
    on_landmarks = metrics[metrics.benchmark.str.startswith("gld")]
    assert {*on_landmarks.method} == {"baseline", "geometric"}
    assert {*metrics[~metrics.benchmark.str.startswith("gld")].method} == {
        "baseline"
    }  # queries are boxes there
    monkeypatch.setattr("landmark.parts.rerank.inliers.verify_pairs", None)  # every count is kept
    again = rerank.run(config(methods=["geometric"], **what))
    assert (
        pd.read_csv(again / "metrics.csv").value.tolist()
        == on_landmarks[on_landmarks.method == "geometric"].value.tolist()
    )
