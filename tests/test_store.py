"""The descriptor store: what is written is what is read, and what is broken is named."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from landmark.parts.descriptors.hdf5 import read_h5, write_h5
from landmark.parts.descriptors.store import (
    Rows,
    StoreError,
    check_rows,
    check_store,
    concat_stores,
    finish_store,
    l2n,
    missing_shards,
    open_store,
    rows_of,
    write_shard,
    write_store,
)

rng = np.random.default_rng(0)
X, IDS = l2n(rng.normal(size=(103, 7))), [f"{i:016x}" for i in range(103)]
CARD = dict(model="test")


@pytest.mark.parametrize("shard_size", [1, 10, 103, 500])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_round_trip(tmp_path, shard_size, dtype):
    s = write_store(tmp_path / "s", IDS, X, CARD, shard_size, dtype)
    want = X.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(s[:], want)
    np.testing.assert_array_equal(s.array(), want)
    rows = rng.integers(-103, 103, (5, 3))
    np.testing.assert_array_equal(s[rows], want[rows])
    np.testing.assert_array_equal(s[90:5:-3], want[90:5:-3])
    np.testing.assert_array_equal(s[want[:, 0] > 0], want[want[:, 0] > 0])
    np.testing.assert_array_equal(Rows(s, rows.ravel())[2:9], want[rows.ravel()[2:9]])
    assert s.ids.tolist() == IDS
    assert (s.card["made_by"], s.dim) == (CARD, 7)
    assert check_store(tmp_path / "s") == []
    assert s[0].dtype == np.float32 and np.asarray(s, np.float64).dtype == np.float64


def test_an_empty_store(tmp_path):
    s = write_store(tmp_path / "s", [], np.zeros((0, 7)), CARD)
    assert len(s) == 0 and s[:].shape[0] == 0 and len(s.ids) == 0 and check_store(tmp_path / "s") == []


def test_nothing_is_copied_on_opening(tmp_path):
    write_store(tmp_path / "s", IDS, X, CARD, 50, "float32")
    again = open_store(tmp_path / "s")
    assert not again._maps  # not even mapped
    again[3]
    assert list(again._maps) == [0] and isinstance(again.shard(0), np.memmap)
    assert isinstance(write_store(tmp_path / "one", IDS, X, CARD, dtype="float32").array(), np.memmap)


def test_few_files_are_open_however_many_shards(tmp_path):
    "Three stores of forty shards, in another order each, under a limit of 64 more open files."
    resource = pytest.importorskip("resource")
    stores = []
    for m in range(3):
        perm = rng.permutation(103)
        write_store(tmp_path / str(m), np.array(IDS)[perm], X[perm], dict(m=m), 3)
        stores.append(open_store(tmp_path / str(m)))
        stores[-1].keep_open = 8
    n_open = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 60
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 64, limits[1]))
    try:
        joined = concat_stores(stores, tmp_path / "out", shard_size=20, dtype="float32")
        assert joined.ids.tolist() == stores[0].ids.tolist() and max(len(s._maps) for s in stores) == 8
        stores[0].keep_open = 99
        with contextlib.ExitStack() as held:
            for _ in range(40):
                held.enter_context(open(os.devnull))
            with pytest.raises(StoreError, match=r"too many files are open \(.+\); nothing is wrong with it"):
                stores[0][:]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    np.testing.assert_allclose(joined[:][:, :7] * np.sqrt(3, dtype="f4"), stores[0][:], atol=1e-3)


def edit(d, **change):
    (d / "card.json").write_text(json.dumps(json.loads((d / "card.json").read_text()) | change))


def copy_first(d):
    for end in (".npy", ".ids.npy"):
        (d / f"00001{end}").write_bytes((d / f"00000{end}").read_bytes())


def put_row(d, value):
    spoilt = np.where(np.arange(50)[:, None] == 3, value, X[:50])
    np.save(d / "00000.npy", spoilt.astype("f2"))


BREAK = dict(
    missing=(lambda d: (d / "00001.npy").unlink(), "00001.npy missing"),
    ids_missing=(lambda d: (d / "00000.ids.npy").unlink(), "00000.ids.npy missing"),
    cut=(lambda d: os.truncate(d / "00001.npy", 200), "differs from its recorded sha256"),
    doubled=(copy_first, "occur more than once"),
    nan=(lambda d: put_row(d, np.nan), "are not finite"),
    zero=(lambda d: put_row(d, 0), "are all zero"),
    newer=(lambda d: edit(d, version=9), "made by version 9"),
    foreign=(lambda d: edit(d, format="other"), "not the card of a descriptor store"),
    other_dimension=(lambda d: np.save(d / "00000.npy", X[:50, :5].astype("f2")), "its card says (50, 7)"),
    unfinished=(lambda d: (d / "card.json").unlink(), "3 finished shards; its writing was interrupted"),
)


@pytest.mark.parametrize("kind", BREAK)
def test_check_names_what_is_broken(tmp_path, kind):
    write_store(tmp_path / "s", IDS, X, CARD, 50)
    assert check_store(tmp_path / "s") == []
    how, said = BREAK[kind]
    how(tmp_path / "s")
    assert any(said in p for p in check_store(tmp_path / "s")), check_store(tmp_path / "s")


def test_shards_of_other_models_never_meet(tmp_path):
    d = tmp_path / "s"
    write_shard(d, 0, IDS[:50], X[:50], CARD)
    write_shard(d, 1, IDS[50:], X[50:], dict(model="other"))
    assert missing_shards(d, 2, CARD) == [1]
    with pytest.raises(StoreError, match=r"2 models: \w+ \(shard 0 first\), \w+ \(shard 1 first\)"):
        finish_store(d, 2, CARD)
    write_shard(d, 1, IDS[50:], X[50:, :3], CARD)
    with pytest.raises(StoreError, match="2 dimensions"):
        finish_store(d, 2, CARD)
    write_shard(d, 1, IDS[50:], X[50:], CARD, "float32")
    with pytest.raises(StoreError, match="2 types"):
        finish_store(d, 2, CARD)
    write_shard(d, 1, IDS[50:], X[50:], CARD)
    assert len(open_store(finish_store(d, 2, CARD))) == 103
    with pytest.raises(StoreError, match="not made by this card"):
        finish_store(d, 2, dict(model="third"))


KILLED = """
import sys, time, numpy as np
from landmark.parts.descriptors import store
x = np.load(sys.argv[2])
card = dict(model='k')
for i in store.missing_shards(sys.argv[1], 40, card):
    rows = range(i * 5, i * 5 + 5)
    store.write_shard(sys.argv[1], i, [f'{j}' for j in rows], x[rows], card)
    time.sleep(.01)
