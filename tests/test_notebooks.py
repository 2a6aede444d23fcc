"Every notebook is a test: executed as nbdev_test does, in a process and a runs folder of its own."

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import notebooks

ROOT = Path(__file__).parents[1]
NBS = ROOT / 'nbs'
EXECUTE = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb

config = get_config()
notebook = Path(sys.argv[1]).absolute()
ok, _ = test_nb(notebook, skip_flags=config.tst_flags.split(), basepath=config.config_path)
sys.exit(not ok)
"""


@pytest.mark.parametrize('name', [str(path.relative_to(NBS)) for path in notebooks(NBS)])
def test_notebook(name, tmp_path):
    (tmp_path / 'runs').mkdir()
    env = dict(os.environ)
    env |= dict(SOCRATIC_RUNS=str(tmp_path / 'runs'), IPYTHONDIR=str(tmp_path / 'ipython'))
    env |= dict(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
    env |= dict(MPLBACKEND='agg', CUDA_VISIBLE_DEVICES='')
    for key in ('OPENAI_API_KEY', 'OPENAI_BASE_URL'):
        env.pop(key, None)
    command = [sys.executable, '-c', EXECUTE, str(NBS / name)]
    done = subprocess.run(command, cwd=NBS, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:] or done.stdout[-3000:]


def test_there_are_notebooks():
    assert len(notebooks(NBS)) >= 12
