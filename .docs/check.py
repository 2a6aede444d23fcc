"""Reads the built site as a browser does: `python .docs/check.py [folder for screenshots]`.

Every page is opened in headless Chromium at desktop and at phone width. What a reader would stumble over is listed, and makes the check fail:
links and anchors that lead nowhere, pictures that are missing or not described, errors in the console, requests to another host, formulas that
were not set, pages wider than a phone, a search without results, a button for dark mode that does nothing."""
import functools, re, shutil, sys, threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from nbdev.config import get_config

config = get_config()
OUT = Path(config.config_path)/config.doc_path.name
CHROMIUM = next((p for p in ('/usr/bin/chromium', *map(shutil.which, ('chromium', 'google-chrome', 'chrome'))) if p and Path(p).exists()), None)
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-dev-shm-usage']
DESKTOP, PHONE = dict(width=1280, height=900), dict(width=390, height=844)
LOOKED_AT = ('index', '06_finetune', '10_evaluate')

SEEN = '''() => ({
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    anchors: [...document.querySelectorAll('[id]')].map(e => e.id),
    missing: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
    silent: [...document.images].filter(i => !(i.alt || '').trim()).map(i => i.src),
    formulas: [...document.querySelectorAll('.math.notranslate')].filter(m => !m.querySelector('.MathJax, .MathJax_Display, mjx-container')).length})'''
WIDER = '''() => {
    const wide = document.scrollingElement.scrollWidth - window.innerWidth;
    if (wide <= 0) return null;
    const out = e => e.getBoundingClientRect().right > window.innerWidth + 1 && getComputedStyle(e).position !== 'fixed';
    const first = [...document.querySelectorAll('main *, header *, footer *')].filter(out).pop();
    return `${wide} pixels, by ${first ? first.tagName + '.' + first.className : 'an element'}`; }'''
SET = '() => typeof MathJax === "undefined" || !document.querySelector(".math") || MathJax.Hub && MathJax.Hub.queue.pending === 0 && MathJax.isReady'


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


class Watch:
    "A browser page that notes what goes wrong while it is used."
    def __init__(self, browser, home):
        self.page, self.home, self.faults, self.where = browser.new_page(), home, [], ''
        self.page.route('**/*', self._request)
        self.page.on('console', lambda m: m.type == 'error' and self.fault(f'console: {m.text[:160]}'))
        self.page.on('pageerror', lambda e: self.fault(f'script: {str(e)[:160]}'))
        self.page.on('response', lambda r: r.status >= 400 and self.fault(f'{r.status} for {r.url}'))

    def fault(self, what):
        if (self.where, what) not in self.faults: self.faults.append((self.where, what))

    def _request(self, route):
        if route.request.url.startswith((self.home, 'data:', 'blob:')): return route.continue_()
        self.fault(f'asks another host: {route.request.url}')
        route.abort()

    def open(self, name, size):
        self.where = name
        self.page.set_viewport_size(size)
        self.page.goto(f'{self.home}/{name}', wait_until='load')


def read(watch, name):
    "Open a page at both widths; returns its links and its anchors."
    page = watch.page
    watch.open(name, DESKTOP)
    page.wait_for_function(SET, timeout=30_000)
    for image in page.locator('img[loading=lazy]').all(): image.scroll_into_view_if_needed()
    seen = page.evaluate(SEEN)
    for src in seen['missing']: watch.fault(f'missing picture {src}')
    for src in seen['silent']: watch.fault(f'picture without a description {src}')
    if seen['formulas']: watch.fault(f"{seen['formulas']} formulas were not set")
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(50)
    if wide := page.evaluate(WIDER): watch.fault(f'wider than a phone: {wide}')
    return seen['links'], {*seen['anchors'], '', 'top'}


def follow(watch, links, anchors):
    "Note the links that lead to no page, file or anchor of the site; those to other hosts are not followed."
    for name, urls in links.items():
        watch.where = name
        for url in sorted(set(urls)):
            if not url.startswith(watch.home): continue
            target, anchor = urldefrag(url)
            path = unquote(urlsplit(target).path).lstrip('/') or 'index.html'
            if not (OUT/path).is_file(): watch.fault(f'link to {path}, which is not there')
            elif path in anchors and unquote(anchor) not in anchors[path] and not re.match('L?[0-9]+$', anchor): watch.fault(f'link to {path}#{anchor}, which has no such place')


def use(watch):
    "Search for a word, and turn the lights out."
    page = watch.page
    watch.open('search.html?q=adapter', DESKTOP)
    page.wait_for_selector('#search-results li', timeout=30_000)
    watch.open('index.html', DESKTOP)
    for mode in ('dark', 'light'):
        page.locator('.theme-switch-button:visible').first.click()
        page.locator(f'.theme-change-button[data-mode={mode}]:visible').first.click()
        if page.evaluate('document.documentElement.dataset.theme') != mode: watch.fault(f'the button for {mode} mode does nothing')


def look(watch, folder):
    "Screenshots of some pages, whole: light, dark, and on a phone."
    folder.mkdir(parents=True, exist_ok=True)
    for name in LOOKED_AT:
        for label, size, mode in (('light', DESKTOP, 'light'), ('dark', DESKTOP, 'dark'), ('phone', PHONE, 'light')):
            watch.open(f'{name}.html', size)
            watch.page.wait_for_function(SET, timeout=30_000)
            watch.page.evaluate(f"document.documentElement.dataset.theme = document.documentElement.dataset.mode = '{mode}'")
            watch.page.wait_for_timeout(300)
            watch.page.screenshot(path=folder/f'{name}-{label}.png', full_page=True)


def main():
    if not (OUT/'index.html').is_file(): sys.exit(f'there is no {OUT.name}/index.html: run make docs')
    if CHROMIUM is None: return print('not read in a browser: there is no Chromium here')
    from playwright.sync_api import sync_playwright
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=OUT))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = sorted(p.relative_to(OUT).as_posix() for p in OUT.rglob('*.html') if '_static' not in p.parts)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        watch, links, anchors = Watch(browser, f'http://127.0.0.1:{server.server_port}'), {}, {}
        for name in names: links[name], anchors[name] = read(watch, name)
        follow(watch, links, anchors)
        use(watch)
        if len(sys.argv) > 1: look(watch, Path(sys.argv[1]))
        browser.close()
    server.shutdown()
    for name, fault in sorted(set(watch.faults)): print(f'{name}: {fault}')
    if watch.faults: sys.exit(f'{len(set(watch.faults))} faults in the site')
    print(f'{len(names)} pages read in a browser, on a desk and on a phone: nothing amiss')


if __name__ == '__main__': main()
