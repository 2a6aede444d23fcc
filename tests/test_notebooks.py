"Every notebook is a test: executed as nbdev_test does, in a process and a runs folder of its own."

import multiprocessing
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as execute_notebook
from pages import notebooks

ROOT = Path(__file__).parents[1]
NBS = ROOT / 'nbs'
ENVIRONMENT = {
    'HF_HUB_OFFLINE': '1',
    'TOKENIZERS_PARALLELISM': 'false',
    'MPLBACKEND': 'agg',
    'CUDA_VISIBLE_DEVICES': '',
}


@pytest.fixture(scope='module')
def server():
    """Forks the process of each notebook from one that has imported what nearly all of them
    import, and done nothing else: importing it takes longer than most notebooks."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in ENVIRONMENT.items():
            environment.setenv(name, value)
        for name in ('OPENAI_API_KEY', 'OPENAI_BASE_URL'):
            environment.delenv(name, raising=False)
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['test_notebooks', 'socratic_finetune.benchmark'])
        yield context


def run_notebook(path, folder):
    "To be called in a process of its own; its exit code is 0 if every cell ran."
    os.environ |= {'SOCRATIC_RUNS': str(folder / 'runs'), 'IPYTHONDIR': str(folder / 'ipython')}
    os.chdir(NBS)
    config = get_config()
    flags = config.tst_flags.split()
    with open(folder / 'output.txt', 'w') as file, redirect_stdout(file), redirect_stderr(file):
        ok, _ = execute_notebook(path, skip_flags=flags, basepath=config.config_path)
    sys.exit(not ok)


@pytest.mark.parametrize('name', [str(path.relative_to(NBS)) for path in notebooks(NBS)])
def test_notebook(name, tmp_path, server):
    (tmp_path / 'runs').mkdir()
    process = server.Process(target=run_notebook, args=(NBS / name, tmp_path))
    process.start()
    process.join(900)
    process.kill()
    assert process.exitcode == 0, (tmp_path / 'output.txt').read_text()[-6000:]


def test_there_are_notebooks():
    assert len(notebooks(NBS)) >= 12
