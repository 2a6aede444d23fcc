"""The chat in real pages: JupyterLab and Voila in headless Chromium.

Screenshots go into $SOCRATIC_SCREENSHOTS, else into the test's temporary folder."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

playwright = pytest.importorskip(
    'playwright.sync_api', reason='playwright is not installed: pip install -e .[dev]'
)
import check  # noqa: E402 - of .docs; it imports playwright

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = check.find_chromium()
pytestmark = [
    pytest.mark.xdist_group('browser'),  # one JupyterLab for all of them
    pytest.mark.skipif(
        CHROMIUM is None,
        reason='no Chromium here: install it, for instance with `apt-get install chromium`',
    ),
]

TOY = """
from types import SimpleNamespace
from socratic_finetune.chat import ChatWidget
from socratic_finetune.conversation import ScriptedTutor

REPLIES = {
    'base': 'The **sky** is blue since air scatters blue light more than red light, '
    'in every direction.',
    'tuned': 'Good question! Picture a *prism* in sunlight.\\n\\n- Which colour bends most?\\n'
    '- Which bends least?\\n\\nWhat could air do to them?',
}


class Toy(ScriptedTutor):
    def stream(self, messages, arm='tuned', stop=None, **sampling):
        message = messages[-1]['content']
        if message == 'fail':
            raise MemoryError('no room left')
        if message.startswith('echo '):
            words = [message]
        elif message == 'slow':
            words = ['word'] * 400
        else:
            words = self.replies[arm].split(' ')
        for i, word in enumerate(words):
            if stop.wait(0.03):
                return
            yield word if i == 0 else ' ' + word


class ToyJudge:
    def judge(self, question, reply, context=None, reference=None):
        socratic = 0.94 if '?' in reply else 0.05
        return SimpleNamespace(socratic=socratic, helpful=0.8, error=None)


