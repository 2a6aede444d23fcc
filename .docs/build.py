"""The site: nbs/ -> _proc/ (nbdev) -> _sphinx/pages/ (this file) -> _sphinx/html/ (Sphinx, myst-nb) -> _docs/. A warning is an error.

nbdev strips what readers need not see and fills in show_doc tables; this file translates its Quarto markdown to MyST.
Nothing is executed but export, import and show_doc cells: outputs are those that were committed."""
import ast, re, shutil, subprocess, sys
from pathlib import Path

import jupyter_server_mathjax, nbdev.processors, nbformat, yaml
from docutils.nodes import make_id
from nbdev.config import get_config
from nbdev.serve import proc_nbs
from nbformat.v4 import new_markdown_cell

from pages import tidy

config = get_config()
ROOT = Path(config.config_path)
SOURCE, BUILT, OUT = ROOT/'_sphinx'/'pages', ROOT/'_sphinx'/'html', ROOT/config.doc_path.name
DIRECTIVE = re.compile(r'^#\|\s*([\w-]+):?\s*(.*)$')
CALLOUT = re.compile(r'^:{3,} *\{\.callout-(\w+)([^}]*)\}\n(.*?)\n:{3,} *$', re.M | re.S)
OWN_PAGE = re.compile(rf'\({re.escape(config.doc_host + config.doc_baseurl)}/([\w./-]*)\.html#([^)]+)\)')
FILE = re.compile(r'(?<=\])\((\.\./[^)\s#]*)\)')
SHOWN = re.compile(r'\A\s*---\s*\[source\]\((.*?)\)(?:\{.*?\})?\s*(#+ .*)\n+')   # how show_doc begins: rule, source link, heading
HEADING = re.compile(r'^#{1,4} +(.+?) *$', re.M)
PARTS = {'0': 'The course', '2': 'Make your own tutor', '9': 'Underneath'}   # by the first digit of a page's number
TAGS = {('echo', 'false'): 'remove-input', ('include', 'false'): 'remove-cell', ('output', 'false'): 'remove-output', ('code-fold', 'true'): 'hide-input'}

runs_anyway = nbdev.processors._do_eval


def defines(cell):
    "Whether nbdev should run a cell to fill in show_doc. On its own it would also run demos that happen to hold an import."
    if cell.cell_type != 'code' or not cell.source.strip(): return False
    if cell.directives_.keys() & {'export', 'exports', 'exporti', 'exec_doc'}: return runs_anyway(cell)
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) or 'show_doc(' in ast.unparse(node) for node in cell.parsed_() or [ast.Pass()])


nbdev.processors._do_eval = defines


def callout(found):
    "A Quarto callout as a MyST admonition."
    kind, attributes, body = found[1], found[2], found[3]
    title = re.search(r'title="([^"]*)"', attributes)
    if not title and (title := re.match(r'\s*#{1,6} +(.+)\n', body)): body = body[title.end():]
    folded = ['dropdown'] if 'collapse="true"' in attributes else []
    return f":::{{admonition}} {title[1] if title else kind.title()}\n:class: {' '.join([kind, *folded])}\n{body.strip()}\n:::"


def directives(cell):
    "The `#|` lines at the top of a cell as a dict; the cell loses them."
    found, lines = {}, cell.source.splitlines()
    while lines and (m := DIRECTIVE.match(lines[0])):
        found[m[1]] = m[2].strip().strip('"')
        lines.pop(0)
    cell.source = '\n'.join(lines)
    return found


def alt_text(cell, said, section):
    "What to tell those who cannot see a cell's pictures: its `fig-alt`, or what it displayed with them, or else where they stand."
    outputs = [o for o in cell.outputs if any(key.startswith('image/') for key in o.get('data', {}))]
    if not outputs: return ''
    shown = [o.metadata.get(key, {}).get('alt') for o in outputs for key in o.data if key.startswith('image/')]
    plain = [t for o in outputs if (t := ''.join(o.data.get('text/plain', ''))) and not t.startswith('<')]
    return said or next(filter(None, [*shown, *plain]), f'A picture in the section {section}')


def code_cells(cell, section=''):
    "What a code cell becomes: itself with tags, or the markdown that it printed."
    found = directives(cell)
    if alt := alt_text(cell, found.get('fig-alt'), section): cell.metadata.setdefault('mystnb', {})['image'] = dict(alt=alt)
    if found.get('output') == 'asis' and found.get('echo') == 'false':
        texts = [o.get('data', {}).get('text/markdown') or o.get('text', '') for o in cell.outputs]
        return [new_markdown_cell(SHOWN.sub(r'\2\n\n[source](\1){.source}\n\n', ''.join(t))) for t in texts]
    tidy(cell)
    tags = {tag for (key, value), tag in TAGS.items() if found.get(key) == value} | set(cell.metadata.get('tags', []))
    if tags: cell.metadata['tags'] = sorted(tags)
    if 'code-summary' in found: cell.metadata.setdefault('mystnb', {})['code_prompt_show'] = found['code-summary']
    return [cell]


def below_title(source):
    "What a notebook's first cell says below its title and blockquote: nbdev makes front matter of the cell and drops the rest."
    first = source.cells[0]
    return re.sub(r'\A# .*\n+(?:>.*\n+)?', '', first.source + '\n') if first.cell_type == 'markdown' else ''


