"""New processes that are running at once: forked from one that has imported everything.

To import torch and transformers takes longer than most of what a command or a notebook then does.
A fork has the code, the arguments, folder, environment, files and exit code of a process of its
own; that it need not import is all it shares. It sees no GPU: `test_gpu.py` is for those.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

# nothing of `tests`, which older Pythons do not find here
IMPORTED = ['pytest', 'nbdev.test', 'papermill', 'ipykernel']
IMPORTED += [f'socratic_finetune.{name}' for name in ('benchmark', 'pocket', 'evaluate', 'chat')]
IMPORTED += ['socratic_finetune.pipeline', 'socratic_finetune.terminal']
ENVIRONMENT = {
    'CUDA_VISIBLE_DEVICES': '',
    'HF_HUB_OFFLINE': '1',  # read when its library is imported
    'MPLBACKEND': 'agg',
    'TOKENIZERS_PARALLELISM': 'false',
}
STREAMS = ('stdin', 'stdout', 'stderr')


@cache
def server():
    "The process from which others fork, as a context of `multiprocessing`."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in ENVIRONMENT.items():
            environment.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    return context


def environment_without(*prefixes, **changes):
    "The environment of the tests without the variables that begin like this, and with changes."
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes)}
    return {**kept, **{name: str(value) for name, value in changes.items()}}


def execute(code, args, cwd, env, streams):
    "In the fork: what `python -c code args` does."
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, name in enumerate(STREAMS):
        opened = os.open(streams / name, os.O_RDONLY if name == 'stdin' else os.O_WRONLY)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding='utf8')
    sys.stdout = sys.__stdout__ = os.fdopen(1, 'w', encoding='utf8')
    sys.stderr = sys.__stderr__ = os.fdopen(2, 'w', 1, encoding='utf8', errors='backslashreplace')
    sys.argv = ['-c', *args]
    main = sys.modules['__main__'] = ModuleType('__main__')
    exec(compile(code, '<string>', 'exec'), main.__dict__)


class Fork:
    "A running `python -c code args`, as `subprocess.Popen` gives it."

    def __init__(self, code, *args, cwd='.', env=None, stdin=''):
        env = {**(os.environ if env is None else env), 'CUDA_VISIBLE_DEVICES': ''}
        self.args = [code, *map(str, args)]
        self.temporary = tempfile.TemporaryDirectory()
        self.streams = Path(self.temporary.name)
        for name in STREAMS:
            (self.streams / name).write_text(stdin if name == 'stdin' else '', encoding='utf8')
        arguments = (code, self.args[1:], Path(cwd).resolve(), env, self.streams)
        self.process = server().Process(target=execute, args=arguments)
        self.process.start()

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def printed(self, name):
        "What has come on `stdout` or `stderr` so far."
        return (self.streams / name).read_text(encoding='utf8', errors='replace')

    def wait(self, timeout=300):
        "The finished process; one that takes longer than so many seconds is killed."
        self.process.join(timeout)
        if self.process.is_alive():
            self.send_signal(signal.SIGKILL)
            self.process.join()
            out, err = self.printed('stdout'), self.printed('stderr')
            raise subprocess.TimeoutExpired(self.args, timeout, out, err)
        code, out, err = self.process.exitcode, self.printed('stdout'), self.printed('stderr')
        self.temporary.cleanup()
        return subprocess.CompletedProcess(self.args, code, out, err)


def run(code, *args, timeout=300, **options):
    "Run a piece of Python in a fork, to its end."
    return Fork(code, *args, **options).wait(timeout)