chat = ChatWidget(Toy(REPLIES), judge=ToyJudge(), folder='out')
"""
HOSTILE = [
    '<script>alert(1)</script><img src=x onerror=alert(2)><svg onload=alert(3)>',
    '"><b onmouseover=alert(4)>x</b></div></div></section>',
    '**never closed `nor this ```\n</code></pre><script>alert(5)</script>',
    '[click](javascript:alert(6)) <a href="javascript:alert(7)">x</a>',
    '\u202eright to left\u202e مرحبا بالعالم <i>',
    'x' * 10_000,
    '🧑‍🔬🎉' * 200,
    '$\\href{javascript:alert(8)}{x}$ &lt;script&gt; <!--',
]
LIVE_ELEMENTS = (
    'script, img, svg, a, iframe, .sf-said b, .sf-said i, .sf-you b, '
    '[onerror], [onload], [onmouseover]'
)


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def start_server(args, url, folder, log):
    "Start a server and wait until it answers."
    settings = {
        f'JUPYTER_{name}_DIR': str(folder / f'.jupyter-{name.lower()}')
        for name in ('CONFIG', 'RUNTIME')
    }
    env = {**os.environ, **settings}
    env |= {'SOCRATIC_RUNS': str(folder / 'runs'), 'OMP_NUM_THREADS': '1'}
    with open(log, 'w') as output:
        process = subprocess.Popen(
            [sys.executable, *args],
            cwd=folder,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    for _ in range(1200):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=30)
            return process
        except urllib.error.HTTPError:  # an answer, if not a page
            return process
        except OSError:
            time.sleep(0.25)
    stop_server(process)
    raise RuntimeError(f'{args[:3]} did not start:\n{log.read_text()[-2000:]}')


def stop_server(process):
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        try:
            os.killpg(process.pid, number)
            process.wait(1.5 if number == signal.SIGINT else 8)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def write_notebook(path, *cells):
    kernel = {'display_name': 'Python 3 (ipykernel)', 'language': 'python', 'name': 'python3'}
    code = [nbformat.v4.new_code_cell(cell.strip()) for cell in cells]
    notebook = nbformat.v4.new_notebook(cells=code, metadata={'kernelspec': kernel})
    nbformat.write(notebook, path)


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    "A folder with the notebooks to open."
    folder = tmp_path_factory.mktemp('desk')
    write_notebook(folder / 'toy.ipynb', TOY, 'chat')
    shutil.copy(ROOT / 'nbs' / '08_chat.ipynb', folder / '08_chat.ipynb')
    return folder


@pytest.fixture(scope='module')
def lab(desk):
    "JupyterLab's address."
    port = free_port()
    options = [
        '--no-browser',
        '--ip=127.0.0.1',
        f'--port={port}',
        '--ServerApp.port_retries=0',
        '--allow-root',
        '--IdentityProvider.token=',
        '--ServerApp.password=',
        f'--ServerApp.root_dir={desk}',
        '--LabApp.news_url=None',
        '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate',
        '--LabApp.extension_manager=readonly',
    ]
    address = f'http://127.0.0.1:{port}'
    server = start_server(['-m', 'jupyterlab', *options], f'{address}/api', desk, desk / 'lab.log')
    yield address
    stop_server(server)


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=check.FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def shots(tmp_path_factory):
    "The folder for screenshots."
    named = os.environ.get('SOCRATIC_SCREENSHOTS')
    folder = Path(named or tmp_path_factory.mktemp('screenshots'))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def page(browser, shots, request):
    "A page on which any dialog (an alert that ran) fails the test; its last state is kept."
    viewport = dict(width=1280, height=1000)
    context = browser.new_context(viewport=viewport, accept_downloads=True)
    page = context.new_page()
    alerts = []

    def on_dialog(dialog):
        if dialog.type == 'beforeunload':
            dialog.accept()
        else:
            alerts.append(dialog.message)
            dialog.dismiss()

    page.on('dialog', on_dialog)
    page.set_default_timeout(120_000)
    yield page
    page.screenshot(path=shots / f'end-of-{request.node.name}.png')
    context.close()
    assert not alerts, f'script ran: {alerts}'


def run_all(page, url):
    """Open a notebook and run its cells; returns the chat.

    A Run All that comes before the kernel is attached is lost, so it is tried again."""
    page.goto(url)
    page.wait_for_selector('.jp-Notebook')
    page.get_by_text('Python 3 (ipykernel) | Idle').wait_for()
    chat = page.locator('.sf-chat').last
    started = page.locator('.jp-InputPrompt').filter(has_text='[*]').or_(chat).first
    for _ in range(4):
        page.get_by_role('menuitem', name='Run', exact=True).click()
        page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
        try:
            started.wait_for(state='attached', timeout=15_000)
            break
        except playwright.TimeoutError:
            continue
    chat.wait_for(state='attached', timeout=300_000)
    idle = '.jp-Notebook-ExecutionIndicator[data-status="idle"]'
    page.wait_for_selector(idle, timeout=300_000)
    chat.scroll_into_view_if_needed()
    return chat


def tidy(page):
    "Put away what is not the notebook: the file browser and the news."
    if page.locator('.jp-FileBrowser').is_visible():
        page.locator('.jp-SideBar.jp-mod-left .lm-TabBar-tab.lm-mod-current').click()
    news = page.get_by_role('button', name='No', exact=True)
    if news.count():
        news.first.click()
    page.wait_for_timeout(300)


def ask(chat, text):
    field = chat.locator('.sf-text input')
    field.fill(text)
    field.press('Enter')


def watch(chat, arm, exchange=0):
    "The lengths at which a model's reply (in an exchange, from 0) is seen, until it is there."
    lengths = set()
    reply = chat.locator(f'.sf-pane.sf-{arm} .sf-said').nth(exchange)
    footer = chat.locator(f'.sf-pane.sf-{arm} .sf-foot').nth(exchange)
    stop = chat.locator('button.sf-stop')
    reply.wait_for()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        lengths.add(len(reply.inner_text()))
        if stop.is_disabled() and 'tokens/s' in footer.inner_text():
            return lengths
        chat.page.wait_for_timeout(15)
    raise AssertionError(f'no reply in two minutes; lengths seen: {lengths}')


def wait_until_idle(chat):
    chat.locator('button.sf-stop:disabled').wait_for(timeout=120_000)


OVERFLOWING = """chat => {
    const edge = chat.getBoundingClientRect().right + 1
    const found = chat.scrollWidth > chat.clientWidth + 1 ? ['the chat itself'] : []
    for (const e of chat.querySelectorAll('.sf-said, .sf-you, .sf-pane, button, input'))
        if (e.offsetParent && e.getBoundingClientRect().right > edge)
            found.push(e.outerHTML.slice(0, 120))
    return found
}"""


def overflowing(chat):
    "What sticks out sideways."
    return chat.evaluate(OVERFLOWING)


def last_reply(chat, arm):
    return chat.locator(f'.sf-pane.sf-{arm} .sf-said').last


def ask_one_question(chat):
    ask(chat, 'Why is the sky blue?')
    assert len(watch(chat, 'tuned')) > 4
    assert 'more than red light' in last_reply(chat, 'base').inner_text()
    assert chat.locator('.sf-pane.sf-tuned .sf-said li').count() == 2
    assert chat.locator('.sf-pane.sf-base .sf-said strong').inner_text() == 'sky'
    assert 'socratic 0.94' in chat.locator('.sf-pane.sf-tuned .sf-foot').inner_text()


def type_fast(chat):
    "Enter must not overtake the last letters, and pressing it twice sends one message."
    field = chat.locator('.sf-text input')
    field.press_sequentially('And at sunset?')
    field.press('Enter')
    field.press('Enter')
    chat.locator('.sf-you').nth(1).wait_for()
    wait_until_idle(chat)
    messages = chat.locator('.sf-you').all_inner_texts()
    assert messages == ['Why is the sky blue?', 'And at sunset?']


def stop_midway(page, chat):
    ask(chat, 'slow')
    growing = "document.querySelectorAll('.sf-pane.sf-base .sf-said')[2]?.innerText.length > 60"
    page.wait_for_function(growing)
    ask(chat, 'too early')
    page.get_by_text('Still answering').wait_for()
    chat.locator('button.sf-stop').click()
    wait_until_idle(chat)
    assert chat.locator('.sf-you').count() == 3
    assert 60 < len(last_reply(chat, 'base').inner_text()) < 1500
    assert 'stopped' in chat.locator('.sf-pane.sf-tuned').last.inner_text()


def edit_by_keyboard(page, chat):
    field = chat.locator('.sf-text input')
    chat.locator('button.sf-edit').click()
    playwright.expect(field).to_have_value('slow')
    field.fill('Say it shortly.')
    field.press('Enter')
    page.wait_for_function(
        "[...document.querySelectorAll('.sf-you')].at(-1).innerText == 'Say it shortly.'"
    )
    wait_until_idle(chat)
    assert chat.locator('.sf-you').count() == 3


def see_an_error(page, chat):
    ask(chat, 'fail')
    page.locator('.sf-error').first.wait_for()
    wait_until_idle(chat)
    assert 'no room left' in chat.locator('.sf-error').first.inner_text()


def rate_and_export(page, chat, folder):
    chat.get_by_role('button', name='Good reply (tuned)').first.click()
    page.get_by_text('1 preference pair').wait_for()
    pair = json.loads((folder / 'preferences.jsonl').read_text())
    assert pair['chosen_arm'] == 'tuned'
    assert pair['prompt'][-1]['content'] == 'Why is the sky blue?'
    chat.locator('button.sf-jsonl').click()
    with page.expect_download() as download:
        chat.locator('.sf-download').click()
    lines = Path(download.value.path()).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 6
    assert {'system', 'user', 'assistant', 'messages'} <= set(rows[0])
    chat.locator('button.sf-markdown').click()
    page.locator('.sf-download[download$=".md"]').wait_for()


def converse(page, chat, folder):
    "All that a page can do, by mouse and by keyboard."
    ask_one_question(chat)
    type_fast(chat)
    stop_midway(page, chat)
    edit_by_keyboard(page, chat)
    see_an_error(page, chat)
    rate_and_export(page, chat, folder)
    assert not overflowing(chat)


def choose_dark_theme(page):
    page.get_by_role('menuitem', name='Settings', exact=True).click()
    page.get_by_text('Theme', exact=True).first.hover()
    page.get_by_text('JupyterLab Dark', exact=True).click()
    page.wait_for_selector('body[data-jp-theme-light="false"]', state='attached')


def save(page):
    page.get_by_role('menuitem', name='File', exact=True).click()
    page.get_by_text('Save Notebook', exact=True).click()
    page.locator('.jp-mod-dirty').wait_for(state='detached')


def reload(page):
    "JupyterLab gives up on widgets that a busy kernel is slow to describe: try again."
    for _ in range(5):
        page.reload()
        try:
            page.locator('.sf-you').first.wait_for(timeout=30_000)
            return
        except playwright.TimeoutError:
            continue


def restart_kernel(page):
    page.get_by_role('menuitem', name='Kernel', exact=True).click()
    page.get_by_text('Restart Kernel…', exact=True).click()
    page.locator('.jp-Dialog button.jp-mod-accept').click()
    page.locator('.jp-Dialog').wait_for(state='detached')


def test_toy_chat_in_jupyterlab(lab, page, shots, desk):
    chat = run_all(page, f'{lab}/lab/tree/toy.ipynb?reset')
    converse(page, chat, desk / 'out')
    assert not page.locator('.sf-kept').is_visible()  # the transcript waits out of sight

    tidy(page)
    chat.locator('.sf-title').scroll_into_view_if_needed()
    page.screenshot(path=shots / 'lab-light.png')
    choose_dark_theme(page)
    chat.get_by_text('Sampling and system prompt').click()
    chat.locator('.sf-title').scroll_into_view_if_needed()
    page.wait_for_timeout(700)
    page.screenshot(path=shots / 'lab-dark.png')

    save(page)
    reload(page)  # the kernel lives on, and so does the conversation
    assert page.locator('.sf-chat').last.locator('.sf-you').count() == 4

    restart_kernel(page)  # what was said stays on the page
    page.reload()
    page.locator('.sf-kept').wait_for()
    assert 'Which colour bends most?' in page.locator('.sf-kept').inner_text()
    assert page.locator('.sf-chat').count() == 0
    page.screenshot(path=shots / 'lab-restarted.png')


def test_hostile_texts_stay_texts(lab, page, shots):
    chat = run_all(page, f'{lab}/lab/tree/toy.ipynb?reset')
    for i, text in enumerate(HOSTILE):
        ask(chat, 'echo ' + text)
        chat.locator('.sf-you').nth(i).wait_for()
        wait_until_idle(chat)
    page.wait_for_timeout(200)
    assert chat.locator('.sf-you').count() == len(HOSTILE)
    log = chat.locator('.sf-log')
    assert log.evaluate(f'e => e.querySelectorAll("{LIVE_ELEMENTS}").length') == 0
    shown = chat.locator('.sf-pane.sf-tuned .sf-said').first.inner_text()
    assert '<script>alert(1)</script>' in shown and 'onerror=alert(2)' in shown
    assert not overflowing(chat)
    tidy(page)
    page.screenshot(path=shots / 'lab-hostile.png')
    page.set_viewport_size(dict(width=430, height=900))
    page.wait_for_timeout(300)
    assert not overflowing(chat)
    page.screenshot(path=shots / 'lab-narrow-hostile.png')


def test_the_notebook_in_jupyterlab(lab, page, shots):
    "08_chat.ipynb itself, run as a reader would run it, with the pocket model."
    chat = run_all(page, f'{lab}/lab/tree/08_chat.ipynb?reset')
    assert chat.locator('.sf-you').count() == 3  # the cell's own short conversation
    chat.locator('button.sf-clear').click()
    chat.locator('.sf-empty').wait_for()
    questions = [
        "Explain Faraday's law.",
        'I think that a magnet at rest makes a current.',
        'Can you give me an example?',
        'What is a prime number?',
    ]
    base_lengths = set()
    tuned_lengths = set()
    for i, question in enumerate(questions):
        ask(chat, question)
        tuned_lengths |= watch(chat, 'tuned', i)
        base_lengths.add(len(last_reply(chat, 'base').inner_text()))
    assert len(tuned_lengths) > 5 and len(base_lengths) > 2
    footer = chat.locator('.sf-pane.sf-tuned .sf-foot').last.inner_text()
    assert 'tokens/s' in footer and 'socratic' in footer
    tidy(page)
    chat.scroll_into_view_if_needed()
    page.screenshot(path=shots / 'lab-notebook.png')


@contextmanager
def open_page(page, folder, port, *args):
    "A chat that a server of ours serves as a page."
    address = f'http://127.0.0.1:{port}/'
    server = start_server([*args], f'{address}static/', folder, folder / f'voila-{port}.log')
    try:
        page.goto(address, wait_until='commit')  # it comes in pieces, while the kernel starts
        page.locator('.sf-chat').wait_for(timeout=180_000)
        yield page.locator('.sf-chat')
    finally:
        stop_server(server)


def test_toy_chat_in_voila(page, shots, desk):
    folder = desk / 'voila'
    folder.mkdir()
    shutil.copy(desk / 'toy.ipynb', folder)
    port = free_port()
    options = ['--theme=dark', '--Voila.ip=127.0.0.1', f'--port={port}', '--no-browser']
    with open_page(page, folder, port, '-m', 'voila', 'toy.ipynb', *options) as chat:
        converse(page, chat, folder / 'out')
        page.screenshot(path=shots / 'voila-dark.png')
        ask(chat, 'echo ' + HOSTILE[0])
        wait_until_idle(chat)
        assert not chat.locator('.sf-log script, .sf-log img, .sf-log svg').count()


def test_the_page_of_serve_chat(page, shots, desk):
    "The pocket model, no code in sight, nothing from elsewhere, wide and narrow."
    refused = []

    def on_failure(request):
        local = request.url.startswith(('data:', 'blob:', 'http://127.0.0.1:'))
        if request.failure != 'csp' and not local:
            refused.append((request.url, request.failure))

    page.on('requestfailed', on_failure)
    port = free_port()
    program = (
        f'from socratic_finetune.chat import serve_chat; serve_chat(port={port}, browser=False)'
    )
    with open_page(page, desk, port, '-c', program) as chat:
        assert page.locator('text=run_chat').count() == 0
        chat.locator('button.sf-chip').first.click()
        assert len(watch(chat, 'tuned')) > 1
        ask(chat, 'Can you give me an example?')
        chat.locator('.sf-you').nth(1).wait_for()
        wait_until_idle(chat)
        assert not overflowing(chat)
        page.screenshot(path=shots / 'voila-light.png')
        page.set_viewport_size(dict(width=400, height=860))
        page.wait_for_timeout(300)
        assert not overflowing(chat)
        page.screenshot(path=shots / 'voila-narrow.png')
    assert not refused, refused
