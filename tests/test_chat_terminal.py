"The terminal chat in a real pseudo-terminal, and in a pipe."
import json, os, re, select, signal, subprocess, sys, time
from pathlib import Path

import pytest

pty = pytest.importorskip('pty', reason='this system has no pseudo-terminals')

TOY = '''
from socratic_finetune.chat import chat_terminal
from socratic_finetune.config import settings_for

class Toy:
    arms, system, tokenizer, model, settings = ('base', 'tuned'), 'You are a tutor.', None, None, settings_for()
    def stream(self, messages, arm='tuned', stop=None, **sampling):
        asked = messages[-1]['content']
        words = ['word'] * 600 if asked == 'slow' else ['\\x1b[2Jdanger'] if asked == 'escape' else f'{arm} heard {len(messages)} messages at {sampling["temperature"]}.'.split()
        for i, w in enumerate(words):
            if stop.wait(0.02): return
            yield w if i == 0 else ' ' + w

chat_terminal(Toy())
print('left in peace', flush=True)
'''


class Shell:
    "A program in a pseudo-terminal."
    def __init__(self, folder):
        self.master, slave = pty.openpty()
        env = {**os.environ, 'TERM': 'xterm', 'PYTHONUNBUFFERED': '1'}
        env.pop('NO_COLOR', None)
        def control(): # the pseudo-terminal becomes the program's own, so that Ctrl-C reaches it as it would from a keyboard
            import fcntl, termios
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL) # a shell that starts the tests in the background has it ignored, and that is inherited
        self.program = subprocess.Popen([sys.executable, '-c', TOY], stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=env, start_new_session=True, preexec_fn=control)
        os.close(slave)
        self.seen = self.raw = ''

    def type(self, keys): os.write(self.master, keys.encode())

    def until(self, text, seconds=30):
        "Read until a text has come, and return what came since the last call."
        end, start = time.monotonic() + seconds, len(self.seen)
        while text not in self.seen[start:]:
            assert time.monotonic() < end, f'no {text!r} in {self.seen[start:]!r}'
            if select.select([self.master], [], [], 0.2)[0]:
                try: data = os.read(self.master, 4096)
                except OSError: data = b''
                assert data, f'ended without {text!r}: {self.seen[start:]!r}'
                self.raw += data.decode(errors='replace')
                self.seen = re.sub(r'\x1b\[[0-9;?]*[a-zA-Z]', '', self.raw)
        return self.seen[start:]

    def close(self):
        if self.program.poll() is None: self.program.kill()
        self.program.wait()
        os.close(self.master)


@pytest.fixture
def shell(tmp_path):
    s = Shell(tmp_path)
    yield s
    s.close()


def test_a_conversation(shell, tmp_path):
    shell.until('you> ')
    shell.type('hello\n')
    said = shell.until('you> ')
    assert 'base> base heard 2 messages at 0.0.' in said and 'tuned> tuned heard 2 messages at 0.0.' in said
    shell.type('/tuned\n')
    shell.until('you> ')
    shell.type('and then?\n')
    said = shell.until('you> ')
    assert 'tuned heard 4 messages' in said and 'base>' not in said
    shell.type('/retry\n')
    assert 'at 0.7' in shell.until('you> ')
    shell.type('/nonsense\n')
    assert 'there is no command /nonsense' in shell.until('you> ')
    shell.type('/help\n')
    assert '/reset' in shell.until('you> ')
    shell.type('/save talk.jsonl\n')
    assert 'saved as talk.jsonl' in shell.until('you> ')
    assert [r['user'] for r in map(json.loads, Path(tmp_path/'talk.jsonl').read_text().splitlines())] == ['hello', 'hello', 'and then?']
    shell.type('/reset\n')
    shell.until('you> ')
    shell.type('/both\n')
    shell.until('you> ')
    shell.type('again\n')
    assert 'base heard 2 messages' in shell.until('you> ')
    shell.type('escape\n')
    shell.until('you> ')
    assert '\x1b[2J' not in shell.raw
    shell.type('exit\n')
    shell.until('left in peace')
    assert shell.program.wait(10) == 0


def test_control_c_stops_the_reply_and_control_d_leaves(shell):
    shell.until('you> ')
    shell.type('slow\n')
    shell.until('word word word')
    shell.type('\x03')
    said = shell.until('you> ')
    assert '[stopped]' in said and said.count('word') < 500
    time.sleep(1) # until readline waits for a key: Python acts on a signal that comes just before only at the next key
    shell.type('\x03')
    assert 'Ctrl-D leaves' in shell.until('you> ')
    shell.type('hello\n')
    assert 'tuned heard' in shell.until('you> ')
    shell.type('\x1b[A\n')                                  # arrow up: the last line again
    assert 'heard' in shell.until('you> ')
    shell.type('\x04')
    shell.until('left in peace')
    assert shell.program.wait(10) == 0


def test_a_pipe_gets_replies_and_nothing_else():
    done = subprocess.run([sys.executable, '-c', TOY], input='/tuned\nhello\n\n', capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout == 'tuned will answer\ntuned heard 2 messages at 0.0.\nleft in peace\n'
