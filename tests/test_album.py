"A folder of labelled photos becomes a world: who goes where, what is left out, and that it is said."

import pickle
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from landmark import clean, data, verify
from landmark.parts.core import ParameterError, read_json
from landmark.parts.data import layout
from landmark.parts.photos import album as part
from landmark.parts.photos.album import make_album
from landmark.parts.photos.importing import import_folder
from landmark.parts.photos.splitting import shares, split_others, split_photos

ROOT = Path(__file__).resolve().parent.parent


def painting(seed, w=96, h=72, tile=12):
    "A picture that is like no other."
    colours = np.random.default_rng(seed).integers(0, 255, (h // tile, w // tile, 3))
    return Image.fromarray(colours.repeat(tile, 0).repeat(tile, 1).astype(np.uint8))


def put(image, path, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **how)


def fill(folder, first=0, **sizes):
    "So many different pictures under each label."
    for label, n in sizes.items():
        for k in range(n):
            put(painting(first + k), folder / label / f"{k:03d}.jpg")
        first += n
    return folder


def made(out, photos, **given):
    "An album: its counts, its photos by file, and why others are left out."
    counts = make_album(out, photos, n_workers=1, **given)
    return counts, pd.read_csv(out / "photos.csv", keep_default_na=False), reasons(out)


def reasons(out):
    left = pd.read_csv(out / "skipped.csv")
    return dict(zip(left.folder + "/" + left.file, left.reason))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("album") / "mine", arch=20, bridge=10, castle=7, dome=5)


@pytest.fixture(scope="module")
def food(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("album") / "food", 1000, lunch=10, dinner=6)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    "Three images, one query; one of them is a photo of `mine`."
    home = tmp_path_factory.mktemp("album") / "bench"
    for name, seed in (("a", 3), ("b", 2001), ("c", 2002)):
        put(painting(seed), home / "jpg" / f"{name}.jpg")
    gnd = [dict(bbx=[1.0, 2.0, 50.0, 60.0], easy=[0], hard=[], junk=[1])]
    truth = dict(imlist=["a", "b"], qimlist=["c"], gnd=gnd)
    (home / "gnd_rmine.pkl").write_bytes(pickle.dumps(truth, protocol=4))
    return home


# who goes where


def test_every_label_is_split_by_itself(mine, tmp_path):
    counts, photos, left = made(tmp_path / "w", mine)
    found = photos.groupby(["label", "split"]).size().unstack().loc[:, ["v2_train", "index", "test"]]
    assert found.values.tolist() == [[10, 6, 4], [5, 3, 2], [4, 2, 1], [3, 1, 1]]
    assert not left and (counts["train"], counts["index"], counts["test"]) == (22, 12, 8)
    assert counts["public"] == counts["private"] == 4
    for _, usages in photos[photos.split == "test"].groupby("label").usage:
        assert abs((usages == "Public").sum() - (usages == "Private").sum()) <= 1
    assert not (tmp_path / "w/truth.csv").exists()


def test_solutions_name_the_photos_of_the_same_label(mine, food, tmp_path):
    _, photos, _ = made(tmp_path / "w", mine, others=food)
    by_id, names = photos.set_index("image_id"), layout.landmark_names(tmp_path / "w")
    assert sorted(names.items()) == list(enumerate(["arch", "bridge", "castle", "dome"]))
    answers = layout.read_retrieval_solution(tmp_path / "w")
    for r in answers[answers.usage != "Ignored"].itertuples():
        label = by_id.label[r.image_id]
        assert set(r.images) == set(photos.image_id[(photos.label == label) & (photos.split == "index")])
    for r in layout.read_recognition_solution(tmp_path / "w").itertuples():
        assert [names[i] for i in r.landmarks] == [x for x in [by_id.label[r.image_id]] if x]
        assert r.usage == by_id.usage[r.image_id] != "Ignored"
    assert (answers.usage == "Ignored").sum() == 16  # the photos of no landmark


def test_all_tables_agree_with_the_files(mine, food, bench, tmp_path):
    world = tmp_path / "w"
    _, photos, _ = made(world, mine, others=food, bench=bench, v1="0.5", noise=0.3)
    listed = [p for s in layout.splits(world) for p in layout.read_images(world, s).path]
    assert len(listed) == len(set(listed)) == len(list(world.rglob("*.jpg"))) == len(photos) + 3
    assert photos.image_id.is_unique
    for split, table in photos.groupby("split"):
        assert sorted(table.image_id) == layout.read_ids(world, split).tolist()
    assert all(Path(p).exists() for p in listed) and not list(world.rglob("*.tmp"))
    assert data.check_world(world, "pixels", 1).empty


def test_ids_are_those_of_an_explored_folder_and_no_seed_changes_them(mine, tmp_path):
    one, two = (made(tmp_path / f"w{s}", mine, seed=s)[1].set_index("file") for s in (1, 2))
    explored = import_folder(mine, tmp_path / "explored", n_workers=1)[0].set_index("file")
    assert (one.image_id.sort_index() == two.image_id.sort_index()).all()
    assert (one.image_id.sort_index() == explored.image_id.sort_index()).all()
    assert (one.split.sort_index() != two.split.sort_index()).any()


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_processes(mine, food, tmp_path):
    given = dict(others=food, v1="0.5", noise=0.3, seed=3)
    make_album(tmp_path / "one", mine, n_workers=1, **given)
    make_album(tmp_path / "two", mine, n_workers=2, **given)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_twenty_thousand_photos_are_split_in_seconds():
    r = np.random.default_rng(0)
    labels = np.array([f"place {k}" for k in (700 * r.random(20_000) ** 2).astype(int)])
    pictures = np.array([f"{k:016x}" for k in range(20_000)])
    pictures[1::50] = pictures[0::50]
    labels[1::50] = labels[0::50]
    photos = pd.DataFrame(dict(label=labels, picture=pictures))
    placed = split_photos(photos, seed=1)
    one = photos.assign(**placed)
    assert (one.groupby("picture").split.nunique() == 1).all()
    got = one.drop_duplicates("picture").groupby(["label", "split"]).size().unstack(fill_value=0)
    for row in got.reindex(columns=["v2_train", "index", "test"]).itertuples():
        assert tuple(row[1:]) == shares(sum(row[1:]))
    tested = one[one.split == "test"].drop_duplicates("picture").usage.value_counts()
    assert abs(tested["Public"] - tested["Private"]) <= 1
    assert set(split_others(photos[["picture"]], 100, 1).split) == {"v2_train", "test"}


def test_five_hundred_labels(tmp_path):
    folder = tmp_path / "mine"
    for k in range(580):
        label = k if k < 500 else k % 20
        put(painting(k, 64, 64, 8), folder / f"label {label:03d}" / f"{k}.jpg")
    counts, photos, left = made(tmp_path / "w", folder)
    assert not left and (counts["labels"], counts["train_only"]) == (500, 480)
    assert (counts["train"], counts["index"], counts["test"]) == (480 + 20 * 3, 20, 20)
    assert counts["private"] == 10


# copies


def test_copies_stay_on_one_side_whatever_the_seed(tmp_path):
    folder = fill(tmp_path / "mine", arch=10, bridge=10)
    shutil.copy(folder / "arch/000.jpg", folder / "arch/again.jpg")
    with Image.open(folder / "arch/001.jpg") as im:
        put(im, folder / "arch/pixels.png")
        put(im.resize((88, 66)), folder / "arch/smaller.jpg", quality=60)
    pictures, sides = [{"000", "again"}, {"001", "pixels", "smaller"}], set()
    _, photos, _ = made(tmp_path / "w", folder)
    of = dict(zip(photos.file.str.extract(r"arch/(\w+)")[0], photos.picture))
    assert [len({of[name] for name in same}) for same in pictures] == [1, 1]
    assert photos.picture.nunique() == 20
    for seed in range(12):
        placed = split_photos(photos, seed).assign(picture=photos.picture)
        assert (placed.groupby("picture")[["split", "usage"]].nunique() == 1).all(axis=None)
        sides.add(placed.split[photos.file == "arch/again.jpg"].item())
    assert sides == {"v2_train", "index", "test"}


def test_sixty_frames_of_one_film_are_one_picture(tmp_path):
    "Each has more than twenty others that are as near."
    folder, noise = fill(tmp_path / "mine", arch=6, bridge=6), np.random.default_rng(0)
    frame = np.asarray(painting(99), int)
    for k in range(60):
        image = np.clip(frame + noise.integers(-6, 7, frame.shape), 0, 255).astype(np.uint8)
        put(Image.fromarray(image), folder / "arch" / f"film {k:02d}.png")
    _, photos, _ = made(tmp_path / "w", folder)
    film = photos[photos.file.str.contains("film")]
    assert film.picture.nunique() == film.split.nunique() == 1 and len(film) == 60


def test_a_photo_under_two_labels_is_left_out_with_the_other_label(tmp_path):
    folder, other = fill(tmp_path / "mine", arch=8, bridge=8), fill(tmp_path / "other", 50, lunch=6)
    shutil.copy(folder / "arch/000.jpg", folder / "bridge/the same.jpg")
    shutil.copy(folder / "arch/000.jpg", folder / "arch/twice.jpg")
    shutil.copy(folder / "arch/000.jpg", other / "no landmark.jpg")
    counts, photos, left = made(tmp_path / "w", folder, others=other)
    same = "the same picture has another label: "
    assert left == {
        "photos/arch/000.jpg": f"{same}bridge (bridge/the same.jpg)",
        "photos/arch/twice.jpg": f"{same}bridge (bridge/the same.jpg)",
        "photos/bridge/the same.jpg": f"{same}arch (arch/000.jpg)",
        "others/no landmark.jpg": "the same picture as arch/000.jpg in photos",
    }
    assert (counts["two_labels"], counts["copies"], len(photos)) == (3, 1, 21)


def test_other_photos_that_are_labelled_photos_are_left_out(mine, food, tmp_path):
    overlapping = shutil.copytree(food, tmp_path / "food")
    shutil.copytree(mine / "arch", overlapping / "arch")
    with Image.open(mine / "dome/000.jpg") as im:
        put(im.resize((88, 66)), overlapping / "small.jpg")
    counts, photos, left = made(tmp_path / "w", mine, others=overlapping, noise=0.3)
    assert counts["copies"] == len(left) == 21 and (photos.folder == "others").sum() == 16
    assert left["others/small.jpg"] == "the same picture as dome/000.jpg in photos"


def test_copies_count_as_one_and_small_labels_only_train(tmp_path):
    folder = fill(tmp_path / "mine", arch=12, four=4, five=4)
    shutil.copy(folder / "five/000.jpg", folder / "five/again.jpg")
    counts, photos, _ = made(tmp_path / "w", folder)
    assert counts["train_only"] == 2
    assert set(photos.split[photos.label.isin(["four", "five"])]) == {"v2_train"}


def test_folders_in_which_nothing_can_be_asked_are_refused(tmp_path):
    for label in ("arch", "bridge"):
        for k in range(8):
            put(painting(1), tmp_path / "equal" / label / f"{k}.jpg")
            put(painting(2 + (label == "arch")), tmp_path / "pairs" / label / f"{k}.jpg")
            (tmp_path / "text" / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "text" / label / f"{k}.jpg").write_text("x")
    says = "0 labels to train with, two are needed; left out: 16 × the same picture has another label"
    with pytest.raises(ParameterError, match=says):
        make_album(tmp_path / "w", tmp_path / "equal", n_workers=1)
    with pytest.raises(ParameterError, match="has no label with 5 different pictures"):
        make_album(tmp_path / "w", tmp_path / "pairs", n_workers=1)
    with pytest.raises(ParameterError, match="holds no photo that can be read: 16 × "):
        make_album(tmp_path / "w", tmp_path / "text", n_workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["equal", "pairs", "text"]


def test_folders_that_are_copies_of_the_album(tmp_path):
    "Nothing is left of other photos; a clean set or a training set without a photo is refused."
    folder = fill(tmp_path / "mine", arch=8, bridge=8)
    same = str(shutil.copytree(folder, tmp_path / "same"))
    counts, _, _ = made(tmp_path / "w", folder, others=same, noise=0.3)
    assert (counts["copies"], counts["others_train"], counts["others_test"]) == (16, 0, 0)
    with pytest.raises(ParameterError, match="v1: no photo of .* is left: 16 × the same picture$"):
        make_album(tmp_path / "w2", folder, v1=same, n_workers=1)
    for k in range(16):
        put(painting(k), tmp_path / "bench/jpg" / f"i{k}.jpg")
    names, none = [f"i{k}" for k in range(16)], dict(bbx=[0, 0, 9, 9], easy=[], hard=[], junk=[])
    truth = dict(imlist=names, qimlist=names[:1], gnd=[none])
    (tmp_path / "bench/gnd_all.pkl").write_bytes(pickle.dumps(truth))
    with pytest.raises(ParameterError, match="left out: 8 × in the benchmark, so for no training"):
        make_album(tmp_path / "w2", folder, bench=tmp_path / "bench", n_workers=1)
    assert not (tmp_path / "w2").exists()


def test_what_is_no_photo_of_a_label_is_listed(tmp_path):
    folder = fill(tmp_path / "mine", **{"arch": 6, "far away/bridge": 6})
    put(painting(90), folder / "loose.jpg")
    put(painting(91).resize((30, 30)), folder / "arch/tiny.jpg")
    (folder / "arch/text.jpg").write_text("x")
    put(painting(92), folder / "@eaDir/arch.jpg")
    counts, photos, left = made(tmp_path / "w", folder)
    assert set(photos.label) == {"arch", "far away/bridge"} and counts["no_label"] == 1
    said = ["photos/@eaDir", "photos/arch/text.jpg", "photos/arch/tiny.jpg", "photos/loose.jpg"]
    assert sorted(left) == said and "too small" in left[said[2]] and "without a label" in left[said[3]]


def test_at_most_so_many_photos(mine, tmp_path):
    counts, _, left = made(tmp_path / "w", mine, max_photos=24)
    assert counts["train"] + counts["index"] + counts["test"] == 24
    assert set(left.values()) == {"beyond max_photos = 24"} and len(left) == 18


# noise, and what is known of it


def test_noise_is_counted_and_the_truth_is_written(mine, food, tmp_path):
    counts, photos, _ = made(tmp_path / "w", mine, others=food, noise=0.3)
    truth = layout.read_truth(tmp_path / "w")
    train = truth[truth.split == "v2_train"]
    wrong = train[train.landmark_id != train.true_landmark]
    assert wrong.kind.value_counts().to_dict() == {"swapped label": 7, "other photo": 6}  # 0.3 of 22
    assert set(train.kind[train.landmark_id == train.true_landmark]) == {"landmark"}
    assert set(train.true_landmark[train.kind == "other photo"]) == {-1}
    assert (counts["swapped"], counts["others_train"], counts["others_test"]) == (7, 6, 10)
    given = layout.read_images(tmp_path / "w", "v2_train").set_index("image_id").landmark_id
    assert (train.set_index("image_id").landmark_id == given).all()
    assert all((tmp_path / "w" / p).exists() for p in truth.path)
    names, real = layout.landmark_names(tmp_path / "w"), photos.set_index("image_id").label
    shown = truth[truth.true_landmark >= 0]
    assert [names[i] for i in shown.true_landmark] == [real[i] for i in shown.image_id]


def test_never_more_than_half_of_the_others_train(mine, food, tmp_path):
    counts, _, _ = made(tmp_path / "w", mine, others=food, noise=0.5)
    assert (counts["swapped"], counts["others_train"], counts["others_test"]) == (11, 8, 8)
    counts, _, _ = made(tmp_path / "right", mine, others=food)
    assert (counts["swapped"], counts["others_train"], counts["others_test"]) == (0, 0, 16)


def test_a_share_of_the_labels_is_a_clean_set_of_the_same_photos(mine, tmp_path):
    counts, photos, _ = made(tmp_path / "w", mine, v1="0.5", noise=0.5)
    v1, v2 = (photos[photos.split == f"{v}_train"] for v in ("v1", "v2"))
    assert counts["v1_labels"] == v1.label.nunique() == 2 and counts["train"] == len(v2) == 22
    assert set(v1.file) == set(v2.file[v2.label.isin(v1.label)])
    names = layout.landmark_names(tmp_path / "w")
    assert [names[i] for i in v1.landmark_id] == v1.label.tolist()  # right, whatever v2 says
    paths = dict(zip(photos.image_id, photos.split))
    one = v1.iloc[0]
    twin = v2.image_id[v2.file == one.file].item()
    files = [Path(layout.image_paths(tmp_path / "w", paths[i], [i])[0]) for i in (one.image_id, twin)]
    assert files[0].read_bytes() == files[1].read_bytes() and one.image_id != twin


def test_a_clean_set_of_its_own_has_labels_of_its_own(mine, food, tmp_path):
    clean_set = fill(tmp_path / "clean", 300, arch=4, tower=3)  # `arch` is another arch
    shutil.copy(mine / "arch/000.jpg", clean_set / "arch/known.jpg")
    shutil.copy(food / "lunch/000.jpg", clean_set / "tower/lunch.jpg")
    counts, photos, left = made(tmp_path / "w", mine, others=food, v1=str(clean_set))
    assert (counts["v1"], counts["v1_labels"]) == (7, 2)
    assert left == {
        "v1/arch/known.jpg": "the same picture as arch/000.jpg in photos",
        "v1/tower/lunch.jpg": "the same picture as lunch/000.jpg in others",
    }
    v1 = photos[photos.split == "v1_train"]
    assert sorted(set(v1.landmark_id)) == [4, 5] and photos.image_id.is_unique


def test_a_benchmark_stays_what_it_is_and_out_of_training(mine, bench, tmp_path):
    _, photos, left = made(tmp_path / "plain", mine)
    seed = 1
    while photos.split[photos.file == "arch/003.jpg"].item() != "v2_train":  # the picture of bench/jpg/a
        seed += 1
        photos = photos.assign(split=split_photos(photos, seed).split)
    counts, photos, left = made(tmp_path / "w", mine, bench=bench, seed=seed)
    assert layout.benchmarks(tmp_path / "w") == ["rmine"]
    assert layout.read_revisited(tmp_path / "w", "rmine") == layout.read_ground_truth(bench / "gnd_rmine.pkl")
    for p in layout.read_images(tmp_path / "w", "rmine_index").path:
        assert Path(p).read_bytes() == (bench / "jpg" / Path(p).name).read_bytes()
    assert left == {
        "photos/arch/003.jpg": "in the benchmark, so for no training: the same picture as jpg/a.jpg"
    }
    assert counts["in_bench"] == 1 and "arch/003.jpg" not in set(photos.file)


# refused before any photo is read


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(photos="nowhere"), "photos: there is no folder"),
        (dict(photos="mine/arch/000.jpg"), "is a file"),
        (dict(photos="mine/arch"), "has no sub-folder with photos"),
        (dict(photos="one"), "has one label, arch; two are needed"),
        (dict(photos="few"), "no label has 5 photos .* the largest, arch, has 4"),
        (dict(others="nowhere"), "others: there is no folder"),
        (dict(others="mine"), "others is the same folder as photos"),
        (dict(others="mine/arch"), "others is inside photos"),
        (dict(others="."), "photos is inside others"),
        (dict(others="empty"), "others: .* holds no photo"),
        (dict(bench="empty"), "must hold one gnd_<name>.pkl; there is none"),
        (dict(bench="bench"), "1 of 1 images are not there, for instance jpg/a.jpg"),
        (dict(v1="0"), "more than 0 and at most 1"),
        (dict(v1="1.5"), "more than 0 and at most 1"),
        (dict(v1="nan"), "more than 0 and at most 1"),
        (dict(v1="some"), "neither a share of the labels"),
        (dict(v1="mine"), "v1 is the same folder as photos"),
        (dict(v1="one"), "v1: .* has one label"),
        (dict(noise=0.51), "noise is 0.51; for photos 0 to 0.5 are allowed"),
        (dict(noise=-0.1), "0 to 0.5 are allowed"),
    ],
)
def test_what_cannot_become_a_world_is_refused(given, says, tmp_path, monkeypatch):
    fill(tmp_path / "mine", arch=5, bridge=2)
    fill(tmp_path / "one", arch=6)
    fill(tmp_path / "few", arch=4, bridge=4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bench").mkdir()
    gnd = dict(imlist=["a"], qimlist=["a"], gnd=[dict(bbx=[0, 0, 9, 9])])
    (tmp_path / "bench/gnd_x.pkl").write_bytes(pickle.dumps(gnd))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParameterError, match=says):
        make_album(Path("w"), **(dict(photos="mine") | given))
    assert not Path("w").exists()


