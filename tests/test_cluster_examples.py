"""The examples for several machines: scripts and YAML are well formed, and our command line accepts the commands in them as a cluster would call them."""
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from llama_nb.cli import app
from llama_nb.launch import Machines

PAGE = Path(__file__).resolve().parents[1]/'nbs'/'docs'/'many_gpus.ipynb'
CLUSTER = dict(SLURM_NNODES='4', SLURM_NODEID='3', SLURM_JOB_NODELIST='gpu[1-4]', MAIN_IP='10.0.0.1', SKYPILOT_NUM_NODES='2', SKYPILOT_NUM_GPUS_PER_NODE='8', SKYPILOT_NODE_RANK='1',
               SKYPILOT_NODE_IPS='10.0.0.1\n10.0.0.2')  # what a scheduler sets on one of the machines


def blocks(language):
    "The code blocks of the page in one language."
    cells = json.loads(PAGE.read_text(encoding='utf-8'))['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    return re.findall(rf'```{language}\n(.*?)```', text, re.S)


def commands(script):
    "The words that `llama-nb train` gets if bash runs a script on such a machine; `srun` and `scontrol` are there."
    tools = '''llama-nb() { printf 'CALL'; printf ' %q' "$@"; echo; }; export -f llama-nb; srun() { "$@"; }; scontrol() { printf 'gpu1\\ngpu2\\n'; }
    torchrun() { :; }
    '''
    done = subprocess.run(['bash', '-euc', tools + script], env={**CLUSTER, 'PATH': '/usr/bin:/bin'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line)[1:] for line in done.stdout.splitlines() if line.startswith('CALL')]


def parsed(words):
    "What our command line makes of a call. Raises for an option that it does not have."
    command = typer.main.get_command(app).commands[words[0]]
    return command.make_context(words[0], list(words[1:])).params


def scripts(): return [b for b in blocks('sh')] + [yaml.safe_load(b)['run'] for b in blocks('yaml')]


def test_every_command_of_the_page_is_accepted():
    found = [c for script in scripts() for c in commands(script) if c[0] == 'train']
    several = [parsed(c) for c in found if '--num-machines' in c]
    assert len(found) >= 5 and len(several) == 4  # two hosts, SLURM, SkyPilot
    for p in several:
        here = Machines(p['num_machines'], p['machine_rank'], p['main_process_ip'], p['main_process_port']).check(p['num_processes'])
        assert here == 8, p
    assert {(p['num_machines'], p['machine_rank'], p['num_processes']) for p in several} == {(2, 0, 16), (2, 1, 16), (4, 3, 32)}
    with pytest.raises(Exception, match='No such option'): parsed(['train', '--num-nodes', '2'])


def test_the_slurm_script():
    script = next(b for b in blocks('sh') if '#SBATCH' in b)
    asked = dict(option.split('=', 1) for line in script.splitlines() if line.startswith('#SBATCH') for option in line.split()[1:])
    assert asked['--ntasks-per-node'] == '1'  # one call per machine, which starts its processes itself
    call, = (parsed(c) for c in commands(script))
    assert int(asked['--nodes'])*int(asked['--gpus-per-node']) == call['num_processes'] and int(asked['--nodes']) == call['num_machines']


def test_bash_reads_every_script():
    for script in scripts():
        done = subprocess.run(['bash', '-n'], input=script, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
    assert subprocess.run(['bash', '-n'], input='if true; then', capture_output=True, text=True).returncode != 0  # it can fail


def test_shellcheck():
    if not (shellcheck := shutil.which('shellcheck')): pytest.skip('shellcheck is not installed')
    def check(script): return subprocess.run([shellcheck, '--shell=bash', '--exclude=SC2016', '-'], input=script, capture_output=True, text=True)  # single quotes are meant
    for script in scripts(): assert (done := check(script)).returncode == 0, done.stdout
    assert 'SC2086' in check('rm $FOLDER').stdout  # it can fail


def test_the_skypilot_task():
    "Fields and types as SkyPilot's documentation has them."
    task, = map(yaml.safe_load, blocks('yaml'))
    assert set(task) <= {'name', 'num_nodes', 'resources', 'workdir', 'setup', 'run', 'envs', 'file_mounts'} and isinstance(task['num_nodes'], int)
    kind, _, count = task['resources']['accelerators'].partition(':')
    call, = (parsed(c) for c in commands(task['run']))
    assert kind == 'A100' and call['num_processes'] == task['num_nodes']*int(count)


READ_BY_SKY = """
import sky, sys
try: task = sky.Task.from_yaml(sys.argv[1])
except Exception as e: print(type(e).__name__, e)
else: print('READ', task.num_nodes, [r.accelerators for r in task.resources])
"""


def test_skypilot_reads_the_task(tmp_path):
    "SkyPilot's own check, of the task as the page has it, and of one with a misspelt field, which it refuses."
    if importlib.util.find_spec('sky') is None: pytest.skip('skypilot is not installed')
    def read(text):
        (tmp_path/'task.yaml').write_text(text)
        done = subprocess.run([sys.executable, '-c', READ_BY_SKY, str(tmp_path/'task.yaml')], cwd=tmp_path, env={**os.environ, 'HOME': str(tmp_path)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()[-1]
    text, = blocks('yaml')
    assert read(text) == "READ 2 [{'A100': 8}]"
    assert 'num_nodes' in (told := read(text.replace('num_nodes', 'num_node'))) and not told.startswith('READ'), told
