"Reading rows: every format, every kind of file; what is no row is set aside with its line."

import json

import pandas as pd
import pytest

from socratic_finetune.config import SocraticError, data_path, read_jsonl, write_jsonl
from socratic_finetune.constitution import Trail
from socratic_finetune.rows import (
    preference_pair,
    prompt_completion,
    read_rows,
    read_table,
    row_messages,
)

QUESTION = dict(role='user', content='Why?')
REPLY = dict(role='assistant', content='What moves?')
SHAREGPT = [{'from': 'human', 'value': 'Why?'}, {'from': 'gpt', 'value': 'What moves?'}]
SAME_ROW = {
    'messages': dict(messages=[QUESTION, REPLY]),
    'sharegpt': dict(conversations=SHAREGPT),
    'columns': dict(user='Why?', assistant='What moves?'),
    'texts': dict(prompt='Why?', completion='What moves?'),
    'lists': dict(prompt=[QUESTION], completion=[REPLY]),
}
TOOL = dict(conversations=[SHAREGPT[0], {'from': 'tool', 'value': '42'}])


def write_json(path, rows):
    path.write_text(json.dumps(rows), encoding='utf8')
    return path


@pytest.mark.parametrize('name', SAME_ROW)
def test_formats_give_the_same_messages(name):
    assert row_messages(SAME_ROW[name]) == [QUESTION, REPLY]


def test_columns_with_a_system_prompt():
    row = dict(SAME_ROW['columns'], system='Ask.')
    assert row_messages(row) == [dict(role='system', content='Ask.'), QUESTION, REPLY]


def test_messages_lose_what_is_neither_role_nor_content_nor_a_weight():
    row = dict(messages=[dict(QUESTION, weight=0), dict(REPLY, name='Ann', weight=1)])
    assert row_messages(row) == [QUESTION, REPLY]
    row = dict(messages=[QUESTION, dict(REPLY, weight=0), QUESTION, REPLY])
    assert row_messages(row) == row['messages']


@pytest.mark.parametrize(
    'row, reason',
    [
        ({}, 'needs `messages`'),
        (dict(user='Why?'), 'needs `messages` that end with the assistant'),
        (dict(assistant='What moves?'), 'needs `messages`'),
        (dict(messages=[REPLY, QUESTION]), 'needs `messages`'),
        (dict(user=' ', assistant='What?'), 'a message without text'),
        (dict(messages=[QUESTION, dict(role='assistant', content=None)]), 'without text'),
        (dict(messages=[dict(role='tool', content='42'), REPLY]), "of role 'tool'"),
        (TOOL, "of role 'tool': calls of tools are not learned"),
    ],
)
def test_rows_that_are_refused(row, reason):
    with pytest.raises(ValueError, match=reason):
        row_messages(row)


@pytest.mark.parametrize('write', [write_jsonl, write_json])
def test_files_of_mixed_formats(write, tmp_path):
    path = tmp_path / ('rows.jsonl' if write is write_jsonl else 'rows.json')
    write(path, [*SAME_ROW.values(), TOOL])
    rows, quarantined = read_rows(path)
    assert [row['messages'] for row in rows] == len(SAME_ROW) * [[QUESTION, REPLY]]
    assert [entry['line'] for entry in quarantined] == [len(SAME_ROW) + 1]
    assert quarantined[0]['reason'].startswith("a message of role 'tool'")
    assert quarantined[0]['file'] == str(path)
    assert '"tool"' in quarantined[0]['text']


def test_a_json_object_with_rows_under_data(tmp_path):
    rows, _ = read_rows(write_json(tmp_path / 'rows.json', dict(data=[SAME_ROW['texts']])))
    assert len(rows) == 1


def test_parquet(tmp_path):
    path = tmp_path / 'rows.parquet'
    pd.DataFrame([SAME_ROW['columns']]).to_parquet(path)
    rows, quarantined = read_rows(path)
    assert [row['messages'] for row in rows] == [[QUESTION, REPLY]]
    assert not quarantined


def test_what_is_no_row_is_set_aside_in_order(tmp_path):
    path = tmp_path / 'rows.jsonl'
    lines = ['{"user": "Why?"}', 'no JSON', '[1]', json.dumps(SAME_ROW['columns'])]
    lines += [json.dumps(dict(messages=[dict(role='user')]))]
    path.write_text('\n'.join(lines), encoding='utf8')
    rows, quarantined = read_rows(path)
    assert len(rows) == 1
    assert [entry['line'] for entry in quarantined] == [1, 2, 3, 5]
    assert quarantined[-1]['reason'] == 'a message without text'
    assert all(entry['reason'] and entry['text'] for entry in quarantined)


def test_other_columns_are_kept(tmp_path):
    rows, _ = read_rows(write_jsonl(tmp_path / 'r.jsonl', [dict(SAME_ROW['texts'], topic='dew')]))
    assert rows[0]['topic'] == 'dew'


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SocraticError, match='is not a file'):
        read_rows(tmp_path / 'no.jsonl')
    with pytest.raises(SocraticError, match='is not a file'):
        read_table('no.parquet')
    with pytest.raises(SocraticError, match='no usable row .*it has `rows`'):
        read_rows(write_json(tmp_path / 'object.json', dict(rows=1)))
    (tmp_path / 'torn.parquet').write_bytes(b'PAR1')
    with pytest.raises(SocraticError, match='cannot be read as a dataset'):
        read_rows(tmp_path / 'torn.parquet')


def test_a_file_without_a_usable_row(tmp_path):
    path = write_jsonl(tmp_path / 'rows.jsonl', [dict(user='Why?')])
    with pytest.raises(SocraticError, match=r'no usable row \(1 set aside\)'):
        read_rows(path)
    rows, quarantined = read_rows(path, required=False)
    assert (rows, len(quarantined)) == ([], 1)


def test_prompt_and_completion_are_the_whole_conversation():
    for row in read_jsonl(data_path('tutor_v1_sft.jsonl'))[0][:50]:
        parts = prompt_completion(row)
        assert parts['prompt'] + parts['completion'] == row['messages']
        assert parts['completion'] == [dict(role='assistant', content=row['assistant'])]


def test_a_preference_pair_is_draft_and_final_reply():
    rows, _ = read_jsonl(data_path('tutor_v1_sft.jsonl'))
    without = 0
    for row in rows:
        pair = preference_pair(row)
        if pair is None:
            assert not Trail(**row['trail']).changed
            without += 1
            continue
        assert pair['prompt'] == row['messages'][:-1]
        assert pair['chosen'] == [dict(role='assistant', content=row['assistant'])]
        assert pair['rejected'] == [dict(role='assistant', content=row['trail']['draft'])]
        assert pair['chosen'] != pair['rejected']
    assert 0 < without < len(rows)
