"The chat and its widget without a page; what a browser makes of it: test_chat_browser.py."

import re
import threading
from types import SimpleNamespace

import pytest

from socratic_finetune.chat import (
    Chat,
    ChatWidget,
    answer_html,
    arm_selector,
    current_topic,
    example_questions,
    footer_html,
    live_page,
    page_notebook,
    sampling_form,
    voila_command,
)
from socratic_finetune.config import SocraticError, read_jsonl
from socratic_finetune.conversation import Answer, ScriptedTutor, default_sampling
from socratic_finetune.servers import ModelPair
from socratic_finetune.topics import load_topics, reserved_questions

REPLIES = {
    'base': 'The **sky** is blue since air scatters blue light.',
    'tuned': 'Good question! What does a *prism* do to sunlight?',
}
QUESTION = 'Why is the sky blue?'


class ToyJudge:
    "Scores question marks, and has no opinion on colours."

    def judge(self, question, reply, context=None, reference=None):
        if 'blue' in reply:
            raise SocraticError('no opinion')
        return SimpleNamespace(socratic=float('?' in reply), helpful=None, error=None)


class WaitingTutor(ScriptedTutor):
    "Says a word, and then nothing until it is stopped."

    def stream(self, messages, arm='tuned', stop=None, **sampling):
        yield 'Well, '
        stop.wait()


@pytest.fixture(scope='module')
def bank():
    return load_topics()


@pytest.fixture
def widget(bank, tmp_path):
    widget = ChatWidget(
        ScriptedTutor(REPLIES), judge=ToyJudge(), bank=bank, folder=tmp_path, live=False
    )
    yield widget
    widget.close()
    assert not running_threads()


def running_threads():
    return [t for t in threading.enumerate() if t.name.startswith('socratic-chat')]


def press(button):
    button.click()


def ask(widget, text=QUESTION):
    "Type a message, send it, and wait for the replies."
    widget.controls.text.value = text
    press(widget.controls.send)
    widget.wait()
    return widget.conversation.exchanges[-1]


def status(widget):
    return widget.controls.status.value


def test_a_tutor_that_repeats_itself_gets_a_badge(widget):
    first = ask(widget, "Explain Ohm's law.").answers['tuned']
    again = ask(widget, "I am stuck with Ohm's law.").answers['tuned']
    assert 'repeats itself' not in footer_html(first)
    assert 'repeats itself' in footer_html(again)
    assert 'step 0 of' in footer_html(again)


def test_no_track_without_a_card(widget):
    answer = ask(widget, 'zzz qqq').answers['tuned']
    assert answer.track == '' and 'step' not in footer_html(answer)


def test_one_message_at_a_time():
    chat = Chat(WaitingTutor(REPLIES))
    assert chat.send(QUESTION)
    assert not chat.send('And red?') and not chat.regenerate() and not chat.edit('Or green?')
    chat.stop()
    assert chat.wait(30)
    statuses = [answer.status for answer in chat.conversation.exchanges[0].answers.values()]
    assert statuses == ['stopped', 'stopped']
    assert len(chat.conversation.exchanges) == 1
    assert not running_threads()


def test_the_end_is_told_before_the_next_message_may_begin():
    chat = Chat(ScriptedTutor(REPLIES))
    accepted = []
    chat.on_end = lambda exchange: accepted.append(chat.send('too early'))
    chat.send(QUESTION)
    chat.wait()
    assert accepted == [False]
    assert not chat.busy


def test_an_error_before_the_thread_leaves_the_chat_free():
    chat = Chat(ScriptedTutor(REPLIES))
    with pytest.raises(SocraticError, match='empty'):
        chat.send('  ')
    with pytest.raises(SocraticError, match='nothing has been asked'):
        chat.regenerate()
    assert not chat.busy
    assert chat.send(QUESTION)
    chat.wait()


