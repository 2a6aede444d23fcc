"""Files as people really have them: a row a case, with the data and the words that must come out.

The cases follow reports of people who train models: exports of spreadsheets and of other trainers,
marks that say "do not learn this", chat templates with a will of their own. Below them, 500 files
with a seeded fault: every outcome is rows, a named row set aside, or one sentence.
"""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import random
from dataclasses import dataclass
from functools import cache

import pandas as pd
import pytest
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from socratic_finetune.client import get_price
from socratic_finetune.config import (
    SocraticError,
    data_path,
    numbered_jsonl,
    read_text,
    settings_for,
)
from socratic_finetune.constitution import load_constitution
from socratic_finetune.finetune import describe_encoding, encode_rows, split_rows
from socratic_finetune.generate import dataset_report
from socratic_finetune.pipeline import app
from socratic_finetune.prompting import encode, prompt_ids, render, set_chat_format
from socratic_finetune.rows import open_rows, prompt_completion, read_rows, row_messages
from socratic_finetune.topics import TopicBank, load_topics


def chat(*texts, system=None):
    "Messages of a user and an assistant in turn."
    messages = [dict(role='system', content=system)] if system else []
    for i, text in enumerate(texts):
        messages.append(dict(role='assistant' if i % 2 else 'user', content=text))
    return messages


def masked(messages, *positions):
    "Messages of which some are not to be learned."
    return [dict(m, weight=0) if i in positions else m for i, m in enumerate(messages)]


def sharegpt(*texts, **marks):
    "ShareGPT's turns; `marks` belong to the second one."
    names = ('human', 'gpt')
    turns = [{'from': names[i % 2], 'value': text} for i, text in enumerate(texts)]
    turns[1] |= marks
    return turns


def jsonl(*rows, ensure_ascii=False):
    return '\n'.join(json.dumps(row, ensure_ascii=ensure_ascii) for row in rows)


@dataclass
class Case:
    "A file, the conversations that it must give, and words that must be said of it."

    name: str
    content: str | bytes | list  # a list of rows stands for JSON lines
    rows: list  # the expected conversations
    says: tuple = ()  # in the description of the file, or in the error
    file: str = 'rows.jsonl'


ONE = dict(user='Why?', assistant='What moves?')
MESSAGES = chat('Why?', 'What moves?')
TWO = chat('Why?', 'Because.', 'Why?', 'What moves?')
BOTH = [dict(messages=chat('a', 'b')), dict(messages=chat('c', 'd'))]

# --- marks and columns: what a row says of itself -----------------------------------------------

