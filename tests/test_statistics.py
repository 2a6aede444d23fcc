"Statistics: differences by topic, intervals, tests, power and the tables made of them."

import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from socratic_finetune.config import SocraticError
from socratic_finetune.statistics import (
    arm_means,
    bootstrap_interval,
    compare,
    comparisons,
    format_comparison,
    holm,
    known_scores,
    over_seeds,
    p_values,
    power,
    topic_comparison,
    topic_differences,
    topics_needed,
)

NUMBERS = ('mean', 'low', 'high', 'p_t', 'p_wilcoxon', 'p_sign_flip', 'effect', 'rank_biserial')


def make_scores(means, topics=30, phrasings=4, seed=0):
    "Scores around each arm's true mean, with luck by topic and noise."
    rng = np.random.default_rng(seed)
    rows = []
    for arm, mean in means.items():
        luck = rng.normal(0, 0.1, (topics, 1))
        noise = rng.normal(0, 0.05, (topics, phrasings))
        for (i, j), value in np.ndenumerate(mean + luck + noise):
            row = dict(model=arm, topic=f'topic {i}', question=f'question {i}.{j}')
            rows.append(dict(**row, socratic=value, helpful=1 - value))
    return pd.DataFrame(rows)


SCORES = make_scores(dict(base=0.2, tuned=0.8))


# --- one difference for each topic


def test_a_topic_counts_once_however_many_questions_it_has():
    rows = [('base', 'a', f'q{i}', 0.0) for i in range(9)] + [('base', 'b', 'q', 0.0)]
    rows += [('tuned', 'a', f'q{i}', 1.0) for i in range(9)] + [('tuned', 'b', 'q', 0.0)]
    scores = pd.DataFrame(rows, columns=['model', 'topic', 'question', 'socratic'])
    differences = topic_differences(scores, 'socratic', 'base', 'tuned')
    assert differences.to_dict() == {'a': 1.0, 'b': 0.0}
    assert differences.mean() == 0.5


def test_a_missing_score_leaves_the_question_out_for_both_arms():
    scores = SCORES.copy()
    first = scores.question == 'question 0.0'
    scores.loc[first & (scores.model == 'tuned'), 'socratic'] = None
    differences = topic_differences(scores, 'socratic', 'base', 'tuned')
    expected = topic_differences(SCORES[~first], 'socratic', 'base', 'tuned')
    pd.testing.assert_series_equal(differences, expected)


def test_a_topic_without_any_pair_of_scores_is_left_out():
    scores = SCORES.copy()
    scores.loc[(scores.topic == 'topic 3') & (scores.model == 'base'), 'socratic'] = None
    differences = topic_differences(scores, 'socratic', 'base', 'tuned')
    assert 'topic 3' not in differences.index
    assert len(differences) == 29


def test_differences_change_sign_with_the_order_of_arms():
    there = topic_differences(SCORES, 'socratic', 'base', 'tuned')
    back = topic_differences(SCORES, 'socratic', 'tuned', 'base')
    pd.testing.assert_series_equal(there, -back)


def test_an_arm_that_was_not_scored():
    with pytest.raises(SocraticError, match='no scores of tund: there are base, tuned'):
        topic_differences(SCORES, 'socratic', 'base', 'tund')


# --- intervals


def test_interval_is_near_students_t():
    values = np.random.default_rng(0).normal(0.3, 1, 200)
    low, high = bootstrap_interval(values)
    exact = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(exact, abs=0.02)


def test_interval_of_many_samples_is_that_of_each():
    values = np.random.default_rng(1).normal(0, 1, (3, 20))
    low, high = bootstrap_interval(values, resamples=999)
    assert low.shape == high.shape == (3,)
    for row, row_low, row_high in zip(values, low, high, strict=True):
        assert row_low < row.mean() < row_high


def test_interval_is_the_same_for_the_same_seed():
    values = np.random.default_rng(2).normal(0, 1, 43)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_more_confidence_makes_a_wider_interval():
    values = np.random.default_rng(3).normal(0, 1, 43)
    low, high = bootstrap_interval(values, confidence=0.8)
    wider_low, wider_high = bootstrap_interval(values, confidence=0.99)
    assert wider_low < low < high < wider_high


@pytest.mark.parametrize('values', [[], [0.5]], ids=['none', 'one'])
def test_no_interval_from_fewer_than_two_topics(values):
    assert all(math.isnan(limit) for limit in bootstrap_interval(values))


def test_interval_of_equal_values_is_a_point():
    assert bootstrap_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


# --- tests


