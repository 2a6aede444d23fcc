"Conversations: histories, the context window, hostile texts, and what is saved."

import re
import threading

import pytest

from socratic_finetune.config import SocraticError, read_jsonl
from socratic_finetune.conversation import (
    Answer,
    Conversation,
    ScriptedTutor,
    as_markdown,
    asks_again,
    context_length,
    count_prompt_tokens,
    default_sampling,
    fit_messages,
    generate_answer,
    lesson_track,
    preference_pairs,
    printable,
    render_text,
    resample,
    save_pairs,
    training_rows,
    transcript_html,
)
from socratic_finetune.topics import load_topics

REPLIES = {
    'base': 'The **sky** is blue since air scatters blue light.',
    'tuned': 'Good question! What does a *prism* do to sunlight?',
}
HOSTILE = [
    '<script>alert(1)</script>',
    '<img src=x onerror=alert(1)>',
    '"><svg/onload=alert(1)>',
    "' onmouseover='alert(1)",
    '</div></section></body>',
    '**never closed',
    '`<b>`',
    '```\n</code></pre><script>alert(1)</script>',
    '```"onload=alert(1) x\ncode\n```',
    '[click](javascript:alert(1))',
    '![image](javascript:alert(1))',
    '[a]: javascript:alert(1)\n\n[a]',
    '<https://example.org> https://example.org',
    '<!-- ',
    '&lt;script&gt;',
    '# <b onclick=alert(1)>heading</b>',
    '$\\href{javascript:alert(1)}{x}$',
    '- \n- <i>',
    '3. three\n4. <b>four</b>',
    '\u202eright to left',
    '\x1b[2J\x07',
    '🧑‍🔬' * 50,
    'x' * 10_000,
    '*' * 10_000,
    '**a' * 3000,
    '`' * 9999,
    '* ' * 5000,
]
TAGS = {'p', 'br', 'strong', 'em', 'code', 'pre', 'ul', 'ol', 'li', 'h4'}


class BrokenTutor(ScriptedTutor):
    "Fails after its first word."

    def stream(self, messages, arm='tuned', stop=None, **sampling):
        yield 'Well, '
        raise MemoryError('no room left')


class ClosableTutor(ScriptedTutor):
    "Notes that its stream was closed."

    closed = False

    def stream(self, messages, arm='tuned', stop=None, **sampling):
        try:
            yield from ['one ', 'two ', 'three ']
        finally:
            self.closed = True


@pytest.fixture
def tutor():
    return ScriptedTutor(REPLIES)


@pytest.fixture
def conversation(tutor):
    "One exchange, answered by both models."
    conversation = Conversation(system=tutor.system)
    conversation.ask('Why is the sky blue?')
    for arm in conversation.arms:
        generate_answer(conversation, tutor, arm)
    return conversation


@pytest.mark.parametrize('text', HOSTILE, ids=lambda text: ascii(text[:20]))
def test_nothing_of_a_text_is_live(text):
    rendered = render_text(text)
    for tag in re.findall(r'<[^>]*>', rendered):
        name, _, attribute = tag.strip('</>').partition(' ')
        assert name in TAGS, tag
        assert re.fullmatch(r'(start="\d+")?', attribute), tag
    assert '\x1b' not in rendered
    attack = Conversation(('tuned',))
    attack.ask(text).answers['tuned'].text = text
    transcript = transcript_html(attack)
    assert not re.search(r'<(script|img|svg|b|i)\b', transcript)
    assert transcript.count('<td') == transcript.count('</td>') == 2


@pytest.mark.parametrize(
    'text, expected',
    [
        ('a * b * c, 2*3*4 and snake_case', '<p>a * b * c, 2*3*4 and snake_case</p>'),
        ('__init__ and _x_', '<p>__init__ and _x_</p>'),
        ('one\ntwo\n\nthree', '<p>one<br>two</p><p>three</p>'),
        ('**bold**text', '<p><strong>bold</strong>text</p>'),
        ('- a\n- *b*', '<ul><li>a</li><li><em>b</em></li></ul>'),
        ('\\(x^2\\) and $y_1$', '<p>\\(x^2\\) and $y_1$</p>'),
        ('# Title', '<h4>Title</h4>'),
        ('&lt;b&gt;', '<p>&amp;lt;b&amp;gt;</p>'),
    ],
)
def test_markdown(text, expected):
    assert render_text(text).replace('\n', '') == expected


