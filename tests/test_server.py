"The tutor behind an address: real clients, hostile ones and dead ones, on a real port."

import json
import signal
import socket
import threading
import time

import httpx2
import processes
import pytest
from openai import APIError, BadRequestError, InternalServerError, NotFoundError, OpenAI
from pydantic import BaseModel

from socratic_finetune.client import Client
from socratic_finetune.config import SocraticError, data_path, settings_for
from socratic_finetune.conversation import Conversation, generate_answer
from socratic_finetune.server import MAX_BODY, Scheduler, TutorServer, write_reply
from socratic_finetune.servers import connect_models
from socratic_finetune.tutor import Tutor

QUESTION = [dict(role='user', content='Why is the sky blue?')]
GOOD = dict(model='tuned', messages=QUESTION, max_tokens=6)
SOCRATIC = 'from socratic_finetune.pipeline import main; main()'


@pytest.fixture(scope='module')
def tutor():
    return Tutor.load(settings_for('pocket'), data_path('pocket', 'adapter'))


@pytest.fixture(scope='module')
def running(tutor):
    "A server of both models, and the lines that it reports."
    lines = []
    server = TutorServer(lambda: tutor, base=True, report=lines.append).start()
    server.lines = lines
    yield server
    server.close()


@pytest.fixture
def server(running):
    "The server, with the tutor's own way of writing and nothing reported."
    running.scheduler.write = write_reply
    running.lines.clear()
    return running


def client_of(server):
    return OpenAI(api_key='none', base_url=server.address, max_retries=0)


def until(condition):
    "Wait for something that another thread does."
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError('it did not happen')


def converse(server, raw, shut=False):
    "What the server sends back for some bytes."
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        connection.sendall(raw)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        received = b''
        while chunk := connection.recv(2**16):
            received += chunk
    return received


def http_post(body, *headers):
    lines = ['POST /v1/chat/completions HTTP/1.1', 'Host: localhost', 'Connection: close']
    lines += ['Content-Type: application/json', *headers]
    return '\r\n'.join([*lines, '', '']).encode() + body


# --- clients


def test_whole_and_streamed_replies_are_the_tutors(server, tutor):
    client = client_of(server)
    for model in ('base', 'tuned'):
        expected = tutor.reply(QUESTION, model)
        whole = client.chat.completions.create(model=model, messages=QUESTION)
        assert whole.choices[0].message.content.strip() == expected
        assert whole.choices[0].finish_reason == 'stop'
        options = dict(stream=True, stream_options=dict(include_usage=True))
        events = list(client.chat.completions.create(model=model, messages=QUESTION, **options))
        pieces = [event.choices[0].delta.content or '' for event in events if event.choices]
        assert ''.join(pieces).strip() == expected and len(pieces) > 5
        assert events[-2].choices[0].finish_reason == 'stop'
        assert events[-1].usage == whole.usage
        assert whole.usage.completion_tokens > 5


def test_limits_stops_and_seeds(server):
    create = client_of(server).chat.completions.create
    for name in ('max_tokens', 'max_completion_tokens'):
        cut = create(model='base', messages=QUESTION, **{name: 3})
        assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ('length', 3)
    text = create(model='base', messages=QUESTION).choices[0].message.content
    stop = text[10:14]
    stopped = create(model='base', messages=QUESTION, stop=['never there', stop]).choices[0]
    assert stopped.message.content == text[: text.index(stop)]
    assert stopped.finish_reason == 'stop'
    drawn = [create(model='base', messages=QUESTION, temperature=1.5, seed=7) for _ in range(2)]
    assert drawn[0].choices[0].message.content == drawn[1].choices[0].message.content


def test_several_at_once_write_what_each_would_alone(server, tutor):
    questions = ['Why is the sky blue?', 'What is light?', 'Explain tides.', 'Hello!']
    cases = [(arm, question) for question in questions for arm in ('base', 'tuned')]
    alone = [tutor.reply(question, arm) for arm, question in cases]
    replies = [None] * len(cases)

    def ask(i):
        arm, question = cases[i]
        messages = [dict(role='user', content=question)]
        answer = client_of(server).chat.completions.create(model=arm, messages=messages)
        replies[i] = answer.choices[0].message.content.strip()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == alone


def test_the_list_of_models(server):
    client = client_of(server)
    assert [model.id for model in client.models.list()] == ['base', 'tuned']
    assert client.models.retrieve('tuned').max_model_len > 100
    with pytest.raises(NotFoundError):
        client.models.retrieve('gpt-4o')


def test_only_the_tuned_model_unless_asked(tutor):
    server = TutorServer(lambda: tutor).start()
    assert [model.id for model in client_of(server).models.list()] == ['tuned']
    server.close()


