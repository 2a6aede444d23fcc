"""The chat in real pages: JupyterLab, Voila and, where it is installed, Notebook 7, in headless Chromium.

Screenshots go into $SOCRATIC_SCREENSHOTS, else into runs/screenshots."""
import importlib.util, json, os, shutil, signal, socket, subprocess, sys, threading, time, urllib.error, urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat, pytest

CHROMIUM = next((p for p in ('/usr/bin/chromium', shutil.which('chromium'), shutil.which('google-chrome')) if p and Path(p).exists()), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='no Chromium here (looked for /usr/bin/chromium): install it, for instance with `apt-get install chromium`')
playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: pip install -e .[dev]')
ROOT = Path(__file__).resolve().parent.parent

TOY = '''
import time
from types import SimpleNamespace
from socratic_finetune.chat import ChatWidget
from socratic_finetune.config import settings_for

class Toy:
    arms, system, tokenizer, model, settings = ('base', 'tuned'), 'You are a tutor.', None, None, settings_for()
    says = dict(base='The **sky** is blue since air scatters blue light more than red light, in every direction.',
                tuned='Good question! Picture a *prism* in sunlight.\\n\\n- Which colour bends most?\\n- Which bends least?\\n\\nWhat could air do to them?')
    def stream(self, messages, arm='tuned', stop=None, **sampling):
        asked = messages[-1]['content']
        if asked == 'fail': raise MemoryError('no room left')
        text = asked if asked.startswith('echo ') else 'word ' * 400 if asked == 'slow' else self.says[arm]
        words = [text] if asked.startswith('echo ') else text.split(' ')
        for i, w in enumerate(words):
            if stop.wait(0.03): return
            yield w if i == 0 else ' ' + w

class ToyJudge:
    def judge(self, question, reply, context=None, reference=None):
        return SimpleNamespace(socratic=0.94 if '?' in reply else 0.05, helpful=0.8, error=None)

chat = ChatWidget(Toy(), judge=ToyJudge(), folder='out')
'''
HOSTILE = ['<script>alert(1)</script><img src=x onerror=alert(2)><svg onload=alert(3)>', '"><b onmouseover=alert(4)>x</b></div></div></section>',
           '**never closed `nor this ```\n</code></pre><script>alert(5)</script>', '[click](javascript:alert(6)) <a href="javascript:alert(7)">x</a>',
           '\u202eright to left\u202e مرحبا بالعالم <i>', 'x'*10_000, '🧑‍🔬🎉'*200, '$\\href{javascript:alert(8)}{x}$ &lt;script&gt; <!--']
LIVE = "e => e.querySelectorAll('script, img, svg, a, iframe, .sf-said b, .sf-said i, .sf-you b, .sf-head i, [onerror], [onload], [onmouseover]').length"


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def begin_server(args, url, folder, log, **env):
    "Start a server and wait until it answers."
    keep = {f'JUPYTER_{d}_DIR': str(folder/f'.jupyter-{d.lower()}') for d in ('CONFIG', 'RUNTIME')}
    ours = {**os.environ, **keep, 'SOCRATIC_RUNS': str(folder/'runs'), 'OMP_NUM_THREADS': '1', **env}
    process = subprocess.Popen([sys.executable, *args], cwd=folder, env=ours, stdout=open(log, 'w'), stderr=subprocess.STDOUT, start_new_session=True)
    for _ in range(240):
        if process.poll() is not None: break
        try:
            urllib.request.urlopen(url, timeout=30)
            return process
        except urllib.error.HTTPError: return process
        except OSError: time.sleep(.25)
    end_server(process)
    raise RuntimeError(f'{args[:3]} did not start:\n{log.read_text()[-2000:]}')


def end_server(process, patience=1.5):
    for s in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None: return
        try: os.killpg(process.pid, s)
        except ProcessLookupError: return
        try: process.wait(patience if s == signal.SIGINT else 8)
        except subprocess.TimeoutExpired: pass


def write_notebook(path, *cells):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.strip()) for c in cells],
                                  metadata={'kernelspec': {'display_name': 'Python 3 (ipykernel)', 'language': 'python', 'name': 'python3'}})
    nbformat.write(nb, path)


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    "A folder with the notebooks to open."
    folder = tmp_path_factory.mktemp('desk')
    write_notebook(folder/'toy.ipynb', TOY, 'chat')
    shutil.copy(ROOT/'nbs'/'08_chat.ipynb', folder/'08_chat.ipynb')
    return folder


