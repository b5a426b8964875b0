"""Mirrored runs: killed while they upload, on stores that lie, and continued on another disk. What was counted is never lost."""
import os
import random
import shutil
import time
from pathlib import Path

import fsspec
import pytest
from fork_run import Count, finished, fork, record, same, train, until, wait
from fsspec.implementations.local import LocalFileSystem
from tiny_run import finish, make_tiny, write_config

from llama_nb.errors import CheckpointError, ConfigError
from llama_nb.mirror import Mirror, fetch_run, find_copies, is_whole, open_store
from llama_nb.runs import Run


class SlowFile:
    "A file that takes its time for each write, so that a kill finds it half written."
    def __init__(self, file): self.file = file
    def write(self, block):
        time.sleep(.01)
        done = self.file.write(block)
        self.file.flush()
        return done
    def __enter__(self): return self
    def __exit__(self, *args): self.file.close()


class Slow(LocalFileSystem):
    "Another disk that is slow."
    protocol = ('slow',)
    def open(self, path, mode='rb', **kwargs):
        file = super().open(path, mode, **kwargs)
        return SlowFile(file) if mode == 'wb' and str(path).endswith('.tar') else file
    @classmethod
    def _strip_protocol(cls, path): return LocalFileSystem._strip_protocol(str(path).removeprefix('slow://'))


class Dropped:
    "A file whose content is lost from some byte on."
    def __init__(self, file, room): self.file, self.room = file, room
    def write(self, block):
        self.file.write(block[:max(0, self.room)])
        self.room -= len(block)
        return len(block)
    def __enter__(self): return self
    def __exit__(self, *args): self.file.close()


class Lying(Slow):
    "Drops, cuts and hides what it was given, and lists late."
    protocol, g, late = ('lying',), random.Random(0), set()
    def open(self, path, mode='rb', **kwargs):
        if not str(path).endswith('.tar'): return LocalFileSystem.open(self, path, mode, **kwargs)
        how = self.g.choice(('fine', 'fine', 'cut', 'lost', 'late'))
        if mode == 'wb' and how == 'cut': return Dropped(LocalFileSystem.open(self, path, mode, **kwargs), self.g.randrange(1, 90_000))
        if mode == 'wb' and how == 'lost': return Dropped(open(os.devnull, 'wb'), 0)
        if mode == 'rb' and how == 'late' and path not in self.late:
            self.late.add(path)
            raise FileNotFoundError(path)
        return LocalFileSystem.open(self, path, mode, **kwargs)
    def ls(self, path, detail=False, **kwargs):
        found = LocalFileSystem.ls(self, path, detail=detail, **kwargs)
        return found[:-1] if self.g.random() < .3 and any(str(p).endswith('.tar') for p in found) else found
    @classmethod
    def _strip_protocol(cls, path): return LocalFileSystem._strip_protocol(str(path).removeprefix('lying://'))


for cls in (Slow, Lying): fsspec.register_implementation(cls.protocol[0], cls, clobber=True)


def counted(run): return [e['step'] for e in run.events() if e['kind'] == 'mirrored']


def kill_and_go_on(tiny, undisturbed, number, seed, least):
    "Kill runs while they upload, lose their disk, and finish each elsewhere, from the mirror alone."
    place, trainer = tiny
    g, inside, told_all = random.Random(seed), 0, 0
    for i in range(number):
        name, disk, other = f'gone-{seed}-{i}', place/f'disk-{seed}-{i}', place/f'other-{seed}-{i}'
        url = f'slow://{place}/store-{seed}-{i}'
        child = fork(train(trainer, name, output_dir=str(disk), mirror=url), place/f'{name}.log')
        count, least_counted, store_folder = Count(disk/name, 'mirrored'), 1 + i % 3, Path(url.removeprefix('slow://'))
        def uploading(): return count() >= least_counted and len(list(store_folder.glob('*/*.tar'))) > min(2, least_counted)
        assert until(uploading, child), (place/f'{name}.log').read_text()[-2000:]
        time.sleep(g.random()*.2)
        os.kill(child, 9)
        wait(child)
        told = max(counted(Run(disk/name)))
        shutil.rmtree(disk)
        store, copies = find_copies(url)
        inside += not all(is_whole(store, c) for c in copies)
        told_all += told
        fetched = fetch_run(url, other)
        assert int(fetched.latest_valid().name.partition('-')[2]) >= told, f'{name}: checkpoint-{told} was counted and is lost'
        shutil.rmtree(other)
        same(finished(trainer, name, resume=url, output_dir=str(other), mirror=url), undisturbed)
        for folder in (other, Path(url.removeprefix('slow://'))): shutil.rmtree(folder)
    record('kill -9 during an upload', trials=number, inside_an_upload=inside, lost_checkpoints=0, identical=number)
    assert inside >= least, f'only {inside} of {number} kills fell into an upload'
    assert told_all > 0