def test_a_merged_folder(tutor, tmp_path):
    plain = Tutor.load(settings_for('pocket', fast_kernels=False), data_path('pocket', 'adapter'))
    plain.copies['tuned'].save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    settings = settings_for('pocket', base_model=str(tmp_path))
    server = TutorServer(lambda: Tutor.load(settings)).start()
    (model,) = client_of(server).models.list()
    answer = client_of(server).chat.completions.create(model=model.id, messages=QUESTION)
    assert answer.choices[0].message.content.strip() == tutor.reply(QUESTION)
    server.close()


def test_our_chat_is_a_client(server, tutor, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'a-key-of-this-test')
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    pair = connect_models(
        lambda: None, base=f'{server.address}#base', tuned=f'{server.address}#tuned'
    )
    conversation = Conversation(pair.arms, pair.system)
    conversation.ask(QUESTION[0]['content'])
    for arm in pair.arms:
        sampling = dict(max_new_tokens=96, temperature=0.0, seed=3)
        answer = generate_answer(conversation, pair, arm, **sampling)
        assert (answer.status, answer.text) == ('done', tutor.reply(QUESTION, arm))


class Verdict(BaseModel):
    "What our client asks for in the next test."

    socratic: float


def test_our_client_does_without_what_the_server_cannot_do(server, tmp_path):
    "As teacher and judge ask: with a JSON schema, which is refused; then with it in words."
    asked = []

    def answer_in_json(tutor, job):
        asked.append(job.request)
        yield '{"socratic": '
        yield '0.5}'

    server.scheduler.write = answer_in_json
    client = Client('tuned', client_of(server), cache=tmp_path, retries=0)
    assert client.ask('Judge.', 'A reply.', Verdict, seed=1) == Verdict(socratic=0.5)
    assert client.unsupported == {'response_format'}
    (request,) = asked
    assert [m.role for m in request.messages] == ['system', 'user'] and request.seed == 1
    assert any('socratic' in message.text for message in request.messages)


# --- hostile ones

BODIES = {
    'nothing': b'',
    'no JSON': b'\x00\xff{',
    'a number': b'7',
    'deep': b'[' * 100_000,
    'a long number': b'{"model": "tuned", "seed": ' + b'9' * 5000 + b'}',
    'infinite': json.dumps(GOOD | dict(temperature=float('inf'))).encode(),
    'not a number': json.dumps(GOOD | dict(top_p=float('nan'))).encode(),
    'a picture': json.dumps(
        GOOD | dict(messages=[dict(role='user', content=[dict(type='image_url', image_url='x')])])
    ).encode(),
    'no content': json.dumps(GOOD | dict(messages=[dict(role='user', content=None)])).encode(),
    'tools': json.dumps(GOOD | dict(tools=[dict(type='function')])).encode(),
    'seed': json.dumps(GOOD | dict(seed=-1)).encode(),
    'stops': json.dumps(GOOD | dict(stop=[7])).encode(),
}


@pytest.mark.parametrize('name', BODIES)
def test_a_hostile_body_is_told_what_is_wrong(server, capfd, name):
    body = BODIES[name]
    received = converse(server, http_post(body, f'Content-Length: {len(body)}'))
    head, _, content = received.partition(b'\r\n\r\n')
    error = json.loads(content)['error']
    assert head.startswith(b'HTTP/1.1 400 '), received[:200]
    assert error['type'] == 'invalid_request_error' and error['message']
    assert len(content) < 1000, 'it sends the whole body back'
    assert client_of(server).chat.completions.create(**GOOD)  # and lives
    assert capfd.readouterr().err == ''


TWO_BYTES = http_post(b'{}', 'Content-Length: 2')
REQUESTS = {
    'no HTTP': (b'\x16\x03\x01\x02\x00\x01\r\n\r\n', 400),
    'a long address': (b'GET /' + b'a' * 70_000 + b' HTTP/1.1\r\n\r\n', 414),
    'many headers': (b'GET / HTTP/1.1\r\n' + b'A: b\r\n' * 300 + b'\r\n', 431),
    'a method': (b'BREW /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n', 501),
    'a pre-flight': (b'OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n', 501),
    'a page': (b'GET /../../passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n', 404),
    'chunks': (http_post(b'2\r\n{}\r\n0\r\n\r\n', 'Transfer-Encoding: chunked'), 411),
    'no length': (http_post(b''), 411),
    'a negative length': (http_post(b'', 'Content-Length: -5'), 411),
    'a foreign page': (TWO_BYTES.replace(b'localhost', b'evil.test'), 403),
    'a form': (TWO_BYTES.replace(b'application/json', b'text/plain'), 415),
}  # fmt: skip


@pytest.mark.parametrize('name', REQUESTS)
def test_what_is_hardly_a_request_gets_an_error_object(server, capfd, name):
    raw, status = REQUESTS[name]
    received = converse(server, raw)
    head, _, content = received.partition(b'\r\n\r\n')
    if name != 'no HTTP':  # which is answered as HTTP 0.9, without a head
        assert head.startswith(f'HTTP/1.1 {status} '.encode()), received[:200]
        content = content or head
        assert json.loads(content)['error']['message']
    assert b'<html' not in received.lower()
    assert capfd.readouterr().err == ''


