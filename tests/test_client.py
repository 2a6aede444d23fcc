"""The client: its parts, and the whole against real sockets.

A server that misbehaves, processes that are killed, a full disk, and `transformers serve`."""

import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.request import Request, urlopen

import httpx2
import pytest
from openai import OpenAI
from pydantic import BaseModel

from socratic_finetune.client import (
    Cache,
    Client,
    CostCapReached,
    FatalError,
    Pending,
    Price,
    get_price,
    openai_client,
    read_reply,
    request_key,
    run_batch,
)
from socratic_finetune.config import Run, SocraticError, read_jsonl, settings_for, write_atomic
from socratic_finetune.generate import forecast, generate, plan_data
from socratic_finetune.teacher import OpenAITeacher, Reply
from socratic_finetune.topics import load_topics

ROOT = Path(__file__).parents[1]
BANK = load_topics()
KEY = 'sk-' + 'test-0123456789-only-for-this-file'
OPENAI_ADDRESS = 'https://api.openai.com/v1/'
REQUEST = dict(model='m', messages=[dict(role='user', content='Why?')])
SLOW = pytest.mark.skipif(not os.environ.get('SLOW'), reason='takes a while: SLOW=1 runs it')
pytestmark = pytest.mark.xdist_group('client')  # one server for all of them
os.environ['NO_PROXY'] = os.environ['no_proxy'] = '127.0.0.1'


class Verse(BaseModel):
    line: str
    words: list[str] = []


# --- prices and the cache ---------------------------------------------------------------------


def test_prices():
    dated = get_price('gpt-4o-2024-08-06', OPENAI_ADDRESS)
    assert dated.cost(1000, 0, cached=1000) == pytest.approx(0.00125)
    local = get_price('anything', 'http://localhost:8000/v1')
    assert local.cost(10**9, 10**9) == 0


def test_price_table_that_is_none(tmp_path):
    table = tmp_path / 'prices.yaml'
    table.write_text('prices: []')
    with pytest.raises(SocraticError, match='is not a price table .KeyError'):
        get_price('m', OPENAI_ADDRESS, table)


def test_disk_that_is_full_from_the_start(tmp_path):
    full = mock.Mock(side_effect=OSError(28, 'No space left on device'))
    with (
        mock.patch('socratic_finetune.client.write_atomic', full),
        pytest.raises(FatalError, match='nothing has been sent'),
    ):
        Cache(tmp_path, reserve=1000).reserve_disk()


def test_disk_that_becomes_full(tmp_path):
    cache = Cache(tmp_path, reserve=1000)

    def write(path, content):
        if (tmp_path / '.reserve').exists():
            raise OSError(28, 'No space left on device')
        return write_atomic(path, content)

    cache.reserve_disk()
    with mock.patch('socratic_finetune.client.write_atomic', write):
        with pytest.raises(FatalError, match='No space left on device; every answer so far'):
            cache['late'] = dict(reply='paid for')
        assert cache['late'] == dict(reply='paid for')
        with pytest.raises(FatalError, match='every answer so far is kept'):
            cache.reserve_disk()


def test_damaged_file(tmp_path):
    cache = Cache(tmp_path)
    cache.path('bad').write_text('{')
    with pytest.raises(SocraticError, match='is damaged'):
        cache['bad']


# --- a client of a server inside this process -------------------------------------------------


def completion_body(content, finish_reason='stop', refusal=None):
    message = dict(role='assistant', content=content, refusal=refusal)
    choice = dict(index=0, finish_reason=finish_reason, message=message)
    return dict(id='x', object='chat.completion', created=0, model='m', choices=[choice])


def toy_client(handler, folder, model='m', address='http://localhost/v1', **options):
    "A client whose requests all go to a function."
    http = httpx2.Client(transport=httpx2.MockTransport(handler))
    server = OpenAI(api_key=KEY, base_url=address, http_client=http)
    return Client(model, server, folder, **{'pause': 0, 'retries': 2, **options})


def always(status, **response):
    return lambda request: httpx2.Response(status, **response)


def ask_line(client):
    return client.ask('You write verse.', 'One line.', Verse)


