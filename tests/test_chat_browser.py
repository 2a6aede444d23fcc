"""The chat in real pages: JupyterLab and Voila in headless Chromium.

Screenshots go into $SOCRATIC_SCREENSHOTS, else into the test's temporary folder."""
import json, os, shutil, signal, socket, subprocess, sys, time, urllib.error, urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat, pytest

CHROMIUM = next((p for p in ('/usr/bin/chromium', shutil.which('chromium'), shutil.which('google-chrome')) if p and Path(p).exists()), None)
pytestmark = [pytest.mark.xdist_group('browser'),    # one JupyterLab for all of them
              pytest.mark.skipif(CHROMIUM is None, reason='no Chromium here (looked for /usr/bin/chromium): install it, for instance with `apt-get install chromium`')]
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


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def begin_server(args, url, folder, log, **env):
    "Start a server and wait until it answers."
    keep = {f'JUPYTER_{d}_DIR': str(folder/f'.jupyter-{d.lower()}') for d in ('CONFIG', 'RUNTIME')}
    ours = {**os.environ, **keep, 'SOCRATIC_RUNS': str(folder/'runs'), 'OMP_NUM_THREADS': '1', **env}
    process = subprocess.Popen([sys.executable, *args], cwd=folder, env=ours, stdout=open(log, 'w'), stderr=subprocess.STDOUT, start_new_session=True)
    for _ in range(1200):
        if process.poll() is not None: break
        try:
            urllib.request.urlopen(url, timeout=30)
            return process
        except urllib.error.HTTPError: return process
        except OSError: time.sleep(.25)
    end_server(process)
    raise RuntimeError(f'{args[:3]} did not start:\n{log.read_text()[-2000:]}')


def end_server(process):
    for s in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None: return
        try: os.killpg(process.pid, s)
        except ProcessLookupError: return
        try: process.wait(1.5 if s == signal.SIGINT else 8)
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
    page.set_default_timeout(120_000)
    yield page
    page.screenshot(path=shots/f'end-of-{request.node.name}.png')
    context.close()
    assert not ran, f'script ran: {ran}'


@pytest.fixture(scope='module')
def shots(tmp_path_factory):
    folder = Path(os.environ.get('SOCRATIC_SCREENSHOTS') or tmp_path_factory.mktemp('screenshots'))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_all(page, url):
    "Open a notebook and run its cells; a Run All that comes before the kernel is attached is lost, so it is tried again."
    page.goto(url)
    page.wait_for_selector('.jp-Notebook')
    page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()
    chat = page.locator('.sf-chat').last
    for _ in range(4):
        page.get_by_role('menuitem', name='Run', exact=True).click()
        page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
        try:
            page.locator('.jp-InputPrompt').filter(has_text='[*]').or_(chat).first.wait_for(state='attached', timeout=15_000)
            break
        except playwright.TimeoutError: continue
    chat.wait_for(state='attached', timeout=300_000)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=300_000)
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
    end = time.monotonic() + 120
    while time.monotonic() < end:
        seen.add(len(said.inner_text()))
        if chat.locator('button.sf-stop').is_disabled() and 'tokens/s' in pace.inner_text(): return seen
        chat.page.wait_for_timeout(15)
    raise AssertionError(f'no reply in two minutes; lengths seen: {seen}')


def idle(chat):
    chat.locator('button.sf-stop:disabled').wait_for(timeout=120_000)


def sticks_out(chat):
    "What sticks out sideways."
    return chat.evaluate('''e => (e.scrollWidth > e.clientWidth + 1 ? ['the chat itself'] : []).concat([...e.querySelectorAll('.sf-said, .sf-you, .sf-pane, button, input')]
        .filter(x => x.offsetParent && x.getBoundingClientRect().right > e.getBoundingClientRect().right + 1)
        .map(x => x.outerHTML.slice(0, 120) + ' ' + x.getBoundingClientRect().right + ' > ' + e.getBoundingClientRect().right))''')


