"Rules of the house that a machine can check, over all files that git would ship."

import ast
import json
import re
import subprocess
import sys
from contextlib import suppress

import pytest
import yaml
from shipped import ROOT, shipped_files

FILES = shipped_files()
TEXTS = {}
for _path in FILES:
    with suppress(UnicodeDecodeError):
        TEXTS[_path] = _path.read_text(encoding='utf8')
NOTEBOOKS = [path for path in FILES if path.suffix == '.ipynb']
MODULES = [path for path in FILES if path.parent.name == 'socratic_finetune']


def name(path):
    return str(path.relative_to(ROOT))


def texts_outside_tests(*suffixes):
    chosen = {}
    for path, text in TEXTS.items():
        if path.suffix in suffixes and path.parent.name != 'tests':
            chosen[path] = text
    return chosen


def lines_with(pattern, texts):
    "Places and lines that match."
    found = []
    for path, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(pattern, line):
                found.append(f'{name(path)}:{number}: {line.strip()[:120]}')
    return found


def test_no_registry_host_is_named():
    hosts = [  # in two pieces, so that this file does not name them
        'pypi' + '.org',
        'python' + 'hosted',
        'npm' + 'js.',
        'deb.' + 'debian',
        'download.' + 'pytorch',
        'conda' + '.io',
        'ana' + 'conda.org',
        'un' + 'pkg.com',
    ]
    assert not lines_with('|'.join(map(re.escape, hosts)), TEXTS)


def test_no_secret_is_shipped():
    keys = (
        r'\b(sk-[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}'
        r'|AKIA[0-9A-Z]{16})\b|-----BEGIN [A-Z ]*PRIVATE KEY'
    )
    assert not [name(path) for path in FILES if path.name == '.env']
    assert not lines_with(keys, TEXTS)


def test_no_path_of_somebodys_machine():
    texts = texts_outside_tests('.ipynb', '.py', '.md', '.json', '.yaml', '.jsonl', '.ini', '.txt')
    assert not lines_with(r'(?<![\w.~])/(root|home/\w+|Users/\w+|work)/', texts)


def test_no_unsafe_loading():
    unsafe = r'trust_remote_code\s*=\s*True|\bpickle\.loads?\(|torch\.load\('
    assert not lines_with(unsafe, texts_outside_tests('.py', '.ipynb'))


def test_ruff_finds_nothing():
    ruff = [sys.executable, '-m', 'ruff']
    for command in (['check', '--output-format', 'concise'], ['format', '--check']):
        done = subprocess.run([*ruff, *command, '.'], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=name)
def test_notebook_is_fit_for_reading(notebook):
    nb = json.loads(TEXTS[notebook])
    code = [cell for cell in nb['cells'] if cell['cell_type'] == 'code']
    outputs = [output for cell in code for output in cell['outputs']]
    assert 'widgets' not in nb['metadata'], 'holds widget state'
    data_types = [key for output in outputs for key in output.get('data', {})]
    assert not [key for key in data_types if 'widget-view' in key], 'an output is a widget view'
    assert not [o for o in outputs if o['output_type'] == 'error'], 'an output is an error'
    streams = [''.join(output.get('text', '')) for output in outputs]
    assert not [text for text in streams if 'IPKernelApp' in text], "the kernel's own warnings"
    assert len(TEXTS[notebook]) < 700_000, 'larger than 700 kB'
    first = nb['cells'][0]['cell_type']
    assert first in ('markdown', 'raw'), 'does not begin with its title'
    assert not code or any(cell['outputs'] for cell in code), 'has no outputs'


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=name)
def test_exported_cells_are_short(notebook):
    for number, cell in enumerate(json.loads(TEXTS[notebook])['cells']):
        source = ''.join(cell['source'])
        is_imports = re.match(r'#\| *export\n(?:""".*?"""\n+)?(import|from) ', source, re.S)
        if source.startswith('#| export') and not is_imports:
            assert source.count('\n') <= 40, f'cell {number} has {source.count(chr(10))} lines'


def imported_modules(path):
    "Modules of this package that a module imports, wherever in it."
    imported = set()
    for node in ast.walk(ast.parse(TEXTS[path])):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if node.level == 1:
            imported.add(node.module)
        elif node.module.startswith('socratic_finetune.'):
            imported.add(node.module.removeprefix('socratic_finetune.'))
    return imported


def test_imports_go_one_way():
    layers = yaml.safe_load((ROOT / 'tests' / 'layers.yaml').read_text(encoding='utf8'))
    layer_of = {module: i for i, layer in enumerate(layers) for module in layer}
    modules = {path.stem: path for path in MODULES if not path.stem.startswith('_')}
    assert set(layer_of) == set(modules), 'tests/layers.yaml and the modules differ'
    for module, path in modules.items():
        for other in imported_modules(path):
            assert layer_of[other] < layer_of[module], f'{module} imports {other}'


def test_no_two_pages_share_a_number():
    pages = [path.stem for path in NOTEBOOKS if path.parent.name == 'nbs']
    numbers = [stem.split('_')[0] for stem in pages]
    assert len(set(numbers)) == len(numbers)


def test_held_out_topics_are_in_no_training_row():
    from socratic_finetune.topics import load_topics

    bank = load_topics()
    heldout = {topic.topic for topic in bank.heldout}
    questions = [question for topic in bank.heldout for question in topic.asks]
    data = [p for p in FILES if p.suffix == '.jsonl' and p.is_relative_to(ROOT / 'data')]
    for path in data:
        for number, line in enumerate(TEXTS[path].splitlines(), 1):
            row = json.loads(line)
            if row.get('split', 'train') != 'train':
                continue
            place = f'{name(path)}:{number}'
            assert row.get('topic') not in heldout, f'{place} is about {row["topic"]}'
            leaks = [question for question in questions if question in line]
            assert not leaks, f'{place} asks a held-out question'
    assert len(heldout) >= 20


def test_weights_are_safetensors_and_small():
    large = [path for path in FILES if path.stat().st_size > 25_000_000]
    assert not [f'{name(p)}: {p.stat().st_size // 1_000_000} MB' for p in large]
    unsafe = ('.bin', '.pt', '.pth', '.pkl', '.ckpt')
    assert not [name(path) for path in FILES if path.suffix in unsafe]
