"A game without a browser: lists are those of the run, bad input is a sentence, a run is only read."

import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import yaml
from PIL import Image

from landmark import explore, play, rerank
from landmark.parts.config import make_config
from landmark.parts.core import ParameterError, read_json, runs_dir, write_json
from landmark.parts.photos.drawn import drawn_folder
from landmark.parts.play.desk import Around, Cleans, Desk, Takes
from landmark.parts.play.opening import open_source
from landmark.parts.play.state import Play
from landmark.parts.rerank.problem import needs_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "An empty folder of runs; drawn images are drawn once."
    drawn_folder(1)
    home = tmp_path_factory.mktemp("runs")
    (home / "worlds").symlink_to((runs_dir() / "worlds").resolve())
    with mock.patch.dict("os.environ", LANDMARK_RUNS=str(home)):
        yield home


@pytest.fixture(scope="module")
def photos(runs):
    "The drawn folder, explored by its local features alone."
    return explore.run(explore.config_of(drawn_folder(1), weights="", n_words=16))


@pytest.fixture(scope="module")
def ranked(runs):
    "A finished re-ranking of the tiny world."
    return rerank.run(rerank.Config(name="played", topk=15))


def listing(folder):
    "Files of a run, with their times."
    return {str(p): p.stat().st_mtime_ns for p in Path(folder).rglob("*")}


def test_lists_are_those_of_the_run(ranked):
    p = Play(open_source(ranked), topk=15)
    assert p.source.notes == []
    compared = 0
    for path in sorted((ranked / "ranks" / p.settings.model).glob("*.npy")):
        if path.stem not in p.methods() or ("everything", "everything") in needs_of([path.stem]):
            continue  # in such a graph all queries of a run take part
        rows = np.load(path)
        for q in range(0, len(rows), 3):
            p.ask(f"queries/{q}")
            p.set(method=path.stem)
            assert p.ranked.rows[-1].tolist() == rows[q][rows[q] >= 0].tolist(), (path.stem, q)
            compared += 1
    assert compared >= 20


def test_average_precision_is_that_of_the_run(ranked):
    import pandas as pd

    per_query = pd.read_csv(ranked / "per_query.csv", dtype=dict(query_id=str))
    p = Play(open_source(ranked), topk=15, method="sort+insert")
    mine = per_query[(per_query.model == p.settings.model) & (per_query.method == "sort+insert")]
    mine = mine[mine.benchmark.str.startswith("gld")].set_index("query_id").ap
    for q, image_id in enumerate(p.source.sets["queries"].ids[:8]):
        assert p.ask(f"queries/{q}").ap == pytest.approx(mine[image_id], abs=1e-4)


def test_average_precision_on_a_benchmark_is_that_of_the_run(ranked):
    "By the Medium protocol, over the whole index, with the box that belongs to the query."
    import pandas as pd

    per_query = pd.read_csv(ranked / "per_query.csv", dtype=dict(query_id=str))
    p = Play(open_source(ranked), topk=15)
    compared = 0
    assert len(p.home.benchmarks) == 2
    for bench in p.home.benchmarks:
        p.turn_to(bench)
        mine = per_query[(per_query.model == p.settings.model) & (per_query.benchmark == bench)]
        mine = mine[mine.metric == "mAP M"].set_index(["method", "query_id"]).ap
        for method in p.methods():
            if method not in mine.index or ("everything", "everything") in needs_of([method]):
                continue
            p.set(method=method)
            for q, image_id in enumerate(p.source.sets["queries"].ids[:4]):
                if (method, image_id) in mine.index:
                    assert p.ask(f"{bench}_query/{q}").ap == pytest.approx(mine[method, image_id], abs=1e-4)
                    assert p.asking.given and len(p.ranked.rows[-1]) <= 15
                    compared += 1
    assert compared >= 20
    p.turn_to()
    assert p.ask("queries/0").kinds == {}


