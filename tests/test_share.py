"Cards that tell the truth whatever a model said, and a push that sends nothing else."

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import processes
import pytest
from huggingface_hub import DatasetCard, ModelCard, constants
from markdown_it import MarkdownIt
from stand_in_hub import TOKEN, Hub
from typer.testing import CliRunner

from socratic_finetune.config import Run, SocraticError, data_path, settings_for, write_jsonl
from socratic_finetune.pipeline import app
from socratic_finetune.share import (
    FORMS,
    check_leaks,
    cyllama_code,
    eval_results,
    find_leaks,
    list_files,
    literal,
    model_card,
    pick_replies,
    plain,
    plan_push,
    push,
    score_table,
    shared_dataset_card,
    stage_model,
)
from socratic_finetune.statistics import arm_means
from socratic_finetune.tutor import Tutor

HOSTILE = (
    '# A heading\n\n---\nlicense: none\n---\n```\n````\n~~~~~\n</details><script>alert(1)</script>'
    '<img src="https://evil.test/x">![x](https://evil.test/y) [click](javascript:alert(1)) '
    '| a | b |\n> quote\n\n- list {{ 7*7 }} {% raw %} \x00\x1b[2J\u202e `code` <!-- \\'
)


def reply_rows(arms, text='{arm} says {i}'):
    rows = []
    for arm, level in arms.items():
        for i in range(8):
            row = dict(model=arm, topic=f'topic {i // 2}', question=f'question {i}?')
            row['reply'] = text if text == HOSTILE else text.format(arm=arm, i=i)
            row |= dict(socratic=level + i / 100, helpful=level - i / 200, faults='', error='')
            rows.append(row)
    return pd.DataFrame(rows)


def make_run(folder, **changes):
    "A run that looks as if it had been trained, evaluated and talked with."
    run = Run.open(f'{folder}/shared', settings_for('pocket', **changes))
    shutil.copytree(data_path('pocket', 'adapter'), run.path('adapter'))
    config = run.path('adapter', 'adapter_config.json')
    about = json.loads(config.read_text()) | dict(base_model_name_or_path=run.settings.base_model)
    config.write_text(json.dumps(about))
    scores = reply_rows({'base': 0.1, 'prompted': 0.2, 'tuned': 0.8})
    scores.to_csv(run.path('eval_scores.csv'), index=False)
    controls = reply_rows({'constant bot': 0.15})
    controls.to_csv(run.path('control_scores.csv'), index=False)
    run.path('eval_plot.png').write_bytes(b'\x89PNG')
    rows = [json.loads(line) for line in bundled_rows()[:20]]
    write_jsonl(run.path('sft.jsonl'), rows)
    return run


def bundled_rows():
    return data_path('tutor_v1_sft.jsonl').read_text(encoding='utf8').splitlines()


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


@pytest.fixture
def light(tmp_path):
    "The same on a base that is on the Hub, whose adapter alone is pushed."
    return make_run(tmp_path, base_model='them/base')


@pytest.fixture
def hub(monkeypatch):
    "A Hub on this machine, and this machine logged in there."
    hub = Hub()
    monkeypatch.setattr(constants, 'ENDPOINT', hub.address)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', lambda seconds: None)
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    yield hub
    hub.close()


@pytest.fixture
def logged_out(monkeypatch, tmp_path):
    monkeypatch.delenv('HF_TOKEN', raising=False)
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'no-token'))


# --- the card


def test_a_block_shows_a_text_and_nothing_leaves_it():
    tokens = MarkdownIt('commonmark').parse(f'{literal(HOSTILE)}\n\nafter')
    assert [token.type for token in tokens if token.level == 0][:2] == ['fence', 'paragraph_open']
    assert '\x00' not in tokens[0].content and '\x1b' not in tokens[0].content
    words = tokens[0].content.split()
    assert [w for w in HOSTILE.split() if w.isascii() and w.isprintable()][5] in words