JSON = {'content-type': 'application/json'}
NO_CREDIT = dict(error=dict(code='insufficient_quota', message=''))
TOO_LONG = dict(error=dict(message='context too long'))


@pytest.mark.parametrize(
    ('handler', 'message'),
    [
        (always(401), 'does not accept the key'),
        (always(403), 'does not let this key use m'),
        (always(404), "has no model 'm'"),
        (always(429, json=NO_CREDIT), 'no credit left'),
        (always(429, headers={'retry-after': '3600'}), 'asks to wait 3600 s'),
        (always(400, json=TOO_LONG), r'turned the request down \(400\)'),
    ],
)
def test_errors_that_no_further_attempt_can_help(handler, message, tmp_path):
    client = toy_client(handler, tmp_path)
    with pytest.raises(SocraticError, match=message):
        client.send(REQUEST)
    assert client.ledger.counts['retries'] == 0


@pytest.mark.parametrize(
    ('handler', 'name'),
    [
        (always(503), 'InternalServerError'),
        (always(429), 'RateLimitError'),
        (always(200, content=b'{"id": "x", "cho', headers=JSON), 'ValueError'),
        (always(200, json=dict(id='x', choices=[])), 'ValueError'),
    ],
)
def test_retries_come_to_an_end(handler, name, tmp_path):
    client = toy_client(handler, tmp_path)
    with pytest.raises(SocraticError, match=rf'did not answer in 3 attempts \({name}\)'):
        client.send(REQUEST)
    assert client.ledger.counts['retries'] == 2


def test_a_stopped_client_does_not_wait(tmp_path):
    client = toy_client(always(503), tmp_path, pause=60)
    client.ledger.add = mock.Mock(side_effect=lambda **counts: client.close(stop=True))
    with pytest.raises(FatalError, match='interrupted'):
        client.send(REQUEST)


def test_nothing_listens(tmp_path):
    environment = dict(OPENAI_API_KEY=KEY, OPENAI_BASE_URL='http://localhost:1/v1')
    with (
        mock.patch.dict(os.environ, environment),
        pytest.raises(FatalError, match='did not answer in 3 attempts'),
    ):
        Client('m', cache=tmp_path, pause=0).ask('Nobody', 'is there.', Verse)


def test_no_key(monkeypatch, tmp_path):
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    monkeypatch.delenv('OPENAI_BASE_URL', raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SocraticError, match='OPENAI_API_KEY is not set'):
        openai_client()


def test_cap_without_a_price(tmp_path):
    with pytest.raises(SocraticError, match='its cost is unknown'):
        toy_client(always(200), tmp_path, 'gpt-9', OPENAI_ADDRESS, max_cost=1)


@pytest.mark.parametrize(
    ('body', 'message'),
    [
        (completion_body('{"lines": 1}'), 'm answered twice outside the schema Verse'),
        (completion_body('{"line": "What mo', 'length'), 'was cut off'),
        (completion_body(None, refusal='I would rather not.'), 'm refused: I would rather not'),
        (completion_body('', 'content_filter'), 'content filter'),
    ],
)
def test_answers_that_cannot_be_used(body, message, tmp_path):
    with pytest.raises(SocraticError, match=message):
        ask_line(toy_client(always(200, json=body), tmp_path))


def test_whole_answer_before_the_limit_of_tokens():
    reply = dict(content='{"line": "a"} and so on', refusal=None, finish_reason='length')
    assert read_reply(reply, Verse, 'm').line == 'a'


def test_refusal_is_paid_for_once(tmp_path):
    client = toy_client(always(200, json=completion_body(None, refusal='No.')), tmp_path)
    for _ in range(3):
        with pytest.raises(SocraticError, match='refused'):
            ask_line(client)
    assert client.ledger.counts['requests'] == 1


def test_no_key_on_disk(tmp_path):
    body = completion_body(json.dumps(dict(line=f'The key is {KEY}.')))
    assert ask_line(toy_client(always(200, json=body), tmp_path)).line == 'The key is [key].'
    assert_without_key(tmp_path)


def waiting_client(handler, folder, **options):
    "A client with one request that waits for its batch."
    client = toy_client(handler, folder, 'gpt-4o', OPENAI_ADDRESS, batch=True, **options)
    with pytest.raises(Pending):
        ask_line(client)
    return client


