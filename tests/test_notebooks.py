"Every notebook is a test: executed as nbdev_test does, each in a process and a runs folder of its own."

import os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    str(p.relative_to(ROOT / 'nbs'))
    for p in (ROOT / 'nbs').rglob('*.ipynb')
    if not any(part.startswith(('.', '_')) for part in p.relative_to(ROOT / 'nbs').parts)
)
EXECUTE = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
ok, _ = test_nb(Path(sys.argv[1]).absolute(), skip_flags=get_config().tst_flags.split(), basepath=get_config().config_path)
sys.exit(not ok)
"""


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_notebook(name, tmp_path):
    (tmp_path / 'runs').mkdir()
    env = {
        **os.environ,
        'SOCRATIC_RUNS': str(tmp_path / 'runs'),
        'HF_HUB_OFFLINE': '1',
        'MPLBACKEND': 'agg',
        'TOKENIZERS_PARALLELISM': 'false',
        'CUDA_VISIBLE_DEVICES': '',
        'IPYTHONDIR': str(tmp_path / 'ipython'),
    }
    for key in ('OPENAI_API_KEY', 'OPENAI_BASE_URL'):
        env.pop(key, None)
    done = subprocess.run(
        [sys.executable, '-c', EXECUTE, str(ROOT / 'nbs' / name)],
        cwd=ROOT / 'nbs',
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-6000:] or done.stdout[-3000:]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 12
