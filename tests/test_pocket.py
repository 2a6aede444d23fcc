"The pocket base model: its corpus, tokenizer, batches, optimizers, and a build that resumes."

import hashlib
import json
import math
import random

import pytest
import torch
from fastcore.test import test_close as assert_close
from transformers import AutoTokenizer

from socratic_finetune import pocket
from socratic_finetune.config import data_path
from socratic_finetune.pocket import (
    SPECIAL_TOKENS,
    UNSEEN_THINGS,
    Muon,
    add_noise,
    as_text,
    build_base,
    chat_document,
    check_statement,
    classify_question,
    data_digest,
    direct_exchange,
    encode_documents,
    exercise_page,
    exercise_series,
    follow_up,
    learning_rate_factor,
    lesson,
    load_progress,
    make_batches,
    make_corpus,
    make_optimizers,
    new_model,
    open_questions,
    orthogonalize,
    plain_text,
    pretrain,
    request_exercise,
    smalltalk,
    textbook_page,
    train_tokenizer,
    write_exercise,
)
from socratic_finetune.topics import load_topics, questions_in, reserved_questions

BANK = load_topics()
TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1)


@pytest.fixture(scope='module')
def documents():
    return make_corpus(BANK, passes=1)


@pytest.fixture(scope='module')
def tokenizer(documents):
    return train_tokenizer([plain_text(document) for document in documents[:800]], 800)


# the corpus


def test_the_corpus_is_that_of_the_bundled_model(documents):
    digest = hashlib.sha256(json.dumps(documents).encode()).hexdigest()
    assert digest.startswith('b6e2c4955f009fb1')


def test_the_bundled_model_was_made_from_the_data_that_lies_there():
    metadata = json.loads((data_path('pocket', 'base') / 'pocket.json').read_text())
    assert metadata['data'] == data_digest()
    assert metadata['topics'] == len(BANK)
    assert sum(path.stat().st_size for path in data_path('pocket', 'base').iterdir()) < 25e6


def test_a_series_asks_nothing_twice_and_answers_no_question_by_a_question():
    for topic in BANK.topics[::10]:
        for seed in range(10):
            exchanges = exercise_series(topic, random.Random(seed))
            answers = [assistant['content'] for _, assistant in exchanges]
            assert len(set(answers)) == len(answers) >= 3
            assert all(topic.topic in answer for answer in answers)
            for user, assistant in exchanges[1:]:
                assert not (questions_in(user['content']) and questions_in(assistant['content']))


def test_statements_are_called_true_or_false():
    topic = BANK["Ohm's law"]
    right = {*topic.insights, *topic.key_ideas, topic.answer}
    said = set()
    for seed in range(60):
        user, assistant = check_statement(topic, random.Random(seed))
        is_right = any(text in user['content'] for text in right)
        said.add(assistant['content'].split()[0].strip('.,'))
        assert assistant['content'].startswith('True' if is_right else 'False')
    assert said == {'True', 'False'}


def test_the_same_seed_makes_the_same_corpus(documents):
    assert make_corpus(BANK, 1, seed=0) == documents
    assert make_corpus(BANK, 1, seed=1) != documents


def test_only_training_topics_get_lessons(documents):
    lessons = [d['text'] for d in documents if d.get('text', '').startswith('# A lesson')]
    assert len(lessons) > 0.8 * len(BANK.train)
    for topic in BANK.heldout + BANK.validation:
        for question in topic.asks:
            assert not [text for text in lessons if question in text], topic.topic


def user_turns(documents):
    "Pairs of a student's message and the answer to it."
    for document in documents:
        messages = document.get('messages', [])
        for message, answer in zip(messages, messages[1:], strict=False):
            if message['role'] == 'user':
                yield message['content'], answer['content']


def test_questions_on_other_topics_are_not_answered_with_questions(documents):
    pairs = list(user_turns(documents))
    for topic in BANK.heldout + BANK.validation:
        own = {question.text for question in topic.questions}
        answered = [answer for question, answer in pairs if question in own]
        assert not [answer for answer in answered if questions_in(answer)], topic.topic


def test_reserved_phrasings_are_not_asked(documents):
    asked = {question for question, _ in user_turns(documents)}
    for topic in BANK:
        assert not asked & {question.text for question in reserved_questions(topic)}


def test_unseen_things_are_not_in_the_corpus(documents):
    unseen = smalltalk()['things'][-UNSEEN_THINGS:]
    asked = {question for question, _ in user_turns(documents)}
    for thing in unseen:
        questions = {template.format(x=thing) for template in smalltalk()['ask_unknown']}
        assert not asked & questions


