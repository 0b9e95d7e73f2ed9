"""Exact search: every method returns the list of the definition, equal similarities by lowest position."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from landmark.parts.core import ParameterError
from landmark.parts.descriptors.store import Rows, l2n, write_store
from landmark.parts.search import knn, knn_torch
from landmark.parts.search.knn import (
    Seen,
    error_bound,
    faiss_candidates,
    has_faiss,
    search,
    settle,
    slow_search,
    without_self,
)
from landmark.parts.search.knn_torch import SearchError, settle_on_device, top_of_rows

METHODS = ["numpy", "torch", "torch32"] + (["faiss"] if has_faiss() else [])
rng = np.random.default_rng(0)


def tied(n, d=5):
    return l2n(rng.integers(-1, 2, (n, d)) + 1e-3)  # few different vectors


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [1, 7, 60])
def test_ties_by_lowest_position(method, k):
    queries, base = tied(15), tied(60)
    sims, idxs = search(queries, base, k, "cpu", method)
    want = slow_search(queries, base, k)
    np.testing.assert_array_equal(idxs, want[1])
    np.testing.assert_allclose(sims, want[0], atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_many_equal_rows(method):
    "A thousand copies, of which the first k count."
    base = np.tile(l2n(rng.normal(size=(1, 8))), (1000, 1))
    _, idxs = search(base[:3], base, 10, "cpu", method)
    np.testing.assert_array_equal(idxs, np.tile(np.arange(10), (3, 1)))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**31), st.sampled_from(METHODS)
)
def test_any_small_search(q, n, d, seed, method):
    r = np.random.default_rng(seed)
    queries, base = (
        r.integers(-2, 3, (m, d)).astype(np.float32) / 2 for m in (q, n)
    )  # zeros and duplicates included
    k = int(r.integers(1, n + 1))
    np.testing.assert_array_equal(
        search(queries, base, k, "cpu", method)[1], slow_search(queries, base, k)[1]
    )


@pytest.mark.parametrize("method", METHODS)
def test_blocks_and_passes(method, tmp_path):
    base, queries = l2n(rng.normal(size=(5000, 24))), l2n(rng.normal(size=(900, 24)))
    store = write_store(tmp_path / "s", [str(i) for i in range(5000)], base, {}, 1200)
    want = search(queries, store[:], 40, "cpu", "numpy")
    for memory in (1, 64):
        got = search(queries, store, 40, "cpu", method, memory_mib=memory)
        np.testing.assert_array_equal(got[1], want[1])
        np.testing.assert_allclose(got[0], want[0], atol=1e-6)


def test_a_base_on_disk_larger_than_the_limit(tmp_path):
    np.save(tmp_path / "x.npy", l2n(rng.normal(size=(40000, 64))))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")  # 10 MiB, searched with 4 MiB
    np.testing.assert_array_equal(
        search(x[:50], x, 5, "cpu", memory_mib=4)[1], search(np.array(x[:50]), np.array(x), 5, "cpu")[1]
    )
    assert (search(x[:50], x, 5, "cpu", memory_mib=4)[1][:, 0] == np.arange(50)).all()


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_base(method, tmp_path):
    "Arrays of both types, memory maps, a store and a tensor, with ties that must be settled."
    torch = pytest.importorskip("torch")
    base, queries = (
        np.repeat(l2n(rng.normal(size=(300, 48))), 3, 0).astype("f2").astype("f4"),
        l2n(rng.normal(size=(20, 48))),
    )
    want = slow_search(queries, base, 30)[1]
    kinds = dict(
        f4=base,
        f2=base.astype("f2"),
        f8=base.astype("f8"),
        fortran=np.asfortranarray(base),
        store=write_store(tmp_path / "s", [str(i) for i in range(900)], base, {}, 250),
        list=base.tolist(),
        t4=torch.from_numpy(base.copy()),
        t2=torch.from_numpy(base.astype("f2")),
    )
    for name in ("f4", "f2"):
        np.save(tmp_path / f"{name}.npy", kinds[name])
        kinds["map " + name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    for name, x in kinds.items():
        np.testing.assert_array_equal(search(queries, x, 30, "cpu", method)[1], want, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_queries(method, tmp_path):
    "Descriptors may lie on a device already, fresh from a model and in half precision, whatever the base is."
    torch = pytest.importorskip("torch")
    base, queries = (
        np.repeat(l2n(rng.normal(size=(300, 48))), 3, 0),
        l2n(rng.normal(size=(700, 48))).astype("f2").astype("f4"),
    )
    ids = [str(i) for i in range(900)]
    t = torch.from_numpy(queries)
    kinds = dict(
        f4=queries,
        f2=queries.astype("f2"),
        f8=queries.astype("f8"),
        fortran=np.asfortranarray(queries),
        list=queries.tolist(),
        store=write_store(tmp_path / "q", ids[:700], queries, {}, 150),
        t4=t,
        t2=t.half(),
        t8=t.double(),
        strided=torch.stack([t, t], 2)[:, :, 0],
        grad=t.clone().requires_grad_(),
    )
    want = search(queries, base, 30, "cpu", "numpy")
    for b in (base, torch.from_numpy(base), write_store(tmp_path / "b", ids, base, {}, 250, "float32")):
        for name, x in kinds.items():
            sims, idxs = search(x, b, 30, "cpu", method, memory_mib=2)
            assert type(sims) is np.ndarray and type(idxs) is np.ndarray
            np.testing.assert_array_equal(idxs, want[1], err_msg=name)
            np.testing.assert_allclose(sims, want[0], atol=1e-6)
    with pytest.raises(SearchError, match="query 5 is not finite"):
        search(
            torch.where(torch.arange(700)[:, None] == 5, torch.nan, t),
            torch.from_numpy(base),
            3,
            "cpu",
            method,
        )
    with pytest.raises(SearchError, match=r"queries must be \[n, d\]"):
        search(t[0], base, 3, "cpu", method)


def test_rows_travel_to_a_device_as_they_are_stored(tmp_path, monkeypatch):
    "Float16 from a store, a view of it and a memory map is widened on the device; nothing else changes."
    torch, moved = pytest.importorskip("torch"), []
    base, queries = l2n(rng.normal(size=(3000, 48))).astype("f2"), l2n(rng.normal(size=(40, 48)))
    store = write_store(tmp_path / "s", [str(i) for i in range(3000)], base, {}, 700)
    np.save(tmp_path / "x.npy", base)
    want = search(queries, base.astype("f4"), 20, "cpu", "numpy")
    monkeypatch.setattr(
        torch, "from_numpy", lambda x, f=torch.from_numpy: moved.append((x.dtype.name, len(x))) or f(x)
    )
    for x in (
        store,
        Rows(store, np.arange(3000)),
        np.load(tmp_path / "x.npy", mmap_mode="r"),
        Rows(base, np.arange(3000)),
    ):
        moved.clear()
        np.testing.assert_array_equal(search(queries, x, 20, "cpu", "torch", memory_mib=1)[1], want[1])
        assert [m for m in moved if m[1] > 40] == [("float16", 1365)] * 2 + [("float16", 270)]
    np.testing.assert_array_equal(search(queries, base.astype(">f2"), 20, "cpu", "torch")[1], want[1])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 12),
    st.sampled_from([1, 2, 7, 64, 333]),
    st.booleans(),
    st.sampled_from(["f2", "f4"]),
    st.sampled_from([0, 1]),
)
def test_a_device_settles_as_the_host_does(seed, k, d, half, dtype, memory):
    "The same list, the same queries to search again: real errors, many equal rows, zeros of both signs."
    torch, r = pytest.importorskip("torch"), np.random.default_rng(seed)
    base = (
        r.integers(-1, 2, (300, d)) / 2
        if seed % 2
        else l2n(r.normal(size=(1, d)) + 0.01 * r.normal(size=(300, d)))
    ).astype(dtype)
    base[r.integers(0, 300, 99)] = base[0]
    queries, t = r.integers(-1, 2, (9, d)).astype("f4"), torch.from_numpy(base)
    seen = Seen()
    seen.look_tensor(0, t.float(), t.float().bfloat16() if half else None)
    found = knn.spread_candidates(queries, t, k + int(r.integers(1, 30)), knn_torch.devices_of("cpu"), half)
    host = settle(
        queries, base.astype("f4"), *(x.numpy() for x in found), k, error_bound(queries, seen, half), half
    )
    q = torch.from_numpy(queries)
    device = settle_on_device(q, t, *found, k, error_bound(q, seen, half), half, memory)
    assert device[0].dtype == torch.float32
    np.testing.assert_array_equal(device[1].numpy(), host[1])
    np.testing.assert_array_equal(device[2].numpy(), host[2])
    np.testing.assert_allclose(device[0].numpy(), host[0], atol=0 if half else 1e-5)
    assert not torch.signbit(device[0][device[0] == 0]).any()  # a sort by bits would tell −0 from 0


@pytest.mark.parametrize("method", ["torch", "torch32"])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_a_tensor_as_base_gives_the_definition(method, k):
    torch = pytest.importorskip("torch")
    queries, base = tied(15), tied(60)
    want = slow_search(queries, base, k)
    for b in (base, np.repeat(base, 30, 0)[rng.permutation(1800)]):
        want, got = (
            slow_search(queries, b, k),
            search(torch.from_numpy(queries), torch.from_numpy(b), k, "cpu", method),
        )
        np.testing.assert_array_equal(got[1], want[1])
        np.testing.assert_array_equal(got[0], want[0])


@pytest.mark.parametrize("d", [3, 333, 512])
def test_equal_rows_have_equal_sums_wherever_they_lie(d):
    torch = pytest.importorskip("torch")
    base, queries = (
        rng.permutation(np.repeat(l2n(rng.normal(size=(40, d))), 25, 0)),
        l2n(rng.normal(size=(30, d))),
    )
    sims, idxs = search(queries, torch.from_numpy(base), 1000, "cpu", "torch")
    for s, x in zip(sims, idxs):
        _, same = np.unique(base[x], axis=0, return_inverse=True)
        same = same.reshape(-1)
        assert (np.diff(np.flatnonzero(np.diff(same))) % 25 == 0).all() and all(
            len(set(s[same == g])) == 1 for g in range(40)
        )

    def halves(x):
        while n := len(x) // 2:
            last, x = x[2 * n :], [a + b for a, b in zip(x[:n], x[n:])]
            x[0] += sum(last)
        return x[0]

    x = torch.from_numpy(rng.normal(size=(9, 3, d)))
    assert knn_torch._sums(x.clone()).tolist() == [
        [halves(r) for r in m] for m in x.tolist()
    ]  # element by element, in a stated order


def test_queries_travel_once(monkeypatch):
    "Of queries on the host everything that happens on the device needs one copy."
    torch, moved = pytest.importorskip("torch"), []
    base, queries = torch.from_numpy(l2n(rng.normal(size=(3000, 64)))), l2n(rng.normal(size=(500, 64)))
    want = search(queries, base, 40, "cpu", "numpy")

    def counted(move):
        def f(x):
            if isinstance(x, np.ndarray) and x.shape[1:] == (64,):
                moved.append(x.shape)
            return move(x)

        return f

    for name in ("from_numpy", "as_tensor"):
        monkeypatch.setattr(torch, name, counted(getattr(torch, name)))
    np.testing.assert_array_equal(search(queries, base, 40, "cpu", "torch", memory_mib=64)[1], want[1])
    assert moved == [(500, 64)]


@pytest.mark.parametrize("method", METHODS)
def test_memory_stays_under_the_stated_limit(method, tmp_path):
    "A base of 100 MiB on disk, 8 MiB of memory: beyond the mapped file the process stays near the limit."
    from landmark.parts.bench.side_by_side import PeakMemory

    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell mapped files from memory")
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (102400, 256))
    block = l2n(rng.normal(size=(1024, 256)))
    for i in range(100):
        x[i * 1024 : (i + 1) * 1024] = block[rng.permutation(1024)] * np.float32(1 - i / 1000)
    queries = block[:40].copy()
    del x
    base = np.load(tmp_path / "x.npy", mmap_mode="r")
    search(queries, base[:2000], 5, "cpu", method, memory_mib=8)  # compiles and allocates what stays
    with PeakMemory() as memory:
        _, idxs = search(queries, base, 20, "cpu", method, memory_mib=8)
    assert memory.mib < 40, f"{memory.mib:.0f} MiB"
    assert (idxs[:, 0] < 1024).all() and (np.diff(idxs // 1024, axis=1) >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_many_queries_stay_under_the_limit_too(method, tmp_path):
    "Forty thousand queries, 78 MiB in float32 and twice that in float64: never all of them at once."
    from landmark.parts.bench.side_by_side import PeakMemory

    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell mapped files from memory")
    x = np.tile(l2n(rng.normal(size=(2000, 512))), (20, 1))
    store = write_store(tmp_path / "s", [str(i) for i in range(len(x))], x, {}, 20000)
    base = x[:300].copy()
    search(x[:5000], base, 1, "cpu", method, memory_mib=8)  # compiles and allocates what stays
    for queries in (store, x):
        with PeakMemory() as memory:
            _, idxs = search(queries, base, 1, "cpu", method, memory_mib=32)
        assert memory.mib < 100, f"{memory.mib:.0f} MiB"
        assert (idxs[:300, 0] == np.arange(300)).all() and (idxs[2000:2300, 0] == np.arange(300)).all()


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_lists_of_candidates_stay_under_the_limit_too(method, on_device):
    "Twenty neighbours of forty thousand queries: what counts are lists of candidates, not rows."
    from landmark.parts.bench.side_by_side import PeakMemory

    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell mapped files from memory")
    torch = pytest.importorskip("torch")
    base, queries = l2n(rng.normal(size=(600, 16))), l2n(rng.normal(size=(40000, 16)))
    search(
        queries[:300], x := torch.from_numpy(base) if on_device else base, 20, "cpu", method, memory_mib=16
    )  # compiles and allocates what stays
    with PeakMemory() as memory:
        sims, idxs = search(queries, x, 20, "cpu", method, memory_mib=16)
    assert memory.mib - (sims.nbytes + idxs.nbytes) / 2**20 < 18, f"{memory.mib:.0f} MiB"


@pytest.mark.parametrize("k", [2048, 5000])
def test_large_k(k):
    base, queries = l2n(rng.normal(size=(6000, 16))), l2n(rng.normal(size=(4, 16)))
    np.testing.assert_array_equal(
        search(queries, base, k, "cpu")[1],
        np.argsort(-(queries.astype("d") @ base.T.astype("d")).astype("f"), 1, kind="stable")[:, :k],
    )


def test_bfloat16_candidates_are_searched_again_where_they_do_not_suffice(monkeypatch, capsys):
    base = l2n(
        rng.normal(size=(1, 32)) + 1e-4 * rng.normal(size=(3000, 32))
    )  # closer together than bfloat16 can tell
    seen, original = [], knn.spread_candidates
    monkeypatch.setattr(knn, "spread_candidates", lambda *a: seen.append(a[4]) or original(*a))
    np.testing.assert_array_equal(
        search(base[:20], base, 5, "cpu", "torch")[1], search(base[:20], base, 5, "cpu", "numpy")[1]
    )
    assert seen[0] and False in seen  # bfloat16 first, then float32
    assert "bfloat16 could not decide 20 of 20 queries" in capsys.readouterr().err


def test_rounding_that_hides_the_true_neighbours():
    """True neighbours that bfloat16 takes as much off as it can, some it makes larger, between them a crowd.

    The list looks finished: the fifth is better than the last candidate by more than a rounded result can be
    wrong. Only the bound of both factors knows."""
    d, k, down, up = 64, 5, 1 + 2**-8 * 0.98, 1 + 2**-8 * 1.02  # rounds to 1, rounds to 1 + 2**-7

    def row(x, rest):
        return np.float32([x] * 62 + [rest] * 2)

    good, larger, crowd = row(down, 143 / 256), row(up, 136 / 256), row(1, 160 / 256)
    queries, base = (
        np.full((1, d), down, np.float32),
        np.concatenate([np.tile(larger, (k, 1)), np.tile(crowd, (600, 1)), np.tile(good, (k, 1))]),
    )
    rough = knn.spread_candidates(queries, base, 2 * k + 32, knn_torch.devices_of("cpu"))
    assert rough[1].max() < 605 and set(range(k)) <= set(
        rough[1][0].tolist()
    )  # the candidates miss every true neighbour
    kept = (queries.astype("d") @ base[:1].T.astype("d"))[0, 0]
    assert kept - rough[0][0, -1] > 2**-8 * rough[0][0, -1]
    np.testing.assert_array_equal(search(queries, base, k, "cpu", "torch")[1], [range(605, 610)])
    np.testing.assert_array_equal(search(queries, base, k, "cpu", "numpy")[1], [range(605, 610)])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.sampled_from([8, 64, 300]),
    st.sampled_from([1e-6, 1e-4, 1e-2, 1]),
)
def test_bounds_hold_and_near_ties_come_in_order(seed, k, d, spread):
    torch, r = pytest.importorskip("torch"), np.random.default_rng(seed)
    base = l2n(r.normal(size=(1, d)) + spread * r.normal(size=(400, d)))
    base[r.integers(0, 400, 50)] = base[0]
    queries = l2n(base[:6] + spread * r.normal(size=(6, d)))
    true, seen = queries.astype("d") @ base.T.astype("d"), Seen()
    x = torch.from_numpy(base)
    seen.look_tensor(0, x, x.bfloat16())
    rough = (torch.from_numpy(queries).bfloat16() @ x.bfloat16().T).double().numpy()
    assert (np.abs(rough - true) <= error_bound(queries, seen, True)[:, None] + 2**-8 * np.abs(rough)).all()
    assert (np.abs(queries @ base.T - true) <= error_bound(queries, seen)[:, None]).all()
    want = np.argsort(-true.astype("f"), 1, kind="stable")[:, :k]
    for method in METHODS:
        np.testing.assert_array_equal(search(queries, base, k, "cpu", method)[1], want)


def test_float32_sums_that_lose_every_addend():
    "One large product and many that vanish beside it one by one: the classical worst case."
    d = 4096
    q = np.ones((1, d), np.float32)
    x = np.full((1, d), 2.0**-25, np.float32)
    x[0, 0] = 1
    seen = Seen()
    seen.look(0, x)
    serial = np.cumsum(q * x, axis=1, dtype=np.float32)[0, -1]
    assert serial == 1 and (q.astype("d") @ x.T.astype("d"))[0, 0] - serial > 1e-4
    assert (q.astype("d") @ x.T.astype("d"))[0, 0] - serial <= error_bound(q, seen)[0]


@pytest.mark.parametrize("level", ["medium", "high", "highest"])
def test_the_precision_of_the_process_does_not_matter(level):
    torch = pytest.importorskip("torch")
    base = l2n(rng.normal(size=(1, 512)) + 0.02 * rng.normal(size=(2000, 512)))
    want, before = search(base[:40], base, 20, "cpu", "numpy"), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        got = search(base[:40], base, 20, "cpu", "torch32")
        assert torch.get_float32_matmul_precision() == level
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)


def test_settling_is_needed():
    "Without it the same rows come in another order: float32 products of equal rows differ."
    base = np.repeat(l2n(rng.normal(size=(400, 333))), 3, 0)[rng.permutation(1200)]
    queries = l2n(rng.normal(size=(50, 333)))
    want = search(queries, base, 30, "cpu")[1]
    sims = queries @ base.T
    plain = np.argsort(-(sims + rng.normal(size=sims.shape) * 1e-8), 1, kind="stable")[:, :30]
    assert (plain != want).any()
    exact = np.sort(-(queries.astype("d") @ base.T.astype("d")), 1)
    same = np.diff(want, axis=1)[np.abs(np.diff(exact[:, :30], axis=1)) < 1e-12]
    assert len(same) and (same > 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 9), st.integers(0, 2**31))
def test_top_of_wide_rows(n, k, seed):
    torch = pytest.importorskip("torch")
    scores = torch.from_numpy(np.random.default_rng(seed).permutation(3 * n).reshape(3, n).astype(np.float32))
    k = min(k, n)
    np.testing.assert_array_equal(top_of_rows(scores, k, 4)[1].numpy(), scores.topk(k).indices.numpy())


def test_without_self():
    x = l2n(rng.normal(size=(30, 4)))
    x[7] = x[3]
    sims, idxs = without_self(*search(x, x, 6, "cpu"))
    assert idxs.shape == (30, 5) and not (idxs == np.arange(30)[:, None]).any()
    assert idxs[7, 0] == 3 and idxs[3, 0] == 7


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(k=0), "k is 0"),
        (dict(k=51), "k is 51; the base has 50 rows"),
        (dict(queries=np.ones((2, 3))), "queries have 3 dimensions"),
        (dict(base=np.full((50, 4), np.nan)), "base row 0 is not finite"),
        (dict(queries=np.full((2, 4), np.inf)), "query 0 is not finite"),
        (dict(queries=np.ones(4)), r"queries must be \[n, d\]"),
        (dict(method="annoy"), "method is"),
    ],
)
def test_named_errors(change, said):
    args = dict(queries=np.ones((2, 4)), base=np.ones((50, 4)), k=3, device="cpu") | change
    with pytest.raises(SearchError, match=said):
        search(**args)


def small_gpu(monkeypatch, most):
    "Devices on which no block of more than `most` rows fits."
    torch, calls, original = pytest.importorskip("torch"), [], knn_torch.top_of_rows

    def top(scores, k):
        calls.append(scores.shape[1])
        if scores.shape[1] > most:
            raise torch.cuda.OutOfMemoryError("block")
        return original(scores, k)

    monkeypatch.setattr(knn_torch, "top_of_rows", top)
    return calls


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu,cpu"])
@pytest.mark.parametrize("method", ["torch", "torch32"])
def test_a_gpu_too_small_goes_on_with_smaller_blocks(monkeypatch, capsys, devices, method):
    base, queries = l2n(rng.normal(size=(15000, 8))), l2n(rng.normal(size=(10, 8)))
    want = search(queries, base, 5, "cpu", "numpy")
    calls = small_gpu(monkeypatch, 2000)
    np.testing.assert_array_equal(search(queries, base, 5, devices, method)[1], want[1])
    assert max(calls) > 2000 and capsys.readouterr().err.count(
        "cpu is too small for this block; going on with"
    ) >= len(devices.split(","))


def test_a_gpu_much_too_small_is_named(monkeypatch):
    small_gpu(monkeypatch, 10)
    base = l2n(rng.normal(size=(5000, 8)))
    with pytest.raises(SearchError, match="cpu cannot hold 625 base rows beside 1 query$"):
        search(base[:10], base, 5, "cpu", "torch")


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("method, devices", [("torch", "cpu"), ("torch32", "cpu"), ("torch", "cpu,cpu")])
@pytest.mark.parametrize("what", ["_join", "settle_on_device", "queries"])
def test_a_gpu_too_small_for_the_lists_takes_fewer_queries(
    monkeypatch, capsys, on_device, method, devices, what
):
    "The lists of 90 queries fit, however small the blocks are; so do 90 rows of queries."
    torch = pytest.importorskip("torch")
    base, queries = l2n(rng.normal(size=(5000, 8))), l2n(rng.normal(size=(350, 8)))
    want = search(queries, base, 5, "cpu", "numpy")
    if what == "settle_on_device" and not on_device:
        pytest.skip("settled on the host")
    module, name = dict(
        _join=(knn_torch, "_join"), settle_on_device=(knn, "settle_on_device"), queries=(torch.Tensor, "to")
    )[what]
    original, refused = getattr(module, name), []

    def refuse(q, *a, **k):
        if 90 < len(q) <= 350 and q.shape[1] == 8:
            refused.append(len(q))
            raise torch.cuda.OutOfMemoryError("lists")
        return original(q, *a, **k)

    monkeypatch.setattr(module, name, refuse)
    got = search(queries, torch.from_numpy(base) if on_device else base, 5, devices, method)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)
    assert "too small for that many queries; going on with 87 at a time" in capsys.readouterr().err and {
        175,
        350,
    } <= set(refused)


def test_what_a_failed_attempt_held_is_free_before_the_next(monkeypatch):
    "An exception keeps the tensors of its frames alive; handing memory back has to wait until it is gone."
    import weakref

    torch, held, original, free = pytest.importorskip("torch"), [], knn_torch.top_of_rows, []

    def top(scores, k):
        if scores.shape[1] <= 2000:
            return original(scores, k)
        held.append(weakref.ref(scores))
        raise torch.cuda.OutOfMemoryError("block")

    def product(x):
        if len(x) and x.shape[0] * x.shape[1] <= 2000:
            return sums(x)
        held.append(weakref.ref(x))
        raise torch.cuda.OutOfMemoryError("settling")

    sums = knn_torch._sums
    monkeypatch.setattr(knn_torch, "top_of_rows", top)
    monkeypatch.setattr(knn_torch, "_sums", product)
    monkeypatch.setattr(knn_torch, "_free", lambda device: free.append([x() for x in held]))
    base, queries = l2n(rng.normal(size=(9000, 64))), l2n(rng.normal(size=(300, 64)))
    np.testing.assert_array_equal(
        search(queries, torch.from_numpy(base), 5, "cpu", "torch")[1],
        search(queries, base, 5, "cpu", "numpy")[1],
    )
    assert len(free) > 3 and not any(x is not None for row in free for x in row)


def test_a_gpu_too_small_for_settling_goes_on_with_fewer(monkeypatch, capsys):
    "Only 3,000 products at a time, on a device that holds the base."
    torch = pytest.importorskip("torch")
    base, queries = l2n(rng.normal(size=(5000, 64))), l2n(rng.normal(size=(300, 64)))
    want = search(queries, base, 40, "cpu", "numpy")
    original = knn_torch._sums

    def sums(x):
        if x.shape[0] * x.shape[1] > most:
            raise torch.cuda.OutOfMemoryError("settling")
        return original(x)

    monkeypatch.setattr(knn_torch, "_sums", sums)
    most = 3000
    np.testing.assert_array_equal(search(queries, torch.from_numpy(base), 40, "cpu", "torch", 8)[1], want[1])
    assert (
        "too small to settle that many neighbours at a time; going on with 1,927" in capsys.readouterr().err
    )
    most = 50
    with pytest.raises(SearchError, match="cannot hold 1,024 rows in float64 beside the base and 1 query"):
        search(queries[:9], torch.from_numpy(base), 40, "cpu", "torch")


@pytest.mark.parametrize("devices", ["cpu,cpu", ["cpu"] * 3, ["cpu"] * 8])
@pytest.mark.parametrize("k", [1, 40, 2500])
def test_several_devices_find_what_one_finds(devices, k, tmp_path):
    base, queries = l2n(rng.normal(size=(2600, 24))), l2n(rng.normal(size=(90, 24)))
    base[700:900] = base[100:300]  # ties across the devices' spans
    store = write_store(tmp_path / "s", [str(i) for i in range(2600)], base, {}, 500, "float32")
    want = search(queries, base, k, "cpu", "numpy")
    for x in (base, store):
        np.testing.assert_array_equal(search(queries, x, k, devices, memory_mib=8)[1], want[1])
    np.testing.assert_array_equal(search(queries, base, k, devices, "torch32")[1], want[1])


def test_devices_that_are_not_there():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    base = l2n(rng.normal(size=(10, 4)))
    for device, said in (
        ("all", "shows no CUDA GPU"),
        ("cuda:0,cuda:1", "this machine shows 0 CUDA GPUs"),
        ("cpu,gpu", "device is 'gpu'"),
    ):
        with pytest.raises(ParameterError, match=said):
            search(base, base, 2, device)


@pytest.mark.parametrize("n_devices", [1, 2, 5])
def test_faiss_over_several_gpus(monkeypatch, n_devices):
    "The bookkeeping; the GPUs' work is done by the CPU."
    faiss = pytest.importorskip("faiss")
    used = []

    def on_gpu(res, xq, xb, k, metric, device):
        used.append(device)
        assert k <= 2048
        return faiss.knn(xq, xb, k, metric=metric)

    monkeypatch.setattr(faiss, "knn_gpu", on_gpu, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    base, queries = l2n(rng.normal(size=(3000, 16))), l2n(rng.normal(size=(30, 16)))
    got, want = (
        faiss_candidates(queries, base, 50, rows=1100, gpus=list(range(n_devices))),
        faiss_candidates(queries, base, 50),
    )
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)
    assert set(used) == set(range(n_devices))


def test_faiss_on_a_gpu_too_small_goes_on_with_smaller_blocks(monkeypatch, capsys):
    faiss, most = pytest.importorskip("faiss"), 900

    def on_gpu(res, xq, xb, k, metric, device):
        if len(xb) > most:
            raise RuntimeError(
                "Error in virtual void* faiss::gpu::StandardGpuResourcesImpl::allocMemory: "
                "cudaMalloc error out of memory"
            )
        return faiss.knn(xq, xb, k, metric=metric)

    monkeypatch.setattr(faiss, "knn_gpu", on_gpu, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    base, queries = l2n(rng.normal(size=(3000, 16))), l2n(rng.normal(size=(30, 16)))
    sims, idxs = faiss_candidates(
        queries, base, 50, gpus=[0, 1]
    )  # products of other blocks may differ in the last digit, and so may the order
    np.testing.assert_allclose(sims, faiss_candidates(queries, base, 50)[0], atol=1e-6)
    np.testing.assert_allclose((queries[:, None] * base[idxs]).sum(2), sims, atol=1e-6)
    assert "a GPU is too small for this block; going on with 1,500 rows" in capsys.readouterr().err
    most = 10
    with pytest.raises(RuntimeError, match="out of memory"):
        faiss_candidates(queries, base, 50, gpus=[0])


def test_a_row_that_is_not_finite_is_found_by_every_method():
    base = l2n(rng.normal(size=(3000, 16)))
    base[2222, 3] = np.inf
    for method in METHODS:
        with pytest.raises(SearchError, match="base row 2222 is not finite"):
            search(base[:5], base, 5, "cpu", method, memory_mib=1)
    with pytest.raises(SearchError, match="base row 2222 is not finite"):
        search(base[:5], base, 5, "cpu,cpu")
