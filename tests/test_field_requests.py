"""What other people's servers, models and proxies send, as reports from the field describe it.

One row of a table is one case: what a server sends, and what becomes of it, in data and in words.
A single loopback server plays all of them; which one is in the address. At the end, seeded
mutations of answers and streams: whatever comes, the outcome is a right row, a reply that is
marked as cut, or one sentence."""

import json
import os
import random
import re
import shutil
import ssl
import subprocess
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from types import SimpleNamespace
from unittest import mock

import pytest
from openai import DefaultHttpxClient, OpenAI
from pydantic import BaseModel
from typer.testing import CliRunner

from socratic_finetune.client import (
    Client,
    FatalError,
    client_for,
    get_price,
    openai_client,
    run_batch,
)
from socratic_finetune.config import Run, SocraticError, read_jsonl, settings_for
from socratic_finetune.conversation import Conversation, generate_answer, save_conversation
from socratic_finetune.evaluate import score
from socratic_finetune.generate import generate
from socratic_finetune.judge import CRITERIA, OpenAIJudge, judge_file, make_case
from socratic_finetune.pipeline import _explain_failure, app
from socratic_finetune.servers import Endpoint, connect_endpoint
from socratic_finetune.teacher import OpenAITeacher, Reply
from socratic_finetune.terminal import chat_terminal
from socratic_finetune.topics import load_topics

KEY = 'sk-' + 'field-0123456789-only-for-this-file'
BANK = load_topics()
pytestmark = pytest.mark.xdist_group('field_requests')


class Verse(BaseModel):
    line: str


# --- a server that plays all others ---------------------------------------------------------


@dataclass
class Sent:
    "What the server sends."

    body: str | bytes = ''
    status: int = 200
    type: str = 'application/json'
    headers: dict = field(default_factory=dict)
    delay: float = 0.0
    missing: int = 0  # bytes that are announced and never sent


def data(value, **options):
    return Sent(json.dumps(value), **options)


def completion(content, finish='stop', **message):
    message = dict(role='assistant', content=content, **message)
    return data(dict(choices=[dict(index=0, message=message, finish_reason=finish)]))


def failure(http_status, message='', http_headers=None, /, **fields):
    error = dict(message=message, **fields)
    return data(dict(error=error), status=http_status, headers=http_headers or {})


def events(*parts, done=True, finish=None):
    "A stream: texts and lists are contents of a delta, dicts are whole events."
    bodies = []
    for part in parts:
        is_event = isinstance(part, dict)
        bodies.append(part if is_event else dict(choices=[dict(delta=dict(content=part))]))
    if finish:
        bodies.append(dict(choices=[dict(delta={}, finish_reason=finish)]))
    text = ''.join(f'data: {json.dumps(body)}\n\n' for body in bodies)
    return Sent(text + ('data: [DONE]\n\n' if done else ''), type='text/event-stream')


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    wbufsize = -1
    plays = {}  # what is sent, in order, by the first part of the path; the last one repeats
    requests = defaultdict(list)

    def do_POST(self):
        name = self.path.split('/')[1]
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        self.requests[name].append(body)
        play = self.plays[name]
        sent = play[min(len(self.requests[name]), len(play)) - 1]
        self.respond(sent(body) if callable(sent) else sent)

    def do_GET(self):
        self.respond(self.plays[self.path.split('/')[1] + ':models'])

    def do_CONNECT(self):
        self.send_error(403, 'Blocked by policy')

    def respond(self, sent):
        time.sleep(sent.delay)
        content = sent.body if isinstance(sent.body, bytes) else sent.body.encode()
        with suppress(OSError):
            self.send_response(sent.status)
            for name, value in {'Content-Type': sent.type, **sent.headers}.items():
                self.send_header(name, value)
            self.send_header('Content-Length', str(len(content) + sent.missing))
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()
        self.close_connection = self.close_connection or bool(sent.missing)

    def log_message(self, *_):
        pass


@pytest.fixture(scope='module')
def address():
    http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{http.server_port}'
    http.shutdown()
    http.server_close()


@pytest.fixture(scope='module')
def connections():
    "One pool of connections for all clients; proxies of the environment do not count."
    with DefaultHttpxClient(trust_env=False) as http:
        yield http


@pytest.fixture
def play(address, connections, request):
    "A client of the `openai` library for a server that sends the given answers, and its log."

    def start(*answers, models=None, timeout=20.0):
        name = re.sub(r'\W+', '-', request.node.name)
        Handler.plays[name] = answers
        Handler.plays[f'{name}:models'] = models or data(dict(data=[dict(id='m')]))
        Handler.requests[name] = []
        openai = OpenAI(
            api_key=KEY,
            base_url=f'{address}/{name}/v1',
            http_client=connections,
            max_retries=0,
            timeout=timeout,
        )
        return openai, Handler.requests[name]

    return start


def new_client(openai, folder, **options):
    client = Client('m', openai, folder, **{'pause': 0, 'retries': 1, **options})
    client.waits = []
    client.sleep = client.waits.append  # nobody waits here; what was asked for is seen
    return client


def one_sentence(error):
    "Whether an error is fit for a reader."
    text = str(error)
    assert text and '\n' not in text and len(text) < 900, text
    assert KEY not in text and 'Traceback' not in text
    return text


# --- answers that hold the right object -----------------------------------------------------