def test_sign_flips_are_enumerated_where_they_are_few():
    differences = np.array([0.3, 0.1, -0.05, 0.2, 0.4])
    signs = np.array(list(itertools.product([1, -1], repeat=5)))
    means = (signs * differences).mean(1)
    extreme = abs(means) >= abs(differences.mean()) - 1e-12
    assert p_values(differences)['sign_flip'] == pytest.approx(extreme.mean())


def test_p_values_are_scipys():
    differences = np.random.default_rng(4).normal(0.2, 1, 43)
    p = p_values(differences)
    assert p['t'] == stats.ttest_1samp(differences, 0).pvalue
    assert p['wilcoxon'] == stats.wilcoxon(differences).pvalue
    assert p['sign_flip'] == pytest.approx(p['t'], abs=0.03)


def test_holm_is_monotone_and_never_below_the_p_value():
    p = list(np.random.default_rng(5).uniform(0, 0.2, 8))
    corrected = holm(p)
    order = np.argsort(p)
    assert all(np.diff(np.array(corrected)[order]) >= 0)
    assert all(after >= before for before, after in zip(p, corrected, strict=True))
    assert min(corrected) == pytest.approx(8 * min(p))


@pytest.mark.parametrize(
    ('p', 'corrected'),
    [
        ([], []),
        ([0.02], [0.02]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.9, 0.8], [1.0, 1.0]),
    ],
)
def test_holm(p, corrected):
    assert holm(p) == pytest.approx(corrected)


# --- comparisons


def test_a_known_effect_is_found():
    differences = np.random.default_rng(6).normal(0.3, 0.3, 43)
    result = compare(differences)
    assert result['low'] > 0
    assert max(result[name] for name in ('p_t', 'p_wilcoxon', 'p_sign_flip')) < 0.001
    assert result['better'] + result['worse'] == result['topics'] == 43
    assert 0.5 < result['rank_biserial'] <= 1


def test_no_effect_is_found_where_there_is_none():
    differences = np.random.default_rng(7).normal(0, 0.3, 43)
    result = compare(differences - differences.mean())
    assert result['low'] < 0 < result['high']
    assert min(result[name] for name in ('p_t', 'p_sign_flip')) > 0.9


def test_effect_sizes_by_hand():
    differences = [0.1, 0.2, -0.3, 0.4]
    result = compare(differences)
    correction = 1 - 3 / (4 * 4 - 5)
    assert result['effect'] == pytest.approx(correction * 0.1 / np.std(differences, ddof=1))
    # ranks of the absolute values: 1, 2, 3, 4; the third counts against
    assert result['rank_biserial'] == pytest.approx((1 + 2 - 3 + 4) / 10)


@pytest.mark.parametrize(
    'differences',
    [[1.0] * 20, [0.0] * 20, [0.3], [], [0.1, 0.2], [0, 0, 0, 0.5], [-0.1] * 3],
    ids=['all 1', 'all 0', 'one', 'none', 'two', 'mostly 0', 'all negative'],
)
def test_what_cannot_be_told_is_none_and_said(differences):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        result = compare(differences)
    for name in NUMBERS:
        assert result[name] is None or math.isfinite(result[name])
    unknown = [name for name in NUMBERS if result[name] is None]
    assert bool(unknown) == bool(result['note'])


def test_equal_differences_have_an_exact_p_value():
    result = compare([1.0] * 20)
    assert result['p_sign_flip'] == 2.0**-19
    assert result['p_t'] is None
    assert result['rank_biserial'] == 1.0
    assert compare([-0.1] * 3)['rank_biserial'] == -1.0
    assert compare([0.0] * 20)['p_sign_flip'] == 1.0


def sentence(differences, **fields):
    result = compare(differences)
    return format_comparison(
        dict(metric='helpful', before='base', after='tuned', **{**result, **fields})
    )


def test_a_comparison_as_a_sentence():
    rng = np.random.default_rng(8)
    clear = sentence(rng.normal(0.3, 0.1, 43))
    assert clear.startswith('helpful, tuned against base: +0.')
    assert '95% interval +0.' in clear
    assert 'better on 43 and worse on 0 of 43 topics' in clear
    noise = rng.normal(0, 0.1, 43)
    assert 'not to say that there is none' in sentence(noise - noise.mean() + 1e-3)
    assert 'p < 0.001' in sentence(noise, p_holm=0.0001)
    assert 'p = 0.200' in sentence(noise, p_holm=0.2)  # the corrected value goes first
    assert 'no spread for a t-test' in sentence([1.0] * 20)
    assert 'p =' not in sentence([1.0] * 20)
    assert sentence([0.0] * 3).endswith('the two arms score the same on all 3 topics.')
    assert 'nothing can be tested' in sentence([])
    assert sentence([]).startswith('helpful, tuned against base: fewer than two topics')