def test_batch_above_the_cap(tmp_path):
    client = waiting_client(always(200), tmp_path, max_cost=0.001)
    with pytest.raises(CostCapReached, match=r'max_cost=\$0.001 is reached'):
        run_batch(client, poll=0)


def test_server_without_batches(tmp_path):
    with pytest.raises(SocraticError, match='knows no batches'):
        run_batch(waiting_client(always(404), tmp_path), poll=0)


def test_ledger_of_an_unknown_price(tmp_path):
    client = toy_client(always(200, json=completion_body('{"line": "a"}')), tmp_path, 'gpt-9')
    client.ledger.price = None
    ask_line(client)
    assert client.ledger.usage()['cost'] is None and client.cost_bound(REQUEST) == 0
    assert Price().cost(10**6, 10**6) == 0


# --- a server that misbehaves -----------------------------------------------------------------


def number(*parts):
    text = '|'.join(str(part) for part in parts)
    return int.from_bytes(sha256(text.encode()).digest()[:6], 'big')


class UnreliableServer(BaseHTTPRequestHandler):
    """Answers chat completions from what was asked alone, so that two runs can be compared.

    How often it fails on the way is a matter of chance."""

    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    wbufsize = -1
    fault_shares = {}  # of 429 (with Retry-After), 500, timeouts and cut connections
    broken = 0.0  # share of answers with broken JSON
    refused = 0.0  # share of lessons that are refused each time
    delay = 0.0  # seconds before an answer
    limit = 10**9  # different requests answered, after which the others have to wait
    lock = threading.Lock()
    rng = random.Random(0)
    log = []  # keys of all requests
    answered = Counter()  # by key
    faults = Counter()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        if self.path == '/set':
            return self.change(body)
        key = request_key(body)
        answered = self.answered  # a later test has another counter
        fault = self.draw_fault(key)
        if fault == 'key':
            message = f'Incorrect API key provided: {self.headers["Authorization"][7:]}'
            return self.reply(401, dict(error=dict(message=message)))
        if fault == '429':
            error = dict(message='slow down', code='rate_limit_exceeded')
            return self.reply(429, dict(error=error), {'Retry-After': '0.05'})
        if fault == '500':
            message = f'internal error for {self.headers["Authorization"]}'
            return self.reply(500, dict(error=dict(message=message)))
        if fault == 'cut':
            return self.cut_connection()
        if fault == 'timeout':
            time.sleep(4)
        while len(self.answered) >= self.limit:
            time.sleep(0.02)
        time.sleep(self.delay)
        return self.answer(body, key, answered)

    def change(self, settings):
        for name, value in settings.items():
            is_counter = name in ('answered', 'faults')
            setattr(UnreliableServer, name, Counter(value) if is_counter else value)
        self.reply(200, {})

    def draw_fault(self, key):
        none = 1 - sum(self.fault_shares.values())
        with self.lock:
            self.log.append(key)
            fault = self.rng.choices(
                [*self.fault_shares, None], [*self.fault_shares.values(), none]
            )[0]
            self.faults[fault] += 1
        return fault

    def answer(self, request, key, answered):
        lesson = request['messages'][1]['content'].split('</lesson>')[0]
        text = json.dumps(self.answer_object(request))
        if number('broken', key) % 1000 < 1000 * self.broken:
            quotes = text[:-2].replace('"', "'", 2)
            text = quotes if number(key) % 2 else text[: len(text) // 2]
        refusal = None
        if number(lesson) % 1000 < 1000 * self.refused:
            refusal = 'I cannot help with that.'
        n_in = sum(len(message['content']) for message in request['messages']) // 4
        n_out = len(text) // 4
        body = completion_body(None if refusal else text, refusal=refusal)
        body['usage'] = dict(
            prompt_tokens=n_in, completion_tokens=n_out, total_tokens=n_in + n_out
        )
        with self.lock:
            answered[key] += 1
        self.reply(200, body)

    def answer_object(self, request):
        "A critique or a reply, whichever is asked for."
        system, user = [message['content'] for message in request['messages'][:2]]
        form = request.get('response_format', {}).get('json_schema', {}).get('name')
        if form != 'Critique' and (form or '"verdicts"' not in system):
            which = 'A second' if '<reply>' in user else 'A first'
            draw = number(user, request.get('seed')) % 10**6
            return dict(reply=f'{which} question {draw}: what do you see?')
        flawed = '<reply>\nA first' in user and number(user) % 10 < 4
        verdicts = []
        for i, line in enumerate(re.findall('^- .*', user.split('</reply>')[1], re.M)):
            principle = line[2:].split(':')[0]
            ok = not (flawed and i == 0)
            verdicts.append(dict(principle=principle, ok=ok, reason='so it seems'))
        return dict(verdicts=verdicts)

    def do_GET(self):
        with self.lock:
            faults = {str(name): count for name, count in self.faults.items()}
            self.reply(200, dict(log=self.log, answered=self.answered, faults=faults))

    def reply(self, status, body, headers=None):
        content = json.dumps(body).encode()
        all_headers = {
            'Content-Type': 'application/json',
            'Content-Length': len(content),
            **(headers or {}),
        }
        try:
            self.send_response(status)
            for name, value in all_headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the client has gone
            self.close_connection = True

    def cut_connection(self):
        head = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n'
        self.wfile.write(head + b'{"id": "x", "cho')
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *_):
        pass