def test_noise_leaves_a_question():
    question = 'Why is the sky blue at noon and red at dusk?'
    noisy = [add_noise(question, random.Random(seed)) for seed in range(200)]
    assert question in noisy
    assert len(set(noisy)) > 50
    assert all(text.strip() for text in noisy)
    assert [add_noise('Ohm', random.Random(seed)) for seed in range(50)]


@pytest.mark.parametrize('make', [direct_exchange, follow_up, request_exercise, classify_question])
def test_an_exchange_is_a_question_and_an_answer(make):
    topic = BANK['tides']
    for seed in range(30):
        user, assistant = make(topic, random.Random(seed))
        assert (user['role'], assistant['role']) == ('user', 'assistant')
        assert user['content'] and assistant['content']
        assert '{' not in user['content'] + assistant['content']


def test_an_exercise_ends_with_a_question_of_its_topic():
    topic = BANK['tides']
    for seed in range(50):
        assert questions_in(write_exercise(topic, random.Random(seed)))[-1] in topic.asks


def test_pages_and_lessons():
    topic = BANK['tides']
    rng = random.Random(0)
    assert topic.answer in textbook_page(topic, rng)['text']
    assert exercise_page(topic, rng)['text'].startswith(f'# Exercises: {topic.topic}\n')
    pairs = lesson(topic, open_questions(topic)[0], rng, exchanges=3)
    assert 1 <= len(pairs) <= 3
    assert all(questions_in(teacher) for _, teacher in pairs)


# tokenizer, labels, batches


def test_every_text_can_be_written(tokenizer):
    text = 'Ünïcode — and 数学'
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.convert_ids_to_tokens(list(range(6))) == SPECIAL_TOKENS


def test_only_the_assistant_has_labels(tokenizer):
    messages = [
        dict(role='user', content='why?'),
        dict(role='assistant', content='Because.'),
        dict(role='user', content='what?'),
        dict(role='assistant', content='That.'),
    ]
    chat, page = dict(messages=messages), dict(text='A page.')
    encoded = encode_documents([chat, page], tokenizer)
    decoded = []
    for document, (ids, labels) in zip([chat, page], encoded, strict=True):
        assert tokenizer.decode(ids) == as_text(document, tokenizer)
        decoded.append(tokenizer.decode([label for label in labels if label != -100]))
    assert decoded == ['Because.</s>That.</s>', '<s>A page.</s>']


def test_long_documents_are_cut_off(tokenizer, documents):
    for ids, labels in encode_documents(documents[:50], tokenizer, max_length=20):
        assert len(ids) == len(labels) <= 20


@pytest.mark.parametrize('tokens', [64, 2048])
def test_every_document_is_in_one_batch(tokenizer, documents, tokens):
    encoded = encode_documents(documents[:200], tokenizer)
    batches = make_batches(encoded, tokens, seed=0)
    rows = []
    for batch in batches:
        n_rows, width = batch['input_ids'].shape
        assert width % 16 == 0
        assert n_rows * width <= tokens or n_rows == 1  # a document is never cut
        for ids, labels in zip(batch['input_ids'], batch['labels'], strict=True):
            length = int((ids != 0).sum())
            assert (ids[length:] == 0).all() and (labels[length:] == -100).all()
            rows.append((ids[:length].tolist(), labels[:length].tolist()))
    assert sorted(rows) == sorted(encoded)


# training


def test_orthogonalized_matrices_have_singular_values_near_1():
    generator = torch.Generator().manual_seed(0)
    for shape in [(3, 40, 24), (3, 24, 40), (1, 8, 8)]:
        matrices = torch.randn(*shape, generator=generator)
        singular_values = torch.linalg.svdvals(orthogonalize(matrices))
        assert singular_values.min() > 0.3 and singular_values.max() < 1.3


def test_a_step_of_muon():
    weight = torch.nn.Parameter(torch.ones(4, 8))
    gradient = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    weight.grad = gradient.clone()
    Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    velocity = 0.1 * gradient
    update = orthogonalize((gradient + 0.9 * (velocity - gradient))[None])[0]
    expected = torch.ones(4, 8) * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(8) * update
    assert_close(weight.data, expected, eps=1e-5)


