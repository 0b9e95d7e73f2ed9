"""Golden numbers: inputs and outputs of the original's algorithms.

`load(name)` reads `tests/golden/<name>.npz`, or the file of that name in the folder that LANDMARK_GOLDEN
names, and remembers which keys were asked for; the last test of `test_golden.py` fails when a file holds a
key that no test reads.
"""

import os
from pathlib import Path

import numpy as np

FOLDER = Path(os.environ.get("LANDMARK_GOLDEN") or Path(__file__).parent / "golden")
_files, read_keys = {}, {}


class Golden:
    "One golden file; `g['key']` reads an array and notes that it was read."

    def __init__(self, name):
        self.name, self._npz = name, np.load(FOLDER / f"{name}.npz", allow_pickle=False)

    def __getitem__(self, key):
        read_keys.setdefault(self.name, set()).add(key)
        x = self._npz[key]
        return x.item() if x.shape == () else x

    def __contains__(self, key):
        return key in self._npz.files

    def keys(self):
        return list(self._npz.files)

    def ragged(self, key, offsets):
        "A ragged list, stored flat beside its offsets."
        x, off = self[key], self[offsets]
        return [x[a:b] for a, b in zip(off[:-1], off[1:])]


def load(name):
    "Open a golden file, once."
    if name not in _files:
        _files[name] = Golden(name)
    return _files[name]


def unread_keys():
    "File → keys that nobody asked for, over all files of the folder."
    unread = {
        p.stem: sorted(set(np.load(p, allow_pickle=False).files) - read_keys.get(p.stem, set()))
        for p in sorted(FOLDER.glob("*.npz"))
    }
    return {name: keys for name, keys in unread.items() if keys}
