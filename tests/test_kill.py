"""Processes killed with -9 at random moments, and at every single file operation of a save: nothing is lost."""
import itertools
import os
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

import pytest
from fork_run import Count, finished, fork, record, same, train, until, wait

from llama_nb.checkpoints import checkpoints, clean_leftovers, latest_valid, verify_checkpoint
from llama_nb.safe_trainer import SafeTrainer
from llama_nb.runs import Run

STEPS = 8  # of the tiny runs; a checkpoint after each


def in_a_save(run):
    "Whether a dead process was writing a checkpoint, or removing an old one."
    kinds = [e['kind'] for e in run.events() if e['kind'] in ('save_begin', 'checkpoint')]
    return kinds[-1:] == ['save_begin'] or any(p.name.startswith(('.tmp-', '.trash-')) for p in run.folder.iterdir())


def kill_one(trainer, name, g, at_save, save_s, run_s):
    "Start a run and kill it: at a save that has just begun plus a random moment, or at any moment. Returns the run, and whether it was cut."
    folder = Path(trainer.config.training.output_dir)/name
    child = fork(train(trainer, name))
    started, saves = Count(folder, 'start'), Count(folder, 'save_begin')
    until(lambda: started() >= 1, child)
    if at_save:
        k = g.randint(1, STEPS)
        until(lambda: saves() >= k, child)
        time.sleep(g.random()*save_s/2)
    else: time.sleep(g.random()*run_s)
    os.kill(child, 9)
    return Run(folder), wait(child) == -9


def median_save_s(run):
    "How long a save of this run took."
    began = {}
    for e in run.events():
        if e['kind'] == 'save_begin': began[e['step']] = e['time']
    return statistics.median(e['time'] - began[e['step']] for e in run.events() if e['kind'] == 'checkpoint')


def random_kills(trainer, whole, n, seed, least):
    "Kill n runs and finish each; `least`: the share that has to die inside a save, for the trial to say something."
    save_s = median_save_s(whole)
    times = [e['time'] for e in whole.events() if e['kind'] in ('start', 'finished')]
    g, inside, cut = random.Random(seed), 0, 0
    for i in range(n):
        run, died = kill_one(trainer, f'kill-{seed}-{i}', g, i % 3 < 2, save_s, times[1] - times[0])
        inside, cut = inside + in_a_save(run), cut + died
        for folder in run.checkpoints(): assert verify_checkpoint(folder, run.id) == [], f'{run.name}: {folder.name}'
        told = max((e['step'] for e in run.events() if e['kind'] == 'checkpoint'), default=0)
        found = run.latest_valid()
        assert (int(found.name.split('-')[1]) if found else 0) >= told, f'{run.name}: checkpoint-{told} is lost'
        same(finished(trainer, run.name, resume=True), whole)
        save_s = median_save_s(run)  # the machine may be faster or slower by now
        shutil.rmtree(run.folder)
    record('random kill -9', trials=n, triggered_by_a_save=sum(i % 3 < 2 for i in range(n)), killed=cut, inside_a_save=inside, lost_checkpoints=0, resume_errors=0, identical=n)
    assert inside >= least*n, f'only {inside} of {n} kills fell into a save, {least:.0%} should: this machine was busy, try again when it is idle'


def test_random_kill(tiny, undisturbed):
    "30 kills: no checkpoint lost, no resume refused, every logged number and every byte as if never killed."
    random_kills(tiny[1], undisturbed, 30, seed=1, least=.25)  # the machine may be busy with other tests


@pytest.mark.slow
def test_random_kill_200(tiny, undisturbed): random_kills(tiny[1], undisturbed, 200, seed=2, least=.6)  # on an idle machine


# the calls into the system and into the libraries that write files, by the names of their C functions
FILES = {'mkdir', 'open', 'open_code', 'write', 'close', 'flush', 'fsync', 'rename', 'replace', 'unlink', 'remove', 'rmdir', 'chmod', 'truncate', 'utime', 'scandir',
         '__exit__', 'serialize_file', 'save_file', 'write_record', 'write_end_of_file', 'PyTorchFileWriter'}


def hooked(k, seen=None):
    "A profile hook that ends the process after the k-th file operation."
    count = 0
    def hook(frame, event, function):
        nonlocal count
        if event == 'c_return' and getattr(function, '__name__', '') in FILES:
            count += 1
            if seen is not None: seen.append(function.__name__)
            if count == k: os._exit(9)
    return hook


def every_operation(place, stride, keep):
    "A `_save_checkpoint` that, in step 3, first dies once after each operation in copies of the process and the folder."
    save = SafeTrainer._save_checkpoint
    def tried(self, model, trial=None):
        if self.state.global_step != 3: return save(self, model, trial)
        home = self.run.folder
        for k in itertools.count(1, stride):
            copy = Path(shutil.copytree(home, place/f'crash-{k}'))
            child = os.fork()
            if not child:
                self.run.folder = copy
                sys.setprofile(hooked(k))
                try: save(self, model, trial)
                finally: os._exit(0)
            died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            found = checkpoints(copy)
            bad = [p.name for p in found if verify_checkpoint(p, self.run.id)]
            clean_leftovers(copy)
            after = latest_valid(copy, self.run.id)
            with open(place/'crashes', 'a') as f: f.write(f'{k} {died} {len(found)} {len(bad)} {after.name if after else None}\n')
            if (k - 1) % keep: shutil.rmtree(copy)
            if died == 0: break
        return save(self, model, trial)
    return tried


def crash_in_a_save(place, trainer, whole, stride, keep):
    "One save and one rotation, cut after each `stride`-th operation on a file; every `keep`-th remainder is trained to its end."
    runs = place/'runs'
    for old in [runs/'crashing', *runs.glob('crash-*')]: shutil.rmtree(old, ignore_errors=True)
    (runs/'crashes').unlink(missing_ok=True)
    def patch(_): SafeTrainer._save_checkpoint = every_operation(runs, stride, keep)
    same(finished(trainer, 'crashing', before=patch), whole)
    rows = [line.split() for line in (runs/'crashes').read_text().splitlines()]
    *cut, last = rows
    assert len(cut) > 150/stride and last[1] == '0' and all(died == '9' for _, died, *_ in cut)
    assert all(int(found) >= 2 and bad == '0' for _, _, found, bad, _ in rows), rows
    assert {after for *_, after in cut} == {'checkpoint-2', 'checkpoint-3'}
    resumed = [k for k, *_ in cut if (int(k) - 1) % keep == 0]
    for k in resumed: same(finished(trainer, f'crash-{k}', resume=True), whole)
    record('crash at a file operation', every=stride, operations=len(cut), fewest_valid=min(int(r[2]) for r in rows), resumed=len(resumed), identical=len(resumed))


def test_crash_at_file_operations(tiny, undisturbed):
    "Every fifth operation of a real save; the chapter on checkpoints tries each operation of a plain one."
    crash_in_a_save(*tiny, undisturbed, stride=5, keep=150)


@pytest.mark.slow
def test_crash_at_every_file_operation(tiny, undisturbed): crash_in_a_save(*tiny, undisturbed, stride=1, keep=40)
