"Generating a dataset: the plan, rows that fail, work that is broken off, the report."

import json
import random
from collections import Counter

import pytest
from transformers import AutoTokenizer

from socratic_finetune.client import FatalError, Pending
from socratic_finetune.config import Run, SocraticError, data_path, read_jsonl, settings_for
from socratic_finetune.constitution import Trail
from socratic_finetune.generate import (
    MOVE_FOR_REACTION,
    WITH_IDEA,
    dataset_card,
    dataset_report,
    distinct,
    drop_repeats,
    format_forecast,
    generate,
    load_partial,
    make_row,
    map_concurrently,
    near_duplicates,
    openings,
    plan_data,
    plan_lesson,
    plan_rows,
    react,
    run_generate,
)
from socratic_finetune.prompting import encode
from socratic_finetune.rows import prompt_completion, read_rows
from socratic_finetune.teacher import PRESSURES, Turn, check_asks_anew, make_teacher
from socratic_finetune.topics import TopicBank, load_topics

BANK = load_topics()
BUILTIN = make_teacher(settings_for(), BANK)


class Teacher:
    "The built-in teacher, with drafts of one's own."

    name = 'builtin'

    def __init__(self, draft):
        self.draft = draft

    def critique(self, *args):
        return BUILTIN.critique(*args)

    def revise(self, *args):
        return BUILTIN.revise(*args)


def open_run(folder, **settings):
    return Run.open(str(folder), settings_for(**settings))


def last_words(plan):
    return [row['turns'][-1].student for row in plan]


# the plan


@pytest.fixture(scope='module')
def whole_plan():
    return plan_data(BANK, settings_for(n_rows=1600))


def test_reactions_fit_the_topic():
    topic = BANK["Ohm's law"]
    for reaction in MOVE_FOR_REACTION:
        for seed in range(20):
            idea = topic.insights[0] if reaction in WITH_IDEA else ''
            text = react(topic, reaction, random.Random(seed), idea)
            assert text.strip() and '{' not in text
            if reaction == 'wrong':
                assert topic.slip in text
            assert idea in text


def lessons(topic, n=200):
    for seed in range(n):
        yield plan_lesson(topic, topic.questions[2], random.Random(seed), exchanges=6)


def test_a_lesson_ends_within_its_exchanges():
    topic = BANK["Ohm's law"]
    for lesson in lessons(topic):
        steps = [turn.step for turn in lesson]
        assert 2 <= len(lesson) <= 6
        assert steps == sorted(steps) and steps[-1] < len(topic.guiding)


def test_a_student_who_has_the_whole_only_asks_or_takes_leave():
    topic = BANK["Ohm's law"]
    n_whole = 0
    for lesson in lessons(topic):
        moves = [turn.move for turn in lesson]
        if 'close' in moves:
            n_whole += 1
            assert set(moves[moves.index('close') :]) == {'close'}
    assert n_whole > 20


def test_a_student_sums_up_only_what_was_said():
    topic = BANK["Ohm's law"]
    ideas = {*topic.insights, *topic.key_ideas}
    for lesson in lessons(topic):
        said = [turn.idea for turn in lesson if turn.idea]
        assert {idea for idea in said if idea in ideas} or not said


def test_students_press_in_each_way_and_not_twice_in_a_row():
    pressures = Counter()
    for lesson in lessons(BANK["Ohm's law"]):
        pressed = [turn.pressure for turn in lesson]
        pressures.update(pressed)
        for first, second in zip(pressed, pressed[1:], strict=False):
            assert not first or first != second
    assert set(pressures) - {''} == set(PRESSURES)


def test_each_pressure_comes_in_several_wordings():
    topic = BANK["Ohm's law"]
    for pressure in PRESSURES:
        texts = {react(topic, pressure, random.Random(seed)) for seed in range(300)}
        assert len(texts) >= 10, pressure


def test_the_same_seed_gives_the_same_plan():
    plan = plan_rows(BANK.train, 300, seed=42)
    assert plan == plan_rows(BANK.train, 300, seed=42)
    assert plan[:100] == plan_rows(BANK.train, 100, seed=42)
    assert plan != plan_rows(BANK.train, 300, seed=43)


def test_no_row_is_on_a_held_out_topic(whole_plan):
    planned = {row['topic'] for row in whole_plan}
    assert not planned & {topic.topic for topic in BANK.heldout}


