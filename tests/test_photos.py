"A folder of photos as people have them: what is wrong with a file is listed, the rest gets its report."

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_browser import CHROMIUM, Opened, complaints, pictures

from landmark import explore
from landmark.parts.core import ParameterError
from landmark.parts.data.layout import landmark_names, read_images, train_set
from landmark.parts.images.reading import ImageError, read_image
from landmark.parts.photos.answering import leave_one_out, trust_table
from landmark.parts.photos.copies import find_copies
from landmark.parts.photos.importing import choose, import_folder, scan_folder
from landmark.parts.photos.opening import Collection, photo_paths, strictness
from landmark.parts.photos.pages import page_summary

ROOT = Path(__file__).resolve().parent.parent
REAL = os.environ.get("LANDMARK_PHOTOS", "")
real = pytest.mark.skipif(
    not REAL, reason="set LANDMARK_PHOTOS=folder (sub-folder = label) to test with real photos"
)


def scene(seed, w=400, h=300):
    "A picture with much to recognise."
    rng = np.random.default_rng(seed)
    im = Image.new("RGB", (w, h), tuple(map(int, rng.integers(120, 200, 3))))
    d = ImageDraw.Draw(im)
    for _ in range(220):
        x, y, r = int(rng.integers(w)), int(rng.integers(h)), int(rng.integers(3, 22))
        c = tuple(map(int, rng.integers(0, 255, 3)))
        d.ellipse((x, y, x + r, y + r), c) if rng.random() < 0.4 else d.rectangle((x, y, x + 2 * r, y + r), c)
    return im


def seen(im, k):
    "The same scene from elsewhere."
    w, h = im.size
    return im.transform(
        im.size,
        Image.Transform.AFFINE,
        (1 + 0.03 * k, 0.02 * k, 6 * k, -0.02 * k, 1 - 0.02 * k, 4 * k),
        Image.Resampling.BICUBIC,
        fillcolor=(90, 90, 90),
    ).point(lambda v: v * (1 - 0.05 * k))


def put(im, path, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    im.save(path, **kw)


def imported(folder, tmp_path, **kw):
    photos, skipped, looks = import_folder(folder, tmp_path / "world", n_workers=1, **kw)
    return photos.set_index("file"), dict(zip(skipped.file, skipped.reason)), looks


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture
def runs(tmp_path, worlds, monkeypatch):
    "An empty folder of runs; drawn images, where a test needs some, are drawn once."
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "worlds").symlink_to(worlds)
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def explored(folder, n_words=4, weights="", **kw):
    given = dict(profile="test", photos=str(folder), n_workers=1, n_words=n_words, weights=weights)
    return Collection(explore.run(explore.Config(**given | kw)))


# the folder


def test_not_a_folder(tmp_path):
    put(scene(0), tmp_path / "a.jpg")
    with pytest.raises(ParameterError, match="is a file; give the folder"):
        scan_folder(tmp_path / "a.jpg")
    with pytest.raises(ParameterError, match="there is no folder"):
        scan_folder(tmp_path / "nowhere")


def test_empty_folder(tmp_path, runs):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ParameterError, match="no photo that can be read: it is empty"):
        explored(tmp_path / "empty")