store.finish_store(sys.argv[1], 40, card)
"""


def test_a_killed_writer_goes_on(tmp_path):
    x = l2n(rng.normal(size=(200, 4)))
    np.save(tmp_path / "x.npy", x)
    args = [sys.executable, "-c", KILLED, str(tmp_path / "s"), str(tmp_path / "x.npy")]
    p = subprocess.Popen(args)
    while len(list((tmp_path / "s").glob("*.json"))) < 4:
        time.sleep(0.02)
        assert p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.wait()
    with pytest.raises(StoreError, match="interrupted"):
        open_store(tmp_path / "s")
    left = missing_shards(tmp_path / "s", 40, dict(model="k"))
    assert 0 < len(left) < 40
    subprocess.run(args, check=True)
    np.testing.assert_array_equal(open_store(tmp_path / "s")[:], x.astype("f2").astype("f4"))
    assert check_store(tmp_path / "s") == []


def test_a_killed_rewriting_leaves_nothing_that_opens(tmp_path, monkeypatch):
    "Old rows and new ones must not be taken for one store, nor the rows of one model for another's."
    from landmark.parts.descriptors import shards, store

    other = dict(model="other")
    write_store(tmp_path / "s", IDS, X, CARD, 50)
    done, original = [], store.write_shard

    def dies(*a, **k):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(original(*a, **k))

    with monkeypatch.context() as m:
        m.setattr(store, "write_shard", dies)
        with pytest.raises(KeyboardInterrupt):
            write_store(tmp_path / "s", IDS, -X, other, 50)
    with pytest.raises(StoreError, match="3 finished shards; its writing was interrupted"):
        open_store(tmp_path / "s")
    assert missing_shards(tmp_path / "s", 3, other) == [2]
    with monkeypatch.context() as m:  # killed when the arrays are new and the note would be old
        m.setattr(shards, "write_json", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_shard(tmp_path / "s", 0, IDS[:50], X[:50], CARD)
    assert missing_shards(tmp_path / "s", 3, other) == [0, 2]
    assert missing_shards(tmp_path / "s", 3, CARD) == [0, 1]


def test_ensemble_of_stores_with_other_orders(tmp_path):
    perm = rng.permutation(103)
    a = write_store(tmp_path / "a", IDS, X, dict(m="a"), dtype="float32")
    b = write_store(tmp_path / "b", np.array(IDS)[perm], 5 * X[perm][:, :4], dict(m="b"), 20, "float32")
    out = concat_stores([a, b], tmp_path / "out", [1, 0.5], shard_size=33, dtype="float32")
    want = l2n(np.concatenate([X, 0.5 * l2n(X[:, :4])], 1))
    np.testing.assert_allclose(out[:], want, atol=1e-6)
    assert out.ids.tolist() == IDS
    with pytest.raises(StoreError, match="weights are"):
        concat_stores([a, b], tmp_path / "w", [1, 0])
    with pytest.raises(StoreError, match="2 models but 1 weights"):
        concat_stores([a, b], tmp_path / "v", [1])
    with pytest.raises(StoreError, match="at least one"):
        concat_stores([], tmp_path / "u")


def test_an_ensemble_of_other_shards_starts_again(tmp_path):
    "Shards of another size, of a killed run, are not those of this one: rows would be missing."
    a = write_store(tmp_path / "a", IDS, X, dict(m="a"), dtype="float32")
    b = write_store(tmp_path / "b", IDS, X[::-1], dict(m="b"), dtype="float32")
    concat_stores([a, b], tmp_path / "out", shard_size=33, dtype="float32")
    for i in (2, 3):
        (tmp_path / "out" / f"{i:05d}.json").unlink()
    (tmp_path / "out" / "card.json").unlink()
    out = concat_stores([a, b], tmp_path / "out", shard_size=50, dtype="float32")
    assert out.ids.tolist() == IDS
    np.testing.assert_allclose(out[:], l2n(np.concatenate([X, X[::-1]], 1)), atol=1e-6)


def test_cards_and_files_that_were_cut(tmp_path):
    d = tmp_path / "s"
    write_store(d, IDS, X, CARD, 50)
    whole = (d / "card.json").read_text()
    for text, said in (
        (whole[:40], "is not JSON"),
        ("[]", "not the card"),
        (whole.replace('"n": 103', '"n": 104'), "says 104 rows, but its shards have 103"),
    ):
        (d / "card.json").write_text(text)
        with pytest.raises(StoreError, match=said):
            open_store(d)
        assert len(check_store(d)) == 1
    edit_text = json.loads(whole)
    del edit_text["shards"]
    (d / "card.json").write_text(json.dumps(edit_text))
    with pytest.raises(StoreError, match="lacks shards"):
        open_store(d)
    (d / "card.json").write_text(whole)
    os.truncate(d / "00001.npy", 200)
    with pytest.raises(StoreError, match="00001.npy cannot be read, it was cut"):
        open_store(d)[60]
    np.save(d / "00000.npy", X[:50].astype("f4"))
    with pytest.raises(StoreError, match="holds float32, its card says float16"):
        open_store(d)[3]
    (d / "00002.json").write_text('{"n":')
    assert missing_shards(d, 3, CARD) == [2]
    with pytest.raises(StoreError, match=r"shard 2 of 3 is missing \(1 in all\)"):
        finish_store(d, 3, CARD)
    os.truncate(d / "00001.ids.npy", 90)
    with pytest.raises(StoreError, match="00001.ids.npy cannot be read, it was cut"):
        len(open_store(d).ids)
    np.save(d / "00001.ids.npy", np.array(IDS[:9], "S"))
    with pytest.raises(StoreError, match="62 ids, its card says 103"):
        len(open_store(d).ids)
    (d / "00001.ids.npy").unlink()
    with pytest.raises(StoreError, match="00001.ids.npy is missing"):
        len(open_store(d).ids)
    for version in ("2.0", None):
        edit(d, version=version)
        assert f"made by version {version}" in check_store(d)[0]
    edit(d, version=1, shards=[dict(n=n) for n in (50, 50, 3)])
    assert any("00002.npy differs from its recorded sha256" in p for p in check_store(d))


def test_h5_of_the_original(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as f:
        f["ids"], f["feats"] = np.array(IDS, "S"), X
    s = read_h5(tmp_path / "x.h5", tmp_path / "s")
    np.testing.assert_array_equal(s[:], X)
    assert s.ids.tolist() == IDS
    write_h5(s, tmp_path / "y.h5")
    with h5py.File(tmp_path / "y.h5") as f:
        np.testing.assert_array_equal(f["feats"][()], X)
        assert f["ids"][0] == IDS[0].encode()
    os.truncate(tmp_path / "y.h5", 900)
    with pytest.raises(StoreError, match="y.h5 cannot be read as HDF5: .*truncated"):
        read_h5(tmp_path / "y.h5", tmp_path / "t")


def test_named_errors(tmp_path):
    with pytest.raises(StoreError, match=r"2 of 3 rows are not finite \(rows \[0, 2\]\)"):
        check_rows(np.array([[np.nan], [1], [np.inf]]))
    with pytest.raises(StoreError, match="ids are not in the store"):
        rows_of(["a", "z"], ["a", "b"])
    with pytest.raises(StoreError, match="103 ids but 5 descriptors"):
        write_store(tmp_path / "s", IDS, X[:5], CARD)
    with pytest.raises(StoreError, match="float16 or float32"):
        write_shard(tmp_path / "s", 0, IDS, X, CARD, "float64")
    with pytest.raises(StoreError, match="1 ids occur more than once"):
        write_store(tmp_path / "s", ["a", "a"], X[:2], CARD)
    t = write_store(tmp_path / "t", IDS, X, CARD)
    with pytest.raises(IndexError, match="row 103 asked"):
        t[103]
    with pytest.raises(IndexError, match="row -104 asked"):
        t[[5, -104]]
    assert len(Rows(t, X[:, 0] > 0)) == (X[:, 0] > 0).sum()
