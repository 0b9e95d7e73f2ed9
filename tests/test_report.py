"A report is whole: every stage has a page, pages link to each other, controls share one, long things fold up."

import re
from types import SimpleNamespace

import matplotlib
import nbformat
import pandas as pd
import pytest

matplotlib.use("Agg")
from landmark import report
from landmark.parts.core import write_json, write_text

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="


@pytest.fixture
def steps(tmp_path):
    "Finished steps of three worlds, each with an executed notebook."
    made = {}

    def step(stage, name, *upstream):
        d, nb = (
            tmp_path / "runs" / stage / name,
            tmp_path / "notebooks" / f"{report.STAGES[stage]}-{name}.ipynb",
        )
        nb.parent.mkdir(exist_ok=True)
        cell = nbformat.v4.new_code_cell(
            "show()",
            outputs=[
                nbformat.v4.new_output("display_data", data={"image/png": PNG, "text/plain": "<Figure>"}),
                nbformat.v4.new_output("stream", name="stderr", text="a 10%\x1b[A\rb 100%"),
                nbformat.v4.new_output(
                    "display_data", data={"text/markdown": "| a |\n|---|\n" + "| 1 |\n" * 40}
                ),
            ],
        )
        text = [
            f"# {stage.title()}\n\n> What {stage} does.\n\nSee [the next](03_train.ipynb) and [a part](parts/store.ipynb).",
            "## One",
            "## Two",
            "## Three & more",
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_markdown_cell, text), cell]), nb)
        write_json(
            d / "manifest.json",
            dict(seconds=2, peak_mib=1234, environment=dict(python="3.11", cores=2, gpu="")),
        )
        if stage == "tables":
            write_text(d / "tables.md", "## Grid\n\n| a |\n|---|\n" + "| 1 |\n" * 40)
        made[stage, name] = SimpleNamespace(
            stage=stage, name=name, seed=1, dir=d, notebook=nb, upstream=[made[u] for u in upstream]
        )
        return made[stage, name]

    return [
        step("data", "main"),
        step("data", "no_noise"),
        step("data", "one_aspect"),
        step("train", "v1", ("data", "main")),
        step("train", "v2", ("train", "v1")),
        *(step("train", f"{w}{v}", ("data", w)) for w in ("no_noise", "one_aspect") for v in (1, 2)),
        step("tables", "main", ("train", "v1"), ("train", "no_noise1")),
    ]


def test_pages_index_and_links(steps, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    report.render_pages("mini", (1, 2), steps, out)
    pages = {p.name: p.read_text(encoding="utf-8") for p in out.glob("*.html")}
    assert set(pages) == {
        "index.html",
        "00_data-main.html",
        "00_data-no_noise.html",
        "00_data-one_aspect.html",
        "03_train-v1.html",
        "03_train-v2.html",
        "03_train-no_noise1.html",
        "07_tables-main.html",
    }
    index = pages["index.html"]
    assert all(f'href="{p}"' in index for p in pages if p != "index.html") and all(
        n in index for n in ("no_noise2", "one_aspect1", "What train does.", "12 s", "1,234 MiB")
    )
    for name, text in pages.items():
        for target in re.findall(r'(?:src|href)="([^"#]+)"', text):
            if not target.startswith(("data:", "../../nbs/")):
                assert (out / target).is_file(), (name, target)
        for anchor in re.findall(r'href="#([^"]+)"', text):
            assert f'id="{anchor}"' in text
    one = pages["03_train-v2.html"]
    assert (
        'href="03_train-v1.html">the next' in one
        and "../../nbs/parts/store.ipynb" in one
        and "← 03_train-v1" in one
        and 'href="#three-more"' in one
    )
    assert (
        "a table of 40 rows" in one
        and "<summary>log</summary><pre>b 100%" in one
        and "\x1b" not in one
        and '<img src="figures/03_train-v1-' in index
    )


def test_a_report_of_unfinished_runs_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path))
    with pytest.raises(report.ParameterError, match="have not run with this code"):
        report.report("mini")
    with pytest.raises(report.ParameterError, match="there is no profile"):
        report.report("nothing")


def test_a_search_is_shown_once_all_its_trials_are_there(monkeypatch, tmp_path, capsys):
    from landmark import search

    rows = pd.DataFrame(
        dict(
            trial=["a", "b"],
            epochs=[14, 28],
            model="arcface_v1",
            score=[0.08126, 0.1],
            loss=1.0,
            accuracy=0.9,
            seconds=[10.4, 20.0],
            seeds=1,
        )
    )
    monkeypatch.setattr(search, "trials", lambda profile, name: dict(a={}, b={}))
    monkeypatch.setattr(search, "table", lambda profile, name, seeds: rows.iloc[:1])
    report.write_searches("mini", 1, tmp_path)
    assert not list(tmp_path.iterdir()) and "1 of 2 trials of the search recipe" in capsys.readouterr().err
    monkeypatch.setattr(search, "table", lambda profile, name, seeds: rows)
    report.write_searches("mini", 1, tmp_path)
    made = pd.read_csv(tmp_path / "search-recipe.csv")
    assert (
        list(made) == ["epochs", "model", "mAP@100 Public", "loss", "accuracy", "seconds"]
        and made["mAP@100 Public"].tolist() == [8.13, 10.0]
        and "| 8.13 |" in (tmp_path / "search-recipe.md").read_text()
    )
