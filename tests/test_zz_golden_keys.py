"Every number in the golden files is read by a test: nothing is stored for show."
from pathlib import Path

import pytest

import golden_data


def test_every_golden_key_is_read(request):
    here = Path(__file__).parent
    wanted, ran = {p.name for p in here.glob('test_golden_*.py')}, {Path(i.fspath).name for i in request.session.items}
    if not wanted <= ran or request.config.getoption('keyword') or any('::' in a for a in request.config.args):
        pytest.skip('needs the whole of tests/test_golden_*.py in the same run')
    unread = {}
    for path in sorted(golden_data.FOLDER.glob('*.npz')):
        keys = set(golden_data.load(path.stem).keys()) - golden_data.read_keys.get(path.stem, set())
        if keys: unread[path.stem] = sorted(keys)
    assert not unread, f'read by no test: {unread}'
