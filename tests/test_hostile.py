"What phones, browsers, spreadsheets and strangers really write: read rightly, or refused in one sentence."

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from landmark import data
from landmark.data import check_world
from landmark.parts import config, core
from landmark.parts.config import open_parameters, read_parameters, stage_main, typed_behind_papermill
from landmark.parts.data import layout
from landmark.parts.data.submission import read_recognition, read_retrieval
from landmark.parts.descriptors.hdf5 import read_h5
from landmark.parts.descriptors.store import l2n
from landmark.parts.images.formats import KINDS, ImageError
from landmark.parts.images.reading import image_size, read_image
from landmark.parts.photos.importing import import_folder
from landmark.parts.rerank import beyond, graph
from landmark.parts.rerank import labels as by_label
from landmark.parts.search.knn import search

ROOT = Path(__file__).resolve().parent.parent

# ids and file names


@pytest.fixture
def world(tmp_path):
    "A world of one picture at its place, and one outside that an id could reach."
    home = tmp_path / "world"
    for place in (home / "v2/train/a/b/c/abc1.jpg", tmp_path / "x/y/a/a.jpg"):
        place.parent.mkdir(parents=True)
        Image.new("RGB", (80, 80)).save(place)
    write(home, "v2/train.csv", "id,landmark_id\nabc1,7\n")
    return home


def write(home, name, text):
    path = home / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


LEAVING = ["../x/y/a/a", "/etc/passwd", "a/../../../x", "..", ".../x", "a\\..\\x", "abc\u202e1", "a" * 300]


@pytest.mark.parametrize("name", LEAVING)
def test_an_id_stays_in_its_folder(world, name):
    "From every table, pickle, h5 file and submission; said with file, row and value before anything opens."
    shown = repr(name)[:40]
    rows = f"abc1,7\n{name},7\n"
    write(world, "v2/train.csv", f"id,landmark_id\n{rows}")
    with pytest.raises(ValueError, match="row 3: the id") as e:
        check_world(world, n_workers=1)
    assert shown in str(e.value) and "train.csv" in str(e.value)
    gnd = dict(imlist=["abc1", name], qimlist=["abc1"], gnd=[dict(bbx=[0, 0, 1, 1])])
    for names, listed in ((gnd, "imlist[1]"), (dict(gnd, imlist=[], qimlist=[name]), "qimlist[0]")):
        write(world, "revisited/rx/gnd_rx.pkl", pickle.dumps(names))
        with pytest.raises(ValueError, match="gnd_rx.pkl") as e:
            layout.read_images(world, f"rx_{'index' if listed == 'imlist[1]' else 'query'}")
        assert listed in str(e.value) and shown in str(e.value)
    with h5py.File(world / "d.h5", "w") as f:
        f["ids"], f["feats"] = np.array([name.encode()]), np.eye(1, dtype="f4")
    with pytest.raises(ValueError, match=r"d.h5, ids\[0\]"):
        read_h5(world / "d.h5", world / "store")
    with pytest.raises(ValueError, match="row 2: the id in images"):
        read_retrieval(write(world, "r.csv", f"id,images\nabc1,abc1 {name}\n"))
    with pytest.raises(ValueError, match="row 2: the test image"):
        read_recognition(write(world, "r.csv", f"id,landmarks\n{name},7 0.5\n"))
    for kind, column in (("retrieval", "images"), ("recognition", "landmarks")):
        write(world, f"v2/{kind}_solution.csv", f"id,{column},Usage\n{name},None,Public\n")
        with pytest.raises(ValueError, match="row 2: the id"):
            getattr(layout, f"read_{kind}_solution")(world)


# labels and tables


def test_labels_that_would_merge_are_refused_with_their_rows(world):
    for labels, said in {
        ("007", "7"): "row 2: the landmark_id is '007' (and row 3 '7')",
        ("7", "1e10", "1" + "0" * 10): "row 3: the landmark_id is '1e10' (and row 4 '10000000000')",
        ("7", "0.0"): "row 3: the landmark_id is '0.0'",
        ("7", ""): "row 3: the landmark_id is ''",
        ("Mill", "nan"): "row 3: the landmark_id is 'nan'",
    }.items():
        rows = "".join(f"abc{i},{label}\n" for i, label in enumerate(labels))
        path = write(world, "v2/train.csv", f"id,landmark_id\n{rows}")
        with pytest.raises(ValueError) as e:
            layout.read_images(world, "v2_train")
        assert str(e.value).startswith(f"{path}, {said}")
        write(world, "v2/train_label_to_category.csv", f"landmark_id,category\n{labels[1]},Mill\n")