def bridge(nb, source):
    "A notebook that nbdev has processed, as one that MyST understands."
    cells, section = [], ''
    for cell in nb.cells:
        if cell.cell_type == 'markdown' and (found := HEADING.findall(cell.source)): section = found[-1]
        if cell.cell_type == 'raw' and cell.source.lstrip().startswith('---'):
            front = yaml.safe_load(cell.source.strip().strip('-')) or {}
            about = f"\n> {front['description']}\n" if front.get('description') else ''
            cells.append(new_markdown_cell(f"# {front.get('title', '')}\n{about}\n{CALLOUT.sub(callout, below_title(source))}"))
        elif cell.cell_type == 'markdown' and not cell.source.startswith('<!-- WARNING'):
            cell.source = CALLOUT.sub(callout, cell.source)
            cells.append(cell)
        elif cell.cell_type == 'code': cells += code_cells(cell, section)
    nb.cells = cells
    return nb


def link_pages(pages):
    "Make nbdev's links to this site's own pages relative; it drops the notebook's number, and the anchor may be on no page."
    anchors = {path: {make_id(h) for c in nb.cells if c.cell_type == 'markdown' for h in HEADING.findall(c.source)} for path, nb in pages.items()}
    by_name = {re.sub(r'^\d+_', '', path.stem): path for path in pages if len(path.parts) == 1}   # a worked answer has its page's name
    def relative(found):
        path = by_name.get(found[1].split('/')[-1])
        if path is None: return found[0]
        return f'(/{path}#{make_id(found[2])})' if make_id(found[2]) in anchors[path] else f'(/{path})'
    for nb in pages.values():
        for c in nb.cells:
            if c.cell_type == 'markdown': c.source = OWN_PAGE.sub(relative, c.source)


def link_files(nb, path):
    "Make links to files beside `nbs/` lead to the repository, since the site holds pages only."
    def there(found):
        file = (config.nbs_path/path.parent/found[1]).resolve()
        if not file.exists() or file.is_relative_to(config.nbs_path.resolve()): return found[0]
        return f"({config.git_url}/{'tree' if file.is_dir() else 'blob'}/{config.branch}/{file.relative_to(ROOT.resolve()).as_posix()})"
    for c in nb.cells:
        if c.cell_type == 'markdown': c.source = FILE.sub(there, c.source)


def toctree(names, *options):
    "A table of contents for the sidebar."
    return '\n'.join(['```{toctree}', ':hidden:', *options, '', *names, '```'])


def contents(pages):
    "The index with the pages in reading order, part by part; the worked answers have a page of their own above them."
    names = [path.with_suffix('').as_posix() for path in pages if path.stem != 'index']
    answers = [name for name in names if '/' in name]
    parts = {part: [n for n in names if n not in answers and n.split('/')[-1] >= first] for first, part in PARTS.items()}
    later = [*list(parts.values())[1:], []]
    nb = nbformat.read(SOURCE/'index.ipynb', 4)
    for (part, found), after in zip(parts.items(), later):
        if found := [n for n in found if n not in after]: nb.cells.append(new_markdown_cell(toctree(found, f':caption: {part}')))
    if answers:
        nb.cells.append(new_markdown_cell(toctree(['solutions/index'], ':caption: Exercises')))
        links = '\n'.join(f'- [](/{name}.ipynb)' for name in answers)
        about = '> One page for each page of the course: its exercises, answered and run. Try them first.'
        page = '\n\n'.join(['# Worked answers', about, links, toctree([f'/{name}' for name in answers])])
        (SOURCE/'solutions'/'index.md').write_text(page + '\n', encoding='utf8')
    nbformat.write(nb, SOURCE/'index.ipynb')


def main():
    processed = proc_nbs(force=True, n_workers=0)   # in this process, where `defines` is in force
    shutil.rmtree(SOURCE.parent, ignore_errors=True)
    shutil.copytree(ROOT/'.docs'/'_static', SOURCE/'_static')
    shutil.copytree(Path(jupyter_server_mathjax.__file__).parent/'static', SOURCE/'_static'/'mathjax')   # so that a reader asks no other host for it
    if (config.nbs_path/'images').is_dir(): shutil.copytree(config.nbs_path/'images', SOURCE/'images')
    pages = {f.relative_to(processed):
             bridge(nbformat.read(f, 4), nbformat.read(config.nbs_path/f.relative_to(processed), 4)) for f in sorted(processed.rglob('*.ipynb'))}
    link_pages(pages)
    for path, nb in pages.items():
        link_files(nb, path)
        (SOURCE/path).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, SOURCE/path)
    contents(pages)
    code = subprocess.call([sys.executable, '-m', 'sphinx', '-b', 'html', '-W', '--keep-going', '-E', '-q', '-c', ROOT/'.docs', SOURCE, BUILT])
    if code: sys.exit(code)
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.copytree(BUILT, OUT, ignore=shutil.ignore_patterns('.doctrees'))
    print(f'the site is in {OUT.relative_to(ROOT)}/index.html')


if __name__ == '__main__': main()