def test_a_benchmark_comes_back_from_a_parameter_file(ranked, tmp_path):
    source = open_source(ranked)
    bench = next(iter(source.benchmarks))
    p = Play(source, topk=10)
    p.turn_to(bench)
    p.ask(f"{bench}_query/1")
    given = yaml.safe_load(p.take_away(tmp_path, str(ranked))["play"].read_text())
    desk = play.open_desk(make_config(play.Config, given))
    assert desk.asks.which.value == bench and desk.play.asking.key == f"{bench}_query/1"
    assert desk.play.ranked.rows[-1].tolist() == p.ranked.rows[-1].tolist() and desk.voice.said == ""
    assert {i["frame"] for i in desk.list.items} <= {"right", "few", "junk", "wrong"}


def test_a_run_is_only_read_by_however_many(ranked, photos):
    before = listing(ranked), listing(photos)
    for folder in (ranked, photos):
        for p in (Play(open_source(folder)), Play(open_source(folder))):
            p.ask("queries/1")
            for method in p.methods():
                p.set(method=method, topk=10)
            p.why(1)
            p.around()
    assert (listing(ranked), listing(photos)) == before


def test_a_photo_is_not_in_its_own_list(photos):
    p = Play(open_source(photos))
    for method in p.methods():
        p.set(method=method)
        assert 4 not in p.ask("queries/4").rows[-1].tolist(), method
        assert len(set(p.ranked.rows[-1].tolist())) == len(p.ranked.rows[-1])


def test_the_whole_desk_on_a_folder(photos, tmp_path):
    desk = Desk(Play(open_source(photos)))
    desk.begin()
    around, cleans, takes = Around(desk), Cleans(desk), Takes(desk, tmp_path / "mine", str(photos))
    assert len(around.plane.points) == 17 and cleans.said.value.startswith("<b>Cleaning:</b> ")
    for slider in cleans.sliders:
        slider.value = slider.max
    assert "0 of 17 photos stay" in cleans.said.value
    takes.write()
    assert yaml.safe_load((tmp_path / "mine" / "explore.yaml").read_text())["min_inliers"] == 60
    make_config(explore.Config, yaml.safe_load((tmp_path / "mine" / "explore.yaml").read_text()))
    assert desk.voice.said == around.voice.said == cleans.voice.said == takes.voice.said == ""


def test_what_cleaning_keeps_is_what_the_folder_kept(photos):
    from landmark.parts.photos.opening import Collection

    p = Play(open_source(photos))
    kept = (Collection(photos).photos.state == "kept").to_numpy()
    assert (p.cleaning().kept == kept).all() and not len(p.cleaning().came) + len(p.cleaning().left)
    p.set(min_verified=1)
    assert (p.cleaning().kept == Collection(photos).kept_with(1)).all()


def test_settings_make_the_same_list_again(ranked, tmp_path):
    import papermill

    p = Play(open_source(ranked), method="sort+insert", topk=10, insert_thresh=0.3, voting_k=2)
    p.ask("queries/2")
    files = p.take_away(tmp_path, str(ranked))
    given = yaml.safe_load(files["rerank"].read_text())
    cfg = make_config(rerank.Config, given)
    assert (cfg.insert_thresh, cfg.voting_k, cfg.methods) == (0.3, 2, ["sort+insert"])
    back = make_config(play.Config, yaml.safe_load(files["play"].read_text()))
    again = play.open_desk(back).play
    assert again.ranked.rows[-1].tolist() == p.ranked.rows[-1].tolist()
    out = str(tmp_path / "out.ipynb")
    page = play.page_of(play.Config(), tmp_path / "page.ipynb")
    papermill.execute_notebook(page, out, yaml.safe_load(files["play"].read_text()), kernel_name="python3")
    text = Path(out).read_text()
    assert "Traceback" not in text and "insert_thresh" in text


# bad input


