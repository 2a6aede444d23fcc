"Rules of the house that a machine can check: over all files that git would ship."

import ast, json, re, subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IGNORED = {
    '.git',
    '.venv',
    'runs',
    '_docs',
    '_proc',
    '_sphinx',
    'build',
    'dist',
    '__pycache__',
    '.pytest_cache',
    '.ipynb_checkpoints',
    '.env',
}


def shipped():
    "Files that belong to the project: git's list, or all but build output where there is no git."
    found = subprocess.run(
        ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = (
        found.stdout.split('\0')
        if found.returncode == 0 and found.stdout
        else [str(p.relative_to(ROOT)) for p in ROOT.rglob('*')]
    )
    return sorted(
        ROOT / n for n in names if n and (ROOT / n).is_file() and not IGNORED & set(Path(n).parts)
    )


FILES = shipped()
TEXTS = {}
for f in FILES:
    try:
        TEXTS[f] = f.read_text(encoding='utf8')
    except UnicodeDecodeError:
        pass
NOTEBOOKS = [f for f in FILES if f.suffix == '.ipynb']
name = lambda f: str(f.relative_to(ROOT))


def lines_with(pattern, texts):
    return [
        f'{name(f)}:{i}: {line.strip()[:120]}'
        for f, text in texts.items()
        for i, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_no_registry_host_is_named():
    hosts = [
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
    assert not [name(f) for f in FILES if f.name == '.env']
    assert not lines_with(
        r'\b(sk-[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16})\b|-----BEGIN [A-Z ]*PRIVATE KEY',
        TEXTS,
    )


def test_no_path_of_somebodys_machine():
    texts = {
        f: t
        for f, t in TEXTS.items()
        if f.suffix in ('.ipynb', '.py', '.md', '.json', '.yaml', '.jsonl', '.ini', '.txt')
        and f.parent.name != 'tests'
    }
    assert not lines_with(r'(?<![\w.~])/(root|home/\w+|Users/\w+|work)/', texts)


def test_no_unsafe_loading():
    texts = {
        f: t
        for f, t in TEXTS.items()
        if f.suffix in ('.py', '.ipynb') and f.parent.name != 'tests'
    }
    assert not lines_with(r'trust_remote_code\s*=\s*True|\bpickle\.loads?\(|torch\.load\(', texts)


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=name)
def test_notebook_is_fit_for_reading(notebook):
    nb = json.loads(TEXTS[notebook])
    code = [c for c in nb['cells'] if c['cell_type'] == 'code']
    outputs = [o for c in code for o in c['outputs']]
    assert 'widgets' not in nb['metadata'], 'holds widget state'
    assert not any('widget-view' in key for o in outputs for key in o.get('data', {})), (
        'an output is a widget view'
    )
    assert not [o for o in outputs if o['output_type'] == 'error'], 'an output is an error'
    assert not [o for o in outputs if 'IPKernelApp' in ''.join(o.get('text', ''))], (
        "an output is the kernel's chatter"
    )
    assert len(TEXTS[notebook]) < 700_000, 'larger than 700 kB'
    assert nb['cells'][0]['cell_type'] in ('markdown', 'raw'), 'does not begin with its title'
    if code:
        assert any(c['outputs'] for c in code), 'has no outputs'
    long = [line for c in code for line in ''.join(c['source']).splitlines() if len(line) > 210]
    assert not long, f'a line of {len(long[0])} characters: {long[0][:80]}'


def test_modules_depend_one_way():
    number = {}
    for f in NOTEBOOKS:
        source = [
            ''.join(c['source']) for c in json.loads(TEXTS[f])['cells'] if c['cell_type'] == 'code'
        ]
        module = next(
            (m[1] for s in source if (m := re.search(r'^#\| *default_exp (\w+)', s, re.M))), None
        )
        if module:
            number[module] = f.name  # names sort as they are read: 80_client before 03_teacher
    for module, n in number.items():
        code = (ROOT / 'socratic_finetune' / f'{module}.py').read_text(encoding='utf8')
        found = [
            n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom) and n.module
        ]
        imported = [
            n.module.removeprefix('socratic_finetune.')
            for n in found
            if n.level == 1 or n.module.startswith('socratic_finetune.')
        ]
        for other in imported:
            assert number[other] < n, f'{module} ({n}) imports {other} ({number[other]})'


def test_held_out_topics_are_in_no_training_row():
    from socratic_finetune.topics import load_topics

    bank = load_topics()
    held = {t.topic for t in bank.heldout}
    asked = [q for t in bank.heldout for q in t.asks]
    for f in (f for f in FILES if f.suffix == '.jsonl' and f.is_relative_to(ROOT / 'data')):
        for i, line in enumerate(TEXTS[f].splitlines(), 1):
            row = json.loads(line)
            if row.get('split', 'train') != 'train':
                continue
            assert row.get('topic') not in held, f'{name(f)}:{i} is about {row["topic"]}'
            assert not [q for q in asked if q in line], f'{name(f)}:{i} asks a held-out question'
    assert len(held) >= 20


def test_weights_are_safetensors_and_small():
    big = [
        f'{name(f)}: {f.stat().st_size // 1_000_000} MB'
        for f in FILES
        if f.stat().st_size > 25_000_000
    ]
    assert not big
    assert not [name(f) for f in FILES if f.suffix in ('.bin', '.pt', '.pth', '.pkl', '.ckpt')]