LATEX = r'Is $\frac{1}{2} \times \beta$ or \(\nabla f\), with \rho, \alpha and $a \neq b$?'
EXAMPLE = 'Perhaps {"line": "It is inertia."} But that tells the answer.\n'
GOOD = '{"line": "What moves?"}'
ANSWERS = {
    'a thought before': f'<think>\nMaybe {EXAMPLE}</think>\n{GOOD}',
    'a thought whose tag is in the template': f'{EXAMPLE}</think>\n\n{GOOD}',
    'Mistral thoughts': f'[THINK]{EXAMPLE}[/THINK]{GOOD}',
    'Kimi thoughts': f'◁think▷{EXAMPLE}◁/think▷{GOOD}',
    'two thoughts': f'<thinking>{EXAMPLE}</thinking>\n<think>{EXAMPLE}</think>\n{GOOD}',
    'harmony channels': (
        f'<|channel|>analysis<|message|>{EXAMPLE}<|end|><|start|>assistant'
        f'<|channel|>final <|constrain|>json<|message|>{GOOD}<|return|>'
    ),
    'harmony without its tokens': f'analysisWe need JSON: {EXAMPLE}assistantfinal{GOOD}',
    'reasoning in plain words before': f'Let me think. {EXAMPLE}So:\n```json\n{GOOD}\n```',
    'reasoning, then JSON that needs repair': EXAMPLE + '{"line": "What moves?",}',
    'an object around it': '{"answer": {"line": "What moves?"}}',
}
TEXTS = {
    'LaTeX that is not escaped': ('{"line": "%s"}' % LATEX, LATEX),
    'LaTeX that is escaped': (json.dumps(dict(line=LATEX)), LATEX),
    'LaTeX in both ways': (
        r'{"line": "$\frac{1}{2} \\times \text{m}$"}',
        r'$\frac{1}{2} \times \text{m}$',
    ),
    'line ends and tabs before words': (r'{"line": "One\nnew\ttop\nnot"}', 'One\nnew\ttop\nnot'),
    'half an emoji': (r'{"line": "Well done \ud83d"}', 'Well done \ufffd'),
    'an emoji as two escapes': (r'{"line": "Well done \ud83d\ude00"}', 'Well done 😀'),
}
WHOLE = {
    'content as a list of parts': completion(
        [
            dict(type='thinking', thinking=[dict(type='text', text=EXAMPLE)]),
            dict(type='text', text=GOOD),
        ]
    ),
    'reasoning in a field of its own': completion(GOOD, reasoning_content=EXAMPLE),
    'half an emoji in the answer itself': Sent(
        r'{"choices": [{"message": {"content": "{\"line\": \"What moves?\"} \ud83d"}}]}'
    ),
    'JSON as text/plain': Sent(completion(GOOD).body, type='text/plain; charset=utf-8'),
    'a byte order mark': Sent(b'\xef\xbb\xbf' + completion(GOOD).body.encode()),
    'a stream though none was asked for': events('{"line": ', '"What moves?"}', finish='stop'),
    'usage that is no numbers': data(
        dict(
            choices=[dict(message=dict(content=GOOD))],
            usage=dict(prompt_tokens='12', completion_tokens=-1, prompt_tokens_details=[]),
        )
    ),
    'error: null beside the answer': data(
        dict(error=None, choices=[dict(message=dict(content=GOOD, refusal=''))])
    ),
    'whole before its limit': completion(f'{GOOD} and so on', 'length'),
}


@pytest.mark.parametrize('name', [*ANSWERS, *TEXTS, *WHOLE])
def test_the_object_that_was_meant(name, play, tmp_path):
    text, line = TEXTS.get(name, (ANSWERS.get(name), 'What moves?'))
    openai, log = play(WHOLE.get(name) or completion(text))
    client = new_client(openai, tmp_path)
    found = client.ask('You write verse.', 'One line.', Verse)
    assert found.line == line and len(log) == 1
    assert client.ask('You write verse.', 'One line.', Verse) == found  # from disk
    assert len(log) == 1 and client.ledger.usage()['cost'] == 0


# --- answers that are asked for once more ---------------------------------------------------


def without(*names, message, status=400, **fields):
    "A server that turns some parameters down."

    def respond(body):
        if any(name in body for name in names):
            return failure(status, message, **fields)
        return completion(GOOD)

    return respond


def without_system(status, message):
    def respond(body):
        roles = [turn['role'] for turn in body['messages']]
        return failure(status, message) if 'system' in roles else completion(GOOD)

    return respond


FAILED_GENERATION = failure(
    400, 'Failed to generate JSON', code='json_validate_failed', failed_generation='```json\n{'
)
ASKED_AGAIN = {
    'an empty answer': [completion(''), completion(GOOD)],
    'an answer of nothing but a thought': [completion('<think>Hm.</think>'), completion(GOOD)],
    'no content at all': [completion(None), completion(GOOD)],
    'an example, and the answer cut off': [
        completion(f'{EXAMPLE}{{"line": "Wh'),
        completion(GOOD),
    ],
    'a control character': [completion('{"line": "\\u0007 bell"}'), completion(GOOD)],
    'json_validate_failed': [FAILED_GENERATION, completion(GOOD)],
    'a model that is being loaded': [failure(503, 'Loading model'), completion(GOOD)],
    'an error inside a 200': [data(dict(error=dict(message='busy', code=429))), completion(GOOD)],
    'a choice that is an error': [
        data(dict(choices=[dict(error=dict(code=502, message='gone'), finish_reason='error')])),
        completion(GOOD),
    ],
    'a page of a gateway': [Sent('<h1>502 Bad Gateway</h1>', 502, 'text/html'), completion(GOOD)],
    'an answer that breaks off': [Sent(completion(GOOD).body[:30], missing=99), completion(GOOD)],
    'no choices': [data(dict(choices=None)), completion(GOOD)],
}
LEFT_OUT = {  # what the server cannot do, and how it says so
    'a parameter that is named': ('seed', without('seed', message='no', param='seed')),
    'a value that is not supported': (
        'temperature',
        without(
            'temperature',
            message="Unsupported value: 'temperature' does not support 0.7 with this model.",
            param='temperature',
            code='unsupported_value',
        ),
    ),
    'a type that is unavailable': (
        'response_format',
        without('response_format', message='This response_format type is unavailable now'),
    ),
    'a format the model has not': (
        'response_format',
        without(
            'response_format',
            message='This model does not support response format `json_schema`. See the docs.',
        ),
    ),
    'extra fields, as FastAPI says it': (
        'seed',
        lambda body: (
            data(
                dict(detail=[dict(loc=['body', 'seed'], msg='extra fields not permitted')]),
                status=422,
            )
            if 'seed' in body
            else completion(GOOD)
        ),
    ),
    'extra fields, as vLLM says it': (
        'seed',
        without(
            'seed',
            message="[{'type': 'extra_forbidden', 'loc': ('body', 'seed'), 'input': 3}]",
        ),
    ),
    'no system role': ('system role', without_system(400, 'System role not supported')),
    'no developer instruction': (
        'system role',
        without_system(400, 'Developer instruction is not enabled for models/gemma-3-27b-it'),
    ),
    'a template that wants turns to alternate': (
        'system role',
        without_system(500, 'Jinja Exception: Conversation roles must alternate user/assistant'),
    ),
    'roles that are listed': (
        'system role',
        without_system(422, 'Only user, assistant and tool roles are supported, got system.'),
    ),
}


