"""What can be checked without running a notebook: exits 1 and says what differs.

The package mirrors the notebooks, the layout is ruff's, no notebook carries outputs, README.md and RESULTS.md
are what the notebooks and reports make them. `python tests/check.py --fix` mends what it can; `make check`,
CI and pre-commit call this file.
"""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PACKAGE = ("nbs", "landmark", "settings.ini", "pyproject.toml", "setup.py")  # what an export reads and writes


def run(*command, cwd=ROOT):
    "A program of this environment, here: its exit status and what it said."
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]], cwd=cwd, capture_output=True, text=True, env=env
    )
    return done.returncode, (done.stdout + done.stderr).strip()


def modules(folder):
    "The package's modules, by their paths in it."
    return {p.relative_to(folder / "landmark") for p in (folder / "landmark").rglob("*.py")}


def export(fix):
    "landmark/ is what the notebooks export."
    if fix:
        run("nbdev_export")
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "copy"
        copy.mkdir()
        for name in PACKAGE:
            source = ROOT / name
            put = shutil.copytree if source.is_dir() else shutil.copyfile
            put(source, copy / name)
        for p in (copy / "landmark").rglob("*.py"):
            if p.name != "__init__.py":
                p.unlink()
        status, said = run("nbdev_export", cwd=copy)
        if status:
            return [said]
        ours, theirs = modules(ROOT), modules(copy)
        paths = sorted(ours | theirs)
        pairs = [(p, ROOT / "landmark" / p, copy / "landmark" / p) for p in paths]
        return [
            f"landmark/{p} is not what the notebooks export (make export)"
            for p, a, b in pairs
            if not (a.exists() and b.exists() and filecmp.cmp(a, b, shallow=False))
        ]


def layout(fix):
    "Notebooks and tests are laid out by ruff, and ruff finds nothing."
    status, said = run("ruff", "format", "--quiet", *([] if fix else ["--check"]), ".")
    found = [f"ruff format (make fix): {said}"] if status else []
    status, said = run(
        "ruff", "check", "--quiet", "--output-format", "concise", *(["--fix"] if fix else []), "."
    )
    found += said.splitlines() if status else []
    # an exported function may lean on what only its notebook imports: in the module the name is missing
    names = ("--isolated", "--select", "F821", "--target-version", "py311", "--output-format", "concise")
    status, said = run("ruff", "check", "--quiet", *names, "landmark")
    return found + (said.splitlines() if status else [])


def outputs(fix):
    "Source notebooks carry no outputs."
    found = []
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        if any(c.get("outputs") or c.get("execution_count") for c in cells):
            if fix:
                run("jupyter", "nbconvert", "--clear-output", "--inplace", str(path))
            else:
                found.append(f"{path.relative_to(ROOT)} carries outputs (make fix)")
    return found


def documents(fix):
    "README.md and RESULTS.md are what nbs/ and reports/ make them."
    before = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "RESULTS.md")}
    status, said = run("landmark_report", "readme")
    if status:
        return [said]
    changed = [n for n, text in before.items() if (ROOT / n).read_text(encoding="utf-8") != text]
    if not fix:
        for name in changed:
            (ROOT / name).write_text(before[name], encoding="utf-8")
    return [] if fix else [f"{name} is not what nbs/ and reports/ make it (make readme)" for name in changed]


def main():
    "All checks; the number of findings decides the exit status."
    fix = "--fix" in sys.argv[1:]
    found = [line for check in (outputs, layout, export, documents) for line in check(fix)]
    print(
        "\n".join(found)
        if found
        else f"in step: {len(modules(ROOT))} modules, notebooks, tests, README, RESULTS"
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
