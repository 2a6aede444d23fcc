"The evaluation: questions, arms, replies that are kept, controls, counts, scores and the stage."

import csv
import shutil

import pandas as pd
import pytest

from socratic_finetune import evaluate as evaluation_module
from socratic_finetune.config import (
    Run,
    SocraticError,
    data_path,
    read_jsonl,
    settings_for,
    write_jsonl,
)
from socratic_finetune.evaluate import (
    ARMS,
    CONTROLS,
    COUNTED,
    GOALS,
    PLOT_FILES,
    Arm,
    Evaluation,
    arm_conversation,
    collect_replies,
    control_replies,
    count_replies,
    count_reply,
    evaluate,
    evaluation_plots,
    evaluation_questions,
    goals,
    reply_fingerprint,
    run_evaluate,
    score,
    socratic_prompt,
)
from socratic_finetune.judge import CRITERIA, BuiltinJudge, Judgement
from socratic_finetune.statistics import METRICS, arm_means, comparisons
from socratic_finetune.topics import load_topics

BANK = load_topics()
ADAPTER = data_path('pocket', 'adapter')
SEED20 = evaluation_questions(BANK, 'seed20')
FEW = SEED20[:3]


class Parrot:
    "A tutor that repeats the question, and fails after a number of batches."

    def __init__(self, batches=99):
        self.batches_left = batches
        self.asked = []

    def reply_batch(self, conversations, arm='tuned', progress=None):
        if not self.batches_left:
            raise KeyboardInterrupt
        self.batches_left -= 1
        self.asked += [(arm, messages[-1]['content']) for messages in conversations]
        return [f'{arm}: {messages[-1]["content"]}' for messages in conversations]


def no_model(*arguments):
    raise AssertionError('a model was loaded although nothing is missing')


@pytest.fixture
def fourth_arm(monkeypatch):
    "An arm beside the three, by the table alone."
    arm = Arm('base', system_prompt=lambda: 'Answer with a question.')
    monkeypatch.setitem(ARMS, 'one sentence', arm)


@pytest.fixture
def parrot(monkeypatch):
    "Stands in for every model that the stage would load; it knows which adapters were asked for."
    tutor = Parrot()
    tutor.adapters = []

    def load(settings, adapter):
        tutor.adapters.append(adapter)
        return tutor

    monkeypatch.setattr(evaluation_module.Tutor, 'load', load)
    return tutor


@pytest.fixture
def run(tmp_path):
    return Run.open(f'{tmp_path}/run', settings_for('pocket'))


# --- questions


@pytest.mark.parametrize('name', ['heldout', 'validation'])
def test_all_phrasings_of_a_set_of_topics(name):
    rows = evaluation_questions(BANK, name)
    topics = getattr(BANK, name)
    assert {row['topic'] for row in rows} == {topic.topic for topic in topics}
    assert len(rows) == sum(len(topic.questions) for topic in topics)
    assert not {row['topic'] for row in rows} & {topic.topic for topic in BANK.train}
    for topic in topics:
        unseen = [row for row in rows if row['topic'] == topic.topic and not row['seen']]
        assert len(unseen) == 2


def test_the_twenty_questions_of_the_known_evaluation():
    assert len(SEED20) == 20
    assert len({row['topic'] for row in SEED20}) == 20
    assert SEED20[0]['question'] == "Explain Faraday's law."
    assert {row['kind'] for row in SEED20} == {'explain'}


def test_questions_of_a_file(tmp_path, capsys):
    context = [dict(role='user', content='Hi')]
    path = tmp_path / 'mine.jsonl'
    rows = [
        dict(question='Who won the match?', reference='We did.', context=context),
        dict(question="Explain Ohm's law."),
        dict(question="Explain Ohm's law."),
        dict(question='And why?', topic="Ohm's law", kind='why', seen=True),
        dict(q=1),
    ]
    write_jsonl(path, rows)
    match, ohm, why = evaluation_questions(BANK, path)
    assert match['topic'] == 'Who won the match?'  # no card fits
    assert (match['reference'], match['context']) == ('We did.', context)
    assert ohm['topic'] == why['topic'] == "Ohm's law"
    assert why['kind'] == 'why'
    assert why['seen'] is None  # a file cannot know
    assert 'reference' not in ohm
    assert 'mine.jsonl, line 5 is left out: no text under question' in capsys.readouterr().out