class LoopbackServer(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, *_):
        pass


FAULT_SHARES = {'429': 0.10, '500': 0.05, 'timeout': 0.03, 'cut': 0.02}


class Server:
    "The server in a process of its own; `get` reads its log, `set` changes its behaviour."

    def __init__(self):
        listener = LoopbackServer(('127.0.0.1', 0), UnreliableServer)
        self.address = f'http://127.0.0.1:{listener.server_port}/v1'
        context = multiprocessing.get_context('fork')
        self.process = context.Process(target=listener.serve_forever, daemon=True)
        self.process.start()
        listener.socket.close()

    def get(self):
        return json.loads(urlopen(self.address.replace('/v1', '/stats')).read())

    def set(self, **settings):
        url = self.address.replace('/v1', '/set')
        urlopen(Request(url, json.dumps(settings).encode(), method='POST')).read()


@pytest.fixture(scope='module')
def server_process():
    server = Server()
    yield server
    server.process.kill()


@pytest.fixture
def server(server_process):
    "The server without a past and without faults."
    server_process.set(fault_shares={}, broken=0.0, refused=0.0, delay=0.0, limit=10**9)
    server_process.set(log=[], answered={}, faults={})
    return server_process


def new_client(server, folder, timeout=120.0, **options):
    openai = OpenAI(base_url=server.address, api_key=KEY, timeout=timeout)
    return Client('m', openai, folder, **{'workers': 32, 'pause': 0.02, 'spent': None, **options})


def make_rows(server, folder, n_rows, **options):
    "A dataset from the server: rows, quarantined rows, and the client."
    run = Run.open(str(folder), settings_for(teacher='openai', n_rows=n_rows))
    client = new_client(server, run.path('requests'), **options)
    rows = generate(run, OpenAITeacher('m', client=client), BANK)
    quarantined, _ = read_jsonl(run.path('quarantine.jsonl'))
    return rows, quarantined, client


def assert_without_key(folder):
    files = [path for path in Path(folder).rglob('*') if path.is_file()]
    assert files
    for path in files:
        assert KEY.encode() not in path.read_bytes() and KEY not in str(path)


def answer_keys(folder):
    return {path.stem for path in (folder / 'requests').glob('*.json') if len(path.stem) == 64}


def reason_kind(row):
    for kind in ('refused', 'outside the schema', 'repeats'):
        if kind in row['reason']:
            return kind
    return row['reason']


# --- what the client must hold against it -----------------------------------------------------