def test_an_open_code_block_is_code_while_it_streams():
    expected = '<pre><code>if a &lt; b: &quot;stop&quot;</code></pre>'
    assert render_text('```python\nif a < b: "stop"').replace('\n', '') == expected


def test_control_characters_become_visible():
    assert printable('a\x1b[2J\tb\r\nc') == 'a\ufffd[2J\tb\nc'


def test_a_history_holds_what_the_model_was_asked_and_answered(tutor):
    conversation = Conversation(system='Be kind.')
    conversation.ask('first').answers['base'].text = 'base answers'
    conversation.arms = ('tuned',)
    conversation.ask('second').answers['tuned'].text = 'tuned answers'
    conversation.ask('third')
    contents = [message['content'] for message in conversation.messages('tuned')]
    assert contents == ['Be kind.', 'second', 'tuned answers', 'third']
    assert [m['content'] for m in conversation.messages('base', 0)] == ['Be kind.', 'first']


def test_asking_again(conversation):
    assert len(conversation.ask_again().earlier) == 2
    assert conversation.ask_again('Why is it red?').earlier == []
    assert len(conversation.exchanges) == 1
    with pytest.raises(SocraticError, match='empty'):
        conversation.ask(' ')


def test_short_conversations_are_sent_whole(tutor):
    messages = [dict(role='system', content='Be kind.'), dict(role='user', content='Why?')]
    assert fit_messages(tutor, messages, 96) == (messages, 0)


def test_whole_turns_are_dropped(tutor):
    messages = [dict(role='system', content='Be kind.')]
    for i in range(60):
        messages.append(dict(role='user', content=f'{i} ' + 'and so on ' * 20))
        messages.append(dict(role='assistant', content='Yes. ' * 20))
    messages.append(dict(role='user', content='And now?'))
    fitted, n_dropped = fit_messages(tutor, messages, 96)
    assert n_dropped > 0
    assert len(messages) - len(fitted) == 2 * n_dropped
    assert [m['role'] for m in fitted[:2]] == ['system', 'user']
    assert fitted[-1] == messages[-1]
    assert count_prompt_tokens(tutor, fitted) <= context_length(tutor) - 96


def test_a_message_that_is_too_long_fails_in_words(tutor):
    conversation = Conversation()
    conversation.ask('long ' * 9000)
    answer = generate_answer(conversation, tutor, 'base')
    assert answer.status == 'failed'
    assert 'too long' in answer.note


def test_a_model_that_fails_can_be_asked_again(tutor):
    conversation = Conversation()
    conversation.ask('Why?')
    answer = generate_answer(conversation, BrokenTutor(REPLIES), 'base')
    assert (answer.status, answer.text) == ('failed', 'Well, ')
    assert 'no room left' in answer.note
    conversation.ask_again()
    assert generate_answer(conversation, tutor, 'base').status == 'done'


def test_a_silent_model_is_noticed():
    conversation = Conversation(('tuned',))
    conversation.ask('Why?')
    assert (
        'without a word'
        in generate_answer(conversation, ScriptedTutor({'tuned': ''}), 'tuned').note
    )


def test_the_stream_is_closed_when_it_is_stopped():
    tutor = ClosableTutor(REPLIES)
    stop = threading.Event()
    conversation = Conversation(('tuned',))
    conversation.ask('Why?')
    answer = generate_answer(
        conversation, tutor, 'tuned', stop, lambda answer: answer.text and stop.set()
    )
    assert (answer.status, answer.text) == ('stopped', 'one ')
    assert tutor.closed


def test_only_finished_replies_are_rows(conversation, tutor):
    conversation.ask('<b>And</b> red?')
    stop = threading.Event()
    stop.set()
    generate_answer(conversation, tutor, 'base', stop)
    rows = training_rows(conversation)
    assert len(rows) == 2
    assert all(row.keys() >= {'system', 'user', 'assistant', 'messages'} for row in rows)
    tuned_only = training_rows(conversation, ('tuned',))
    assert tuned_only[0]['messages'][-1]['content'] == REPLIES['tuned']
    assert '<b>' not in as_markdown(conversation)


