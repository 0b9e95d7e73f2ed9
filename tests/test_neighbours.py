"Neighbour lists: known before methods run, searched once, kept piece by piece for other runs and machines."

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from landmark import rerank
from landmark.parts.core import ParameterError
from landmark.parts.data.layout import read_truth
from landmark.parts.data.worlds import make_world
from landmark.parts.descriptors.store import Rows, l2n, write_store
from landmark.parts.rerank.expansion import augment_index
from landmark.parts.rerank.methods import METHODS, Problem, needs_of, rank
from landmark.parts.search import kept_lists
from landmark.parts.search.knn import search

ROOT, TOPK = Path(__file__).resolve().parent.parent, 30
rng = np.random.default_rng(3)
centres = l2n(rng.normal(size=(12, 16)))


def some(n):
    return l2n(centres[rng.integers(0, 12, n)] + 0.15 * rng.normal(size=(n, 16)))


QUERIES, INDEX, TRAIN, LABELS = some(23), some(90), some(60), rng.integers(0, 12, 60)


def problem(**more):
    return Problem(QUERIES, INDEX, TRAIN, LABELS, dict(device="cpu"), **more)


@pytest.fixture
def searches(monkeypatch):
    "The searches that make lists: queries, base and k of each."
    done = []

    def counted(queries, base, k, **how):
        done.append((len(queries), len(base), k))
        return search(queries, base, k, **how)

    monkeypatch.setattr(kept_lists, "search", counted)
    return done


SEARCHING = [name for name, m in METHODS.items() if not m.needs_local]  # the others have counts of their own


@pytest.mark.parametrize("name", SEARCHING)
def test_a_method_says_beforehand_what_it_will_ask_for(name, searches):
    p = problem()
    p.prepare([name], TOPK)
    known = searches.copy()
    ranks = rank(p, name, TOPK)
    assert searches[: len(known)] == known and not [
        s for s in searches[len(known) :] if s not in ((23, 90, 30), (23, 90, 10))
    ], "only what it made itself is searched now"
    lists = {pair: x[1].shape[1] for pair, x in p.lists.items()}
    assert lists == {pair: min(k, len(getattr(p, pair[1]))) for pair, k in needs_of([name], TOPK).items()}
    np.testing.assert_array_equal(ranks, rank(problem(), name, TOPK))


def test_all_methods_search_each_pair_of_sets_once(searches, tmp_path):
    p = problem(folder=tmp_path)
    p.prepare(SEARCHING, TOPK)
    assert sorted(searches) == [
        (23, 60, 3),
        (23, 90, 90),
        (90, 60, 3),
        (90, 90, 90),
        (113, 113, 113),
    ]  # wanted: 400 for SuperGlobal, 100 for EGT, 1000 for diffusion
    ranks = {m: rank(p, m, TOPK) for m in SEARCHING}
    searches.clear()
    later = problem(folder=tmp_path)  # another run, other parameters
    for m in SEARCHING:
        np.testing.assert_array_equal(rank(later, m, TOPK), ranks[m])
    rank(later, "sort+insert", 20, voting_k=2, insert_thresh=0.3)
    rank(later, "egt", 25, k_egt=40)
    rank(later, "diffusion", 25, truncation=60)
    assert not [s for s in searches if s[1] != 90 or s[0] != 23], (
        "nothing but augmented and expanded descriptors"
    )
    for m in SEARCHING:
        np.testing.assert_array_equal(ranks[m], rank(problem(), m, TOPK))


def test_a_longer_list_begins_with_the_shorter_one(tmp_path):
    twice = np.r_[INDEX, INDEX[:40], INDEX[:40]]  # many equal similarities
    for k in (60, 1, 7, 59):
        np.testing.assert_array_equal(
            kept_lists.find_neighbours(QUERIES, twice, k, tmp_path)[1], search(QUERIES, twice, k)[1]
        )
    assert [p.name for p in tmp_path.glob("*/*")] == ["60"]