def test_a_word_in_a_table_means_nothing():
    html = MarkdownIt('gfm-like', {'html': True, 'linkify': False}).render(
        f'| a |\n| --- |\n| {plain(HOSTILE)} |\n'
    )
    assert set(re.findall(r'<(\w+)', html)) == {'table', 'thead', 'tbody', 'tr', 'th', 'td'}
    assert html.count('<td>') == 1


def test_a_hostile_model_writes_nothing_into_its_card(run):
    run.settings = run.settings.model_copy(update=dict(system_prompt=HOSTILE))
    scores = reply_rows({'base': 0.1, 'tuned': 0.8}, HOSTILE)
    scores['topic'] = scores.topic + HOSTILE
    scores['faults'] = HOSTILE
    scores.to_csv(run.path('eval_scores.csv'), index=False)
    turns = [dict(student=HOSTILE, reply=HOSTILE)]
    about = dict(model='tuned', track=HOSTILE, topic=HOSTILE, number=0)
    write_jsonl(run.path('dialogue.jsonl'), [dict(about, turns=turns)])
    pd.DataFrame([dict(about, score=0.0)]).to_csv(run.path('dialogue_scores.csv'), index=False)
    card = model_card(run, 'me/tutor', run.folder)
    tokens = MarkdownIt('gfm-like', {'html': True, 'linkify': False}).parse(card.text)
    headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == 'heading_open']
    assert headings == [
        'tutor',
        'How to run it',
        'What it was trained on',
        'How',
        'What was measured',
        'What it says',
        'Limits',
    ]
    inside = [child for token in tokens for child in token.children or []]
    kinds = {token.type for token in [*tokens, *inside]}
    assert not kinds & {'html_block', 'html_inline', 'image', 'link_open', 'hr'}
    assert '{{ 7*7 }}' in card.text  # was not evaluated
    assert ModelCard(str(card)).data.to_dict()['license'] == 'mit'


def test_the_figures_are_those_of_the_run(run):
    scores = pd.read_csv(run.path('eval_scores.csv'))
    controls = pd.read_csv(run.path('control_scores.csv'))
    card = model_card(run, 'me/tutor', run.folder)
    for _, row in pd.concat([arm_means(scores), arm_means(controls)]).iterrows():
        assert f'{row["mean"]:.2f} ({row.low:.2f} to {row.high:.2f})' in card.text.replace(
            '\\', ''
        )
    table = score_table(scores, controls)
    assert list(table.model) == ['base', 'prompted', 'tuned', 'control: constant bot']
    results = {r.metric_type: r.metric_value for r in ModelCard(str(card)).data.eval_results}
    tuned = arm_means(scores[scores.model == 'tuned']).set_index('metric')['mean']
    assert results == {name: round(value, 4) for name, value in tuned.items()}
    assert eval_results(scores[scores.model == 'base']) == []
    for text in ('worst', 'best', '0.004', 'topic 3', 'Nobody has measured'):
        assert text in card.text, text


def test_the_worst_reply_is_shown(run):
    scores = pd.read_csv(run.path('eval_scores.csv'))
    scores.loc[scores.reply == 'tuned says 5', ['socratic', 'helpful']] = 0.0
    picked = pick_replies(scores)
    assert picked['worst'].reply == 'tuned says 5'
    assert picked['best'].reply == 'tuned says 7'
    assert len(pick_replies(scores[scores.question == 'question 1?'])) == 1
    assert pick_replies(scores, 'nobody') == {}


def test_replies_that_could_not_be_judged_are_counted(run):
    scores = pd.read_csv(run.path('eval_scores.csv'))
    scores.loc[0, 'socratic'] = None
    scores.to_csv(run.path('eval_scores.csv'), index=False)
    assert '1 replies could not be judged' in model_card(run, 'me/tutor', run.folder).text


