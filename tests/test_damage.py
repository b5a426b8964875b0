"""Damaged checkpoints and full disks: found, named in one line, and the run goes on from what is left."""
import logging
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fork_run import finished, fork, record, same, train, wait

from llama_nb.checkpoints import MANIFEST, latest_valid, rotate_checkpoints, stage_checkpoint, verify_checkpoint, write_manifest
from llama_nb.errors import logger
from llama_nb.runs import Run


class Lines(logging.Handler):
    "Collects log lines."
    def __init__(self): super().__init__(); self.lines = []
    def emit(self, record): self.lines.append(record.getMessage())


@pytest.fixture
def heard():
    handler = Lines()
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)


def cut(share):
    def change(path): os.truncate(path, int(path.stat().st_size*share))
    return change


DAMAGE = {'missing': Path.unlink, 'empty': cut(0), 'cut to 10 %': cut(.1), 'cut to 60 %': cut(.6), 'cut to 99 %': cut(.99), 'one bit': flip}


def damaged_copies(whole, place):
    "Every kind of damage in every file of the newest checkpoint: what it is, the file, and the run folder."
    newest = whole.checkpoints()[-1]
    for file in sorted(p.relative_to(newest) for p in newest.rglob('*') if p.is_file()):
        for kind, change in DAMAGE.items():
            copy = Path(shutil.copytree(whole.folder, place/'copy', ignore=shutil.ignore_patterns('plots', 'samples')))
            change(copy/newest.name/file)
            yield kind, file, copy
            shutil.rmtree(copy)


def test_damage_is_found(undisturbed, tmp_path, heard):
    "Each damage in each file: not valid, one line that names the checkpoint and the file, and the one before is taken."
    before, newest = (p.name for p in undisturbed.checkpoints())
    found, files = 0, set()
    for kind, file, copy in damaged_copies(undisturbed, tmp_path):
        heard.clear()
        assert Run(copy).latest_valid().name == before, f'{kind} in {file} was not found'
        assert len(heard) == 1 and heard[0].startswith(f'skip {newest}: ') and (str(file) in heard[0] or file.name == MANIFEST) and len(heard[0]) <= 200, heard
        found += 1
        files.add(str(file))
    record('damage matrix', kinds=len(DAMAGE), files=len(files), cases=len(DAMAGE)*len(files), found_and_named=found)
    assert found == len(DAMAGE)*len(files) >= 6*8


def test_everything_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    "The order of calls into the system: each file, the manifest and the stage are flushed, then renamed, then the parent is flushed."
    calls, opened = [], {}
    real = {name: getattr(os, name) for name in ('open', 'fsync', 'rename', 'replace')}
    def spy_open(path, *args, **kwargs):
        fd = real['open'](path, *args, **kwargs)
        opened[fd] = Path(path).name
        return fd
    def spy(name, about):
        def call(*args, **kwargs):
            calls.append((name, about(*args)))
            return real[name](*args, **kwargs)
        return call
    monkeypatch.setattr(os, 'open', spy_open)
    monkeypatch.setattr(os, 'fsync', spy('fsync', lambda fd: opened[fd]))
    monkeypatch.setattr(os, 'rename', spy('rename', lambda a, b: (Path(a).name, Path(b).name)))
    (tmp_path/'run').mkdir()
    with stage_checkpoint(tmp_path/'run', 7) as stage:
        (stage/'weights').write_bytes(b'1')
        (stage/'sub').mkdir()
        (stage/'sub'/'state').write_bytes(b'2')
    assert [about for name, about in calls if name == 'rename'] == [('.tmp-7', 'checkpoint-7')]
    at = calls.index(('rename', ('.tmp-7', 'checkpoint-7')))
    flushed = [about for name, about in calls[:at] if name == 'fsync']
    assert set(flushed) == {'weights', 'state', MANIFEST, 'sub', '.tmp-7'} and flushed[-1] == '.tmp-7'
    assert flushed.index(MANIFEST) > max(flushed.index('weights'), flushed.index('state'))
    assert calls[at + 1:] == [('fsync', 'run')]


def test_rotation_keeps_two_valid_ones(undisturbed, tmp_path):
    "Also if the newest is damaged: then nothing older goes."
    copy = Run(shutil.copytree(undisturbed.folder, tmp_path/'copy'))
    older = Path(shutil.copytree(copy.checkpoints()[0], copy.folder/'checkpoint-1'))
    write_manifest(older, 1, copy.id)
    flip(copy.checkpoints()[-1]/'optimizer.pt')
    assert rotate_checkpoints(copy.folder, 2, copy.id) == [] and len(copy.checkpoints()) == 3
    assert rotate_checkpoints(copy.folder, 2, copy.id) == []


def test_a_bit_in_the_manifest_is_harmless_or_found(undisturbed, tmp_path):
    "Each byte of the manifest with a flipped bit: the checkpoint is refused, or the files are still what they were."
    newest = undisturbed.checkpoints()[-1]
    copy, refused = Path(shutil.copytree(newest, tmp_path/newest.name)), 0
    good = (copy/MANIFEST).read_bytes()
    for i in range(0, len(good), 3):
        (copy/MANIFEST).write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i+1:])
        refused += bool(verify_checkpoint(copy, undisturbed.id))
    record('damaged manifest', bits=len(range(0, len(good), 3)), refused=refused)
    assert refused > 0.8*len(good)/3  # the rest is white space, or the format's own number


