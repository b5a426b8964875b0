"""Interrupts at random moments, from a terminal, a scheduler, another process and a notebook: a valid checkpoint, and the next start goes on."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fork_run import Count, finished, fork, record, same, train, until, wait
from tiny_run import ENV

from llama_nb.checkpoints import verify_checkpoint
from llama_nb.runs import Run

AT = ('train', 'save_begin', 'checkpoint', 'eval')  # the moments a signal follows


def one_interrupt(tiny, whole, name, g, number, kind):
    "Signal a run just after an event plus a random moment; returns how it ended and how long that took."
    place, trainer = tiny
    folder = place/'runs'/name
    often = dict(eval_steps=2, save_steps=1 if kind in ('save_begin', 'checkpoint') else 100)  # or no save but the one that is asked for
    child = fork(train(trainer, name, **often), place/f'{name}.log')
    counted, k = Count(folder, kind), g.randint(1, 2 if kind == 'eval' else 3)  # of 8 steps: the third evaluation, at step 6, may be over before the pause is
    until(lambda: counted() >= k, child)
    time.sleep(g.random()*0.06)
    asked = time.monotonic()
    os.kill(child, number)
    code, took = wait(child), time.monotonic() - asked
    run = Run(folder)
    assert code == 130, (code, (place/f'{name}.log').read_text()[-1000:])
    assert run.status == 'interrupted' and took < 10, (run.status, took)
    newest = run.checkpoints()[-1]
    assert verify_checkpoint(newest, run.id) == [] and int(newest.name.split('-')[1]) == run.metrics('loss')[-1][0]
    assert not [p.name for p in folder.iterdir() if p.name.startswith('.tmp')]
    same(finished(trainer, name, resume=True, **often), whole)
    shutil.rmtree(folder)
    return took


@pytest.fixture(scope='module')
def evaluated(tiny):
    "The undisturbed run with evaluations between."
    return finished(tiny[1], 'whole-evaluated', eval_steps=2)


def interrupts(tiny, whole, n):
    g, took = random.Random(5), []
    for i in range(n): took.append(one_interrupt(tiny, whole, f'stop-{i}', g, (signal.SIGINT, signal.SIGTERM)[i % 2], AT[i % len(AT)]))
    record('interrupts', trials=n, exit_code_130=n, valid_checkpoint=n, identical_after_resume=n, longest_exit_s=round(max(took), 2))


def test_interrupts(tiny, evaluated): interrupts(tiny, evaluated, 8)


@pytest.mark.slow
def test_interrupts_at_twenty_points(tiny, evaluated): interrupts(tiny, evaluated, 20)


def test_twice_is_now(tiny, undisturbed):
    "The second interrupt does not wait for the step; what was saved stays, and the run goes on from there."
    place, trainer = tiny
    def slow(trainer): trainer.model.get_base_model().lm_head.register_forward_hook(lambda m, args, out: time.sleep(0 if trainer.hf_trainer.state.global_step < 3 else 30))
    child = fork(train(trainer, 'twice', before=slow), place/'twice.log')
    counted = Count(place/'runs'/'twice', 'checkpoint')
    until(lambda: counted() >= 3, child)
    time.sleep(0.3)
    for _ in range(2):
        os.kill(child, signal.SIGINT)
        time.sleep(0.3)
    assert wait(child) == 130
    run = Run(place/'runs'/'twice')
    assert run.status == 'interrupted' and run.latest_valid().name == 'checkpoint-3'
    same(finished(trainer, 'twice', resume=True), undisturbed)
    record('interrupted twice', exit_code_130=True, identical_after_resume=True)


def test_stopped_by_the_command_line(tiny, tmp_path):
    "`llama-nb stop RUN` from another process: it waits for the end and says how to go on; `watch` follows until then."
    folder = tiny[0]/'runs'/'asked'
    child = fork(train(tiny[1], 'asked', max_steps=2000, save_steps=1000))
    counted = Count(folder, 'train')
    until(lambda: counted() >= 2, child)
    watching = subprocess.Popen([sys.executable, '-m', 'llama_nb', 'watch', str(folder)], env=ENV, stdout=subprocess.PIPE, text=True)
    seen = counted()
    until(lambda: counted() >= seen + 3, child)
    done = subprocess.run([sys.executable, '-m', 'llama_nb', 'stop', str(folder), '--json'], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)['status'] == 'interrupted', done.stderr
    assert wait(child) == 130
    assert 'interrupted' in watching.communicate(timeout=60)[0].splitlines()[-1] or watching.returncode == 0
    run = Run(folder)
    assert run.latest_valid().name == f'checkpoint-{run.metrics("loss")[-1][0]}' and not (folder/'STOP').exists()
    record('stopped from another process', exit_code_130=True, valid_checkpoint=True)


def test_two_processes_do_not_share_a_run(tiny, tmp_path):
    "The second is refused in one line while the first goes on undisturbed."
    folder = tiny[0]/'runs'/'shared'
    child = fork(train(tiny[1], 'shared', max_steps=2000, save_steps=1000))
    counted = Count(folder, 'train')
    until(lambda: counted() >= 1, child)
    assert wait(fork(train(tiny[1], 'shared', resume=True, max_steps=2000, save_steps=1000), tmp_path/'log')) == 2
    assert 'is being trained by another process' in (tmp_path/'log').read_text()
    seen = counted()
    assert until(lambda: counted() > seen, child)
    os.kill(child, signal.SIGTERM)
    assert wait(child) == 130
    record('two processes on one run', second_refused=True, first_undisturbed=True)


NOTEBOOK = ['''
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from fork_run import make_trainer, renamed
from llama_nb.runs import Run, watch
place = Path({place!r})
trainer = renamed(make_trainer(place, warm=False, max_steps=40, eval_steps=10), 'cell')
import signal; before = signal.getsignal(signal.SIGINT)
print('ready')
''', 'trainer.train(progress=False)', '''
run = Run(place/'runs'/'cell')
print(run.status, run.latest_valid().name == f"checkpoint-{{run.metrics('loss')[-1][0]}}", signal.getsignal(signal.SIGINT) is before)
''', '''
trainer = renamed(make_trainer(place, warm=False, max_steps=40, eval_steps=10), 'cell')
run = trainer.train(resume=True, progress=False)
whole = renamed(make_trainer(place, warm=False, max_steps=40, eval_steps=10), 'whole-cell').train(progress=False)
same = (run.folder/'adapter_model.safetensors').read_bytes() == (whole.folder/'adapter_model.safetensors').read_bytes()
print(run.status, same, run.metrics('loss') == whole.metrics('loss'))
''', '''
thread = renamed(make_trainer(place, warm=False, max_steps=2000, save_steps=1000), 'background')
run = thread.train(background=True)
print(run.status)
''', 'watch(run.folder)', '''
import time
while len(run.metrics('loss')) < 3: time.sleep(0.05)
print(thread.stop().status, run.latest_valid() is not None, thread.is_training)
''']


def execute(client, code, interrupt=None):
    "Run a cell; `interrupt()` is called once `True` comes from it. Returns its output, and the kind of its error."
    message, text, error = client.execute(code), [], None
    while True:
        try: got = client.get_iopub_msg(timeout=0.1)
        except Exception: got = None
        if interrupt and interrupt(): interrupt = None
        if got is None or got['parent_header'].get('msg_id') != message: continue
        kind, content = got['msg_type'], got['content']
        if kind == 'stream' and content['name'] == 'stdout': text.append(content['text'])
        if kind in ('display_data', 'update_display_data', 'execute_result'): text.append(f"<{kind}> {content['data'].get('text/plain', '')}")
        if kind == 'error': error = content['ename']
        if kind == 'status' and content['execution_state'] == 'idle': return ''.join(text), error


def test_a_real_notebook_kernel(tmp_path):
    "The stop button while a cell trains; the next cell goes on to the run that was never stopped; a run in the background is shown live and stopped."
    manager_module = pytest.importorskip('jupyter_client.manager')
    manager, client = manager_module.start_new_kernel(kernel_name='python3', env={**ENV, 'JUPYTER_PLATFORM_DIRS': '1'})
    cells = [c.format(tests=str(Path(__file__).parent), place=str(tmp_path)) for c in NOTEBOOK]
    try:
        text, error = execute(client, cells[0])
        assert error is None and text.endswith('ready\n'), text
        counted = Count(tmp_path/'runs'/'cell', 'train')
        def press():
            if counted() < 3: return False
            manager.interrupt_kernel()
            return True
        text, error = execute(client, cells[1], press)
        assert error == 'RunInterrupted', (text, error)
        assert execute(client, cells[2]) == ('interrupted True True\n', None)
        assert execute(client, cells[3]) == ('finished True True\n', None)
        assert execute(client, cells[4]) == ('running\n', None)
        text, error = execute(client, cells[5])
        assert error is None and text.startswith('<display_data> background: running'), text
        text, error = execute(client, cells[6])
        assert error is None and text.rstrip().endswith('interrupted True False'), text  # the live view may have written behind the last line before
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    record('notebook kernel', interrupted=True, resumed_identical=True, background_stopped=True)


LIVE = ['''
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from fork_run import make_trainer, renamed
trainer = renamed(make_trainer(Path({place!r}), warm=False, max_steps=6), 'live')
''', 'trainer.train()', 'trainer.run', 'run = renamed(trainer, "quiet").train(progress=False)']


def test_the_live_view_of_a_notebook(tmp_path):
    "A cell that trains says each stage, shows the run in one place until its end, and does not show it twice; the next cell may ask for it again."
    manager_module = pytest.importorskip('jupyter_client.manager')
    seen = {k: v for k, v in ENV.items() if k not in ('CI', 'NO_PROGRESS')}
    manager, client = manager_module.start_new_kernel(kernel_name='python3', env={**seen, 'JUPYTER_PLATFORM_DIRS': '1'})
    cells = [c.format(tests=str(Path(__file__).parent), place=str(tmp_path)) for c in LIVE]
    try:
        assert execute(client, cells[0])[1] is None
        text, error = execute(client, cells[1])
        stages = ['reading ', 'encoding 30 conversations', 'packed into ', 'loading ', 'run: ', 'trying one validation batch and one save', 'training: 6 steps']
        at = [text.find(stage) for stage in stages]
        assert error is None and -1 not in at and at == sorted(at), text
        assert text.count('<display_data> live: running') == 1 and text.count('<update_display_data> live: finished, step 6 of 6') == 1, text
        assert text.rstrip().endswith('<execute_result> Run(live: finished, step 6)'), text
        assert execute(client, cells[2])[0].startswith('<execute_result> live: finished, step 6 of 6')
        text, error = execute(client, cells[3])
        assert error is None and '<display_data>' not in text and 'run: ' in text, text
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
