"The command line as a person meets it: what it does, and how it says that something is wrong."

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import yaml
from filelock import FileLock

from socratic_finetune.topics import load_topics

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / 'data' / 'pocket' / 'adapter'
GOOD = dict(
    user="Explain Ohm's law.", assistant='What pushes the charge along, and what holds it back?'
)


SOCRATIC = 'from socratic_finetune.pipeline import main; main()'


def clean_environment(folder, **changes):
    "An environment without keys and without a network, its runs in a folder of the test."
    here = dict(SOCRATIC_RUNS=folder / 'runs', HF_HOME=folder / 'hub', HF_HUB_OFFLINE=1)
    more = {'PYTHONPATH': ROOT, 'COLUMNS': 120, **here, **changes}
    return processes.environment_without('OPENAI_', 'HF_', **more)


@pytest.fixture
def socratic(tmp_path):
    "Runs `socratic …` in an empty folder, in a fork."

    def call(*args, stdin=''):
        env = clean_environment(tmp_path)
        return processes.run(SOCRATIC, *args, cwd=tmp_path, env=env, stdin=stdin)

    return call


@pytest.fixture
def socratic_itself(tmp_path):
    "Runs the command as it is installed, with a network: slow, since it imports what it needs."

    def call(*args, **changes):
        return subprocess.run(
            [Path(sys.executable).with_name('socratic'), *map(str, args)],
            cwd=tmp_path,
            env=clean_environment(tmp_path, HF_HUB_OFFLINE=0, **changes),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return call


def says(done, *parts):
    "The call failed with one message that holds these parts, and no stack trace."
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert 'Traceback' not in done.stderr + done.stdout, done.stderr
    message = done.stderr.splitlines()[-1]
    assert 'socratic: ' in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr
    return message


def data_file(folder, *lines):
    path = folder / 'rows.jsonl'
    path.write_text(''.join(line + '\n' for line in lines), encoding='utf8')
    return path


# --- errors, in words


def test_no_topic_file(socratic, tmp_path):
    (tmp_path / 'cards').mkdir()
    says(
        socratic('generate', '--n', 5, '--topics', tmp_path / 'cards'),
        'no topic file in',
        str(tmp_path / 'cards'),
    )
    says(socratic('generate', '--n', 5, '--topics', tmp_path / 'nowhere'), 'no topic file in')


def test_broken_card(socratic, tmp_path):
    (tmp_path / 'cards').mkdir()
    book = yaml.safe_load(
        next((ROOT / 'data' / 'topics').glob('*.yaml')).read_text(encoding='utf8')
    )
    card = {**book['cards'][0], 'guiding': ['Say it.', 'Which?', 'Where?']}
    (tmp_path / 'cards' / 'science.yaml').write_text(
        yaml.safe_dump(dict(subject='science', cards=[card])), encoding='utf8'
    )
    says(
        socratic('generate', '--n', 5, '--topics', tmp_path / 'cards'),
        'science.yaml',
        card['topic'],
        'guiding',
        "not a question: 'Say it.'",
    )
    (tmp_path / 'cards' / 'science.yaml').write_text('cards: [', encoding='utf8')
    says(socratic('generate', '--n', 5, '--topics', tmp_path / 'cards'), 'science.yaml')


def test_line_that_is_not_json_is_set_aside_with_its_number(socratic, tmp_path):
    rows = data_file(tmp_path, *[json.dumps(GOOD)] * 4, '{"user": "Why?"', *[json.dumps(GOOD)] * 4)
    done = socratic(
        'train',
        '--data_path',
        rows,
        '--output_dir',
        tmp_path / 'adapter',
        '--base_model',
        'pocket',
        '--max_length',
        128,
        '--epochs',
        1,
    )
    assert done.returncode == 0, done.stderr
    assert (
        f'set aside: {rows} line 5:' in done.stderr
        and 'trained on 8 rows, 1 set aside' in done.stdout
    )
    assert (tmp_path / 'adapter' / 'adapter_model.safetensors').is_file() and (
        tmp_path / 'adapter' / 'adapter_config.json'
    ).is_file()


def test_empty_dataset(socratic, tmp_path):
    says(
        socratic(
            'train', '--data_path', data_file(tmp_path), '--output_dir', tmp_path / 'adapter'
        ),
        'rows.jsonl',
        'no usable row',
    )
    says(
        socratic(
            'train',
            '--data_path',
            tmp_path / 'nowhere.jsonl',
            '--output_dir',
            tmp_path / 'adapter',
        ),
        'nowhere.jsonl',
    )
    says(
        socratic(
            'train',
            '--data_path',
            data_file(tmp_path, '{"question": "Why?"}'),
            '--output_dir',
            tmp_path / 'adapter',
        ),
        '1 set aside',
        'user',
    )
    assert not (tmp_path / 'adapter').exists()


@pytest.mark.parametrize('base', ['nobody/has-this-model', './nowhere', 'nothing'])
def test_base_model_neither_folder_nor_reachable(socratic_itself, tmp_path, base):
    rows = data_file(tmp_path, json.dumps(GOOD))
    message = says(
        socratic_itself(
            'train',
            '--data_path',
            rows,
            '--output_dir',
            tmp_path / 'adapter',
            '--base_model',
            base,
        ),
        base,
    )
    assert 'folder' in message


def test_folder_that_is_no_model(socratic, tmp_path):
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'config.json').write_text('{}')
    says(
        socratic(
            'train',
            '--data_path',
            data_file(tmp_path, json.dumps(GOOD)),
            '--output_dir',
            tmp_path / 'adapter',
            '--base_model',
            tmp_path / 'model',
        ),
        'model',
    )