def test_a_stale_checkpoint_of_another_run_is_skipped(undisturbed, tmp_path, heard):
    "A higher number wins nowhere: it belongs to another run, or its manifest is of another step."
    copy = Run(shutil.copytree(undisturbed.folder, tmp_path/'copy'))
    newest = copy.checkpoints()[-1]
    shutil.copytree(newest, copy.folder/'checkpoint-100')
    other = Path(shutil.copytree(newest, copy.folder/'checkpoint-200'))
    write_manifest(other, 200, 'another')
    assert copy.latest_valid() == newest
    assert [line.split(':')[0] for line in heard] == ['skip checkpoint-200', 'skip checkpoint-100']
    record('stale checkpoint', cases=2, skipped=len(heard))


@pytest.mark.parametrize('file', ['optimizer.pt', 'rng_state.pth', 'adapter_model.safetensors'])
def test_a_damaged_run_goes_on(tiny, undisturbed, file):
    "From the checkpoint before, to the same end; the stock trainer goes on silently without these files, or with a flipped bit."
    name = f'damaged-{file.partition(".")[0]}'
    run = Run(shutil.copytree(undisturbed.folder, undisturbed.folder.parent/name))
    flip(run.checkpoints()[-1]/file)
    same(finished(tiny[1], name, resume=True), undisturbed)
    record('resumed from the one before', damaged=file, identical=True)


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 4 MB of its own; without the right to mount one, the test is skipped."
    disk = tmp_path/'disk'
    disk.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', disk], capture_output=True, text=True)
    if done.returncode: pytest.skip(f'needs the right to mount a small disk: {done.stderr.strip()[:80]}')
    yield disk
    subprocess.run(['umount', '-l', disk], check=True)


def fill_at_save(disk, step, leave):
    "Fill the disk when the save of a step begins, after it has asked for room, but for `leave` bytes."
    def patch(trainer):
        log = Run.log
        def filling(self, kind, **data):
            event = log(self, kind, **data)
            if kind == 'save_begin' and data['step'] == step:
                with open(disk/'ballast', 'wb') as f: f.write(bytes(max(0, shutil.disk_usage(disk).free - leave)))
            return event
        Run.log = filling
    return patch


def one_full_disk(trainer, whole, disk, name, leave, log):
    "A run on a disk that fills up in its fourth save, then more room and a resume."
    code = wait(fork(train(trainer, name, before=fill_at_save(disk, 4, leave), output_dir=str(disk)), log))
    said = Path(log).read_text().splitlines()[-1]
    assert code == 3 and re.search(r'ResourceError: disk full: checkpoint-4 in .* stopped after [\d.]+ MB of about [\d.]+, [\d.]+ MB are free', said), (code, said)
    run = Run(disk/name)
    assert run.latest_valid().name == 'checkpoint-3'
    assert not [p.name for p in run.folder.iterdir() if p.name.startswith('.tmp-')]
    (disk/'ballast').unlink()
    same(finished(trainer, name, resume=True, output_dir=str(disk)), whole)
    shutil.rmtree(run.folder)


def full_disks(tiny, whole, disk, log, points):
    size = [e['bytes'] for e in whole.events() if e['kind'] == 'checkpoint'][3]
    for i in range(points): one_full_disk(tiny[1], whole, disk, f'full-{i}', int(size*i/points), log)
    record('disk full', points=points, one_line_errors=points, last_checkpoint_valid=points, identical_after_resume=points)


def test_disk_full(tiny, undisturbed, small_disk, tmp_path): full_disks(tiny, undisturbed, small_disk, tmp_path/'log', 3)


@pytest.mark.slow
def test_disk_full_at_ten_points(tiny, undisturbed, small_disk, tmp_path): full_disks(tiny, undisturbed, small_disk, tmp_path/'log', 10)


def test_file_size_limit(tiny, undisturbed, tmp_path):
    "Without any right to mount: a limit on file sizes lets each larger file fail in the middle, with a one-line error."
    import resource
    def limit(_): resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # optimizer.pt is larger
    code = wait(fork(train(tiny[1], 'limited', before=limit), tmp_path/'log'))
    said = (tmp_path/'log').read_text().splitlines()[-1]
    assert code == 3 and 'disk full: checkpoint-1' in said, (code, said)
    assert Run(undisturbed.folder.parent/'limited').checkpoints() == []
    same(finished(tiny[1], 'limited', resume=True), undisturbed)
    record('limit on file sizes', one_line=True, identical_after_resume=True)


def test_no_room_is_said_before_training(tiny, small_disk, tmp_path):
    "What will not fit is said before the first step, with need and have."
    with open(small_disk/'ballast', 'wb') as f: f.write(bytes(shutil.disk_usage(small_disk).free - 10_000))
    code = wait(fork(train(tiny[1], 'no-room', output_dir=str(small_disk/'runs')), tmp_path/'log'))
    assert code == 3 and 'disk full: the checkpoints of this run in' in (tmp_path/'log').read_text()
    assert latest_valid(small_disk) is None
    record('no room before training', told_before_the_first_step=True)