def test_questions_that_are_not_there(tmp_path):
    with pytest.raises(SocraticError, match='"heldout"'):
        evaluation_questions(BANK, 'heldou')
    empty = tmp_path / 'empty.jsonl'
    empty.write_text('{"q": 1}\n')
    with pytest.raises(SocraticError, match='holds no question'):
        evaluation_questions(BANK, empty)


# --- arms


def test_arms_differ_in_what_the_table_says():
    row = dict(question='Why?', context=[dict(role='user', content='Hi')])
    assert arm_conversation(row, 'base') == arm_conversation(row, 'tuned')
    roles = [message['role'] for message in arm_conversation(row, 'prompted')]
    assert roles == ['system', 'user', 'user']
    assert arm_conversation(row, 'prompted')[0]['content'] == socratic_prompt()
    assert ARMS['base'].model == ARMS['prompted'].model == 'base'
    assert ARMS['tuned'].model == 'tuned'


def test_an_arm_more(fourth_arm):
    replies = collect_replies(Parrot(), FEW, tuple(ARMS))
    assert [row['model'] for row in replies[::3]] == [*ARMS]
    system = arm_conversation(FEW[0], 'one sentence')[0]
    assert system == dict(role='system', content='Answer with a question.')
    assert replies[-1]['reply'].startswith('base: ')
    settings = settings_for()
    assert reply_fingerprint(settings, None, 'one sentence') != reply_fingerprint(
        settings, None, 'prompted'
    )


# --- fingerprints


