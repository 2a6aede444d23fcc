"Replies as models write them: JSON with faults, thoughts, and ends that are missing."

import json

import pytest
from pydantic import BaseModel

from socratic_finetune.replies import (
    escape_latex,
    explain_misfit,
    finish_kind,
    parse_json,
    read_events,
    repair_json,
    strip_thoughts,
    valid_unicode,
)


class Verse(BaseModel):
    line: str
    words: list[str] = []


@pytest.mark.parametrize(
    ('text', 'line'),
    [
        ('{"line": "What is "force"?"}', 'What is "force"?'),
        ("{'line': 'What doesn\\'t it\\'s own?', 'words': ['it']}", "What doesn't it's own?"),
        ("{'line': 'What moves?',} It's easy.", 'What moves?'),
        ('{"schema": 1} {"line": "b", "words": []}', 'b'),
        ('In {braces}: {"line": "b",}', 'b'),
        (r'{"line": "What is $\\frac{1}{2}$?",}', r'What is $\frac{1}{2}$?'),
        ('{"line": "one\ntwo"}', 'one\ntwo'),
        (r'{"line": "What is \theta in \alpha?"}', r'What is \theta in \alpha?'),
        (r'{"line": "It\'s $\frac{1}{2}$",}', r"It's $\frac{1}{2}$"),
        (r'{"line": "a\underline{b}"}', r'a\underline{b}'),
        (r'{"line": "one\nnu, $\nu$"}', 'one\nnu, $\\nu$'),
        ('{"line": "a"} then {"line": "b"}', 'b'),
        ('{"line": "a",} then {"line": "b",}', 'b'),
        ('<think>{"line": "a"}</think>{"line": "b"}', 'b'),
    ],
)
def test_json_with_common_faults(text, line):
    assert parse_json(text, Verse).line == line


def test_valid_json_is_left_as_it_is():
    verse = Verse(line='It\'s "so", is\nit? [1, 2,]', words=['{', '}', r'\theta'])
    assert parse_json(f'x {verse.model_dump_json()} y', Verse) == verse
    assert repair_json(verse.model_dump_json()) == verse.model_dump()


@pytest.mark.parametrize(
    'text',
    [
        '{"line": "What mov',
        '{"line": "What mov}',
        '{"line": "What mov\n```',
        "{'line': 'What mov",
        '{"line": "What is "force"',
        r'{"line": "What is $\\frac{1}',
        '{"line": "a"} then {"line": "What mov',
        '<think>{"line": "a"}',
        '{"line": "a \\u0000 b"}',
        '{"line":',
        '{"line": , "words": []}',
        '{"answer": 1}',
        'I would rather not.',
        '',
    ],
)
def test_json_that_cannot_be_repaired_without_a_guess(text):
    with pytest.raises(ValueError, match='no Verse'):
        parse_json(text, Verse)


@pytest.mark.parametrize('quote', ['"', "'"])
def test_no_half_string_comes_out_of_an_answer_that_was_cut_off(quote):
    verse = Verse(line='Let f = {x} [1]: "so", why?', words=['a, b', r'\frac{1}{2}', 'c'])
    text = verse.model_dump_json()
    if quote == "'":
        text = text.replace('\\"', '“').replace('"', "'")
    whole_strings = {parse_json(text, Verse).line, *verse.words}
    for end in range(len(text)):
        try:
            found = parse_json(text[:end], Verse)
        except ValueError:
            continue
        assert {found.line, *found.words} <= whole_strings, text[:end]


def test_valid_json_is_not_taken_for_latex():
    for text in ('one\ntwo', 'a\tb', 'C:\\new\\table', '\\frac and \\\\ and "so"', 'é\u2028'):
        whole = json.dumps(dict(line=text))
        assert json.loads(escape_latex(whole))['line'] == text


THOUGHTS = [
    ('What moves?', 'What moves?'),
    ('<think>\nHm.\n</think>\n\nWhat moves?', 'What moves?'),
    ('Hm.</think>What moves?', 'What moves?'),
    ('<THINKING>Hm.</THINKING> What moves?', 'What moves?'),
    ('What\n<think>Hm.</think>\nmoves?', 'What\nmoves?'),
    ('<think>Hm.</think>What moves?</think>', 'What moves?'),
    ('<think>Hm.', ''),
    ('The tag <think> begins a thought.', 'The tag <think> begins a thought.'),
    ('Write `</think>` at its end.', 'Write `</think>` at its end.'),
    ('{"reply": "<think>Hm.</think>Why?"}', '{"reply": "<think>Hm.</think>Why?"}'),
    ('<|channel|>analysis<|message|>Hm.', ''),
]


@pytest.mark.parametrize(('text', 'shown'), THOUGHTS)
def test_thoughts(text, shown):
    assert strip_thoughts(text) == shown
    assert strip_thoughts(strip_thoughts(text)) == shown


@pytest.mark.parametrize(('text', 'shown'), [row for row in THOUGHTS if row[0].startswith('<')])
def test_nothing_of_an_opened_thought_is_ever_shown(text, shown):
    for end in range(len(text) + 1):
        assert 'H' not in strip_thoughts(text[:end], finished=False)


def test_why_an_object_does_not_fit():
    assert explain_misfit('{"line": 5}', Verse).startswith('line: Input should be')
    assert explain_misfit('<think>Hm.</think>', Verse) == 'the answer is empty'
    assert explain_misfit('It rains.', Verse) == ''


def test_small_readers():
    assert finish_kind('MAX_TOKENS') == 'length' and finish_kind(None) == ''
    assert valid_unicode('a\ud83d\ude00\udc00') == 'a😀\ufffd'
    assert list(read_events(['event: ping', 'data:', '', 'data: {"a": 1}'])) == [dict(a=1)]