# --- power


def test_power_grows_with_topics_and_effect():
    by_topics = [power(0.5, topics) for topics in (10, 20, 40, 80)]
    by_effect = [power(effect, 43) for effect in (0.0, 0.2, 0.5, 1.0)]
    assert by_topics == sorted(by_topics)
    assert by_effect == sorted(by_effect)
    assert power(0.0, 43) == pytest.approx(0.05)
    assert power(-0.5, 43) == power(0.5, 43)


@pytest.mark.parametrize('effect', [0.2, 0.5, 0.8, 3.0])
def test_topics_needed_are_the_fewest(effect):
    n = topics_needed(effect)
    assert power(effect, n) >= 0.8
    assert n == 2 or power(effect, n - 1) < 0.8


def test_topics_needed_has_a_limit():
    assert topics_needed(0) is None
    assert topics_needed(0.01, limit=1000) is None
    assert topics_needed(0.5, target_power=0.9) > topics_needed(0.5)


# --- tables


def test_arm_means():
    scores = SCORES.copy()
    scores.loc[(scores.model == 'tuned') & (scores.topic == 'topic 0'), 'socratic'] = None
    table = arm_means(scores).set_index(['model', 'metric'])
    tuned = table.loc[('tuned', 'socratic')]
    assert (tuned.topics, tuned.replies, tuned.missing) == (29, 120, 4)
    assert tuned.low < tuned['mean'] < tuned.high
    by_topic = SCORES[SCORES.model == 'base'].groupby('topic').socratic.mean()
    assert table.loc[('base', 'socratic'), 'mean'] == pytest.approx(by_topic.mean())


def test_all_pairs_in_order_and_holm_over_all_of_them():
    scores = make_scores(dict(base=0.2, prompted=0.2, tuned=0.8))
    table = comparisons(scores)
    pairs = list(dict.fromkeys(zip(table.before, table.after, strict=True)))
    assert pairs == [('base', 'prompted'), ('base', 'tuned'), ('prompted', 'tuned')]
    assert list(table.p_holm) == pytest.approx(holm(list(table.p_sign_flip)))
    one_pair = comparisons(scores, [('base', 'tuned')])
    assert (one_pair.p_holm <= table[table.after == 'tuned'].p_holm.max()).all()
    assert list(table.summary) == [format_comparison(row) for row in table.to_dict('records')]


def test_topics_needed_for_a_small_difference_follow_from_the_spread():
    row = comparisons(SCORES).iloc[0]
    spread = topic_differences(SCORES, 'socratic', 'base', 'tuned').std()
    assert row['topics_for_0.05'] == topics_needed(0.05 / spread)


def test_comparisons_of_a_single_topic_say_that_nothing_can_be_tested():
    one = SCORES[SCORES.topic == 'topic 0']
    table = comparisons(one)
    assert table.summary.str.contains('nothing can be tested').all()


def test_the_known_result_comes_out_as_published():
    known = known_scores()
    assert len(known) == 40
    means = arm_means(known).set_index(['model', 'metric'])['mean']
    published = {
        ('base', 'socratic'): 0,
        ('base', 'helpful'): 0.65,
        ('tuned', 'socratic'): 1,
        ('tuned', 'helpful'): 0.415,
    }
    assert means.to_dict() == pytest.approx(published)
    helpful = comparisons(known).set_index('metric').loc['helpful']
    assert (helpful.better, helpful.worse) == (1, 12)
    assert helpful.p_holm < 0.01
    assert helpful['mean'] < 0


def test_topics_by_arm_and_metric():
    scores = SCORES.copy()
    scores.loc[(scores.model == 'base') & (scores.topic == 'topic 1'), 'helpful'] = None
    table = topic_comparison(scores)
    scored = ['socratic_base', 'socratic_tuned', 'helpful_base', 'helpful_tuned']
    assert list(table.columns) == ['topic', *scored, 'questions']
    assert list(table.topic) == list(dict.fromkeys(scores.topic))
    assert (table.questions == 4).all()
    assert table.helpful_base.isna().sum() == 1


def test_an_interval_for_the_next_seed():
    seeds = {f'seed {i}': 0.6 + 0.02 * i for i in range(3)}
    table = over_seeds(make_scores(seeds), list(seeds))
    row = table.loc['socratic']
    half_width = stats.t.ppf(0.975, 2) * row.sd * (1 + 1 / 3) ** 0.5
    assert row.seeds == 3
    assert row.lowest <= row['mean'] <= row.highest
    assert (row.low, row.high) == pytest.approx(
        (row['mean'] - half_width, row['mean'] + half_width)
    )