def test_validation_rows_are_on_validation_topics(whole_plan):
    topics = {row['topic'] for row in whole_plan if row['split'] == 'validation'}
    assert topics == {topic.topic for topic in BANK.validation}
    train_topics = {row['topic'] for row in whole_plan if row['split'] == 'train'}
    assert not train_topics & topics


def test_no_two_rows_end_with_the_same_words(whole_plan):
    assert len(set(last_words(whole_plan))) == len(whole_plan)


def test_topics_come_up_about_equally_often(whole_plan):
    per_topic = Counter(row['topic'] for row in whole_plan if row['topic'])
    assert max(per_topic.values()) - min(per_topic.values()) <= 4
    assert sum(len(row['turns']) > 1 for row in whole_plan) > len(whole_plan) / 4


@pytest.mark.parametrize('max_exchanges', [2, 4])
def test_the_longest_lesson_is_a_setting(max_exchanges):
    settings = settings_for(n_rows=100, lesson_share=1, max_exchanges=max_exchanges)
    assert max(len(row['turns']) for row in plan_data(BANK, settings)) == max_exchanges


@pytest.mark.parametrize('share', [0, 1])
def test_shares_of_lessons(share):
    plan = plan_rows(BANK.train, 100, seed=0, lesson_share=share, small_talk_share=0)
    assert all(row['topic'] for row in plan)
    n_conversations = sum(len(row['turns']) > 1 for row in plan)
    assert n_conversations > 80 if share else n_conversations == 0


def test_few_topics_carry_few_rows():
    plan = plan_rows(BANK.train[:2], 1000, seed=42)
    assert 200 < len(plan) < 600
    assert len(set(last_words(plan))) == len(plan)
    assert plan_rows(BANK.train[:2], 100, seed=42) == plan[:100]


# rows


def test_a_row_holds_its_conversation_and_its_trail(tmp_path):
    run = open_run(tmp_path / 'run', n_rows=60)
    plan = {row['id']: row for row in plan_data(BANK, run.settings)}
    for row in generate(run, BUILTIN, BANK):
        reply = dict(role='assistant', content=row['assistant'])
        assert row['messages'][-1] == reply
        assert Trail(**row['trail']).reply == row['assistant']
        assert prompt_completion(row)['completion'] == [reply]
        students = [m['content'] for m in row['messages'] if m['role'] == 'user']
        assert students == [turn.student for turn in plan[row['id']]['turns']]


def test_rounds_0_takes_drafts(whole_plan):
    row = make_row(whole_plan[0], BUILTIN, BANK, settings_for(rounds=0))
    assert row['assistant'] == row['trail']['draft']
    assert row['trail']['rounds'] == []


def test_a_reply_that_cannot_be_repaired_is_drafted_three_times(whole_plan):
    drafts = []

    def draft(turn, rng):
        drafts.append(turn)
        if len(drafts) < 3:
            raise SocraticError('no draft')
        return BUILTIN.draft(turn, rng)

    single = next(row for row in whole_plan if len(row['turns']) == 1)
    assert make_row(single, Teacher(draft), BANK, settings_for())['assistant']
    assert len(drafts) == 3

    def refuse(turn, rng):
        raise SocraticError('no draft')

    with pytest.raises(SocraticError, match='no draft'):
        make_row(single, Teacher(refuse), BANK, settings_for())


# near-duplicates


def test_near_duplicates_are_checked_exactly():
    letters = 'a b c d e f g h i j k l m n'
    assert near_duplicates([letters, 'q r s t', f'{letters} o']) == [(0, 2)]
    assert near_duplicates(['a b c d e f', 'f e d c b a']) == []
    assert near_duplicates(['a', 'a', 'b']) == [(0, 1)]


def test_distinct_and_openings():
    assert distinct(['a b a b'], 2) == pytest.approx(2 / 3)
    assert distinct([], 2) == 0
    counts = openings(['What do you see?', 'What do you hear?', 'Why?'])
    assert counts == {'what do you': 2, 'why': 1}


def test_repeats_are_dropped_with_their_reason():
    students = ('Explain salt in bread.', 'My loaf was bland, but why?', 'Explain salt in bread.')
    reply = 'What does salt do to a cucumber?'
    rows = [
        dict(id=i, topic='salt', user=student, assistant=reply)
        for i, student in enumerate(students)
    ]
    kept, dropped = drop_repeats(rows)
    assert [row['id'] for row in kept] == [0]
    assert [row['id'] for row in dropped] == [1, 2]
    kept, dropped = drop_repeats(rows, exchanges=True)
    assert [row['id'] for row in kept] == [0, 1]
    assert [row['reason'] for row in dropped] == ['the exchange nearly repeats that of 0']


