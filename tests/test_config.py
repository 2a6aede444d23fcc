"Settings, files that are never half-written, and run folders."

import os
from pathlib import Path

import pytest

from socratic_finetune.config import (
    ANY_TIME,
    BEFORE_TRAINING,
    GROUPS,
    PROFILES,
    TRACKED_PACKAGES,
    Run,
    Settings,
    SocraticError,
    check_base_model,
    data_path,
    numbered_jsonl,
    read_jsonl,
    run_folder,
    settings_for,
    settings_in,
    versions,
    write_atomic,
    write_jsonl,
)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv('SOCRATIC_RUNS', str(tmp_path))
    return tmp_path


# base models


@pytest.mark.parametrize('name', ['./nowhere', '/nowhere/at/all', '~/models/none', 'a/b/c'])
def test_a_path_that_leads_nowhere_is_no_model(name):
    with pytest.raises(SocraticError, match='is not a model folder'):
        check_base_model(name)


def test_other_names_may_be_models(tmp_path):
    for name in ('pocket', 'Qwen/Qwen3-0.6B', str(tmp_path)):
        check_base_model(name)


# settings


def test_data_that_is_not_there_is_named():
    assert data_path('split.yaml').is_file()
    with pytest.raises(SocraticError, match='no-such-file'):
        data_path('no-such-file')


def test_every_setting_is_in_one_group():
    names = settings_in(*GROUPS)
    assert len(set(names)) == len(names)
    assert {*names, 'profile', 'seed'} == set(Settings.model_fields)


def test_settings_that_may_change_are_groups():
    assert {*ANY_TIME, *BEFORE_TRAINING} <= set(GROUPS)
    assert 'workers' in settings_in(*ANY_TIME)
    assert 'n_rows' not in settings_in(*ANY_TIME, *BEFORE_TRAINING)


@pytest.mark.parametrize('profile', PROFILES)
def test_profiles(profile):
    settings = settings_for(profile)
    assert settings.profile == profile
    for name, value in PROFILES[profile].items():
        assert getattr(settings, name) == value
    assert Settings(**settings.model_dump(mode='json')) == settings


def test_none_keeps_the_profiles_default():
    assert settings_for(n_rows=None).n_rows == PROFILES['pocket']['n_rows']
    assert settings_for(n_rows=7).n_rows == 7


@pytest.mark.parametrize(
    'profile, changes, message',
    [
        ('big', {}, "profile 'big' is not known: choose one of pocket, smollm2, tinyllama"),
        ('pocket', dict(learning_rat=1), 'setting learning_rat=1'),
        ('pocket', dict(n_rows=0), 'setting n_rows=0'),
        ('pocket', dict(n_rows=0, seed=-1), 'seed=-1'),
    ],
)
def test_settings_that_are_refused(profile, changes, message):
    with pytest.raises(SocraticError, match=message):
        settings_for(profile, **changes)


def test_versions_name_the_tracked_packages():
    installed = versions()
    assert installed['python'].count('.') == 2
    assert set(installed) <= {'python', *TRACKED_PACKAGES}
    assert 'torch' in installed


# files


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / 'folder' / 'text.txt'
    assert write_atomic(path, 'äöü') == path
    assert path.read_bytes() == 'äöü'.encode()
    write_atomic(path, b'bytes')
    assert path.read_bytes() == b'bytes'
    assert os.listdir(path.parent) == ['text.txt']


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / 'text.txt', 'old')

    def full_disk(descriptor):
        raise OSError('No space left on device')

    monkeypatch.setattr(os, 'fsync', full_disk)
    with pytest.raises(OSError, match='No space left'):
        write_atomic(path, 'new')
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['text.txt']


def test_rows_that_are_no_json_leave_the_old_file(tmp_path):
    path = write_atomic(tmp_path / 'rows.jsonl', 'old')
    with pytest.raises(TypeError, match='JSON'):
        write_jsonl(path, [{'bad': {1}}])
    assert path.read_text() == 'old'


