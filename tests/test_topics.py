"Topic cards, the search for them, and the split."

import pytest
import yaml
from pydantic import ValidationError

from socratic_finetune.config import SocraticError
from socratic_finetune.topics import (
    Topic,
    TopicBank,
    WordIndex,
    contains_phrase,
    load_topics,
    question_similarity,
    questions_in,
    read_split,
    repeated_questions,
    reserved_questions,
    sentences,
    words,
)

BANK = load_topics()
CARD = BANK['tides'].model_dump(exclude={'subject'})
KNOWN_EVALUATION = [
    "Faraday's law",
    'gene expression',
    'principle of least action',
    'hash collisions',
    'inflationary cosmology',
    'Hamming distance',
    'latent heat of fusion',
    "Newton's cradle",
    'garbage collection in Java',
    'K-means clustering',
    'Calvin cycle',
    "Shor's algorithm",
    'Lyapunov stability',
    'net present value',
    'Kaplan-Meier curves',
    'three-way handshake of TCP',
    'Lorenz attractor',
    'PID control',
    'Poisson distribution',
    'CRISPR-Cas immunity',
]


def names(topics):
    return {topic.topic for topic in topics}


def write_cards(folder, cards, name='sea.yaml'):
    content = yaml.safe_dump(dict(subject='sea', cards=cards))
    (folder / name).write_text(content, encoding='utf8')
    return folder


def plain_card(**changes):
    "A card of YAML types, with some fields changed; None removes a field."
    card = Topic(subject='sea', **CARD).model_dump(mode='json', exclude={'subject'})
    card |= changes
    return {field: value for field, value in card.items() if value is not None}


# words


def test_words():
    assert words("Faraday's law: what MOVES?") == ["faraday's", 'law', 'what', 'moves']
    assert words('...') == []


def test_phrases_are_whole_words():
    assert contains_phrase('It is the Rate-of-change, again.', 'rate of change')
    assert not contains_phrase('separate', 'rate')


def test_sentences_and_questions():
    text = 'Picture a coil. What moves? Say it! ?'
    assert sentences(text) == ['Picture a coil.', 'What moves?', 'Say it!', '?']
    assert questions_in(text) == ['What moves?']
    assert questions_in('She asked: "What moves?"') == ['She asked: "What moves?"']


# cards


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(guiding=('Why?', 'How?', 'Say it.')), "not a question: 'Say it.'"),
        (dict(check='Say it.'), "not a question: 'Say it.'"),
        (dict(knows='The sea is wide.'), 'must start with You'),
        (dict(giveaway=('Atlantis', CARD['giveaway'][0])), "'Atlantis' is not in the answer"),
        (dict(hint=f'It is {CARD["giveaway"][0]}.'), 'hint: tells the answer'),
        (dict(colour='blue'), 'Extra inputs are not permitted'),
    ],
)
def test_cards_that_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        Topic(subject='sea', **{**CARD, **changes})


def test_no_card_gives_its_answer_away():
    for topic in BANK:
        assert topic.gives_away(topic.answer) == list(topic.giveaway)
        for field, text in topic.guidance():
            assert not topic.gives_away(text), f'{topic.topic}, {field}'


def test_the_direct_answer_fits_the_question():
    for topic in BANK:
        for question in topic.questions:
            expected = question.answer or topic.answer
            assert topic.direct_answer(question.text) == expected
        assert topic.direct_answer('Something else?') == topic.answer


# search


def test_search_by_cosine():
    texts = ['How does a magnet move a needle?', 'Why do two keys share a slot?', 'A plant?']
    index = WordIndex(texts)
    assert index.search('two keys in one slot, why?')[0][0] == 1
    position, cosine = index.search('Why do two keys share a slot?')[0]
    assert position == 1 and cosine == pytest.approx(1)
    assert index.search('xyzzy') == []
    assert index.search('') == []
    assert len(index.search('does a plant move a slot', k=2)) == 2


def test_nearly_every_question_finds_its_card():
    misses = []
    for topic in BANK:
        for text in (topic.topic, *(question.text for question in topic.questions)):
            if BANK.find(text) is not topic:
                misses.append(text)
    # words are cut to six letters, so that electronegativity meets electrolysis
    assert set(misses) <= {
        'electronegativity',
        'Explain electronegativity.',
        'How does adverse selection differ from moral hazard?',
    }