@pytest.mark.parametrize('n_rows', [100, pytest.param(1500, marks=SLOW)])
def test_all_rows_come_out_of_a_server_that_misbehaves(server, tmp_path, capfd, n_rows):
    server.set(fault_shares=FAULT_SHARES, broken=0.03, refused=0.02)
    planned = [row['id'] for row in plan_data(BANK, settings_for(n_rows=n_rows))]
    rows, quarantined, client = make_rows(server, tmp_path / 'run', n_rows, timeout=2.5)
    ids = [row['id'] for row in rows]
    quarantined_ids = {row['id'] for row in quarantined}
    assert len(ids) == len(set(ids)) and not set(ids) & quarantined_ids
    assert {*ids, *quarantined_ids} == set(planned)
    in_order = [id_ for id_ in planned if id_ in set(ids)]
    assert ids == in_order, 'the file is in the order of the plan'
    reasons = Counter(reason_kind(row) for row in quarantined)
    assert set(reasons) <= {'refused', 'outside the schema', 'repeats'}, reasons
    assert len(quarantined) < 0.1 * n_rows

    stats = server.get()
    assert all(stats['faults'].get(fault, 0) > 0 for fault in FAULT_SHARES), stats['faults']
    kept = answer_keys(tmp_path / 'run')
    assert set(stats['answered']) == kept, 'each answer is kept'
    repeated = sum(stats['answered'].values()) - len(kept)
    assert repeated <= stats['faults']['timeout'], 'only what came too late was asked for twice'
    n_faults = sum(stats['faults'][fault] for fault in FAULT_SHARES)
    assert client.ledger.counts['retries'] >= n_faults - 32

    assert_without_key(tmp_path)
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err
    set_aside = len(quarantined) - reasons['repeats']  # repeats are found at the end
    assert f'{set_aside} set aside' in shown.err
    with capfd.disabled():
        print(f'{len(rows)} rows, {len(quarantined)} in quarantine {dict(reasons)},', end=' ')
        print(f'{len(kept)} answers, {client.ledger.counts["retries"]} retries, {stats["faults"]}')


def fork(work):
    "Do some work in a process of its own; forked, so that it need not import everything again."
    pid = os.fork()
    if pid:
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        os._exit(0)
    except BaseException:
        # as Python does at its end: a thread that was just starting is joined by nobody else
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        os._exit(1)


def run_and_kill(server, folder, n_rows, n_answers, kill_signal, rng):
    "A run that is killed when a certain number of answers is there."
    server.set(limit=n_answers)
    pid = fork(lambda: make_rows(server, folder, n_rows, workers=8))
    while len(server.get()['answered']) < n_answers:
        time.sleep(0.02)
    time.sleep(rng.random() * 0.02)
    os.kill(pid, kill_signal)
    server.set(limit=10**9)
    os.waitpid(pid, 0)


@pytest.mark.parametrize('kill_signal', [signal.SIGKILL, signal.SIGINT])
def test_killed_at_random_points_and_resumed(server, tmp_path, kill_signal):
    n_rows = 40
    rng = random.Random(7)
    server.set(fault_shares={'429': 0.1, '500': 0.05}, broken=0.03, refused=0.02)
    rows, quarantined, _ = make_rows(server, tmp_path / 'whole', n_rows)
    n_answers = len(answer_keys(tmp_path / 'whole'))
    server.set(log=[], answered={})

    n_kills = 10 if kill_signal == signal.SIGKILL else 3
    points = sorted(rng.sample(range(3, n_answers - 12), n_kills))
    kills = []  # answers kept, and how far the server's log went
    for point in points:
        run_and_kill(server, tmp_path / 'killed', n_rows, point, kill_signal, rng)
        kills.append((answer_keys(tmp_path / 'killed'), len(server.get()['log'])))
    assert len({len(kept) for kept, _ in kills}) > 2

    resumed, resumed_quarantined, _ = make_rows(server, tmp_path / 'killed', n_rows)
    assert resumed == rows and resumed_quarantined == quarantined
    written = [(tmp_path / run / 'sft.jsonl').read_bytes() for run in ('killed', 'whole')]
    assert written[0] == written[1]
    stats = server.get()
    for kept, n_logged in kills:
        assert not kept & set(stats['log'][n_logged:]), 'an answered request was sent again'
    assert answer_keys(tmp_path / 'killed') == answer_keys(tmp_path / 'whole')
    repeated = sum(stats['answered'].values()) - n_answers
    most = 8 * n_kills if kill_signal == signal.SIGKILL else 0
    assert repeated <= most, 'at most what was on its way when a process was killed'
    assert not (tmp_path / 'killed' / 'sft.part.jsonl').exists()
    assert_without_key(tmp_path)
    print(f'{n_kills} kills at {points} of {n_answers} answers; {repeated} were on their way')