def test_a_killed_search_goes_on_with_the_next_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_lists, "BLOCK", 5)
    code = f"""if True:
        import os, numpy as np
        from landmark.parts.search import kept_lists
        from landmark.parts.search.knn import search
        kept_lists.BLOCK, n = 5, [0]
        def dies(*a, **k):
            n[0] += 1
            if n[0] == 4: os.kill(os.getpid(), 9)
            return search(*a, **k)
        kept_lists.search = dies
        q, x = np.load({str(tmp_path / "q.npy")!r}), np.load({str(tmp_path / "x.npy")!r})
        kept_lists.find_neighbours(q, x, 9, {str(tmp_path / "lists")!r})"""
    np.save(tmp_path / "q.npy", QUERIES)
    np.save(tmp_path / "x.npy", INDEX)
    p = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert p.returncode == -9, p.stderr
    there = sorted((tmp_path / "lists").glob("*/9/*.npz"))
    assert [p.stem for p in there] == ["00000", "00001", "00002"]
    made = []
    monkeypatch.setattr(
        kept_lists, "search", lambda q, x, k, **how: (made.append(len(q)), search(q, x, k, **how))[1]
    )
    sims, idxs, _ = kept_lists.find_neighbours(QUERIES, INDEX, 9, tmp_path / "lists")
    want = search(QUERIES, INDEX, 9)
    assert made == [5, 3]
    np.testing.assert_array_equal(idxs, want[1])
    np.testing.assert_allclose(sims, want[0], atol=1e-6)


def test_machines_share_the_pieces_and_do_a_lost_ones_work(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_lists, "BLOCK", 2)
    made = []
    monkeypatch.setattr(
        kept_lists, "search", lambda q, x, k, **how: (made.append(q.tobytes()), search(q, x, k, **how))[1]
    )
    with ThreadPoolExecutor(3) as pool:
        found = list(
            pool.map(lambda s: kept_lists.find_neighbours(QUERIES, INDEX, 9, tmp_path, (s, 4)), range(3))
        )  # the fourth never came
    assert len(made) == len(set(made)) == 12, "every piece once"
    for _, idxs, seconds in found:
        np.testing.assert_array_equal(idxs, search(QUERIES, INDEX, 9)[1])
        assert seconds == found[0][2] > 0


def test_other_rows_are_other_lists(tmp_path):
    store = write_store(tmp_path / "store", [f"i{n}" for n in range(90)], INDEX, dict(model="m"))
    first = kept_lists.find_neighbours(QUERIES, Rows(store, range(50)), 5, tmp_path / "lists")[1]
    others = kept_lists.find_neighbours(QUERIES, Rows(store, range(40, 90)), 5, tmp_path / "lists")[1]
    np.testing.assert_array_equal(others, search(QUERIES, store[40:], 5)[1])
    assert (first != others).any()
    fresh = write_store(
        tmp_path / "store", store.ids, INDEX[::-1], dict(model="m")
    )  # extracted again, in the same place
    np.testing.assert_array_equal(
        kept_lists.find_neighbours(QUERIES, Rows(fresh, range(50)), 5, tmp_path / "lists")[1],
        search(QUERIES, fresh[:50], 5)[1],
    )


def test_augmenting_takes_one_copy_of_the_index(tmp_path):
    "Beside the result only a block of neighbours is in memory."
    import tracemalloc

    n, d = 40_000, 256
    store = write_store(
        tmp_path / "store",
        [f"i{i}" for i in range(n)],
        np.random.default_rng(0).standard_normal((n, d), dtype=np.float32),
        dict(model="m"),
    )
    near = (np.arange(n)[:, None] + np.arange(1, 6)) % n
    augment_index(store[:100], neighbours=(np.full((100, 5), 0.5, np.float32), near[:100] % 100))  # compiled
    tracemalloc.start()
    augment_index(store, neighbours=(np.full((n, 5), 0.5, np.float32), near))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.6 * 4 * n * d


@pytest.fixture
def args(tmp_path, monkeypatch):
    "An extraction of one model, as 04 leaves it."
    world = make_world("tiny")
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "worlds").symlink_to(world.parent)
    truth, folder = read_truth(world), tmp_path / "seed1" / "extract" / "one-12345678"
    for split, part in truth.groupby("split"):
        x = l2n(
            np.random.default_rng(1).normal(size=(truth.true_landmark.max() + 2, 24))[part.true_landmark]
            + 1.5 * np.random.default_rng(2).normal(size=(len(part), 24))
        )
        write_store(folder / "m" / split, part.image_id.tolist(), x, dict(model="m"))
    (folder / "manifest.json").write_text(json.dumps(dict(outputs={"m/index": dict(size=1, sha256="1")})))
    return dict(world="tiny", descriptors=str(folder))