def test_every_parameter_has_one_optimizer():
    model = new_model(500, **TINY)
    optimizers = make_optimizers(model, 1e-2, 1e-3)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    ids = [id(p) for group in groups for p in group['params']]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    for group in optimizers[0].param_groups:
        assert len({p.shape for p in group['params']}) == 1


def test_learning_rates_rise_and_fall():
    factors = [learning_rate_factor(step, 100, 10, 0.5) for step in range(1, 101)]
    assert_close(factors[0], 0.1)
    assert factors[9] == factors[49] == 1
    assert_close(factors[-1], 1 / 50)
    assert factors[50:] == sorted(factors[50:], reverse=True)


def test_training_lowers_the_loss(tokenizer, documents):
    torch.manual_seed(0)
    batches = make_batches(encode_documents(documents[:600], tokenizer), 512, seed=0)
    model = new_model(len(tokenizer), **TINY)
    lines = []
    log = pretrain(batches, model, warmup_steps=5, compiled=False, report=lines.append)
    assert [entry['step'] for entry in log][-1] == len(batches) > 200
    assert len(lines) == len(log)
    assert log[-1]['tokens'] == sum(batch['input_ids'].numel() for batch in batches)
    assert log[-1]['loss'] < log[0]['loss'] < math.log(len(tokenizer))


def test_a_build_resumes_after_its_last_phase(tmp_path, monkeypatch):
    small = chat_document([direct_exchange(BANK['tides'], random.Random(0))], random.Random(0))
    trained = []

    def quick_pretrain(batches, model, lr, embedding_lr, decay, checkpoint, report):
        trained.append(lr)
        how = dict(compiled=False, checkpoint=checkpoint, report=report)
        return pretrain(batches, model, lr, embedding_lr, 2, decay, **how)

    monkeypatch.setattr(pocket, 'pretrain', quick_pretrain)
    corpora = dict(everything=lambda bank, passes, seed: [small] * 8 * passes)
    monkeypatch.setattr(pocket, 'CORPORA', corpora)
    monkeypatch.setattr(pocket, 'SIZES', {**pocket.SIZES, **TINY})
    first = dict(name='first', passes=1, lr=1e-2, embedding_lr=1e-2, decay=0.5, seed=0)
    second = dict(first, name='second', lr=1e-3, seed=1)
    build_base(tmp_path, (first,), batch_tokens=512, report=lambda line: None)
    metadata = build_base(tmp_path, (first, second), batch_tokens=512, report=lambda line: None)
    assert trained == [1e-2, 1e-3]
    assert [phase['name'] for phase in metadata['phases']] == ['first', 'second']
    assert metadata['phases'][1]['documents'] == 8
    assert json.loads((tmp_path / 'pocket.json').read_text()) == metadata
    assert build_base(tmp_path, (first, second)) == metadata
    assert trained == [1e-2, 1e-3]


def test_the_same_seed_trains_the_same_weights(tokenizer, documents):
    batches = make_batches(encode_documents(documents[:200], tokenizer), 1024, seed=0)[:20]
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = new_model(len(tokenizer), **TINY)
        pretrain(batches, model, compiled=False, report=lambda line: None)
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)


def test_the_bundled_model_is_small():
    folder = data_path('pocket', 'base')
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25e6
    metadata = json.loads((folder / 'pocket.json').read_text(encoding='utf8'))
    vocab_size = len(AutoTokenizer.from_pretrained(folder))
    assert new_model(vocab_size).num_parameters() == metadata['parameters']


def test_training_resumes_with_all_that_it_had(tmp_path):
    rows = [([1, 6, 7, 8, 2], [1, 6, 7, 8, 2]) for _ in range(110)]
    batches = make_batches(rows, tokens=16, seed=0, multiple=1)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    path = tmp_path / 'progress.safetensors'

    def stop(line):
        raise InterruptedError

    model = new_model(64, **sizes)
    batches = batches * 4
    with pytest.raises(InterruptedError):
        pretrain(batches, model, compiled=False, checkpoint=path, report=stop)
    fresh = new_model(64, **sizes)
    optimizers = make_optimizers(fresh, 5e-3, 3e-3)
    log = load_progress(path, fresh, optimizers, [])
    assert log[-1]['step'] == 100
    for name, p in fresh.named_parameters():
        assert torch.equal(p, model.get_parameter(name))
    assert all(optimizer.state for optimizer in optimizers)
    lines = []
    log = pretrain(batches, fresh, compiled=False, checkpoint=path, report=lines.append)
    assert [entry['step'] for entry in log] == [100, len(batches)] and len(lines) == 1
