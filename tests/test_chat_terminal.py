"The terminal chat in a real pseudo-terminal, in a pipe, and with servers as its sides."
import json, os, re, select, signal, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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

    def press(self, key, text):
        "Press a key until a text comes: Python acts on a signal that arrives just before readline waits only at the next key."
        for _ in range(100):
            self.type(key)
            start = len(self.seen)
            try: return self.until(text, 1)
            except AssertionError:
                if self.program.poll() is not None: raise
                if text in self.seen[start:]: return
        raise AssertionError(f'no {text!r} after 100 times {key!r}')

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
    shell.press('\x03', 'Ctrl-D leaves')
    shell.type('hello\n')
    shell.until('tuned heard')
    shell.until('you> ')
    shell.type('\x1b[A\n')                                  # arrow up: the last line again
    assert 'heard' in shell.until('you> ')
    shell.type('\x04')
    shell.until('left in peace')
    assert shell.program.wait(10) == 0


def test_a_pipe_gets_replies_and_nothing_else():
    done = subprocess.run([sys.executable, '-c', TOY], input='/tuned\nhello\n\n', capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, 'tuned will answer\n')
    assert done.stdout == 'tuned heard 2 messages at 0.0.\nleft in peace\n'


class Server(BaseHTTPRequestHandler):
    "An OpenAI-compatible server with two models, each of which says its name, the number of messages, and no more."
    protocol_version = 'HTTP/1.0'

    def do_GET(self): self.say('application/json', json.dumps(dict(object='list', data=[dict(id='large', object='model'), dict(id='small', object='model')])))

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        words = f"{asked['model']} heard {len(asked['messages'])} messages".split(' ')
        pieces = [dict(choices=[dict(index=0, delta=dict(content=w if i == 0 else f' {w}'))]) for i, w in enumerate(words)]
        self.say('text/event-stream', ''.join(f'data: {json.dumps(p)}\n\n' for p in pieces) + 'data: [DONE]\n\n')

    def say(self, kind, text):
        self.send_response(200)
        self.send_header('Content-Type', kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_): pass


@pytest.fixture
def server():
    s = ThreadingHTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_address[1]}/v1'
    s.shutdown()
    s.server_close()


SOCRATIC = ['-c', 'from socratic_finetune.pipeline import main; main()']


def run(*args, said=''):
    env = {k: v for k, v in os.environ.items() if not k.startswith('OPENAI_')} | dict(OPENAI_API_KEY='a-key-of-this-test', NO_PROXY='127.0.0.1')
    return subprocess.run([sys.executable, *args], input=said, capture_output=True, text=True, timeout=300, env=env)


def test_servers_as_sides(server):
    done = run(*SOCRATIC, 'chat', '--base', f'{server}#small', '--tuned', f'{server}#large', said='Why?\nAnd then?\n')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.splitlines() == ['base> small heard 2 messages', 'tuned> large heard 2 messages',
                                        'base> small heard 4 messages', 'tuned> large heard 4 messages']


@pytest.mark.parametrize('args, words', [
    (['--tuned', '{server}'], 'name one after a #'),
    (['--tuned', 'http://127.0.0.1:9/v1'], 'check that the server is up'),
    (['--base', 'gpt-4o'], 'is not the address of a server')])
def test_a_server_that_cannot_answer(server, args, words):
    for command in ([*SOCRATIC, 'chat'], ['-m', 'socratic_finetune.chat', '--no-browser']):
        done = run(*command, *(a.format(server=server) for a in args), said='Why?\n')
        assert done.returncode == 1 and words in done.stderr, done.stderr
        assert 'Traceback' not in done.stderr and 'a-key-of-this-test' not in done.stdout + done.stderr