def test_adapter_of_another_base(socratic, tmp_path):
    says(
        socratic(
            'infer',
            'Why?',
            '--model_dir',
            BUNDLED,
            '--base_model',
            'TinyLlama/TinyLlama-1.1B-Chat-v1.0',
        ),
        "trained on 'pocket'",
        'TinyLlama',
    )
    shutil.copytree(BUNDLED, tmp_path / 'adapter')
    config = tmp_path / 'adapter' / 'adapter_config.json'
    config.write_text(
        json.dumps({**json.loads(config.read_text()), 'base_model_name_or_path': 'somebody/else'})
    )
    says(
        socratic('chat', '--model_dir', tmp_path / 'adapter', stdin='Why?\n'),
        "trained on 'somebody/else'",
    )
    says(socratic('infer', 'Why?', '--model_dir', tmp_path), 'holds no adapter')


def test_run_folder_of_other_settings(socratic, tmp_path):
    assert socratic('generate', '--n', 6, '--run', 'mine').returncode == 0
    before = (tmp_path / 'runs' / 'mine' / 'sft.jsonl').read_bytes()
    says(
        socratic('generate', '--n', 7, '--run', 'mine'),
        "run 'mine' was started with n_rows=6, not 7",
        'choose another run name',
    )
    says(
        socratic('run', '--profile', 'tinyllama', '--run', 'mine'),
        "profile='pocket', not 'tinyllama'",
    )
    assert (tmp_path / 'runs' / 'mine' / 'sft.jsonl').read_bytes() == before


def some_cards(folder, n=5):
    "A folder of a subject of one's own: the first cards of the project's own file on statistics."
    folder.mkdir()
    cards = yaml.safe_load(
        (ROOT / 'data' / 'topics' / 'statistics.yaml').read_text(encoding='utf8')
    )['cards'][:n]
    (folder / 'mine.yaml').write_text(
        yaml.safe_dump(dict(subject='mine', cards=cards)), encoding='utf8'
    )
    return {c['topic'] for c in cards}


def rows_of(run):
    return [
        json.loads(line) for line in (run / 'sft.jsonl').read_text(encoding='utf8').splitlines()
    ]


def test_a_run_keeps_to_cards_of_ones_own(socratic, tmp_path):
    topics, mine = some_cards(tmp_path / 'cards'), tmp_path / 'runs' / 'mine'
    done = socratic('generate', '--n', 40, '--topics', 'cards', '--run', 'mine')
    assert done.returncode == 0 and '5 topics to teach' in done.stdout, done.stderr
    first = (mine / 'sft.jsonl').read_bytes()
    assert {r['topic'] for r in rows_of(mine)} - {None} == topics
    assert (
        socratic('generate', '--run', 'mine').returncode == 0
        and (mine / 'sft.jsonl').read_bytes() == first
    )
    (tmp_path / 'others').mkdir()
    shutil.copy(tmp_path / 'cards' / 'mine.yaml', tmp_path / 'others')
    says(
        socratic('generate', '--run', 'mine', '--topics', 'others'),
        "run 'mine' was started with topics=",
        'others',
    )


def test_few_topics_carry_few_rows(socratic, tmp_path):
    some_cards(tmp_path / 'cards')
    few = ('--topics', 'cards', '--set', 'lesson_share=0.3', '--set', 'opening=varied')
    done = socratic('generate', '--n', 2000, *few, '--run', 'mine')
    assert done.returncode == 0 and 'n_rows=2,000 becomes' in done.stdout, done.stderr
    planned = int(done.stdout.split('5 topics carry at most ')[1].split()[0].replace(',', ''))
    assert 200 < planned < 600 and len(rows_of(tmp_path / 'runs' / 'mine')) > 0.5 * planned


