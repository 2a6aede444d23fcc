"A fork of a process that has imported everything does what a process of its own would do."

import os
import signal
import subprocess
import sys

import nbformat
import processes
import pytest
from test_notebooks import execute

LOOK = r"""
import os, sys
print(sys.argv, os.getcwd(), sorted(os.environ), sys.stdin.read(), sys.stdin.isatty(), __name__)
print('ö', file=sys.stderr)
os.system('echo a child; echo its error >&2')
sys.exit({})
"""


@pytest.mark.parametrize('end', ['', '0', '3', "'in words'"])
def test_a_fork_is_like_a_process_of_its_own(tmp_path, end):
    code = LOOK.format(end)
    env = {'PATH': os.environ['PATH'], 'LC_ALL': 'C.UTF-8', 'CUDA_VISIBLE_DEVICES': ''}
    options = dict(cwd=tmp_path, env=env)
    new = subprocess.run(
        [sys.executable, '-c', code, 'one', '--two'],
        input='Why?\n',
        capture_output=True,
        text=True,
        **options,
    )
    fork = processes.run(code, 'one', '--two', stdin='Why?\n', **options)
    assert (fork.returncode, fork.stderr) == (new.returncode, new.stderr)
    assert fork.stdout == new.stdout


def test_it_has_imported_everything_and_done_nothing(tmp_path):
    code = (
        'import sys, threading\n'
        'print(threading.active_count())\n'
        "print('torch' in sys.modules, 'nbdev.test' in sys.modules, 'trl' in sys.modules)\n"
        "torch, IPython = sys.modules['torch'], sys.modules['IPython']\n"
        'print(torch.cuda.is_initialized(), IPython.get_ipython())\n'
    )
    done = processes.run(code)
    assert done.stdout.split() == ['1', 'True', 'True', 'True', 'False', 'None'], done.stderr


def test_an_error_a_signal_and_a_process_that_hangs():
    done = processes.run("raise ValueError('so')")
    assert done.returncode == 1 and 'ValueError: so' in done.stderr
    assert processes.run('import os; os.kill(os.getpid(), 15)').returncode == -signal.SIGTERM
    hanging = processes.Fork("print('up', flush=True); import time; time.sleep(600)")
    with pytest.raises(subprocess.TimeoutExpired) as raised:
        hanging.wait(3)
    assert raised.value.stdout == 'up\n' and hanging.process.exitcode == -signal.SIGKILL


def test_a_cell_that_fails_is_shown(tmp_path):
    cells = ["print('before')", '1 / 0', "open('after', 'w')"]
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(made, tmp_path / 'failing.ipynb')
    done = execute(tmp_path / 'failing.ipynb', tmp_path)
    assert done.returncode == 1 and 'ZeroDivisionError' in done.stdout + done.stderr
    assert not (tmp_path / 'after').exists()