@pytest.mark.parametrize('name', ASKED_AGAIN)
def test_asked_once_more(name, play, tmp_path):
    openai, log = play(*ASKED_AGAIN[name])
    client = new_client(openai, tmp_path)
    assert client.ask('You write verse.', 'One line.', Verse).line == 'What moves?'
    assert len(log) == 2
    assert all(turn['content'].strip() for body in log for turn in body['messages'])
    assert 'response_format' not in client.unsupported


@pytest.mark.parametrize('name', LEFT_OUT)
def test_what_a_server_cannot_do_is_left_out(name, play, tmp_path):
    parameter, server = LEFT_OUT[name]
    openai, log = play(server)
    client = new_client(openai, tmp_path)
    for line in ('One.', 'Another.'):
        found = client.ask('You write verse.', line, Verse, seed=3)
        assert found.line == 'What moves?'
    assert client.unsupported == {parameter} and len(log) == 3  # learned once
    told = ' '.join(turn['content'] for turn in log[-1]['messages'])
    assert 'You write verse.' in told and 'Another.' in told


ECHOES = [
    "Prompt is too long in {'seed': 3, 'temperature': 0.7, 'response_format': {'type': 'x'}}",
    'Invalid request [seed=3, temperature=0.7, response_format=json]: context_length_exceeded',
]


@pytest.mark.parametrize('message', ECHOES)
def test_an_echo_switches_nothing_off(message, play, tmp_path):
    openai, log = play(failure(400, message), completion(GOOD))
    client = new_client(openai, tmp_path)
    with pytest.raises(SocraticError, match='turned the request down .400.') as raised:
        client.ask('You write verse.', 'A long one.', Verse, seed=3)
    assert len(log) == 1 and not client.unsupported and one_sentence(raised.value)
    client.ask('You write verse.', 'A short one.', Verse, seed=3)
    assert {'response_format', 'seed', 'temperature'} <= set(log[1])


def test_a_parameter_is_given_up_only_for_an_answer(play, tmp_path):
    always = failure(400, 'seed is not supported, temperature is not supported')
    openai, log = play(always)
    client = new_client(openai, tmp_path)
    with pytest.raises(SocraticError, match='turned the request down'):
        client.ask('You write verse.', 'One line.', Verse, seed=3)
    assert len(log) == 3 and not client.unsupported


# --- errors in the words of whoever knows ---------------------------------------------------

GEMINI_DAY = failure(
    429,
    'You exceeded your current quota, please check your plan and billing details',
    status='RESOURCE_EXHAUSTED',
    details=[
        dict(violations=[dict(quotaId='GenerateRequestsPerDayPerProjectPerModel-FreeTier')]),
        dict(retryDelay='38s'),
    ],
)
FINAL = {  # the run stops at the first request
    '402': (failure(402, 'This request requires more credits'), 'no credit.*more credits'),
    '402 inside a 200': (
        data(dict(error=dict(message='Insufficient credits', code=402))),
        'no credit left: Insufficient credits',
    ),
    'an empty account as 400': (
        failure(400, 'Your credit balance is too low to access the API'),
        'no credit left: Your credit balance',
    ),
    'an empty account as 429': (
        failure(429, 'You exceeded your current quota', code='insufficient_quota'),
        'no credit left',
    ),
    'a suspended account': (
        failure(429, 'Your account is suspended, please check your billing', type='quota'),
        'no credit left: Your account is suspended',
    ),
    'credits of the month': (
        data(dict(error='You have exceeded your monthly included credits'), status=402),
        'no credit left: You have exceeded your monthly',
    ),
    "Gemini's day": (GEMINI_DAY, 'quota of the day .* go on tomorrow'),
    'free models of the day': (
        failure(429, 'Rate limit exceeded: free-models-per-day'),
        'quota of the day .*free-models-per-day',
    ),
    'a wait of hours': (
        failure(429, 'Rate limit reached. Please try again in 1h12m30s'),
        'asks to wait 4350 s: go on later',
    ),
    'a key that is wrong': (failure(401, 'Invalid API key'), 'OPENAI_API_KEY.*Invalid API key'),
    'a country': (failure(403, 'Country, region, or territory not supported'), 'Country, region'),
    'a model that is not there': (
        data(dict(error='model "m" not found, try pulling it first'), status=404),
        'has no model .m.: check openai_model.*try pulling it first',
    ),
    'a method that is not allowed': (failure(405), 'check OPENAI_BASE_URL'),
    'a web page': (
        Sent('<!doctype html><title>Open WebUI</title><p>Sign in', type='text/html'),
        r'answers with a web page .Open WebUI Sign in.: check OPENAI_BASE_URL',
    ),
}
ONE_ROW = {  # the row is set aside, the run goes on
    'moderation': (
        failure(403, 'Your chosen model requires moderation and your input was flagged', code=403),
        'turned the request down .403.: Your chosen model',
    ),
    'a content policy': (
        failure(
            400,
            "The response was filtered due to the prompt triggering Azure OpenAI's content "
            'management policy',
            code='content_filter',
            param='prompt',
        ),
        'turned the request down .400.: The response was filtered',
    ),
    'a filter': (completion('', 'content_filter'), 'm refused: its content filter'),
    "a filter in Google's words": (completion('{"line": "x"}', 'SAFETY'), 'm refused'),
    'a refusal': (completion(None, refusal='I would rather not.'), 'refused: I would rather not'),
    'a wrapped error': (
        data([dict(error=dict(code=400, message='Prompt is too long'))], status=400),
        'turned the request down .400.: Prompt is too long',
    ),
    'cut off in its thoughts': (
        completion(None, 'length', reasoning_content='The student'),
        'cut off after 1,000 tokens.* --set api_max_tokens=4000',
    ),
    'cut off after an example': (completion(f'{EXAMPLE}{{"line": "Wh', 'length'), 'was cut off'),
    'empty twice': (completion(''), 'answered twice outside .*: the answer is empty'),
    'of another form twice': (completion('{"line": 5}'), 'outside the schema Verse: line: Input'),
    'out of memory': (failure(500, 'CUDA out of memory'), 'in 2 attempts .*CUDA out of memory'),
    'loading': (failure(503, 'Loading model'), 'in 2 attempts .*: Loading model'),
    'busy inside a 200': (
        data(
            dict(
                choices=None,
                error=dict(
                    message='Provider returned error',
                    code=429,
                    metadata=dict(raw='Too Many Requests'),
                ),
            )
        ),
        r'in 2 attempts .*: Provider returned error .Too Many Requests.',
    ),
    'no word at all': (Sent('', 503), 'in 2 attempts .* no reason; check that the server is up'),
    'JSON nested too deeply': (Sent('[' * 99_999), 'in 2 attempts .*the answer is not JSON'),
    'an object nested too deeply': (completion('{"line": ' + '[' * 9999), 'twice outside'),
}