def converse(page, chat, folder):
    "All that a page can do, by mouse and by keyboard: three questions with a follow-up, stop, edit, an error, a thumb, both exports."
    ask(chat, 'Why is the sky blue?')
    assert len(watch(chat, 'tuned')) > 4
    assert 'more than red light' in chat.locator('.sf-pane.sf-base .sf-said').last.inner_text()
    assert chat.locator('.sf-pane.sf-tuned .sf-said li').count() == 2 and chat.locator('.sf-pane.sf-base .sf-said strong').inner_text() == 'sky'
    assert 'socratic 0.94' in chat.locator('.sf-pane.sf-tuned .sf-foot').inner_text()

    box = chat.locator('.sf-text input')
    box.press_sequentially('And at sunset?')                                # a fast typist: Enter must not overtake the last letters
    box.press('Enter')
    box.press('Enter')                                                      # and one who presses it twice sends one message
    chat.locator('.sf-you').nth(1).wait_for()
    idle(chat)
    assert chat.locator('.sf-you').all_inner_texts() == ['Why is the sky blue?', 'And at sunset?']

    ask(chat, 'slow')                                                       # stop one midway
    page.wait_for_function("document.querySelectorAll('.sf-pane.sf-base .sf-said')[2]?.innerText.length > 60")
    ask(chat, 'too early')
    page.get_by_text('Still answering').wait_for()
    chat.locator('button.sf-stop').click()
    idle(chat)
    assert chat.locator('.sf-you').count() == 3 and 60 < len(chat.locator('.sf-pane.sf-base .sf-said').last.inner_text()) < 1500
    assert 'stopped' in chat.locator('.sf-pane.sf-tuned').last.inner_text()

    chat.locator('button.sf-edit').click()                                  # edit the last message, by keyboard
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

    chat.get_by_role('button', name='Good reply (tuned)').first.click()
    page.get_by_text('1 preference pair').wait_for()
    pair = json.loads((folder/'preferences.jsonl').read_text())
    assert pair['chosen_arm'] == 'tuned' and pair['prompt'][-1]['content'] == 'Why is the sky blue?'

    chat.locator('button.sf-jsonl').click()
    with page.expect_download() as download: chat.locator('.sf-download').click()
    rows = [json.loads(l) for l in Path(download.value.path()).read_text().splitlines()]
    assert len(rows) == 6 and {'system', 'user', 'assistant', 'messages'} <= set(rows[0])
    chat.locator('button.sf-markdown').click()
    page.locator('.sf-download[download$=".md"]').wait_for()
    assert not sticks_out(chat)


def test_toy_chat_in_jupyterlab(lab, page, shots, desk):
    chat = run_all(page, f'{lab}/lab/tree/toy.ipynb?reset')
    converse(page, chat, desk/'out')
    assert not page.locator('.sf-kept').is_visible()                        # the transcript keeps out of sight while there is a chat

    tidy(page)
    chat.locator('.sf-title').scroll_into_view_if_needed()
    page.screenshot(path=shots/'lab-light.png')
    page.get_by_role('menuitem', name='Settings', exact=True).click()
    page.get_by_text('Theme', exact=True).first.hover()
    page.get_by_text('JupyterLab Dark', exact=True).click()
    page.wait_for_selector('body[data-jp-theme-light="false"]', state='attached')
    chat.get_by_text('Sampling and system prompt').click()
    chat.locator('.sf-title').scroll_into_view_if_needed()
    page.wait_for_timeout(700)
    page.screenshot(path=shots/'lab-dark.png')

    save(page)
    for _ in range(5):                                                      # the kernel lives on, and so does the conversation
        page.reload()
        try: page.locator('.sf-you').first.wait_for(timeout=30_000)
        except playwright.TimeoutError: continue                            # JupyterLab gives up on widgets that a busy kernel is slow to describe
        break
    assert page.locator('.sf-chat').last.locator('.sf-you').count() == 4

    page.get_by_role('menuitem', name='Kernel', exact=True).click()         # the kernel is gone: what was said stays on the page
    page.get_by_text('Restart Kernel…', exact=True).click()
    page.locator('.jp-Dialog button.jp-mod-accept').click()
    page.locator('.jp-Dialog').wait_for(state='detached')
    page.reload()
    page.locator('.sf-kept').wait_for()
    assert 'Which colour bends most?' in page.locator('.sf-kept').inner_text() and page.locator('.sf-chat').count() == 0
    page.screenshot(path=shots/'lab-restarted.png')