ROWS = [
    Case(
        'a system column beside messages',
        [dict(messages=MESSAGES, system='Ask.')],
        [chat('Why?', 'What moves?', system='Ask.')],
        ('used           messages 1, system 1', 'ignored        none', 'user 1, assistant 1'),
    ),
    Case(
        'a system column beside conversations',
        [dict(conversations=sharegpt('Why?', 'What moves?'), system='Ask.')],
        [chat('Why?', 'What moves?', system='Ask.')],
        ('conversations 1', 'system 1'),
    ),
    Case(
        'a system column that repeats the system message',
        [dict(messages=chat('Why?', 'What?', system='Ask.'), system='Ask. ')],
        [chat('Why?', 'What?', system='Ask.')],
        ('1, 0 set aside',),
    ),
    Case(
        'a system column that contradicts the system message',
        [dict(messages=chat('Why?', 'What?', system='Ask.'), system='Tell.'), ONE],
        [MESSAGES],
        ('line 1: different system prompts, in `system` and the system message: keep one',),
    ),
    Case(
        'two system columns that differ',
        [dict(ONE, system='Ask.', system_prompt='Tell.')],
        [],
        ('different system prompts, in `system` and `system_prompt`',),
    ),
    Case(
        'an empty system column is none',
        [dict(ONE, system=''), dict(ONE, system=None)],
        [MESSAGES, MESSAGES],
        ('2, 0 set aside',),
    ),
    Case(
        'weight 0 of OpenAI and Mistral',
        [dict(messages=masked(TWO, 1))],
        [masked(TWO, 1)],
        ('1 of 2 replies are learned',),
    ),
    Case(
        'train false of ShareGPT',
        [dict(conversations=sharegpt('Why?', 'Because.', 'Why?', 'What moves?', train=False))],
        [masked(TWO, 1)],
        ('1 of 2 replies are learned',),
    ),
    Case(
        'training false of axolotl',
        [dict(conversations=sharegpt('Why?', 'Because.', 'Why?', 'What moves?', training=False))],
        [masked(TWO, 1)],
        ('1 of 2 replies are learned',),
    ),
    Case(
        'loss false of ms-swift',
        [dict(messages=[TWO[0], dict(TWO[1], loss=False), *TWO[2:]])],
        [masked(TWO, 1)],
        ('1 of 2 replies are learned',),
    ),
    Case(
        'weights 0.0, 1.0 and null of SlimOrca',
        [
            dict(
                conversations=[
                    {'from': 'human', 'value': 'Why?', 'weight': 0.0},
                    {'from': 'gpt', 'value': 'What moves?', 'weight': 1.0},
                    {'from': 'human', 'value': 'You?', 'weight': None},
                    {'from': 'gpt', 'value': 'Who?', 'weight': None},
                ]
            )
        ],
        [chat('Why?', 'What moves?', 'You?', 'Who?')],
        ('2 of 2 replies are learned',),
    ),
    Case(
        'half a weight',
        [dict(messages=[MESSAGES[0], dict(MESSAGES[1], weight=0.5)])],
        [],
        ('`weight` is 0.5: only 0, 1, false and true are known',),
    ),
    Case(
        'nothing but weight 0',
        [dict(messages=masked(MESSAGES, 1))],
        [],
        ('all replies have weight 0: there is nothing to learn',),
    ),
    Case(
        'Alpaca, with and without input',
        [
            dict(instruction='Translate.', input='the sea', output='la mer'),
            dict(instruction='Greet.', input='', output='Hello!'),
        ],
        [chat('Translate.\n\nthe sea', 'la mer'), chat('Greet.', 'Hello!')],
        ('instruction + output 2', 'input 1'),
    ),
    Case(
        'Alpaca with history and system, as LLaMA-Factory has it',
        [
            dict(
                instruction='And now?',
                output='What moves?',
                system='Ask.',
                history=[['Why?', 'What?']],
            )
        ],
        [chat('Why?', 'What?', 'And now?', 'What moves?', system='Ask.')],
        ('history 1', 'ignored        none'),
    ),
    Case(
        'Alpaca with an empty output',
        [dict(instruction='Greet.', input='', output=''), ONE],
        [MESSAGES],
        ('`input` and `output` is empty',),
    ),
    Case('prompt and response', [dict(prompt='a', response='b')], [chat('a', 'b')]),
    Case('question and answer', [dict(question='a', answer='b')], [chat('a', 'b')]),
    Case('query and response', [dict(query='a', response='b')], [chat('a', 'b')]),
    Case('input and output', [dict(input='a', output='b')], [chat('a', 'b')]),
    Case(
        'Dolly, whose context belongs to the question',
        [dict(instruction='Who?', context='Ada wrote.', response='Ada?', category='qa')],
        [chat('Who?\n\nAda wrote.', 'Ada?')],
        ('instruction + response 1', 'ignored        category 1'),
    ),
    Case(
        'OpenOrca',
        [dict(id='x.1', system_prompt='Ask.', question='a', response='b')],
        [chat('a', 'b', system='Ask.')],
        ('question + response 1', 'ignored        none'),
    ),
    Case(
        'TRL, prompt and completion as lists, with a system column',
        [dict(prompt=MESSAGES[:1], completion=MESSAGES[1:], system='Ask.')],
        [chat('Why?', 'What moves?', system='Ask.')],
    ),
    Case(
        'a question that looks like a list stays a text',
        [dict(question='[1, 2, 3]', answer='{"sum": 6}')],
        [chat('[1, 2, 3]', '{"sum": 6}')],
    ),
    Case(
        'two answers',
        [dict(question='a', answer='b', response='c')],
        [],
        ('more than one answer, in `response` and `answer`: keep one column',),
    ),
    Case(
        'two questions',
        [dict(prompt='a', question='b', response='c')],
        [],
        ('more than one question, in `prompt` and `question`: keep one column',),
    ),
    Case(
        'content as a list of parts',
        [
            dict(
                messages=[dict(role='user', content=[dict(type='text', text='Why?')]), MESSAGES[1]]
            )
        ],
        [MESSAGES],
    ),
    Case(
        'a part that is an image',
        [dict(messages=[dict(role='user', content=[dict(type='image_url')]), MESSAGES[1]])],
        [],
        ("a part of type 'image_url', which is no text",),
    ),
    Case(
        'a part that is a thought',
        [dict(messages=[MESSAGES[0], dict(role='assistant', content=[dict(type='thinking')])])],
        [],
        ("a part of type 'thinking'",),
    ),
    Case('an images column', [dict(ONE, images=['sea.png'])], [], ('`images` holds what is no',)),
    Case(
        'an answer of a tool',
        [dict(messages=[MESSAGES[0], dict(role='tool', content='42'), MESSAGES[1]])],
        [],
        ("a message of role 'tool': calls of tools are not learned here",),
    ),
    Case(
        'a call of a tool, with content null',
        [dict(messages=[MESSAGES[0], dict(role='assistant', content=None, tool_calls=[{}])])],
        [],
        ('a message with `tool_calls`',),
    ),
    Case(
        "LLaMA-Factory's function_call and observation",
        [dict(conversations=[*sharegpt('a', 'b'), {'from': 'function_call', 'value': '{}'}])],
        [],
        ("a message of role 'function_call'",),
    ),
    Case(
        'tools that nobody calls are named as ignored',
        [dict(messages=MESSAGES, tools=[dict(type='function')])],
        [MESSAGES],
        ('ignored        tools 1',),
    ),
    Case(
        'thoughts beside a reply are named as ignored',
        [dict(messages=[MESSAGES[0], dict(MESSAGES[1], reasoning_content='Hm.')])],
        [MESSAGES],
        ('reasoning_content of a message 1',),
    ),
    Case(
        'roles by other names',
        [
            dict(
                messages=[
                    dict(role='developer', content='Ask.'),
                    {'from': 'Human', 'value': 'Why?'},
                    dict(role='model', content='What moves?'),
                ]
            )
        ],
        [chat('Why?', 'What moves?', system='Ask.')],
    ),
    Case(
        'conversations in the words of messages',
        [dict(conversations=MESSAGES), dict(messages=sharegpt('Why?', 'What moves?'))],
        [MESSAGES, MESSAGES],
        ('conversations 1, messages 1',),
    ),
    Case(
        'a role that nobody knows',
        [dict(messages=[dict(role='narrator', content='Night.'), *MESSAGES])],
        [],
        ("unknown role 'narrator'",),
    ),
    Case(
        'a message without a role',
        [dict(messages=[dict(speaker='Ann', text='Why?')])],
        [],
        ("a message without a role, with ['speaker', 'text']",),
    ),
    Case(
        'KTO, marked as bad', [dict(prompt='a', completion='b', label=False)], [], ('`label` is',)
    ),
    Case('KTO, marked as good', [dict(prompt='a', completion='b', label=True)], [chat('a', 'b')]),
    Case('kto_tag of LLaMA-Factory', [dict(ONE, kto_tag=False)], [], ('`kto_tag` is false',)),
    Case(
        'a preference pair',
        [dict(prompt='a', chosen='b', rejected='c')],
        [],
        ('a preference pair: put the reply to learn under `completion`',),
    ),
    Case('rows for testing', [dict(ONE, split='test'), ONE], [MESSAGES], ("`split` is 'test'",)),
    Case(
        'the user has the last word',
        [dict(messages=chat('Why?', 'What?', 'Well?'))],
        [],
        ("the last message is of role 'user'; needs `messages` that end with",),
    ),
    Case(
        'the assistant speaks first',
        [dict(conversations=[{'from': 'gpt', 'value': 'Hello!'}, *sharegpt('Why?', 'What?')])],
        [],
        ('the assistant speaks first: put a system or user message before it',),
    ),
    Case(
        'half an emoji, as an escape in JSON',
        '{"user": "a\\ud83d", "assistant": "b"}\n{"user": "\\ud83d\\ude00", "assistant": "a"}',
        [chat('😀', 'a')],
        ('line 1: half a character (U+D83D), as where an emoji was cut in two',),
    ),
    Case(
        'raw text without roles',
        [dict(text='### Question: Why? ### Answer: Because.')],
        [],
        ('needs `messages`', 'it has `text`'),
    ),
    Case('content null', [dict(messages=[MESSAGES[0], dict(role='assistant')])], [], ('without',)),
    Case(
        'content NaN, as pandas writes a hole',
        '{"prompt": "Greet.", "input": NaN, "output": "Hi!"}\n{"user": NaN, "assistant": "b"}',
        [chat('Greet.', 'Hi!')],
        ('line 2: needs `messages`',),
    ),
    Case('content is a number', [dict(question='a', answer=4)], [], ('its content is 4',)),
    Case(
        'a list for each key, as datasets returns a sequence',
        [dict(messages=dict(role=['user', 'assistant'], content=['Why?', 'What moves?']))],
        [MESSAGES],
    ),
    Case(
        'a list of messages as a text of JSON',
        [dict(messages=json.dumps(MESSAGES)), dict(messages='not a list')],
        [MESSAGES],
        ("line 2: `messages` is no list of messages but 'not a list'",),
    ),
    Case(
        'the name of a conversation is no conversation',
        [dict(ONE, conversation='monday')],
        [MESSAGES],
        ('ignored        conversation 1',),
    ),
]

