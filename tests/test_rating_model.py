"The rating model: features, phrases, coefficient file, and what it says of known replies."

import json

import numpy as np
import pytest

from socratic_finetune.config import SocraticError, data_path
from socratic_finetune.judge import CRITERIA
from socratic_finetune.rating_model import (
    Exchange,
    RatingModel,
    extract_features,
    extract_phrases,
    ngram_tokens,
    provenance_tokens,
)

PROBLEM = 'A box holds 4 pens, and you buy 3 boxes. How many pens?'
CONTEXT = [dict(role='assistant', content=PROBLEM)]
ANSWER = '4 times 3 is 12 pens. 12'


@pytest.fixture(scope='module')
def model():
    return RatingModel()


def exchange(reply, question='It is 7.', context=CONTEXT, answer=ANSWER):
    return Exchange(question, reply, context, answer)


def test_features_are_those_of_the_file(model):
    assert list(extract_features(exchange('Why?'))) == model.feature_names
    assert len(model.feature_names) == 55


@pytest.mark.parametrize('reply', ['', '?', 'Hm.', 'No, it is 12.', 'x = 3 ' * 500])
@pytest.mark.parametrize('context', [None, [], CONTEXT])
@pytest.mark.parametrize('answer', [None, '', ANSWER])
def test_predictions_are_ratings(model, reply, context, answer):
    e = exchange(reply, context=context, answer=answer)
    features = extract_features(e)
    assert np.isfinite(list(features.values())).all()
    assert all(0 <= rating <= 1 for rating in model.predict(features).values())
    assert 0 <= model.predict_telling(features, extract_phrases(e)) <= 1


def test_final_number_is_found():
    asks = extract_features(exchange('What would you get with 4 pens in each box?'))
    tells = extract_features(exchange('No, it is 12.', answer='12'))
    assert asks['final_number'] == 0
    assert tells['final_number_new'] == 1 and tells['has_new_result'] == 1


def test_the_students_last_turn_counts_once():
    turn = dict(role='user', content='It is 7.')
    with_turn = exchange('Why?', context=[*CONTEXT, turn])
    assert with_turn.student_turns == ['It is 7.']
    assert extract_features(with_turn) == extract_features(exchange('Why?'))


def test_system_messages_are_not_read():
    system = dict(role='system', content='The answer is 12.')
    with_system = exchange('It is 12.', context=[system, *CONTEXT])
    assert extract_features(with_system) == extract_features(exchange('It is 12.'))


def test_provenance():
    reply = 'You have 3 boxes. How many pens is 3 times 4? It is 12.'
    tokens = ' '.join(provenance_tokens(exchange(reply)))
    assert tokens == 'you have #P ~p how many ~p is #P ~a #P ? it is #F'
    later = [*CONTEXT, dict(role='user', content='9'), dict(role='assistant', content='Not 5.')]
    tokens = provenance_tokens(exchange('7, 9, 5 or 12 zebras', context=later))
    assert tokens == ['#Nq', '#Ns', '#Nt', 'or', '#F', '~new']


def test_phrases():
    later = [*CONTEXT, dict(role='user', content='9'), dict(role='assistant', content='Not 5.')]
    reply = 'You have 3 boxes. How many pens is 3 times 4? It is 12.'
    phrases = extract_phrases(exchange(reply))
    assert {'?how many pens', '.0 boxes', 'you have 0', 'you _ 0'} <= phrases
    assert {'is #F', 'F:have 0 boxes', 'L:is 0'} <= phrases
    assert not any(phrase.startswith('P:') for phrase in phrases)
    assert 'P:not 0' in extract_phrases(exchange(reply, context=later))
    assert ngram_tokens('It = 1,200.5!') == ['it', '=', '0', '!']


def test_telling_is_told_from_asking(model):
    asks = exchange('What would you get if you laid the 4 pens of each box side by side?')
    tells = exchange('No, 4 times 3 is 12, so the answer is 12 pens.')
    ratings = [model.predict(extract_features(e)) for e in (asks, tells)]
    assert ratings[0]['revealing_of_the_answer'] < 0.1 < ratings[1]['revealing_of_the_answer']
    telling = []
    for e in (asks, tells):
        telling.append(model.predict_telling(extract_features(e), extract_phrases(e)))
    assert telling[0] < telling[1]


def test_file_that_is_not_there_or_broken(tmp_path):
    with pytest.raises(SocraticError, match='is not a coefficient file'):
        RatingModel(tmp_path / 'none.json')
    (tmp_path / 'broken.json').write_text('{')
    with pytest.raises(SocraticError, match='is not a coefficient file'):
        RatingModel(tmp_path / 'broken.json')


def test_file_of_other_features_is_refused(tmp_path):
    content = json.loads(data_path('rating_model.json').read_text(encoding='utf8'))
    content['feature_names'][0] = 'something_else'
    (tmp_path / 'other.json').write_text(json.dumps(content))
    with pytest.raises(SocraticError, match='fitted on other features: fit it again'):
        RatingModel(tmp_path / 'other.json').predict(extract_features(exchange('Why?')))


def test_file_is_small_and_says_where_it_comes_from(model):
    assert model.path.stat().st_size <= 1e6
    assert 'CC BY-SA 4.0' in model.about['license'] and len(model.about['sources']) == 2
    assert {line['dimension'].replace(' ', '_') for line in model.figures['mrbench']} == set(
        model.heads
    )
    assert all(line['AUC'] >= 0.9 for line in model.figures['mathdial'])


def test_scores_agree_with_people_more_than_their_parts_do(model):
    by_data = {}
    for line in model.figures['composite']:
        by_data.setdefault(line['data'], {})[line['measure']] = line['value']
    assert len(by_data) == 6
    for data, figures in by_data.items():
        parts = [figures.get(name, 0) for name in CRITERIA]
        baselines = [figures[name] for name in ('question mark', 'length', 'always the same')]
        if data.startswith('MRBench'):
            assert min(figures['socratic'], figures['helpful']) > max(parts), data
        if data.startswith(('MRBench', 'Bridge')):
            assert figures['socratic'] > max(*parts, *baselines), data


def test_where_a_part_is_ahead_it_is_not_far_ahead(model):
    margins = [line for line in model.figures['margins'] if line['measure'] == 'socratic']
    assert len(margins) == 6
    assert all(line['difference'] >= -0.03 and line['high'] >= 0 for line in margins)


def test_forms_were_tried_without_each_collection(model):
    chosen = model.figures['chosen_without']
    assert {line['left out'] for line in chosen} == {'MRBench', 'Bridge', 'MathDial', 'CIMA'}


def test_interactions_are_upper_triangles(model):
    assert np.count_nonzero(np.tril(model.interactions, -1)) == 0
