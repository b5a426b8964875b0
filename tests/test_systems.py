"""Windows and macOS as far as a simulation goes: what their file systems, processes and devices do differently."""
import errno
import os
from pathlib import Path

import pytest
import torch
from tiny_run import make_tiny

from llama_nb.checkpoints import verify_checkpoint
from llama_nb.config import DataConfig, LoRAConfig, ModelConfig, TrainingConfig
from llama_nb.runs import is_alive
from llama_nb.sources import cache_folder
from llama_nb.train import LLAMATrainer


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp('systems')
    make_tiny(folder/'tiny')
    return folder


def trained(tiny, name):
    made = LLAMATrainer(ModelConfig(str(tiny/'tiny'), use_4bit=False, max_length=256), LoRAConfig(r=4), DataConfig('dailydialog', 'sample', max_samples=12, val_size=.25, on_overflow='drop_turns'),
                        TrainingConfig(output_dir=str(tiny/'runs'), run_name=name, max_steps=2, save_steps=1, learning_rate=1e-2, per_device_train_batch_size=1), device='cpu')
    return made.train(progress=False)


def test_a_folder_that_cannot_be_opened_or_flushed(tiny, monkeypatch):
    "Windows opens no folder, and many network and cloud drives flush none: checkpoints are verified by reading back."
    plain, flushed = os.open, []
    def refusing(path, flags, *args, **kwargs):
        if Path(path).is_dir(): raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return plain(path, flags, *args, **kwargs)
    def no_fsync(fd): flushed.append(fd); raise OSError(errno.EINVAL, 'Invalid argument')
    monkeypatch.setattr(os, 'open', refusing)
    monkeypatch.setattr(os, 'fsync', no_fsync)
    run = trained(tiny, 'no-flush')
    assert flushed and run.status == 'finished' and all(verify_checkpoint(c, run.id) == [] for c in run.checkpoints())


def test_no_proc_no_killing_signal_and_no_fcntl(tiny, monkeypatch):
    "macOS has no /proc; `os.kill(pid, 0)` would end a process on Windows; fcntl is not there."
    import builtins
    plain_read, plain_import = Path.read_text, builtins.__import__
    def read(self, *args, **kwargs):
        if str(self).startswith('/proc'): raise FileNotFoundError(str(self))
        return plain_read(self, *args, **kwargs)
    def imported(name, *args, **kwargs):
        if name == 'fcntl' and args and args[0] and str(args[0].get('__name__', '')).startswith('llama_nb'): raise ModuleNotFoundError(name)
        return plain_import(name, *args, **kwargs)
    monkeypatch.setattr(Path, 'read_text', read)
    monkeypatch.setattr(builtins, '__import__', imported)
    monkeypatch.setattr(os, 'kill', lambda *a: pytest.fail('os.kill was called'))
    run = trained(tiny, 'no-proc')
    assert run.status == 'finished'
    run.beat(every_s=0)
    assert is_alive(run.folder/'.heartbeat')


@pytest.mark.parametrize('platform, place', [('darwin', 'Library/Caches'), ('win32', 'AppData/Local')])
def test_the_cache_lies_where_the_system_wants_it(platform, place, monkeypatch, tmp_path):
    for name in ('LLAMA_NB_CACHE', 'XDG_CACHE_HOME', 'LOCALAPPDATA'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setattr('sys.platform', platform)
    assert cache_folder() == tmp_path/place/'llama_nb'


def test_no_name_of_ours_is_one_that_windows_refuses(tiny):
    "Names of files in a run hold none of <>:\"|?* and do not end in a dot or a space."
    run = trained(tiny, 'names')
    for path in run.folder.rglob('*'): assert not set(path.name) & set('<>:"|?*\\') and not path.name.endswith(('.', ' ')), path.name


@pytest.mark.parametrize('kind', ['mps', 'xpu'])
def test_another_gpu_is_refused_by_name(kind):
    from llama_nb.errors import ResourceError
    from llama_nb.model import load_model
    with pytest.raises(ResourceError, match=f"device '{kind}'.*use device='cpu'"): load_model(ModelConfig('demo'), device=torch.device(kind))