# --- files by their content ---------------------------------------------------------------------

TABLE = 'question,answer\nWhy?,What moves?\n'
WITH_COMMA = 'Question;Answer\r\n"Why; and\nhow?";"Say ""what"" moves?"\r\n'
API = dict(features=[], rows=[dict(row_idx=0, row=ONE, truncated_cells=[])])

FILES = [
    Case('a byte-order mark', b'\xef\xbb\xbf' + jsonl(ONE).encode(), [MESSAGES], ('order mark',)),
    Case(
        'byte-order marks of files that were joined',
        '\ufeff' + jsonl(ONE) + '\n\ufeff' + jsonl(ONE),
        [MESSAGES, MESSAGES],
        ('2, 0 set aside',),
    ),
    Case('UTF-16 of PowerShell', jsonl(ONE, ONE).encode('utf-16'), [MESSAGES] * 2, ('UTF-16',)),
    Case('UTF-16 without a mark', jsonl(ONE).encode('utf-16-be'), [MESSAGES], ('UTF-16',)),
    Case('UTF-16, an array', json.dumps([ONE]).encode('utf-16'), [MESSAGES], ('a JSON array',)),
    Case(
        'UTF-16 that breaks off in a letter',
        jsonl(ONE, ONE).encode('utf-16')[:-1],
        [MESSAGES],
        ('line 2: half a character',),
    ),
    Case(
        'one line in Latin-1',
        jsonl(ONE).encode() + b'\n{"user": "Caf\xe9?", "assistant": "a"}',
        [MESSAGES],
        ('line 2: the byte 0xE9 is not UTF-8: save the file as UTF-8',),
    ),
    Case('JSON lines called .json', jsonl(*BOTH), [chat('a', 'b'), chat('c', 'd')], file='a.json'),
    Case('an array called .jsonl', json.dumps(BOTH), [chat('a', 'b'), chat('c', 'd')], ('array',)),
    Case('lines with the ends of old Macs', jsonl(ONE, ONE).replace('\n', '\r'), [MESSAGES] * 2),
    Case(
        'a line separator inside a text',
        [dict(ONE, user='a\u2028b')],
        [chat('a\u2028b', 'What moves?')],
    ),
    Case(
        'an array with a row on each line that breaks off',
        '[\n' + jsonl(ONE) + ',\n' + jsonl(ONE) + ',\n{"user": "W',
        [MESSAGES, MESSAGES],
        ('line 4: Unterminated string',),
    ),
    Case(
        'an array that breaks off',
        json.dumps([ONE, ONE])[:-9],
        [],
        ('its JSON is broken: Unterminated string', 'rows.json'),
        'rows.json',
    ),
    Case(
        'objects that are spread over lines',
        json.dumps(ONE, indent=2) + '\n' + json.dumps(ONE, indent=2),
        [MESSAGES, MESSAGES],
        ('JSON objects',),
    ),
    Case('one object', json.dumps(ONE, indent=1), [MESSAGES], ('one JSON object',), 'a.json'),
    Case(
        'rows under data', json.dumps(dict(data=[ONE])), [MESSAGES], ("its list 'data'",), 'a.json'
    ),
    Case("rows of the Hub's API", json.dumps(API), [MESSAGES], ("its list 'rows'",), 'a.json'),
    Case(
        'columns of pandas',
        pd.DataFrame([ONE, ONE]).to_json(),
        [MESSAGES, MESSAGES],
        ('JSON by columns',),
        'a.json',
    ),
    Case('columns as lists', json.dumps(dict(prompt=['a'], response=['b'])), [chat('a', 'b')]),
    Case(
        'several lists in one object',
        json.dumps(dict(train=[ONE], test=[ONE])),
        [],
        ('it holds several lists, `train` and `test`: give one of them',),
        'a.json',
    ),
    Case(
        'a list of messages for each row',
        json.dumps([sharegpt('Why?', 'What moves?'), sharegpt('a', 'b')]),
        [MESSAGES, chat('a', 'b')],
    ),
    Case('a list with one row on each line', jsonl([ONE], [ONE]), [MESSAGES, MESSAGES]),
    Case(
        'messages without their conversation',
        json.dumps(sharegpt('Why?', 'What moves?')),
        [],
        ('needs `messages`', 'it has `from` and `value`'),
    ),
    Case('CSV', TABLE, [MESSAGES], ('CSV, UTF-8', 'question + answer 1'), 'a.csv'),
    Case(
        'CSV of Excel with semicolons, a mark, and its sep line',
        b'\xef\xbb\xbfsep=;\r\n' + WITH_COMMA.encode(),
        [chat('Why; and\nhow?', 'Say "what" moves?')],
        ('CSV with semicolons, UTF-8 with a byte-order mark',),
        'a.csv',
    ),
    Case(
        '"Unicode text" of Excel',
        TABLE.replace(',', '\t').encode('utf-16'),
        [MESSAGES],
        ('TSV, UTF-16',),
        'a.txt',
    ),
    Case('TSV', TABLE.replace(',', '\t'), [MESSAGES], ('TSV',), 'a.tsv'),
    Case(
        'CSV in Latin-1',
        (TABLE + 'Café?,What?\n').encode('latin1'),
        [MESSAGES],
        ('line 3: the byte 0xE9 is not UTF-8',),
        'a.csv',
    ),
    Case(
        'CSV with a line of too many fields',
        TABLE + 'Why, then?,What?\n\nHow?,Like what?\n',
        [MESSAGES, chat('How?', 'Like what?')],
        ('line 3: 3 fields, where the first line names 2',),
        'a.csv',
    ),
    Case(
        'CSV with a quotation mark that is never closed',
        TABLE + '"Why?,What?\nHow?,What?\n',
        [],
        ('its line 3 is not CSV', 'a quotation mark is not closed'),
        'a.csv',
    ),
    Case(
        'CSV with a cell that Excel has cut',
        TABLE + f'Why?,{"a" * 32767}\n',
        [MESSAGES],
        ('line 3: a text of 32,767 characters, where Excel cuts off',),
        'a.csv',
    ),
    Case(
        'CSV without names of columns',
        'Why?,What moves?\n',
        [],
        ("its first line should name the columns of a row, and is 'Why?,What moves?'",),
        'a.csv',
    ),
    Case(
        'CSV of datasets, with messages as Python prints them',
        'messages\n"' + str(MESSAGES).replace('"', '""') + '"\n',
        [MESSAGES],
        ('messages 1',),
        'a.csv',
    ),
    Case(
        'CSV, marked as bad',
        'prompt,completion,label\na,b,False\nc,d,True\n',
        [chat('c', 'd')],
        ('`label` is false',),
        'a.csv',
    ),
    Case(
        'gzip of JSON lines',
        gzip.compress(jsonl(ONE).encode()),
        [MESSAGES],
        ('gzip',),
        'a.jsonl.gz',
    ),
    Case(
        'gzip of CSV', gzip.compress(TABLE.encode()), [MESSAGES], ('CSV, UTF-8, gzip',), 'a.csv.gz'
    ),
    Case('gzip that nobody named so', gzip.compress(jsonl(ONE).encode()), [MESSAGES], ('gzip',)),
    Case('bzip2', bz2.compress(jsonl(ONE).encode()), [MESSAGES], ('bzip2',), 'a.jsonl.bz2'),
    Case('xz', lzma.compress(jsonl(ONE).encode()), [MESSAGES], (', xz',), 'a.jsonl.xz'),
    Case(
        'gzip that breaks off',
        gzip.compress(jsonl(ONE).encode())[:-9],
        [],
        ('its gzip is broken', 'download it again'),
    ),
    Case('zstd', b'\x28\xb5\x2f\xfd\x00', [], ('unpack it with `zstd -d`',), 'a.jsonl.zst'),
    Case('an Excel workbook', b'PK\x03\x04\x14', [], ('save as "CSV UTF-8"',), 'a.xlsx'),
    Case(
        'an old Excel workbook',
        b'\xd0\xcf\x11\xe0\xa1',
        [],
        ('save the sheet as "CSV UTF-8"',),
        'a.xls',
    ),
    Case(
        'a pointer of Git LFS',
        'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n',
        [],
        ('a pointer of Git LFS, not the data: run `git lfs pull`',),
        'a.parquet',
    ),
    Case(
        'a page of the Hub',
        '<!doctype html>\n<html>',
        [],
        ('it is a web page: download the file itself',),
    ),
    Case(
        'a pickle', b'\x80\x04\x95\x00', [], ('a pickle', 'write the rows as JSON lines'), 'a.pkl'
    ),
    Case(
        'a tar archive',
        b'rows.jsonl'.ljust(257, b'\0') + b'ustar',
        [],
        ('a tar archive: unpack it',),
        'a.tar',
    ),
    Case('a letter', 'Dear Sir or Madam', [], ("begins with 'Dear Sir or Madam'",), 'a.txt'),
    Case('nothing', '', [], ('an empty file',)),
    Case('brackets without an end', '[' * 100_000, [], ('brackets are nested too deeply',)),
]


