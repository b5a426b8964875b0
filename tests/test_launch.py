"""Runs started by `num_processes=2` and by `--num-processes 2`: data in memory, errors, interrupts, killed launchers; nothing is left behind."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from unittest.mock import patch

import psutil
import pytest
from tiny_run import ENV, finish, make_tiny, record, start, wait_for, write_config

from llama_nb.checkpoints import verify_checkpoint
from llama_nb.runs import Run


@pytest.fixture(scope='module', autouse=True)
def backend():
    "The CPU, also where there are GPUs: `test_nccl` runs the same tests on those."
    with patch.dict(ENV, CUDA_VISIBLE_DEVICES=''): yield 'gloo'


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('launch')
    make_tiny(folder/'tiny')
    return folder


def config(place, name, **training):
    "A run on two processes that is long enough to be disturbed."
    return write_config(place/f'{name}.yaml', place/'tiny', place/'runs', name, **dict(num_processes=2, max_steps=6, save_steps=1, eval_steps=100) | training)


def events(folder, kind): return sum(e['kind'] == kind for e in Run(folder).events()) if folder.is_dir() else 0


def workers(folder):
    "Processes of a launch: agent and ranks name its folder."
    def is_of_it(line): return 'llama_nb.worker' in line and any(str(folder) in part for part in line)
    return [p for p in psutil.process_iter(['cmdline']) if is_of_it(p.info['cmdline'] or []) and is_there(p)]


def is_there(process):
    "Until it is gone or a zombie: a process that is ending has no command line any more, but it is still there."
    try: return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return False


def all_gone(folder, within_s, seen=()):
    "Seconds until no process of the launch is left, those `seen` before included."
    since = time.monotonic()
    while time.monotonic() - since < within_s:
        if not workers(folder) and not any(map(is_there, seen)): return time.monotonic() - since
        time.sleep(0.1)
    raise AssertionError(f'after {within_s} s there are still {workers(folder)} {[p for p in seen if is_there(p)]}')


IN_MEMORY = '''
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from fork_run import make_trainer
from llama_nb.errors import LlamaNbError, exit_code
place = Path({place!r})
chats = [dict(messages=[dict(role='user', content='word '*(1 + i % 5)), dict(role='assistant', content='reply '*(1 + i % 3))]) for i in range(24)]
def trainer(name, n, **more):
    from llama_nb.config import DataConfig, LoRAConfig, ModelConfig, TrainingConfig
    from llama_nb.train import LLAMATrainer
    return LLAMATrainer(ModelConfig(place/'tiny', use_4bit=False, max_length=128, bnb_4bit_compute_dtype='float32'), LoRAConfig(r=4), DataConfig(val_size=.1),
        TrainingConfig(str(place/'runs'), name, learning_rate=.01, max_steps=4, gradient_accumulation_steps=4//n, packing=False, per_device_train_batch_size=1,
                       compute='fp32', num_processes=n, eval_steps=2), device={device!r}, data=chats, **more)
two = trainer('memory-2', 2)
run = two.train(progress=False)
one = trainer('memory-1', 1)
single = one.train(progress=False)
gap = lambda a, b: max(abs(x - y) for (_, x), (_, y) in zip(a, b))
from safetensors.torch import load_file
saved = load_file(run.folder/'adapter_model.safetensors')
mine = dict((n.replace('.default', ''), p) for n, p in two.model.named_parameters())  # of this process: it has the trained adapter
print(run.status, gap(run.metrics('loss'), single.metrics('loss')) < 1e-5, gap(run.metrics('eval_loss'), single.metrics('eval_loss')) < 1e-5,
      all(bool((mine[k] == saved[k]).all()) for k in saved) and len(saved) > 8,
      sorted(p.name for p in run.folder.iterdir()) == sorted(p.name for p in single.folder.iterdir()), (run.folder/'.launch').exists())
chats[3]['messages'][1]['content'] = 'word '*4000
try: trainer('too-long', 2).train(progress=False)
except LlamaNbError as e: print(type(e).__name__, exit_code(e), (place/'runs'/'too-long').exists(), str(e).splitlines()[0])
'''


def test_data_in_memory_and_an_error_of_a_rank(place, backend):
    "The objects of a cell reach the ranks; the parent's model is the trained one; an error keeps its class and leaves no folder."
    code = IN_MEMORY.format(tests=os.path.dirname(__file__), place=str(place), device='cpu' if backend == 'gloo' else None)
    done = subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.strip().splitlines()[-2:]
    assert first == 'finished True True True True False', first
    assert second.startswith('DataError 4 False ') and '4' in second and 'Traceback' not in second, second
    record('data in memory on two processes', equal_to_one_process=True)


def test_kill_9_of_the_launcher_leaves_nobody(place):
    "By the command line; the checkpoint is valid, and the run goes on from it, on two processes as before."
    folder = place/'runs'/'orphans'
    process = start('train', '--config', config(place, 'orphans', max_steps=400))
    assert wait_for(process, lambda: events(folder, 'checkpoint') >= 2, timeout=420), process.communicate()[0]
    assert len(seen := workers(folder)) == 3
    process.kill()
    process.wait()
    took = all_gone(folder, 10, seen)
    run = Run(folder)
    assert run.status == 'crashed' and verify_checkpoint(run.latest_valid(), run.id) == []
    record('kill -9 of the launcher', seconds_until_nobody_is_left=round(took, 1))


@pytest.mark.parametrize('how', ['every process', 'the second launcher'])
def test_a_scheduler_asks_two_machines(place, how):
    "SIGTERM as SLURM sends it, twice to every process, or to the launcher of the machine without the run: all ranks save one step and end."
    name = 'asked-' + how.replace(' ', '-')
    folder, settings = place/'runs'/name, config(place, name, save_steps=10**6, max_steps=10**5)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    with patch.dict(ENV, GLOO_SOCKET_IFNAME='lo'):
        launchers = [start('train', '--config', settings, '--num-machines', 2, '--machine-rank', i, '--main-process-ip', '127.0.0.1', '--main-process-port', port)
                     for i in range(2)]
    assert wait_for(launchers[0], lambda: events(folder, 'train') >= 3, timeout=420), [p.communicate()[0] for p in launchers]
    trees = [psutil.Process(p.pid) for p in launchers]
    seen = [child for tree in trees for child in tree.children(recursive=True)]
    asked = [*trees, *seen]*2 if how == 'every process' else trees[1:]
    for process in asked:
        if is_there(process): process.send_signal(signal.SIGTERM)
    said = [p.communicate(timeout=90)[0] for p in launchers]
    assert [p.returncode for p in launchers] == [130, 130] and 'Traceback' not in ''.join(said), said
    run = Run(folder)
    assert run.status == 'interrupted' and run.latest_valid().name == f"checkpoint-{run.metrics('loss')[-1][0]}", run.events()[-3:]
    assert not (folder/'STOP').exists()
    all_gone(folder, 10, seen)
    record('a scheduler asks two machines', how=how, exit_code_130=True, checkpoints=events(folder, 'checkpoint'))


@pytest.mark.slow
def test_interrupt_saves_once(place):
    "SIGINT to the command: both ranks end after the step, one checkpoint of it, exit code 130; resumed, it ends."
    folder = place/'runs'/'asked'
    process = start('train', '--config', config(place, 'asked', save_steps=100, max_steps=400))
    assert wait_for(process, lambda: events(folder, 'train') >= 3, timeout=420), process.communicate()[0]
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in out and 'resume with: llama-nb train --resume' in out, out
    run = Run(folder)
    assert run.status == 'interrupted' and events(folder, 'checkpoint') == 1 and not workers(folder)
    step = int(run.latest_valid().name.split('-')[1])
    assert step == run.metrics('loss')[-1][0] and not (folder/'STOP').exists() and not (folder/'.launch').exists()
    code, out = finish('train', '--resume', folder, '--json', f'training.max_steps={step + 2}', 'training.allow_changes=[training.max_steps]')
    assert code == 0 and json.loads(out.strip().splitlines()[-1])['status'] == 'finished', out
    record('interrupt of two processes', exit_code_130=True, checkpoints=1)


@pytest.mark.slow
def test_a_killed_rank_and_a_killed_agent(place):
    "kill -9 of a rank: one line that names it, within 30 s. kill -9 of the agent: the ranks end too."
    for victim in ('rank', 'agent'):
        folder = place/'runs'/f'lost-{victim}'
        process = start('train', '--config', config(place, f'lost-{victim}', max_steps=400))
        assert wait_for(process, lambda: events(folder, 'checkpoint') >= 1, timeout=420), process.communicate()[0]
        seen = workers(folder)
        found = next(p for p in seen if victim in p.cmdline())
        found.kill()
        out, _ = process.communicate(timeout=30)
        assert process.returncode == 1 and 'was killed by SIGKILL' in out and 'Traceback' not in out, out
        all_gone(folder, 10, seen)
        assert Run(folder).latest_valid() is not None
