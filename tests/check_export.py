"Export every notebook into a copy of the tree and compare: exits 1 and names what differs. `make export` mends it."

import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
with tempfile.TemporaryDirectory() as tmp:
    copy = Path(tmp) / "copy"
    shutil.copytree(
        root,
        copy,
        ignore=shutil.ignore_patterns(
            ".git", ".venv", "runs", "reports", "__pycache__", ".snakemake", "*.egg-info", "golden"
        ),
    )
    for p in (copy / "landmark").rglob("*.py"):
        if p.name != "__init__.py":
            p.unlink()
    subprocess.run([str(Path(sys.executable).parent / "nbdev_export")], cwd=copy, check=True)
    ours, theirs = (
        {p.relative_to(t / "landmark") for p in (t / "landmark").rglob("*.py")} for t in (root, copy)
    )
    wrong = sorted(str(p) for p in ours ^ theirs) + sorted(
        str(p)
        for p in ours & theirs
        if not filecmp.cmp(root / "landmark" / p, copy / "landmark" / p, shallow=False)
    )
if wrong:
    print("landmark/ is not what the notebooks export (run `make export`):", *wrong, sep="\n  ")
    sys.exit(1)
print(f"{len(ours)} modules are what the notebooks export")
