"""Tables of the parameters that exported code takes, made from its source.

A parameter is described by fastcore's rules for docments, that is, by the comment on its line or
the comment lines right above it, or else by a bullet of the docstring: "- `name`: what it is".
"""

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from textwrap import shorten

from nbdev.doclinks import patch_name

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FIELD_CALLS = ('Field', 'field')
EMPTY_FACTORIES = {'list': '[]', 'dict': '{}', 'set': 'set()', 'tuple': '()'}
BULLET = re.compile(
    r'^ *- (?P<names>`\*{0,2}\w+`(?:(?:, | and |, and )`\*{0,2}\w+`)*):? +'
    r'(?P<comment>.*?)(?=\n *- |\n *\n|\Z)',
    re.M | re.S,
)
CODE_SPAN = re.compile(r'(`[^`]*`)')
MARKDOWN_CHARACTERS = re.compile(r'([*$<|])')
MAX_DEFAULT = 60  # characters of a default value that the table shows


@dataclass
class Parameter:
    """A row of the table; an empty string stands for what the source does not say."""

    name: str
    type: str = ''
    default: str = ''
    comment: str = ''


@dataclass
class Definition:
    """A function, class or method of a cell; a method is called `Class.method`."""

    name: str
    node: ast.AST

    @property
    def is_public(self):
        """Whether no part of the name begins with an underscore."""
        return not any(part.startswith('_') for part in self.name.split('.'))

    @property
    def is_class(self):
        return isinstance(self.node, ast.ClassDef)

    @property
    def is_bound(self):
        """Whether the first parameter is `self` or `cls`, which a caller does not pass."""
        decorators = [ast.unparse(decorator) for decorator in self.node.decorator_list]
        return '.' in self.name and 'staticmethod' not in decorators


def definitions(tree):
    """The functions, classes and methods of a module or cell, in order.

    A function with fastcore's `@patch` is a method of the class that it is added to.
    """
    found = []
    for node in tree.body:
        if isinstance(node, FUNCTIONS):
            names = patch_name(node)
            names = [names] if isinstance(names, str) else names
            found += [Definition(name, node) for name in names]
        elif isinstance(node, ast.ClassDef):
            found.append(Definition(node.name, node))
            methods = [member for member in node.body if isinstance(member, FUNCTIONS)]
            found += [Definition(f'{node.name}.{method.name}', method) for method in methods]
    return found


def comments_by_line(source):
    """The text of every comment, by the number of its line."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: token.string.lstrip('#').strip()
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def comment_at(line, comments, taken):
    """The comment on a line, or else the comment lines right above it.

    line: number of the line
    comments: what `comments_by_line` returns
    taken: lines of other parameters, whose comments are their own
    """
    if line in comments:
        return comments[line]
    above = []
    line -= 1
    while line in comments and line not in taken:
        above.append(comments[line])
        line -= 1
    return ' '.join(reversed(above))


def bullet_comments(docstring):
    """What the bullets of a docstring say, by the name of the parameter."""
    found = {}
    for bullet in BULLET.finditer(docstring or ''):
        comment = ' '.join(bullet['comment'].split())
        for name in re.findall(r'\w+', bullet['names']):
            found[name] = comment
    return found


def source_of(node):
    """An expression as source text, on one line."""
    return ast.unparse(node) if node else ''


def type_of(node):
    """An annotation as source text; one that is given as a string loses its quotes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return source_of(node)