def test_every_guiding_question_finds_its_card():
    for topic in BANK:
        for question in topic.asks:
            owner, cosine = BANK.guided_by(question)
            assert owner is topic and cosine == pytest.approx(1)
    assert BANK.guided_by('xyzzy') == (None, 0.0)


def test_no_card_is_found_for_other_things():
    for question in ('What is karaoke?', 'who won the match yesterday?', '', 'xyzzy'):
        assert BANK.find(question) is None


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(SocraticError, match='did you mean "Faraday\'s law"'):
        BANK['Faradays law']
    with pytest.raises(SocraticError, match="no topic 'karaoke' in the bank$"):
        BANK['karaoke']


# the bank and its split


def test_the_bank():
    assert len(BANK) >= 400
    assert len({topic.subject for topic in BANK}) >= 14
    assert all(len(topic.questions) >= 6 for topic in BANK)


def test_the_split():
    train, validation, heldout = map(names, (BANK.train, BANK.validation, BANK.heldout))
    assert not train & (heldout | validation) and not heldout & validation
    assert train | validation | heldout == names(BANK)
    assert read_split()['heldout'][:20] == KNOWN_EVALUATION
    subjects = {topic.subject for topic in BANK}
    assert {topic.subject for topic in BANK.heldout} == subjects


@pytest.mark.parametrize(
    'topics, heldout, validation, message',
    [
        (BANK.topics, ['tides'], ['tides'], 'both held out and for validation: tides'),
        (BANK.topics, ['karaoke'], [], 'held-out topics without a card: karaoke'),
        ([BANK['tides']] * 2, [], [], "the topic 'tides' occurs twice in the bank"),
    ],
)
def test_splits_that_are_refused(topics, heldout, validation, message):
    with pytest.raises(SocraticError, match=message):
        TopicBank(topics, heldout, validation)


def test_a_question_on_two_cards_is_refused():
    tides = BANK['tides']
    other = tides.model_copy(update=dict(topic='ebb'))
    with pytest.raises(SocraticError, match='the question .* occurs twice'):
        TopicBank([tides, other])


def test_reserved_questions_are_two_and_stay_the_same():
    for topic in BANK:
        reserved = reserved_questions(topic)
        assert len(set(reserved)) == 2
        assert set(reserved) <= set(topic.questions)
        assert all(question.kind != 'explain' for question in reserved)
        assert reserved == reserved_questions(topic)


# files


def test_another_folder_holds_out_every_sixth_topic(tmp_path):
    cards = []
    for number in range(7):
        questions = [dict(kind='what', text=f'Question {number} {letter}?') for letter in 'abcdef']
        cards.append(plain_card(topic=f'topic {number}', questions=questions))
    bank = load_topics(write_cards(tmp_path, cards))
    assert names(bank.heldout) == {'topic 5'}
    assert names(load_topics(tmp_path, heldout=('topic 1',)).heldout) == {'topic 1'}
    assert not load_topics(tmp_path, heldout=()).heldout


def test_all_faults_are_named_at_once(tmp_path):
    cards = [plain_card(hint=None, knows='It is known.'), plain_card(topic='ebb', slip=None), 7]
    with pytest.raises(SocraticError) as caught:
        load_topics(write_cards(tmp_path, cards))
    message = str(caught.value)
    assert message.startswith('4 fault(s) in the topic cards:')
    for fault in ('sea.yaml, tides, hint', 'sea.yaml, tides, knows', 'sea.yaml, ebb, slip'):
        assert fault in message
    assert 'sea.yaml, card 3' in message


def test_files_that_hold_no_cards(tmp_path):
    with pytest.raises(SocraticError, match='no topic file'):
        load_topics(tmp_path / 'nowhere')
    (tmp_path / 'sea.yaml').write_text('subject: [')
    with pytest.raises(SocraticError, match='sea.yaml'):
        load_topics(tmp_path)
    (tmp_path / 'sea.yaml').write_text('cards: []')
    with pytest.raises(SocraticError, match='must have a `subject` and a list `cards`'):
        load_topics(tmp_path)


def test_the_same_question_again():
    asked = 'What would become of a dirty snowball under a strong lamp?'
    assert repeated_questions(f'Once more. {asked}', ['Hello.', asked])
    assert repeated_questions('And what would become of a dirty snowball under a lamp?', [asked])
    assert not repeated_questions('What drives the tail of a comet away?', [asked])
    assert not repeated_questions('A dirty snowball under a strong lamp melts.', [asked])
    assert question_similarity('', '') == 0
