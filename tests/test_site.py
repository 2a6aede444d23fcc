"""The site shows exported code with tables of its parameters, and honours directives."""

import inspect
from pathlib import Path

import cells
import library
import parameters
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]

DOCMENTS = """
def scale(
    x: float,  # what to scale
    # two lines
    # above
    factor: 'float' = 2.0,
    *more: int,
    name=None,  # a | b
) -> float:  # the product
    "Scale a number."
    return x * factor
"""
PATCHED = '''
@patch
def read(self: Reader, path: Path, encoding='utf8'):
    """Read a file.

    - `path`: the file, which
      must exist
    - `encoding`: see `scale`
    """
    return path

def _private(x: int): return x

class Reader:
    "Reads."
    def close(self): return None
'''
FIELDS = """
class DataSettings(BaseModel):
    model_config = ConfigDict(frozen=True)
    teacher: str = Field('builtin', description='who writes')
    n_rows: int = Field(..., ge=1, description='how many')
    names: list[str] = field(default_factory=list)   # first names

class Judge(Protocol):
    name: str
"""


def rows(source):
    """The rows of the tables of a cell, without their headings."""
    tables = parameters.dropdowns(source)
    lines = [line for table in tables for line in table.split('\n') if line.startswith('| ')]
    return [line for line in lines if not line.startswith(('| Name', '| ---'))]


def convert(*notebook_cells):
    """The cells that the site makes of a page called `00_page`."""
    nb = new_notebook(cells=list(notebook_cells))
    index = library.Library()
    index.add_page('00_page', nb)
    cells.Converter(index, 'https://example.org', {'slow'}).convert(nb, '00_page')
    return nb.cells


def test_a_comment_describes_a_parameter():
    assert rows(DOCMENTS) == [
        '| `x` | `float` |  | what to scale |',
        '| `factor` | `float` | `2.0` | two lines above |',
        '| `*more` | `int` |  |  |',
        r'| `name` |  | `None` | a \| b |',
        '| *returns* | `float` |  | the product |',
    ]


def test_comments_are_those_of_docments(tmp_path, monkeypatch):
    docments = pytest.importorskip('fastcore.docments').docments
    (tmp_path / 'scaling.py').write_text(DOCMENTS, encoding='utf8')
    monkeypatch.syspath_prepend(tmp_path)
    import scaling

    theirs = {
        key: ' '.join((value or '').split()) for key, value in docments(scaling.scale).items()
    }
    source = inspect.getsource(scaling)
    definition = parameters.definitions(parameters.ast.parse(source))[0]
    ours = parameters.parameters_of(definition, parameters.comments_by_line(source))
    found = {row.name.strip('*').replace('returns', 'return'): row.comment for row in ours}
    assert found == theirs


def test_patched_methods_and_bullets():
    (table,) = parameters.dropdowns(PATCHED)
    assert '<code>Reader.read</code>' in table
    assert '| `path` | `Path` |  | the file, which must exist |' in table
    assert "| `encoding` |  | `'utf8'` | see `scale` |" in table


def test_a_comment_on_the_body_is_of_no_parameter():
    assert rows('def double(x: int): return 2*x   # twice') == ['| `x` | `int` |']


def test_fields_of_a_class():
    assert rows(FIELDS) == [
        "| `teacher` | `str` | `'builtin'` | who writes |",
        '| `n_rows` | `int` |  | how many |',
        '| `names` | `list[str]` | `[]` | first names |',
    ]


def test_exported_code_is_shown_and_linked():
    cell = new_code_cell('#| export\n' + DOCMENTS)
    prose = new_markdown_cell(
        '# `scale`\n\nUse `scale()`, [as `scale` does](x).\n\n```\n`scale`\n```'
    )
    text, anchor, code, table = convert(prose, cell)
    assert 'Use [`scale()`](#00_page.scale), [as `scale` does](x).' in text.source
    assert text.source.startswith('# `scale`\n') and text.source.endswith('\n`scale`\n```')
    assert anchor.source.startswith('(00_page.scale)=')
    assert code.source == DOCMENTS.strip('\n')
    assert table.source.startswith('<details class="parameters">')


def test_directives():
    shown = convert(
        new_code_cell('#| default_exp page'),
        new_code_cell('#| hide\nx = 1'),
        new_code_cell('#| export\nimport re'),
        new_code_cell('#| echo: false\n#| slow\nx'),
        new_code_cell('x = 2\ny = 3  #| hide_line'),
        new_code_cell(
            '#| echo: false\n#| output: asis\nshow()',
            outputs=[new_output('stream', name='stdout', text='*printed*')],
        ),
    )
    assert [cell.source for cell in shown] == ['import re', 'x', 'x = 2', '*printed*']
    assert shown[0].metadata['mystnb']['code_prompt_show'] == 'Imports'
    assert shown[1].metadata['tags'] == ['remove-input']
    with pytest.raises(ValueError, match=r'does not know #\| sideways'):
        convert(new_code_cell('#| sideways\nx'))


def test_a_long_function_is_folded():
    body = '\n'.join(f'    x += {number}' for number in range(80))
    (code, *_) = convert(new_code_cell(f'#| exporti\ndef long(x):\n{body}'))[1:]
    assert code.metadata['mystnb']['code_prompt_show'] == 'Code of long (81 lines)'