def test_regenerate_edit_and_clear():
    tutor = ScriptedTutor(REPLIES)
    chat = Chat(tutor, temperature=0)
    chat.send(QUESTION)
    chat.wait()
    chat.regenerate()
    chat.wait()
    assert len(chat.conversation.exchanges[0].earlier) == 2
    assert tutor.requests[-1][2] == dict(temperature=0.7, seed=1)
    chat.edit('Why is it red at night?')
    chat.wait()
    assert chat.conversation.exchanges[0].earlier == []
    assert tutor.requests[-1][2] == dict(temperature=0)
    chat.send('So?')
    chat.clear()
    assert chat.conversation.exchanges == [] and not chat.busy


def test_a_pair_answers_in_parallel():
    barrier = threading.Barrier(2, timeout=30)

    def answer_together(messages, arm='tuned', stop=None, **sampling):
        barrier.wait()  # fails unless both are here
        yield 'Here.'

    base = ScriptedTutor(REPLIES)
    tuned = ScriptedTutor(REPLIES)
    base.stream = tuned.stream = answer_together
    chat = Chat(ModelPair(base, tuned))
    chat.send(QUESTION)
    chat.wait()
    answers = chat.conversation.exchanges[0].answers
    assert [answer.text for answer in answers.values()] == ['Here.', 'Here.']


def test_scores_and_missing_scores(bank):
    chat = Chat(ScriptedTutor(REPLIES), judge=ToyJudge(), bank=bank)
    chat.send(QUESTION)
    chat.wait()
    answers = chat.conversation.exchanges[0].answers
    assert answers['tuned'].scores == dict(socratic=1.0, helpful=None)
    assert answers['base'].scores == dict(error='no opinion')


def test_the_topic_that_was_named_last(bank):
    law = "Explain Faraday's law."
    topic = bank.find(law)
    assert current_topic(bank, [law, 'Can you give me an example?']) is topic
    assert current_topic(bank, ['Explain buoyancy.', law, 'What do you mean?']) is topic


@pytest.mark.parametrize(
    'text', ['<script>alert(1)</script>', '"><svg/onload=alert(1)>', '</div></section>', '`<b>`']
)
def test_texts_and_notes_stay_in_their_elements(text):
    rendered = answer_html(Answer('tuned', text=text, status='failed', note=text))
    assert not re.findall(r'<(?:script|img|svg|b)\b', rendered)
    assert rendered.count('<div') == rendered.count('</div>') == 2


def test_controls_follow_the_chat(bank):
    widget = ChatWidget(WaitingTutor(REPLIES), bank=bank, live=False)
    controls = widget.controls
    assert controls.stop.disabled and controls.regenerate.disabled
    controls.text.value = QUESTION
    press(controls.send)
    assert (controls.stop.disabled, controls.send.disabled) == (False, True)
    assert controls.text.value == ''
    press(controls.stop)
    widget.wait()
    assert (controls.stop.disabled, controls.send.disabled) == (True, False)
    assert 'Stopped.' in status(widget)
    widget.close()


def test_a_message_is_answered_and_scored(widget):
    ask(widget)
    panes = widget.views[0].panes
    assert '<em>prism</em>' in panes['tuned'].body.value
    assert 'socratic 1.00' in panes['tuned'].footer.value
    assert 'could not say' in panes['base'].footer.value
    assert 'Ready.' in status(widget) and 'sf-busy' not in status(widget)
    assert 'tuned says: Good question!' in widget.controls.announcement.value


def test_an_empty_field_sends_nothing(widget):
    widget.controls.text.value = '   '
    press(widget.controls.send)
    assert widget.conversation.exchanges == []


def test_editing(widget):
    ask(widget)
    press(widget.controls.edit)
    assert widget.controls.text.value == QUESTION
    ask(widget, QUESTION + ' And red?')
    assert [e.user for e in widget.conversation.exchanges] == [QUESTION + ' And red?']
    press(widget.controls.edit)
    press(widget.controls.edit)  # a second press cancels
    assert not widget.editing and widget.controls.text.value == ''


