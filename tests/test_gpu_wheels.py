"""Wheels that travel to a GPU box: trimmed without breaking their list of files, and unpacked only where the box lacks them. Nothing is fetched here."""
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import gpu_wheels  # noqa: E402


def wheel(folder, name, files, tag='py3-none-any'):
    path = folder/f'{name}-1.0-{tag}.whl'
    with zipfile.ZipFile(path, 'w') as z:
        for f, text in files.items(): z.writestr(f, text)
        z.writestr(f'{name}-1.0.dist-info/RECORD', ''.join(f'{f},sha256=x,1\n' for f in files))
    return path


def install(folder): return subprocess.run([sys.executable, str(ROOT/'tools'/'gpu_wheels.py'), 'install', '--folder', str(folder)], capture_output=True, text=True)


def test_keeps_one_library(tmp_path):
    libraries = [f'bitsandbytes/libbitsandbytes_{x}.so' for x in ('cuda118', 'cuda130', 'cpu', 'rocm63')]
    path = wheel(tmp_path, 'bitsandbytes', {'bitsandbytes/__init__.py': '', **dict.fromkeys(libraries, 'x'*1000)})
    assert gpu_wheels.trim(path, 'cuda130') == 3
    with zipfile.ZipFile(path) as z:
        assert set(z.namelist()) == {'bitsandbytes/__init__.py', libraries[1], 'bitsandbytes-1.0.dist-info/RECORD'}
        assert [line.split(',')[0] for line in z.read('bitsandbytes-1.0.dist-info/RECORD').decode().splitlines()] == ['bitsandbytes/__init__.py', libraries[1]]
    with pytest.raises(SystemExit, match='no library for cuda140; it has cuda130'): gpu_wheels.trim(path, 'cuda140')


def test_unpacks_what_is_missing(tmp_path):
    wheel(tmp_path, 'not_there_yet', {'not_there_yet/__init__.py': 'found = 7'})
    wheel(tmp_path, 'json', {'json/__init__.py': 'raise ImportError'})
    done = install(tmp_path)
    assert done.returncode == 0 and 'json: there already' in done.stdout and 'not_there_yet: unpacked' in done.stdout, done.stderr
    site = done.stdout.splitlines()[-1].removeprefix('export PYTHONPATH=').split(':')[0]
    assert subprocess.run([sys.executable, '-c', 'import json, not_there_yet; print(not_there_yet.found)'], env={'PYTHONPATH': site}, capture_output=True, text=True).stdout == '7\n'
    assert install(tmp_path).returncode == 0  # again


def test_says_what_is_wrong(tmp_path):
    done = install(tmp_path)
    assert done.returncode == 1 and 'no wheels; run' in done.stderr
    wheel(tmp_path, 'other_python', {'other_python/__init__.py': ''}, 'cp27-cp27m-linux_x86_64')
    assert 'is not for this Python' in install(tmp_path).stderr


def test_names_are_what_the_project_needs():
    "A package that training imports and a bare box lacks must not be forgotten: all that setup declares is either here or on the box."
    on_the_box = {'torch', 'transformers', 'peft', 'accelerate', 'numpy', 'tokenizers', 'safetensors', 'pyyaml', 'tqdm', 'psutil', 'filelock', 'matplotlib', 'typer', 'huggingface_hub'}
    for name in gpu_wheels.TRAIN: assert gpu_wheels.version_of(name)
    assert not set(gpu_wheels.TRAIN) & on_the_box and gpu_wheels.version_of('trl')
