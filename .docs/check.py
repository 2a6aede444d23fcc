"""Reads the built site in a browser: `python .docs/check.py [folder for screenshots [page …]]`.

Every page is opened in headless Chromium at desktop and at phone width. The check fails, and says
why, where it finds: links and anchors that lead nowhere, pictures that are missing or not
described, errors in the console, requests to another host, formulas that were not typeset, pages
that scroll sideways, code that scrolls sideways on a desktop, a search without results, or a
button for dark mode that does nothing.
"""

import functools
import re
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from nbdev.config import get_config
from playwright.sync_api import sync_playwright

config = get_config()
OUT = Path(config.config_path) / config.doc_path.name
BROWSERS = ('chromium', 'google-chrome', 'chrome')
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-background-networking',
    '--disable-dev-shm-usage',
]
DESKTOP = {'width': 1280, 'height': 900}
PHONE = {'width': 390, 'height': 844}
VIEWS = (('light', DESKTOP, 'light'), ('dark', DESKTOP, 'dark'), ('phone', PHONE, 'light'))
TIMEOUT = 30_000  # milliseconds

PAGE_FACTS = """() => ({
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    anchors: [...document.querySelectorAll('[id]')].map(e => e.id),
    missing: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
    undescribed: [...document.images].filter(i => !(i.alt || '').trim()).map(i => i.src),
    formulas: [...document.querySelectorAll('.math.notranslate')].filter(
        m => !m.querySelector('.MathJax, .MathJax_Display, mjx-container')).length,
})"""
PAGE_OVERFLOW = """() => {
    const wide = document.scrollingElement.scrollWidth - window.innerWidth;
    if (wide <= 0) return null;
    const isOut = e => e.getBoundingClientRect().right > window.innerWidth + 1
        && getComputedStyle(e).position !== 'fixed';
    const first = [...document.querySelectorAll('main *, header *, footer *')]
        .filter(isOut).pop();
    return `${wide} pixels, by ${first ? first.tagName + '.' + first.className : 'an element'}`;
}"""
OPEN_DROPDOWNS = "() => document.querySelectorAll('details').forEach(d => { d.open = true; })"
CODE_OVERFLOW = """() => [...document.querySelectorAll('pre')]
    .filter(pre => pre.scrollWidth > pre.clientWidth + 1)
    .map(pre => pre.innerText.split('\\n').reduce((a, b) => a.length < b.length ? b : a))"""
FORMULAS_READY = """() => typeof MathJax === 'undefined' || !document.querySelector('.math')
    || MathJax.Hub && MathJax.Hub.queue.pending === 0 && MathJax.isReady"""
SET_MODE = """mode => {
    document.documentElement.dataset.theme = mode;
    document.documentElement.dataset.mode = mode;
}"""
MODE = '() => document.documentElement.dataset.theme'


class SilentHandler(SimpleHTTPRequestHandler):
    """Serves files without logging."""

    def log_message(self, *args):
        """Log nothing."""


class Browser:
    """A browser page that notes what goes wrong while it is used."""

    def __init__(self, browser, home):
        """Open an empty page.

        browser: Playwright's browser
        home: address of the site
        """
        self.page = browser.new_page()
        self.home = home
        self.faults = []
        self.name = ''
        self.page.route('**/*', self._request)
        self.page.on('console', self._console)
        self.page.on('pageerror', lambda error: self.fault(f'script: {str(error)[:160]}'))
        self.page.on('response', self._response)

    def fault(self, what):
        """Note a fault of the page that is open, once."""
        if (self.name, what) not in self.faults:
            self.faults.append((self.name, what))

    def _console(self, message):
        if message.type == 'error':
            self.fault(f'console: {message.text[:160]}')

    def _response(self, response):
        if response.status >= 400:
            self.fault(f'{response.status} for {response.url}')

    def _request(self, route):
        url = route.request.url
        if url.startswith((self.home, 'data:', 'blob:')):
            route.continue_()
        else:
            self.fault(f'asks another host: {url}')
            route.abort()

    def open(self, name, size):
        """Open a page of the site in a window of a size, and wait for its formulas."""
        self.name = name
        self.page.set_viewport_size(size)
        self.page.goto(f'{self.home}/{name}', wait_until='load')
        self.page.wait_for_function(FORMULAS_READY, timeout=TIMEOUT)


def check_contents(browser):
    """Note pictures and formulas that are not as they should be; returns links and anchors."""
    for image in browser.page.locator('img[loading=lazy]').all():
        image.scroll_into_view_if_needed()
    facts = browser.page.evaluate(PAGE_FACTS)
    for source in facts['missing']:
        browser.fault(f'missing picture {source}')
    for source in facts['undescribed']:
        browser.fault(f'picture without a description {source}')
    if facts['formulas']:
        browser.fault(f'{facts["formulas"]} formulas were not typeset')
    return facts['links'], {*facts['anchors'], '', 'top'}


