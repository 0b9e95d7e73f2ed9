"A report is whole: every stage has a page, pages link to each other, what is long folds up."

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


LONG = "| a |\n|---|\n" + "| 1 |\n" * 40
HEADS = ["loss", "Private", "Public", "RNorth", "RSouth", "ROxford", "RParis", "paper"]
WIDE = "\n".join(
    f"| {' | '.join(row)} |"
    for row in (HEADS, ["---"] * 8, ["softmax", *["12.34 ± 1.23"] * 7], ["arcface", *["–"] * 7])
)


def cells_of(stage):
    "An executed notebook with everything that a page can hold."
    md, code, out = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell, nbformat.v4.new_output
    figure = out("display_data", data={"image/png": PNG, "text/plain": "<Figure>"})
    bars = out("stream", name="stderr", text="a 10%\x1b[A\rb 100%")
    config = "| parameter | value | default |\n|---|---|---|\n| seed | **2** | 1 |\n| lr | 0.1 |  |"
    tables = [out("display_data", data={"text/markdown": t}) for t in (LONG, WIDE)]
    where = out("stream", name="stdout", text=f"wrote {report.project_root()}/runs/{'x' * 200}\n")
    head = f"# {stage.title()}\n\n> What {stage} does."
    formula = r"\bar x = \frac{1}{n} \sum_i x_i + \frac{1}{n} \sum_i y_i + \frac{1}{n} \sum_i z_i"
    long_line = "return 'a long line of code, ' * 10 + 'which has to be broken on a phone'"
    return [
        md(f"{head}\n\nSee [the next](03_train.ipynb) and [a part](parts/store.ipynb)."),
        md(f"## One\n\n$${formula}$$"),
        code(f"#| export\ndef f():\n    {long_line}"),
        md("## Two"),
        code("seed = 2", metadata=dict(tags=["parameters"])),
        code("cfg = read_parameters()", outputs=[out("execute_result", data={"text/markdown": config})]),
        code("#| label: sheet\nshow()", outputs=[figure, figure, bars, *tables, where]),
        md("## Three & more"),
    ]


@pytest.fixture
def steps(tmp_path):
    "Finished steps of three worlds, each with an executed notebook."
    made = {}

    def step(stage, name, *upstream):
        d = tmp_path / "runs" / stage / name
        nb = tmp_path / "notebooks" / f"{report.STAGES[stage]}-{name}.ipynb"
        nb.parent.mkdir(exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=cells_of(stage)), nb)
        environment = dict(python="3.11", cores=2, gpu="")
        write_json(d / "manifest.json", dict(seconds=2, peak_mib=1234, environment=environment))
        if stage == "tables":
            write_text(d / "tables.md", f"## Grid\n\n{LONG}\n\n## Wide\n\n{WIDE}")
        ups = [made[u] for u in upstream]
        made[stage, name] = SimpleNamespace(stage=stage, name=name, seed=1, dir=d, notebook=nb, upstream=ups)
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
    one, other = pages["03_train-v1.html"], pages["03_train-v2.html"]
    assert 'href="03_train-v1.html">the next' in one and "../../nbs/parts/store.ipynb" in one
    assert "← 03_train-no_noise1" not in one and "→ 03_train-v2" in one and 'href="#three-more"' in one
    assert "a table of 40 rows" in one and "<summary>log</summary><pre>b 100%" in one and "\x1b" not in one
    assert one.count('src="figures/03_train-v1-sheet.png"') == 1, "the same figure is shown once"
    assert '<img src="figures/03_train-v1-sheet.png"' in index
    assert "How it works" in one and "How it works" not in other and "03_train-v1.html#how-it-works" in other
    assert (
        one.index("Three &amp; more")
        < one.index("1 of 2 parameters changed: seed = 2")
        < one.index("How it works</h2>")
    )


def test_pages_name_no_folder_of_the_machine(steps, tmp_path):
    report.render_pages("mini", (1,), steps, tmp_path / "out")
    for page in (tmp_path / "out").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "wrote runs/xxx" in text or page.stem == "index"
        assert not any(str(p) in text for p in (report.project_root(), tmp_path))


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
