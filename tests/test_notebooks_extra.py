"""`pip install '.[notebooks]'` is enough to open and run the notebooks: what they import, and two of them in a real kernel of a new environment."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_install import EXTRAS, ROOT, SETTINGS, closure

PINS = {canonicalize_name(name): pin for name, pin in re.findall(r'^([\w.-]+)==(\S+)', (ROOT/'constraints.txt').read_text(encoding='utf-8'), re.M)}
OURS = {'llama_nb', 'bench', *sys.stdlib_module_names}
EVERYBODY = SETTINGS['requirements'].split()
RUN = ('nbs/tutorials/01_quick.ipynb', 'nbs/docs/guide.ipynb')


def notebooks():
    "Every notebook, as path and parsed code cells; lines for IPython and the shell aside."
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        cells = (''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code')
        for source in cells:
            if source.startswith('%%'): continue
            yield path.relative_to(ROOT).as_posix(), ast.parse('\n'.join(line for line in source.splitlines() if line[:1] not in '%!'))


def may_be_missing(node):
    "Whether a `try` goes on without what it imports."
    caught = [ast.unparse(h.type) if h.type else 'ImportError' for h in node.handlers]
    return any('ImportError' in c or 'ModuleNotFoundError' in c for c in caught)


def needed(node):
    "Modules without which a cell stops: not those that a function imports when it is called, nor those that may be missing."
    if isinstance(node, ast.Import): yield from (a.name for a in node.names)
    elif isinstance(node, ast.ImportFrom): yield from [node.module] if not node.level else []
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)): return
    else:
        skipped = node.body if isinstance(node, ast.Try) and may_be_missing(node) else []
        for child in ast.iter_child_nodes(node):
            if child not in skipped: yield from needed(child)


def lacking(requirements):
    "Imports of the notebooks that these requirements do not bring: distribution or module → notebooks."
    brought, homes, missing = set(closure(requirements)), metadata.packages_distributions(), {}
    for path, tree in notebooks():
        for top in {module.split('.')[0] for module in needed(tree)} - OURS:
            names = [canonicalize_name(n) for n in homes.get(top, [])] or [top]
            if not brought & set(names): missing.setdefault(names[0], set()).add(path)
    return missing


def test_the_extra_brings_what_every_notebook_imports():
    assert lacking([*EVERYBODY, *EXTRAS['notebooks']]) == {}
    without = lacking(EVERYBODY)  # what a plain install lacks; else this test would see nothing
    assert len(without['fastcore']) > 40 and RUN[0] in without['fastcore'] and RUN[1] in without['fastcore']


def test_the_extra_opens_notebooks_and_its_packages_are_pinned():
    names = {canonicalize_name(Requirement(r).name) for r in EXTRAS['notebooks']}
    assert {'fastcore', 'jupyterlab', 'ipykernel'} <= names <= PINS.keys()
    assert all(Requirement(r).specifier.contains(PINS[canonicalize_name(Requirement(r).name)]) for r in EXTRAS['notebooks'])
    ranges = {extra: {canonicalize_name(Requirement(r).name): Requirement(r).specifier for r in EXTRAS[extra]} for extra in ('dev', 'notebooks')}
    assert all(ranges['dev'].get(name, range) == range for name, range in ranges['notebooks'].items())  # where both name a package, they name one range


@pytest.mark.parametrize('page', ['README.md', 'nbs/docs/setup.ipynb'])
def test_pages_say_how_to_open_a_notebook(page):
    text = (ROOT/page).read_text(encoding='utf-8')
    assert "pip install -c constraints.txt '.[notebooks]'" in text and f'jupyter lab {RUN[0]}' in text and 'JupyterLab' in text


def command(*args, minutes=15, **kwargs):
    "Run a command; its stdout."
    done = subprocess.run(list(map(str, args)), capture_output=True, text=True, timeout=60*minutes, **kwargs)
    assert done.returncode == 0, f'{args}: {(done.stderr or done.stdout)[-3000:]}'
    return done.stdout


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "A new environment with the package and the extra, from the pins; and the notebooks, with no checkout beside them."
    folder = tmp_path_factory.mktemp('notebooks')
    python, wheel = folder/'venv'/'bin'/'python', f"fastcore=={PINS['fastcore']}"
    command(sys.executable, '-m', 'venv', folder/'venv')
    tried = subprocess.run([python, '-m', 'pip', 'download', '-q', '--no-deps', '--dest', folder/'wheels', wheel], capture_output=True, text=True)
    if tried.returncode: pytest.skip(f'pip cannot download {wheel} here')
    tree = folder/'tree'
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns('.*', 'runs', 'build', 'dist', '*.egg-info', '__pycache__', '_docs', '_proc', 'tests'))
    shutil.copytree(tree/'nbs', folder/'elsewhere'/'nbs')
    install = [python, '-m', 'pip', 'install', '-q', '--disable-pip-version-check']
    command(*install, f"torch=={PINS['torch']}", minutes=30)
    command(*install, '-c', 'constraints.txt', '.[notebooks]', minutes=30, cwd=tree)
    shutil.rmtree(tree)
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME', 'MPLBACKEND', 'IN_TEST') and not k.startswith('JUPYTER')}
    return python, folder/'elsewhere', {**env, 'PATH': f"{python.parent}{os.pathsep}{env['PATH']}", 'PYTHONNOUSERSITE': '1', 'HF_HUB_OFFLINE': '1'}


@pytest.mark.slow
def test_the_pins_name_every_package_that_arrives(installed):
    python, there, env = installed
    frozen = dict(line.split('==') for line in command(python, '-m', 'pip', 'freeze', env=env).splitlines() if '==' in line)
    loose = {name: have for name, have in frozen.items() if have.split('+')[0] != PINS.get(canonicalize_name(name)) and not re.match('nvidia|triton|cuda', name)}
    assert frozen and loose == {}
    command(python, '-m', 'pip', 'check', env=env)


@pytest.mark.slow
@pytest.mark.parametrize('page', RUN)
def test_the_notebook_runs_in_a_kernel_of_its_own(installed, page):
    python, there, env = installed
    where = json.loads(command(python, '-c', 'import json, llama_nb; print(json.dumps(llama_nb.__file__))', env=env, cwd=there))
    assert Path(where).is_relative_to(python.parents[1])  # the installed package, not a checkout
    path = there/page
    command(python.parent/'jupyter', 'execute', '--timeout=900', '--inplace', path, env=env, cwd=there, minutes=30)
    cells = [c for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    assert all(c['execution_count'] for c in cells if ''.join(c['source']).strip())  # every cell ran
    assert not [o for c in cells for o in c['outputs'] if o['output_type'] == 'error']
