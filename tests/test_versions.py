"""The package path with the oldest, the locked and the newest versions of what it stands on; and that all places say the same about versions.

The slow part makes environments of its own (see tools/versions.py) and needs the package index: `pytest tests/test_versions.py --flags slow`."""
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT/'tools'/'versions.py'
sys.path.insert(0, str(TOOL.parent))
import versions  # noqa: E402


def settings():
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def pythons():
    "The Pythons that setup.py names."
    first, last = re.search(r"for minor in range\((\d+), (\d+)\)", (ROOT/'setup.py').read_text(encoding='utf-8')).groups()
    named = [f'3.{minor}' for minor in range(int(first), int(last))]
    return named[named.index(settings()['min_python']):]


def workflow(name): return yaml.safe_load((ROOT/'.github'/'workflows'/name).read_text(encoding='utf-8'))


@pytest.mark.slow
@pytest.mark.parametrize('kind', versions.SETS)
def test_installed_checked_trained_resumed_evaluated_asked(kind):
    done = subprocess.run([sys.executable, TOOL, kind], capture_output=True, text=True, timeout=3600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    assert done.stdout.count(f'ok   {kind}: ') == 10, done.stdout  # the environment, and nine steps


def test_the_package_knows_what_it_was_tested_with():
    done = subprocess.run([sys.executable, TOOL, 'table', '--check'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = __import__('json').loads(versions.table())
    untested = [name for group in (facts['packages'], *facts['extras'].values()) for name, f in group.items() if 'tested' not in f]
    assert facts['packages']['transformers']['tested'] and set(untested) <= {'psutil', 'fastcore', 'jupyterlab', 'ipykernel'}, f'no pin in constraints.txt: {untested}'


def test_the_pins_lie_within_the_ranges():
    "What `pip install -c constraints.txt .` would find out in a minute."
    from packaging.requirements import Requirement
    pins = dict(re.findall(r'^([\w.-]+)==([\w.]+)', (ROOT/'constraints.txt').read_text(encoding='utf-8'), re.M))
    pins = {name.lower().replace('_', '-'): version for name, version in pins.items()}
    for word in settings()['requirements'].split():
        asked = Requirement(word)
        version = pins.get(asked.name.lower().replace('_', '-'))
        assert version and asked.specifier.contains(version), f'{word}: constraints.txt says {version}'


def test_the_remedy_for_a_missing_package_installs_it():
    "Each `import_extra(module, extra)` names an extra of settings.ini that brings the module, alone or with the requirements."
    import ast
    def names(key): return {re.match(r'[\w.-]+', word)[0].lower().replace('-', '_') for word in settings()[key].split()}
    calls = []
    for path in (ROOT/'llama_nb').glob('*.py'):
        nodes = ast.walk(ast.parse(path.read_text(encoding='utf-8')))
        calls += [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'import_extra' and all(isinstance(a, ast.Constant) for a in n.args)]
    assert len(calls) >= 5
    for module, extra in [map(ast.literal_eval, call.args) for call in calls]:
        brought = names('requirements') | names(f'{extra}_requirements')
        assert module.split('.')[0] in brought, f"import_extra({module!r}, {extra!r}) does not help"


def test_upper_bounds_stand_where_the_contract_looks_inside():
    "A package whose inside we use is held below its next major version; no other is."
    sys.path.insert(0, str(ROOT/'tests'))
    import test_contract
    bounded = {re.match(r'[\w.-]+', word)[0] for word in settings()['requirements'].split() if '<' in word}
    inside = {row.path.split('.')[0] for row in test_contract.TABLE}
    assert bounded == inside - {'huggingface_hub'}, (bounded, inside)  # that one comes with transformers, which bounds it


def test_every_python_we_name_is_installed_by_the_workflow():
    named = pythons()
    assert named[0] == settings()['min_python'] and len(named) >= 3
    assert workflow('test.yaml')['jobs']['install']['strategy']['matrix']['python'] == named
    matrix = workflow('versions.yaml')['jobs']['versions']['strategy']['matrix']['include']
    assert {m['kind'] for m in matrix} == {'oldest', 'newest'} and {m['python'] for m in matrix} <= set(named)


def test_the_versions_workflow_runs_every_week_and_on_demand():
    when = workflow('versions.yaml')[True]  # YAML reads `on` as a truth value
    assert 'workflow_dispatch' in when
    minute, hour, day, month, weekday = when['schedule'][0]['cron'].split()
    assert minute.isdigit() and hour.isdigit() and day == month == '*' and weekday.isdigit()
    script = ' '.join(step.get('run', '') for step in workflow('versions.yaml')['jobs']['versions']['steps'])
    assert 'tools/versions.py ${{ matrix.kind }}' in script