def test_ratings_make_pairs(conversation, tmp_path):
    answers = conversation.exchanges[0].answers
    answers['tuned'].rating = 1
    (pair,) = preference_pairs(conversation)
    assert (pair['chosen_arm'], pair['rejected_arm']) == ('tuned', 'base')
    path = tmp_path / 'preferences.jsonl'
    assert save_pairs(conversation, path) == 1
    assert save_pairs(conversation, path) == 1
    assert save_pairs(Conversation(), path) == 0
    assert len(read_jsonl(path)[0]) == 1
    answers['base'].rating = 1
    assert preference_pairs(conversation) == []


def test_a_regenerated_reply_is_paired_with_the_one_before(conversation, tutor):
    conversation.exchanges[0].answers['tuned'].rating = -1
    conversation.ask_again()
    generate_answer(conversation, ScriptedTutor(REPLIES | {'tuned': 'Why?'}), 'tuned')
    pairs = preference_pairs(conversation)
    assert {(pair['chosen_arm'], pair['rejected_arm']) for pair in pairs} == {
        ('tuned', 'tuned'),
        ('base', 'tuned'),
    }


def test_later_turns_of_two_models_are_no_pair(conversation, tutor):
    conversation.ask('And red?')
    for arm in conversation.arms:
        generate_answer(conversation, tutor, arm)
    conversation.exchanges[1].answers['tuned'].rating = 1
    assert preference_pairs(conversation) == []


def test_a_damaged_file_of_pairs_is_left_alone(conversation, tmp_path):
    path = tmp_path / 'preferences.jsonl'
    path.write_text('not json\n')
    with pytest.raises(SocraticError, match='line 1'):
        save_pairs(conversation, path)
    assert path.read_text() == 'not json\n'


def test_another_draft_is_drawn_otherwise(conversation, tutor):
    sampling = default_sampling(tutor, dict(seed=1))
    first = resample(sampling, conversation.ask_again())
    assert (first['temperature'], first['seed']) == (0.7, 2)
    assert resample(dict(temperature=1.2), conversation.exchanges[0])['temperature'] == 1.2


def test_scores_and_notes_are_in_the_transcript(conversation):
    answer = conversation.exchanges[0].answers['tuned']
    answer.scores = {'socratic': 0.9, 'helpful': None}
    answer.note = '<b>note</b>'
    text = as_markdown(conversation)
    assert 'socratic 0.90; helpful –' in text and '<b>note' not in text
    assert '&lt;b&gt;note' in transcript_html(conversation)
    assert 'tokens/s' not in transcript_html(conversation, timing=False)


def test_an_answer_that_took_no_time_has_no_pace():
    assert Answer('base').tokens_per_second is None


# a lesson


OHM = load_topics()["Ohm's law"]


def later_answer(text, student='Hm.'):
    prompt = [
        dict(role='user', content="Explain Ohm's law."),
        dict(role='assistant', content=f'Well. {OHM.guiding[0]}'),
        dict(role='user', content=student),
    ]
    return Answer('tuned', text, 'done', prompt=prompt)


def test_a_question_that_was_asked_before_is_noticed():
    assert asks_again(later_answer(f'Let us see. {OHM.guiding[0]}'))
    assert asks_again(later_answer(OHM.guiding[0].upper()))
    assert not asks_again(later_answer(OHM.guiding[1]))
    assert not asks_again(later_answer('No question.'))


def test_the_track_says_where_the_lesson_stands():
    n = len(OHM.guiding)
    first = later_answer(OHM.hint)
    assert lesson_track(first, OHM) == f'●{"○" * (n - 1)} step 1 of {n}, 0 ideas found'
    second = later_answer(OHM.guiding[1], student=f'Oh! {OHM.insights[0]}')
    assert lesson_track(second, OHM) == f'●●{"○" * (n - 2)} step 2 of {n}, 1 idea found'
    last = later_answer('Yes.', student=f'So: {OHM.answer}')
    assert lesson_track(last, OHM).endswith('the whole found')
    lost = Answer('tuned', 'What do you think?', 'done', prompt=[])
    assert lesson_track(lost, OHM).startswith('○' * n)
