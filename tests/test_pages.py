"Every page has the parts that a page should have: pytest -k 'NAME' tells what one of them lacks."

import json, re, sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (ROOT / 'nbs').glob('*.ipynb'))
STAGES = [p for p in PAGES if p.stem in ('04_generate', '06_finetune', '08_chat', '10_evaluate')]
COURSE = [
    p for p in PAGES if p.stem != 'index' and not p.stem.startswith(('20', '21', '22'))
]  # those are recipes, without exercises
name = lambda p: p.stem
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(ROOT / 'settings.ini', encoding='utf8')
config = config['DEFAULT']


def cells(page, kind=None):
    found = json.loads(page.read_text(encoding='utf8'))['cells']
    return [dict(c, source=''.join(c['source'])) for c in found if kind in (None, c['cell_type'])]


def prose(page):
    return '\n\n'.join(c['source'] for c in cells(page, 'markdown'))


def images(cell):
    return [
        o for o in cell['outputs'] if any(key.startswith('image/') for key in o.get('data', {}))
    ]


def described(cell):
    "Whether a cell's pictures come with words: a `fig-alt` line, or words displayed with them."
    words = [''.join(o['data'].get('text/plain', '')) for o in images(cell)]
    alts = [
        o.get('metadata', {}).get(key, {}).get('alt') for o in images(cell) for key in o['data']
    ]
    return (
        re.search(r'^#\| *fig-alt: *\S', cell['source'], re.M)
        or any(alts)
        or any(w and not w.startswith('<') for w in words)
    )


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_parts(page):
    first, text = cells(page)[0]['source'], prose(page)
    pictured = re.search(r'!\[[^\]]+\]\(', text) or any(images(c) for c in cells(page, 'code'))
    coloured = any(
        'background' in ''.join(o.get('data', {}).get('text/html', ''))
        for c in cells(page, 'code')
        for o in c['outputs']
    )
    has = {
        'a title with a line on what the page gives': re.match(r'# .+\n\n> .+', first),
        'a picture': pictured or coloured,
    }
    if page.stem != 'index':
        has |= {
            f'“{word}”': f'**{word}**' in first
            for word in ('You will learn', 'Time', 'Cost', 'Reads', 'Writes')
        }
        has |= {
            'a recap': '\n## Recap' in text,
            'questions to test oneself': re.search(r'test (yourself|oneself)', text, re.I),
        }
    if page in COURSE:
        exercises = re.findall(r'^(\d)\. ', text.partition('## Exercises')[2], re.M)
        has |= {
            'three exercises': exercises[:3] == ['1', '2', '3'],
            'a way to their answers': f'](solutions/{page.name})' in text,
        }
        has |= {'worked answers': (ROOT / 'nbs' / 'solutions' / page.name).is_file()}
    assert not [part for part, there in has.items() if not there]


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_pictures_are_described(page):
    silent = [
        c['source'].splitlines()[0] for c in cells(page, 'code') if images(c) and not described(c)
    ]
    assert not silent and not re.search(r'!\[\s*\]\(', prose(page))


@pytest.mark.parametrize('page', STAGES, ids=name)
def test_stages_begin_alike(page):
    title, colab, parameters, *_ = cells(page)
    assert 'images/colab.svg' in title['source'] and f'/nbs/{page.name})' in title['source'], (
        'no way to Colab'
    )
    assert (
        "'google.colab' in sys.modules" in colab['source']
        and f"{config['git_url']}@v{config['version']}'" in colab['source']
    )
    assert 'parameters' in parameters['metadata'].get('tags', [])
    exec(colab['source'], {'__name__': 'here'})  # does nothing elsewhere


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_pictures_and_links_are_there(page):
    targets = re.findall(r'\]\(([^)\s]+)\)', prose(page))
    gone = [
        t
        for t in targets
        if '://' not in t
        and not t.startswith('#')
        and not (page.parent / t.partition('#')[0]).exists()
    ]
    assert not gone


def test_index_and_readme_name_every_page():
    index, readme = (
        prose(ROOT / 'nbs' / 'index.ipynb'),
        (ROOT / 'README.md').read_text(encoding='utf8'),
    )
    for page in PAGES:
        assert f'(nbs/{page.name})' in readme
        assert page.stem == 'index' or f'({page.name})' in index


def test_diagrams_are_those_of_their_script():
    sys.path.insert(0, str(ROOT / '.docs'))
    try:
        import drawings
    finally:
        sys.path.pop(0)
    for key, drawing in drawings.DRAWINGS.items():
        assert (ROOT / 'nbs' / 'images' / f'{key}.svg').read_text(
            encoding='utf8'
        ) == drawings.draw(*drawing), key