@pytest.mark.parametrize('name', [*FINAL, *ONE_ROW])
def test_errors_say_why(name, play, tmp_path):
    sent, words = FINAL.get(name) or ONE_ROW[name]
    openai, log = play(sent)
    with pytest.raises(SocraticError, match=words) as raised:
        new_client(openai, tmp_path).ask('You write verse.', 'One line.', Verse)
    assert one_sentence(raised.value)
    assert isinstance(raised.value, FatalError) == (name in FINAL)
    assert len(log) == 1 if name in FINAL else len(log) <= 2


WAITS = {
    "Gemini's retryDelay": (
        failure(429, 'You exceeded your current quota', details=[dict(retryDelay='38s')]),
        38,
    ),
    "Groq's sentence": (failure(429, 'Rate limit. Please try again in 7m12.5s.'), 432.5),
    'a header': (failure(429, 'slow down', {'Retry-After': '9'}), 9),
}


@pytest.mark.parametrize('name', WAITS)
def test_a_wait_that_is_asked_for(name, play, tmp_path):
    sent, seconds = WAITS[name]
    openai, _ = play(sent, completion(GOOD))
    client = new_client(openai, tmp_path)
    assert client.ask('You write verse.', 'One line.', Verse).line == 'What moves?'
    assert seconds <= max(client.waits) <= 1.1 * seconds


def test_a_slow_model_is_told_from_a_dead_one(play, tmp_path):
    openai, _ = play(Sent(completion(GOOD).body, delay=0.6), timeout=0.2)
    client = new_client(openai, tmp_path, retries=0)
    with pytest.raises(SocraticError, match=r'no answer within 0.2 s.*api_timeout=0.6'):
        client.ask('You write verse.', 'One line.', Verse)


def test_more_room_asks_only_for_what_was_cut(play, tmp_path):
    def respond(body):
        is_long = 'long' in body['messages'][-1]['content']
        cut = is_long and body['max_completion_tokens'] < 4000
        return completion('{"line": "Wh', 'length') if cut else completion(GOOD)

    openai, log = play(respond)
    client = new_client(openai, tmp_path)
    client.ask('You write verse.', 'A short one.', Verse)
    with pytest.raises(SocraticError, match='was cut off'):
        client.ask('You write verse.', 'A long one.', Verse)
    roomy = new_client(openai, tmp_path, max_tokens=4000)
    for line in ('A short one.', 'A long one.'):
        assert roomy.ask('You write verse.', line, Verse).line == 'What moves?'
    assert len(log) == 3 and log[-1]['max_completion_tokens'] == 4000


def test_a_batch_with_a_line_that_is_none(tmp_path):
    client = Client('m', OpenAI(api_key=KEY, base_url='https://llm.example.com/v1'), tmp_path)
    client.batch = True
    with suppress(Exception):
        client.ask('You write verse.', 'One line.', Verse)
    (key,) = client.pending
    lines = [
        'no JSON',
        '[1]',
        json.dumps(dict(custom_id='other', response=None)),
        json.dumps(dict(custom_id=key, response=dict(status_code=200, body=dict(choices=[])))),
    ]
    batch = SimpleNamespace(
        id='b', status='completed', output_file_id='f', error_file_id=None, errors=None
    )
    api = mock.Mock()
    api.batches.list.return_value.data = []
    api.batches.create.return_value = batch
    api.files.content.return_value.text = '\n'.join(lines)
    client.openai = mock.Mock(**{'with_options.return_value': api, 'api_key': KEY})
    assert run_batch(client, poll=0) == 0
    with pytest.raises(SocraticError, match='did not answer in the batch'):
        client.ask('You write verse.', 'One line.', Verse)


# --- what is wrong on this side -------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch, tmp_path):
    "An empty folder, and no key, address or proxy but those that a test sets."
    for name in list(os.environ):
        if name.upper().endswith('_PROXY') or name.startswith('OPENAI_'):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


