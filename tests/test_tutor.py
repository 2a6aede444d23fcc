"The tutor: which weights it keeps, and what it says when they do not fit."

import json
import shutil

import pytest
import torch
from tiny_models import settings

from socratic_finetune import speed, tutor
from socratic_finetune.config import SocraticError, data_path, settings_for
from socratic_finetune.speed import prepack_weights, supports_int8
from socratic_finetune.topics import load_topics, repeated_questions
from socratic_finetune.tutor import Sampler, Tutor

pytestmark = pytest.mark.xdist_group('finetune')
needs_int8 = pytest.mark.skipif(not supports_int8(), reason='this torch has no 8-bit products')


# --- weights in 8 bits --------------------------------------------------------------------------


def is_rounded(loaded):
    names = {type(module).__name__ for module in loaded.model.modules()}
    return bool(names & {'Int8Linear', 'RoundedLinear'})


@pytest.fixture
def large(tiny, monkeypatch):
    "Settings of a model that counts as large; the speed-up of 8 bits can be set."
    speedup = [2.0]
    monkeypatch.setattr(tutor, 'MAX_COPY_BYTES', 0)
    monkeypatch.setattr(tutor, 'int8_speedup', lambda dtype: speedup[0])
    return settings(tiny, dtype='bfloat16', max_new_tokens=4), speedup


@needs_int8
def test_a_large_model_is_chatted_with_in_8_bits_where_they_are_faster(large):
    made, speedup = large
    fast = Tutor.load(made, streaming=True)
    assert is_rounded(fast) and '2.0 times as fast' in fast.note
    assert isinstance(fast.reply('Why?', 'base'), str)
    speedup[0] = 1.1
    assert not is_rounded(Tutor.load(made, streaming=True))


@needs_int8
def test_a_small_model_has_nothing_to_gain(large, monkeypatch):
    monkeypatch.setattr(tutor, 'MAX_COPY_BYTES', 2**28)
    assert not is_rounded(Tutor.load(large[0], streaming=True))


@needs_int8
def test_replies_for_figures_are_not_rounded(large):
    made, _ = large
    exact = made.model_copy(update=dict(quantize='none'))
    for loaded in (Tutor.load(made), Tutor.load(exact, streaming=True)):
        assert not is_rounded(loaded) and loaded.note == ''


@needs_int8
def test_whoever_asks_for_8_bits_gets_them_or_hears_why_not(large, monkeypatch):
    made, _ = large
    assert is_rounded(Tutor.load(made.model_copy(update=dict(quantize='8bit'))))
    model = Tutor.load(made).model
    monkeypatch.setattr(speed, 'supports_int8', lambda: False)
    with pytest.raises(SocraticError, match='quantize="none"'):
        prepack_weights(model, 8)


def test_without_fast_kernels_weights_stay_as_they_are(large):
    made, _ = large
    plain = made.model_copy(update=dict(fast_kernels=False))
    loaded = Tutor.load(plain, streaming=True)
    layers = [m for name, m in loaded.model.named_modules() if name.endswith('_proj')]
    assert layers and {type(layer) for layer in layers} == {torch.nn.Linear}
    asked = plain.model_copy(update=dict(quantize='8bit'))
    with pytest.raises(SocraticError, match='fast_kernels=False keeps them out'):
        Tutor.load(asked)


# --- replies ------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def pocket_tutor():
    return Tutor.load(settings_for('pocket', max_new_tokens=32), data_path('pocket', 'adapter'))


def test_replies_are_the_same_one_by_one_together_and_without_fast_kernels(pocket_tutor):
    questions = ['Why?', 'What is a prime number?', 'Why is the sky blue, and why not at night?']
    plain_settings = pocket_tutor.settings.model_copy(update=dict(fast_kernels=False))
    plain = Tutor.load(plain_settings, data_path('pocket', 'adapter'))
    for arm in pocket_tutor.arms:
        one_by_one = [pocket_tutor.reply(question, arm) for question in questions]
        assert pocket_tutor.reply_batch(questions, arm) == one_by_one
        assert plain.reply_batch(questions, arm) == one_by_one
    assert pocket_tutor.reply_batch([]) == []
    assert pocket_tutor.reply_batch(questions[:1]) == [pocket_tutor.reply(questions[0])]


