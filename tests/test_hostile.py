"What phones, browsers, spreadsheets and strangers really write: read rightly, or refused in one sentence."

import pickle

import h5py
import numpy as np
import pytest

from landmark.data import check_world
from landmark.parts.data import layout
from landmark.parts.data.submission import read_recognition, read_retrieval
from landmark.parts.descriptors.hdf5 import read_h5

# ids and file names


@pytest.fixture
def world(tmp_path):
    "A world of one picture at its place, and one outside that an id could reach."
    from PIL import Image

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
    "From every table, pickle, h5 file and submission; said with file, row and value, before a file is opened."
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
    "data, said",
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
def test_a_table_that_is_none(world, data, said):
    path = write(world, "v2/train.csv", data)
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