# long jobs


def test_forecast_in_words():
    estimate = dict(requests=6100, tokens_in=3_000_000, tokens_out=600_000, cost=14.0)
    assert 'more than max_cost=$1' in format_forecast(estimate, 'gpt-4o', 1)
    assert 'more' not in format_forecast(estimate, 'gpt-4o', 1000)
    assert '$7.00' in format_forecast(estimate, 'gpt-4o', batch=True)
    assert 'cost unknown' in format_forecast(dict(estimate, cost=None), 'gpt-5x')


def test_a_torn_last_line_is_cut_off(tmp_path):
    torn = tmp_path / 'part.jsonl'
    torn.write_text('{"id": "a"}\n{"id": "b"}\n{"id": "c", "us')
    assert list(load_partial(torn)) == ['a', 'b']
    assert torn.read_text() == '{"id": "a"}\n{"id": "b"}\n'
    assert load_partial(tmp_path / 'none.jsonl') == {}


@pytest.mark.parametrize('workers', [1, 4])
def test_results_of_several_threads(workers):
    def square(x):
        if x == 3:
            raise SocraticError('three')
        if x == 5:
            raise Pending('later')
        return x * x

    results = dict(map_concurrently(range(8), square, workers))
    assert [results[x] for x in (0, 1, 2, 4, 6, 7)] == [0, 1, 4, 16, 36, 49]
    assert isinstance(results[3], SocraticError)
    assert isinstance(results[5], Pending)


@pytest.mark.parametrize('workers', [1, 4])
def test_a_fatal_error_stops_all(workers):
    stopped = []

    def fail(x):
        raise FatalError('no credit')

    with pytest.raises(FatalError, match='no credit'):
        list(map_concurrently(range(8), fail, workers, stop=lambda: stopped.append(True)))
    assert stopped == ([True] if workers > 1 else [])


@pytest.mark.parametrize('drafts_left', [1, 20])
def test_an_interrupted_run_ends_with_the_same_rows(tmp_path, drafts_left):
    left = [drafts_left]

    def draft(turn, rng):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return BUILTIN.draft(turn, rng)

    interrupted = open_run(tmp_path / 'interrupted', n_rows=30)
    with pytest.raises(KeyboardInterrupt):
        generate(interrupted, Teacher(draft), BANK)
    assert interrupted.path('sft.part.jsonl').exists()
    whole = open_run(tmp_path / 'whole', n_rows=30)
    assert generate(interrupted, bank=BANK) == generate(whole, bank=BANK)
    for name in ('sft.jsonl', 'quarantine.jsonl'):
        assert interrupted.path(name).read_bytes() == whole.path(name).read_bytes()
    assert not interrupted.path('sft.part.jsonl').exists()


def test_a_row_that_fails_goes_to_quarantine(tmp_path):
    run = open_run(tmp_path / 'run', n_rows=30)
    unlucky = plan_data(BANK, run.settings)[7]

    def draft(turn, rng):
        if turn.messages[-1]['content'] == unlucky['turns'][-1].student:
            raise SocraticError('no draft for this')
        return BUILTIN.draft(turn, rng)

    rows = generate(run, Teacher(draft), BANK)
    assert unlucky['id'] not in [row['id'] for row in rows]
    quarantined, _ = read_jsonl(run.path('quarantine.jsonl'))
    expected = dict(id=unlucky['id'], topic=unlucky['topic'], reason='no draft for this')
    assert quarantined[0] == expected
    assert len(rows) + len(quarantined) == len(plan_data(BANK, run.settings))


def test_five_neighbours_that_fail_stop_the_run(tmp_path):
    run = open_run(tmp_path / 'run', n_rows=30)

    def draft(turn, rng):
        raise SocraticError('the teacher is ill')

    with pytest.raises(SocraticError, match='five rows in a row failed; the last: the teacher'):
        generate(run, Teacher(draft), BANK)
    assert not run.path('sft.jsonl').exists()


def test_a_full_disk_is_said_in_words(tmp_path):
    run = open_run(tmp_path / 'run', n_rows=30)

    def draft(turn, rng):
        raise OSError(28, 'No space left on device', 'sft.part.jsonl')

    with pytest.raises(SocraticError, match='No space left on device; what is done is kept'):
        generate(run, Teacher(draft), BANK)