def test_bad_lines_are_quarantined_with_line_and_reason(tmp_path):
    good = '{"user": "Why is the sky blue?"}'
    lines = [good, '{"user": ', '', '["a list"]', '{"user": ""}', '{"user": 3}', good]
    path = write_atomic(tmp_path / 'rows.jsonl', '\n'.join(lines).encode() + b'\n\xff\n')
    numbered, quarantined = numbered_jsonl(path, required=('user',))
    assert [number for number, _ in numbered] == [1, 7]
    assert [entry['line'] for entry in quarantined] == [2, 4, 5, 6, 8]
    assert quarantined[1]['reason'] == 'a JSON list, not an object'
    assert quarantined[2]['reason'] == 'no text under user'
    assert quarantined[0]['text'] == '{"user": '
    assert all(entry['file'] == str(path) for entry in quarantined)
    assert read_jsonl(path, required=('user',))[0] == [row for _, row in numbered]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SocraticError, match='none.jsonl is not a file'):
        read_jsonl(tmp_path / 'none.jsonl')


def test_what_is_written_is_read(tmp_path):
    rows = [dict(user='Wieso?', n=1), dict(user='“why”\u2028', n=2)]
    path = write_jsonl(tmp_path / 'rows.jsonl', rows)
    assert read_jsonl(path) == (rows, [])


# runs


def test_a_name_with_a_slash_is_a_path(runs):
    assert run_folder('demo') == runs / 'demo'
    assert run_folder('./demo') == Path('demo')


def test_a_run_keeps_its_settings(runs):
    run = Run.begin('toy', n_rows=20)
    assert Run.exists('toy') and not Run.exists('never')
    assert Run.open('toy').settings.n_rows == 20
    assert Run.begin('toy', n_rows=None).settings == run.settings
    with pytest.raises(SocraticError, match='n_rows=20, not 30'):
        Run.open('toy', settings_for('pocket', n_rows=30))
    with pytest.raises(SocraticError, match='holds no run'):
        Run.open('never')


def test_stages_are_recorded(runs):
    run = Run.begin('toy')
    with run.stage('generate') as result:
        assert run.metadata['stages']['generate']['status'] == 'running'
        result['rows'] = 20
    with pytest.raises(ValueError, match='NaN'), run.stage('finetune'):
        raise ValueError('loss is NaN')
    assert run.done('generate') and not run.done('finetune') and not run.done('evaluate')
    assert run.metadata['stages']['generate']['rows'] == 20
    failed = run.metadata['stages']['finetune']
    assert failed['status'] == 'failed'
    assert failed['error'] == 'ValueError: loss is NaN'


def test_training_settings_may_change_until_training_starts(runs):
    Run.begin('data', num_train_epochs=1)
    assert Run.begin('data', num_train_epochs=2).settings.num_train_epochs == 2
    changed = Run.begin('data', target_modules=['q_proj'])
    assert changed.settings == Run.open('data').settings
    assert changed.settings.num_train_epochs == 2
    with pytest.raises(SocraticError, match='rounds=1, not 0'):
        Run.begin('data', rounds=0)
    with changed.stage('finetune'):
        pass
    with pytest.raises(SocraticError, match='num_train_epochs'):
        Run.begin('data', num_train_epochs=9)


def test_api_settings_may_change_at_any_time(runs):
    run = Run.begin('toy')
    with run.stage('finetune'):
        pass
    Run.begin('toy', workers=2, max_cost=5)
    settings = Run.open('toy').settings
    assert (settings.workers, settings.max_cost) == (2, 5)


def test_settings_of_older_runs_get_their_defaults(runs):
    run = Run.begin('toy')
    older = dict(run.metadata['settings'])
    del older['early_stopping_patience']
    run.write_metadata({**run.metadata, 'settings': older})
    assert Run.begin('toy').settings == run.settings


def test_bundled_files_stand_in_for_missing_ones(runs):
    run = Run.begin('toy')
    bundled = data_path('tutor_v1_sft.jsonl')
    assert run.input('sft.jsonl', 'tutor_v1_sft.jsonl') == bundled
    write_jsonl(run.path('sft.jsonl'), [])
    assert run.input('sft.jsonl', 'tutor_v1_sft.jsonl') == run.path('sft.jsonl')