KEYS = {
    'a carriage return': (f'{KEY}\r', KEY),
    'quotes of a word processor': (f'“{KEY}”', KEY),
    'blanks': (f' {KEY}\n', KEY),
    'a blank that does not break': (f'sk-a\xa0{KEY}', r'character 5 is U\+00A0 .no-break space'),
    'a dash of a word processor': ('sk–abcdefgh', r'character 3 is U\+2013 .en dash'),
}


@pytest.mark.parametrize('name', KEYS)
def test_keys_as_they_are_pasted(name, environment):
    key, expected = KEYS[name]
    environment.setenv('OPENAI_API_KEY', key)
    if expected == KEY:
        assert openai_client().api_key == KEY
        return
    with pytest.raises(SocraticError, match=expected) as raised:
        openai_client()
    assert key not in one_sentence(raised.value)


ENCODINGS = ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'latin-1']


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_env_files_of_all_shells(encoding, environment, tmp_path):
    text = f'# Schlüssel\r\nOPENAI_API_KEY="{KEY}"\r\nOPENAI_BASE_URL=http://gpubox/v1\r\n'
    text = text if encoding in ('latin-1', 'utf-8-sig') else text.replace('ü', 'ue')
    (tmp_path / '.env').write_bytes(text.encode(encoding))
    environment.setenv('OPENAI_API_KEY', '')  # so that nothing is left behind
    environment.delenv('OPENAI_API_KEY')
    environment.setenv('OPENAI_BASE_URL', '')
    environment.delenv('OPENAI_BASE_URL')
    found = openai_client()
    assert (found.api_key, str(found.base_url)) == (KEY, 'http://gpubox/v1/')


ADDRESSES = {
    'no scheme': ('localhost:8000/v1', "'localhost:8000/v1' is not the address of a server"),
    'another scheme': ('ftp://gpubox/v1', 'is not the address'),
    'a broken bracket': ('http://[::1/v1', 'is not the address'),
    'no host': ('http:///v1', 'is not the address'),
    'too long a path': ('http://gpubox/v1/chat/completions', None),
    'quotes': ('"http://gpubox/v1"', None),
}


@pytest.mark.parametrize('name', ADDRESSES)
def test_addresses_as_they_are_pasted(name, environment):
    text, words = ADDRESSES[name]
    environment.setenv('OPENAI_BASE_URL', text)
    if words is None:
        assert str(openai_client().base_url) == 'http://gpubox/v1/'
        return
    with pytest.raises(SocraticError, match=words) as raised:
        openai_client()
    assert one_sentence(raised.value)


PROXIES = {
    'SOCKS': ('socks5://user:secret@127.0.0.1:9', 'ALL_PROXY=socks5://127.0.0.1:9'),
    'a scheme that nobody knows': ('socks://127.0.0.1:9', 'ALL_PROXY=socks://127.0.0.1:9'),
    'a port that is none': ('http://127.0.0.1:port', 'ALL_PROXY=http://127.0.0.1:port'),
}


@pytest.mark.parametrize('name', PROXIES)
def test_proxies(name, environment, play, tmp_path):
    proxy, words = PROXIES[name]
    environment.setenv('ALL_PROXY', proxy)
    environment.setenv('OPENAI_API_KEY', KEY)
    with pytest.raises(SocraticError, match=re.escape(words)) as raised:
        openai_client()
    assert 'secret' not in one_sentence(raised.value)
    openai, log = play(completion(GOOD))  # on this machine no proxy is asked
    here = openai_client(str(openai.base_url))
    assert new_client(here, tmp_path).ask('Verse.', 'One line.', Verse).line == 'What moves?'
    assert len(log) == 1


def test_a_proxy_that_refuses(environment, address, tmp_path):
    environment.setenv('HTTPS_PROXY', address.replace('//', '//user:secret@'))
    environment.setenv('OPENAI_API_KEY', KEY)
    client = new_client(openai_client('https://llm.example.com/v1'), tmp_path)
    with pytest.raises(FatalError, match='the proxy turns requests .*403 Blocked') as raised:
        client.ask('You write verse.', 'One line.', Verse)
    assert 'secret' not in one_sentence(raised.value)
    assert client.ledger.counts['retries'] == 0


def test_encryption_where_there_is_none(environment, address, tmp_path):
    environment.setenv('OPENAI_API_KEY', KEY)
    openai = openai_client(address.replace('http://', 'https://') + '/v1')
    client = new_client(openai, tmp_path)
    with pytest.raises(FatalError, match='may want http:// in place of https://') as raised:
        client.ask('You write verse.', 'One line.', Verse)
    assert one_sentence(raised.value) and client.ledger.counts['retries'] == 0


@pytest.mark.skipif(not shutil.which('openssl'), reason='makes a certificate with openssl')
def test_a_certificate_that_nobody_trusts(environment, tmp_path):
    command = 'openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1'
    names = ['-keyout', 'key.pem', '-out', 'cert.pem', '-subj', '/CN=localhost']
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain('cert.pem', 'key.pem')
    http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    http.handle_error = lambda *_: None
    http.socket = context.wrap_socket(http.socket, server_side=True)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    client = new_client(openai_client(f'https://127.0.0.1:{http.server_port}/v1'), tmp_path)
    with pytest.raises(FatalError, match='certificate .* is not trusted .*SSL_CERT_FILE'):
        client.ask('You write verse.', 'One line.', Verse)
    assert client.ledger.counts['retries'] == 0
    http.shutdown()
    http.server_close()


def test_half_an_emoji_that_is_sent(play, tmp_path):
    openai, log = play(completion(GOOD))
    new_client(openai, tmp_path).ask('You write verse.', 'A line on \ud83d.', Verse)
    assert log[0]['messages'][1]['content'] == 'A line on \ufffd.'


PRICES = {
    'a loopback server': ('gpt-4o', 'http://127.0.0.1:8000/v1', 0),
    'a server of the house': ('gpt-4o', 'http://gpubox.local/v1', 0),
    'OpenAI': ('gpt-4o', 'https://api.openai.com/v1', 2.5),
    'somebody else': ('tutor-7b', 'https://llm.example.com/v1', None),
}