def write(case, folder):
    "Write a case's file; returns its path."
    path = folder / case.file
    content = jsonl(*case.content) if isinstance(case.content, list) else case.content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def by_name(case):
    return case.name


@pytest.mark.parametrize('case', ROWS + FILES, ids=by_name)
def test_rows_and_words(case, tmp_path):
    path = write(case, tmp_path)
    try:
        understood = open_rows(path)
    except SocraticError as error:
        assert not case.rows and case.says
        said = str(error)
    else:
        assert [row['messages'] for row in understood.rows] == case.rows
        assert [row_messages(row) for row in understood.rows] == case.rows  # nothing lost twice
        said = '\n'.join(f'{heading:22} {text}' for heading, text in understood.describe())
        for entry in understood.quarantined:
            assert entry['file'] == str(path) and entry['line'] > 0 and entry['reason']
            said += f'\nline {entry["line"]}: {entry["reason"]}'
    for words in case.says:
        assert words in said
    assert 'Traceback' not in said
    if not case.rows:
        with pytest.raises(SocraticError, match='no usable row|cannot be read as a dataset'):
            read_rows(path)


def test_parquet_of_messages_with_and_without_weight(tmp_path):
    rows = [dict(messages=masked(TWO, 1)), dict(messages=MESSAGES)]
    pd.DataFrame(rows).to_parquet(tmp_path / 'rows.parquet')  # fills up missing weights with null
    understood = open_rows(tmp_path / 'rows.parquet')
    assert [row['messages'] for row in understood.rows] == [masked(TWO, 1), MESSAGES]
    assert 'Parquet' in understood.kind