def test_too_early(bank, tmp_path):
    widget = ChatWidget(WaitingTutor(REPLIES), bank=bank, folder=tmp_path, live=False)
    widget.ask(QUESTION)
    assert not widget.ask('Too early')
    assert 'Still answering' in status(widget)
    press(widget.controls.stop)
    widget.wait()
    assert len(widget.controls.log.children) == 1
    widget.close()


def test_regenerating_keeps_one_view(widget):
    ask(widget)
    press(widget.controls.regenerate)
    widget.wait()
    assert len(widget.conversation.exchanges[0].earlier) == 2
    assert len(widget.controls.log.children) == 1


def test_ratings(widget, tmp_path):
    answer = ask(widget).answers['tuned']
    pane = widget.views[0].panes['tuned']
    pane.good.value = True
    assert '1 preference pair of this conversation' in status(widget)
    assert len(read_jsonl(tmp_path / 'preferences.jsonl')[0]) == 1
    pane.poor.value = True
    assert (pane.good.value, answer.rating) == (False, -1)
    pane.poor.value = False
    assert answer.rating == 0
    assert 'Noted' in status(widget)


def test_a_damaged_file_of_ratings_is_said(widget, tmp_path):
    ask(widget)
    (tmp_path / 'preferences.jsonl').write_text('not json\n')
    widget.views[0].panes['tuned'].good.value = True
    assert 'sf-error' in status(widget) and 'line 1' in status(widget)


def test_exports(widget):
    ask(widget)
    rows, invalid = read_jsonl(widget.export('jsonl'), required=('user', 'assistant'))
    assert (len(rows), invalid) == (2, [])
    assert widget.export('md').read_text().startswith('# A conversation')
    assert 'download' in widget.controls.link.value


def test_one_model_only_and_clear(widget):
    widget.controls.selector.value = 'tuned'
    assert list(ask(widget).answers) == ['tuned']
    widget.controls.selector.value = 'both'
    assert list(ask(widget).answers) == ['base', 'tuned']
    press(widget.controls.clear)
    assert widget.controls.log.children == (widget.controls.empty,)


def test_questions_to_begin_with(widget, bank):
    before = [chip.description for chip in widget.controls.chips.children]
    press(widget.controls.more)
    chips = widget.controls.chips.children
    assert [chip.description for chip in chips] != before
    press(chips[0])
    widget.wait()
    assert widget.conversation.exchanges[0].user == chips[0].description
    for seed in range(20):
        for question, held_out in example_questions(bank, seed=seed):
            topic = bank.find(question, at_least=0.99)
            assert topic in (bank.heldout if held_out else bank.train)
            assert question not in [q.text for q in reserved_questions(topic)]


def test_the_form_changes_the_chat():
    tutor = ScriptedTutor(REPLIES)
    chat = Chat(tutor, **default_sampling(tutor))
    *controls, system = sampling_form(chat).children[0].children
    assert [control.value for control in controls] == list(default_sampling(tutor).values())
    controls[0].value = 0.8
    system.value = ' Be brief. '
    assert chat.sampling['temperature'] == 0.8
    assert chat.conversation.system == 'Be brief.'


def test_who_may_answer():
    assert [value for _, value in arm_selector(('base', 'tuned')).options] == [
        'both',
        'tuned',
        'base',
    ]
    assert [label for label, _ in arm_selector(('tuned',)).options] == ['Tuned']


def test_no_page_gets_a_table(widget, capsys):
    ask(widget)
    assert not live_page()
    widget._ipython_display_()
    assert 'HTML' in capsys.readouterr().out
    assert 'prism' in widget.transcript().data


def test_the_notebook_of_the_page():
    path = page_notebook(run='demo', base=None)
    assert "{'run': 'demo', 'base': None}" in path.read_text()
    assert '--no-browser' in voila_command(path, 1, False, 'light')
    assert '--no-browser' not in voila_command(path, 1, True, 'dark')