def test_sixth_topic_is_held_out_and_said_to_be(socratic, tmp_path):
    some_cards(tmp_path / 'cards', 6)
    done = socratic('generate', '--n', 10, '--topics', 'cards', '--run', 'mine')
    assert '5 topics to teach, 1 held out: ' in done.stdout, done.stderr


def test_a_run_keeps_to_a_constitution_of_ones_own(socratic, tmp_path):
    book = yaml.safe_load((ROOT / 'data' / 'constitution.yaml').read_text(encoding='utf8'))
    some = [p for p in book['principles'] if p['key'] in ('no_reveal', 'asks_first')]
    (tmp_path / 'mine.yaml').write_text(yaml.safe_dump(dict(principles=some)), encoding='utf8')
    done, mine = (
        socratic('generate', '--n', 20, '--constitution', 'mine.yaml', '--run', 'mine'),
        tmp_path / 'runs' / 'mine',
    )
    assert done.returncode == 0, done.stderr
    first, looked_at = (
        (mine / 'sft.jsonl').read_bytes(),
        {
            v['principle']
            for r in rows_of(mine)
            for x in r['trail']['rounds']
            for v in x['verdicts']
        },
    )
    assert looked_at == {'no_reveal', 'asks_first'}
    assert json.loads((mine / 'run.json').read_text(encoding='utf8'))['settings'][
        'constitution'
    ] == str(tmp_path / 'mine.yaml')
    assert (
        socratic('generate', '--run', 'mine').returncode == 0
        and (mine / 'sft.jsonl').read_bytes() == first
    )


def test_no_constitution(socratic, tmp_path):
    def call(file):
        return socratic('generate', '--n', 5, '--constitution', file, '--run', 'mine')

    says(call('nowhere.yaml'), 'nowhere.yaml is not a constitution', 'No such file')
    (tmp_path / 'list.yaml').write_text('- be kind')
    says(
        call('list.yaml'),
        'list.yaml is not a constitution',
        'no list `principles`',
        'key, text, critique_request and revision_request',
    )
    (tmp_path / 'half.yaml').write_text('principles: [{key: kind, text: Be kind.}]')
    says(call('half.yaml'), 'kind, critique_request: field required')
    assert not (tmp_path / 'runs' / 'mine').exists(), (
        'a run was started with a broken constitution'
    )
    playful = dict(key='playful', text='Be playful.')
    playful |= dict(critique_request='Would a child smile?', revision_request='Make it a game.')
    (tmp_path / 'playful.yaml').write_text(yaml.safe_dump(dict(principles=[playful])))
    says(call('playful.yaml'), "the built-in teacher cannot judge 'playful'", 'openai')


def test_no_critique_leaves_drafts(socratic, tmp_path):
    assert socratic('generate', '--n', 40, '--set', 'rounds=0', '--run', 'drafts').returncode == 0
    rows = rows_of(tmp_path / 'runs' / 'drafts')
    assert rows and all(
        r['assistant'] == r['trail']['draft'] and not r['trail']['rounds'] for r in rows
    )


def test_training_settings_may_change_until_training_starts(socratic, tmp_path):
    assert socratic('generate', '--n', 6, '--run', 'mine').returncode == 0
    done = socratic('train', '--run', 'mine', '--epochs', 1, '--learning_rate', '3e-3')
    assert done.returncode == 0, done.stderr
    says(
        socratic('train', '--run', 'mine', '--epochs', 2),
        "run 'mine' was started with num_train_epochs=1.0, not 2.0",
    )


def test_no_key(socratic, tmp_path):
    for args in (
        ['generate', '--teacher', 'openai'],
        [
            'judge',
            '--data_path',
            data_file(tmp_path, json.dumps(dict(question='Why?', reply='Who?'))),
            '--judge',
            'openai',
        ],
    ):
        says(socratic(*args), 'OPENAI_API_KEY is not set', '.env', 'builtin')


def test_misspelt_settings(socratic):
    profiles = 'pocket, smollm2, tinyllama'
    says(socratic('run', '--profile', 'huge'), "profile 'huge' is not known", profiles)
    says(socratic('run', '--set', 'learnrate=1'), 'learnrate', 'learning_rate')
    says(socratic('run', '--n', 0), 'n_rows=0')
    says(socratic('report', '--run', 'never'), 'holds no run')
    assert socratic('runn').returncode == 2


# --- the pipeline


def test_failed_notebook_says_its_message_and_no_stack_trace(socratic, tmp_path):
    done = socratic('run', '--run', 'mine', '--teacher', 'openai')
    says(done, 'OPENAI_API_KEY is not set')
    assert '[1/5] generate' in done.stdout
    assert (
        json.loads((tmp_path / 'runs' / 'mine' / 'run.json').read_text())['stages']['generate'][
            'status'
        ]
        == 'failed'
    )


