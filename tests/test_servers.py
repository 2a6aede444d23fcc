"A real server as one side of a chat: through the functions, the terminal and the command line."

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import processes
import pytest
from openai import OpenAI

from socratic_finetune.chat import serve_chat
from socratic_finetune.config import SocraticError
from socratic_finetune.conversation import Conversation, ScriptedTutor, generate_answer
from socratic_finetune.servers import ModelPair, connect_endpoint, connect_models
from socratic_finetune.terminal import chat_terminal

KEY = 'a-key-of-this-test'
UNREACHABLE = 'http://127.0.0.1:9/v1'
SOCRATIC = 'from socratic_finetune.pipeline import main; main()'


class Handler(BaseHTTPRequestHandler):
    "Two models, each of which says its name and the number of messages, and no more."

    protocol_version = 'HTTP/1.0'

    def do_GET(self):
        models = [dict(id=name, object='model') for name in ('large', 'small')]
        self.respond('application/json', json.dumps(dict(object='list', data=models)))

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        reply = f'{request["model"]} heard {len(request["messages"])} messages'
        events = []
        for i, word in enumerate(reply.split(' ')):
            delta = dict(content=word if i == 0 else f' {word}')
            events.append(json.dumps(dict(choices=[dict(index=0, delta=delta)])))
        lines = [f'data: {event}\n\n' for event in [*events, '[DONE]']]
        self.respond('text/event-stream', ''.join(lines))

    def respond(self, content_type, text):
        self.send_response(200)
        self.send_header('Content-Type', content_type)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        "Say nothing on standard error."


@pytest.fixture
def server():
    "The address of a server with two models."
    http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{http.server_address[1]}/v1'
    http.shutdown()
    http.server_close()


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.delenv('OPENAI_BASE_URL', raising=False)


def must_not_load():
    raise AssertionError('the local model was loaded')


def test_two_servers_need_no_local_model(server, key):
    pair = connect_models(must_not_load, f'{server}#small', f'{server}#large')
    sink = io.StringIO()
    chat_terminal(pair, source=io.StringIO('Why?\nAnd then?\n'), sink=sink)
    assert sink.getvalue().splitlines() == [
        'base> small heard 2 messages',
        'tuned> large heard 2 messages',
        'base> small heard 4 messages',
        'tuned> large heard 4 messages',
    ]


def test_one_server_beside_the_local_model(server, key):
    local = ScriptedTutor({'base': 'Air.', 'tuned': 'Why?'})
    pair = connect_models(lambda: local, base=f'{server}#small')
    assert pair.tutors['tuned'] is local
    assert connect_models(lambda: local) is local


def test_each_model_of_a_pair_has_its_own_context_window():
    large = ScriptedTutor({'base': 'Air.', 'tuned': 'Why?'})
    small = ScriptedTutor(large.replies)
    small.context = 300
    conversation = Conversation()
    conversation.ask('long ' * 200)
    pair = ModelPair(large, small)
    answers = [generate_answer(conversation, pair, arm, max_new_tokens=96) for arm in pair.arms]
    assert [answer.status for answer in answers] == ['done', 'failed']


@pytest.mark.parametrize('list_status', [404, 500])
def test_a_server_without_a_list_of_models(list_status):
    def respond(request):
        return httpx2.Response(list_status, json=dict(error=dict(message='no')))

    address = 'http://gateway.test/v1'
    transport = httpx2.Client(transport=httpx2.MockTransport(respond))
    client = OpenAI(api_key=KEY, base_url=address, max_retries=0, http_client=transport)
    assert connect_endpoint(f'{address}#tutor', client).model == 'tutor'
    with pytest.raises(SocraticError, match='gateway.test'):
        connect_endpoint(address, client)


ERRORS = [
    (['--tuned', '{server}'], 'name one after a #'),
    (['--tuned', UNREACHABLE], 'check that the server is up'),
    (['--base', 'gpt-4o'], 'is not the address of a server'),
]


def run_socratic(*args, lines=''):
    keys = dict(OPENAI_API_KEY=KEY, NO_PROXY='127.0.0.1')
    env = processes.environment_without('OPENAI_', **keys)
    return processes.run(SOCRATIC, 'chat', *args, stdin=lines, env=env)


def test_servers_on_the_command_line(server):
    args = ['--base', f'{server}#small', '--tuned', f'{server}#large']
    done = run_socratic(*args, lines='Why?\n')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.splitlines() == [
        'base> small heard 2 messages',
        'tuned> large heard 2 messages',
    ]


@pytest.mark.parametrize('args, words', ERRORS)
def test_a_server_that_cannot_answer(server, args, words):
    args = [arg.format(server=server) for arg in args]
    done = run_socratic(*args, lines='Why?\n')
    assert done.returncode == 1
    assert words in done.stderr
    assert 'Traceback' not in done.stderr
    assert KEY not in done.stdout + done.stderr


@pytest.mark.parametrize('args, words', ERRORS)
def test_the_page_is_not_served_without_its_server(server, key, args, words):
    flag, address = args
    arm = flag.removeprefix('--')
    with pytest.raises(SocraticError, match=words) as raised:
        serve_chat(browser=False, **{arm: address.format(server=server)})
    assert KEY not in str(raised.value)