def test_a_run_without_an_evaluation_says_so(run):
    for name in ('eval_scores.csv', 'control_scores.csv'):
        run.path(name).unlink()
    card = model_card(run, 'me/tutor', run.folder)
    assert 'this run was not evaluated' in card.text
    assert '## What it says' not in card.text and 'control' not in card.text
    assert 'model-index' not in card.data.to_dict()


def test_a_licence_that_is_not_known_is_not_invented(tmp_path):
    run = make_run(tmp_path, base_model='someone/else')
    card = model_card(run, 'me/tutor', run.folder)
    assert (card.data.license, card.data.base_model) == ('other', 'someone/else')
    assert 'not known' in card.text
    assert model_card(run, 'me/tutor', run.folder, 'apache-2.0').data.license == 'apache-2.0'


def test_the_dataset_card_does_not_claim_somebody_elses_cards(run):
    rows = [json.loads(line) for line in bundled_rows()[:50]]
    ours = DatasetCard(str(shared_dataset_card(run, rows)))
    assert ours.data.license == 'mit'
    assert ours.data.configs == [dict(config_name='default', data_files='sft.jsonl')]
    assert 'were written for this project' in ours.text
    run.settings = run.settings.model_copy(update=dict(topics='/x/baking*bread*'))
    theirs = DatasetCard(str(shared_dataset_card(run, rows)))
    assert theirs.data.license == 'other'
    assert 'were written for this project' not in theirs.text
    assert r'baking\*bread\*' in theirs.text and '/x/' not in theirs.text
    assert '## In numbers' in theirs.text


# --- what goes along


def test_only_what_is_on_the_list_goes(run):
    for name in (
        '.env',
        'requests/a.json',
        'notebooks/a.ipynb',
        'chat.jsonl',
        'preferences.jsonl',
    ):
        run.path(name).parent.mkdir(exist_ok=True)
        run.path(name).write_text('private')
    names = set(list_files(stage_model(run, 'me/tutor')))
    assert {'README.md', 'model.safetensors', 'adapter/adapter_model.safetensors'} <= names
    assert {'results/eval_scores.csv', 'results/run.json', 'results/eval_plot.png'} <= names
    assert not [n for n in names if re.search(r'env|requests|ipynb|chat\.jsonl|preferences', n)]
    left = set(list_files(stage_model(run, 'me/tutor')))  # again, without what was there before
    assert left == names


def test_a_folder_of_this_machine_is_no_name_for_others(tmp_path):
    base = tmp_path / 'my_base'
    shutil.copytree(data_path('pocket', 'base'), base)
    run = make_run(tmp_path, base_model=str(base))
    plan = plan_push(run, 'me/tutor')
    assert 'model.safetensors' in list_files(plan.folder)
    card = ModelCard.load(plan.folder / 'README.md')
    assert card.data.base_model is None and 'my\\_base' in card.text
    for name in list_files(plan.folder):
        assert str(tmp_path).encode() not in (plan.folder / name).read_bytes(), name


PLANTED = {  # put together here, so that no secret stands in this file
    'an API key': 'sk-' + 'a1B2' * 6,
    'a token of the Hub': 'hf_' + 'a1B2' * 9,
    'a token of GitHub': 'ghp_' + 'a1B2' * 9,
    'a key of AWS': 'AKIA' + 'A1B2' * 4,
    'a private key': '-----BEGIN RSA ' + 'PRIVATE KEY-----',
    'a path of a machine': '/'.join(['', 'home', 'ada', 'x']),
    'a path of Windows': '\\'.join(['C:', 'Users', 'ada']),
}


@pytest.mark.parametrize('what', FORMS)
@pytest.mark.parametrize('name', ['a.csv', 'deep/b.json', 'weights.safetensors'])
def test_a_secret_stops_everything_and_is_not_repeated(tmp_path, what, name):
    path = tmp_path / 'staged' / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b'\x00\xff' + f'"{PLANTED[what]}"'.encode())
    with pytest.raises(SocraticError, match='nothing was sent') as raised:
        check_leaks(tmp_path / 'staged')
    assert what in str(raised.value) and name in str(raised.value)
    assert PLANTED[what] not in str(raised.value)


