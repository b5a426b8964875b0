"""Runs that are killed or interrupted: nothing is lost, and what is resumed equals what was never stopped."""
import random
import signal
import time

import pytest
from tiny_run import finish, make_tiny, record, start, wait_for, write_config

from llama_nb.checkpoints import verify_checkpoint
from llama_nb.runs import Run

NAMES = ('loss', 'eval_loss', 'grad_norm', 'learning_rate')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('resume')
    make_tiny(folder/'tiny')
    return folder


@pytest.fixture(scope='module')
def whole(place):
    "The run that nobody disturbs."
    code, out = finish('train', '--config', write_config(place/'whole.yaml', place/'tiny', place/'runs', 'whole'))
    assert code == 0, out
    return Run(place/'runs'/'whole')


def same(run, whole):
    "Every logged number and every byte of the adapter."
    for name in NAMES: assert run.metrics(name) == whole.metrics(name), name
    assert (run.folder/'adapter_model.safetensors').read_bytes() == (whole.folder/'adapter_model.safetensors').read_bytes()
    assert run.status == 'finished'


def seen(run_folder, kind, count):
    "Whether the run's diary holds `count` events of a kind."
    def check(): return run_folder.is_dir() and sum(e['kind'] == kind for e in Run(run_folder).events()) >= count
    return check


def test_killed_twice_then_resumed_is_the_same_run(place, whole):
    "kill -9 at a save that has just begun, and in the middle of a resumed run."
    folder, g = place/'runs'/'killed', random.Random(0)
    first = ('train', '--config', write_config(place/'killed.yaml', place/'tiny', place/'runs', 'killed'))
    for kind, count in [('save_begin', 2), ('train', 9)]:
        process = start(*(first if not folder.is_dir() else ('train', '--resume', folder)))
        assert wait_for(process, seen(folder, kind, count)), process.communicate()[0]
        time.sleep(g.random()*0.02)
        process.kill()
        process.wait()
        run = Run(folder)
        assert run.status == 'crashed'
        assert count < 2 or run.latest_valid() is not None  # a checkpoint is valid or not there
    code, out = finish('train', '--resume', folder)
    assert code == 0, out
    same(Run(folder), whole)
    assert not [p.name for p in folder.iterdir() if p.name.startswith(('.tmp', '.trash'))]
    record('killed twice, by the command line', identical=True)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_exits_130(place, whole, number):
    "The step is finished and saved, and the exit code says interrupted; so far it was the undisturbed run."
    name = number.name.lower()
    folder = place/'runs'/name
    process = start('train', '--config', write_config(place/f'{name}.yaml', place/'tiny', place/'runs', name, save_steps=100))
    assert wait_for(process, seen(folder, 'train', 3)), process.communicate()[0]
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    run = Run(folder)
    assert process.returncode == 130, out
    assert run.status == 'interrupted' and 'Traceback' not in out and str(folder.name) in out
    newest = run.checkpoints()[-1]
    assert verify_checkpoint(newest, run.id) == [] and int(newest.name.split('-')[1]) == run.metrics('loss')[-1][0] < 16
    assert run.metrics('loss') == whole.metrics('loss')[:len(run.metrics('loss'))]
    record('interrupted, by the command line', signal=number.name, exit_code=130, valid_checkpoint=True)


def test_changed_settings_are_refused(place, whole):
    "By name, old and new, with the exit code for settings; and the run is left as it was."
    before = (whole.folder/'adapter_model.safetensors').read_bytes()
    code, out = finish('train', '--resume', whole.folder, 'training.learning_rate=0.02')
    assert code == 2 and 'training.learning_rate: 0.01 → 0.02' in out and 'Traceback' not in out, out
    assert (whole.folder/'adapter_model.safetensors').read_bytes() == before and whole.status == 'finished'
