"""Where the names of the library stand: on which page of the site, and in which module."""

import ast
import re
from dataclasses import dataclass, field

from parameters import definitions

EXPORTS = {'export', 'exports', 'exporti'}
DIRECTIVE = re.compile(r'^#\s*\|\s*([\w-]+):?\s*(.*)$')
HIDDEN_LINE = re.compile(r'#\s*\|\s*hide_line\s*$')
MODULE_CELL = re.compile(r'^# %% (\S+)\.ipynb #(\S+)$')  # nbdev writes this above each cell
FENCE = re.compile(r'^ *(```|~~~)')
LINK = re.compile(r'(!?\[[^\]]*\]\([^)]*\))')
NAME = re.compile(r'(?<!`)`([A-Za-z_][\w.]*)(\(\))?`(?!`)')


def read_directives(source):
    """The `#|` lines at the top of a cell as a dict, and the rest of the cell."""
    found = {}
    lines = source.split('\n')
    while lines and (directive := DIRECTIVE.match(lines[0])):
        found[directive[1]] = directive[2].strip().strip('"')
        lines.pop(0)
    code = '\n'.join(line for line in lines if not HIDDEN_LINE.search(line))
    return found, code.strip('\n')


def public_names(code):
    """The functions, classes and methods that code defines for others, in order."""
    names = [found.name for found in definitions(ast.parse(code)) if found.is_public]
    return list(dict.fromkeys(names))


@dataclass
class Library:
    """An index of the library, with which pages are linked to each other and to the modules."""

    labels: dict = field(default_factory=dict)  # name -> label of its place on the site
    anchors: dict = field(default_factory=dict)  # (page, cell id) -> labels that stand there
    sources: dict = field(default_factory=dict)  # (page, cell id) -> (file, line)

    def add_page(self, page, nb):
        """Note what the exported cells of a page define; the first to define a name has it."""
        for cell in nb.cells:
            if cell.cell_type != 'code':
                continue
            directives, code = read_directives(cell.source)
            if EXPORTS & directives.keys() and 'hide' not in directives:
                self._add_cell(page, cell.get('id'), public_names(code))

    def _add_cell(self, page, cell_id, names):
        here = self.anchors.setdefault((page, cell_id), [])
        for name in names:
            if name in self.labels:
                continue
            label = f'{page}.{name}'.lower()
            while label in self.labels.values():  # labels ignore case: `Judge` and `judge`
                label += '-'
            self.labels[name] = label
            here.append(label)

    def add_module(self, path, root, notebooks):
        """Note at which lines of a module the cells of the notebooks stand.

        path: the module
        root: folder of the repository
        notebooks: folder of the notebooks
        """
        lines = path.read_text(encoding='utf8').split('\n')
        for number, line in enumerate(lines, 1):
            marker = MODULE_CELL.match(line)
            if marker:
                page = (path.parent / marker[1]).resolve().relative_to(notebooks.resolve())
                file = path.relative_to(root).as_posix()
                self.sources[page.as_posix(), marker[2]] = (file, number + 1)

    def link_names(self, text):
        """Make links of the names in backticks within a line, except inside other links."""
        parts = LINK.split(text)
        parts[::2] = [NAME.sub(self._link, part) for part in parts[::2]]
        return ''.join(parts)

    def _link(self, found):
        label = self.labels.get(found[1])
        return f'[{found[0]}](#{label})' if label else found[0]

    def link_prose(self, text):
        """Make links of the names in a Markdown text, except in headings and in code."""
        lines = []
        in_fence = False
        for line in text.split('\n'):
            if FENCE.match(line):
                in_fence = not in_fence
            is_prose = not in_fence and not line.startswith(('#', '    '))
            lines.append(self.link_names(line) if is_prose else line)
        return '\n'.join(lines)