def test_a_body_without_end_is_not_kept(server):
    received = converse(
        server, http_post(b'a' * (MAX_BODY + 1), f'Content-Length: {MAX_BODY + 1}')
    )
    assert received.startswith(b'HTTP/1.1 413 ')
    announced = http_post(b'{"model"', 'Content-Length: 999')
    assert converse(server, announced, shut=True) == b''  # who leaves in the middle hears nothing
    assert client_of(server).chat.completions.create(**GOOD)


def test_errors_are_those_of_the_library(server):
    create = client_of(server).chat.completions.create
    with pytest.raises(NotFoundError) as unknown:
        create(model='gpt-4o', messages=QUESTION)
    assert unknown.value.code == 'model_not_found'
    with pytest.raises(BadRequestError) as long:
        create(model='tuned', messages=[dict(role='user', content='why ' * 3000)])
    assert long.value.code == 'context_length_exceeded'
    with pytest.raises(BadRequestError) as negative:
        create(model='tuned', messages=QUESTION, max_tokens=-1)
    assert negative.value.param == 'max_tokens'


# --- broken models, and clients that leave


def test_a_model_that_fails(server, capfd):
    def fail_at_once(tutor, job):
        raise RuntimeError('no memory\nand more')
        yield

    def fail_later(tutor, job):
        yield 'Half a '
        raise RuntimeError('no memory')

    create = client_of(server).chat.completions.create
    server.scheduler.write = fail_at_once
    for stream in (False, True):
        with pytest.raises(InternalServerError, match='RuntimeError: no memory'):
            create(**GOOD, stream=stream)
    server.scheduler.write = fail_later
    with pytest.raises(APIError, match='no memory'):
        list(create(**GOOD, stream=True))
    assert 'and more' not in str(server.lines)
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('stream', [True, False])
def test_who_leaves_is_not_written_for(server, capfd, stream):
    counts = []

    def endless(tutor, job):
        while True:
            counts.append(job)
            time.sleep(0.001)
            yield 'and so on '

    server.scheduler.write = endless
    body = json.dumps(GOOD | dict(stream=stream)).encode()
    connection = socket.create_connection(server.server_address[:2])
    connection.sendall(http_post(body, f'Content-Length: {len(body)}'))
    until(lambda: counts)
    if stream:
        assert connection.recv(100).startswith(b'HTTP/1.1 200')
    connection.close()
    until(lambda: not server.scheduler.running)
    until(lambda: server.lines)
    assert 'the client left' in server.lines[-1]
    assert capfd.readouterr().err == ''


def test_too_many_are_sent_away_and_told_to_come_back(tutor):
    gate = threading.Event()

    def wait(tutor, job):
        gate.wait()
        yield 'done'

    server = TutorServer(lambda: tutor)
    server.scheduler.close()
    server.scheduler = Scheduler(tutor, most=1, write=wait)
    server.start()
    first = threading.Thread(target=lambda: client_of(server).chat.completions.create(**GOOD))
    first.start()
    until(lambda: server.scheduler.running)
    until(lambda: post_status(server) == 503)
    gate.set()
    first.join()
    until(lambda: post_status(server) == 200)
    server.close()


def post_status(server):
    answer = httpx2.post(f'{server.address}/chat/completions', json=GOOD)
    assert answer.status_code != 503 or answer.headers['Retry-After'] == '1'
    return answer.status_code


def test_a_report_holds_no_word_of_what_was_said(server):
    client_of(server).chat.completions.create(**GOOD)
    until(lambda: server.lines)
    (line,) = server.lines
    assert 'tuned' in line and '+ 6 tokens' in line and 'length' in line
    assert 'sky' not in line


# --- the command


def test_an_address_that_cannot_be_had(tutor, server):
    port = server.server_address[1]
    for host, number in (('127.0.0.1', port), ('127.0.0.1', 70_000), ('no.such.host.test', 0)):
        with pytest.raises(SocraticError, match='choose another --port or --host'):
            TutorServer(lambda: pytest.fail('the model was loaded'), host, number)


def test_the_command_serves_until_ctrl_c(tmp_path):
    env = processes.environment_without('OPENAI_', SOCRATIC_RUNS=tmp_path)
    serving = processes.Fork(SOCRATIC, 'serve', '--port', '0', '--base', cwd=tmp_path, env=env)
    until(lambda: 'http://' in serving.printed('stdout') or not serving.process.is_alive())
    said = serving.printed('stdout')
    assert 'base and tuned at http://127.0.0.1:' in said, serving.printed('stderr')
    address = said[said.index('http://') :].split()[0]
    client = OpenAI(api_key='none', base_url=address, max_retries=0)
    assert client.chat.completions.create(**GOOD).choices[0].message.content
    serving.send_signal(signal.SIGINT)
    done = serving.wait(60)
    assert (done.returncode, done.stderr) == (0, '')
    assert 'ended' in done.stdout