def test_few_questions_are_said(mine, tmp_path, capsys):
    make_album(tmp_path / "w", mine, n_workers=1)
    assert "4 Private test photos show a landmark; with fewer than 20" in capsys.readouterr().err


# the stage


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def config(photos, **given):
    return data.Config(profile="album", photos=str(photos), n_workers=1, **given)


def test_the_stage_makes_a_world_once_and_again_when_a_photo_comes(mine, runs, tmp_path, capsys):
    folder = shutil.copytree(mine, tmp_path / "mine")
    out = data.run(config(folder))
    assert pd.read_csv(out / "counts.csv").set_index("photos")["count"]["train"] == 22
    assert read_json(out / "manifest.json")["world"] == ""  # no drawn one
    assert pd.read_csv(out / "datasets.csv").values.tolist() == [["GLD-v2", 22, 4]]
    data.run(config(folder))
    assert "nothing to do" in capsys.readouterr().err
    for k in range(3):
        put(painting(500 + k), folder / "dome" / f"new {k}.jpg")
    assert data.run(config(folder)) == out
    assert pd.read_csv(out / "counts.csv").set_index("photos")["count"]["train"] == 23
    assert not list(out.glob("*.tmp"))


def test_a_killed_run_leaves_nothing_behind(mine, runs, monkeypatch):
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(part, "_write_tables", lambda *a: 1 / 0)
        data.run(config(mine))
    out = next(runs.glob("album/seed1/data/default-*"))
    assert not (out / "world").exists() and not list(out.glob(".world.*"))
    left = out / ".world.4711-1.tmp" / "stage" / "photos"  # of a process that had no time to clean up
    left.mkdir(parents=True)
    put(painting(1), left / "x.jpg")
    data.run(config(mine))
    assert (out / "world/album.json").exists() and not list(out.glob(".world.*"))
    assert not (out / "world/stage").exists()


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(world="mini"), "world cannot be set"),
        (dict(size=2.0, n_aspects=1), "size, n_aspects cannot be set"),
        (dict(shuffle_labels=True), "shuffle_labels cannot be set"),
        (dict(photos="", others="x"), "others can only be set with photos"),
        (dict(photos="", v1=0.4, max_photos=9), "v1, max_photos can only be set with photos"),
        (dict(photos="/nowhere/at all"), "photos: there is no folder /nowhere/at all"),
        (dict(noise=0.6), "noise is 0.6; for photos 0 to 0.5"),
    ],
)
def test_what_does_not_go_with_photos_is_refused(given, says, mine, runs):
    with pytest.raises(ParameterError, match=says):
        data.run(data.Config(**(dict(photos=str(mine)) | given)))