@pytest.mark.parametrize('name', PRICES)
def test_prices_by_address(name):
    model, url, dollars = PRICES[name]
    price = get_price(model, url)
    assert (price and price.cost(10**6, 0)) == (price and dollars)
    assert (price is None) == (dollars is None)


def test_settings_reach_the_client(environment, tmp_path):
    environment.setenv('OPENAI_BASE_URL', 'http://gpubox/v1')
    client = client_for(settings_for(api_timeout=900, api_max_tokens=4000), tmp_path)
    assert (client.timeout, client.max_tokens) == (900, 4000)


# --- judges and teachers --------------------------------------------------------------------

MARKS = dict.fromkeys(CRITERIA, 0.5)
SCALES = {
    'from 1 to 5': dict(MARKS, guiding_question=4),
    'per cent': dict(MARKS, clear=85),
    'below nothing': dict(MARKS, clear=-1),
    'not a number': dict(MARKS, clear=float('nan')),
    'as a fraction': dict(MARKS, clear='4/5'),
}


@pytest.mark.parametrize('name', SCALES)
def test_marks_on_another_scale(name, play, tmp_path):
    wrong = completion(json.dumps(dict(SCALES[name], why='Because.')))
    right = completion(json.dumps(dict(MARKS, why='Because.')))
    openai, log = play(wrong, right)
    judge = OpenAIJudge('m', new_client(openai, tmp_path / 'a'))
    judgement = judge.judge('Why?', 'What do you think happens to the magnet?')
    assert max(judgement.criteria.values()) <= 0.5 and len(log) == 2
    assert 'does not fit' in log[1]['messages'][-1]['content']
    openai, _ = play(wrong)
    judge = OpenAIJudge('m', new_client(openai, tmp_path / 'b'))
    with pytest.raises(SocraticError, match='twice outside the schema Rubric: (clear|guiding)'):
        judge.judge('Why?', 'What do you think happens to the magnet?')


def test_thoughts_are_not_judged():
    thoughtful = '<think>The answer is induction.</think>What happens to the needle?'
    case = make_case('Why?', thoughtful, None, None)
    assert case.reply == 'What happens to the needle?'


@pytest.mark.parametrize('text', ['', ' \n', '<think>Hm.</think>', '<think>Hm.'])
def test_an_empty_reply_is_none(text):
    with pytest.raises(ValueError, match='the reply is empty'):
        Reply(reply=text)


# --- when to stop ---------------------------------------------------------------------------


def teach_rows(openai, folder, n_rows=2):
    run = Run.open(str(folder), settings_for(teacher='openai', n_rows=n_rows, rounds=0))
    client = new_client(openai, run.path('requests'), workers=1)
    rows = generate(run, OpenAITeacher('m', client=client), BANK)
    return rows, read_jsonl(run.path('quarantine.jsonl'))[0]


def taught(body):
    "A reply that is another for each question."
    number = abs(hash(body['messages'][1]['content'])) % 10**9
    return completion(json.dumps(dict(reply=f'What does number {number} make you think of?')))


STOPS = {
    'no credit': (failure(402, 'requires more credits'), FatalError, 'more credits', 1),
    'empty replies': (
        completion('{"reply": ""}'),
        SocraticError,
        'none of 2 rows could be made; the first: .*outside the schema Reply',
        99,
    ),
    'prose': (completion('I would love to!'), SocraticError, 'none of 2 rows could be made', 99),
}


@pytest.mark.parametrize('name', STOPS)
def test_a_run_without_rows_is_an_error(name, play, tmp_path):
    sent, kind, words, most = STOPS[name]
    openai, log = play(sent)
    with pytest.raises(kind, match=words):
        teach_rows(openai, tmp_path / 'run')
    assert len(log) <= most and not (tmp_path / 'run' / 'sft.jsonl').exists()


def test_one_row_that_is_moderated(play, tmp_path):
    flagged = []

    def respond(body):
        lesson = body['messages'][1]['content']
        flagged.extend([lesson] if not flagged else [])
        if lesson == flagged[0]:
            return failure(403, 'Your input was flagged by moderation')
        return taught(body)

    rows, quarantined = teach_rows(play(respond)[0], tmp_path / 'run', n_rows=4)
    assert len(rows) == 3 and len(quarantined) == 1
    assert 'flagged by moderation' in quarantined[0]['reason']


def test_nothing_judged_is_an_error(play, environment, tmp_path):
    openai, _ = play(failure(400, 'Prompt is too long'))
    environment.setenv('OPENAI_API_KEY', KEY)
    environment.setenv('OPENAI_BASE_URL', str(openai.base_url))
    environment.setenv('XDG_CACHE_HOME', str(tmp_path))
    replies = tmp_path / 'replies.jsonl'
    replies.write_text('{"question": "Why?", "reply": "What falls?"}\n' * 2, encoding='utf8')
    command = ['judge', str(replies), '--out', 'out.csv', '--judge', 'openai']
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert 'none of 2 replies was judged' in one_sentence(done.exception)
    assert 'Prompt is too long' in (tmp_path / 'out.csv').read_text(encoding='utf8')
    judge = OpenAIJudge('m', new_client(openai, tmp_path / 'requests', workers=1))
    row = dict(model='tuned', topic=None, question='Why?', reply='What falls?')
    with pytest.raises(SocraticError, match='judged none of 1 replies: .*too long'):
        score([row], judge, BANK)


def test_some_judged_is_none(play, tmp_path):
    good = completion(json.dumps(dict(MARKS, why='Because.')))
    openai, _ = play(good)
    judge = OpenAIJudge('m', new_client(openai, tmp_path / 'requests', workers=1))
    replies = tmp_path / 'replies.jsonl'
    replies.write_text('{"question": "Why?", "reply": "What falls?"}\nno JSON\n', encoding='utf8')
    counts = judge_file(replies, tmp_path / 'out.csv', judge)
    assert counts == dict(rows=2, judged=1, failed=1)