@pytest.fixture(scope='module')
def lab(desk):
    "JupyterLab's address."
    port = free_port()
    options = ['--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', '--allow-root', '--IdentityProvider.token=', '--ServerApp.password=',
               f'--ServerApp.root_dir={desk}', '--LabApp.news_url=None', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', '--LabApp.extension_manager=readonly']
    server = begin_server(['-m', 'jupyterlab', *options], f'http://127.0.0.1:{port}/api', desk, desk/'lab.log')
    yield f'http://127.0.0.1:{port}'
    end_server(server)


@pytest.fixture
def browser():
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-background-networking'])
        yield b
        b.close()


@pytest.fixture
def page(browser, shots, request):
    "A page on which any dialog (an alert that ran) fails the test; its last state is kept as a picture."
    context = browser.new_context(viewport=dict(width=1280, height=1000), accept_downloads=True)
    page, ran = context.new_page(), []
    page.on('dialog', lambda d: d.accept() if d.type == 'beforeunload' else (ran.append(d.message), d.dismiss()))
    page.set_default_timeout(30_000)
    yield page
    page.screenshot(path=shots/f'end-of-{request.node.name}.png')
    context.close()
    assert not ran, f'script ran: {ran}'


@pytest.fixture(scope='module')
def shots():
    folder = Path(os.environ.get('SOCRATIC_SCREENSHOTS') or ROOT/'runs'/'screenshots')
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_all(page, url, lab=True):
    "Open a notebook and run its cells; a Run All that comes before the kernel is attached is lost, so it is tried again."
    page.goto(url)
    page.wait_for_selector('.jp-Notebook')
    if lab: page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()
    chat = page.locator('.sf-chat').last
    for _ in range(4):
        page.get_by_role('menuitem', name='Run', exact=True).click()
        page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
        try:
            page.locator('.jp-InputPrompt').filter(has_text='[*]').or_(chat).first.wait_for(state='attached', timeout=6000)
            break
        except playwright.TimeoutError: continue
    chat.wait_for(state='attached', timeout=90_000)
    if lab: page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=60_000)
    chat.scroll_into_view_if_needed()
    return chat


def tidy(page):
    "Put away what is not the notebook: the file browser and the news."
    if page.locator('.jp-FileBrowser').is_visible(): page.locator('.jp-SideBar.jp-mod-left .lm-TabBar-tab.lm-mod-current').click()
    news = page.get_by_role('button', name='No', exact=True)
    if news.count(): news.first.click()
    page.wait_for_timeout(300)


def ask(chat, text):
    box = chat.locator('.sf-text input')
    box.fill(text)
    box.press('Enter')


def watch(chat, arm, exchange=0):
    "The lengths that a side's reply in an exchange (from 0) is seen at, until the chat is idle."
    seen, said, pace = set(), chat.locator(f'.sf-pane.sf-{arm} .sf-said').nth(exchange), chat.locator(f'.sf-pane.sf-{arm} .sf-foot').nth(exchange)
    said.wait_for()
    end = time.monotonic() + 40
    while time.monotonic() < end:
        seen.add(len(said.inner_text()))
        if chat.locator('button.sf-stop').is_disabled() and 'tokens/s' in pace.inner_text(): return seen
        chat.page.wait_for_timeout(15)
    raise AssertionError(f'no reply in 40 s; lengths seen: {seen}')


def idle(chat):
    chat.locator('button.sf-stop:disabled').wait_for(timeout=40_000)


def sticks_out(chat):
    "What sticks out sideways."
    return chat.evaluate('''e => (e.scrollWidth > e.clientWidth + 1 ? ['the chat itself'] : []).concat([...e.querySelectorAll('.sf-said, .sf-you, .sf-pane, button, input')]
        .filter(x => x.offsetParent && x.getBoundingClientRect().right > e.getBoundingClientRect().right + 1)
        .map(x => x.outerHTML.slice(0, 120) + ' ' + x.getBoundingClientRect().right + ' > ' + e.getBoundingClientRect().right))''')