def test_few_topics_ask_each_question(tmp_path):
    run = open_run(tmp_path / 'run', n_rows=200)
    rows = generate(run, bank=TopicBank(BANK.train[:5]))
    assert len(rows) > 120
    asked = {question.text for topic in BANK.train[:5] for question in topic.questions}
    said = {message['content'] for row in rows for message in row['messages']}
    assert len(asked - said) < 0.1 * len(asked)


def test_the_stage_records_how_it_went(tmp_path):
    run = open_run(tmp_path / 'run', n_rows=20)
    rows = run_generate(run)
    stage = json.loads(run.path('run.json').read_text())['stages']['generate']
    assert stage['rows'] == len(rows)
    assert read_rows(run.path('sft.jsonl'))[0] == rows


# what is in it


@pytest.fixture(scope='module')
def bundled():
    rows, _ = read_jsonl(data_path('tutor_v1_sft.jsonl'))
    return rows


def test_the_bundled_dataset_is_varied_and_faultless(bundled):
    report = dataset_report(bundled, BANK)
    assert report['splits']['train'] >= 1500
    assert report['different_user_turns'] == report['rows']
    assert report['conversations'] > 0.25
    assert report['its_share'] < 0.04
    assert report['end_in_question'] > 0.9  # the others close a lesson
    assert report['outside_15_to_80_words'] < 0.03 * report['rows']
    for fault in ('leaks', 'ask_twice', 'discouraging', 'near_duplicates'):
        assert report[fault] == 0


def replies_of(row):
    "Each reply of a row, with the turn that it answers."
    topic = BANK.by_name.get(row['topic'])
    for i, message in enumerate(row['messages']):
        if message['role'] == 'assistant':
            yield Turn(messages=row['messages'][:i], topic=topic), message['content']


def test_no_lesson_of_the_bundled_dataset_asks_twice(bundled):
    for row in bundled:
        for turn, reply in replies_of(row):
            assert check_asks_anew(turn, reply) is None, row['id']


def test_no_reply_of_the_bundled_dataset_tells_what_the_student_has_not_said(bundled):
    for row in bundled:
        for turn, reply in replies_of(row):
            if turn.topic:
                said = ' '.join(m['content'] for m in turn.messages if m['role'] == 'user')
                told = set(turn.topic.gives_away(reply)) - set(turn.topic.gives_away(said))
                assert not told, row['id']


def test_every_reply_of_a_lesson_is_trained_on(bundled):
    tokenizer = AutoTokenizer.from_pretrained(data_path('pocket', 'base'))
    lesson = next(row for row in bundled if len(row['messages']) == 9)
    row = encode(tokenizer, lesson['messages'])
    labels = [token for token in row['labels'] if token != -100]
    replies = [m['content'] for m in lesson['messages'] if m['role'] == 'assistant']
    assert len(replies) == 4
    assert tokenizer.decode(labels).split('</s>') == [*replies, '']


def test_the_bundled_lessons_have_up_to_six_exchanges(bundled):
    lengths = Counter(sum(m['role'] == 'user' for m in row['messages']) for row in bundled)
    assert set(lengths) == {1, 2, 3, 4, 5, 6}
    assert all(lengths[n] > 50 for n in lengths)


def test_faults_are_counted():
    topic = BANK["Ohm's law"]
    rows = [
        dict(user='Why?', assistant=topic.answer, topic=topic.topic, move='begin'),
        dict(user='Why? ', assistant='What does the ammeter show?'),
    ]
    report = dataset_report(rows, BANK)
    assert (report['rows'], report['different_user_turns'], report['topics']) == (2, 1, 1)
    assert report['leaks'] == 1
    assert report['end_in_question'] == 0.5
    assert report['changed_by_critique'] == 0
    assert report['moves'] == {'begin': 1, '?': 1}


def test_an_empty_dataset_is_an_error():
    with pytest.raises(SocraticError, match='no rows'):
        dataset_report([])


def test_the_bundled_card_is_that_of_the_bundled_dataset(bundled):
    card = dataset_card(bundled, dataset_report(bundled, BANK))
    assert card == data_path('tutor_v1_sft.md').read_text(encoding='utf8')
    assert 'size_categories: [1K<n<10K]' in card