def test_a_label_in_two_spellings_is_one_and_said_so(world, capsys):
    text = "id,landmark_id\nabc1,\u00c9glise\nabc2,E\u0301glise\nabc3,Mill\n"
    write(world, "v2/train.csv", text)
    assert layout.read_images(world, "v2_train").landmark_id.nunique() == 2
    assert "1 labels are written in two ways and are one each: Église" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, said",
    [
        ("id,landmark_id\nabc1,7\n".encode("utf-16"), "it is UTF-16; allowed is CSV in UTF-8"),
        ("id,landmark_id\nÉglise,7\n".encode("latin-1"), "row 2 is not UTF-8"),
        (b"id,landmark_id\nabc1,7,8,9\n", "more fields"),
        (b'id,landmark_id\n"abc1,7\n', "EOF inside string"),
        (b"PK\x03\x04 workbook", "a workbook"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
        (b"id;landmark_id\nabc1;7\n", "commas must separate the columns"),
    ],
)
def test_a_table_that_is_none(world, content, said):
    path = write(world, "v2/train.csv", content)
    with pytest.raises(ValueError) as e:
        layout.read_images(world, "v2_train")
    assert str(path) in str(e.value) and said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("value", ["NA", "nan", "Q5", "null", "7.0", "7 007", "-"])
def test_none_in_other_words(world, value):
    path = write(world, "v2/recognition_solution.csv", f"id,landmarks,Usage\nabc1,{value},Public\n")
    with pytest.raises(ValueError) as e:
        layout.read_recognition_solution(world)
    allowed = "allowed are whole numbers separated by blanks, or `None`"
    assert str(e.value) == f"{path}, row 2: landmarks is {value!r}; {allowed}"


# pictures


@pytest.fixture
def photo():
    "A photo whose top is red, 360×240."
    x = np.random.default_rng(0).integers(0, 90, (240, 360, 3), np.uint8)
    x[:80, :, 0] = 230
    return Image.fromarray(x)


def imported(folder, tmp_path):
    photos, skipped, _ = import_folder(folder, tmp_path / "world", n_workers=1)
    return photos.set_index("file").changed.to_dict(), skipped.set_index("file").reason.to_dict()