def test_nothing_readable_is_said_with_counts(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f/a.jpg").touch()
    (tmp_path / "f/b.jpg").touch()
    (tmp_path / "f/c.png").write_text("no")
    (tmp_path / "f/d.doc").write_text("no")
    with pytest.raises(ParameterError, match=r"2 × the file is empty; .*1 × "):
        imported(tmp_path / "f", tmp_path)


def test_fifty_thousand_files(tmp_path):
    "All are listed in seconds; at most max_photos are read, from every label, and the others are named."
    for k in range(50):
        (tmp_path / "f" / f"label {k:02d}").mkdir(parents=True)
        for i in range(1000):
            os.close(os.open(tmp_path / "f" / f"label {k:02d}" / f"{i}.jpg", os.O_CREAT | os.O_WRONLY))
    for k in range(50):
        put(scene(k, 96, 96), tmp_path / "f" / f"label {k:02d}" / "real.jpg")
        put(scene(k, 90, 96), tmp_path / "f" / f"label {k:02d}" / "second.jpg")
    photos, skipped, _ = imported(tmp_path / "f", tmp_path, max_photos=50)
    assert len(photos) == 50 and photos.label.nunique() == 50
    assert len(skipped) == 50_000 + 50 and sum(r == "the file is empty" for r in skipped.values()) == 50_000
    assert sum(r == "beyond max_photos = 50" for r in skipped.values()) == 50


def test_choice_is_fair_and_complete():
    labels = np.array(["a"] * 5 + ["b"] * 500 + [""] * 100)
    take = choose(labels, 65)
    assert [int(take[labels == label].sum()) for label in ("a", "b", "")] == [5, 30, 30]
    assert choose(labels, 10**6).all()


def test_links_in_a_circle_and_into_nothing(tmp_path):
    put(scene(0), tmp_path / "f/place/a.jpg")
    put(scene(1), tmp_path / "f/place/b.jpg")
    (tmp_path / "f/place/up").symlink_to(tmp_path / "f")
    (tmp_path / "f/self").symlink_to("self")
    (tmp_path / "f/x.jpg").symlink_to("y.jpg")
    (tmp_path / "f/y.jpg").symlink_to("x.jpg")
    (tmp_path / "f/gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "elsewhere").mkdir()
    put(scene(2), tmp_path / "elsewhere/c.jpg")
    (tmp_path / "f/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "f/linked twice").symlink_to(tmp_path / "elsewhere")
    photos, skipped, _ = imported(tmp_path / "f", tmp_path)
    assert sorted(photos.index) == ["linked/c.jpg", "place/a.jpg", "place/b.jpg"]
    assert skipped["place/up"] == "a link to a folder that is read already (.)" and skipped[
        "linked twice"
    ].endswith("(linked)")
    assert all("nowhere, or in a circle" in skipped[k] for k in ("self", "x.jpg", "y.jpg", "gone.jpg"))


def test_folder_without_permission(tmp_path):
    put(scene(0), tmp_path / "f/a/a.jpg")
    (tmp_path / "f/closed").mkdir()
    put(scene(1), tmp_path / "f/closed/b.jpg")
    (tmp_path / "f/closed").chmod(0)
    try:
        if os.access(tmp_path / "f/closed", os.R_OK):
            pytest.skip("this user may read everything")
        photos, skipped, _ = imported(tmp_path / "f", tmp_path)
        assert list(photos.index) == ["a/a.jpg"] and "cannot be read" in skipped["closed"]
    finally:
        (tmp_path / "f/closed").chmod(0o755)


def test_names_of_all_kinds(tmp_path):
    names = [
        "with space/my photo (1).jpg",
        "東京タワー/夜景.jpg",
        "Кремль/фото.JPG",
        'a,b"c/quo"te, comma.jpg',
        "it's <b>&amp;/x.jpg",
        "nested/deeper/y.jpg",
        "NA/NA.jpg",
        "123/1.jpg",
    ]
    for i, n in enumerate(names):
        put(scene(i, 120, 90), tmp_path / "f" / n, format="JPEG")
    raw = os.fsencode(tmp_path / "f" / "with space") + b"/\xff\xfe.jpg"
    shutil.copyfile(tmp_path / "f" / names[0], raw)
    photos, skipped, _ = imported(tmp_path / "f", tmp_path)
    assert set(names) <= set(photos.index) and len(photos) == len(names) + 1 and not skipped
    train = read_images(tmp_path / "world", "v2_train")
    assert len(train) == len(names) + 1 and all(Path(p).is_file() for p in train.path)
    assert {"東京タワー", "nested/deeper", "NA", "123", 'a,b"c'} <= set(
        landmark_names(tmp_path / "world").values()
    )


# the files


def test_every_kind_of_picture(tmp_path):
    f, im = tmp_path / "f", scene(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    put(im, f / "plain.jpg", quality=95)
    put(im, f / "rotated.jpg", exif=exif, quality=95)
    put(im.convert("CMYK"), f / "cmyk.jpg")
    put(im.convert("L"), f / "grey.png")
    put(im.convert("L"), f / "grey.jpg")
    put(im.convert("P"), f / "frame.gif", save_all=True, append_images=[scene(1).convert("P")])
    put(im, f / "w.webp")
    put(im, f / "t.tiff")
    put(im, f / "really a png.jpg", format="PNG")
    rgba = im.convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(im.size))
    put(rgba, f / "alpha.png")
    put(Image.fromarray(np.asarray(im.convert("L")).astype(np.uint16) * 257), f / "deep.png")
    put(scene(2, 3000, 2000), f / "large.jpg")
    photos, skipped, _ = imported(f, tmp_path)
    assert not skipped and len(photos) == 12
    said = photos.changed.to_dict()
    assert (
        said["plain.jpg"] == ""
        and said["rotated.jpg"] == "turned upright"
        and said["cmyk.jpg"] == "CMYK to RGB"
        and "greyscale" in said["grey.jpg"]
        and "16 bits" in said["deep.png"]
    )
    assert (
        "laid on white" in said["alpha.png"]
        and "first of 2 frames" in said["frame.gif"]
        and said["large.jpg"] == "reduced from 3000×2000"
        and "PNG to JPEG" in said["really a png.jpg"]
    )
    assert tuple(photos.loc["rotated.jpg", ["width", "height"]]) == (300, 400)
    for p in photo_paths(tmp_path, photos.reset_index()):
        with Image.open(p) as j:
            assert (
                j.format == "JPEG"
                and j.mode == "RGB"
                and j.getexif().get(0x0112, 1) == 1
                and max(j.size) <= 1024
            )
    read = {
        n: read_image(p).astype(int)
        for n, p in zip(photos.index, photo_paths(tmp_path, photos.reset_index()))
    }
    assert (
        np.abs(read["deep.png"] - read["grey.png"]).mean() < 3
        and np.abs(np.rot90(read["plain.jpg"], -1) - read["rotated.jpg"]).mean() < 4
    )


def test_broken_files_are_listed_and_the_rest_goes_on(tmp_path):
    f = tmp_path / "f"
    put(scene(0), f / "good.jpg")
    put(scene(1), f / "good.png")
    put(scene(2).resize((1, 1)), f / "dot.png")
    put(scene(2).resize((800, 20)), f / "line.png")
    (f / "cut.jpg").write_bytes((f / "good.jpg").read_bytes()[:4000])
    (f / "cut.png").write_bytes((f / "good.png").read_bytes()[:2000])
    (f / "zero.jpg").touch()
    (f / "text.jpg").write_text("hello")
    (f / "notes.txt").write_text("x")
    (f / ".hidden.jpg").write_text("x")
    (f / "noending").write_text("x")
    photos, skipped, _ = imported(f, tmp_path)
    assert sorted(photos.index) == ["good.jpg", "good.png"]
    assert set(skipped) == {
        "dot.png",
        "line.png",
        "cut.jpg",
        "cut.png",
        "zero.jpg",
        "text.jpg",
        "notes.txt",
        ".hidden.jpg",
        "noending",
    }
    assert (
        skipped["zero.jpg"] == "the file is empty"
        and "1×1 pixels" in skipped["dot.png"]
        and "truncated" in skipped["cut.jpg"]
        and "not an image" in skipped["text.jpg"]
        and "(.txt)" in skipped["notes.txt"]
    )
    assert (
        not list((tmp_path / "world").rglob("*.tmp")) and len(list((tmp_path / "world").rglob("*.jpg"))) == 2
    )


def test_heic_is_read_or_explained(tmp_path):
    f = tmp_path / "f"
    put(scene(0), f / "good.jpg")
    try:
        import pillow_heif
    except ImportError:
        (f / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
        photos, skipped, _ = imported(f, tmp_path)
        assert "pillow-heif" in skipped["phone.heic"]
        return
    pillow_heif.from_pillow(scene(1)).save(str(f / "phone.heic"))
    photos, skipped, _ = imported(f, tmp_path)
    assert "phone.heic" in photos.index and "to JPEG" in photos.changed["phone.heic"]


def test_originals_are_only_read(tmp_path):
    f = tmp_path / "f"
    put(scene(0), f / "a/1.jpg")
    put(scene(1).convert("CMYK"), f / "a/2.jpg")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in f.rglob("*") if p.is_file()}
    imported(f, tmp_path)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in f.rglob("*") if p.is_file()} == before


def test_copies_under_two_labels(tmp_path):
    f = tmp_path / "f"
    put(scene(0), f / "a/1.jpg", quality=90)
    put(scene(1), f / "a/2.jpg")
    (f / "b").mkdir()
    shutil.copy(f / "a/1.jpg", f / "b/the same.jpg")
    with Image.open(f / "a/2.jpg") as im:
        put(im, f / "b/pixels.png")
        put(im.resize((200, 150)), f / "b/smaller.jpg", quality=60)
    put(scene(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT), f / "b/mirrored.jpg")
    photos, _, looks = imported(f, tmp_path)
    copies = find_copies(photos.reset_index(), looks)
    file = dict(zip(photos.image_id, photos.index))
    found = {
        frozenset((file[i], file[j])): (k, s)
        for i, j, k, s in copies[["image_id", "copy_of", "kind", "same_label"]].itertuples(index=False)
    }
    assert found == {
        frozenset(("a/1.jpg", "b/the same.jpg")): ("the same file", False),
        frozenset(("a/2.jpg", "b/pixels.png")): ("the same pixels", False),
        frozenset(("a/2.jpg", "b/smaller.jpg")): ("nearly the same picture", False),
    }
    assert len(photos) == 6 and photos.image_id.is_unique


# the whole way


def test_one_photo(tmp_path, runs):
    put(scene(0), tmp_path / "f/place/only.jpg")
    c = explored(tmp_path / "f", n_words=16)  # too few local features for 16 words: drawn images help out
    assert (
        c.photos.state.tolist() == ["dropped"]
        and c.dropped.reason.tolist() == ["the only image of its label"]
        and len(c.pairs) == 0
    )
    put(seen(scene(0), 2), tmp_path / "again.jpg")
    put(scene(9), tmp_path / "other.jpg")
    assert (
        explore.identify(tmp_path / "again.jpg", c).name == "place"
        and explore.identify(tmp_path / "other.jpg", c).name == "no known landmark"
    )


def test_one_label_and_labels_with_one_photo(tmp_path, runs):
    for k in range(3):
        put(seen(scene(0), k), tmp_path / "one/place" / f"{k}.jpg")
    c = explored(tmp_path / "one")
    assert (c.photos.state == "kept").all() and c.facts["different_label_pairs"] == 0
    for k in range(3):
        put(scene(k), tmp_path / "single" / f"place {k}" / "x.jpg")
    c = explored(tmp_path / "single")
    assert (
        (c.dropped.reason == "the only image of its label").all()
        and len(c.dropped) == 3
        and len(train_set(c.dir / "world", "v2-clean")) == 0
    )


def test_blank_photos_have_no_local_features(tmp_path, runs):
    put(Image.new("RGB", (200, 200), "grey"), tmp_path / "f/a/blank.png")
    put(Image.new("RGB", (300, 200), "black"), tmp_path / "f/b/blank.jpg")
    c = explored(tmp_path / "f")
    assert (
        len(c.photos) == 2
        and c.photos.n_features.tolist() == [0, 0]
        and not c.pairs.verified.any()
        and len(c.copies) == 0
    )
    a = explore.identify(tmp_path / "f/a/blank.png", c)
    assert a.name == "no known landmark" and "no local features" in repr(a)


def test_flat_folder_finds_groups(tmp_path, runs):
    for place in range(2):
        for k in range(3):
            put(seen(scene(place), k), tmp_path / "flat" / f"IMG_{place}{k}.jpg")
    c = explored(tmp_path / "flat")
    assert (c.photos.state == "no label").all() and len(c.dropped) == 0 and len(c.labels) == 0
    assert (
        c.photos.groupby(c.photos.file.str[4]).group.nunique().tolist() == [1, 1]
        and c.photos.group.nunique() == 2
    )
    put(seen(scene(1), 4), tmp_path / "new.jpg")
    assert explore.identify(tmp_path / "new.jpg", c).name == "the place of IMG_10.jpg"


def test_wrong_label_goes_and_names_come(tmp_path, runs):
    for k in range(4):
        put(seen(scene(0), k), tmp_path / "f/Rathaus" / f"{k}.jpg")
        put(seen(scene(1), k), tmp_path / "f/Tour Eiffel" / f"{k}.jpg")
    put(seen(scene(1), 5), tmp_path / "f/Rathaus/wrong.jpg")
    put(scene(7), tmp_path / "f/Rathaus/dinner.jpg")
    shutil.copy(tmp_path / "f/Rathaus/dinner.jpg", tmp_path / "f/Rathaus/dinner again.jpg")
    c = explored(tmp_path / "f")
    dropped = dict(zip(c.dropped.file, c.dropped.reason))
    assert set(dropped) == {"Rathaus/wrong.jpg", "Rathaus/dinner.jpg", "Rathaus/dinner again.jpg"} and all(
        r.startswith("0 verified pairs, 3") for r in dropped.values()
    )
    kept = train_set(c.dir / "world", "v2-clean", c.dir / "world/v2/train_clean.csv")
    assert len(kept) == 8
    across = c.pairs[~c.pairs.same_label & c.pairs.verified]
    assert (
        len(across) == 4
        and (
            c.photos.file[across.image].eq("Rathaus/wrong.jpg").to_numpy()
            | c.photos.file[across.partner].eq("Rathaus/wrong.jpg").to_numpy()
        ).all()
    )
    put(seen(scene(1), 6), tmp_path / "q.jpg")
    a = explore.identify(tmp_path / "q.jpg", c)
    assert (
        a.name == "Tour Eiffel"
        and 0.9 < a.confidence <= 1
        and a.landmarks.confidence.is_monotonic_decreasing
        and "Tour Eiffel" in repr(a)
    )
    stays = explore.identify(tmp_path / "f/Rathaus/2.jpg", c)
    assert (
        stays.name == "Rathaus"
        and not stays.matches[stays.matches.is_copy].votes.any()
        and stays.matches.is_copy.sum() == 1
    )
    t = strictness(c, (1, 3, 9))
    assert t.photos.tolist() == [8, 8, 4] and t.labels.tolist() == [2, 2, 1]
    t = leave_one_out(c).set_index("image_id")
    assert t.right.sum() == 8 and t.answer[
        c.photos.image_id[c.photos.file == "Rathaus/wrong.jpg"]
    ].tolist() == ["Tour Eiffel"]


def test_nothing_to_do_twice_and_a_new_photo_counts(tmp_path, runs, capfd):
    for k in range(3):
        put(seen(scene(0), k), tmp_path / "f/a" / f"{k}.jpg")
    c = explored(tmp_path / "f")
    made = (c.dir / "manifest.json").stat().st_mtime_ns
    assert (
        explored(tmp_path / "f", query="somewhere.jpg").dir / "manifest.json"
    ).stat().st_mtime_ns == made  # a query asks, it does not change the collection
    put(seen(scene(0), 3), tmp_path / "f/a/3.jpg")
    again = explored(tmp_path / "f")
    assert again.dir == c.dir and len(again.photos) == 4


def test_a_run_that_was_killed_goes_on(tmp_path, runs, monkeypatch):
    for k in range(3):
        put(seen(scene(0), k), tmp_path / "f/a" / f"{k}.jpg")
    with monkeypatch.context() as m:
        m.setattr(explore, "find_copies", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            explored(tmp_path / "f")
    with monkeypatch.context() as m:
        m.setattr(explore, "import_folder", lambda *a, **k: pytest.fail("imported twice"))
        c = explored(tmp_path / "f")
    assert (c.photos.state == "kept").all()


def same_tables(a, b):
    names = ("photos", "pairs", "neighbours", "labels", "copies", "likeness", "leave_one_out", "carriers")
    return [n for n in names if (a.dir / f"{n}.csv").read_bytes() != (b.dir / f"{n}.csv").read_bytes()]


def a_folder(f):
    for k in range(3):
        put(seen(scene(0), k), f / "Rathaus" / f"{k}.jpg")
        put(seen(scene(1), k), f / "Tour Eiffel" / f"{k}.jpg")
    put(scene(7), f / "loose.png")


def test_a_folder_that_grew_costs_what_is_new(tmp_path, runs, monkeypatch):
    "Photos come, go and are renamed: the result is that of a first run, and only the new ones cost anything."
    f = tmp_path / "f"
    a_folder(f)
    c = explored(f)
    assert (c.facts["new_photos"], c.facts["new_pairs"]) == (7, 21)
    put(seen(scene(1), 4), f / "Tour Eiffel/new.jpg")
    (f / "Rathaus/0.jpg").rename(f / "Rathaus/renamed.jpg")
    (f / "Rathaus/2.jpg").unlink()
    c = explored(f)
    assert (c.facts["new_photos"], c.facts["new_pairs"]) == (1, 6) and len(c.photos) == 7
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/worlds").symlink_to(runs / "worlds")
    anew = explored(f)
    assert anew.facts["new_photos"] == 7 and same_tables(c, anew) == []
    for file in (p for p in (anew.dir / "local").rglob("*") if p.is_file()):
        assert (c.dir / "local" / file.relative_to(anew.dir / "local")).read_bytes() == file.read_bytes()


def test_nothing_is_remembered_of_other_code(tmp_path, runs):
    a_folder(tmp_path / "f")
    c = explored(tmp_path / "f")
    state = (c.dir / "state.json").read_text()
    assert '"code"' in state
    (c.dir / "state.json").write_text(re.sub(r'"code": "\w+"', '"code": "another"', state))
    put(scene(8), tmp_path / "f/more.jpg")
    assert explored(tmp_path / "f").facts["new_photos"] == 8


def test_without_weights_vlad_does_it_and_the_report_says_why(tmp_path, runs, monkeypatch):
    def nothing(ref):
        raise ConnectionError("The weights of tf_efficientnet_lite0 are not here: no way to the registry.")

    a_folder(tmp_path / "f")
    monkeypatch.setattr(explore, "model_file", nothing)
    c = explored(tmp_path / "f", weights="pretrained:tf_efficientnet_lite0")
    assert c.facts["network"] == "" and "no way to the registry" in page_summary(c).striptags()
    put(seen(scene(1), 4), tmp_path / "q.jpg")
    a = explore.identify(tmp_path / "q.jpg", c)
    assert (a.name, a.how) == ("Tour Eiffel", "shown by matched points")


def test_errors_are_sentences(tmp_path, runs):
    put(scene(0), tmp_path / "f/a/1.jpg")
    c = explored(tmp_path / "f")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/state.json").write_text("{}")
    with pytest.raises(ParameterError, match="is no explored collection; run `make photos"):
        explore.identify(tmp_path / "f/a/1.jpg", tmp_path / "half")
    with pytest.raises(ParameterError, match="there is no folder"):
        explore.identify(tmp_path / "f/a/1.jpg", tmp_path / "nowhere")
    with pytest.raises(ImageError, match="no such file"):
        explore.identify(tmp_path / "none.jpg", c)
    (tmp_path / "broken.jpg").write_text("x")
    with pytest.raises(ImageError, match="not an image"):
        explore.identify(tmp_path / "broken.jpg", c)
    with pytest.raises(ParameterError, match="photos is empty"):
        explore.run(explore.Config(profile="test", name="x")) if os.environ.get(
            "LANDMARK_WORLD"
        ) != "tiny" else explore.photo_folder(explore.Config(photos="")) and (_ for _ in ()).throw(
            ParameterError("photos is empty")
        )
    with pytest.raises(ParameterError, match="QUERY is"):
        explore.explore(tmp_path / "f", str(tmp_path / "none.jpg"))
    with pytest.raises(ParameterError, match="kind is"):
        explored(tmp_path / "f", kind="surf")
    with pytest.raises(ParameterError, match="is not there"):
        explored(tmp_path / "f", weights="nowhere/model")


def test_one_call_from_python(tmp_path, runs, capfd):
    "A folder nobody has looked at yet is explored by the question; the second question finds it explored."
    for k in range(3):
        put(seen(scene(0), k), tmp_path / "my places/Rathaus" / f"{k}.jpg")
    put(seen(scene(0), 4), tmp_path / "q.jpg")
    a = explore.identify(tmp_path / "q.jpg", tmp_path / "my places")
    assert (
        a.name == "Rathaus"
        and list(a.landmarks.columns) == ["landmark", "confidence", "n_photos", "n_inliers"]
        and a.matches.votes.sum() == 3
    )
    assert (
        "nothing to do" not in capfd.readouterr().err
        and explore.identify(tmp_path / "q.jpg", str(tmp_path / "my places")).confidence == a.confidence
        and "nothing to do" in capfd.readouterr().err
    )


def test_a_trained_network_finds_the_candidates(tmp_path, runs):
    "A model of 03_train, by path and by name in another profile; it sees photos at the size of its training."
    from landmark import train

    out = train.run(
        train.Config(
            world="tiny",
            name="v1",
            backbone="test_resnet",
            dim=16,
            sizes="64",
            epochs=1,
            batch_size=8,
            device="cpu",
            n_workers=1,
        )
    )
    for k in range(3):
        put(seen(scene(0), k), tmp_path / "f/Rathaus" / f"{k}.jpg")
        put(seen(scene(1), k), tmp_path / "f/Tour Eiffel" / f"{k}.jpg")
    c = explored(tmp_path / "f", weights=str(out / "arcface_v1"))
    assert c.descriptors.dim == 16 + 4 * 128 and (c.photos.state == "kept").all()
    put(seen(scene(1), 4), tmp_path / "q.jpg")
    put(scene(9), tmp_path / "stranger.jpg")
    a = explore.identify(tmp_path / "q.jpg", c)
    assert (
        a.name == "Tour Eiffel"
        and 0.5 < a.confidence <= 1
        and set(a.matches.landmark[a.matches.votes]) == {"Tour Eiffel"}
        and (a.matches.n_inliers[a.matches.votes] >= 12).all()
    )
    b = explore.identify(tmp_path / "stranger.jpg", c)
    assert (
        b.name == "no known landmark"
        and b.confidence == 0
        and len(b.landmarks) == 0
        and len(b.matches) == 6
        and "no known landmark (6 photos compared" in repr(b)
    )
    again = explored(tmp_path / "f", weights="@train/v1")
    assert (again.descriptors[:] == c.descriptors[:]).all()
    with pytest.raises(ParameterError, match="no profile .* has such a finished run"):
        explored(tmp_path / "f", weights="@train/v7")


@pytest.fixture(scope="module")
def report(tmp_path_factory, worlds):
    "From the command line: a folder with everything in it that can go wrong, and one photo asked about."
    home = tmp_path_factory.mktemp("report")
    f = home / "my <photos>"
    (home / "runs").mkdir()
    (home / "runs" / "worlds").symlink_to(worlds)
    exif = Image.Exif()
    exif[0x0112] = 6
    for k in range(3):
        put(seen(scene(0), k), f / "東京 タワー" / f"{k}.jpg")
    put(scene(1), f / "loose.png")
    shutil.copy(f / "loose.png", f / "東京 タワー/copy.png")
    put(seen(scene(0), 4), home / "q.jpg")
    put(scene(2), f / "kinds/rotated.jpg", exif=exif)
    put(scene(2).convert("CMYK"), f / "kinds/cmyk.jpg")
    put(Image.fromarray(np.asarray(scene(3).convert("L")).astype(np.uint16) * 257), f / "kinds/deep.png")
    put(scene(4).convert("P"), f / "kinds/moving.gif", save_all=True, append_images=[scene(5).convert("P")])
    put(scene(6).convert("LA"), f / "kinds/alpha.png")
    put(scene(7), f / "alone/x.jpg")
    (f / "other").mkdir()
    shutil.copy(f / "alone/x.jpg", f / "other/same.jpg")
    (f / "zero & nothing.jpg").touch()
    put(scene(1).resize((1, 1)), f / "dot.png")
    (f / "cut.jpg").write_bytes((f / "alone/x.jpg").read_bytes()[:3000])
    (f / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (f / "loop").symlink_to(f)
    (f / "self.jpg").symlink_to("self.jpg")
    r = subprocess.run(
        [
            sys.executable,
            "-c",
            "from landmark.explore import main; main()",
            str(f),
            str(home / "q.jpg"),
            "-p",
            "n_words",
            "16",
            "-p",
            "weights",
            "",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LANDMARK_RUNS": str(home / "runs")},
    )
    assert r.returncode == 0, r.stderr[-3000:]
    return Path(r.stdout.strip().partition("the report: ")[2])


def test_report_of_a_difficult_folder(report):
    "One page that loads nothing, shows every label and lists every file left out."
    text = report.read_text(encoding="utf-8")
    assert (
        "東京 タワー" in text
        and "What is q.jpg of?" in text
        and "once with a label, once without" in text
        and "under two labels" in text
        and "<photos>" not in text
        and "Traceback" not in text
    )
    for file, why in (
        ("zero &amp; nothing.jpg", "the file is empty"),
        ("dot.png", "1×1 pixels"),
        ("cut.jpg", "truncated"),
        ("phone.heic", ""),
        ("loop", "a link to a folder that is read already"),
        ("self.jpg", "in a circle"),
    ):
        assert re.search(rf"<td[^>]*>{re.escape(file)}</td>\s*<td[^>]*>[^<]*{re.escape(why)}", text), (
            file,
            why,
        )
    for file, what in (
        ("rotated.jpg", "turned upright"),
        ("cmyk.jpg", "CMYK to RGB"),
        ("deep.png", "16 bits to 8"),
        ("moving.gif", "first of 2 frames"),
        ("alpha.png", "laid on white"),
    ):
        assert re.search(rf"<td[^>]*>kinds/{re.escape(file)}</td>\s*<td[^>]*>[^<]*{what}", text), (file, what)
    shown = re.findall(r'(?:src|href)="([^"#]+)"', text)
    missing = [s for s in shown if not s.startswith("data:,") and not (report.parent / s).is_file()]
    assert len(shown) > 10 and not missing
    assert "data:image/jpeg" not in text and not re.search(r"https?://(?!www\.w3\.org)", text)
    assert {p.name for p in report.parent.iterdir()} == {"index.html", "pictures", "figures", "tables"}
    assert 'href="tables/neighbours.csv"' in text and ".gallery .card" in text
    for heading in ("All photos", "How far to trust a name", "Files left out"):
        slug = heading.lower().replace(" ", "-")
        assert f'<a href="#{slug}">{heading}</a>' in text and f'id="{slug}"' in text


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (on Debian: apt install chromium)")
def test_a_browser_shows_the_report_without_complaint(report, tmp_path):
    assert complaints(report, tmp_path) == [] and len(pictures(report.read_text(encoding="utf-8"))) > 10


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine (on Debian: apt install chromium)")
def test_every_photo_of_the_report_opens(report):
    with Opened(report) as o:
        cards, about = o.tab.locator("a[data-words]"), o.tab.locator(".about:target")
        assert cards.count() == 12
        o.tab.fill("input[name=words]", "東京")
        o.tab.locator("a[data-words]:visible").first.click()
        assert "東京 タワー/0.jpg" in about.inner_text() and about.locator("svg path").count() == 2
        o.tab.fill("input[name=words]", "")
        for k in range(cards.count()):
            o.tab.goto(f"{report.as_uri()}#about-{k}")
            assert about.locator("b").inner_text() == o.tab.get_attribute(f"#photo-{k}", "title")
        assert o.said == []


def test_a_wrong_folder_is_one_sentence(tmp_path):
    r = subprocess.run(
        [sys.executable, "-c", "from landmark.explore import main; main()", str(tmp_path / "nowhere")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert r.returncode == 1 and "there is no folder" in r.stderr and "Traceback" not in r.stderr


# real photos


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    os.environ["LANDMARK_RUNS"] = str(tmp_path_factory.mktemp("runs"))
    try:
        yield Collection(explore.run(explore.Config(profile="photos", photos=REAL)))
    finally:
        del os.environ["LANDMARK_RUNS"]


@real
def test_real_photos_verify_by_place(collection):
    "Most pairs of one façade verify, pairs of different places do not."
    p = collection.pairs
    file = collection.photos.file

    def within(label):
        ends = [file[p[end]].str.startswith(label).to_numpy() for end in ("image", "partner")]
        return p[ends[0] & ends[1]].verified.mean()

    assert within("sacre_coeur/") > 0.5 and within("sceaux_castle/") > 0.6
    other = p[~p.same_label]
    assert len(other) > 3000 and other.verified.mean() < 0.001


@real
def test_real_labels_survive(collection):
    t = collection.labels.set_index("label")
    assert {"sacre_coeur", "sceaux_castle"} <= set(t.index[t.survives]) and 3 <= t.survives.sum() <= 8
    assert (
        t.kept["sacre_coeur"] >= 8
        and t.kept["sceaux_castle"] >= 9
        and not t.survives[["oxford_magdalen", "oxford_jesus", "oxford_pitt_rivers"]].any()
    )


@real
def test_real_photos_name_each_other(collection):
    t = trust_table(leave_one_out(collection)).set_index("kind")
    shown, alike, both = (t.loc[kind] for kind in t.index)
    assert shown.right >= 35 and shown.wrong <= 1 and shown.strangers_named <= 1
    assert alike.wrong <= 4 and alike.strangers_named <= 0.1 * alike.strangers
    assert both.right >= shown.right + (5 if collection.facts["network"] else 0)


@real
def test_real_photo_is_named_and_a_stranger_is_not(collection, tmp_path):
    im = Image.open(sorted(Path(REAL).glob("sacre_coeur/*"))[3])
    w, h = im.size
    im.crop((w // 10, h // 12, w * 9 // 10, h)).resize((w // 2, h // 2)).save(tmp_path / "q.jpg", quality=70)
    a = explore.identify(tmp_path / "q.jpg", collection)
    assert a.name == "sacre_coeur" and a.confidence > 0.8 and a.matches.n_inliers[0] > 30
    scene(3, 800, 600).save(tmp_path / "painting.jpg")
    assert explore.identify(tmp_path / "painting.jpg", collection).name == "no known landmark"
