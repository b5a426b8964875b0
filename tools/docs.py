"""Build the documentation site in _docs/, without Quarto, and check it.

    python tools/docs.py [--check]

nbdev processes the notebooks, smalldocs renders them with the settings Quarto would use. Formulas become MathML and themes lose
their web fonts, so that no page asks another host for anything. Fails on settings or a sidebar that disagree, a missing page, an
unprocessed `::: {`, a Traceback, a broken link, or a page that loads something from elsewhere. Where a Chromium is installed, it
also measures that no code on the pages users read is cut off. `--check` leaves nothing behind."""
import argparse
import ast
import html as escaping
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import yaml
from execnb.nbio import read_nb, write_nb
from nbdev.config import get_config
from nbdev.processors import FilterDefaults, _show_docs, exec_show_docs

import browser

SEARCHES = {'stop training': 'trainer.stop()', 'out of memory': 'memory'}  # words, and what has to stand among the first hits
COLUMNS = 80  # of code that fit a page; chapters, which explain code, may have more and wrap
NUMBER = re.compile(r'^\d+[a-zA-Z0-9]*_')  # nbdev names the page of 14_model.ipynb model.html
FOOTER = re.compile(r'^(    left: ).*$', re.M)  # the page footer's version
IMPORT = re.compile(r"""@import\s+(?:url\(\s*["']?(?:https?:)?//[^)]*\)|["'](?:https?:)?//[^"']*["'])[^;]*;""")  # a stylesheet's web font
MATH = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
KATEX = re.compile(r'<(?:link|script)\b[^>]*katex[^>]*>(?:</script>)?')
STYLED = re.compile(r'<mi mathvariant="(script|fraktur|double-struck)">([^<]*)</mi>')
LETTERS = {'script': 'SCRIPT', 'fraktur': 'FRAKTUR', 'double-struck': 'DOUBLE-STRUCK'}  # MathML's styles, in Unicode's names
LINK = re.compile(r'\]\((?!\w+:)([^)\s#]*?)([^/)\s#]+\.(?:ipynb|qmd))(#[^)]*)?\)')  # folder, page, anchor


def pages(folder):
    "The sources of the pages, as paths below `folder`."
    found = (p.relative_to(folder) for kind in ('*.ipynb', '*.qmd') for p in folder.rglob(kind))
    return sorted(p for p in found if not any(part[0] in '._' for part in p.parts))


def plain(path): return path.with_name(NUMBER.sub('', path.name))


def listed(entry):
    "Every page a sidebar names."
    if isinstance(entry, str): return [entry]
    if isinstance(entry, list): return [name for e in entry for name in listed(e)]
    return ([entry['href']] if 'href' in entry else []) + listed(entry.get('contents', []))


def nbdev_yml():
    "What nbdev makes of settings.ini for Quarto."
    from nbdev import quarto
    cfg = get_config()
    return quarto._nbdev_yml.format(**{k: cfg[k] for k in ('title', 'description', 'branch', 'git_url', 'doc_host', 'doc_baseurl')},
                                    doc_path=cfg.doc_path.name)


