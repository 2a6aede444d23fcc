"The terminal chat in a real pseudo-terminal, and in a pipe."

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from socratic_finetune.conversation import ScriptedTutor
from socratic_finetune.terminal import Terminal, chat_terminal

pty = pytest.importorskip('pty', reason='this system has no pseudo-terminals')
fcntl = pytest.importorskip('fcntl')
termios = pytest.importorskip('termios')

PROGRAM = r"""
from socratic_finetune.conversation import ScriptedTutor
from socratic_finetune.terminal import chat_terminal


class Toy(ScriptedTutor):
    def stream(self, messages, arm='tuned', stop=None, **sampling):
        message = messages[-1]['content']
        words = f'{arm} heard {len(messages)} messages at {sampling["temperature"]}.'.split()
        if message == 'slow':
            words = ['word'] * 600
        if message == 'escape':
            words = ['\x1b[2Jdanger']
        for i, word in enumerate(words):
            if stop.wait(0.02):
                return
            yield word if i == 0 else ' ' + word


chat_terminal(Toy({'base': '', 'tuned': ''}))
print('left in peace', flush=True)
"""


def take_terminal():
    "Make the pseudo-terminal the program's own, so that Ctrl-C reaches it as from a keyboard."
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in a shell's background jobs


class Shell:
    "A program in a pseudo-terminal."

    def __init__(self, folder):
        self.master, slave = pty.openpty()
        env = {**os.environ, 'TERM': 'xterm', 'PYTHONUNBUFFERED': '1'}
        env.pop('NO_COLOR', None)
        self.program = subprocess.Popen(
            [sys.executable, '-c', PROGRAM],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            env=env,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(slave)
        self.raw = ''
        self.text = ''  # without the codes for colours and the cursor

    def type(self, keys):
        os.write(self.master, keys.encode())

    def until(self, text, seconds=30):
        "Read until a text has come, and return what came since the last call."
        deadline = time.monotonic() + seconds
        start = len(self.text)
        while text not in self.text[start:]:
            assert time.monotonic() < deadline, f'no {text!r} in {self.text[start:]!r}'
            if select.select([self.master], [], [], 0.2)[0]:
                self._read(text)
        return self.text[start:]

    def _read(self, expected):
        try:
            data = os.read(self.master, 4096)
        except OSError:
            data = b''
        assert data, f'ended without {expected!r}: {self.text!r}'
        self.raw += data.decode(errors='replace')
        self.text = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', self.raw)

    def press(self, key, text):
        """Press a key until a text comes.

        Python acts on a signal that arrives just before readline waits only at the next key."""
        for _ in range(100):
            self.type(key)
            start = len(self.text)
            try:
                return self.until(text, 1)
            except AssertionError:
                if self.program.poll() is not None:
                    raise
                if text in self.text[start:]:
                    return None
        raise AssertionError(f'no {text!r} after 100 times {key!r}')

    def enter(self, line):
        "Type a line, and return what came until the next prompt."
        self.type(line + '\n')
        return self.until('you> ')

    def close(self):
        if self.program.poll() is None:
            self.program.kill()
        self.program.wait()
        os.close(self.master)


@pytest.fixture
def shell(tmp_path):
    shell = Shell(tmp_path)
    yield shell
    shell.close()


def test_a_conversation(shell, tmp_path):
    shell.until('you> ')
    output = shell.enter('hello')
    assert 'base> base heard 2 messages at 0.0.' in output
    assert 'tuned> tuned heard 2 messages at 0.0.' in output
    shell.enter('/tuned')
    output = shell.enter('and then?')
    assert 'tuned heard 4 messages' in output and 'base>' not in output
    assert 'at 0.7' in shell.enter('/retry')
    assert 'there is no command /nonsense' in shell.enter('/nonsense')
    assert '/reset' in shell.enter('/help')
    assert 'saved as talk.jsonl' in shell.enter('/save talk.jsonl')
    lines = Path(tmp_path / 'talk.jsonl').read_text().splitlines()
    assert [json.loads(line)['user'] for line in lines] == ['hello', 'hello', 'and then?']
    shell.enter('/reset')
    shell.enter('/both')
    assert 'base heard 2 messages' in shell.enter('again')
    shell.enter('escape')
    assert '\x1b[2J' not in shell.raw
    shell.type('exit\n')
    shell.until('left in peace')
    assert shell.program.wait(10) == 0


def test_control_c_stops_the_reply_and_control_d_leaves(shell):
    shell.until('you> ')
    shell.type('slow\n')
    shell.until('word word word')
    shell.type('\x03')
    output = shell.until('you> ')
    assert '[stopped]' in output and output.count('word') < 500
    shell.press('\x03', 'Ctrl-D leaves')
    shell.type('hello\n')
    shell.until('tuned heard')
    shell.until('you> ')
    assert 'heard' in shell.enter('\x1b[A')  # arrow up: the last line again
    shell.type('\x04')
    shell.until('left in peace')
    assert shell.program.wait(10) == 0


def test_a_pipe_gets_replies_and_nothing_else():
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM],
        input='/tuned\nhello\n\n',
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, 'tuned will answer\n')
    assert done.stdout == 'tuned heard 2 messages at 0.0.\nleft in peace\n'


class BrokenTutor(ScriptedTutor):
    "Fails after its first word."

    def stream(self, messages, arm='tuned', stop=None, **sampling):
        yield 'Well, '
        raise MemoryError('no room left')


class Stream:
    "A source of lines, or a sink that keeps them."

    def __init__(self, *lines):
        self.lines = list(lines)
        self.text = ''

    def isatty(self):
        return False

    def readline(self):
        return self.lines.pop(0) + '\n' if self.lines else ''

    def write(self, text):
        self.text += text

    def flush(self):
        "Nothing is held back."


REPLIES = {'base': 'Air scatters blue light.', 'tuned': 'What does a prism do?'}


def test_an_error_goes_to_the_notes():
    sink = Stream()
    notes = Stream()
    chat_terminal(
        BrokenTutor(REPLIES), ('tuned',), source=Stream('Why?', '/tuned'), sink=sink, notes=notes
    )
    assert sink.text == 'Well, \n'
    assert 'no room left' in notes.text and 'tuned will answer' in notes.text


def test_nothing_is_read_after_exit():
    sink = Stream()
    source = Stream('Why?', 'exit', 'never')
    chat_terminal(ScriptedTutor(REPLIES), ('tuned',), source=source, sink=sink)
    assert sink.text == REPLIES['tuned'] + '\n'
    assert source.lines == ['never']


def test_models_that_are_not_there_and_nothing_to_save(tmp_path):
    notes = Stream()
    tutor = ScriptedTutor({'tuned': 'What does a prism do?'})
    lines = ['/base', '/save', '/retry', 'Why?', '/save', '/both', '/reset']
    conversation = chat_terminal(
        tutor, source=Stream(*lines), sink=Stream(), notes=notes, folder=tmp_path
    )
    assert 'there is no base model here: only tuned' in notes.text
    assert 'nothing has been said yet' in notes.text
    assert 'nothing has been asked yet' in notes.text
    assert len(list(tmp_path.glob('chat-*.jsonl'))) == 1
    assert conversation.exchanges == []


def test_no_colours_for_a_pipe():
    assert Terminal(Stream(), Stream(), Stream()).label('base') == 'base> '
