"""The examples for several machines: scripts and YAML are well formed, and our command line accepts the commands in them as a cluster would call them."""
import json
import re
import shlex
import shutil
import subprocess
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
    if not shutil.which('shellcheck'): return
    # SC2016: the single quotes are meant
    done = subprocess.run(['shellcheck', '--exclude=SC2016', '-'], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_skypilot_task():
    "Fields and types as SkyPilot's documentation has them; its own check runs where it is installed."
    task, = map(yaml.safe_load, blocks('yaml'))
    assert set(task) <= {'name', 'num_nodes', 'resources', 'workdir', 'setup', 'run', 'envs', 'file_mounts'} and isinstance(task['num_nodes'], int)
    kind, _, count = task['resources']['accelerators'].partition(':')
    call, = (parsed(c) for c in commands(task['run']))
    assert kind == 'A100' and call['num_processes'] == task['num_nodes']*int(count)
    try: import sky
    except ImportError: return
    assert sky.Task.from_yaml_config(task).num_nodes == task['num_nodes']