def pale(chat):
    "Texts with a contrast below 4.5 to 1, as WCAG asks for; those of disabled buttons do not count."
    return chat.evaluate("""e => {
        const rgba = c => { const m = c.match(/[\\d.]+/g).map(Number); return c.startsWith('color(srgb') ? [...m.slice(0, 3).map(v => v * 255), m[3] ?? 1] : [m[0], m[1], m[2], m[3] ?? 1] }
        const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1)
        const ground = x => { const c = x ? rgba(getComputedStyle(x).backgroundColor) : [255, 255, 255, 1]; return c[3] < 1 ? over(c, ground(x.parentElement)) : c }
        const light = c => [0.2126, 0.7152, 0.0722].reduce((s, w, i) => { const v = c[i] / 255; return s + w * (v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4) }, 0)
        return [...e.querySelectorAll('.sf-title, .sf-you, .sf-said, .sf-head b, .sf-pace, .sf-badge, .sf-status, .sf-chip, .sf-actions button:enabled, .sf-send:enabled')].filter(x => x.offsetParent && x.innerText.trim()).map(x => {
            const b = ground(x), [l, d] = [light(over(rgba(getComputedStyle(x).color), b)), light(b)].sort((p, q) => q - p)
            return [(l + .05) / (d + .05), x.className + ': ' + getComputedStyle(x).color + ' on ' + b] }).filter(r => r[0] < 4.5).map(r => r[0].toFixed(1) + ' ' + r[1]) }""")


def test_toy_chat_in_jupyterlab(lab, page, shots, desk):
    chat = run_all(page, f'{lab}/lab/tree/toy.ipynb?reset')
    ask(chat, 'Why is the sky blue?')
    assert len(watch(chat, 'tuned')) > 4
    assert 'more than red light' in chat.locator('.sf-pane.sf-base .sf-said').last.inner_text()
    assert chat.locator('.sf-pane.sf-tuned .sf-said li').count() == 2 and chat.locator('.sf-pane.sf-base .sf-said strong').inner_text() == 'sky'
    assert 'socratic 0.94' in chat.locator('.sf-pane.sf-tuned .sf-foot').inner_text()

    chat.locator('.sf-text input').press_sequentially('And at sunset?')     # a fast typist: Enter must not overtake the last letters
    chat.locator('.sf-text input').press('Enter')
    idle(chat)
    chat.locator('.sf-you').nth(1).wait_for()
    assert chat.locator('.sf-you').nth(1).inner_text() == 'And at sunset?'
    idle(chat)

    ask(chat, 'slow')                                                       # stop one midway
    page.wait_for_function("document.querySelectorAll('.sf-pane.sf-base .sf-said')[2]?.innerText.length > 60")
    ask(chat, 'too early')
    page.get_by_text('Still answering').wait_for()
    chat.locator('button.sf-stop').click()
    idle(chat)
    assert chat.locator('.sf-you').count() == 3 and 60 < len(chat.locator('.sf-pane.sf-base .sf-said').last.inner_text()) < 1500
    assert 'stopped' in chat.locator('.sf-pane.sf-tuned').last.inner_text()

    chat.locator('button.sf-edit').click()                                  # edit the last message, by keyboard
    box = chat.locator('.sf-text input')
    playwright.expect(box).to_have_value('slow')
    box.fill('Say it shortly.')
    box.press('Enter')
    page.wait_for_function("[...document.querySelectorAll('.sf-you')].at(-1).innerText == 'Say it shortly.'")
    idle(chat)
    assert chat.locator('.sf-you').count() == 3

    ask(chat, 'fail')
    page.locator('.sf-error').first.wait_for()
    idle(chat)
    assert 'no room left' in chat.locator('.sf-error').first.inner_text()

    chat.locator('.sf-pane.sf-tuned').first.get_by_title('Good reply').click()
    page.get_by_text('1 preference pair').wait_for()
    pair = json.loads((desk/'out'/'preferences.jsonl').read_text())
    assert pair['chosen_arm'] == 'tuned' and pair['prompt'][-1]['content'] == 'Why is the sky blue?'

    chat.locator('button.sf-jsonl').click()
    with page.expect_download() as download: chat.locator('.sf-download').click()
    rows = [json.loads(l) for l in Path(download.value.path()).read_text().splitlines()]
    assert len(rows) == 6 and {'system', 'user', 'assistant', 'messages'} <= set(rows[0])
    chat.locator('button.sf-markdown').click()
    page.get_by_text('.md', exact=False).first.wait_for()
    assert not sticks_out(chat)

    tidy(page)
    chat.locator('.sf-title').scroll_into_view_if_needed()
    page.screenshot(path=shots/'lab-light.png')
    assert not pale(chat)
    page.get_by_role('menuitem', name='Settings', exact=True).click()
    page.get_by_text('Theme', exact=True).first.hover()
    page.get_by_text('JupyterLab Dark', exact=True).click()
    page.wait_for_selector('body[data-jp-theme-light="false"]', state='attached')
    chat.get_by_text('Sampling and system prompt').click()
    chat.locator('.sf-title').scroll_into_view_if_needed()
    page.wait_for_timeout(700)
    page.screenshot(path=shots/'lab-dark.png')
    assert not pale(chat) and not sticks_out(chat)

    page.get_by_role('menuitem', name='File', exact=True).click()
    page.get_by_text('Save Notebook', exact=True).click()
    page.locator('.jp-mod-dirty').wait_for(state='detached')
    assert 'Which colour bends most?' in str(nbformat.read(desk/'toy.ipynb', 4).cells[1].outputs)    # a transcript that needs no kernel
    page.reload()                                                           # the kernel lives on, and so does the conversation
    page.locator('.sf-you').first.wait_for()
    assert page.locator('.sf-chat').last.locator('.sf-you').count() == 4

    page.get_by_role('menuitem', name='Kernel', exact=True).click()          # a new kernel knows nothing of it: the page stays readable
    page.get_by_role('menuitem', name='Restart Kernel…', exact=True).click()
    page.locator('.jp-Dialog .jp-mod-accept').click()
    page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()
    page.reload()
    page.get_by_text('Transcript, which stays on the page').click()
    page.get_by_text('Which colour bends most?').last.wait_for()


