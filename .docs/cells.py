"""Notebook cells as the site shows them: nbdev's directives and Quarto's callouts become MyST."""

import ast
import re

from library import EXPORTS, read_directives
from nbformat.v4 import new_markdown_cell
from pages import tidy
from parameters import definitions, dropdowns

MAX_OPEN_LINES = 60  # an exported cell with a longer function is shown folded
CALLOUT = re.compile(r'^:{3,} *\{\.callout-(\w+)([^}]*)\}\n(.*?)\n:{3,} *$', re.M | re.S)
HEADING = re.compile(r'^#{1,4} +(.+?) *$', re.M)
REMOVES_CELL = {'hide', 'default_exp'}
NO_EFFECT = {'eval', 'exec_doc', 'code-summary', 'fig-alt'}
TAGS = {
    ('echo', 'false'): 'remove-input',
    ('include', 'false'): 'remove-cell',
    ('output', 'false'): 'remove-output',
    ('code-fold', 'true'): 'hide-input',
}
KNOWN = EXPORTS | REMOVES_CELL | NO_EFFECT | {name for name, _ in TAGS}


def callout(found):
    """A Quarto callout as a MyST admonition."""
    kind, attributes, body = found.groups()
    title = re.search(r'title="([^"]*)"', attributes)
    if not title:
        title = re.match(r'\s*#{1,6} +(.+)\n', body)
        body = body[title.end() :] if title else body
    classes = f'{kind} dropdown' if 'collapse="true"' in attributes else kind
    heading = title[1] if title else kind.title()
    return f':::{{admonition}} {heading}\n:class: {classes}\n{body.strip()}\n:::'


def markdown_cell(source, library):
    """A cell of prose with callouts translated and names of the library linked."""
    return new_markdown_cell(library.link_prose(CALLOUT.sub(callout, source)))


def alt_text(cell, written, section):
    """What a screen reader says of the pictures that a cell shows.

    written: the cell's `fig-alt`, which comes first
    section: the heading that the cell stands under, if there is nothing better
    """
    pictures = [
        output
        for output in cell.outputs
        if any(key.startswith('image/') for key in output.get('data', {}))
    ]
    if not pictures:
        return ''
    described = [
        about.get('alt')
        for picture in pictures
        for about in picture.metadata.values()
        if isinstance(about, dict)
    ]
    plain = [''.join(picture.data.get('text/plain', '')) for picture in pictures]
    plain = [text for text in plain if not text.startswith('<')]
    texts = [written, *described, *plain, f'A picture in the section {section}']
    return next(text for text in texts if text)


def fold(cell, summary):
    """Fold the code of a cell under a summary."""
    cell.metadata['tags'] = sorted({*cell.metadata.get('tags', []), 'hide-input'})
    prompts = {'code_prompt_show': summary, 'code_prompt_hide': summary}
    cell.metadata.setdefault('mystnb', {}).update(prompts)


def is_imports_only(code):
    """Whether code does nothing but import."""
    statements = ast.parse(code).body
    return all(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in statements)


def long_functions(code):
    """The functions and methods that do not fit on a screen, by name, with their lengths."""
    functions = [found for found in definitions(ast.parse(code)) if not found.is_class]
    lengths = {found.name: found.node.end_lineno - found.node.lineno + 1 for found in functions}
    return {name: length for name, length in lengths.items() if length > MAX_OPEN_LINES}


def source_line(cell, page, library, git_url):
    """The line above exported code: anchors for links to it, and a link to it in its module."""
    key = page, cell.get('id')
    parts = [f'({label})=' for label in library.anchors.get(key, [])]
    if key in library.sources:
        file, line = library.sources[key]
        parts.append(f'\n[{file}]({git_url}/{file}#L{line}){{.source}}')
    return '\n'.join(parts)


def exported_cells(cell, page, library, git_url, with_tables=True):
    """Exported code between the link to its module and the tables of its parameters."""
    if is_imports_only(cell.source):
        fold(cell, 'Imports')
        return [cell]
    above = source_line(cell, page, library, git_url)
    tables = dropdowns(cell.source, library.link_names) if with_tables else []
    long = long_functions(cell.source)
    if long:
        named = ', '.join(f'{name} ({length} lines)' for name, length in long.items())
        fold(cell, f'Code of {named}')
    texts = [above, '\n\n'.join(tables)]
    before, after = ([new_markdown_cell(text)] if text else [] for text in texts)
    return [*before, cell, *after]


def printed_markdown(cell):
    """What a cell with `output: asis` and `echo: false` printed, as prose."""
    texts = [
        output.get('data', {}).get('text/markdown') or output.get('text', '')
        for output in cell.outputs
    ]
    return [new_markdown_cell(''.join(text)) for text in texts]


def check_directives(found, page, flags):
    """Refuse a directive that the site would pass over in silence.

    flags: nbdev's test flags, which are directives too
    """
    unknown = found.keys() - KNOWN - flags
    if unknown:
        known = ', '.join(sorted(KNOWN | flags))
        raise ValueError(f'{page}: the site does not know #| {unknown.pop()}, only {known}')


class Converter:
    """Turns notebooks, as people edit them, into notebooks that MyST understands."""

    def __init__(self, library, git_url, flags=()):
        """Keep what all pages share.

        library: index of the library
        git_url: address of the repository's files, to which a path is added
        flags: nbdev's test flags
        """
        self.library = library
        self.git_url = git_url
        self.flags = set(flags)

    def convert(self, nb, page):
        """Convert the cells of a notebook in place; `page` is its path below nbs/, no ending."""
        cells = []
        section = ''
        for cell in nb.cells:
            if cell.cell_type == 'markdown':
                headings = HEADING.findall(cell.source)
                section = headings[-1] if headings else section
                cells.append(markdown_cell(cell.source, self.library))
            elif cell.cell_type == 'code':
                cells += self.code_cells(cell, page, section)
        nb.cells = cells

    def code_cells(self, cell, page, section):
        """What a code cell becomes: itself with tags, prose, or nothing."""
        found, cell.source = read_directives(cell.source)
        check_directives(found, page, self.flags)
        if REMOVES_CELL & found.keys() or not (cell.source or cell.outputs):
            return []
        if found.get('output') == 'asis' and found.get('echo') == 'false':
            return printed_markdown(cell)
        self.show(cell, found, section)
        if not EXPORTS & found.keys():
            return [cell]
        with_tables = 'exporti' not in found
        return exported_cells(cell, page, self.library, self.git_url, with_tables)

    def show(self, cell, found, section):
        """Tidy a cell's outputs, describe its pictures and tag it as its directives say."""
        tidy(cell)
        alt = alt_text(cell, found.get('fig-alt'), section)
        if alt:
            cell.metadata.setdefault('mystnb', {})['image'] = {'alt': alt}
        tags = {tag for (key, value), tag in TAGS.items() if found.get(key) == value}
        if tags:
            cell.metadata['tags'] = sorted(tags.union(cell.metadata.get('tags', [])))
        if 'code-summary' in found:
            fold(cell, found['code-summary'])
