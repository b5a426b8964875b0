"""Two processes trained from the cells of a real kernel: the live view, the stop button, the background, and the way on from each."""
import os
import time
from pathlib import Path
from queue import Empty

import pytest
from jupyter_client.manager import start_new_kernel
from tiny_run import ENV, make_tiny

from llama_nb.checkpoints import verify_checkpoint
from llama_nb.runs import Run

ROOT = Path(__file__).resolve().parents[1]
SETUP = '''
from dataclasses import replace
from llama_nb.config import DataConfig, EvaluationConfig, LoRAConfig, ModelConfig, TrainingConfig
from llama_nb.train import LLAMATrainer
chats = [[dict(role='user', content='word '*(1 + i % 5)), dict(role='assistant', content='reply '*(1 + i % 3))] for i in range(24)]
def trainer(**training):
    return LLAMATrainer(ModelConfig({model!r}, max_length=128), LoRAConfig(r=4), DataConfig(val_size=.1),
        TrainingConfig({runs!r}, 'cells', num_processes=2, parallel='fsdp', eval_steps=1000, save_steps=1000, **training),
        EvaluationConfig(sample_prompts=1), device={device!r}, data=chats)
one = trainer(max_steps=4000)
'''


class Kernel:
    "A kernel, as the front end of a notebook sees it."
    def __init__(self):
        self.manager, self.client = start_new_kernel(env={k: v for k, v in ENV.items() if k not in ('NO_PROGRESS', 'CI')}, cwd=str(ROOT))

    def start(self, source):
        "Run a cell; its number."
        return self.client.execute(source, store_history=True)

    def messages(self, cell, until=None, timeout_s=240):
        "What a cell sends until it is done, or until a condition on what came so far."
        found, end = [], time.monotonic() + timeout_s
        while time.monotonic() < end:
            try: message = self.client.get_iopub_msg(timeout=1)
            except Empty: continue  # nothing new
            if message['parent_header'].get('msg_id') != cell: continue
            if message['msg_type'] == 'status' and message['content']['execution_state'] == 'idle': return found
            found.append(message)
            if until is not None and until(found): return found
        raise TimeoutError([m['content'] for m in found][-3:])

    def run(self, source):
        "Run a cell to its end; what it printed. A cell that raises fails the test."
        found = self.messages(self.start(source))
        assert not (raised := errors(found)), raised
        return ''.join(m['content']['text'] for m in found if m['msg_type'] == 'stream' and m['content']['name'] == 'stdout')

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def errors(found): return [(m['content']['ename'], m['content']['evalue']) for m in found if m['msg_type'] == 'error']
def views(found): return [m['content']['data'].get('text/html', '') for m in found if m['msg_type'] in ('display_data', 'update_display_data')]
def updated(found): return sum(m['msg_type'] == 'update_display_data' for m in found)
def said(found): return ''.join(m['content']['text'] for m in found if m['msg_type'] == 'stream')


@pytest.fixture
def backend(): return 'gloo'


@pytest.fixture
def kernel():
    k = Kernel()
    yield k
    k.close()


def last_step(run): return run.metrics('loss')[-1][0]


def test_cells_train_two_processes(kernel, tmp_path, backend):
    "Watched, stopped by the button, resumed in the background, stopped by `stop()`, resumed to the end; the base is loaded by one process and held in parts."
    make_tiny(tmp_path/'tiny')
    kernel.run(SETUP.format(model=str(tmp_path/'tiny'), runs=str(tmp_path/'runs'), device='cpu' if backend == 'gloo' else None))
    folder = tmp_path/'runs'/'cells'

    cell = kernel.start('one.train()')
    found = kernel.messages(cell, until=lambda found: updated(found) >= 2 and Run(folder).metrics('loss') or errors(found))
    assert not errors(found), errors(found)
    run = Run(folder)
    assert 'svg' in views(found)[-1] or 'img' in views(found)[-1] or '<table' in views(found)[-1]
    kernel.manager.interrupt_kernel()  # the stop button
    rest = kernel.messages(cell)
    assert [name for name, _ in errors(rest)] == ['RunInterrupted'] and 'Traceback' not in said(rest), errors(rest)
    assert run.status == 'interrupted' and verify_checkpoint(run.latest_valid(), run.id) == []
    first = last_step(run)
    assert run.latest_valid().name == f'checkpoint-{first}' and not (folder/'.launch').exists()
    assert said(found + rest).count('no sample replies') == 1  # told once
    cut = next(e for e in run.events() if e['kind'] == 'shards')
    assert max(cut['bytes']) == cut['planned_bytes'] and sum(cut['bytes']) == cut['whole_bytes']

    assert 'True cells' in kernel.run('run = one.train(resume=True, background=True)\nprint(one.is_training, run.name)')  # the cell is done, the training is not
    end = time.monotonic() + 240
    while last_step(run) < first + 2 and time.monotonic() < end: time.sleep(.1)
    assert 'interrupted False' in kernel.run('print(one.stop().status, one.is_training)')
    second = last_step(run)
    assert second >= first + 2 and run.latest_valid().name == f'checkpoint-{second}'
    assert [step for step, _ in run.metrics('loss')] == list(range(1, second + 1))  # no step twice, none left out

    told = kernel.run(f'two = trainer(max_steps={second + 2}, allow_changes=("training.max_steps",))\n'
                      'run = two.train(resume="{}", progress=False)\nprint(run.status, len(two.chat("word")) > 0)'.format(folder))
    assert 'finished True' in told and last_step(run) == second + 2