@pytest.mark.parametrize(
    'changes',
    [
        dict(max_new_tokens=7),
        dict(chat_format='llama2'),
        dict(dtype='bfloat16'),
        dict(system_prompt='Be brief.'),
        dict(quantize='8bit'),
        dict(base_model='another/model'),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_shapes_replies_changes_the_fingerprint(changes):
    before = reply_fingerprint(settings_for(), ADAPTER, 'tuned')
    assert reply_fingerprint(settings_for(**changes), ADAPTER, 'tuned') != before


def test_what_does_not_shape_replies_leaves_the_fingerprint():
    before = reply_fingerprint(settings_for(), ADAPTER, 'tuned')
    assert len(before) == 12
    assert reply_fingerprint(settings_for(batch_size=3, seed=9), ADAPTER, 'tuned') == before
    prompted = reply_fingerprint(settings_for(), None, 'prompted')
    own_prompt = settings_for(system_prompt='Be brief.')  # that arm has a prompt of its own
    assert reply_fingerprint(own_prompt, None, 'prompted') == prompted


def test_an_adapter_is_known_by_its_weights(tmp_path):
    settings = settings_for()
    copy = shutil.copytree(ADAPTER, tmp_path / 'copy')
    before = reply_fingerprint(settings, ADAPTER, 'tuned')
    assert reply_fingerprint(settings, copy, 'tuned') == before
    assert reply_fingerprint(settings, None, 'base') != before
    weights = copy / 'adapter_model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1] + b'x')
    assert reply_fingerprint(settings, copy, 'tuned') != before


# --- replies


def test_replies_survive_an_interruption(tmp_path):
    options = dict(arms=('base', 'tuned'), path=tmp_path / 'replies.jsonl', batch_size=8)
    first_adapter = dict(base='1', tuned='2')
    with pytest.raises(KeyboardInterrupt):
        collect_replies(Parrot(3), SEED20, fingerprints=first_adapter, **options)
    assert len(read_jsonl(options['path'])[0]) == 20
    resumed = Parrot()
    replies = collect_replies(lambda: resumed, SEED20, fingerprints=first_adapter, **options)
    assert len(resumed.asked) == 20
    assert len(replies) == 40
    assert [row['question'] for row in replies[:20]] == [row['question'] for row in SEED20]
    assert {row['fingerprint'] for row in replies[20:]} == {'2'}
    again = collect_replies(no_model, SEED20, fingerprints=first_adapter, **options)
    assert again == replies


def test_another_adapter_is_asked_again(tmp_path):
    options = dict(arms=('base', 'tuned'), path=tmp_path / 'replies.jsonl')
    collect_replies(Parrot(), FEW, fingerprints=dict(base='1', tuned='2'), **options)
    retrained = Parrot()
    collect_replies(retrained, FEW, fingerprints=dict(base='1', tuned='3'), **options)
    assert [arm for arm, _ in retrained.asked] == 3 * ['tuned']


def test_the_same_question_in_another_context_is_another_question(tmp_path):
    path = tmp_path / 'replies.jsonl'
    collect_replies(Parrot(), FEW, ('tuned',), path)
    in_context = [dict(row, context=[dict(role='user', content='Hi')]) for row in FEW]
    tutor = Parrot()
    collect_replies(tutor, in_context, ('tuned',), path)
    assert len(tutor.asked) == 3
    assert len(read_jsonl(path)[0]) == 6


def test_an_arm_by_another_name_and_without_a_file():
    replies = collect_replies(Parrot(), FEW, ('tuned',), names=dict(tuned='seed 43'))
    assert {row['model'] for row in replies} == {'seed 43'}
    assert replies[0]['reply'] == f'tuned: {FEW[0]["question"]}'


def test_lines_that_are_no_replies_are_made_again(tmp_path):
    path = tmp_path / 'replies.jsonl'
    path.write_text('{"model": "tuned"}\nno JSON\n')
    assert len(collect_replies(Parrot(), FEW, ('tuned',), path)) == 3


# --- controls


def test_each_control_replies_to_each_question_that_has_a_card():
    rows = [*FEW, dict(question='Who won?', topic='Who won?', kind=None, seen=None)]
    replies = control_replies(rows, BANK)
    assert [row['model'] for row in replies] == [name for name in CONTROLS for _ in FEW]
    assert all(row['reply'] for row in replies)
    assert control_replies(rows, BANK) == replies
    assert control_replies(rows, BANK, seed=1) != replies


def test_the_measures_put_the_controls_in_their_places():
    replies = control_replies(evaluation_questions(BANK)[::3], BANK)
    measured = count_replies(replies, BANK)
    assert list(measured.index) == list(COUNTED)
    assert list(measured.columns) == list(CONTROLS)
    right = measured.loc['right answer']
    assert right['direct answer'] == right['answer in a question'] == 1
    assert right['constant bot'] == right['off topic'] == 0
    assert measured.loc['ends in a question', 'direct answer'] == 0
    assert measured.loc['reveals the answer', 'best guidance'] < 0.01
    own = measured.loc['asks its own question']
    assert own['best guidance'] > 0.99
    assert own['off topic'] < 0.01
    assert own['constant bot'] == 0
    assert measured.loc["asks another's question", 'off topic'] > 0.99
    assert measured.loc['different replies', 'constant bot'] < 0.02
    assert measured.loc['words (median)', 'constant bot'] == 4


def test_the_judge_puts_the_controls_in_their_places():
    rows = [row for row in evaluation_questions(BANK) if row['topic'] in BANK.by_name][::3]
    table = score(control_replies(rows, BANK), BuiltinJudge(BANK), BANK)
    means = table.groupby('model')[list(METRICS)].mean().round(3)
    socratic, helpful = means.socratic, means.helpful
    assert socratic['constant bot'] <= 0.5 and helpful['constant bot'] <= 0.25
    assert socratic['answer in a question'] <= 0.3
    assert socratic['direct answer'] <= 0.1 and helpful['direct answer'] >= 0.6
    assert means.loc['best guidance'].min() >= 0.8
    for name in ('off topic', 'repeats itself', 'withholds from who is right'):
        assert means.loc[name].max() <= 0.3, name


# --- counts


def flags_of(reply):
    topic = BANK["Faraday's law"]
    row = dict(topic=topic.topic, question=topic.questions[0].text, reply=reply)
    return {name for name, flag in count_reply(row, BANK).items() if flag}


def test_what_a_reply_does():
    faraday = BANK["Faraday's law"]
    told = {'right answer', 'answers this very question', 'reveals the answer'}
    assert flags_of(faraday.answer) == told
    assert flags_of(faraday.guiding[0]) == {'ends in a question', 'asks its own question'}
    others = flags_of(BANK["Ohm's law"].guiding[0])
    assert others == {'ends in a question', "asks another's question"}
    assert flags_of('What do you think?') == {'ends in a question'}
    assert flags_of('') == set()
    assert flags_of('She asked: "What do you think?" ') == {'ends in a question'}


def test_what_cannot_be_counted_is_missing():
    replies = [dict(FEW[0], model='tuned', reply='What do you think?')]
    replies.append(dict(model='tuned', question='Who?', topic='Who?', seen=None, reply='We?'))
    measured = count_replies(replies, BANK)['tuned']
    assert measured['replies'] == 1  # the other has no card
    assert measured['… seen phrasing'] == 0
    assert pd.isna(measured['… reserved phrasing'])
    assert measured['distinct-2'] == 1
    assert measured['commonest opening'] == 1


def test_shares_by_phrasing():
    topic = BANK["Faraday's law"]
    row = dict(model='base', topic=topic.topic, question=topic.questions[0].text)
    replies = [
        dict(row, seen=True, reply=topic.answer),
        dict(row, seen=True, reply='No idea.'),
        dict(row, seen=False, reply='No idea.'),
    ]
    measured = count_replies(replies, BANK)['base']
    assert measured['right answer'] == pytest.approx(1 / 3)
    assert measured['… seen phrasing'] == 0.5
    assert measured['… reserved phrasing'] == 0
    assert measured['different replies'] == pytest.approx(2 / 3)


# --- scores


class Tired:
    "A judge that does not answer every fifth time."

    name = 'tired'

    def __init__(self):
        self.cases = []

    def judge_many(self, cases, progress=None):
        self.cases = cases
        judgements = BuiltinJudge(BANK).judge_many(cases, progress)
        for i in range(0, len(judgements), 5):
            judgements[i] = Judgement(error='no answer within 60 s')
        return judgements


def test_a_failed_judgement_is_missing_with_its_reason():
    table = score(control_replies(SEED20[:5], BANK), Tired(), BANK)
    failed = table[table.error.notna()]
    assert len(table) == 5 * len(CONTROLS)
    assert list(failed.index) == list(range(0, len(table), 5))
    assert failed[[*METRICS, *CRITERIA]].isna().all(axis=None)
    assert table.socratic.notna().sum() == 4 * len(CONTROLS)
    assert not (table[list(METRICS)] == 0.5).any(axis=None)
    assert arm_means(table).missing.tolist() == 2 * len(CONTROLS) * [1]


def test_columns_of_the_scores():
    table = score(control_replies(FEW, BANK), BuiltinJudge(BANK), BANK)
    first = ['model', 'topic', 'question', 'reply', *METRICS]
    about = ['faults', 'card', 'basis', 'confidence']
    assert list(table.columns) == [*first, *CRITERIA, *about, 'kind', 'seen', 'error']
    assert table[list(METRICS)].apply(lambda column: column.between(0, 1)).all(axis=None)


def test_the_judge_gets_card_or_reference_but_no_arm():
    judge = Tired()
    replies = [dict(FEW[0], model='tuned', reply='Why?')]
    replies.append(
        dict(model='base', topic='x', question='Who won?', reference='We did.', reply='Who?')
    )
    score(replies, judge, BANK)
    assert judge.cases[0]['reference'] is BANK[FEW[0]['topic']]
    assert judge.cases[1]['reference'] == 'We did.'
    assert not any('model' in case for case in judge.cases)


# --- goals


def make_evaluation(replies):
    scores = score(replies, BuiltinJudge(BANK), BANK)
    return Evaluation(
        replies=replies,
        scores=scores,
        controls=scores.iloc[:0],
        counts=count_replies(replies, BANK),
        means=arm_means(scores),
        tests=comparisons(scores),
    )


def renamed(replies, names):
    return [dict(row, model=names[row['model']]) for row in replies if row['model'] in names]


def test_goals_are_met_by_the_controls_that_should_meet_them():
    replies = control_replies(SEED20, BANK)
    good = make_evaluation(renamed(replies, {'direct answer': 'base', 'best guidance': 'tuned'}))
    bad = make_evaluation(renamed(replies, {'best guidance': 'base', 'direct answer': 'tuned'}))
    assert list(goals(good).met) == len(GOALS) * ['yes']
    assert list(goals(bad).met) == len(GOALS) * ['no']
    assert list(goals(good).goal[:2]) == ['at least 0.85', 'at most 0.1']


def test_goals_of_an_arm_that_is_not_there_are_left_out():
    only_base = make_evaluation(renamed(control_replies(FEW, BANK), {'direct answer': 'base'}))
    assert set(goals(only_base).arm) == {'base'}
    assert 'Topic by topic' not in evaluation_plots(only_base)


def test_goals_that_cannot_be_measured():
    evaluation = make_evaluation(renamed(control_replies(FEW, BANK), {'direct answer': 'base'}))
    counts = evaluation.counts.copy()
    counts.loc['right answer', 'base'] = None
    unknown = goals(evaluation._replace(counts=counts))
    assert unknown[unknown.what == 'right answer'].met.item() == 'not known'


# --- the stage


def test_the_stage_writes_everything_and_loads_no_model_twice(run, parrot):
    evaluation = run_evaluate(run, questions='seed20')
    assert len(evaluation.replies) == 60
    assert len(evaluation.controls) == 20 * len(CONTROLS)
    csv_files = ('eval_scores.csv', 'control_scores.csv', 'topic_comparison.csv')
    for name in ('replies.jsonl', 'report.html', *csv_files, *PLOT_FILES.values()):
        assert run.path(name).stat().st_size > 50, name
    with open(run.path('eval_scores.csv'), encoding='utf8') as file:
        header, *lines = csv.reader(file)
    assert header[:6] == ['model', 'topic', 'question', 'reply', *METRICS]
    assert len(lines) == 60
    assert parrot.adapters == [ADAPTER]  # the bundled one, because the run has none

    stage = run.metadata['stages']['evaluate']
    assert stage['status'] == 'done'
    assert (stage['replies'], stage['failed_judgements']) == (60, 0)
    mean = evaluation.means.set_index(['model', 'metric'])['mean']['tuned', 'socratic']
    assert stage['tuned_socratic'] == round(mean, 4)
    assert len(stage['goals']) == len(GOALS)

    again = evaluate(run, questions='seed20')
    assert len(parrot.adapters) == 1
    assert again.replies == evaluation.replies
    pd.testing.assert_frame_equal(again.scores, evaluation.scores)


def test_further_adapters_are_arms(run, parrot, tmp_path):
    other = shutil.copytree(ADAPTER, tmp_path / 'other')
    weights = other / 'adapter_model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1] + b'x')
    evaluation = evaluate(run, 'seed20', adapters={'seed 43': other})
    assert list(dict.fromkeys(evaluation.scores.model)) == [*ARMS, 'seed 43']
    assert parrot.adapters == [ADAPTER, other]
    fingerprints = {row['model']: row['fingerprint'] for row in evaluation.replies}
    assert fingerprints['seed 43'] != fingerprints['tuned']
    with pytest.raises(SocraticError, match="an arm is called 'tuned' already"):
        evaluate(run, 'seed20', adapters={'tuned': other})


def test_the_fourth_arm_is_evaluated_too(run, parrot, fourth_arm):
    evaluation = evaluate(run, 'seed20')
    assert list(evaluation.counts.columns) == [*ARMS]
    assert 'one sentence' in run.path('report.html').read_text(encoding='utf8')


def test_judging_again_gives_the_same_scores(run, parrot):
    evaluation = evaluate(run, 'seed20')
    saved, _ = read_jsonl(run.path('replies.jsonl'))
    again = score(saved, BuiltinJudge(BANK), BANK)
    assert again.socratic.tolist() == evaluation.scores.socratic.tolist()


def test_failed_judgements_are_counted_in_the_report(run, parrot):
    evaluation = evaluate(run, 'seed20', judge=Tired())
    failed = int(evaluation.scores.socratic.isna().sum())
    report = run.path('report.html').read_text(encoding='utf8')
    assert failed == 12
    assert f'<th>failed judgements</th><td>{failed}</td>' in report


def test_every_plot_is_described_with_its_figures(run, parrot):
    evaluation = evaluate(run, 'seed20')
    plots = evaluation_plots(evaluation)
    assert list(plots) == list(PLOT_FILES)
    for png, alt in plots.values():
        assert png.startswith(b'\x89PNG')
        assert 'tuned' in alt
    _, frontier = plots['Asking and helping']
    for name in CONTROLS:
        assert name in frontier