def test_torn_line_is_cut_off(server, tmp_path):
    server.set(delay=0.01)
    rows, *_ = make_rows(server, tmp_path / 'whole', 12)
    run = Run.open(str(tmp_path / 'torn'), settings_for(teacher='openai', n_rows=12))
    lines = [json.dumps(row, ensure_ascii=False) for row in rows[:3]]
    run.path('sft.part.jsonl').write_text('\n'.join(lines)[:-40], encoding='utf8')
    resumed, *_ = make_rows(server, tmp_path / 'torn', 12)
    assert resumed == rows


def mount(folder, options):
    command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_full_disk_loses_nothing(server, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if os.geteuid() or not mount(disk, 'size=1m'):
        pytest.skip('needs the right to mount a small disk')
    try:
        with pytest.raises(SocraticError, match='No space left on device'):
            make_rows(server, disk / 'run', 40, workers=4)
        stats = server.get()
        kept = answer_keys(disk / 'run')
        assert kept == set(stats['answered']), 'each answer that was paid for is on the disk'
        assert len(kept) > 10 and (disk / 'run' / 'run.json').is_file()
        assert mount(disk, 'remount,size=20m')
        rows, quarantined, _ = make_rows(server, disk / 'run', 40, workers=4)
        assert len(rows) + len(quarantined) == len(plan_data(BANK, settings_for(n_rows=40)))
        assert not kept & set(server.get()['log'][len(stats['log']) :])
    finally:
        subprocess.run(['umount', str(disk)])


@pytest.fixture
def prices(tmp_path):
    path = tmp_path / 'prices.yaml'
    path.write_text('models: {m: {input: 2.5, cached: 1.25, output: 10}}')
    return path


def test_cap_holds_over_attempts_and_the_forecast_is_near(server, tmp_path, prices):
    folder = tmp_path / 'run'
    for _ in range(2):
        with pytest.raises(CostCapReached, match='is reached'):
            make_rows(server, folder, 60, prices=prices, max_cost=0.08)
    _, _, client = make_rows(server, folder, 60, prices=prices)
    costs = [json.loads(p.read_text())['cost'] for p in (folder / 'requests').glob('*.json')]
    assert sum(costs) == pytest.approx(client.ledger.spent)
    assert sum(server.get()['answered'].values()) == len(answer_keys(folder))
    settings = settings_for(n_rows=60)
    teacher = OpenAITeacher('m', client=client)
    expected = forecast(plan_data(BANK, settings), teacher, BANK, settings)
    assert 0.6 < expected['cost'] / client.ledger.spent < 1.6, (expected, client.ledger.usage())


def test_cap_is_never_passed(server, tmp_path, prices):
    client = new_client(server, tmp_path / 'requests', prices=prices, max_cost=0.06)

    def ask(i):
        try:
            return client.ask('A system prompt.', f'Line {i}.', Reply)
        except CostCapReached:
            return None

    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(ask, range(400)))
    assert 0.045 < client.ledger.spent <= 0.06
    assert 0 < sum(reply is not None for reply in replies) < 400


def test_retry_after_is_honoured(server, tmp_path):
    server.set(fault_shares={'429': 1.0})
    client = new_client(server, tmp_path / 'requests', retries=3, pause=0)
    start = time.monotonic()
    with pytest.raises(SocraticError, match='did not answer in 4 attempts'):
        client.ask('System.', 'Line.', Reply)
    assert time.monotonic() - start >= 3 * 0.05  # a server's wish, not a speed