def test_second_process_in_a_run_is_refused(socratic, tmp_path):
    assert socratic('generate', '--n', 5, '--run', 'mine').returncode == 0
    with FileLock(tmp_path / 'runs' / 'mine' / '.lock'):
        for command in (['generate', '--n', 5], ['train'], ['run']):
            says(socratic(*command, '--run', 'mine'), 'another process is working in')
    assert socratic('generate', '--n', 5, '--run', 'mine').returncode == 0


def test_killed_process_leaves_no_lock_and_a_run_to_go_on_with(socratic, tmp_path):
    env = clean_environment(tmp_path)
    args = ['generate', '--n', 300, '--run', 'cut']
    work = processes.Fork(SOCRATIC, *args, cwd=tmp_path, env=env)
    part = tmp_path / 'runs' / 'cut' / 'sft.part.jsonl'
    for _ in range(1000):
        if part.exists() and part.stat().st_size > 20_000:
            break
        time.sleep(0.02)
    work.send_signal(signal.SIGKILL)
    assert work.wait().returncode == -signal.SIGKILL
    kept = part.read_text(encoding='utf8').splitlines()[:-1]
    assert 0 < len(kept) < 300
    done = socratic('generate', '--run', 'cut')
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / 'runs' / 'cut' / 'sft.jsonl').read_text(encoding='utf8').splitlines()
    assert len(rows) > 280 and set(kept) <= set(rows) and not part.exists()


# --- the commands that people know


def test_infer_and_chat_answer(socratic):
    done = socratic('infer', "Explain Faraday's law.", '--model_dir', BUNDLED, '--arm', 'both')
    assert done.returncode == 0, done.stderr
    base, tuned = done.stdout.strip().splitlines()
    assert (
        base.startswith('base: ')
        and tuned.startswith('tuned: ')
        and tuned.endswith('?')
        and base[6:] != tuned[7:]
    )
    piped = socratic('chat', '--model-dir', BUNDLED, stdin="Explain Faraday's law.\nexit\n")
    assert piped.returncode == 0 and piped.stdout.strip() == tuned[7:].strip()
    assert socratic('infer', stdin="Explain Faraday's law.\n").stdout.strip() == tuned[7:].strip()


def test_judge_tells_how_well_it_agrees_with_people(socratic):
    done = socratic('judge', '--figures')
    assert (
        done.returncode == 0
        and 'revealing of the answer' in done.stdout
        and 'AUC' in done.stdout
        and ' to ' in done.stdout
    )


def test_judge_scores_a_file(socratic, tmp_path):
    card = load_topics()["Ohm's law"]
    ask, replies = (
        card.questions[0].text,
        (card.answer, f'A fair question about {card.topic}. {card.knows} {card.guiding[0]}'),
    )
    told, asked = (json.dumps(dict(question=ask, reply=r)) for r in replies)
    done = socratic(
        'judge',
        '--data_path',
        data_file(tmp_path, told, 'no json', asked),
        '--output_path',
        tmp_path / 'scores.csv',
    )
    assert done.returncode == 0, done.stderr
    told, broken, asked = csv.DictReader((tmp_path / 'scores.csv').open(encoding='utf8'))
    assert float(told['socratic']) < 0.3 < 0.7 < float(asked['socratic'])
    assert broken['socratic'] == '' and 'line 2' in broken['error']


def test_the_command_itself_is_light(socratic_itself):
    done = socratic_itself('--help', PYTHONPROFILEIMPORTTIME=1)
    assert done.returncode == 0 and 'evaluate' in done.stdout
    imported = {line.split('|')[-1].strip() for line in done.stderr.splitlines()}
    assert 'typer' in imported
    assert not imported & {'torch', 'transformers', 'datasets', 'openai', 'pandas'}


def test_judge_of_nothing_that_can_be_judged_is_not_done(socratic, tmp_path):
    nothing = data_file(tmp_path, 'no json', json.dumps(dict(question='Why?')))
    done = socratic('judge', nothing, '--out', tmp_path / 'scores.csv')
    says(done, 'none of 2 replies was judged: line 1', 'column error')
    assert (tmp_path / 'scores.csv').is_file()


@pytest.mark.parametrize(
    'command, flags',
    {
        'generate': ['n'],
        'train': ['data_path', 'output_dir', 'base_model', 'max_length'],
        'infer': ['model_dir'],
        'chat': ['model_dir'],
        'evaluate': ['base_model', 'tuned_dir', 'output_dir'],
        'dialogue': ['base_model', 'tuned_dir', 'output_dir'],
        'run': ['profile', 'run'],
    }.items(),
    ids=lambda x: x if isinstance(x, str) else '',
)
def test_flags_in_both_spellings(socratic, command, flags):
    helped = socratic(command, '--help').stdout
    for f in flags:
        assert f'--{f}' in helped and f'--{f.replace("_", "-")}' in helped