def arguments_of(function):
    """The arguments of a function as `(name, node, default)`, in the order of its signature."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    without_default = len(positional) - len(arguments.defaults)
    defaults = [None] * without_default + arguments.defaults
    found = [(a.arg, a, d) for a, d in zip(positional, defaults, strict=True)]
    if arguments.vararg:
        found.append((f'*{arguments.vararg.arg}', arguments.vararg, None))
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    found += [(a.arg, a, d) for a, d in keywords]
    if arguments.kwarg:
        found.append((f'**{arguments.kwarg.arg}', arguments.kwarg, None))
    return found


def function_parameters(function, comments, docstring, is_bound=False):
    """The parameters of a function, and what it returns where a comment describes that."""
    arguments = arguments_of(function)
    taken = {node.lineno: node for _, node, _ in arguments}
    bullets = bullet_comments(docstring)
    body_line = function.body[0].lineno
    found = []
    for name, node, default in arguments[1:] if is_bound else arguments:
        has_line_end = taken[node.lineno] is node and node.lineno != body_line
        comment = comment_at(node.lineno, comments, taken) if has_line_end else ''
        comment = comment or bullets.get(node.arg, '')
        found.append(Parameter(name, type_of(node.annotation), source_of(default), comment))
    result = function.returns
    if found and result and result.lineno not in taken and result.lineno in comments:
        found.append(Parameter('returns', type_of(result), '', comments[result.lineno]))
    return found


def field_value(node):
    """The default and the description of a field, from `Field(…)` of pydantic or `field(…)`."""
    is_call = isinstance(node, ast.Call) and ast.unparse(node.func).split('.')[-1] in FIELD_CALLS
    if not is_call:
        return source_of(node), ''
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    description = keywords.get('description')
    comment = description.value if isinstance(description, ast.Constant) else ''
    factory = source_of(keywords.get('default_factory'))
    default = node.args[0] if node.args else keywords.get('default')
    if factory:
        return EMPTY_FACTORIES.get(factory, f'{factory}()'), comment
    return source_of(default).removeprefix('...'), comment


def field_parameters(node, comments, docstring):
    """The annotated fields of a class without a constructor, such as a dataclass."""
    fields = [
        member
        for member in node.body
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name)
    ]
    taken = {field.lineno for field in fields}
    bullets = bullet_comments(docstring)
    found = []
    for field in fields:
        name = field.target.id
        default, description = field_value(field.value)
        comment = description or comment_at(field.lineno, comments, taken)
        comment = comment or bullets.get(name, '')
        found.append(Parameter(name, type_of(field.annotation), default, comment))
    return found


def parameters_of(definition, comments):
    """The parameters of a definition; those of a class are its constructor's, or its fields."""
    node = definition.node
    docstring = ast.get_docstring(node)
    if not definition.is_class:
        return function_parameters(node, comments, docstring, definition.is_bound)
    for member in node.body:
        if isinstance(member, FUNCTIONS) and member.name == '__init__':
            docstring = f'{docstring or ""}\n\n{ast.get_docstring(member) or ""}'
            return function_parameters(member, comments, docstring, is_bound=True)
    is_protocol = any(ast.unparse(base).startswith('Protocol') for base in node.bases)
    return [] if is_protocol else field_parameters(node, comments, docstring)


def escaped(comment):
    """A comment in which only backticks and links keep their meaning as Markdown."""
    parts = CODE_SPAN.split(comment)
    parts[::2] = [MARKDOWN_CHARACTERS.sub(r'\\\1', text) for text in parts[::2]]
    parts[1::2] = [code.replace('|', r'\|') for code in parts[1::2]]
    return ''.join(parts)


def code(text):
    """A text as Markdown code within a table."""
    if not text:
        return ''
    text = text.replace('|', r'\|')
    return f'`` {text} ``' if '`' in text else f'`{text}`'


def table(parameters, link=str):
    """A table as Markdown; columns in which nothing stands are left out.

    parameters: what `parameters_of` returns
    link: makes links of the names of the library in a Markdown text
    """
    columns = {'Name': [code(p.name) if p.name != 'returns' else '*returns*' for p in parameters]}
    columns['Type'] = [link(code(p.type)) for p in parameters]
    columns['Default'] = [
        code(shorten(p.default, MAX_DEFAULT, placeholder=' …')) for p in parameters
    ]
    columns['Description'] = [link(escaped(p.comment)) for p in parameters]
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    rows = [list(shown), ['---'] * len(shown), *zip(*shown.values(), strict=True)]
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def dropdowns(source, link=str):
    """A closed dropdown with a table for all that a cell defines and others may call.

    source: Python code of an exported cell
    link: makes links of the names of the library in a Markdown text
    """
    comments = comments_by_line(source)
    made = []
    for definition in definitions(ast.parse(source)):
        parameters = parameters_of(definition, comments) if definition.is_public else []
        if not any(p.type or p.default or p.comment for p in parameters):
            continue
        summary = f'<summary>Parameters of <code>{definition.name}</code></summary>'
        opening = f'<details class="parameters">{summary}'
        made.append(f'{opening}\n\n{table(parameters, link)}\n\n</details>')
    return made