def test_killed_while_uploading(tiny, undisturbed): kill_and_go_on(tiny, undisturbed, 3, seed=1, least=1)


@pytest.mark.slow
def test_killed_while_uploading_30(tiny, undisturbed): kill_and_go_on(tiny, undisturbed, 30, seed=2, least=15)


def test_a_store_that_lies_never_gives_an_invalid_run(tiny, undisturbed):
    "Whatever the store does, a resume continues from a valid checkpoint or is refused; what was counted is there."
    place, trainer = tiny
    resumed = 0
    for seed in range(4):
        name, url = f'lied-{seed}', f'lying://{place}/lies-{seed}'
        def before(_, seed=seed):
            Lying.g.seed(seed)
            Mirror.__init__.__defaults__ = (2, (0, 0)) # no waiting for a store that has lost what it was given
        run = finished(trainer, name, output_dir=str(place/f'lied-disk-{seed}'), mirror=url, before=before)
        same(run, undisturbed)
        Lying.g.seed(seed + 100)
        honest = open_store(f'file://{place}/lies-{seed}')
        whole = {c.step for c in find_copies(f'file://{place}/lies-{seed}')[1] if is_whole(honest, c)}
        newest = sorted(set(counted(run)))[-2:]
        assert set(newest) <= whole, f'counted {newest}, whole {whole}'
        try: found = fetch_run(url, place/f'lied-other-{seed}')
        except (CheckpointError, ConfigError): continue
        assert found.latest_valid() is not None and int(found.latest_valid().name.partition('-')[2]) in whole
        same(finished(trainer, name, resume=found.folder, output_dir=str(found.folder.parent)), undisturbed)
        resumed += 1
    assert resumed, 'every store refused, so nothing was tried'


def test_the_checkpoint_to_publish_comes_along(tiny):
    "A run that chooses its best checkpoint at the end chooses the same one elsewhere, though it is not the newest."
    place, trainer = tiny
    best = dict(load_best_model_at_end=True, eval_steps=1, learning_rate=.05)
    whole = finished(trainer, 'best', output_dir=str(place/'best-whole'), **best)
    url = f'file://{place}/best-store'
    run = finished(trainer, 'best', output_dir=str(place/'best-disk'), mirror=url, **best)
    same(run, whole)
    shutil.rmtree(place/'best-disk')
    again = finished(trainer, 'best', resume=url, output_dir=str(place/'best-other'), **best)
    same(again, whole)
    assert [e['published'] for e in again.events() if e['kind'] == 'chosen'][-1] == [e['published'] for e in whole.events() if e['kind'] == 'chosen'][-1]


def test_the_command_line_resumes_from_an_address(tmp_path):
    "Train with a mirror, lose the folder, and name the address."
    make_tiny(tmp_path/'tiny')
    config = write_config(tmp_path/'run.yaml', tmp_path/'tiny', tmp_path/'runs', 'cli', max_steps=2, mirror=f'file://{tmp_path}/store')
    code, out = finish('train', '--config', config)
    assert code == 0, out
    before = (tmp_path/'runs'/'cli'/'adapter_model.safetensors').read_bytes()
    shutil.rmtree(tmp_path/'runs')
    code, out = finish('train', '--resume', f'file://{tmp_path}/store', f'training.output_dir={tmp_path}/elsewhere')
    assert code == 0, out
    assert (tmp_path/'elsewhere'/'cli'/'adapter_model.safetensors').read_bytes() == before
    code, out = finish('train', '--resume', f'file://{tmp_path}/nothing')
    assert code == 2 and 'holds no copy of a run' in out, out