@pytest.mark.parametrize('kind', ['SocraticError', 'FatalError', 'CostCapReached'])
def test_a_sentence_of_a_notebook_stays_one(kind):
    error = SimpleNamespace(ename=kind, evalue='no credit left', exec_count=3)
    assert str(_explain_failure(error, 'n.ipynb', 'out')) == 'no credit left'


# --- the chat -------------------------------------------------------------------------------

ERROR_EVENT = dict(error=dict(message='CUDA out of memory', code=500))
CUT = r'm was cut off at its longest reply: .*--set max_new_tokens=384'
STREAMS = {  # what is sent, the reply's status, its text, and its note
    'a reply': (events('What', ' falls?', finish='stop'), 'done', 'What falls?', ''),
    'only [DONE] at its end': (events('What falls?'), 'done', 'What falls?', ''),
    'only a finish_reason': (events('Why?', finish='stop', done=False), 'done', 'Why?', ''),
    'no end': (events('What fa', done=False), 'cut', 'What fa', 'ended before its reply'),
    'a line that breaks off': (
        Sent(events('What fa', done=False).body + 'data: {"cho', type='text/event-stream'),
        'failed',
        'What fa',
        'is not JSON',
    ),
    'the longest reply': (events('What', finish='length'), 'cut', 'What', CUT),
    'a filter': (events('What', finish='content_filter'), 'cut', 'What', 'content filter'),
    'a refusal': (
        events(dict(choices=[dict(delta=dict(refusal='I would rather not.'))])),
        'cut',
        '',
        'm refused: I would rather not.',
    ),
    'a plain answer': (completion('What falls?'), 'done', 'What falls?', ''),
    'a plain answer that was cut': (completion('What fa', 'length'), 'cut', 'What fa', CUT),
    'an error among the events': (
        events('What', ERROR_EVENT),
        'failed',
        'What',
        'CUDA out of memory',
    ),
    'an event called error': (
        Sent('event: error\ndata: {"message": "overloaded"}\n\n', type='text/event-stream'),
        'failed',
        '',
        'overloaded',
    ),
    'a plain error with status 200': (data(ERROR_EVENT), 'failed', '', 'CUDA out of memory'),
    'no credit': (failure(402, 'requires more credits'), 'failed', '', 'requires more credits'),
    'a web page': (Sent('<title>Sign in</title>'), 'failed', '', 'a web page .Sign in.'),
    'delta: null': (
        events('Why?', dict(choices=[dict(delta=None)]), dict(choices=None), dict(usage={})),
        'done',
        'Why?',
        '',
    ),
    'comments and names of events': (
        Sent(
            ': OPENROUTER PROCESSING\n\nevent: chunk\nid: 7\n' + events('Why?').body,
            type='text/event-stream',
        ),
        'done',
        'Why?',
        '',
    ),
    'an event in two lines': (
        Sent('data: {"choices":\ndata: [{"message": {"content": "Why?"}}]}\n\n'),
        'done',
        'Why?',
        '',
    ),
    'parts in a delta': (
        events([dict(type='thinking', thinking=[dict(type='text', text='Hm.')])], 'Why?'),
        'done',
        'Why?',
        '',
    ),
    'half an emoji a chunk': (events('So \ud83d', '\ude00 why?'), 'done', 'So 😀 why?', ''),
    'half an emoji at the end': (events('Why? \ud83d'), 'done', 'Why? \ufffd', ''),
    'a thought': (events('<th', 'ink>It is', ' inertia.</think>\n\nWhy?'), 'done', 'Why?', ''),
    'a thought of the template': (events('Inertia.\n', '</think>', '\nWhy?'), 'done', 'Why?', ''),
    'nothing but a thought': (
        events('<think>It is inertia', finish='length'),
        'cut',
        '',
        CUT,
    ),
    'a thought and no word': (events('<think>Hm.</think>'), 'done', '', 'raise max_new_tokens'),
    'reasoning in a field of its own': (
        events(dict(choices=[dict(delta=dict(reasoning_content='Hm.', content=None))]), 'Why?'),
        'done',
        'Why?',
        '',
    ),
    'no system role': (
        lambda body: (
            failure(400, 'System role not supported')
            if body['messages'][0]['role'] == 'system'
            else events('Why?')
        ),
        'done',
        'Why?',
        '',
    ),
    'no seed': (
        lambda body: failure(400, 'seed: unknown parameter') if 'seed' in body else events('Why?'),
        'done',
        'Why?',
        '',
    ),
}


@pytest.mark.parametrize('name', STREAMS)
def test_replies_of_a_chat(name, play, tmp_path):
    sent, status, text, note = STREAMS[name]
    openai, log = play(sent)
    endpoint = Endpoint('m', openai)
    conversation = Conversation(('tuned',), endpoint.system)
    conversation.ask('Why does it fall?')
    answer = generate_answer(conversation, endpoint, 'tuned', max_new_tokens=96, seed=1)
    assert (answer.status, answer.text) == (status, text)
    assert re.search(note, answer.note) if note else not answer.note
    assert 'The model failed' not in answer.note and '\n' not in answer.note
    path = save_conversation(conversation, tmp_path / 'chat.jsonl')
    saved = [row['assistant'] for row in read_jsonl(path)[0]]
    assert saved == ([text] if status == 'done' and text else [])
    assert save_conversation(conversation, tmp_path / 'chat.md').is_file()
    if text:
        conversation.ask('And then?')
        assert dict(role='assistant', content=text) in conversation.messages('tuned')
    assert 'Why does it fall?' in log[-1]['messages'][-1]['content']


@pytest.mark.parametrize('name', ['a thought', 'a thought of the template', 'a plain answer'])
def test_what_a_pipe_gets(name, play):
    openai, _ = play(STREAMS[name][0])
    sink, notes = StringIO(), StringIO()
    chat_terminal(Endpoint('m', openai), source=StringIO('Why?\n'), sink=sink, notes=notes)
    assert (sink.getvalue(), notes.getvalue()) == (f'{STREAMS[name][2]}\n', '')


