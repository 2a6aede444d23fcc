"Every notebook is a test: executed as nbdev_test does, in a process and a runs folder of its own."

from pathlib import Path

import processes
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
flags = config.tst_flags.split()
ok, _ = test_nb(Path(sys.argv[1]), skip_flags=flags, basepath=config.config_path)
sys.exit(not ok)
"""


def execute(path, folder, timeout=900):
    "Execute a notebook in the folder of the notebooks, with its runs and all else in another."
    (folder / 'runs').mkdir()
    env = processes.environment_without('OPENAI_', SOCRATIC_RUNS=folder / 'runs')
    env |= {**processes.ENVIRONMENT, 'IPYTHONDIR': str(folder / 'ipython')}
    return processes.run(EXECUTE, path, cwd=NBS, env=env, timeout=timeout)


@pytest.mark.parametrize('name', [str(path.relative_to(NBS)) for path in notebooks(NBS)])
def test_notebook(name, tmp_path):
    done = execute(NBS / name, tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def test_there_are_notebooks():
    assert len(notebooks(NBS)) >= 12