def test_this_machines_own_secrets_and_folders_are_known(tmp_path, monkeypatch):
    monkeypatch.setenv('MY_API_KEY', 'without-any-form-1')
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    staged = tmp_path / 'staged'
    staged.mkdir()
    (staged / 'a.txt').write_text(f'without-any-form-1 {TOKEN} {tmp_path}')
    found = {what for _, what in find_leaks(staged, [tmp_path])}
    assert {'the value of MY_API_KEY', 'your token of the Hub'} < found
    assert f'the path of {tmp_path.name}/' in found


# --- the push


def test_a_push_is_one_commit_of_what_was_shown(light, hub):
    plan = plan_push(light, 'me/tutor')
    assert not hub.repos, 'the plan sent something'
    url = push(plan.folder, plan.repo)
    assert url.startswith(f'{hub.address}/me/tutor/commit/')
    names = list_files(plan.folder)
    assert hub.commits == [('me/tutor', sorted(names))]
    for name in names:
        assert hub.repos['me/tutor'][name] == (plan.folder / name).read_bytes()
    assert hub.private['me/tutor']
    push(plan.folder, plan.repo)
    assert len(hub.commits) == 1, 'nothing had changed'


def test_a_dataset_goes_to_a_dataset_repository(light, hub):
    plan = plan_push(light, 'me/rows', dataset=True)
    push(plan.folder, plan.repo, plan.kind, public=True)
    files = hub.repos['datasets/me/rows']
    assert set(files) == {'README.md', 'dataset_report.json', 'sft.jsonl'}
    assert files['sft.jsonl'] == light.path('sft.jsonl').read_bytes()
    assert not hub.private['datasets/me/rows']


def test_a_push_that_dies_half_way_goes_on_where_it_stopped(light, hub):
    plan = plan_push(light, 'me/tutor')
    hub.dies_after = 1
    with pytest.raises(SocraticError, match='the same command goes on where it stopped'):
        push(plan.folder, plan.repo)
    assert hub.commits == [] and hub.repos['me/tutor'] == {}, 'half a tutor can be seen'
    (arrived,) = hub.uploads
    hub.dies_after = None
    hub.is_dead = False
    push(plan.folder, plan.repo)
    assert hub.uploads.count(arrived) == 1, 'it was sent twice'
    assert len(hub.uploads) > 1
    assert set(hub.repos['me/tutor']) == set(list_files(plan.folder))


def test_who_may_not_write_is_told_what_to_do(light, hub, monkeypatch):
    folder = stage_model(light, 'me/tutor')
    hub.refuse = 403
    with pytest.raises(SocraticError, match='may not write to me/tutor'):
        push(folder, 'me/tutor')
    hub.refuse = None
    monkeypatch.setenv('HF_TOKEN', 'somebody-elses-token')
    with pytest.raises(SocraticError, match='hf auth login') as raised:
        push(folder, 'me/tutor')
    assert 'somebody-elses-token' not in str(raised.value)
    assert not hub.commits


def test_without_a_token_nothing_is_asked(run, hub, logged_out):
    with pytest.raises(SocraticError, match='hf auth login'):
        push(run.folder, 'me/tutor')
    assert not hub.repos


@pytest.mark.parametrize('repo', ['', 'a b', 'a/b/c', '-x', 'a..b', '../a', 'x' * 200])
def test_a_name_that_is_none(light, repo):
    with pytest.raises(SocraticError, match='--repo'):
        plan_push(light, repo)


# --- the command


def call(*args):
    return CliRunner().invoke(app, ['push', *map(str, args)])