def test_wrong_key_stops_at_once_and_is_not_repeated(server, tmp_path):
    server.set(fault_shares={'key': 1.0})
    environment = {
        **os.environ,
        'OPENAI_API_KEY': KEY,
        'OPENAI_BASE_URL': server.address,
        'SOCRATIC_RUNS': str(tmp_path / 'runs'),
        'PYTHONPATH': str(ROOT),
    }
    code = 'from socratic_finetune.pipeline import main; main()'
    options = '--teacher openai --n 50 --run mine --max-cost 3 --workers 4'
    done = subprocess.run(
        [sys.executable, '-c', code, 'generate', *options.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and 'does not accept the key' in done.stderr
    assert 'Traceback' not in done.stderr and KEY not in done.stdout + done.stderr
    assert len(server.get()['log']) <= 8
    assert_without_key(tmp_path / 'runs')


def test_refusals_are_answers(server, tmp_path):
    server.set(refused=1.0)
    message = 'five rows in a row failed; the last: m refused: I cannot help with that'
    for _ in range(2):
        with pytest.raises(SocraticError, match=message):
            make_rows(server, tmp_path / 'run', 50, workers=1)
    assert max(server.get()['answered'].values()) == 1


@SLOW
def test_many_at_once_takes_hardly_longer_than_the_ideal(server, tmp_path):
    "A benchmark: 300 ms a request, 32 in flight."
    server.set(delay=0.3)
    client = new_client(server, tmp_path / 'requests', workers=32)
    n_requests = 640
    start = time.perf_counter()
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda i: client.ask('System.', f'Line {i}.', Reply), range(n_requests)))
    seconds = time.perf_counter() - start
    ideal = n_requests / 32 * 0.3
    print(f'{n_requests} requests in {seconds:.2f} s, {seconds / ideal:.2f} times the ideal')
    assert seconds < 1.3 * ideal


# --- a real server ----------------------------------------------------------------------------


def wait_until_up(process, port):
    for _ in range(1200):
        time.sleep(0.25)
        if process.poll() is not None:
            return
        try:
            urlopen(f'http://127.0.0.1:{port}/health', timeout=1)
            return
        except OSError:
            continue


@pytest.fixture(scope='module')
def transformers_serve(tmp_path_factory):
    "`transformers serve` with the pocket model; yields its address."
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    model = str(ROOT / 'data' / 'pocket' / 'base')
    code = 'from transformers.cli.transformers import main; main()'
    options = ['--host', '127.0.0.1', '--port', str(port), '--device', 'cpu']
    path = tmp_path_factory.mktemp('serve') / 'log.txt'
    with open(path, 'w') as log:
        process = subprocess.Popen(
            [sys.executable, '-c', code, 'serve', model, *options],
            stdout=log,
            stderr=log,
            env={**os.environ, 'HF_HUB_OFFLINE': '1'},
        )
        wait_until_up(process, port)
        if process.poll() is not None:
            raise RuntimeError(path.read_text()[-3000:])
        yield f'http://127.0.0.1:{port}/v1'
        process.terminate()
        process.wait()


def test_transformers_serve_with_the_pocket_model(transformers_serve, tmp_path):
    model = str(ROOT / 'data' / 'pocket' / 'base')
    openai = OpenAI(base_url=transformers_serve, api_key=KEY, timeout=120)
    client = Client(model, openai, tmp_path / 'requests', workers=2, max_tokens=48)
    messages = [dict(role='user', content="Explain Ohm's law.")]
    request = dict(model=model, messages=messages, max_tokens=48, temperature=0)
    assert 'current' in client.answer(request)['content']
    # six million parameters write no JSON: what stays unusable is an error, paid for once
    for i in range(4):
        for _ in range(2):
            with pytest.raises(SocraticError, match='outside the schema|was cut off'):
                client.ask('You are a tutor.', f"Explain Faraday's law. {i}", Reply, seed=i)
    n_sent = client.ledger.counts['requests']
    assert len(list((tmp_path / 'requests').glob('*.json'))) == n_sent
    run = Run.open(str(tmp_path / 'run'), settings_for(teacher='openai', n_rows=2))
    with pytest.raises(SocraticError, match='none of 2 rows could be made'):
        generate(run, OpenAITeacher(model, client=client), BANK)
    quarantined, _ = read_jsonl(run.path('quarantine.jsonl'))
    assert len(quarantined) == 2 and all(row['reason'] for row in quarantined)