def test_the_bytes_decide_what_a_file_is(photo, tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    kinds = dict(
        JPEG="HEIC jfif jpe dat", PNG="jpg avif", WEBP="jpeg", TIFF="png", AVIF="jpg avif", JPEG2000="jp2"
    )
    for kind, names in kinds.items():
        for name in names.split():
            photo.save(folder / f"{kind}.{name}", kind)
    photo.save(folder / "two.mpo", "MPO", save_all=True, append_images=[photo])
    photo.save(folder / "no ending", "JPEG")
    for name, text in {
        "page.jpg": "<!DOCTYPE html>",
        "a.jpg": "version https://git-lfs",
        "b.ps": "%!PS",
    }.items():
        (folder / name).write_text(text)
    (folder / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n")
    (folder / "film.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    changed, skipped = imported(folder, tmp_path)
    for kind, names in kinds.items():
        for name in names.split():
            said = changed[f"{kind}.{name}"]
            fits = f".{name}" in KINDS[kind]
            assert (f"named .{name}, is {kind}" in said) != fits, (kind, name, said)
    assert changed["no ending"] == "named without ending, is JPEG" and "two.mpo" in changed
    assert skipped == {
        "page.jpg": "not an image: it is a web page",
        "a.jpg": "not an image: it is a pointer of Git LFS; fetch the file itself with `git lfs pull`",
        "b.ps": "not a photo by its name (.ps)",
        "script.jpg": "not an image: it is PostScript",  # Pillow would hand it to Ghostscript
        "film.mp4": "not a photo by its name (.mp4)",
    }


def test_there_is_one_limit_in_megapixels_and_it_is_ours(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    Image.new("1", (20_000, 9_500)).save(tmp_path / "a.png")  # 190 megapixels: Pillow refuses them
    assert image_size(tmp_path / "a.png") == (20_000, 9_500)
    assert read_image(tmp_path / "a.png", 512).shape == (243, 512, 3)
    wide = Image.new("L", (32_000, 8_000), 99)
    wide.save(tmp_path / "a.jpg")  # 256 megapixels, an eighth of each side when it is read
    assert read_image(tmp_path / "a.jpg", 512).shape == (128, 512, 3)
    with pytest.raises(ImageError, match="32000×8000 are 256 megapixels; 250 are decoded at most"):
        read_image(tmp_path / "a.jpg")
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "avif", "heic"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_size_and_pixels_agree_however_a_camera_was_held(photo, kind, turn, tmp_path):
    if kind == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    exif, path = photo.getexif(), tmp_path / f"a.{kind}"
    exif[0x0112] = turn
    photo.save(path, exif=exif.tobytes() if kind == "heic" else exif)
    x = read_image(path)
    assert image_size(path) == x.shape[1::-1] == ((240, 360) if turn > 4 else (360, 240))
    red = [side[..., 0].mean() for side in (x[:20], x[:, -20:], x[-20:], x[:, :20])]
    assert int(np.argmax(red)) == [0, 0, 2, 2, 3, 1, 1, 3][turn - 1]  # top, right, bottom, left


def test_deep_pictures_are_recognised_and_what_changed_is_said(photo, tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    grey = np.asarray(photo.convert("L")).astype(np.float32) / 255
    Image.fromarray(grey).save(folder / "float.tif")
    Image.fromarray(grey * 40 - 20).save(folder / "height.tif")
    Image.fromarray((grey * 4095).astype(np.uint16)).save(folder / "twelve.png")
    Image.fromarray((grey * 65535).astype(np.uint16)).save(folder / "sixteen.png")
    changed, skipped = imported(folder, tmp_path)
    assert not skipped
    want = np.asarray(photo.convert("L")).astype(int)
    for name in changed:
        assert np.corrcoef(read_image(folder / name)[..., 0].ravel(), want.ravel())[0, 1] > 0.99
        assert np.abs(read_image(folder / name)[..., 0] - want).mean() < (
            80 if name == "height.tif" else 12
        ), name
    assert {n: c.partition(",")[0] for n, c in changed.items()} == {
        "float.tif": "numbers in 0…1 to 8 bits",
        "height.tif": changed["height.tif"].partition(",")[0],
        "sixteen.png": "16 bits to 8",
        "twelve.png": "12 bits of 16 to 8",
    }
    assert "stretched to 8 bits" in changed["height.tif"]


def test_a_jpeg_that_ends_early_is_read_and_one_with_a_hole_is_named(photo, tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    photo.save(folder / "whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    (folder / "no end.jpg").write_bytes(data[:-2])
    (folder / "hole.jpg").write_bytes(data[:9000] + bytes(2048) + data[11048:])
    (folder / "cut.jpg").write_bytes(data[:9000])
    changed, skipped = imported(folder, tmp_path)
    assert changed["whole.jpg"] == "" and changed["no end.jpg"] == "ends early"
    assert changed["hole.jpg"].startswith("damaged inside: ")
    assert "truncated" in skipped["cut.jpg"]
    assert (read_image(folder / "no end.jpg") == read_image(folder / "whole.jpg")).all()


# parameters


def started(*command, runs):
    env = {**os.environ, "LANDMARK_RUNS": str(runs), "LANDMARK_WORLD": "tiny", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("text", ["2024_07", "007", "no", "1e3"])
def test_a_string_stays_the_string_that_was_typed(text, tmp_path, monkeypatch):
    "From a command line, a parameter file and papermill's command line."
    (tmp_path / "p.yaml").write_text(f"world: {text}\n")
    words = ["python", "-m", "papermill", "in.ipynb", "out.ipynb"]
    seen = open_parameters(ns := {}, data.Config)
    ns["world"] = 7  # what papermill makes of it
    for end in (["-p", "world", text], ["-f", str(tmp_path / "p.yaml")]):
        (tmp_path / "cmdline").write_bytes("\0".join(words + end).encode())
        given = typed_behind_papermill(data.Config, tmp_path)
        monkeypatch.setattr(config, "typed_behind_papermill", lambda _, given=given: given)
        assert read_parameters(ns, seen, data.Config).world == text
        monkeypatch.setattr(sys, "argv", ["landmark_data", *end])
        found = []
        stage_main(data.Config, lambda cfg: found.append(cfg.world))
        assert found == [text]


def test_papermill_runs_with_what_was_typed(tmp_path):
    "Started for real: its own reading would have given the number 202407."
    words = ("nbs/00_data.ipynb", str(tmp_path / "out.ipynb"), "-k", "python3", "--no-progress-bar")
    r = started("-m", "papermill", *words, "-p", "noise", "None", "-p", "world", "2024_07", runs=tmp_path)
    assert r.returncode and "world is '2024_07': neither a drawn world" in r.stderr, r.stderr[-2000:]


def test_values_that_are_no_numbers_or_no_files_are_refused(tmp_path, monkeypatch, capsys):
    for words, said in {
        ("-p", "noise", "nan"): "`noise` is 'nan': Input should be a finite number",
        ("-p", "noise", ".inf"): "`noise` is '.inf'",
        ("-p", "size", "[1"): "`size` is '[1': it is no YAML in line 1",
        ("-f", str(tmp_path / "gone.yaml")): "there is no parameter file",
    }.items():
        monkeypatch.setattr(sys, "argv", ["landmark_data", *words])
        with pytest.raises(SystemExit) as e:
            stage_main(data.Config, lambda cfg: cfg)
        assert said in str(e.value)


# settings of the process


SETTINGS = """if True:
    import sys
    import faiss, numba, numpy as np, torch
    from landmark.parts.search.knn import search, slow_search
    cuda, host = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    def state():
        precision = [getattr(o, "fp32_precision", "") for o in (cuda, host, torch.backends)]
        threads = torch.get_num_threads(), faiss.omp_get_max_threads()
        threads += (numba.get_num_threads(),) if "numba" in sys.argv[1] else ()  # asking starts its threads
        return precision, cuda.allow_bf16_reduced_precision_reduction, threads
    exec(sys.argv[1])
    before, x = state(), np.random.default_rng(0).normal(size=(300, 32)).astype(np.float32)
    wanted = slow_search(x[:20], x, 5)[1]
    for method in ("faiss", "numpy", "torch", "torch32"):
        assert (search(x[:20], x, 5, device="cpu", method=method)[1] == wanted).all(), method
        assert state() == before, (method, before, state())
"""
CHOICES = [
    "torch.set_float32_matmul_precision('medium'); numba.set_num_threads(1); faiss.omp_set_num_threads(1)",
    "torch.backends.fp32_precision = 'tf32'; torch.set_num_threads(1)",
]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_search_leaves_the_settings_of_its_caller_as_they_were(choice, tmp_path):
    "Each in a process of its own: numba sets the threads of OpenMP once in its life."
    r = started("-c", SETTINGS, choice, runs=tmp_path)
    assert r.returncode == 0, r.stderr[-1500:]


@pytest.fixture
def drawn():
    "Twelve descriptors, their neighbours and similarities."
    x = l2n(np.random.default_rng(0).normal(size=(12, 8)))
    sims, idxs = search(x, x, 12, device="cpu")
    return x, sims, idxs, np.zeros(12)


LOOPS = {
    beyond: lambda x, sims, idxs, _: beyond.k_reciprocal_distances(x, idxs, [0], idxs[:1], 3, 2),
    graph.diffuse: lambda x, sims, idxs, _: graph.diffuse(graph.laplacian(graph.affinity(sims, idxs)), idxs),
    graph.diffusion_rank: lambda x, sims, idxs, _: graph.diffusion_rank(sims, idxs, 2, 3),
    graph.egt: lambda x, sims, idxs, _: graph.egt(sims, idxs, sims, idxs),
    by_label: lambda x, sims, idxs, zeros: by_label.sort_insert(idxs, zeros, zeros, zeros, zeros),
}


@pytest.mark.parametrize("call", LOOPS.values(), ids=[f.__name__.split(".")[-1] for f in LOOPS])
def test_re_ranking_leaves_the_threads_of_its_caller_as_they_were(call, drawn, monkeypatch):
    "Where numba and PyTorch share one OpenMP, asking numba for its threads sets PyTorch's."
    before, asked = torch.get_num_threads(), []

    def asking():
        asked.append(torch.set_num_threads(before + 1))
        return 1

    for part in (beyond, graph, by_label):
        monkeypatch.setattr(part, "get_num_threads", asking)
    call(*drawn)
    assert asked and torch.get_num_threads() == before


# odd places to live


ODD = "it's my #1 “夜” $(exit 1) & 50% {x}"


def test_runs_and_photos_may_lie_in_folders_of_any_name(photo, tmp_path):
    home = tmp_path / ODD
    (home / "photos" / ODD).mkdir(parents=True)
    photo.save(home / "photos" / ODD / "a b'c#.jpg")
    photos, skipped, _ = import_folder(home / "photos", home / "world", n_workers=1)
    assert photos.label.tolist() == [ODD] and not len(skipped)
    assert read_image(layout.read_images(home / "world", "v2_train").path[0]).shape == (240, 360, 3)
    assert layout.landmark_names(home / "world") == {0: ODD}
    words = ("-p", "world", str(home / "world"), "-p", "n_workers", "1")
    r = started("-c", "from landmark.data import main; main()", *words, runs=home / "runs")
    assert r.returncode == 0 and (Path(r.stdout.strip()) / "manifest.json").exists(), r.stderr[-1500:]


def test_a_place_that_cannot_be_written_is_named_in_one_sentence(tmp_path, monkeypatch):
    def forbidden(*args, **how):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(core.Path, "mkdir", forbidden)
    monkeypatch.setattr(sys, "argv", ["landmark_data", "-p", "world", "tiny"])
    with pytest.raises(SystemExit) as e:
        data.main()
    assert "(Read-only file system); LANDMARK_RUNS names another folder" in str(e.value)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.ENOTSUP])
def test_a_second_name_becomes_a_copy_where_a_disk_has_no_links(number, tmp_path, monkeypatch):
    "`runs/` on another disk, on exFAT, or mounted from a NAS."

    def no_link(*args):
        raise OSError(number, "no links here")

    monkeypatch.setattr(os, "link", no_link)
    (tmp_path / "a").write_text("kept")
    core.link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "kept" and len(list(tmp_path.iterdir())) == 2


# what people reported of other tools


def segment(mark, body):
    return bytes([0xFF, mark]) + (len(body) + 2).to_bytes(2, "big") + body


def test_what_people_reported_of_other_tools(photo, tmp_path):
    "Damaged XMP and EXIF, a byte missing, a huge colour profile, a motion photo, commas and quotes in names."
    folder, turned = tmp_path / "f", photo.getexif()
    folder.mkdir()
    turned[0x0112] = 6
    photo.save(folder / "UPPER.JPEG", "JPEG")
    photo.save(tmp_path / "turned.jpg", exif=turned)
    plain, exif = (folder / "UPPER.JPEG").read_bytes(), (tmp_path / "turned.jpg").read_bytes()
    note, xmp = exif.index(b"\xff\xe1"), b"http://ns.adobe.com/xap/1.0/\0<x>\xa8\xff</x>"
    behind = note + 2 + int.from_bytes(exif[note + 2 : note + 4], "big")
    files = {
        "xmp.jpg": plain[:2] + segment(0xE1, xmp) + plain[2:],
        "a gap.jpg": exif[:behind] + b"\1\2\3\4\5\6\7" + exif[behind:],
        "one byte.jpg": plain[:-1],
        "PXL.MP.jpg": plain + b"\0\0\0\x18ftypmp42" + bytes(5000),
        "PXL.MP": b"\0\0\0\x18ftypmp42" + bytes(5000),
        "l''Alguer_0,0;\".jpg": plain,
        "._a.jpg": b"\0\5\x16\7" + bytes(4000),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    photo.save(folder / "profile.png", icc_profile=bytes(2_000_000))
    photo.convert("P").save(folder / "Abyssinian_34.jpg", "GIF")
    for name in ("@eaDir/a.jpg", "#recycle", "__MACOSX"):
        (folder / name).mkdir(parents=True)
        (folder / name / "THUMB.jpg").write_bytes(plain)
    changed, skipped = imported(folder, tmp_path)
    assert changed == {
        "UPPER.JPEG": "",
        "xmp.jpg": "",
        "a gap.jpg": "turned upright",
        "one byte.jpg": "ends early",
        "PXL.MP.jpg": "",
        "l''Alguer_0,0;\".jpg": "",
        "profile.png": "PNG to JPEG",
        "Abyssinian_34.jpg": "GIF to JPEG, named .jpg, is GIF",
    }
    assert sorted(skipped) == ["#recycle", "._a.jpg", "@eaDir", "PXL.MP", "__MACOSX"]


def test_an_id_that_looks_like_a_number_stays_the_text_it_is(world):
    "Hexadecimal digits with one e, or none: a number for many readers."
    ids = ["47671950010092e5", "1234567890123456", "0000000000000007"]
    rows = "".join(f"{i},7\n" for i in ids)
    write(world, "v2/train.csv", f"id,landmark_id\n{rows}")
    assert layout.read_images(world, "v2_train").image_id.tolist() == ids
    write(world, "r.csv", f"id,landmarks\n{ids[0]},7 0.5\n")
    assert read_recognition(world / "r.csv").image_id.tolist() == ids[:1]


def test_a_look_at_all_pixels_names_damage_that_decoders_hide(world, photo):
    path = world / "v2/train/a/b/c/abc1.jpg"
    photo.save(path)
    content = path.read_bytes()
    path.write_bytes(content[:9000] + bytes(2048) + content[11048:])
    problems = check_world(world, "pixels", n_workers=1).problem.tolist()
    assert any(p.startswith("damaged inside: ") for p in problems)
    assert not any("damaged" in p for p in check_world(world, "sizes", n_workers=1).problem)