def save(page):
    page.get_by_role('menuitem', name='File', exact=True).click()
    page.get_by_text('Save Notebook', exact=True).click()
    page.locator('.jp-mod-dirty').wait_for(state='detached')


def test_hostile_texts_stay_texts(lab, page, shots):
    chat = run_all(page, f'{lab}/lab/tree/toy.ipynb?reset')
    for i, text in enumerate(HOSTILE):
        ask(chat, 'echo ' + text)
        chat.locator('.sf-you').nth(i).wait_for()
        idle(chat)
    page.wait_for_timeout(200)
    assert chat.locator('.sf-you').count() == len(HOSTILE)
    live = chat.locator('.sf-log').evaluate("e => e.querySelectorAll('script, img, svg, a, iframe, .sf-said b, .sf-said i, .sf-you b, [onerror], [onload], [onmouseover]').length")
    assert live == 0
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
    assert 'tokens/s' in chat.locator('.sf-pane.sf-tuned .sf-foot').last.inner_text()
    assert 'socratic' in chat.locator('.sf-pane.sf-tuned .sf-foot').last.inner_text()
    tidy(page)
    chat.scroll_into_view_if_needed()
    page.screenshot(path=shots/'lab-notebook.png')


@contextmanager
def voila(page, folder, *args):
    "A page that Voila serves."
    port = free_port()
    server = begin_server([*args, f'--port={port}', '--no-browser'], f'http://127.0.0.1:{port}/static/', folder, folder/f'voila-{port}.log')
    try:
        page.goto(f'http://127.0.0.1:{port}/', wait_until='commit')         # it is sent piece by piece, while the kernel starts
        page.locator('.sf-chat').wait_for(timeout=180_000)
        yield page.locator('.sf-chat')
    finally: end_server(server)


def test_toy_chat_in_voila(page, shots, desk):
    folder = desk/'voila'
    folder.mkdir()
    shutil.copy(desk/'toy.ipynb', folder)
    with voila(page, folder, '-m', 'voila', 'toy.ipynb', '--theme=dark', '--Voila.ip=127.0.0.1') as chat:
        converse(page, chat, folder/'out')
        page.screenshot(path=shots/'voila-dark.png')
        ask(chat, 'echo ' + HOSTILE[0])
        idle(chat)
        assert not chat.locator('.sf-log script, .sf-log img, .sf-log svg').count()


def test_the_page_of_make_chat(page, shots, desk):
    "What `make chat` serves: the pocket model, no code in sight, nothing from elsewhere, wide and narrow."
    elsewhere, here = [], ('data:', 'blob:', 'http://127.0.0.1:')
    page.on('requestfailed', lambda r: elsewhere.append((r.url, r.failure)) if r.failure != 'csp' and not r.url.startswith(here) else None)
    with voila(page, desk, '-m', 'socratic_finetune.chat') as chat:
        assert page.locator('text=run_chat').count() == 0
        chat.locator('button.sf-chip').first.click()
        assert len(watch(chat, 'tuned')) > 1
        ask(chat, 'Can you give me an example?')
        chat.locator('.sf-you').nth(1).wait_for()
        idle(chat)
        assert not sticks_out(chat)
        page.screenshot(path=shots/'voila-light.png')
        page.set_viewport_size(dict(width=400, height=860))
        page.wait_for_timeout(300)
        assert not sticks_out(chat)
        page.screenshot(path=shots/'voila-narrow.png')
    assert not elsewhere, elsewhere