def test_a_reply_of_weight_0_is_no_completion():
    with pytest.raises(ValueError, match='the last reply has weight 0'):
        prompt_completion(dict(messages=masked(TWO, 3)))
    made = prompt_completion(dict(messages=masked(TWO, 1)))
    assert made == dict(prompt=TWO[:-1], completion=TWO[-1:])


# --- tokens and labels: chat templates and tokenizers -------------------------------------------

TURN = "<|{{ m['role'] }}|>{{ m['content'] + eos_token }}"
ASK = '{% if add_generation_prompt %}<|assistant|>{% endif %}'
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + TURN + '{% endfor %}' + ASK
)
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    + TURN
    + '{% endfor %}'
    + ASK
)
FORGETS = "{% for m in messages if m['role'] != 'system' %}" + TURN + '{% endfor %}' + ASK
ONLY_FIRST_SYSTEM = (
    "{% for m in messages if m['role'] != 'system' or loop.first %}" + TURN + '{% endfor %}' + ASK
)
SYSTEM_TWICE = [dict(role='system', content='One.'), *chat('Why?', 'What?', system='Two.')]
LATE_SYSTEM = [*chat('a', 'b', system='Ask.'), *chat('c', 'd', system='Only ask.')]


@cache
def pocket():
    return AutoTokenizer.from_pretrained(data_path('pocket', 'base'))


def tokenizer_with(template=None, **changes):
    "The pocket tokenizer with another template, or with other attributes."
    tokenizer = AutoTokenizer.from_pretrained(data_path('pocket', 'base'))
    if template is not None:
        tokenizer.chat_template = template
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def learned(tokenizer, row):
    "The text that has labels, with a bar between replies."
    text = ''
    for label in row['labels']:
        text += '|' if label == -100 else tokenizer.decode([label])
    return [part.strip() for part in text.split('|') if part.strip()]


@dataclass
class TemplateCase:
    "A template, a conversation, and what must be in the text and among what is learned."

    name: str
    template: str | dict | None
    messages: list
    prompt: str = ''  # is in the rendered text; empty: the conversation is refused
    replies: tuple = ()
    says: str = ''  # the words of a refusal


TEMPLATES = [
    TemplateCase(
        'no system role',
        NO_SYSTEM,
        chat('Why?', 'What?', system='Ask.'),
        '<|user|>Ask.\n\nWhy?</s>',
        ('What?</s>',),
    ),
    TemplateCase(
        'two users',
        ALTERNATE,
        [MESSAGES[0], *chat('How?', 'What?')],
        '<|user|>Why?\n\nHow?</s>',
        ('What?</s>',),
    ),
    TemplateCase(
        'system and two users',
        ALTERNATE,
        [*chat('Why?', system='Ask.'), *chat('How?', 'What?')],
        '<|user|>Ask.\n\nWhy?\n\nHow?</s>',
        ('What?</s>',),
    ),
    TemplateCase(
        'two replies',
        ALTERNATE,
        [*MESSAGES, MESSAGES[1]],
        '<|assistant|>What moves?\n\nWhat moves?</s>',
        ('What moves?⏎⏎What moves?</s>',),
    ),
    TemplateCase(
        'two replies of unlike weight',
        ALTERNATE,
        [MESSAGES[0], dict(MESSAGES[1], weight=0), MESSAGES[1]],
        says='does not take the conversation (Conversation roles must alternate)',
    ),
    TemplateCase(
        'a system prompt left out in silence',
        FORGETS,
        chat('Why?', 'What?', system='Ask.'),
        '<|user|>Ask.\n\nWhy?</s>',
        ('What?</s>',),
    ),
    TemplateCase(
        'a later system prompt left out in silence',
        ONLY_FIRST_SYSTEM,
        LATE_SYSTEM,
        '<|user|>Only ask.\n\nc</s>',
        ('b</s>', 'd</s>'),
    ),
    TemplateCase(
        'a system prompt that nobody can take in',
        FORGETS,
        [*MESSAGES[:1], dict(role='system', content='Ask.'), MESSAGES[1]],
        says='no user turn after a system prompt',
    ),
    TemplateCase(
        'two system prompts',
        NO_SYSTEM,
        SYSTEM_TWICE,
        '<|user|>One.\n\nTwo.\n\nWhy?</s>',
        ('What?</s>',),
    ),
    TemplateCase(
        'two system prompts for Llama 2',
        'llama2',
        SYSTEM_TWICE,
        '<<SYS>>\nOne.\n\nTwo.\n<</SYS>>',
        ('What? </s>',),
    ),
    TemplateCase(
        'nothing to mend',
        None,
        chat('Why?', 'What?', system='Ask.'),
        '<|system|>Ask.</s><|user|>Why?</s>',
        ('What?</s>',),
    ),
    TemplateCase('weight 0 in front', None, masked(TWO, 1), 'Because.</s>', ('What moves?</s>',)),
    TemplateCase(
        'weight 0 at the end', None, masked(TWO, 3), 'What moves?</s>', ('Because.</s>',)
    ),
    TemplateCase(
        'weight 0 for Llama 2', 'llama2', masked(TWO, 1), ' Because. </s>', ('What moves? </s>',)
    ),
    TemplateCase(
        'several templates in one tokenizer',
        dict(default=NO_SYSTEM, tool_use='{{ x }}'),
        MESSAGES,
        '<|user|>Why?</s>',
        ('What moves?</s>',),
    ),
    TemplateCase(
        'a special token in a text',
        None,
        chat('Why?', 'What?</s>'),
        says='a message holds </s>, which this tokenizer reads as a special token',
    ),
]


