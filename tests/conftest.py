"Tests run on the tiny world, on one thread, from the project's root."
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault('LANDMARK_WORLD', 'tiny')
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.chdir(ROOT)
for p in (str(ROOT), str(ROOT/'tests')):
    if p not in sys.path: sys.path.insert(0, p)
