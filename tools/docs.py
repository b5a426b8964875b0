"""Build the documentation site in _docs/, without Quarto, and check it.

    python tools/docs.py [--check]

nbdev processes the notebooks, smalldocs renders them with the settings Quarto would use. Fails on settings or a sidebar that
disagree, a missing page, an unprocessed `::: {`, a Traceback, or a broken link. `--check` leaves nothing behind."""
import argparse
import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import yaml
from execnb.nbio import read_nb, write_nb
from nbdev.config import get_config
from nbdev.processors import FilterDefaults, _show_docs, exec_show_docs

NUMBER = re.compile(r'^\d+[a-zA-Z0-9]*_')  # nbdev names the page of 06_model.ipynb model.html
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


def check_sources():
    "What is wrong with the settings and the sidebar; nothing is built."
    cfg, problems = get_config(), []
    nbs = cfg.nbs_path
    if (nbs/'_quarto.yml').read_text(encoding='utf-8') != (cfg.config_path/'_quarto.yml').read_text(encoding='utf-8'):
        problems.append('nbs/_quarto.yml differs from _quarto.yml, which is the one to edit: run `make docs`')
    if (nbs/'nbdev.yml').read_text(encoding='utf-8') != nbdev_yml():
        problems.append('nbs/nbdev.yml differs from settings.ini: run `make docs`')
    have = {p.as_posix() for p in pages(nbs)}
    named = listed(yaml.safe_load((nbs/'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents'])
    problems += title_cells(nbs)
    problems += [f'nbs/sidebar.yml lacks {n}' for n in sorted(have - set(named))]
    problems += [f'nbs/sidebar.yml names {n}, which is not there' for n in sorted(set(named) - have)]
    problems += [f'nbs/sidebar.yml names {n} twice' for n in sorted({n for n in named if named.count(n) > 1})]
    return problems


def write_settings():
    "Copy the one _quarto.yml to where nbdev looks for it; refresh what comes from settings.ini."
    cfg = get_config()
    shutil.copyfile(cfg.config_path/'_quarto.yml', cfg.nbs_path/'_quarto.yml')
    (cfg.nbs_path/'nbdev.yml').write_text(nbdev_yml(), encoding='utf-8')


def relink(text):
    "Links between notebooks lead to the pages; names that no page shows (private ones, which nbdev links as well) lead nowhere."
    text = LINK.sub(lambda m: f']({m[1]}{NUMBER.sub("", m[2])}{m[3] or ""})', text)
    return re.sub(r'\[(`[^`\]]+`)\]\(' + re.escape(base_url()) + r'[^)#]*#(?:\w+\.)?_[^)]*\)', r'\1', text)


def plain_code(text):
    "nbdev links the names in comments of a signature as well, where a link is but its own text."
    parts = text.split('```')
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
        if self.k.exc: raise RuntimeError(f'{self.nb.path_}: this cell can not be shown:\n{cell.source}') from self.k.exc


class Pages(FilterDefaults):
    "What nbdev does to a notebook for its page, with our step for `show_doc`."
    def base_procs(self): return [ShowModule if p is exec_show_docs else p for p in super().base_procs()]


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
            for cell in nb.cells:
                if cell.cell_type == 'markdown': cell.source = relink(''.join(cell.source))
                for output in cell.get('outputs', []):
                    if 'text/markdown' in output.get('data', {}): output['data']['text/markdown'] = plain_code(''.join(output['data']['text/markdown']))
            write_nb(nb, target)
        elif source.suffix == '.qmd': target.write_text(relink(source.read_text(encoding='utf-8')), encoding='utf-8')
        else: shutil.copyfile(source, target)
    sidebar = (nbs/'sidebar.yml').read_text(encoding='utf-8')
    (folder/'sidebar.yml').write_text(re.sub(r'\d+[a-zA-Z0-9]*_(\w+\.(?:ipynb|qmd))', r'\1', sidebar), encoding='utf-8')


class Page(HTMLParser):
    "The links of a page and the places in it that can be linked to."
    def __init__(self, html):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get('id'): self.anchors.add(attrs['id'])
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]


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
    return problems + list(broken_links(site))


def build(folder):
    "Process and render everything; returns the folder of the site, inside `folder`."
    stage(folder)
    done = subprocess.run([sys.executable, '-m', 'smalldocs.cli', 'render', str(folder), '--quiet'], capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f'smalldocs ended with {done.returncode}\n{done.stdout}{done.stderr}')
    return folder/get_config().doc_path.name


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
            if not a.check:
                shutil.rmtree(site, ignore_errors=True)
                shutil.move(built, site)
    for problem in problems: print(problem)
    print(f'{len(problems)} problems' if problems else f'{len(pages(get_config().nbs_path))} pages{"" if a.check else f" in {site.name}/"}, no problems')
    sys.exit(bool(problems))


if __name__ == '__main__': main()