def test_another_run_ranks_without_searching(args, searches):
    out = rerank.run(rerank.Config(**args))
    first = pd.read_csv(out / "times.csv")
    own = searches.copy()
    searches.clear()
    other = rerank.run(
        rerank.Config(
            **args,
            methods=["baseline", "egt", "sort+insert", "k_reciprocal"],
            insert_thresh=0.9,
            k_egt=20,
            submit=["egt"],
            topk=50,
        )
    )
    assert own and other != out and not searches
    np.testing.assert_array_equal(
        np.load(other / "ranks" / "m" / "baseline.npy"), np.load(out / "ranks" / "m" / "baseline.npy")[:, :50]
    )
    again = pd.read_csv(other / "times.csv").set_index(["benchmark", "step"]).seconds
    for r in first[first.step.str.startswith("search")].itertuples():
        assert again.get((r.benchmark, r.step), r.seconds) == r.seconds, "what it took when it was searched"


def test_a_killed_run_keeps_its_times_and_its_searches(args, searches, monkeypatch):
    args["methods"] = [
        "baseline",
        "sort+insert",
        "egt",
        "k_reciprocal",
        "superglobal",
    ]  # none that searches for itself
    whole = rerank.run(rerank.Config(**args, name="whole"))
    steps = pd.read_csv(whole / "times.csv").drop(columns="seconds")
    for p in whole.parents[1].glob("lists/*/*/*/*.npz"):
        p.unlink()
    real, searches[:] = rerank.rank, []

    def dies(problem, name, *more, **params):
        if name == "egt":
            raise KeyboardInterrupt
        return real(problem, name, *more, **params)

    monkeypatch.setattr(rerank, "rank", dies)
    with pytest.raises(KeyboardInterrupt):
        rerank.run(rerank.Config(**args, name="killed"))
    assert searches
    searches.clear()
    monkeypatch.setattr(rerank, "rank", real)
    out = rerank.run(rerank.Config(**args, name="killed"))
    again = pd.read_csv(out / "times.csv")
    n_index = steps[steps.step.eq("search index in index") & steps.benchmark.eq("gld")].n.item()
    assert searches and max(s[1] for s in searches) < n_index, "only the benchmarks, which had not begun"
    assert set(map(tuple, again.drop(columns="seconds").values.tolist())) == set(
        map(tuple, steps.values.tolist())
    ) and len(again) == len(steps), "a row for everything, once"
    assert (out / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_machines_share_the_searches_of_a_run(args, searches, monkeypatch):
    monkeypatch.setattr(kept_lists, "BLOCK", 2)
    with pytest.raises(ParameterError, match="`shard` is 2 of 2; it counts from 0"):
        rerank.run(rerank.Config(**args, shard=2, n_shards=2))
    cfg = rerank.Config(**args, methods=["baseline", "sort+insert"])
    alone = rerank.run(replace(cfg, name="alone"))
    n = len(searches)
    assert n > 10
    for p in alone.parents[1].glob("lists/*/*/*/*.npz"):
        p.unlink()
    counted, both, came = kept_lists.search, threading.Barrier(2, timeout=60), set()

    def meets(*a, **how):
        if threading.get_ident() not in came:
            came.add(threading.get_ident())
            both.wait()  # each has a piece of its own in hand
        return counted(*a, **how)

    searches.clear()
    monkeypatch.setattr(kept_lists, "search", meets)
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(lambda s: rerank.run(replace(cfg, shard=s, n_shards=2)), range(2))
    assert a == b and len(came) == 2 and len(searches) == n, "each piece by one of them"
    for p in alone.rglob("*.npy"):
        assert p.read_bytes() == (a / p.relative_to(alone)).read_bytes()
    searches.clear()
    rerank.run(replace(cfg, shard=1, n_shards=2))
    assert not searches
