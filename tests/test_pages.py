"Every page has the parts that a page should have: `pytest -k NAME` tells what one of them lacks."

import json
import re
from configparser import ConfigParser
from pathlib import Path

import drawings
import pytest

ROOT = Path(__file__).parents[1]

PAGES = sorted((ROOT / 'nbs').glob('*.ipynb'))
STAGES = [
    p
    for p in PAGES
    if p.stem in ('04_generate', '06_finetune', '08_chat', '10_evaluate', '11_dialogue')
]
WITHOUT_EXERCISES = ('index', '20_another_subject', '21_another_style', '22_another_base_model')
WITH_EXERCISES = [path for path in PAGES if path.stem not in WITHOUT_EXERCISES]
BOX = ('You will learn', 'Time', 'Cost', 'Reads', 'Writes')

_parser = ConfigParser(delimiters=['='], interpolation=None)
_parser.read(ROOT / 'settings.ini', encoding='utf8')
CONFIG = _parser['DEFAULT']


def stem(path):
    return path.stem


def cells(page, kind=None):
    "Cells with their source as one text."
    found = json.loads(page.read_text(encoding='utf8'))['cells']
    chosen = [cell for cell in found if kind in (None, cell['cell_type'])]
    return [dict(cell, source=''.join(cell['source'])) for cell in chosen]


def prose(page):
    return '\n\n'.join(cell['source'] for cell in cells(page, 'markdown'))


def images(cell):
    "Outputs that are pictures."
    found = []
    for output in cell['outputs']:
        if any(key.startswith('image/') for key in output.get('data', {})):
            found.append(output)
    return found


def is_described(cell):
    "Whether a cell's pictures come with words: a `fig-alt` line, or text displayed with them."
    if re.search(r'^#\| *fig-alt: *\S', cell['source'], re.M):
        return True
    for output in images(cell):
        text = ''.join(output['data'].get('text/plain', ''))
        metadata = output.get('metadata', {})
        alts = [metadata.get(key, {}).get('alt') for key in output['data']]
        if any(alts) or (text and not text.startswith('<')):
            return True
    return False


def has_picture(page):
    "Whether a page shows a picture, a plot, or text in colour."
    if re.search(r'!\[[^\]]+\]\(', prose(page)):
        return True
    for cell in cells(page, 'code'):
        if images(cell):
            return True
        for output in cell['outputs']:
            if 'background' in ''.join(output.get('data', {}).get('text/html', '')):
                return True
    return False


@pytest.mark.parametrize('page', PAGES, ids=stem)
def test_page_has_its_parts(page):
    first = cells(page)[0]['source']
    assert re.match(r'# .+\n\n> .+', first), 'a title with a line on what the page gives'
    assert has_picture(page), 'a picture'
    if page.stem != 'index':
        assert not [part for part in BOX if f'**{part}**' not in first]
        assert '\n## Recap' in prose(page)
        assert re.search(r'test (yourself|oneself)', prose(page), re.I)


@pytest.mark.parametrize('page', WITH_EXERCISES, ids=stem)
def test_page_has_exercises_with_answers(page):
    exercises = prose(page).partition('## Exercises')[2]
    assert re.findall(r'^(\d)\. ', exercises, re.M)[:3] == ['1', '2', '3']
    assert f'](solutions/{page.name})' in exercises
    assert (ROOT / 'nbs' / 'solutions' / page.name).is_file()


@pytest.mark.parametrize('page', PAGES, ids=stem)
def test_pictures_are_described(page):
    for cell in cells(page, 'code'):
        assert not images(cell) or is_described(cell), cell['source'].splitlines()[0]
    assert not re.search(r'!\[\s*\]\(', prose(page))


@pytest.mark.parametrize('page', STAGES, ids=stem)
def test_stages_begin_alike(page):
    title, colab, parameters, *_ = cells(page)
    assert 'images/colab.svg' in title['source']
    assert f'/nbs/{page.name})' in title['source'], 'no way to Colab'
    assert "'google.colab' in sys.modules" in colab['source']
    assert f"{CONFIG['git_url']}@v{CONFIG['version']}'" in colab['source']
    assert 'parameters' in parameters['metadata'].get('tags', [])
    exec(colab['source'], {'__name__': 'here'})  # does nothing elsewhere


@pytest.mark.parametrize('page', PAGES, ids=stem)
def test_pictures_and_links_are_there(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', prose(page)):
        if '://' not in target and not target.startswith('#'):
            assert (page.parent / target.partition('#')[0]).exists(), target


def test_index_and_readme_name_every_page():
    index = prose(ROOT / 'nbs' / 'index.ipynb')
    readme = (ROOT / 'README.md').read_text(encoding='utf8')
    for page in PAGES:
        assert f'(nbs/{page.name})' in readme
        assert page.stem == 'index' or f'({page.name})' in index


@pytest.mark.parametrize('name', drawings.DRAWINGS)
def test_diagram_is_that_of_its_script(name):
    svg = (ROOT / 'nbs' / 'images' / f'{name}.svg').read_text(encoding='utf8')
    assert svg == drawings.draw(*drawings.DRAWINGS[name])
