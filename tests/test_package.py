"The package as a stranger gets it: built into a wheel, installed elsewhere, imported alone."

import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from shipped import ROOT, shipped_files

pytestmark = pytest.mark.xdist_group('package')  # one wheel for all of them
PACKAGE = ROOT / 'socratic_finetune'
MODULES = sorted(path.stem for path in PACKAGE.glob('*.py') if not path.stem.startswith('_'))
LIGHT = ('config', 'pipeline')  # a command imports these two before it knows what it will do
HEAVY = ('torch', 'transformers', 'trl', 'peft', 'datasets', 'openai', 'matplotlib', 'pandas')
HEAVY += ('scipy', 'papermill')
DEVELOPMENT_TOOLS = ('nbdev', 'execnb', 'ghapi', 'jupyterlab', 'pytest')


def run(*command, **options):
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, **options
    )


def python(code, cwd, site=None):
    "Run a piece of Python in a new process."
    env = dict(os.environ)
    if site:
        env['PYTHONPATH'] = str(site)
    return run(sys.executable, '-c', code, cwd=cwd, env=env)


@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
    "The built wheel."
    tmp = tmp_path_factory.mktemp('build')
    for path in shipped_files():
        copy = tmp / 'clone' / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    pip = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation']
    done = run(*pip, '--wheel-dir', tmp / 'dist', tmp / 'clone')
    assert done.returncode == 0, done.stderr[-3000:]
    return next((tmp / 'dist').glob('*.whl'))


@pytest.fixture(scope='session')
def site(wheel, tmp_path_factory):
    "A folder with the wheel installed; its dependencies come from the environment of the tests."
    folder = tmp_path_factory.mktemp('install') / 'site'
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index']
    done = run(*pip, '--target', folder, wheel)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


WHERE = """
import socratic_finetune
from socratic_finetune.config import data_path, runs_dir
from socratic_finetune.pipeline import STAGES, notebook_path
from socratic_finetune.topics import load_topics
print(socratic_finetune.__file__)
print(data_path('topics'))
for name in STAGES.values():
    print(notebook_path(name))
print(runs_dir())
print(len(load_topics()))
"""


def test_installed_wheel_finds_its_data_and_notebooks(site, tmp_path):
    done = python(WHERE, tmp_path, site)
    assert done.returncode == 0, done.stderr
    *paths, runs, n_topics = done.stdout.splitlines()
    for path in paths:
        assert path.startswith(str(site)), path
    assert Path(runs) == tmp_path / 'runs'
    assert int(n_topics) >= 160


COMMAND = """
import sys
from socratic_finetune.pipeline import main
sys.argv = ['socratic', 'generate', '--n', '5', '--run', 'wheel']
main()
"""


def test_installed_command_works(site, tmp_path):
    done = python(COMMAND, tmp_path, site)
    assert done.returncode == 0, done.stderr
    data = (tmp_path / 'runs' / 'wheel' / 'sft.jsonl').read_text(encoding='utf8')
    assert len(data.splitlines()) == 5
    entry_points = next(site.glob('*.dist-info/entry_points.txt')).read_text()
    assert 'socratic = socratic_finetune.pipeline:main' in entry_points


def test_wheel_holds_what_a_run_needs_and_nothing_else(wheel):
    names = ZipFile(wheel).namelist()
    top = {name.split('/')[0] for name in names}
    info = [name for name in top if name.endswith('.dist-info')]
    assert top == {'socratic_finetune', *info}
    parts = [name.split('/') for name in names if name.startswith('socratic_finetune/')]
    assert {part[1] for part in parts if len(part) > 2} == {'data', 'nbs'}
    assert any(name.endswith('.ipynb') for name in names)
    assert not [name for name in names if name.endswith(('.pkl', '.bin', '.pt'))]


IMPORT_TIME = """
import sys, time
before = set(sys.modules)
started = time.perf_counter()
import socratic_finetune
print(time.perf_counter() - started)
print(len(set(sys.modules) - before))
"""


def test_import_is_light(tmp_path):
    seconds, n_modules = python(IMPORT_TIME, tmp_path, ROOT).stdout.split()
    assert float(seconds) < 0.1
    assert int(n_modules) < 5


IMPORT = """
import importlib, sys
for name in {tools!r}:
    sys.modules[name] = None
for module in {modules!r}:
    importlib.import_module(f'socratic_finetune.{{module}}')
print(*[name for name in {heavy!r} if name in sys.modules])
"""


def import_modules(modules, cwd):
    "Import modules without the development tools; returns the heavy libraries they have loaded."
    code = IMPORT.format(tools=DEVELOPMENT_TOOLS, modules=modules, heavy=HEAVY)
    done = python(code, cwd, ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_modules_import_without_development_tools(tmp_path):
    import_modules(MODULES, tmp_path)


@pytest.mark.parametrize('module', LIGHT)
def test_light_modules_import_no_heavy_library(module, tmp_path):
    assert not import_modules([module], tmp_path)


def pinned():
    "The requirements of requirements.txt."
    lines = (ROOT / 'requirements.txt').read_text(encoding='utf8').splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith('#')]


def asked_for():
    "The requirements of settings.ini."
    parser = ConfigParser(delimiters=['='], interpolation=None)
    parser.read(ROOT / 'settings.ini', encoding='utf8')
    texts = []
    for key in ('requirements', 'dev_requirements'):
        texts += parser['DEFAULT'][key].split()
    return [Requirement(text) for text in texts]


def test_requirements_are_pinned_and_within_settings():
    pins = pinned()
    for pin in pins:
        assert [part.operator for part in pin.specifier] == ['=='], f'{pin} is not pinned'
    for requirement in asked_for():
        wanted = canonicalize_name(requirement.name)
        own = [pin for pin in pins if canonicalize_name(pin.name) == wanted]
        assert own, f'{requirement.name} has no pin'
        for pin in own:
            pinned_version = next(iter(pin.specifier)).version
            assert requirement.specifier.contains(pinned_version), (
                f'{pin} is outside {requirement}'
            )


@pytest.mark.skipif('DRIFT' in os.environ, reason='this environment has the newest versions')
def test_installed_versions_are_the_tested_ones():
    wrong = []
    for pin in pinned():
        applies = pin.marker is None or pin.marker.evaluate()
        if applies and not pin.specifier.contains(version(pin.name)):
            wrong.append(f'{pin} but {version(pin.name)}')
    assert not wrong, f'run `make install`: {wrong}'
