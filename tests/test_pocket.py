"The pocket model: its corpus and what that leaves out, tokenizer, batches, optimizer."

import hashlib
import json
import random

import pytest
import torch
from transformers import AutoTokenizer

from socratic_finetune.config import data_path
from socratic_finetune.pocket import (
    add_noise,
    as_text,
    data_digest,
    encode_documents,
    make_batches,
    make_corpus,
    new_model,
    orthogonalize,
    plain_text,
    pretrain,
    train_tokenizer,
)
from socratic_finetune.topics import load_topics, questions_in, reserved_questions

BANK = load_topics()
UNTAUGHT = BANK.heldout + BANK.validation  # topics on which no lesson is given
CORPUS_HASH = (
    '9c10d11c697c4b9a'  # of a pass with seed 0 over the cards that made the bundled model
)
SMALL = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2)
CHAT = dict(
    messages=[
        dict(role='user', content='why is the sky bleu'),
        dict(role='assistant', content='Air scatters blue light most.'),
    ]
)


@pytest.fixture(scope='module')
def docs():
    return make_corpus(BANK, passes=2, seed=1)


@pytest.fixture(scope='module')
def tokenizer(docs):
    texts = [plain_text(doc) for doc in docs[:800]]
    return train_tokenizer(texts, 1000)


@pytest.fixture(scope='module')
def questions_and_replies(docs):
    pairs = []
    for doc in docs:
        messages = doc.get('messages', [])
        for message, following in zip(messages, messages[1:], strict=False):
            if message['role'] == 'user':
                pairs.append((message['content'], following['content']))
    return pairs


def bundled_metadata():
    return json.loads(data_path('pocket', 'base', 'pocket.json').read_text(encoding='utf8'))


# the corpus


def test_the_bundled_model_fits_the_data():
    assert bundled_metadata()['data'] == data_digest()


def test_the_corpus_is_that_of_the_bundled_model():
    text = json.dumps(make_corpus(BANK, 1))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == CORPUS_HASH


def test_the_same_seed_makes_the_same_corpus():
    assert make_corpus(BANK, 1, seed=3) == make_corpus(BANK, 1, seed=3)


def test_no_lesson_touches_a_topic_that_is_not_taught(docs):
    lessons = [doc['text'] for doc in docs if doc.get('text', '').startswith('# A lesson')]
    assert len(lessons) > 1.6 * len(BANK.train)
    for topic in UNTAUGHT:
        for question in topic.asks:
            assert not any(question in text for text in lessons), topic.topic


def test_no_question_on_such_a_topic_is_answered_with_a_question(questions_and_replies):
    asked = {question.text for topic in UNTAUGHT for question in topic.questions}
    for question, reply in questions_and_replies:
        assert question not in asked or not questions_in(reply), question


def test_reserved_questions_are_asked_in_no_chat(questions_and_replies):
    asked = {question for question, _ in questions_and_replies}
    for topic in BANK:
        assert not asked & {question.text for question in reserved_questions(topic)}


def test_questions_as_people_type_them():
    clean = 'Why is the sky blue at noon and red at dusk?'
    typed = {add_noise(clean, random.Random(seed)) for seed in range(50)}
    assert clean in typed and len(typed) > 20 and all(typed)


# the tokenizer


def test_every_text_can_be_written(tokenizer):
    for text in ('Ünïcode — and 数学', 'tabs\tand\nlines', '🙂'):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_chat_starts_with_bos(tokenizer):
    text = as_text(CHAT, tokenizer)
    assert text.startswith('<s><|user|>why')
    assert tokenizer.encode(text, add_special_tokens=False)[0] == tokenizer.bos_token_id
    assert as_text(dict(text='Page.'), tokenizer) == '<s>Page.</s>'


def test_labels_are_the_words_of_the_assistant(tokenizer):
    [(ids, labels)] = encode_documents([CHAT], tokenizer)
    learned = [label for label in labels if label != -100]
    assert tokenizer.decode(learned) == 'Air scatters blue light most.</s>'
    assert learned[-1] == tokenizer.eos_token_id
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    [(ids, labels)] = encode_documents([dict(text='A page.')], tokenizer)
    assert ids == labels


# batches and training


def test_batches_hold_each_document_once(docs, tokenizer):
    encoded = encode_documents(docs[:400], tokenizer)
    work = make_batches(encoded, tokens=2048, seed=0)
    rows = []
    for batch in work:
        assert batch['input_ids'].shape == batch['labels'].shape
        assert batch['input_ids'].numel() <= 2048
        assert batch['input_ids'].shape[1] % 16 == 0
        assert (batch['labels'][batch['input_ids'] == tokenizer.pad_token_id] == -100).all()
        rows += batch['input_ids'].tolist()
    stripped = [[token for token in row if token != tokenizer.pad_token_id] for row in rows]
    assert sorted(stripped) == sorted(list(ids) for ids, _ in encoded)


def test_orthogonal_matrices_have_singular_values_near_1():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 40, 24), (2, 24, 40)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=generator)))
        assert values.min() > 0.6 and values.max() < 1.3


def test_training_lowers_the_loss_and_draws_the_same_numbers(docs, tokenizer):
    work = make_batches(encode_documents(docs[:400], tokenizer), tokens=1024, seed=0)[:30]
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = new_model(len(tokenizer), **SMALL)
        with torch.no_grad():
            first = model(**work[0]).loss.item()
        log = pretrain(
            work, model, lr=1e-2, embedding_lr=1e-2, compiled=False, report=lambda line: None
        )
        assert log[-1]['step'] == len(work)
        assert log[-1]['tokens'] == sum(batch['input_ids'].numel() for batch in work)
        assert log[-1]['loss'] < first
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


# the bundled model


def test_the_bundled_model_is_small():
    folder = data_path('pocket', 'base')
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25e6
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert new_model(len(tokenizer)).num_parameters() == bundled_metadata()['parameters']