@pytest.mark.parametrize('case', TEMPLATES, ids=by_name)
def test_templates(case):
    chat_format = 'llama2' if case.template == 'llama2' else 'native'
    tokenizer = tokenizer_with(None if chat_format == 'llama2' else case.template)
    set_chat_format(tokenizer, chat_format)
    if case.says:
        with pytest.raises(SocraticError) as caught:
            encode(tokenizer, case.messages)
        assert case.says in str(caught.value)
        return
    row = encode(tokenizer, case.messages)
    assert case.prompt in render(tokenizer, case.messages)
    expected = [text.replace('⏎', '\n') for text in case.replies]
    assert learned(tokenizer, row) == expected
    before = prompt_ids(tokenizer, case.messages[: case.messages.index(case.messages[-1])])
    assert row['input_ids'][: len(before)] == before  # the chat asks as the training did


TOKENIZERS = {
    'without a template': (dict(chat_template=None), 'has no chat template of its own'),
    'with templates, none the default': (
        dict(chat_template=dict(rag='{{ x }}')),
        'chat_format="llama2"',
    ),
    'without an end': (dict(eos_token=None), 'no token for the end of a text'),
}


@pytest.mark.parametrize('name', TOKENIZERS)
def test_tokenizers_that_cannot_chat(name):
    changes, words = TOKENIZERS[name]
    with pytest.raises(SocraticError) as caught:
        set_chat_format(tokenizer_with(**changes), 'native')
    assert words in str(caught.value)


def test_a_slow_tokenizer_is_named(monkeypatch):
    tokenizer = tokenizer_with()
    monkeypatch.setattr(type(tokenizer), 'is_fast', property(lambda self: False))
    with pytest.raises(SocraticError, match='convert it to a fast one'):
        encode(tokenizer, MESSAGES)


def test_a_token_that_the_model_has_no_embedding_for():
    tokenizer = tokenizer_with()
    vocab_size = len(tokenizer)
    tokenizer.add_tokens(['wobbly'])
    rows = [dict(id='a', messages=MESSAGES), dict(id='b', messages=chat('Is it wobbly?', 'What?'))]
    encoded, dropped = encode_rows(rows, tokenizer, 64, vocab_size)
    assert len(encoded) == 1
    assert [entry['row'] for entry in dropped] == ['b']
    assert 'the token wobbly was added to the tokenizer' in dropped[0]['reason']
    assert 'resize_token_embeddings' in dropped[0]['reason']


LIMITS = {
    'all fits': (0, ['Because.</s>', 'What moves?</s>'], 0),
    'half of the second reply': (-2, ['Because.</s>'], 1),
    'all but its end': (-1, ['Because.</s>'], 1),
}


@pytest.mark.parametrize('name', LIMITS)
def test_long_rows_end_with_a_whole_reply(name):
    change, expected, n_shortened = LIMITS[name]
    whole = encode(pocket(), TWO)
    limit = len(whole['input_ids']) + change
    encoded, dropped = encode_rows([dict(messages=TWO)], pocket(), limit)
    assert learned(pocket(), encoded[0]) == expected and not dropped
    assert (encoded[0]['n_cut'] > 0) == n_shortened
    assert encoded[0]['labels'][-1] == pocket().eos_token_id


def test_a_row_without_a_whole_reply_is_dropped_by_name():
    rows = [dict(messages=MESSAGES), dict(id='long', messages=chat('Why?', 'What ' * 40))]
    encoded, dropped = encode_rows(rows, pocket(), 30)
    assert len(encoded) == 1
    assert dropped == [dict(row='long', reason=dropped[0]['reason'])]
    assert 'no whole reply is left within 30 tokens' in dropped[0]['reason']


@pytest.mark.parametrize('split', ['validation', 'valid', 'val', 'Dev', 'eval'])
def test_splits_by_other_names(split):
    rows = [dict(messages=MESSAGES, split=split), dict(messages=MESSAGES)]
    train, valid = split_rows(encode_rows(rows, pocket(), 64)[0], 0.5, seed=1)
    assert (len(train), len(valid)) == (1, 1)
    with pytest.raises(SocraticError, match='all 1 rows have the split validation'):
        split_rows(encode_rows(rows[:1], pocket(), 64)[0], 0.5, seed=1)


# tokens and labels of every eighth bundled row: they change with dataset or tokenizer only
BUNDLED = {
    'native': '59bc3ea33b481cf3',
    'llama2': 'a26050fa9e56cd7b',
}


@pytest.mark.parametrize('chat_format', BUNDLED)
def test_the_bundled_dataset_becomes_the_same_tokens(chat_format):
    tokenizer = tokenizer_with()
    set_chat_format(tokenizer, chat_format)
    rows, quarantined = read_rows(data_path('tutor_v1_sft.jsonl'))
    encoded, dropped = encode_rows(rows[::8], tokenizer, 512)
    assert len(rows) == 1633 and not quarantined and not dropped
    checksum = hashlib.sha256()
    for row in encoded:
        features = [row[key] for key in ('input_ids', 'labels', 'group', 'split')]
        checksum.update(json.dumps(features).encode())
    assert checksum.hexdigest()[:16] == BUNDLED[chat_format]