def check_widths(browser):
    """Note what scrolls sideways: a page anywhere, code on a desktop; dropdowns are opened."""
    page = browser.page
    page.evaluate(OPEN_DROPDOWNS)
    for line in page.evaluate(CODE_OVERFLOW):
        browser.fault(f'code scrolls sideways, {len(line)} characters: {line.strip()[:60]}')
    for size in (DESKTOP, PHONE):
        page.set_viewport_size(size)
        page.wait_for_timeout(50)
        overflow = page.evaluate(PAGE_OVERFLOW)
        if overflow:
            browser.fault(f'page scrolls sideways at {size["width"]} pixels: {overflow}')


def check_links(browser, links, anchors):
    """Note the links that lead to no page, file or anchor of the site.

    Links to other hosts are not followed.

    links: page -> addresses that it links to
    anchors: page -> its anchors
    """
    for name, urls in links.items():
        browser.name = name
        for url in sorted(set(urls)):
            if not url.startswith(browser.home):
                continue
            target, anchor = urldefrag(url)
            path = unquote(urlsplit(target).path).lstrip('/') or 'index.html'
            is_known = unquote(anchor) in anchors.get(path, {unquote(anchor)})
            if not (OUT / path).is_file():
                browser.fault(f'link to {path}, which does not exist')
            elif not is_known and not re.match('L?[0-9]+$', anchor):
                browser.fault(f'link to {path}#{anchor}, but the page has no such anchor')


def check_search(browser):
    """Note if the search finds nothing."""
    browser.open('search.html?q=adapter', DESKTOP)
    browser.page.wait_for_selector('#search-results li', timeout=TIMEOUT)


def check_modes(browser):
    """Note if the buttons for dark and light mode do nothing."""
    browser.open('index.html', DESKTOP)
    for mode in ('dark', 'light'):
        browser.page.locator('.theme-switch-button:visible').first.click()
        browser.page.locator(f'.theme-change-button[data-mode={mode}]:visible').first.click()
        if browser.page.evaluate(MODE) != mode:
            browser.fault(f'the button for {mode} mode does nothing')


def pages_to_show():
    """Pages for screenshots: the index, and those with the most exported code and pictures."""
    texts = {path.stem: path.read_text(encoding='utf8') for path in OUT.glob('[0-9]*.html')}
    with_code = max(texts, key=lambda name: texts[name].count('class="source'))
    with_pictures = max(texts, key=lambda name: texts[name].count('<img'))
    return list(dict.fromkeys(['index', with_code, with_pictures]))


def take_screenshots(browser, folder, names):
    """Save screenshots of whole pages: light, dark, and on a phone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for label, size, mode in VIEWS:
            browser.open(f'{name}.html', size)
            browser.page.evaluate(SET_MODE, mode)
            browser.page.wait_for_timeout(300)
            browser.page.screenshot(path=folder / f'{name}-{label}.png', full_page=True)


def check_site(browser, names):
    """Check all pages, and the links between them."""
    links = {}
    anchors = {}
    for name in names:
        browser.open(name, DESKTOP)
        links[name], anchors[name] = check_contents(browser)
        check_widths(browser)
    check_links(browser, links, anchors)
    check_search(browser)
    check_modes(browser)


def find_chromium():
    """The path of a Chromium or Chrome of this computer, or None."""
    paths = ['/usr/bin/chromium', *map(shutil.which, BROWSERS)]
    return next((path for path in paths if path and Path(path).exists()), None)


def main():
    """Check the site; screenshots are taken if a folder for them is named."""
    if not (OUT / 'index.html').is_file():
        sys.exit(f'there is no {OUT.name}/index.html: run make docs')
    chromium = find_chromium()
    if chromium is None:
        print('the site was not checked: there is no Chromium or Chrome on this computer')
        return
    handler = functools.partial(SilentHandler, directory=OUT)
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    paths = [path.relative_to(OUT) for path in sorted(OUT.rglob('*.html'))]
    names = [path.as_posix() for path in paths if '_static' not in path.parts]
    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        browser = Browser(chrome, f'http://127.0.0.1:{server.server_port}')
        check_site(browser, names)
        if len(sys.argv) > 1:
            take_screenshots(browser, Path(sys.argv[1]), sys.argv[2:] or pages_to_show())
        chrome.close()
    server.shutdown()
    for name, fault in sorted(browser.faults):
        print(f'{name}: {fault}')
    if browser.faults:
        sys.exit(f'the site has {len(browser.faults)} faults')
    print(f'{len(names)} pages were checked in a browser, at desktop and phone width: no faults')


if __name__ == '__main__':
    main()
