"The shape of the house: imports go down only, stages have one parameters cell, notebooks carry no outputs."

import ast
import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from landmark import graph

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts): p
    for p in (ROOT / "landmark").rglob("*.py")
    if p.name not in ("__init__.py", "_modidx.py")
}
STAGES = graph.STAGES | {
    "benchmark": "08_benchmark",
    "explore": "09_explore",
    "play": "10_play",
}  # the last three run outside the graph: on the clock, on people's own photos, and with a mouse


def imports(name):
    "Modules of ours that a module imports."
    out = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names if a.name in MODULES}
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(name.split(".")[: -node.level] + ([base] if base else []))
            out |= {m for m in [base, *(f"{base}.{a.name}" for a in node.names)] if m in MODULES}
    return out


GRAPH = {m: imports(m) for m in MODULES}


def is_part(m):
    return m.startswith("landmark.parts.")


def test_no_cycles():
    done, path = set(), []

    def visit(m):
        assert m not in path, f"imports go in a circle: {' → '.join(path[path.index(m) :] + [m])}"
        if m in done:
            return
        path.append(m)
        [visit(n) for n in sorted(GRAPH[m])]
        path.pop()
        done.add(m)

    for m in GRAPH:
        visit(m)


def test_parts_know_no_stages_and_stages_meet_through_artifacts():
    stages = {f"landmark.{s}" for s in STAGES}
    up = {m: sorted(n for n in GRAPH[m] if not is_part(n)) for m in GRAPH if is_part(m)}
    assert not {m: n for m, n in up.items() if n}, "a part imports something above it"
    side = {m: sorted(GRAPH[m] & stages) for m in stages if GRAPH[m] & stages}
    assert not side, f"a stage imports a stage: {side}"


def test_folders_have_no_circle():
    "What `parts/a` takes from `parts/b`, `parts/b` does not take back, on whatever way round."

    def folder(m):
        return m.split(".")[2] if m.count(".") > 2 else "flat"

    edges = {(folder(m), folder(n)) for m in GRAPH if is_part(m) for n in GRAPH[m]}
    below = {}
    for a, b in edges:
        if a != b:
            below.setdefault(a, set()).add(b)
    left = dict(below)
    while free := [a for a, bs in left.items() if not bs & left.keys()]:
        for a in free:
            del left[a]
    assert not left, f"folders in a circle: {left}"


def test_the_map_names_every_part():
    home = ROOT / "nbs" / "parts"
    text = "\n".join(c.source for c in nbformat.read(home / "index.ipynb", 4).cells)
    listed = re.findall(r"\]\(([\w/]+)\.ipynb\)", text)
    there = {
        p.relative_to(home).with_suffix("").as_posix()
        for p in NOTEBOOKS
        if home in p.parents and p.name != "index.ipynb"
    }
    assert sorted(listed) == sorted(there)