def test_by_keyboard_alone_and_with_names(lab, page):
    chat = run_all(page, f'{lab}/lab/tree/toy.ipynb?reset')
    where = lambda: page.evaluate('document.activeElement.innerText')
    def tab_to(name):
        for _ in range(12):
            if name in where(): return
            page.keyboard.press('Tab')
        raise AssertionError(f'{name} is not reached: {where()}')
    chat.get_by_role('textbox', name='Your message').focus()
    page.keyboard.type('Why is the sky blue?')
    page.keyboard.press('Enter')
    watch(chat, 'tuned')
    tab_to('Edit last')
    page.keyboard.press('Enter')
    playwright.expect(chat.get_by_role('textbox', name='Your message')).to_be_focused()
    page.keyboard.press('End')
    page.keyboard.type(' And red?')
    page.keyboard.press('Enter')
    page.wait_for_function("document.querySelector('.sf-you').innerText.endsWith('And red?')")
    idle(chat)
    tab_to('Sampling and system prompt')
    page.keyboard.press('Space')
    chat.get_by_role('textbox', name='System prompt').wait_for()
    for name in ('Send', 'Stop', 'Regenerate', 'Edit last', 'Clear', 'Export JSONL', 'Export Markdown', 'Side by side', 'Other questions'):
        assert chat.get_by_role('button', name=name).count() == 1, name
    for name in ('You said', 'base says', 'tuned says'): assert chat.get_by_role('group', name=name).count() == 1, name
    assert chat.get_by_role('heading', name='Socratic chat').count() == 1 and chat.get_by_title('Good reply (tuned)').count() == 1
    assert page.locator('.jp-Cell').count() >= 2                             # no key was taken for a shortcut of the notebook, such as x, which cuts a cell


@pytest.mark.skipif(importlib.util.find_spec('notebook') is None, reason='Notebook 7 is not installed: pip install "notebook>=7"')
def test_toy_chat_in_notebook_7(page, shots, desk):
    port = free_port()
    server = begin_server(['-m', 'notebook', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--allow-root', '--IdentityProvider.token=', '--ServerApp.password=',
                           f'--ServerApp.root_dir={desk}'], f'http://127.0.0.1:{port}/api', desk, desk/'notebook.log')
    try:
        chat = run_all(page, f'http://127.0.0.1:{port}/notebooks/toy.ipynb', lab=False)
        ask(chat, 'Why is the sky blue?')
        assert len(watch(chat, 'tuned')) > 4
        assert not sticks_out(chat) and not pale(chat)
        page.screenshot(path=shots/'notebook7-light.png')
    finally: end_server(server)


def test_hostile_texts_stay_texts(lab, page, shots):
    chat = run_all(page, f'{lab}/lab/tree/toy.ipynb?reset')
    for i, text in enumerate(HOSTILE):
        ask(chat, 'echo ' + text)
        chat.locator('.sf-you').nth(i).wait_for()
        idle(chat)
    page.wait_for_timeout(200)
    assert chat.locator('.sf-you').count() == len(HOSTILE)
    assert chat.locator('.sf-log').evaluate(LIVE) == 0
    shown = chat.locator('.sf-pane.sf-tuned .sf-said').first.inner_text()
    assert '<script>alert(1)</script>' in shown and 'onerror=alert(2)' in shown
    assert not sticks_out(chat)
    tidy(page)
    page.screenshot(path=shots/'lab-hostile.png')
    page.set_viewport_size(dict(width=430, height=900))
    page.wait_for_timeout(300)
    assert not sticks_out(chat)
    page.screenshot(path=shots/'lab-narrow-hostile.png')


