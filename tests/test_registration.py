"""A new method is one registered function: ranked, tabulated, measured and reported without another line."""

import json

import numpy as np
import pandas as pd
import pytest

from landmark import benchmark, recognize, rerank, tables
from landmark.parts.bench import rerank as bench_methods
from landmark.parts.core import ParameterError
from landmark.parts.data.layout import read_ids, read_recognition_solution, read_retrieval_solution
from landmark.parts.data.submission import read_recognition, read_retrieval
from landmark.parts.data.worlds import make_world
from landmark.parts.metrics import map_of_submission
from landmark.parts.rerank.methods import METHODS, Problem, method, rank


@pytest.fixture
def toy():
    "The baseline, read from the end: easy to recognise, and worse."

    @method("toy", "the list backwards", beyond=True)
    def backwards(problem, topk, extra: int = 0):
        "The worst first."
        return rank(problem, "baseline", topk)[:, ::-1]

    yield backwards
    del METHODS["toy"]


def test_a_registered_method_is_in_the_stage_its_table_and_the_benchmark(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    out = rerank.run(rerank.Config(world="tiny", methods=["baseline", "sort", "k_reciprocal", "toy"]))
    made = pd.read_csv(out / "metrics.csv")
    assert set(made.method) == {"baseline", "sort", "k_reciprocal", "toy"}
    named = made.groupby("method")[["title", "beyond"]].first()
    assert named.loc["toy"].tolist() == ["the list backwards", True]
    assert named.loc["k_reciprocal", "beyond"]
    assert not named.loc[["baseline", "sort"], "beyond"].any()
    value = made[made.metric == "mAP@100"].pivot_table(index="method", columns="benchmark", values="value")
    assert (value.loc["toy"] < value.loc["baseline"]).all()  # it is really the list backwards
    assert "toy" in set(pd.read_csv(out / "per_query.csv").method)
    assert len(list(out.rglob("toy.npy"))) == made.model.nunique()
    table = tables.table_reranking(made.assign(seed=1))  # what the report shows
    assert table.method.str.contains("toy|the list backwards").sum() == 1
    rows = list(bench_methods.every_method(True, "cpu"))
    searching = [m for m in METHODS.values() if not m.needs_local]  # those that verify have rows of their own
    assert [r.name for r in rows] == [f"rerank/method: {m.title}" for m in searching]
    assert "the list backwards" in rows[-1].name
    benchmark.save_rows(rows, tmp_path / "cpu.jsonl")
    assert "the list backwards" in benchmark.table(tmp_path)
    assert json.loads((tmp_path / "cpu.jsonl").read_text().splitlines()[0])["ours_s"] > 0


def test_all_methods_run_when_none_is_named(toy):
    assert rerank.methods_of(rerank.Config()) == list(METHODS)
    assert "toy" in rerank.methods_of(rerank.Config(methods=["toy"]))
    with pytest.raises(ValueError, match="registered are .*toy"):
        rerank.methods_of(rerank.Config(methods=["toys"]))


def test_the_interface_is_checked():
    "Descriptors, labels and lists go in, positions come out; a method that returns something else is named."
    rng = np.random.default_rng(0)
    p = Problem(rng.normal(size=(3, 4)), rng.normal(size=(9, 4)))

    @method("short", "too short")
    def short(problem, topk):
        return np.zeros((len(problem.queries), 1), int)

    try:
        with pytest.raises(ValueError, match="method short returned"):
            rank(p, "short", 5)
    finally:
        del METHODS["short"]


def test_a_submitted_list_scores_what_the_table_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path))
    monkeypatch.setenv("LANDMARK_WORLD", "tiny")
    with pytest.raises(ParameterError, match="`submit` names sort"):
        rerank.run(rerank.Config(world="tiny", methods=["baseline"], submit=["sort"]))
    asked = dict(methods=["baseline", "sort+insert"], models=["arcface_v2"], submit=["sort+insert"])
    out, world = rerank.run(rerank.Config(world="tiny", **asked)), make_world("tiny")
    files = "submission-arcface_v2-sort+insert.csv", "submission_retrieval.csv.gz"
    assert sorted(p.name for p in out.glob("submission*")) == list(files)
    sent, same = (read_retrieval(out / f, read_ids(world, "test"), read_ids(world, "index")) for f in files)
    assert sent.equals(same)
    sent = sent.set_index("image_id").images
    m, solution = pd.read_csv(out / "metrics.csv"), read_retrieval_solution(world)
    for u in ("Public", "Private"):
        truth = solution[solution.usage == u].set_index("image_id").images
        want = m[(m.method == "sort+insert") & (m.benchmark == f"gld_{u.lower()}")].value.item()
        assert map_of_submission(sent.to_dict(), truth.to_dict()) == pytest.approx(want, abs=1e-12)
        assert 0 < want < 1


def test_submitted_predictions_score_what_the_table_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path))
    monkeypatch.setenv("LANDMARK_WORLD", "tiny")
    out, world = recognize.run(recognize.Config(world="tiny")), make_world("tiny")
    sent = read_recognition(out / "submission_recognition.csv.gz", read_ids(world, "test"))
    solution = read_recognition_solution(world)
    assert sent.image_id.tolist() == solution.image_id.tolist()
    m = pd.read_csv(out / "metrics.csv")
    want = m[m.method == "+ distractor rule"].set_index("usage").value
    got = {u: v for u, (v, _) in recognize.judge(solution, sent.landmark_id, sent.score).items()}
    assert got == pytest.approx(want.to_dict(), abs=1e-6) and max(got.values()) > 0