def test_finished_replies_leave_the_batch(pocket_tutor, monkeypatch):
    sizes = []
    next_tokens = tutor._Batch.next_tokens

    def record(batch, *rest):
        sizes.append(len(batch.rows))
        return next_tokens(batch, *rest)

    questions = ['Explain osmosis.', 'Hi', 'Why is the sky blue?', 'What is irony?'] * 3
    expected = [pocket_tutor.reply(q, max_new_tokens=96) for q in questions[:4]]
    monkeypatch.setattr(tutor._Batch, 'next_tokens', record)
    assert pocket_tutor.reply_batch(questions, max_new_tokens=96) == expected * 3
    assert sizes[0] == 12 and sizes[-1] < 12 and sizes == sorted(sizes, reverse=True)


def test_batches_are_of_one_size_and_reported(pocket_tutor):
    finished = []
    pocket_tutor.reply_batch(['Why?'] * 9, progress=finished.append, batch_size=4)
    assert finished == [3, 3, 3]


def test_the_cache_is_cut_where_conversations_differ(pocket_tutor):
    questions = ['What is light?', 'What is liquid?', 'Why?', 'What is light?']
    with_cache = [pocket_tutor.reply(question) for question in questions]
    without_cache = []
    for question in questions:
        pocket_tutor._caches.clear()
        without_cache.append(pocket_tutor.reply(question))
    assert with_cache == without_cache


def test_a_sampler_is_greedy_repeatable_and_penalizes():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    assert Sampler()([0], logits) == 0
    assert Sampler(repetition_penalty=3.0)([0], logits) == 1
    drawn = []
    for _ in range(2):
        sampler = Sampler(temperature=2.0, top_p=0.8, seed=1)
        drawn.append([sampler([0], logits) for _ in range(50)])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1 and 3 not in drawn[0]


# --- adapters that do not fit -------------------------------------------------------------------


def test_an_adapter_of_other_shapes_is_refused(tiny, tmp_path):
    bundled = data_path('pocket', 'adapter')
    config = json.loads((bundled / 'adapter_config.json').read_text())
    config['base_model_name_or_path'] = str(tiny)
    (tmp_path / 'adapter_config.json').write_text(json.dumps(config))
    shutil.copy(bundled / 'adapter_model.safetensors', tmp_path)
    with pytest.raises(SocraticError, match=f'does not fit {tiny}'):
        Tutor.load(settings(tiny), tmp_path)


def test_an_adapter_of_another_base_is_refused(tiny):
    with pytest.raises(SocraticError, match="was trained on 'pocket'"):
        Tutor.load(settings(tiny), data_path('pocket', 'adapter'))


STUCK = "I don't know."


def second_turns(asking_tutor, n=6):
    turns = []
    for topic in load_topics().validation[:n]:
        question = topic.questions[0].text
        reply = asking_tutor.reply(question)
        said = [dict(role='user', content=question), dict(role='assistant', content=reply)]
        turns.append([*said, dict(role='user', content=STUCK)])
    return turns


def test_a_question_asked_before_is_begun_anew_streamed_or_together(pocket_tutor):
    turns = second_turns(pocket_tutor)
    together = pocket_tutor.reply_batch(turns)
    assert together == [pocket_tutor.reply(turn) for turn in turns]
    for turn, reply in zip(turns, together, strict=True):
        assert not repeated_questions(reply, [turn[1]['content']]), reply


def test_without_other_beginnings_the_reply_is_the_models_alone(pocket_tutor):
    alone = Tutor(
        pocket_tutor.model,
        pocket_tutor.tokenizer,
        pocket_tutor.settings.model_copy(update=dict(redraws=0)),
        pocket_tutor.copies,
    )
    turn = second_turns(pocket_tutor, 1)[0]
    greedy = tutor.stream_ids(
        alone, alone.prompt(turn), 'tuned', lambda ids, logits: int(logits.argmax()), 96
    )
    expected = alone.tokenizer.decode(list(greedy), skip_special_tokens=True).strip()
    assert alone.reply(turn, max_new_tokens=96) == expected
    assert alone.reply_batch([turn], max_new_tokens=96) == [expected]


def test_a_stream_never_takes_back_what_it_has_shown(pocket_tutor, monkeypatch):
    "All beginnings lead to the same question: then the first one is asked after all."
    turn = second_turns(pocket_tutor, 1)[0]
    monkeypatch.setattr(Tutor, 'asks_anew', lambda *_: False)
    first_draw = pocket_tutor.reply_batch([turn])[0]
    assert pocket_tutor.reply(turn) == first_draw
