"""Look at the built site with a Chromium, where one is installed: is code cut off, can search results be read, who is asked.

`tools/docs.py` calls `look`. A small page loads the site's pages into frames of a desktop's and a phone's width, measures
what a reader would see, and posts it back; no driver or other package is needed. The browser's sandbox is off: many machines
forbid it, and the pages are our own."""
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--remote-debugging-port=0', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync',
         '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']
WIDTHS = (1280, 400)
LEAST_CONTRAST = 4.5  # what WCAG asks of text of this size
HARNESS = """<!doctype html><meta charset="utf-8"><title>measure</title><body><script>
const asked = __ASKED__, found = [];
const wait = ms => new Promise(done => setTimeout(done, ms));
async function frame(page, width) {
  const f = document.createElement('iframe');
  f.style.cssText = `width:${width}px;height:900px;border:0`;
  f.src = '/' + page;
  await new Promise(done => { f.onload = done; document.body.append(f); });
  await wait(50);
  return f;
}
function outside(w) { return w.performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(location.origin) && !n.startsWith('data:')); }
async function measure(page, width) {
  const f = await frame(page, width), w = f.contentWindow, d = f.contentDocument;
  const cut = [...d.querySelectorAll('main pre')].filter(p => p.clientWidth && p.scrollWidth > p.clientWidth + 1).map(p => p.textContent.trim().slice(0, 60));
  found.push({page, width, cut, code: d.querySelectorAll('main pre').length, outside: outside(w), wider: d.documentElement.scrollWidth - w.innerWidth});
  f.remove();
}
async function search(page, scheme, words) {
  localStorage.setItem('smalldocs-scheme', scheme);
  const f = await frame(page, 1280), w = f.contentWindow, d = f.contentDocument;
  const box = d.querySelector('.smalldocs-search input');
  box.value = words;
  box.dispatchEvent(new w.Event('input'));
  for (let i = 0; i < 100 && !d.querySelector('.search-result'); i++) await wait(100);
  const hits = [...d.querySelectorAll('.search-result')];
  const texts = [...d.querySelectorAll('.search-result-title, .search-result-section, .search-result-text')];
  const ground = w.getComputedStyle(d.querySelector('.smalldocs-search-results')).backgroundColor;
  const look = texts.map(t => { const c = document.createElement('canvas').getContext('2d');  // what is seen: the text's colour over its ground
    for (const colour of [ground, w.getComputedStyle(t).color]) { c.fillStyle = colour; c.fillRect(0, 0, 1, 1); }
    return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3); });
  const under = (() => { const c = document.createElement('canvas').getContext('2d'); c.fillStyle = ground; c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3); })();
  found.push({page, scheme, words, hits: hits.slice(0, 8).map(h => h.textContent), look, under, body: w.getComputedStyle(d.body).backgroundColor});
  f.remove();
}
(async () => {
  try {
    localStorage.clear();
    for (const page of asked.pages) for (const width of asked.widths) await measure(page, width);
    for (const words of asked.words) for (const scheme of ['default', 'alternate']) await search(asked.pages[0], scheme, words);
  } catch (e) { found.push({error: String(e)}); }
  await fetch('/__found__', {method: 'POST', body: JSON.stringify(found)});
})();
</script>"""


def browser():
    "The first Chromium on this machine, or None."
    return next((path for path in map(shutil.which, NAMES) if path), None)


def contrast(a, b):
    "How far apart two colours are, from 1 to 21, as WCAG defines it."
    def luminance(rgb):
        linear = [c/12.92 if c <= 0.04045 else ((c + 0.055)/1.055)**2.4 for c in (v/255 for v in rgb)]
        return 0.2126*linear[0] + 0.7152*linear[1] + 0.0722*linear[2]
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05)/(dark + 0.05)


class NoBrowser(Exception):
    "There is no browser, or it does not start here."


def visit(site, asked, timeout=300, start_s=60):
    "Let the browser measure; its list of findings. Raises `NoBrowser` if none asks for the page within `start_s`."
    path = browser()
    if path is None: raise NoBrowser('no Chromium on this machine')
    started, ready, answer = threading.Event(), threading.Event(), []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args): super().__init__(*args, directory=str(site))
        def log_message(self, *args): pass

        def do_GET(self):
            if self.path != '/__measure__': return super().do_GET()
            started.set()
            body = HARNESS.replace('__ASKED__', json.dumps(asked)).encode()
            self.send_response(200)
            self.send_header('Content-Type', 'text/html')
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            answer.append(self.rfile.read(int(self.headers['Content-Length'])))
            self.send_response(204)
            self.end_headers()
            ready.set()

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = f'http://127.0.0.1:{server.server_port}/__measure__'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        cmd = [path, *FLAGS, f'--user-data-dir={profile}', '--window-size=1400,1000', page]
        child = subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            if not started.wait(start_s): raise NoBrowser(f'{path} does not start here')
            if not ready.wait(timeout): raise TimeoutError(f'{path} did not answer within {timeout} s')
        finally:
            try: os.killpg(child.pid, signal.SIGKILL)  # its helpers, too
            except ProcessLookupError: pass
            child.wait()
            server.shutdown()
            server.server_close()
    return json.loads(answer[0])


def look(site, pages, searches):
    "What is wrong with pages as a reader sees them; `searches` says which words have to find which text among the first eight hits."
    problems = []
    for f in visit(site, dict(pages=list(pages), widths=WIDTHS, words=list(searches))):
        if 'error' in f: problems.append(f"the browser's script failed: {f['error']}")
        elif 'width' in f:
            where = f"{f['page']} at {f['width']} px"
            problems += [f'{where}: code is cut off: {text!r}' for text in f['cut']]
            problems += [f'{where} asks another host: {name}' for name in f['outside']]
            if f['wider'] > 1: problems.append(f"{where}: the page is {f['wider']} px wider than the window")
        else:
            where = f"search for {f['words']!r} ({'dark' if f['scheme'] == 'alternate' else 'light'})"
            if not any(searches[f['words']] in hit for hit in f['hits']):
                titles = [re.sub(r'\s+', ' ', hit)[:50] for hit in f['hits']]
                problems.append(f"{where}: no {searches[f['words']]!r} among {titles}")
            poor = [contrast(seen, f['under']) for seen in f['look']]
            if poor and min(poor) < LEAST_CONTRAST: problems.append(f'{where}: a contrast of {min(poor):.1f}, where {LEAST_CONTRAST} is the least')
    return problems
