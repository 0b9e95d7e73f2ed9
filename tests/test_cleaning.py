"""The cleaning rule against an independent restatement, and the two stages on odd collections (the original's numbers: test_golden.py)."""
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from landmark.parts.cleaning import (clean_images, count_verified, first_copies, needed_pairs, partners_among_all, partners_within,
                                     quality_table, threshold_grid)

def test_restated_in_words():
    r = np.random.default_rng(0); labels = r.integers(0, 8, 60); i, j = r.integers(0, 60, (2, 900)); n = r.integers(0, 60, 900)
    i, j, n = (x[(labels[i] == labels[j]) & (i != j)] for x in (i, j, n))
    for v in (10, 30, 50):
        for f in (1, 2, 4):
            passed = {a for a in range(60) if sum(1 for x, c in zip(i, n) if x == a and c >= v) >= min(f, max(1, sum(labels == labels[a])-1))}
            want = {a for a in passed if sum(labels[b] == labels[a] for b in passed) >= 2}
            keep, alone = clean_images(count_verified(i, n, 60, v), labels, needed_pairs(labels, f))
            assert set(np.flatnonzero(keep)) == want and set(np.flatnonzero(alone)) == passed - want


def test_a_label_of_fifty_thousand_images():
    "The pairs of a block are all that is ever held; every row has its partners."
    labels = np.zeros(50_000, int); pairs = partners_within(np.arange(100), labels, None, 99)
    assert len(pairs) == 9900 and (np.bincount(pairs[:, 0]) == 99).all() and pairs[:, 1].max() > 49_000
    x = np.random.default_rng(0).normal(size=(3000, 16)).astype(np.float32); x /= np.linalg.norm(x, axis=1, keepdims=True)
    near = partners_within(np.arange(5), np.zeros(3000, int), x, 10); order = np.argsort(-(x[:5].astype(float) @ x.T), 1, kind='stable')
    np.testing.assert_array_equal(near[:, 1].reshape(5, 10), [[j for j in o if j != i][:10] for i, o in enumerate(order)])
    np.testing.assert_array_equal(partners_among_all(np.arange(5), x, np.zeros(3000, int), 11, 10), near)   # with one label both ways are one


def test_copies_are_no_witnesses():
    labels = np.array([1, 1, 1, 1]); copy_of = first_copies(np.array([5, 5, 6, 0]), labels)
    assert copy_of.tolist() == [0, 0, 2, 3] and needed_pairs(labels, 3, True, copy_of).tolist() == [2]*4
    assert first_copies(np.array([5, 5]), np.array([1, 2])).tolist() == [0, 1]                              # another label, another question


def test_quality_counts_everything_once():
    r = np.random.default_rng(1); kinds = r.choice(['landmark', 'people', 'lookalike'], 200); right = kinds == 'landmark'; keep = r.random(200) < np.where(right, .8, .1)
    q = quality_table(kinds, right, keep)
    assert q.n.sum() == 200 and q.kept.sum() == keep.sum() and q[~q.right].recall.min() > .7


# the stages

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Three labels: four views of a wall with a stranger, a copy and a broken file; a pair; a single image."
    from test_verification import VIEWS, moved, wall
    d = tmp_path_factory.mktemp('world'); rows = []
    def add(label, im):
        i = f'{len(rows):016x}'; p = d/'v2'/'train'/i[0]/i[1]/i[2]/f'{i}.jpg'; p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(b'broken') if im is None else Image.fromarray(im).save(p, quality=95); rows.append((i, label))
    for k in range(4): add(7, moved(wall(0), VIEWS[k % 3], k))
    add(7, wall(50)); add(7, moved(wall(0), VIEWS[0], 0)); add(7, None)
    for k in range(2): add(8, moved(wall(1), VIEWS[k], k))
    add(9, wall(2))
    pd.DataFrame(rows, columns=['id', 'landmark_id']).sample(frac=1, random_state=0).to_csv(d/'v2'/'train.csv', index=False)
    return d

@pytest.fixture
def runs(tmp_path, monkeypatch): monkeypatch.setenv('LANDMARK_RUNS', str(tmp_path/'runs')); return tmp_path/'runs'

def configs(world, **kw):
    from landmark import clean, verify
    return verify, verify.Config(world=str(world), n_workers=1, chunk_pairs=10, **kw), clean

def test_an_odd_collection_is_cleaned_and_explained(world, runs):
    verify, cfg, clean = configs(world); v = verify.run(cfg)
    out = clean.run(clean.Config(world=str(world), verified=str(v), min_inliers=20))
    table = pd.read_csv(out/'train_clean.csv', dtype=str); why = pd.read_csv(out/'dropped.csv', dtype=str).set_index('image_id').reason
    assert table.landmark_id.tolist() == ['7', '8'] and len(table['images'][0].split()) == 5 and len(table['images'][1].split()) == 2
    assert 'verified pairs' in why[f'{4:016x}'] and why[f'{9:016x}'] == 'the only image of its label' and 'image' in why[f'{6:016x}']
    copies = pd.read_csv(v/'copies.csv', dtype=str); assert copies[['image_id', 'copy_of']].values.tolist() == [[f'{5:016x}', f'{0:016x}']]
    assert not (out/'quality.csv').exists()                                                               # nobody knows the truth here
    assert pd.read_csv(out/'grid.csv').images.is_monotonic_decreasing is False and len(pd.read_csv(out/'grid.csv')) == 70

def test_a_killed_run_goes_on_with_the_same_result(world, runs):
    verify, cfg, _ = configs(world); v = verify.run(cfg); files = {p.name: p.read_bytes() for p in (v/'pairs').iterdir()}
    assert len(files) > 2
    (v/'manifest.json').unlink(); gone, stays = sorted(files)[1], v/'pairs'/sorted(files)[0]; (v/'pairs'/gone).unlink(); shutil.rmtree(v/'local'/'00000'); stamp = stays.stat().st_mtime_ns
    assert verify.run(cfg) == v and {p.name: p.read_bytes() for p in (v/'pairs').iterdir()} == files and stays.stat().st_mtime_ns == stamp

def test_shards_make_the_whole(world, runs):
    verify, cfg, clean = configs(world); whole = verify.run(cfg)
    from dataclasses import replace
    parts = [verify.run(replace(cfg, n_shards=3, shard=s)) for s in (0, 2)]                               # one shard is lost
    names = [{p.name for p in (d/'pairs').iterdir()} for d in parts]; assert not names[0] & names[1]
    together = verify.run(replace(cfg, n_shards=3, name='gathered'.replace('gathered', 'default')))
    for p in (whole/'pairs').iterdir(): assert p.read_bytes() == (together/'pairs'/p.name).read_bytes()
    linked = [p for p in (together/'pairs').iterdir() if p.stat().st_nlink > 1]; assert {p.name for p in linked} == names[0] | names[1]
    with pytest.raises(ValueError, match='one shard'): clean.run(clean.Config(world=str(world), verified=str(parts[0])))

def test_wrong_parameters_stop_at_once(world, runs):
    verify, cfg, clean = configs(world)
    from dataclasses import replace
    for change, says in ((dict(kind='surf'), 'surf'), (dict(shard=3, n_shards=2), 'shard is 3'), (dict(neighbors='some'), 'all, label'), (dict(descriptors='nowhere'), 'descriptor store'), (dict(world='nowhere'), 'nowhere')):
        with pytest.raises((ValueError, FileNotFoundError), match=says): verify.run(replace(cfg, **change))
    with pytest.raises(ValueError, match='upstream artifact'): clean.run(clean.Config(world=str(world)))