def below_the_seam(stage, **given):
    "Run a stage notebook's last half in this process; returns its names."
    cells = nbformat.read(ROOT / f"nbs/{stage}.ipynb", 4).cells
    seam = next(k for k, c in enumerate(cells) if c.source.startswith("---\n\n# Below the seam"))
    code = [c for c in cells if c.cell_type == "code" and "import " in c.source.split("\n\n")[0]][:2]
    names = dict(display=lambda *_: None)
    for c in code + [c for c in cells[seam:] if c.cell_type == "code"]:
        exec(compile(c.source, stage, "exec"), names)
        if "parameters" in c.metadata.get("tags", []):
            names |= given
    return names


def test_the_notebook_shows_counts_and_no_photo(mine, food, runs, monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    from landmark.parts import plots

    monkeypatch.setattr(plots, "contact_sheet", lambda *a, **k: pytest.fail("a photo was shown"))
    given = dict(photos=str(mine), others=str(food), noise=0.3, n_workers=1, profile="album")
    names = below_the_seam("00_data", **given)
    assert not names["drawn"] and (names["out"] / "counts.csv").exists()
    assert set(names["kinds"].columns) == {"landmark", "swapped label", "other photo"}


def test_cleaning_reads_the_truth_of_an_album(runs, tmp_path):
    "Photos of one thing each, seen from several places, with a few labels swapped."
    from test_photos import scene, seen

    folder = tmp_path / "mine"
    for label in range(3):
        for k in range(8):
            put(seen(scene(label), k), folder / f"place {label}" / f"{k}.jpg")
    made_by = dict(profile="album", world="@data/default/world")
    data.run(config(folder, noise=0.25))
    verify.run(verify.Config(**made_by, n_workers=1, compare_labels=2, n_different=0, neighbors="label"))
    out = clean.run(clean.Config(**made_by, verified="@verify/default", min_inliers=15, min_verified=1))
    quality = pd.read_csv(out / "quality.csv").set_index(["kind", "right"])
    assert quality.n.to_dict() == {("landmark", True): 9, ("swapped label", False): 3}
    assert quality.kept["landmark", True] > 6 and quality.kept["swapped label", False] < 3
    assert set(pd.read_csv(out / "lost.csv").columns) == {"reason", "n", "right", "wrong", "lonely"}
    assert pd.read_csv(out / "quality_aspect.csv").n.sum() == 12