def test_the_notebook_in_jupyterlab(lab, page, shots):
    "08_chat.ipynb itself, run as a reader would run it, with the pocket model."
    chat = run_all(page, f'{lab}/lab/tree/08_chat.ipynb?reset')
    before = chat.locator('.sf-you').count()
    assert before == 3                                                      # the cell's own short conversation
    chat.locator('button.sf-clear').click()
    chat.locator('.sf-empty').wait_for()
    lengths = {'base': set(), 'tuned': set()}
    for i, text in enumerate(("Explain Faraday's law.", 'I think that a magnet at rest makes a current.', 'Can you give me an example?', 'What is a prime number?')):
        ask(chat, text)
        lengths['tuned'] |= watch(chat, 'tuned', i)
        lengths['base'].add(len(chat.locator('.sf-pane.sf-base .sf-said').last.inner_text()))
    assert len(lengths['tuned']) > 5 and len(lengths['base']) > 2
    assert all(t in chat.locator('.sf-pane.sf-tuned .sf-foot').last.inner_text() for t in ('tokens/s', 'socratic', 'helpful'))
    tidy(page)
    chat.scroll_into_view_if_needed()
    page.screenshot(path=shots/'lab-notebook.png')


def open_voila(page, desk, *options, theme='', **env):
    "Start the chat's page as `make chat` does; returns the server, its address and the chat."
    pytest.importorskip('voila', reason='voila is not installed: pip install -e .[dev]')
    port = free_port()
    server = begin_server(['-m', 'socratic_finetune.chat', '--port', str(port), *options], f'http://127.0.0.1:{port}/static/', desk, desk/'voila.log', **env)
    page.goto(f'http://127.0.0.1:{port}/{theme}')
    chat = page.locator('.sf-chat')
    chat.wait_for(timeout=90_000)
    return server, f'http://127.0.0.1:{port}/', chat


def left_behind(mark):
    "Processes that have a mark in their environment, where the system shows it."
    found = []
    for p in Path('/proc').glob('[0-9]*'):
        try: found += [p.name] if mark.encode() in (p/'environ').read_bytes() and 'Z' not in (p/'stat').read_text().rsplit(')', 1)[1][:3] else []
        except OSError: pass
    return found


def test_the_page_in_voila(page, shots, desk):
    "What `make chat` serves: a browser opens, no code is in sight, wide and narrow, light and dark."
    opener = desk/'open.sh'
    opener.write_text('#!/bin/sh\nprintf %s "$1" > opened.txt\n')
    opener.chmod(0o755)
    elsewhere = []
    page.on('requestfailed', lambda r: elsewhere.append((r.url, r.failure)) if r.failure != 'csp' and not r.url.startswith(('data:', 'blob:', 'http://127.0.0.1:')) else None)
    server, url, chat = open_voila(page, desk, BROWSER=f'{opener} %s', CHAT_TEST='a-page-of-its-own')
    try:
        opened = (desk/'opened.txt').read_text()                             # a file that leads to the page
        assert url.rstrip('/') in urllib.request.urlopen(opened).read().decode()
        assert page.locator('text=show_page').count() == 0 and page.locator('.sf-error').count() == 0
        lengths = dict(base=set(), tuned=set())
        for i, text in enumerate(("Explain Faraday's law.", 'I think that a magnet at rest makes a current.', 'What is a prime number?')):
            ask(chat, text)
            for arm in lengths: lengths[arm] |= watch(chat, arm, i)
        assert all(len(l) > 2 for l in lengths.values()), lengths
        assert 'socratic' in chat.locator('.sf-pane.sf-tuned .sf-foot').last.inner_text()
        assert not sticks_out(chat) and not pale(chat)
        page.screenshot(path=shots/'voila-light.png')
        chat.screenshot(path=shots/'chat.png')
        page.set_viewport_size(dict(width=400, height=860))
        page.wait_for_timeout(300)
        assert not sticks_out(chat)
        page.screenshot(path=shots/'voila-narrow.png')
        page.set_viewport_size(dict(width=1280, height=1000))
        page.goto(f'{url}?theme=dark')                                       # and a second visitor
        chat.wait_for(timeout=90_000)
        chat.locator('button.sf-chip').first.click()
        watch(chat, 'tuned')
        page.wait_for_timeout(300)
        page.screenshot(path=shots/'voila-dark.png')
        assert not sticks_out(chat) and not pale(chat)
        assert not elsewhere, elsewhere
    finally: end_server(server, patience=12)
    assert not left_behind('CHAT_TEST=a-page-of-its-own')