def test_what_a_person_sees_of_a_late_thought(play):
    openai, _ = play(STREAMS['a thought of the template'][0])
    source, sink = StringIO('Why?\nexit\n'), StringIO()
    source.isatty = lambda: True
    chat_terminal(Endpoint('m', openai), source=source, sink=sink)
    assert 'Inertia.\n\nWhy?' in sink.getvalue()


MODELS = {
    'a bare list': (data([dict(id='tutor')]), 'tutor'),
    'entries that are none': (data(dict(data=[None, 'x', dict(id=5), dict(id='tutor')])), 'tutor'),
    'a web page': (Sent('<html>Hello', type='text/html'), 'a web page .Hello.'),
    'no JSON': (Sent('ok', type='text/plain'), 'keeps no list of its models'),
    'loading': (failure(503, 'Loading model'), 'Loading model'),
    'no data': (data(dict(data=None)), 'has 0 models'),
}


@pytest.mark.parametrize('name', MODELS)
def test_lists_of_models(name, play):
    sent, expected = MODELS[name]
    openai, _ = play(completion('Why?'), models=sent)
    url = str(openai.base_url)
    if expected == 'tutor':
        assert connect_endpoint(url, openai).model == 'tutor'
        return
    with pytest.raises(SocraticError, match=expected) as raised:
        connect_endpoint(url, openai)
    assert one_sentence(raised.value)


# --- mutations ------------------------------------------------------------------------------

ODD = [
    None,
    0,
    -1,
    1e400,
    True,
    '',
    'x',
    '\ud83d',
    '\x07',
    [],
    {},
    [[]],
    [None],
    'stop',
    429,
    '<p>',
]
ORIGINALS = [
    completion(GOOD),
    completion(f'<think>{EXAMPLE}</think>{GOOD}'),
    completion([dict(type='thinking', thinking=[]), dict(type='text', text=GOOD)]),
    failure(429, 'slow down', code='rate_limit_exceeded', details=[dict(retryDelay='1s')]),
    data(dict(error=dict(message='no', code=502, metadata=dict(raw='gone')), choices=None)),
    events('<think>Hm.</think>', '{"line": ', '"What moves?"}', finish='stop'),
    events('{"line": "So \ud83d', '\ude00?"}', dict(choices=[], usage=dict(total_tokens=3))),
    events('What', ERROR_EVENT),
]


def mutate_value(value, rng):
    "A value of JSON with one place changed."
    if rng.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return rng.choice(ODD)
    if isinstance(value, list):
        i = rng.randrange(len(value))
        return [*value[:i], mutate_value(value[i], rng), *value[i + 1 :]]
    key = rng.choice(list(value))
    if rng.random() < 0.2:
        return {name: item for name, item in value.items() if name != key}
    return {**value, key: mutate_value(value[key], rng)}


def mutate_bytes(content, rng):
    start = rng.randrange(len(content) + 1)
    end = min(len(content), start + rng.randrange(1, 20))
    middle = rng.choice([b'', content[start:end] * 2, rng.randbytes(3), b'\n\n', b'"', b'data: '])
    rest = rng.choice([content[end:], content[end:], b''])
    return content[:start] + middle + rest


def mutated(rng):
    "An answer that no server should send."
    sent = rng.choice(ORIGINALS)
    content = sent.body.encode()
    for _ in range(rng.choice([1, 1, 2, 4])):
        if rng.random() < 0.5:
            lines = content.split(b'\n\n')
            i = rng.randrange(len(lines))
            prefix, _, text = lines[i].rpartition(b'data: ')
            with suppress(ValueError, RecursionError):
                value = mutate_value(json.loads(text), rng)
                prefix = b'data: ' if prefix or lines[i].startswith(b'data: ') else b''
                lines[i] = prefix + json.dumps(value).encode()
            content = b'\n\n'.join(lines)
        else:
            content = mutate_bytes(content, rng)
    status = rng.choice([sent.status, sent.status, sent.status, 200, 400, 403, 500])
    kind = rng.choice([sent.type, sent.type, 'text/html', 'application/json', 'text/event-stream'])
    return Sent(content, status, kind)


def fit_for_a_file(text):
    return text.encode() and not re.search('[\x00-\x08\x0b\x0c\x0e-\x1f]', text)


def ask_mutated(openai, folder):
    "A client's outcome: a row, or a sentence."
    try:
        found = new_client(openai, folder, retries=0).ask('Verse.', 'One line.', Verse)
    except SocraticError as error:
        return one_sentence(error)
    assert fit_for_a_file(found.line) and '<think>' not in found.line
    return found


def chat_mutated(openai, folder):
    "A chat's outcome: a reply that is done, cut or failed, with a sentence."
    conversation = Conversation(('tuned',))
    conversation.ask('Why?')
    answer = generate_answer(conversation, Endpoint('m', openai), 'tuned', max_new_tokens=96)
    assert answer.status in ('done', 'cut', 'failed')
    assert 'The model failed' not in answer.note
    if answer.status != 'done':
        one_sentence(answer.note)
    rows, bad = read_jsonl(save_conversation(conversation, folder / 'chat.jsonl'))
    assert not bad and len(rows) == (answer.status == 'done' and bool(answer.text.strip()))
    return answer.status


@pytest.mark.parametrize('part', range(10))
@pytest.mark.parametrize('use', [ask_mutated, chat_mutated])
def test_mutated_answers(use, part, play, tmp_path):
    rng = random.Random(f'{use.__name__} {part}')
    answers = [mutated(rng) for _ in range(25)]
    openai, log = play(*answers)
    outcomes = []
    while len(log) < len(answers):
        n_sent = len(log)
        folder = tmp_path / str(n_sent)
        outcomes.append(use(openai, folder))
        assert len(log) > n_sent
    assert len(outcomes) > 5