# --- files of settings --------------------------------------------------------------------------

ENCODINGS = {
    'a byte-order mark': lambda text: b'\xef\xbb\xbf' + text.encode(),
    'UTF-16': lambda text: text.encode('utf-16'),
}


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_settings_in_other_encodings(encoding, tmp_path):
    encode_text = ENCODINGS[encoding]
    files = {
        'topics': (tmp_path / 'cards' / 'a.yaml', sorted(data_path('topics').glob('*.yaml'))[0]),
        'constitution': (tmp_path / 'constitution.yaml', data_path('constitution.yaml')),
        'prices': (tmp_path / 'prices.yaml', data_path('prices.yaml')),
    }
    (tmp_path / 'cards').mkdir()
    for path, source in files.values():
        path.write_bytes(encode_text(source.read_text(encoding='utf8')))
    cards = yaml.safe_load(files['topics'][1].read_text(encoding='utf8'))['cards']
    assert len(load_topics(tmp_path / 'cards')) == len(cards)
    assert load_constitution(files['constitution'][0]) == load_constitution()
    prices = files['prices'][0]
    assert get_price('gpt-4o', 'https://api.openai.com/v1', prices).input > 0
    (tmp_path / '.env').write_bytes(encode_text('OPENAI_API_KEY=…\r\nOPENAI_BASE_URL=x\r\n'))
    assert read_text(tmp_path / '.env') == 'OPENAI_API_KEY=…\r\nOPENAI_BASE_URL=x\r\n'
    (tmp_path / 'questions.jsonl').write_bytes(encode_text('{"question": "Wieso „so“?"}\n'))
    numbered, quarantined = numbered_jsonl(tmp_path / 'questions.jsonl', required=('question',))
    assert numbered == [(1, dict(question='Wieso „so“?'))] and not quarantined


def test_settings_in_latin1_are_named_with_their_line(tmp_path):
    (tmp_path / 'a.yaml').write_bytes('subject: Physik\ncards: [für]'.encode('latin1'))
    with pytest.raises(SocraticError, match=r'line 2: the byte 0xFC is not UTF-8: save the file'):
        load_topics(tmp_path)
    with pytest.raises(SocraticError, match=r'not a constitution: line 2: the byte 0xFC is not'):
        load_constitution(tmp_path / 'a.yaml')
    with pytest.raises(SocraticError, match='none.yaml cannot be read: No such file'):
        read_text(tmp_path / 'none.yaml')


# --- the report ---------------------------------------------------------------------------------


def report(*args):
    return CliRunner().invoke(app, ['report', *map(str, args)])


def test_the_report_shows_how_a_file_was_understood(tmp_path):
    bad = dict(messages=[MESSAGES[0], dict(role='tool', content='42')])
    rows = [dict(messages=masked(TWO, 1), system='Ask.', source='forum'), bad, ONE]
    path = tmp_path / 'rows.json'
    path.write_bytes(jsonl(*rows).encode('utf-16'))
    done = report(path)
    assert done.exit_code == 0, done.output
    lines = {line[:26].strip(): line[27:] for line in done.output.splitlines()}
    assert lines['file'] == f'{path} (JSON lines, UTF-16)'
    assert lines['rows read'] == '2, 1 set aside'
    assert lines['formats'] == 'messages 1, user + assistant 1'
    assert lines['columns ignored'] == 'source 1'
    assert lines['roles'] == 'user 3, assistant 3, system 1'
    assert lines['weights'] == '2 of 3 replies are learned'
    assert "from line 2: a message of role 'tool'" in lines['set aside: 1']
    assert lines['encoded'].startswith('2 rows, ')
    mask = done.output.partition('line 1 as tokens')[2].splitlines()
    assert [line[:8].strip() for line in mask[1:3]] == ['masked', 'learned']
    assert 'Because' in mask[1].replace('|', '') and mask[2].replace('|', '').endswith(
        'What moves?</s>'
    )


def test_the_report_shows_the_row_of_a_line(tmp_path):
    (tmp_path / 'rows.jsonl').write_text(jsonl(ONE, ONE), encoding='utf8')
    done = report(tmp_path / 'rows.jsonl', '--line', 2, '--set', 'chat_format=llama2')
    assert 'line 2 as tokens' in done.output and 'pocket, chat_format llama2' in done.output
    assert '[INST]' in done.output.partition('as tokens')[2].replace('|', '')


def test_the_report_of_a_file_that_cannot_be_learned_from(tmp_path):
    (tmp_path / 'rows.jsonl').write_text(jsonl(dict(text='a')), encoding='utf8')
    done = report(tmp_path / 'rows.jsonl')
    assert '0, 1 set aside' in done.output and 'it has `text`' in done.output
    assert isinstance(done.exception, SocraticError)
    done = report(tmp_path / 'rows.jsonl', '--line', 7, '--set', 'max_length=1')
    assert isinstance(done.exception, SocraticError) and 'max_length' in str(done.exception)


def test_the_report_shows_no_escape_sequence(tmp_path):
    row = dict(ONE, user='\x1b[2JWhy?', kind='\x1b]0;title\x07', topic=['a list'], trail='none')
    (tmp_path / 'rows.jsonl').write_text(jsonl(row), encoding='utf8')
    done = report(tmp_path / 'rows.jsonl')
    assert done.exit_code == 0, done.output
    assert '\x1b' not in done.output and '\\x1b]0;title' in done.output


# --- faults at random ---------------------------------------------------------------------------