@pytest.fixture
def desk(ranked):
    "A desk with a list on it."
    desk = Desk(Play(open_source(ranked)))
    desk.begin()
    d = desk.play.sets().index.shape[1]
    desk.play.source.describe = lambda model, path: (
        np.ones(d, np.float32) / d**0.5
    )  # made up: no model made it
    return desk


def test_without_a_model_there_are_no_other_photos(ranked, tmp_path):
    desk = Desk(Play(open_source(ranked)))
    desk.begin()
    Image.effect_noise((80, 60), 50).save(tmp_path / "other.png")
    desk.asks.dropped(tmp_path / "other.png", "other.png")
    assert "has no model that could describe another photo" in desk.voice.said


def test_a_panorama_of_two_hundred_megapixels(desk, tmp_path):
    Image.linear_gradient("L").resize((20_000, 10_000)).save(tmp_path / "wide.jpg", quality=40)
    desk.asks.dropped(tmp_path / "wide.jpg", "wide.jpg")
    assert desk.voice.said == "" and desk.play.asking.name == "wide.jpg"
    with Image.open(desk.play.asking.path) as small:
        assert max(small.size) == 2048


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "the file is empty"),
        (b"<html>no photo</html>", "not an image"),
        (b"\xff\xd8\xff\xe0 cut", "cut.jpg"),
    ],
)
def test_what_is_no_photo(desk, tmp_path, data, said):
    before = desk.list.items
    (tmp_path / "cut.jpg").write_bytes(data)
    desk.asks.dropped(tmp_path / "cut.jpg", "cut.jpg")
    assert said in desk.voice.said and "\n" not in desk.voice.said
    assert desk.list.items == before and desk.play.asking.row == 0


def test_a_photo_without_local_features(desk, photos, tmp_path):
    Image.new("RGB", (300, 200), (90, 90, 90)).save(tmp_path / "grey.png")
    desk.asks.dropped(tmp_path / "grey.png", "grey.png")
    desk.look(desk.list.items[0]["key"])
    assert "nothing can be matched" in desk.whys.said.value
    other = Desk(Play(open_source(photos)))
    other.begin()
    before = other.list.items
    other.asks.dropped(tmp_path / "grey.png", "grey.png")  # words alone: there is nothing to describe it by
    assert "could not be described" in other.voice.said and other.list.items == before


def test_an_empty_collection(photos, tmp_path):
    empty = tmp_path / "empty"
    shutil.copytree(photos, empty)
    table = (empty / "photos.csv").read_text().splitlines()[0]
    (empty / "photos.csv").write_text(table + "\n")
    with pytest.raises(ParameterError, match="is an empty collection"):
        open_source(empty)


def test_a_run_of_older_code(ranked, photos, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(photos, old)
    write_json(old / "manifest.json", read_json(old / "manifest.json") | dict(code="00000000"))
    desk = Desk(Play(open_source(old)))
    assert "made by other code" in desk.box.children[0].value
    (old / "carriers.csv").unlink()
    with pytest.raises(ParameterError, match="explored by other code"):
        open_source(old)
    man = read_json(ranked / "manifest.json")
    lacks = tmp_path / "lacks"
    lacks.mkdir()
    del man["config"]["models"]
    write_json(lacks / "manifest.json", man)
    with pytest.raises(ParameterError, match="was made by other code and lacks something"):
        open_source(lacks)


def test_descriptors_that_are_gone(ranked, tmp_path):
    man = read_json(ranked / "manifest.json")
    man["metrics"].pop("made_up")
    man["config"]["descriptors"] = "runs/tiny/seed1/extract/gone-00000000"
    write_json(tmp_path / "run" / "manifest.json", man)
    with pytest.raises(ParameterError, match="which is not there any more"):
        open_source(tmp_path / "run")


def test_a_sentence_in_the_notebook(tmp_path):
    with pytest.raises(play.Sentence) as e:
        play.open_desk(play.Config(of=str(tmp_path / "nowhere")))
    assert e.value._render_traceback_() == [f"there is no folder {tmp_path / 'nowhere'}"]
    assert json.dumps(str(e.value))