def title_cells(folder):
    "Notebooks whose title cell says more than title and subtitle: nbdev makes front matter of it and drops the rest."
    for path in pages(folder):
        if path.suffix != '.ipynb': continue
        cells = json.loads((folder/path).read_text(encoding='utf-8'))['cells']
        texts = (''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        title = next((t for t in texts if t.startswith('# ')), '')
        if any(line.strip() and not re.match(r'# |> |- \S+: ', line) for line in title.splitlines()):
            yield f'{path.as_posix()}: the title cell says more than title and subtitle, which the site would not show; split it'


def wide_code(folder):
    "Lines of code on users' pages that are longer than a page is wide, by notebook and cell."
    for path in pages(folder):
        if path.suffix != '.ipynb' or not for_users(path): continue
        for i, cell in enumerate(json.loads((folder/path).read_text(encoding='utf-8'))['cells']):
            source = ''.join(cell['source'])
            if cell['cell_type'] == 'code':
                if re.search(r'^#\|\s*(?:hide\b|echo:\s*false|include:\s*false)', source, re.M): continue
                blocks = [without_proofs(source)]
            else: blocks = re.findall(r'^```.*?\n(.*?)^```', source, re.M | re.S)
            for line in '\n'.join(blocks).splitlines():
                if len(line) > COLUMNS: yield f'{path.as_posix()} cell {i}: {len(line)} columns of code, where {COLUMNS} fit a page: {line[:60]}…'


def check_sources():
    "What is wrong with the settings and the sidebar; nothing is built."
    cfg, problems = get_config(), []
    nbs = cfg.nbs_path
    if (nbs/'_quarto.yml').read_text(encoding='utf-8') != (cfg.config_path/'_quarto.yml').read_text(encoding='utf-8'):
        problems.append('nbs/_quarto.yml differs from _quarto.yml, which is the one to edit: run `make docs`')
    settings = (cfg.config_path/'_quarto.yml').read_text(encoding='utf-8')
    if settings != with_version(settings): problems.append('_quarto.yml names another version than settings.ini: run `make docs`')
    if (nbs/'nbdev.yml').read_text(encoding='utf-8') != nbdev_yml():
        problems.append('nbs/nbdev.yml differs from settings.ini: run `make docs`')
    have = {p.as_posix() for p in pages(nbs)}
    named = listed(yaml.safe_load((nbs/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents'])
    problems += [*title_cells(nbs), *wide_code(nbs)]
    problems += [f'nbs/sidebar.yml lacks {n}' for n in sorted(have - set(named))]
    problems += [f'nbs/sidebar.yml names {n}, which is not there' for n in sorted(set(named) - have)]
    problems += [f'nbs/sidebar.yml names {n} twice' for n in sorted({n for n in named if named.count(n) > 1})]
    return problems


def with_version(text):
    "The settings with the package's version in the page footer."
    return FOOTER.sub(rf'\g<1>{get_config().lib_name} {get_config().version}', text)


def write_settings():
    "Copy the one _quarto.yml to where nbdev looks for it; refresh what comes from settings.ini."
    cfg = get_config()
    settings = cfg.config_path/'_quarto.yml'
    settings.write_text(with_version(settings.read_text(encoding='utf-8')), encoding='utf-8')
    shutil.copyfile(cfg.config_path/'_quarto.yml', cfg.nbs_path/'_quarto.yml')
    (cfg.nbs_path/'nbdev.yml').write_text(nbdev_yml(), encoding='utf-8')


def relink(text):
    "Links between notebooks lead to the pages; names that no page shows (private ones, which nbdev links as well) lead nowhere."
    text = LINK.sub(lambda m: f']({m[1]}{NUMBER.sub("", m[2])}{m[3] or ""})', text)
    return re.sub(r'\[(`[^`\]]+`)\]\(' + re.escape(base_url()) + r'[^)#]*#(?:\w+\.)?_[^)]*\)', r'\1', text)


def plain_code(text):
    "nbdev links the names in comments of a signature as well, where a link is but its own text, and starts it with an empty line."
    parts = re.sub(r'```python\n\n+', '```python\n', text).split('```')
    return '```'.join(re.sub(r'\[(`[^`\]]+`)\]\([^)]*\)', r'\1', part) if i % 2 else part for i, part in enumerate(parts))


def base_url(): return get_config().doc_host + get_config().doc_baseurl


class ShowModule(exec_show_docs):
    """Fills `show_doc` cells from the exported module.

    nbdev's own step runs exported cells and every cell with an import again, and stops at one that needs more than these."""
    def begin(self):
        super().begin()
        cells = (c for c in self.nb.cells if c.cell_type == 'code' and c.directives_)
        name = next((c.directives_['default_exp'][0] for c in cells if 'default_exp' in c.directives_), None)
        if name: self.k.user_ns.update(vars(importlib.import_module(f'{get_config().lib_path.name}.{name}')))

    def __call__(self, cell):
        if not self.nb.has_docs_ or cell.cell_type != 'code' or not (tree := cell.parsed_()): return
        imports = not cell.directives_ and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree)
        if not (imports or _show_docs(tree)): return
        self.k.cell(cell)
        if self.k.exc: raise RuntimeError(f'{self.nb.path_}: this cell cannot be shown:\n{cell.source}') from self.k.exc


class Pages(FilterDefaults):
    "What nbdev does to a notebook for its page, with our step for `show_doc`."
    def base_procs(self): return [ShowModule if p is exec_show_docs else p for p in super().base_procs()]


def for_users(path):
    "Whether a page below nbs/ tells a user something, rather than explaining and proving the library."
    return path.parts[0] in ('docs', 'tutorials') or path.name == 'index.ipynb'


def is_proof(node):
    "Whether a statement only asserts: `assert ...` or `test_eq(...)` and its kin."
    if isinstance(node, ast.Assert): return True
    name = node.value.func if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
    return isinstance(name, ast.Name) and name.id.startswith('test_')


def without_proofs(source):
    "A cell's code without the statements that only assert. They run as tests; a reader of a user's page need not see them."
    try: tree = ast.parse(source)
    except SyntaxError: return source
    gone = {line for node in tree.body if is_proof(node) for line in range(node.lineno, node.end_lineno + 1)}
    kept = [line for i, line in enumerate(source.splitlines(), 1) if i not in gone]
    return re.sub(r'\n{3,}', '\n\n', '\n'.join(kept)).strip()


def hide_proofs(nb):
    "Take the proofs out of a user's page; a cell that held nothing else goes as a whole."
    cells = []
    for cell in nb.cells:
        if cell.cell_type == 'code':
            code = without_proofs(''.join(cell.source))
            if not re.sub(r'^#.*$', '', code, flags=re.M).strip() and not cell.get('outputs'): continue
            cell.source = code
        cells.append(cell)
    nb.cells = cells


def stage(folder):
    "Processed notebooks under their page names: nbdev's links expect `model.html`, smalldocs names a page after its file."
    nbs = get_config().nbs_path
    files = (p for p in nbs.rglob('*') if p.is_file() and not any(part[0] == '.' for part in p.relative_to(nbs).parts))
    for source in sorted(files):
        target = folder/plain(source.relative_to(nbs))
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == '.ipynb':
            nb = read_nb(source)
            Pages()(nb)
            if for_users(source.relative_to(nbs)): hide_proofs(nb)
            for cell in nb.cells:
                if cell.cell_type == 'markdown': cell.source = relink(''.join(cell.source))
                for output in cell.get('outputs', []):
                    if 'text/markdown' in output.get('data', {}): output['data']['text/markdown'] = plain_code(''.join(output['data']['text/markdown']))
            write_nb(nb, target)
        elif source.suffix == '.qmd': target.write_text(relink(source.read_text(encoding='utf-8')), encoding='utf-8')
        else: shutil.copyfile(source, target)
    sidebar = (nbs/'sidebar.yml').read_text(encoding='utf-8')
    (folder/'sidebar.yml').write_text(re.sub(r'\d+[a-zA-Z0-9]*_(\w+\.(?:ipynb|qmd))', r'\1', sidebar), encoding='utf-8')


def styled_letters(match):
    "Browsers read no `mathvariant`; Unicode has these letters themselves."
    style, text = match[1], match[2]
    special = {('script', 'L'): '\N{SCRIPT CAPITAL L}', ('double-struck', 'R'): '\N{DOUBLE-STRUCK CAPITAL R}', ('double-struck', 'N'): '\N{DOUBLE-STRUCK CAPITAL N}'}
    def letter(c):
        if (style, c) in special: return special[style, c]
        size = 'CAPITAL' if c.isupper() else 'SMALL'
        return unicodedata.lookup(f'MATHEMATICAL {LETTERS[style]} {size} {c.upper()}') if c.isascii() and c.isalpha() else c
    return f"<mi>{''.join(map(letter, text))}</mi>"


def mathml(html):
    "Formulas as MathML, which browsers draw themselves; the KaTeX that smalldocs would load from another host goes."
    from latex2mathml.converter import convert  # only this step needs it
    def formula(match):
        tex = escaping.unescape(match[2])
        out = convert(tex, display='block' if match[1] == 'display' else 'inline')
        return f'<span class="math {match[1]}">{STYLED.sub(styled_letters, out)}</span>'
    return KATEX.sub('', MATH.sub(formula, html))


def draw_preview(path):
    "The picture that other sites show beside a link: the name, what it is for, and a conversation with its taught tokens marked."
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch
    cfg = get_config()
    fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor='#2780e3')
    ax = fig.add_axes([0, 0, 1, 1], xlim=(0, 1200), ylim=(0, 630))
    ax.axis('off')
    ax.text(80, 470, cfg.title, size=62, weight='bold', color='white')
    ax.text(80, 350, '\n'.join(textwrap.wrap(cfg.description, 44)), size=25, color='white', linespacing=1.5, va='center')
    def strip(y, widths, alpha):
        x = 80
        for width in widths:
            ax.add_patch(FancyBboxPatch((x, y), width, 30, boxstyle='round,pad=0,rounding_size=8', color='white', alpha=alpha, lw=0))
            x += width + 12
    strip(190, (90, 150, 60, 120, 80), .35)   # the question: read
    strip(130, (70, 120, 170, 60, 140, 100, 40), 1)  # the answer: taught
    strip(70, (110, 60, 150), 1)
    fig.savefig(path)
    plt.close(fig)


class Page(HTMLParser):
    "The links of a page and the places in it that can be linked to."
    def __init__(self, html):
        super().__init__()
        self.links, self.anchors, self.loads = [], set(), []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get('id'): self.anchors.add(attrs['id'])
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]
        if tag != 'a': self.loads += [attrs[k] for k in ('href', 'src', 'srcset', 'data', 'poster') if attrs.get(k)]


def broken_links(site):
    "Links to pages, files or anchors of this site that are not there."
    base = base_url()
    parsed = {p: Page(p.read_text(encoding='utf-8')) for p in site.rglob('*.html')}
    for page, found in parsed.items():
        for link in dict.fromkeys(found.links):
            local = link.removeprefix(base).removeprefix('/') if link.startswith(base) else None
            url = urlparse(link if local is None else local)
            if url.scheme or url.netloc: continue
            path = unquote(url.path)
            target = page if not path and local is None else (site if local is not None else page.parent)/path
            if target.is_dir(): target = target/'index.html'
            where = f'{page.relative_to(site).as_posix()}: {link}'
            if not target.exists(): yield f'{where}: no such page'
            elif url.fragment and target.resolve() in parsed and unquote(url.fragment) not in parsed[target.resolve()].anchors:
                yield f'{where}: no such anchor'


def elsewhere(site):
    "What a page or a stylesheet would load from another host: nothing may."
    outside = re.compile(r'(?:https?:)?//(?!www\.w3\.org/)')
    for page in sorted(site.rglob('*.html')):
        for link in dict.fromkeys(Page(page.read_text(encoding='utf-8')).loads):
            if outside.match(link): yield f'{page.relative_to(site).as_posix()} loads {link}'
    for sheet in sorted(site.rglob('*.css')):
        for found in re.finditer(r'(?:@import\s+|url\()["\']?((?:https?:)?//[^"\')]+)', sheet.read_text(encoding='utf-8')):
            yield f'{sheet.relative_to(site).as_posix()} loads {found[1]}'


def check_site(site):
    "What is wrong with the built site."
    problems = []
    for source in pages(get_config().nbs_path):
        page = site/plain(source).with_suffix('.html')
        if not page.exists():
            problems.append(f'{source.as_posix()} gave no page')
            continue
        html = page.read_text(encoding='utf-8')
        problems += [f'{page.name}: {bad!r} in the page' for bad in ('::: {', 'Traceback', '](http', '</a>](') if bad in html]
        for picture in re.findall(rf'content="{re.escape(base_url())}/([^"]+)"', html):
            if not (site/picture).is_file(): problems.append(f'{page.name}: the preview picture {picture} is not there')
    return problems + list(broken_links(site)) + list(elsewhere(site))


def check_look(site):
    "What a browser finds wrong with the pages that users read."
    read = [plain(p).with_suffix('.html').as_posix() for p in pages(get_config().nbs_path) if for_users(p)]
    try: return browser.look(site, sorted(read, key=lambda name: name != 'index.html'), SEARCHES)
    except browser.NoBrowser as e:
        print(f'SKIPPED docs in a browser: {e}')
        return []


def build(folder):
    "Process and render everything; returns the folder of the site, inside `folder`."
    stage(folder)
    draw_preview(folder/'preview.png')
    done = subprocess.run([sys.executable, '-m', 'smalldocs.cli', 'render', str(folder), '--quiet'], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f'smalldocs ended with {done.returncode}\n{done.stdout}{done.stderr}')
    site = folder/get_config().doc_path.name
    for page in site.rglob('*.html'): page.write_text(mathml(page.read_text(encoding='utf-8')), encoding='utf-8')
    for sheet in (site/'site_libs').rglob('*.css'):
        text = sheet.read_text(encoding='utf-8')
        if IMPORT.search(text): sheet.write_text(IMPORT.sub('', text), encoding='utf-8')
    return site


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--check', action='store_true', help='build into a temporary folder and change nothing')
    a = p.parse_args()
    site = get_config().doc_path
    if not a.check: write_settings()
    problems = check_sources()
    if not problems:
        with tempfile.TemporaryDirectory() as tmp:
            built = build(Path(tmp)/'site')
            problems = check_site(built)
            if not problems: problems = check_look(built)
            if not a.check:
                shutil.rmtree(site, ignore_errors=True)
                shutil.move(built, site)
    for problem in problems: print(problem)
    print(f'{len(problems)} problems' if problems else f'{len(pages(get_config().nbs_path))} pages{"" if a.check else f" in {site.name}/"}, no problems')
    sys.exit(bool(problems))


if __name__ == '__main__': main()
