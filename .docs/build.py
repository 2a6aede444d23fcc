"""Builds the site: `python .docs/build.py` turns the notebooks below nbs/ into _docs/.

The notebooks are translated to MyST (cells.py) in _sphinx/pages/, and Sphinx with myst-nb makes
HTML of them in _sphinx/html/; a warning is an error. Nothing is executed: the outputs are those
that were committed, and the tables of parameters are read from the source (parameters.py).
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jupyter_server_mathjax
import nbformat
from cells import Converter
from library import Library
from nbdev.config import get_config
from nbformat.v4 import new_markdown_cell
from pages import notebooks

config = get_config()
ROOT = Path(config.config_path)
NBS = Path(config.nbs_path)
SOURCE = ROOT / '_sphinx' / 'pages'
BUILT = ROOT / '_sphinx' / 'html'
OUT = ROOT / config.doc_path.name
FILE_LINK = re.compile(r'(?<=\])\((\.\./[^)\s#]*)\)')
PARTS = {  # by the first digit of a page's number
    '0': 'The course',
    '1': 'The course',
    '2': 'Make your own tutor',
    '7': 'Under the hood',
    '8': 'Under the hood',
    '9': 'Behind the scenes',
}


def on_github(path, kind='blob'):
    """The address of a file (`blob`) or folder (`tree`) of the repository."""
    return f'{config.git_url}/{kind}/{config.branch}/{path}'.rstrip('/')


def read_notebooks():
    """All notebooks in reading order, by their path below nbs/ without the ending."""
    paths = {path.relative_to(NBS).with_suffix('').as_posix(): path for path in notebooks(NBS)}
    return {page: nbformat.read(path, 4) for page, path in paths.items()}


def index_library(pages):
    """Where the names of the library stand, on the pages and in the modules."""
    library = Library()
    for page, nb in pages.items():
        library.add_page(page, nb)
    for module in sorted(Path(config.lib_path).rglob('*.py')):
        library.add_module(module, ROOT, NBS)
    return library


def link_files(nb, page):
    """Make links to files beside nbs/ lead to the repository, since the site holds pages only."""

    def address(found):
        file = ((NBS / page).parent / found[1]).resolve()
        if not file.exists() or file.is_relative_to(NBS.resolve()):
            return found[0]
        kind = 'tree' if file.is_dir() else 'blob'
        return f'({on_github(file.relative_to(ROOT.resolve()).as_posix(), kind)})'

    for cell in nb.cells:
        if cell.cell_type == 'markdown':
            cell.source = FILE_LINK.sub(address, cell.source)


def toctree(names, *options):
    """A table of contents for the sidebar."""
    return '\n'.join(['```{toctree}', ':hidden:', *options, '', *names, '```'])


def parts_of(pages):
    """The numbered pages of each part of the site, in reading order."""
    parts = {title: [] for title in PARTS.values()}
    for page in pages:
        if page[0].isdigit():
            if page[0] not in PARTS:
                raise ValueError(f'nbs/{page}.ipynb: no part of the site begins with {page[0]}')
            parts[PARTS[page[0]]].append(page)
    return {title: found for title, found in parts.items() if found}


def add_contents(index, pages):
    """Add the table of contents to the index, part by part, worked answers last."""
    for title, found in parts_of(pages).items():
        index.cells.append(new_markdown_cell(toctree(found, f':caption: {title}')))
    answers = [page for page in pages if page.startswith('solutions/')]
    if answers:
        index.cells.append(new_markdown_cell(toctree(['solutions/index'], ':caption: Exercises')))
        write_answers_page(answers)


def write_answers_page(answers):
    """Write the page that stands above the worked answers."""
    links = '\n'.join(f'- [](/{page}.ipynb)' for page in answers)
    about = (
        '> One page for each page of the course: its exercises, answered and run. Try them first.'
    )
    contents = toctree([f'/{page}' for page in answers])
    path = SOURCE / 'solutions' / 'index.md'
    path.parent.mkdir(parents=True, exist_ok=True)
    text = '\n\n'.join(['# Worked answers', about, links, contents])
    path.write_text(text + '\n', encoding='utf8')


def copy_assets():
    """Copy styles and pictures, and MathJax, so that a reader asks no other host for it."""
    mathjax = Path(jupyter_server_mathjax.__file__).parent / 'static'
    shutil.copytree(ROOT / '.docs' / '_static', SOURCE / '_static')
    shutil.copytree(mathjax, SOURCE / '_static' / 'mathjax')
    if (NBS / 'images').is_dir():
        shutil.copytree(NBS / 'images', SOURCE / 'images')


def write_pages():
    """Write the pages that Sphinx reads."""
    pages = read_notebooks()
    flags = (config.tst_flags or '').split()
    converter = Converter(index_library(pages), on_github(''), flags)
    for page, nb in pages.items():
        converter.convert(nb, page)
        link_files(nb, page)
    add_contents(pages['index'], pages)
    for page, nb in pages.items():
        path = SOURCE / f'{page}.ipynb'
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, path)


def run_sphinx():
    """Make HTML of the pages; ends the program if Sphinx warns of anything."""
    options = ['-b', 'html', '-W', '--keep-going', '-E', '-q', '-c', ROOT / '.docs']
    status = subprocess.call([sys.executable, '-m', 'sphinx', *options, SOURCE, BUILT])
    if status:
        sys.exit(status)


def main():
    """Build the site from nothing."""
    shutil.rmtree(SOURCE.parent, ignore_errors=True)
    copy_assets()
    write_pages()
    run_sphinx()
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.copytree(BUILT, OUT, ignore=shutil.ignore_patterns('.doctrees'))
    print(f'the site is in {OUT.relative_to(ROOT)}/index.html')


if __name__ == '__main__':
    main()