class Loopback(BaseHTTPRequestHandler):
    "An OpenAI-compatible server that says what it was told, or word after word for half a minute."
    def do_POST(self):
        said = json.loads(self.rfile.read(int(self.headers['Content-Length'])))['messages'][-1]['content']
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.end_headers()
        for word in ['word '] * 600 if said == 'slow' else [said[i:i+2000] for i in range(0, len(said), 2000)]:
            self.wfile.write(f"data: {json.dumps(dict(choices=[dict(index=0, delta=dict(content=word))]))}\n\n".encode())
            self.wfile.flush()
            time.sleep(.05)
        self.wfile.write(b'data: [DONE]\n\n')

    def handle(self):
        try: super().handle()
        except OSError: pass                                                 # the chat hung up

    def log_message(self, *_): pass


def test_an_endpoint_in_voila(page, shots, desk):
    "A server's model as base: stop midway, hostile texts from both, export, reload; an endpoint that is not there is a reply in words."
    endpoint = ThreadingHTTPServer(('127.0.0.1', 0), Loopback)
    threading.Thread(target=endpoint.serve_forever, daemon=True).start()
    at = f'@http://127.0.0.1:{endpoint.server_port}/v1'
    server, url, chat = open_voila(page, desk, '--no-browser', '--base', f'a<i>model</i>{at}', '--tuned', f'echo{at}')
    try:
        ask(chat, 'slow')
        page.wait_for_function("document.querySelector('.sf-pane.sf-base .sf-said')?.innerText.length > 60")
        assert 'a<i>model</i>' in chat.locator('.sf-pane.sf-base .sf-head').inner_text()
        chat.locator('button.sf-stop').click()
        idle(chat)
        for arm in ('base', 'tuned'):
            assert 'stopped' in chat.locator(f'.sf-pane.sf-{arm} .sf-foot').inner_text() and len(chat.locator(f'.sf-pane.sf-{arm} .sf-said').inner_text()) < 2500
        for i, text in enumerate(HOSTILE, 1):
            ask(chat, text)
            chat.locator('.sf-you').nth(i).wait_for()
            idle(chat)
        assert chat.locator('.sf-log').evaluate(LIVE) == 0 and not sticks_out(chat)
        page.set_viewport_size(dict(width=400, height=860))
        page.wait_for_timeout(300)
        assert not sticks_out(chat)
        page.screenshot(path=shots/'voila-narrow-hostile.png')
        chat.locator('button.sf-jsonl').click()
        with page.expect_download() as download: chat.locator('.sf-download').click()
        rows = [json.loads(l) for l in Path(download.value.path()).read_text().splitlines()]
        assert len(rows) == 2 * len(HOSTILE) and rows[0]['assistant'] == HOSTILE[0] and {r['model'] for r in rows} == {'a<i>model</i>', 'echo'}
        page.reload()
        chat.locator('.sf-empty').wait_for(timeout=90_000)
        endpoint.shutdown()
        endpoint.server_close()
        ask(chat, 'Is anybody there?')
        chat.locator('.sf-error').first.wait_for()
        idle(chat)
        assert 'a server runs at' in chat.locator('.sf-error').first.inner_text()
    finally: end_server(server, patience=12)


def test_a_page_that_cannot_be_says_why(page, desk):
    pytest.importorskip('voila', reason='voila is not installed: pip install -e .[dev]')
    port = free_port()
    server = begin_server(['-m', 'socratic_finetune.chat', '--port', str(port), '--no-browser', '--base', 'gpt-4o', '--tuned', 'gpt-4o'], f'http://127.0.0.1:{port}/static/',
                          desk, desk/'voila.log', OPENAI_API_KEY='', OPENAI_BASE_URL='')
    try:
        page.goto(f'http://127.0.0.1:{port}/')
        page.get_by_text('OPENAI_API_KEY is not set').wait_for(timeout=90_000)
    finally: end_server(server, patience=12)