def test_the_command_shows_first_and_sends_when_told(light, hub):
    shown = call('--run', f'{light.folder}', '--repo', 'me/tutor')
    assert shown.exit_code == 0, shown.exception
    assert 'nothing was sent' in shown.output and '--yes' in shown.output
    for name, size in list_files(light.path('share', 'model')).items():
        assert re.search(rf'{size:,} +{re.escape(name)}\n', shown.output), name
    assert not hub.repos
    sent = call('--run', f'{light.folder}', '--repo', 'me/tutor', '--yes')
    assert sent.exit_code == 0, sent.exception
    assert hub.address in sent.output and len(hub.commits) == 1


def test_the_command_says_what_is_wrong_in_words(light, tmp_path):
    empty = Run.open(f'{tmp_path}/empty', settings_for('pocket'))
    done = call('--run', f'{empty.folder}', '--repo', 'me/tutor')
    assert isinstance(done.exception, SocraticError) and 'holds no adapter' in str(done.exception)
    table = light.path('eval_scores.csv')
    table.write_text(table.read_text() + f'tuned,a,b,{PLANTED["an API key"]},1,1,,\n')
    done = call('--run', f'{light.folder}', '--repo', 'me/tutor', '--yes')
    assert 'results/eval_scores.csv holds an API key' in str(done.exception)
    done = call(
        '--run', f'{light.folder}', '--repo', 'me/t', '--exclude', 'results/eval_scores.csv'
    )
    assert 'README.md holds an API key' in str(done.exception)  # the card quotes it


# --- the lines of the card

STRANGER = """
import contextlib, io, json, sys
for code in json.load(open(sys.argv[1])):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    print(json.dumps(printed.getvalue()))
"""


def code_blocks(card, language):
    tokens = MarkdownIt('commonmark').parse(card)
    return [t.content for t in tokens if t.type == 'fence' and t.info == language]


def test_the_lines_of_the_card_run_elsewhere(tmp_path, hub):
    "In a new process, with an empty cache: a merged model, an adapter on the Hub's base, a GGUF."
    pytest.importorskip('cyllama')
    from socratic_finetune.export import export_tutor

    merged = make_run(tmp_path)
    adapter = merged.path('adapter')
    folder = merged.path('export', 'ollama')
    export_tutor(merged.settings, adapter, folder, 'ollama', report=lambda line: None)
    hub.add('them/base', data_path('pocket', 'base'))
    onto_hub = make_run(tmp_path / 'other', base_model='them/base')
    codes = []
    for run, repo in ((merged, 'me/merged'), (onto_hub, 'me/adapter')):
        plan = plan_push(run, repo)
        push(plan.folder, repo)
        card = (plan.folder / 'README.md').read_text(encoding='utf8')
        codes += code_blocks(card, 'python')
        if run is merged:
            (gguf,) = [name for name in list_files(plan.folder) if name.endswith('.gguf')]
            modelfile = (plan.folder / 'Modelfile').read_text(encoding='utf8')
            assert gguf in re.search('^FROM (.+)$', modelfile, re.M)[1]
            assert [b for b in code_blocks(card, 'sh') if 'ollama create tutor -f' in b]
            system = run.settings.system_prompt
            assert codes[1].strip() == cyllama_code(repo, gguf, system, 96)
    path = tmp_path / 'codes.json'
    path.write_text(json.dumps(codes))
    env = processes.environment_without(
        'HF_', 'OPENAI_', HF_ENDPOINT=hub.address, HF_HOME=tmp_path / 'cache', NO_PROXY='127.0.0.1'
    )
    env |= dict(HF_HUB_DISABLE_XET='1', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, '-c', STRANGER, path]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    replies = [json.loads(line).strip() for line in done.stdout.splitlines()]
    tutor = Tutor.load(merged.settings, data_path('pocket', 'adapter'))
    expected = tutor.reply('Why is the sky blue?')
    assert len(codes) == len(replies) == 3
    for reply in replies:  # in 16 and in 8 bits: a later word may be another one
        assert reply.split()[:4] == expected.split()[:4]
    assert not Path(tmp_path / 'cache' / 'token').exists()