def test_core_imports_nothing_of_ours():
    assert GRAPH["landmark.parts.core"] == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_import_is_used(path):
    "By the module, or by an example of its notebook; one that only registers something says so."
    cells = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    used = {
        n.id
        for c in cells
        for n in ast.walk(ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", c)))
        if isinstance(n, ast.Name)
    }
    lines = [
        (line, a.asname or a.name.partition(".")[0])
        for c in cells
        if c.startswith("#| export")
        for node in ast.walk(ast.parse(c))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for line in [c.splitlines()[node.lineno - 1]]
        for a in node.names
    ]
    assert not [name for line, name in lines if name not in used and "registers" not in line], (
        "imported and not used"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    nb = nbformat.read(path, 4)
    assert not [c for c in nb.cells if c.cell_type == "code" and (c.outputs or c.execution_count)], (
        "a source notebook carries no outputs: jupyter nbconvert --clear-output --inplace"
    )
    assert nb.metadata.kernelspec.name == "python3"
    assert all(c.get("id") for c in nb.cells) and len({c.id for c in nb.cells}) == len(nb.cells)
    assert nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith("# "), (
        "the first cell is the title"
    )


def test_every_numbered_notebook_is_a_stage():
    assert sorted(STAGES.values()) == sorted(p.stem for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_cell_is_the_config(stage):
    "One tagged cell, and the same names, defaults and order as the stage's Config."
    import papermill

    path = ROOT / "nbs" / f"{STAGES[stage]}.ipynb"
    nb = nbformat.read(path, 4)
    assert sum("parameters" in c.metadata.get("tags", []) for c in nb.cells) == 1
    assert not any("nbdev_export" in c.source for c in nb.cells if c.cell_type == "code")
    cell = {k: ast.literal_eval(v["default"]) for k, v in papermill.inspect_notebook(str(path)).items()}
    cfg = importlib.import_module(f"landmark.{stage}").Config()

    def plain(v):
        return list(v) if isinstance(v, tuple) else v

    want = {f.name: plain(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}
    assert list(cell) == list(want)
    assert {k: plain(v) for k, v in cell.items()} == want


def test_every_parameter_has_a_comment():
    for stage in STAGES:
        src = (ROOT / "landmark" / f"{stage}.py").read_text(encoding="utf-8")
        cls = next(n for n in ast.parse(src).body if isinstance(n, ast.ClassDef) and n.name == "Config")
        bare = [
            n.target.id
            for n in cls.body
            if isinstance(n, ast.AnnAssign)
            and "#" not in src.splitlines()[n.end_lineno - 1][n.end_col_offset :]
        ]
        assert not bare, f"{stage}: parameters without a comment: {bare}"


def test_reading_a_module_changes_nothing(tmp_path):
    "Importing everything makes no file and prints no word."
    r = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import importlib; [importlib.import_module(m) for m in {sorted(MODULES)!r}]",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert r.returncode == 0, r.stderr[-2000:]
    assert r.stdout == "" and list(tmp_path.iterdir()) == []


def test_every_profile_is_valid():
    "The graph checks every parameter file against its stage's config."
    for profile in graph.profiles():
        steps = graph.plan(profile)
        assert steps and {s.stage for s in steps} <= set(graph.STAGES)


def exported(nb):
    "The definitions of a notebook's exported cells."
    cells = [c.source for c in nb.cells if c.cell_type == "code" and c.source.startswith("#| export")]
    return [node for source in cells for node in ast.parse(source).body]


def names_of(node):
    "Public names that a statement defines."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        names = [node.name]
    else:
        names = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
    return [n for n in names if not n.startswith("_")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_function_is_longer_than_forty_lines(path):
    "From the first line of its body, docstring included, to the last."
    code = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    trees = [ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", source)) for source in code]
    functions = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    long = {f.name: n for f in functions if (n := f.end_lineno - f.body[0].lineno + 1) > 40}
    assert not long, f"split by meaning: {long}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_public_methods_say_what_they_do(path):
    classes = [n for n in exported(nbformat.read(path, 4)) if isinstance(n, ast.ClassDef)]
    methods = [(c.name, f) for c in classes for f in c.body if isinstance(f, ast.FunctionDef)]
    bare = [f"{c}.{f.name}" for c, f in methods if not f.name.startswith("_") and not ast.get_docstring(f)]
    assert not bare, f"methods without a docstring: {bare}"


# exported names that no cell outside the exports uses, each with its reason
WITHOUT_EXAMPLE = {
    "01_verify.main": "the stage as a command: `run` is its example",
    "02_clean.main": "the stage as a command: `run` is its example",
}


def test_every_exported_name_has_an_example():
    "Code, example, test: a cell that is not exported uses what its notebook exports."
    bare = set()
    for path in NOTEBOOKS:
        nb = nbformat.read(path, 4)
        others = [
            c.source for c in nb.cells if c.cell_type == "code" and not c.source.startswith("#| export")
        ]
        used = set(re.findall(r"\w+", "\n".join(others)))
        names = [n for node in exported(nb) for n in names_of(node) if n not in used]
        name = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        bare |= {f"{name}.{n}" for n in names}
    assert bare <= set(WITHOUT_EXAMPLE), sorted(bare - set(WITHOUT_EXAMPLE))
    assert len(WITHOUT_EXAMPLE) <= 40


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_headings_are_followed_by_prose(path):
    "A heading over code alone says nothing."
    cells = nbformat.read(path, 4).cells
    bare = []
    for c in cells:
        if c.cell_type == "markdown":
            lines = [line for line in c.source.splitlines() if line.strip()]
            if lines and lines[-1].startswith("#"):
                bare.append(lines[-1])
    assert not bare, f"headings without a sentence: {bare}"