def seed_rows(rng):
    "Rows of several formats, each with its own words."
    makers = [
        lambda a, b: dict(messages=chat(a, b, a, b), system='Ask.'),
        lambda a, b: dict(messages=masked(chat(a, b, a, b), 1), id=a),
        lambda a, b: dict(conversations=sharegpt(a, b), topic='dew'),
        lambda a, b: dict(instruction=a, input='', output=b),
        lambda a, b: dict(question=a, answer=b, split='train'),
        lambda a, b: dict(prompt=chat(a), completion=chat(a, b)[1:]),
    ]
    words = [
        'why',
        'Ohm’s',
        'π',
        '日本',
        '👩‍🔬',
        'a\nb',
        '"so"',
        '{x}',
        '[1]',
        ',',
        ';',
        '\t',
        '\\',
    ]
    rows = []
    for i in range(6):
        texts = [f'{name}{i} ' + ' '.join(rng.choices(words, k=4)) for name in ('ask', 'reply')]
        rows.append(rng.choice(makers)(*texts))
    return rows


VALUES = [
    None,
    '',
    ' ',
    0,
    1,
    0.5,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    'x',
    '\ud83d',
    '</s>',
    10**400,
    float('nan'),
    [{}],
    {'a': 1},
]
KEYS = [
    'role',
    'from',
    'content',
    'value',
    'weight',
    'train',
    'messages',
    'conversations',
    'system',
    'output',
    'answer',
    'history',
    'label',
    'split',
    'context',
    'trail',
    'topic',
]


def places(value):
    "Every container in a value."
    found = [value] if isinstance(value, (dict, list)) and value else []
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, (dict, list)):
            found += places(inner)
    return found


def break_structure(rng, row):
    "Change one thing somewhere in a row."
    place = rng.choice(places(row))
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    key = rng.choice(keys)
    action = rng.randrange(4)
    if action == 0:
        del place[key]
    elif action == 1 and isinstance(place, dict):
        place[rng.choice(KEYS)] = place.pop(key)
    elif action == 2 and isinstance(place, list):
        place.append(place[key])
    else:
        place[key] = rng.choice(VALUES)


def break_bytes(rng, data):
    "Change, insert, delete or cut bytes."
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(data) + 1)
        action = rng.randrange(5)
        if action == 0 and i < len(data):
            data[i] = rng.randrange(256)
        elif action == 1:
            data[i:i] = bytes(rng.choices(b'"{}[],:;\\\n\r\0\xef\xbb\xff', k=rng.randint(1, 3)))
        elif action == 2:
            del data[i : i + rng.randint(1, 20)]
        elif action == 3:
            data[i:i] = data[: rng.randint(1, 40)]
        elif rng.random() < 0.2:
            del data[i:]
    return bytes(data)


def as_csv(rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, ('question', 'answer'), extrasaction='ignore')
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


FORMS = {
    'jsonl': lambda rows: jsonl(*rows, ensure_ascii=True),
    'json': lambda rows: json.dumps(rows, indent=1),
    'columns.json': lambda rows: pd.DataFrame(rows).to_json(),
    'csv': as_csv,
}
WRAPPINGS = {
    'utf-8': lambda text: text.encode('utf8', 'replace'),
    'utf-8-sig': lambda text: b'\xef\xbb\xbf' + text.encode('utf8', 'replace'),
    'utf-16': lambda text: text.encode('utf-16', 'surrogatepass'),
    'gzip': lambda text: gzip.compress(text.encode('utf8', 'replace')),
}


def fuzzed_file(seed, folder):
    "A file with a fault in it; returns its path and the rows that have none."
    rng = random.Random(seed)
    rows = seed_rows(rng)
    form = rng.choice([*FORMS, 'jsonl'])
    if form == 'csv':
        rows = [dict(question=f'ask{i} a, b', answer=f'reply{i} "c"') for i in range(6)]
    broken = set()
    if rng.random() < 0.5 and form != 'columns.json':
        broken = set(rng.sample(range(6), 2))
        for i in broken:
            break_structure(rng, rows[i])
    text = FORMS[form](rows)
    data = WRAPPINGS[rng.choice(list(WRAPPINGS))](text)
    whole = [row for i, row in enumerate(rows) if i not in broken]
    if not broken:
        data = break_bytes(rng, data)
        whole = []  # nobody knows which
    path = folder / f'{seed}.{form}'
    path.write_bytes(data)
    return path, whole


def check_rows(understood):
    "Rows that are returned can be stored and encoded; others are named."
    for row in understood.rows:
        messages = row['messages']
        assert messages[-1]['role'] == 'assistant'
        for message in messages:
            assert message['role'] in ('system', 'user', 'assistant')
            assert message['content'].strip()
            message['content'].encode('utf8')
    for entry in understood.quarantined:
        assert entry['line'] > 0 and entry['reason'] and len(entry['text']) <= 200
        json.dumps(entry, ensure_ascii=False).encode('utf8')
    dict(understood.describe())


@pytest.mark.parametrize('part', range(20))
def test_500_files_with_a_fault(part, tmp_path):
    for seed in range(25 * part, 25 * part + 25):
        path, whole = fuzzed_file(seed, tmp_path)
        try:
            understood = open_rows(path)
            check_rows(understood)
            kept = [row['messages'] for row in understood.rows]
            for row in whole:
                assert row_messages(row) in kept, (seed, row)
            if kept:
                encoded, dropped = encode_rows(understood.rows, pocket(), 256)
                assert len(encoded) + len(dropped) == len(kept)
            if seed % 10 == 0:
                dataset_report(understood.rows, TopicBank([]))
        except SocraticError as error:
            assert str(error) and '\n' not in str(error), seed
            assert not whole or 'rows can be trained on' in str(error), (seed, str(error))


def test_describe_encoding_names_lines_that_are_dropped(tmp_path):
    rows = [dict(messages=chat('Why?', 'What?</s>')), ONE]
    (tmp_path / 'rows.jsonl').write_text(jsonl(*rows), encoding='utf8')
    understood = open_rows(tmp_path / 'rows.jsonl')
    described = dict(describe_encoding(understood, settings_for()))
    assert 'a message holds </s>' in described['dropped: line 1']
    assert 'line 2 as tokens' in described
    with pytest.raises(SocraticError, match='line 1 holds no row that is learned'):
        describe_encoding(understood, settings_for(), line=1)
