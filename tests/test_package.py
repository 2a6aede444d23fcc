"The package as a stranger gets it: built into a wheel, installed elsewhere, imported without the development tools."

import os, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    p.stem for p in (ROOT / 'socratic_finetune').glob('*.py') if not p.stem.startswith('_')
)
LIGHT = ('config', 'pipeline')  # a command imports these two before it knows what it will do
HEAVY = (
    'torch',
    'transformers',
    'trl',
    'peft',
    'datasets',
    'openai',
    'matplotlib',
    'pandas',
    'scipy',
    'papermill',
)
DEVELOPMENT_TOOLS = ('nbdev', 'execnb', 'ghapi', 'jupyterlab', 'pytest')


def python(code, cwd, site=None, **env):
    "Run a piece of Python in a new process."
    env = {**os.environ, **({'PYTHONPATH': str(site)} if site else {}), **env}
    return subprocess.run(
        [sys.executable, '-c', code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
    "The built wheel."
    tmp = tmp_path_factory.mktemp('build')
    skip = shutil.ignore_patterns(
        '.git',
        '.venv',
        'runs',
        '_docs',
        '_proc',
        '_sphinx',
        'build',
        'dist',
        '*.egg-info',
        '__pycache__',
        '.ipynb_checkpoints',
    )
    shutil.copytree(ROOT, tmp / 'clone', ignore=skip)
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'pip',
            'wheel',
            '--quiet',
            '--no-deps',
            '--no-build-isolation',
            '--wheel-dir',
            tmp / 'dist',
            tmp / 'clone',
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return next((tmp / 'dist').glob('*.whl'))


@pytest.fixture(scope='session')
def site(wheel, tmp_path_factory):
    "A folder with the wheel installed; what it depends on is taken from the environment of the tests."
    folder = tmp_path_factory.mktemp('install') / 'site'
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'pip',
            'install',
            '--quiet',
            '--no-deps',
            '--no-index',
            '--target',
            folder,
            wheel,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_installed_wheel_finds_its_data_and_notebooks(site, tmp_path):
    done = python(
        'import socratic_finetune, socratic_finetune.config as c, socratic_finetune.pipeline as p, socratic_finetune.topics as t\n'
        'print(socratic_finetune.__file__)\nprint(c.data_path("topics"))\nprint(*[p.notebook_path(n) for n in p.STAGES.values()], sep="\\n")\n'
        'print(c.runs_dir())\nprint(len(t.load_topics()))',
        tmp_path,
        site,
    )
    assert done.returncode == 0, done.stderr
    *paths, runs, topics = done.stdout.split('\n')[:-1]
    for p in paths:
        assert p.startswith(str(site)), p
    assert Path(runs) == tmp_path / 'runs' and int(topics) >= 160


def test_installed_command_works(site, tmp_path):
    done = python(
        'import sys; sys.argv = ["socratic", "generate", "--n", "5", "--run", "wheel"]; from socratic_finetune.pipeline import main; main()',
        tmp_path,
        site,
    )
    assert done.returncode == 0, done.stderr
    assert (
        len((tmp_path / 'runs' / 'wheel' / 'sft.jsonl').read_text(encoding='utf8').splitlines())
        == 5
    )
    assert (
        'socratic = socratic_finetune.pipeline:main'
        in next(site.glob('*.dist-info/entry_points.txt')).read_text()
    )


def test_wheel_holds_what_a_run_needs_and_nothing_else(wheel):
    from zipfile import ZipFile

    names = ZipFile(wheel).namelist()
    top = {n.split('/')[0] for n in names}
    assert top == {'socratic_finetune', next(t for t in top if t.endswith('.dist-info'))}
    inside = {
        n.split('/')[1] for n in names if n.startswith('socratic_finetune/') and n.count('/') > 1
    }
    assert inside == {'data', 'nbs'}
    assert [n for n in names if n.endswith('.ipynb')] and not [
        n for n in names if n.endswith(('.pkl', '.bin', '.pt'))
    ]


def test_import_is_light(tmp_path):
    done = python(
        f'import sys, time; before = set(sys.modules); t = time.perf_counter(); import socratic_finetune; t = time.perf_counter() - t\n'
        f'print(t); print(len(set(sys.modules) - before))',
        tmp_path,
        ROOT,
    )
    seconds, modules = done.stdout.split()
    assert float(seconds) < 0.1 and int(modules) < 5


@pytest.mark.parametrize('module', MODULES)
def test_module_imports_without_development_tools(module, tmp_path):
    block = f'import sys\nfor name in {DEVELOPMENT_TOOLS!r}: sys.modules[name] = None\n'
    done = python(
        block
        + f'import socratic_finetune.{module}\nprint(*[n for n in {HEAVY!r} if n in sys.modules])',
        tmp_path,
        ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if module in LIGHT:
        assert not done.stdout.split(), (
            f'{module} imports {done.stdout.strip()} when it is imported'
        )


def test_requirements_are_pinned_and_within_settings():
    from configparser import ConfigParser
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT / 'settings.ini', encoding='utf8')
    asked = [
        Requirement(r)
        for key in ('requirements', 'dev_requirements')
        for r in config['DEFAULT'][key].split()
    ]
    lines = [
        x
        for x in (ROOT / 'requirements.txt').read_text(encoding='utf8').splitlines()
        if x.strip() and not x.startswith('#')
    ]
    pins = [Requirement(x) for x in lines]
    for p in pins:
        assert [s.operator for s in p.specifier] == ['=='], f'{p} is not pinned'
    for r in asked:
        mine = [p for p in pins if canonicalize_name(p.name) == canonicalize_name(r.name)]
        assert mine, f'{r.name} has no pin'
        for p in mine:
            assert r.specifier.contains(next(iter(p.specifier)).version), f'{p} is outside {r}'


def test_installed_versions_are_the_tested_ones():
    from importlib.metadata import version
    from packaging.requirements import Requirement

    pins = [
        Requirement(x)
        for x in (ROOT / 'requirements.txt').read_text(encoding='utf8').splitlines()
        if x.strip() and not x.startswith('#')
    ]
    if os.environ.get('DRIFT'):
        pytest.skip('this environment has the newest versions on purpose')
    wrong = [
        f'{p} but {version(p.name)}'
        for p in pins
        if (p.marker is None or p.marker.evaluate()) and not p.specifier.contains(version(p.name))
    ]
    assert not wrong, f'run `make install`: {wrong}'
