"The client against real sockets: a server that misbehaves, processes that are killed, a disk that is full, and `transformers serve`."
import json, multiprocessing, os, random, re, signal, socket, subprocess, sys, threading, time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from socratic_finetune.client import Client, CostCapReached, key_of
from socratic_finetune.config import Run, SocraticError, read_jsonl, settings_for
from socratic_finetune.generate import forecast, generate, plan_data
from socratic_finetune.teacher import OpenAITeacher, Reply
from socratic_finetune.topics import load_topics

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group('client')   # one server for all of them
BANK = load_topics()
KEY = 'sk-' + 'test-0123456789-only-for-this-file'
SLOW = pytest.mark.skipif(not os.environ.get('SLOW'), reason='takes a while: SLOW=1 runs it')
os.environ['NO_PROXY'] = os.environ['no_proxy'] = '127.0.0.1'


# --- a server that misbehaves ----------------------------------------------------------------------------------------

def number(*parts): return int.from_bytes(sha256('|'.join(map(str, parts)).encode()).digest()[:6], 'big')


class Moody(BaseHTTPRequestHandler):
    """Answers chat completions from what was asked alone, so that two runs can be compared; how often it fails on the way is a matter of chance.
    `mix`: shares of 429 (with Retry-After), 500, timeouts and cut connections; `broken`, `refused`: shares of answers with broken JSON, and of
    lessons that are refused each time."""
    protocol_version, disable_nagle_algorithm, wbufsize = 'HTTP/1.1', True, -1
    mix, lock, rng = {}, threading.Lock(), random.Random(0)
    broken = refused = delay = 0.
    limit = 10**9   # different requests answered, after which the others have to wait
    log, answered, faults = [], Counter(), Counter()

    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        if self.path == '/set':
            for k, v in json.loads(body).items(): setattr(Moody, k, Counter(v) if k in ('answered', 'faults') else v)
            return self.say(200, {})
        request = json.loads(body)
        key = key_of(request)
        with self.lock:
            self.log.append(key)
            fault = self.rng.choices([*self.mix, None], [*self.mix.values(), 1 - sum(self.mix.values())])[0]
            self.faults[fault] += 1
        if fault == 'key': return self.say(401, dict(error=dict(message=f"Incorrect API key provided: {self.headers['Authorization'][7:]}")))
        if fault == '429': return self.say(429, dict(error=dict(message='slow down', code='rate_limit_exceeded')), {'Retry-After': '0.05'})
        if fault == '500': return self.say(500, dict(error=dict(message=f"internal error for {self.headers['Authorization']}")))
        if fault == 'timeout': time.sleep(4)
        if fault == 'cut': return self.cut()
        while len(self.answered) >= self.limit: time.sleep(0.02)
        time.sleep(self.delay)
        self.answer(request, key)

    def answer(self, request, key):
        said, system = request['messages'][1]['content'], request['messages'][0]['content']
        lesson, asked = said.split('</lesson>')[0], request.get('response_format', {}).get('json_schema', {}).get('name')
        critique = asked == 'Critique' or not asked and '"verdicts"' in system
        refusal = 'I cannot help with that.' if number(lesson) % 1000 < 1000*self.refused else None
        if critique:
            flawed = '<reply>\nA first' in said and number(said) % 10 < 4
            found = dict(verdicts=[dict(principle=line[2:].split(':')[0], ok=not (flawed and i == 0), reason='so it seems')
                                   for i, line in enumerate(re.findall('^- .*', said.split('</reply>')[1], re.M))])
        else: found = dict(reply=f"{'A second' if '<reply>' in said else 'A first'} question {number(said, request.get('seed')) % 10**6}: what do you see?")
        text = json.dumps(found)
        if number('broken', key) % 1000 < 1000*self.broken: text = text[:-2].replace('"', "'", 2) if number(key) % 2 else text[:len(text)//2]
        usage = dict(prompt_tokens=sum(len(m['content']) for m in request['messages'])//4, completion_tokens=len(text)//4)
        message = dict(role='assistant', content=None if refusal else text, refusal=refusal)
        with self.lock: self.answered[key] += 1
        self.say(200, dict(id='x', object='chat.completion', created=0, model=request['model'], usage=dict(usage, total_tokens=sum(usage.values())),
                           choices=[dict(index=0, finish_reason='stop', message=message)]))

    def do_GET(self):
        with self.lock: self.say(200, dict(log=self.log, answered=self.answered, faults={str(k): n for k, n in self.faults.items()}))

    def say(self, status, body, headers={}):
        text = json.dumps(body).encode()
        try:
            self.send_response(status)
            for k, v in {'Content-Type': 'application/json', 'Content-Length': len(text), **headers}.items(): self.send_header(k, str(v))
            self.end_headers()
            self.wfile.write(text)
        except OSError: self.close_connection = True   # whoever asked has gone

    def cut(self):
        self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"id": "x", "cho')
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *_): pass


class Loopback(ThreadingHTTPServer):
    request_queue_size, daemon_threads = 256, True
    def handle_error(self, *_): pass


FAULTS = {'429': 0.10, '500': 0.05, 'timeout': 0.03, 'cut': 0.02}


class Server:
    "The server in a process of its own; `ask` reads its log, `set` changes its moods."
    def __init__(self):
        listener = Loopback(('127.0.0.1', 0), Moody)
        self.address = f'http://127.0.0.1:{listener.server_port}/v1'
        self.process = multiprocessing.get_context('fork').Process(target=listener.serve_forever, daemon=True)
        self.process.start()
        listener.socket.close()

    def get(self): return json.loads(urlopen(self.address.replace('/v1', '/stats')).read())
    def set(self, **moods): urlopen(Request(self.address.replace('/v1', '/set'), json.dumps(moods).encode(), method='POST')).read()


@pytest.fixture(scope='module')
def process():
    s = Server()
    yield s
    s.process.kill()


@pytest.fixture
def server(process):
    "The server without a past and in a good mood."
    process.set(mix={}, broken=0., refused=0., delay=0., limit=10**9, log=[], answered={}, faults={})
    return process


def base(server, timeout):
    from openai import OpenAI
    return OpenAI(base_url=server.address, api_key=KEY, timeout=timeout)


def client_for(server, folder, timeout=20., **more): return Client('m', base(server, timeout), folder, **{'workers': 32, 'pause': 0.02, 'spent': None, **more})


def made(server, folder, n, **more):
    "A dataset from the server."
    run = Run.open(str(folder), settings_for(teacher='openai', n_rows=n))
    client = client_for(server, run.path('requests'), **more)
    rows = generate(run, OpenAITeacher('m', client=client), BANK)
    return rows, read_jsonl(run.path('quarantine.jsonl'))[0], client


def without_key(folder):
    files = [p for p in Path(folder).rglob('*') if p.is_file()]
    assert files and not [p for p in files if KEY.encode() in p.read_bytes() or KEY.encode() in str(p).encode()]


# --- what it must show -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [100, pytest.param(1500, marks=SLOW)])
def test_all_rows_come_out_of_a_server_that_misbehaves(server, tmp_path, capfd, n):
    server.set(mix=FAULTS, broken=0.03, refused=0.02)
    plan = plan_data(BANK, settings_for(n_rows=n))
    rows, lost, client = made(server, tmp_path/'run', n, timeout=2.5)
    ids = [r['id'] for r in rows]
    assert len(ids) == len(set(ids)) and not set(ids) & {x['id'] for x in lost}
    assert {*ids, *(x['id'] for x in lost)} == {p['id'] for p in plan}
    assert ids == [p['id'] for p in plan if p['id'] in set(ids)], 'the file is in the order of the plan'
    why = Counter(next((k for k in ('refused', 'outside the schema', 'repeats') if k in x['reason']), x['reason']) for x in lost)
    assert set(why) <= {'refused', 'outside the schema', 'repeats'}, why
    assert len(lost) < 0.1*n
    seen = server.get()
    assert all(seen['faults'].get(f, 0) > 0 for f in FAULTS), seen['faults']
    kept = [p for p in (tmp_path/'run'/'requests').iterdir() if len(p.stem) == 64]
    assert set(seen['answered']) == {p.stem for p in kept}, 'each answer is kept'
    late = sum(seen['answered'].values()) - len(kept)
    assert late <= seen['faults']['timeout'], 'only what came too late to be read was asked for twice'
    assert client.ledger.counts['retries'] >= sum(seen['faults'][f] for f in FAULTS) - 32
    without_key(tmp_path)
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err and f"{len(lost) - why['repeats']} set aside" in shown.err   # repeats are found at the end
    with capfd.disabled(): print(f'{len(rows)} rows, {len(lost)} in quarantine {dict(why)}, {len(kept)} answers, {client.ledger.counts["retries"]} retries, faults {seen["faults"]}')


def started(work):
    "A process of its own for some work; forked, so that it need not import everything again."
    pid = os.fork()
    if pid: return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
        os._exit(0)
    except BaseException: os._exit(1)


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def answers(folder): return {p.stem for p in (folder/'requests').glob('*.json') if len(p.stem) == 64}


def cut_off(server, folder, n, points, sign, rng):
    "Runs that are killed when a certain number of answers is there; yields what was kept, and how far the server's log went."
    for at in points:
        server.set(limit=at)
        pid = started(lambda: made(server, folder, n, workers=8))
        while len(server.get()['answered']) < at: time.sleep(0.02)
        time.sleep(rng.random()*0.02)
        os.kill(pid, sign)
        server.set(limit=10**9)
        ended(pid)
        yield answers(folder), len(server.get()['log'])


@pytest.mark.parametrize('sign', [signal.SIGKILL, signal.SIGINT])
def test_killed_at_random_points_and_resumed(server, tmp_path, sign):
    n, rng = 40, random.Random(7)
    server.set(mix={'429': 0.1, '500': 0.05}, broken=0.03, refused=0.02)
    rows, lost, _ = made(server, tmp_path/'whole', n)
    total = len(answers(tmp_path/'whole'))
    server.set(log=[], answered={})
    points = sorted(rng.sample(range(3, total - 12), 10 if sign == signal.SIGKILL else 3))
    kills = list(cut_off(server, tmp_path/'cut', n, points, sign, rng))
    assert len({len(k) for k, _ in kills}) > 2
    again, lost_again, client = made(server, tmp_path/'cut', n)
    assert again == rows and lost_again == lost
    assert (tmp_path/'cut'/'sft.jsonl').read_bytes() == (tmp_path/'whole'/'sft.jsonl').read_bytes()
    seen = server.get()
    for kept, so_far in kills: assert not kept & set(seen['log'][so_far:]), 'an answered request was sent again'
    assert answers(tmp_path/'cut') == answers(tmp_path/'whole')
    in_flight = sum(seen['answered'].values()) - total
    assert in_flight <= (8*len(kills) if sign == signal.SIGKILL else 0), 'at most what was on its way when a process was killed'
    assert not (tmp_path/'cut'/'sft.part.jsonl').exists()
    without_key(tmp_path)
    print(f'{len(kills)} kills at {points} of {total} answers; {in_flight} answers were on their way at a kill')


def test_torn_line_is_cut_off(server, tmp_path):
    server.set(delay=0.01)
    rows, *_ = made(server, tmp_path/'whole', 12)
    run = Run.open(str(tmp_path/'torn'), settings_for(teacher='openai', n_rows=12))
    lines = [json.dumps(r, ensure_ascii=False) for r in rows[:3]]
    run.path('sft.part.jsonl').write_text('\n'.join(lines)[:-40], encoding='utf8')
    again, _, client = made(server, tmp_path/'torn', 12)
    assert again == rows


def test_full_disk_loses_nothing(server, tmp_path):
    disk = tmp_path/'disk'
    disk.mkdir()
    mount = lambda *options: subprocess.run(['mount', '-t', 'tmpfs', '-o', *options, 'tmpfs', str(disk)], capture_output=True).returncode
    if os.geteuid() or mount('size=1m'): pytest.skip('needs the right to mount a small disk')
    try:
        with pytest.raises(SocraticError, match='No space left on device'): made(server, disk/'run', 40, workers=4)
        kept, so_far = answers(disk/'run'), len(server.get()['log'])
        assert kept == set(server.get()['answered']), 'each answer that was paid for is on the disk'
        assert 10 < len(kept) and Run.open(str(disk/'run')).diary
        assert not mount('remount,size=20m')
        rows, lost, _ = made(server, disk/'run', 40, workers=4)
        assert len(rows) + len(lost) == len(plan_data(BANK, settings_for(n_rows=40))) and not kept & set(server.get()['log'][so_far:])
    finally: subprocess.run(['umount', str(disk)])


def test_cap_holds_over_attempts_and_the_forecast_is_near(server, tmp_path):
    prices = tmp_path/'prices.yaml'
    prices.write_text('models: {m: {input: 2.5, cached: 1.25, output: 10}}')
    for _ in range(2):
        with pytest.raises(CostCapReached, match='is reached'): made(server, tmp_path/'run', 60, prices=prices, max_cost=0.08)
    rows, _, client = made(server, tmp_path/'run', 60, prices=prices)
    assert sum(json.loads(p.read_text())['cost'] for p in (tmp_path/'run'/'requests').glob('*.json')) == pytest.approx(client.ledger.spent)
    assert sum(server.get()['answered'].values()) == len(answers(tmp_path/'run'))
    foreseen = forecast(plan_data(BANK, settings_for(n_rows=60)), OpenAITeacher('m', client=client), BANK, settings_for(n_rows=60))
    assert 0.6 < foreseen['cost']/client.ledger.spent < 1.6, (foreseen, client.ledger.bill())


def test_cap_is_never_passed(server, tmp_path):
    prices = tmp_path/'prices.yaml'
    prices.write_text('models: {m: {input: 2.5, cached: 1.25, output: 10}}')
    client = client_for(server, tmp_path/'requests', prices=prices, max_cost=0.06)
    def ask(i):
        try: return client.ask('A system prompt.', f'Line {i}.', Reply)
        except CostCapReached: return None
    with ThreadPoolExecutor(32) as pool: found = list(pool.map(ask, range(400)))
    assert 0.045 < client.ledger.spent <= 0.06 and 0 < sum(x is not None for x in found) < 400


def test_retry_after_is_honoured(server, tmp_path):
    server.set(mix={'429': 1.})
    client = client_for(server, tmp_path/'requests', retries=3, pause=0)
    t = time.monotonic()
    with pytest.raises(SocraticError, match='did not answer in 4 attempts'): client.ask('System.', 'Line.', Reply)
    assert time.monotonic() - t >= 3*0.05


def test_wrong_key_stops_at_once_and_is_not_repeated(server, tmp_path):
    server.set(mix={'key': 1.})
    env = {**os.environ, 'OPENAI_API_KEY': KEY, 'OPENAI_BASE_URL': server.address, 'SOCRATIC_RUNS': str(tmp_path/'runs'), 'PYTHONPATH': str(ROOT)}
    code = 'from socratic_finetune.pipeline import main; main()'
    done = subprocess.run([sys.executable, '-c', code, 'generate', '--teacher', 'openai', '--n', '50', '--run', 'mine', '--max-cost', '3', '--workers', '4'],
                          cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and 'does not accept the key' in done.stderr and 'Traceback' not in done.stderr
    assert KEY not in done.stdout + done.stderr and len(server.get()['log']) <= 8
    without_key(tmp_path/'runs')


def test_refusals_are_answers(server, tmp_path):
    server.set(refused=1.)
    for _ in range(2):
        with pytest.raises(SocraticError, match='five rows in a row failed; the last: m refused: I cannot help with that'): made(server, tmp_path/'run', 50, workers=1)
    assert max(server.get()['answered'].values()) == 1


@SLOW
def test_many_at_once_takes_hardly_longer_than_the_ideal(server, tmp_path):
    "A benchmark: 300 ms a request, 32 in flight."
    server.set(delay=0.3)
    client, n = client_for(server, tmp_path/'requests', workers=32), 640
    t = time.perf_counter()
    with ThreadPoolExecutor(32) as pool: list(pool.map(lambda i: client.ask('System.', f'Line {i}.', Reply), range(n)))
    seconds, ideal = time.perf_counter() - t, n/32*0.3
    print(f'{n} requests in {seconds:.2f} s, {seconds/ideal:.2f} times the ideal {ideal:.1f} s')
    assert seconds < 1.3*ideal


# --- a real server ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def serving(tmp_path_factory):
    "`transformers serve` with the pocket model; yields its address."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    log = open(tmp_path_factory.mktemp('serve')/'log.txt', 'w+')
    command = [sys.executable, '-c', 'from transformers.cli.transformers import main; main()', 'serve', str(ROOT/'data'/'pocket'/'base'),
               '--host', '127.0.0.1', '--port', str(port), '--device', 'cpu']
    work = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, 'HF_HUB_OFFLINE': '1'})
    for _ in range(1200):
        time.sleep(0.25)
        if work.poll() is not None: break
        try: urlopen(f'http://127.0.0.1:{port}/health', timeout=1)
        except OSError: continue
        break
    if work.poll() is not None: raise RuntimeError(Path(log.name).read_text()[-3000:])
    yield f'http://127.0.0.1:{port}/v1'
    work.terminate()
    work.wait()


def test_transformers_serve_with_the_pocket_model(serving, tmp_path):
    from openai import OpenAI
    model = str(ROOT/'data'/'pocket'/'base')
    client = Client(model, OpenAI(base_url=serving, api_key=KEY, timeout=120), tmp_path/'requests', workers=2, max_tokens=48)
    said = client.answer(dict(model=model, messages=[dict(role='user', content="Explain Ohm's law.")], max_tokens=48, temperature=0))['content']
    assert 'current' in said
    for i in range(4):   # six million parameters write no JSON: what stays unusable is an error in words, paid for once
        for _ in range(2):
            with pytest.raises(SocraticError, match='outside the schema|was cut off'): client.ask('You are a tutor.', f'Explain Faraday\'s law. {i}', Reply, seed=i)
    sent = client.ledger.counts['requests']
    assert len(list((tmp_path/'requests').glob('*.json'))) == sent
    run = Run.open(str(tmp_path/'run'), settings_for(teacher='openai', n_rows=2))
    rows = generate(run, OpenAITeacher(model, client=client), BANK)
    lost = read_jsonl(run.path('quarantine.jsonl'))[0]
    assert len(rows) + len(lost) == 2 and all(x['reason'] for x in lost)
