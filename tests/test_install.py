"""A wheel built from this tree, installed where only its declared requirements exist: no extra, no development tool, no checkout."""
import json
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
parser = ConfigParser(delimiters=['='])
parser.read(ROOT/'settings.ini', encoding='utf-8')
SETTINGS = parser['DEFAULT']
EXTRAS = {key.removesuffix('_requirements'): SETTINGS[key].split() for key in SETTINGS if key.endswith('_requirements')}


def run(*command, **kwargs):
    "Run a command; its stdout."
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=180, **kwargs)
    assert done.returncode == 0, f'{command}: {(done.stderr or done.stdout)[-3000:]}'
    return done.stdout


def closure(requirements):
    "Distributions that a plain install brings: the requirements and theirs, without extras that nobody asked for."
    todo, found = [(Requirement(r), '') for r in requirements], {}
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not any(requirement.marker.evaluate({'extra': e}) for e in (extra, '')): continue
        name = canonicalize_name(requirement.name)
        wanted = {'', *requirement.extras}
        if name in found and wanted <= found[name]: continue
        found[name] = found.get(name, set()) | wanted
        try: distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError: continue  # for another platform
        todo += [(Requirement(r), e) for r in distribution.requires or [] for e in wanted]
    return sorted(found)


@pytest.fixture(scope='module')
def house(tmp_path_factory):
    "A virtual environment with the wheel and links to exactly the declared requirements."
    folder = tmp_path_factory.mktemp('install')
    tree = folder/'tree'
    leave = shutil.ignore_patterns('.*', 'runs', 'build', 'dist', '*.egg-info', '__pycache__', '_docs', '_proc', 'nbs', 'tests')
    shutil.copytree(ROOT, tree, ignore=leave)
    run(sys.executable, '-m', 'pip', 'wheel', '-q', '--disable-pip-version-check', '--no-deps', '--no-build-isolation', '--no-index', '-w', folder/'wheels', tree)
    run(sys.executable, '-m', 'venv', '--without-pip', folder/'venv')
    python = folder/'venv'/'bin'/'python'
    site = Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())
    for name in closure(SETTINGS['requirements'].split()):
        try: distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError: continue
        for top in {f.parts[0] for f in distribution.files or []} - {'..', '__pycache__'}:
            target = Path(distribution.locate_file(top))
            if target.exists() and not (site/top).exists(): (site/top).symlink_to(target)
    wheel, = (folder/'wheels').glob('llama_nb-*.whl')
    run(sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check', '--python', python, 'install', '--no-deps', '--no-index', wheel)
    (folder/'elsewhere').mkdir()
    env = {k: v for k,v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME')}
    return folder/'venv'/'bin', dict(cwd=folder/'elsewhere', env={**env, 'PYTHONNOUSERSITE': '1'})


def test_every_public_name_loads_without_any_extra(house):
    bin, there = house
    extras = sorted({canonicalize_name(Requirement(r).name) for name in EXTRAS for r in EXTRAS[name]} - set(closure(SETTINGS['requirements'].split())))
    facts = json.loads(run(bin/'python', '-c', f'''
import importlib.metadata as m, json, sys
from importlib.resources import files
import llama_nb
light = 'torch' not in sys.modules
def there(name):
    try: return bool(m.distribution(name))
    except m.PackageNotFoundError: return False
from llama_nb import *
samples = {{n: sum(1 for line in (files('llama_nb')/'samples'/n).open() if line.strip()) for n in ('dialogues.jsonl', 'instructions.jsonl')}}
print(json.dumps(dict(file=llama_nb.__file__, light=light, version=m.version('llama_nb'), extras=[n for n in {extras!r} if there(n)], names=len(llama_nb.__all__), samples=samples)))''', **there).splitlines()[-1])
    assert facts['file'].startswith(str(bin.parent)) and facts['light']
    assert facts['version'] == SETTINGS['version']
    assert {'tensorboard', 'rensa', 'py3langid', 'nbdev', 'pytest', 'sacrebleu'} <= set(extras) and facts['extras'] == []
    assert facts['names'] > 50
    assert all(count >= 120 for count in facts['samples'].values()), facts['samples']


def test_the_command_is_there(house):
    bin, there = house
    assert 'train' in run(bin/'llama-nb', '--help', **there)
    assert run(bin/'llama-nb', '--version', **there).strip() == SETTINGS['version']
    assert 'demo' in json.loads(run(bin/'llama-nb', 'config', 'presets', '--json', **there))['presets']


def test_the_wheel_offers_every_extra(house):
    bin, there = house
    wanted = {canonicalize_name(Requirement(r).name) for r in SETTINGS['requirements'].split()}
    told = json.loads(run(bin/'python', '-c', 'import importlib.metadata as m, json; d = m.metadata("llama_nb"); print(json.dumps([d.get_all("Provides-Extra"), d.get_all("Requires-Dist")]))', **there))
    requires = [Requirement(r) for r in told[1]]
    assert {canonicalize_name(e) for e in told[0]} == {canonicalize_name(e) for e in EXTRAS} >= {'trackers', 'data', 'dev'}
    assert {canonicalize_name(r.name) for r in requires if r.marker is None} == wanted
    for extra,names in EXTRAS.items():
        offered = {canonicalize_name(r.name) for r in requires if r.marker is not None and r.marker.evaluate({'extra': extra})}
        assert offered == {canonicalize_name(Requirement(r).name) for r in names}, extra
