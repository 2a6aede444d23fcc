"""Replies whose order or range was written down before the judge was made to see it.

Half of `data/judge_examples.jsonl` was kept aside while the judge was written."""

import pytest

from socratic_finetune.config import data_path, read_jsonl
from socratic_finetune.judge import BuiltinJudge
from socratic_finetune.topics import load_topics

EXAMPLES, _ = read_jsonl(data_path('judge_examples.jsonl'))
KNOWN_MISSES = {  # what an example expects of the replies to a question, and does not get
    ('I think the sun goes round the earth once a day.', 'range'),
    ('I think the sun goes round the earth once a day.', 'first is better'),
    ("Huh? I'm stuck.", 'first is better'),
}


@pytest.fixture(scope='module')
def builtin():
    return BuiltinJudge(load_topics())


def as_case(example):
    "An example as a test with a name; known misses are expected to fail."
    missed = (example['question'], example['expects']) in KNOWN_MISSES
    marks = [pytest.mark.xfail(strict=True)] if missed else []
    name = f'{example["kind"]}: {example["question"][:40]}'
    return pytest.param(example, id=name, marks=marks)


@pytest.mark.parametrize('example', [as_case(example) for example in EXAMPLES])
def test_replies_are_seen_as_expected(builtin, example):
    judgements = []
    for reply in example['replies']:
        about = dict(context=example.get('context'), reference=example.get('reference'))
        judgements.append(builtin.judge(example['question'], reply, **about))
    check(example, judgements)


def check(example, judgements):
    first = judgements[0]
    expects = example['expects']
    if expects == 'card':
        assert first.card in example['cards']
    elif expects == 'error':
        assert first.error and first.socratic is None and first.helpful is None
    elif expects == 'no error':
        assert first.error is None and first.socratic is not None
    elif expects == 'same':
        for metric in ('socratic', 'helpful'):
            scores = [getattr(judgement, metric) for judgement in judgements]
            assert scores[0] == pytest.approx(scores[1], abs=example['tolerance'] + 1e-9)
    elif expects == 'first is better':
        better, worse = [getattr(judgement, example['metric']) for judgement in judgements]
        assert better > worse + example.get('margin', 0), judgements
    else:
        score = getattr(first, example['metric'])
        assert example.get('low', 0) <= score <= example.get('high', 1), first


def test_there_are_six_of_each_kind_and_half_were_kept_aside():
    kinds = {example['kind'] for example in EXAMPLES}
    for kind in kinds:
        halves = [example['half'] for example in EXAMPLES if example['kind'] == kind]
        assert len(halves) >= 6 and halves.count('kept aside') >= 3, kind
