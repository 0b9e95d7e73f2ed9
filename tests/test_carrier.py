"""A footer in every photo of a drawn collection: the stages with carriers left out, whole and in shards."""

import shutil
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from landmark.parts.local.cleaning import read_pairs
from landmark.parts.local.features import open_local


def footed(im):
    "The image above a black strip with a name and an address."
    strip = np.zeros((40, im.shape[1], 3), np.uint8)
    for text, x in (("PictureStock", 8), ("www.example.org", im.shape[1] - 170)):
        cv2.putText(strip, text, (x, 27), cv2.FONT_HERSHEY_DUPLEX, 0.6, (255, 255, 255), 1, cv2.LINE_AA)
    return np.concatenate([im, strip])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Four labels of two views of one wall and a stranger, all twelve with the footer of one agency."
    from test_verification import VIEWS, moved, wall

    d, rows = tmp_path_factory.mktemp("world"), []
    for label in range(4):
        photos = [moved(wall(label), VIEWS[k], k) for k in range(2)] + [wall(60 + label)]
        for im in photos:
            i = f"{len(rows):016x}"
            p = d / "v2" / "train" / i[0] / i[1] / i[2] / f"{i}.jpg"
            p.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(footed(im)).save(p, quality=95)
            rows.append((i, label))
    pd.DataFrame(rows, columns=["id", "landmark_id"]).to_csv(d / "v2" / "train.csv", index=False)
    return d


@pytest.fixture
def cfg(world, tmp_path, monkeypatch):
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    from landmark import verify

    return verify.Config(world=str(world), n_workers=1, chunk_pairs=6, compare_labels=0)


def strangers(out):
    "Inliers of pairs with the stranger of a label, and of the pairs that show one wall."
    p = read_pairs(out / "pairs")
    odd = (p["image"] % 3 == 2) | (p["partner"] % 3 == 2)
    return p["n_inliers"][odd], p["n_inliers"][~odd]


def test_no_photo_stays_because_of_its_footer(cfg):
    from landmark import verify

    with_it = verify.run(replace(cfg, carrier=False, name="with"))
    without = verify.run(cfg)
    odd, (odd_now, right_now) = strangers(with_it)[0], strangers(without)
    assert odd.min() >= 12 > odd_now.max()
    assert right_now.min() >= 30
    t = pd.read_csv(without / "carrier.csv", dtype={"image_id": str})
    assert t["where"].tolist() == ["bottom"] and t.photos.tolist() == [12]
    assert not (with_it / "carrier.csv").exists()
    assert not list((with_it / "local").glob("*/masked.npy"))


def test_shards_learn_the_same_carriers(cfg, monkeypatch):
    from landmark import verify

    monkeypatch.setattr(verify, "_SHARD", 3)
    whole = verify.run(cfg)
    counts = {p.name: p.read_bytes() for p in (whole / "pairs").iterdir()}
    table = (whole / "carrier.csv").read_bytes()
    parts = [verify.run(replace(cfg, n_shards=2, shard=s)) for s in (0, 1)]
    assert len(list((parts[0] / "local").glob("0*"))) < 4  # the sample was read for the list alone
    shutil.rmtree(whole)
    together = verify.run(replace(cfg, n_shards=2))
    assert {p.name: p.read_bytes() for p in (together / "pairs").iterdir()} == counts
    assert (together / "carrier.csv").read_bytes() == table


def test_a_killed_run_masks_what_it_reads_again(cfg):
    from landmark import verify

    out = verify.run(cfg)
    kept = [len(open_local(out / "local")[i]) for i in range(12)]
    (out / "manifest.json").unlink()
    shutil.rmtree(out / "local" / "00000")
    for p in (out / "pairs").iterdir():
        p.unlink()
    assert verify.run(cfg) == out
    assert [len(open_local(out / "local")[i]) for i in range(12)] == kept


def test_re_ranking_counts_no_footer(world, tmp_path, monkeypatch):
    "The strangers are the queries: all that they share with the index is the footer."
    from landmark import rerank

    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    files = sorted((world / "v2").rglob("*.jpg"))
    table = pd.DataFrame(dict(image_id=[p.stem for p in files], path=[str(p) for p in files]))
    monkeypatch.setattr(rerank, "read_images", lambda world, split: table)
    ids = table.image_id.tolist()
    queries, index = ids[2::3], [i for k, i in enumerate(ids) if k % 3 < 2]
    cfg = rerank.Config(world=str(world), kind="rootsift", n_workers=1, device="cpu")
    with_it, without = (
        rerank.local_counts(replace(cfg, carrier=c), world, queries, index) for c in (False, True)
    )
    strange = [(q, i) for q in range(4) for i in range(8)]
    assert with_it("queries", "index", strange).min() >= 12 > without("queries", "index", strange).max()
    assert without("index", "index", [(0, 1), (3, 2)]).min() >= 30
    assert len(list((without.local("queries").path).glob("*/masked.npy"))) == 1
