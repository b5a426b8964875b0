"""Wheels for a GPU box that has PyTorch and transformers but no network: what this project needs besides, small enough to travel with the tree.

    python tools/gpu_wheels.py fetch [--peer] [--cells] [--folder build/gpu_wheels]      here, with a network
    python tools/gpu_wheels.py install [--folder build/gpu_wheels]                       there, without one

`fetch` takes the versions that are installed here, for the box's Python and Linux; of bitsandbytes it keeps the library for one CUDA version. `install` unpacks what the box lacks
into FOLDER/site and prints how to use it; nothing of the box's own Python is changed. Together with the tree the wheels have to stay below --limit MiB."""
import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ('bitsandbytes', 'pydantic', 'pydantic_core', 'annotated_types', 'typing_inspection')  # missing to train and for every row of ours
PEER = ('trl', 'datasets', 'dill', 'multiprocess')  # for the rows of TRL
CELLS = ('nbdev', 'execnb', 'fastcore')  # for the notebooks' cells marked gpu
NAMES = {'annotated_types': 'annotated-types', 'typing_inspection': 'typing-inspection'}


def version_of(name):
    "The version that is installed here, else the one that was measured on a CPU."
    try: return importlib.metadata.version(NAMES.get(name, name))
    except importlib.metadata.PackageNotFoundError: return json.loads((ROOT/'bench'/'results'/'cpu.json').read_text())['versions'].get(name)


def fetch_one(name, version, folder, python):
    "The wheel of a package for Linux on x86-64."
    tags = [a for glibc in ('2_28', '2_24', '2_17', '2014') for a in ('--platform', f'manylinux{glibc if glibc == "2014" else "_" + glibc}_x86_64')]
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:', '--python-version', python, '--implementation', 'cp', *tags, '--dest', str(folder), f'{NAMES.get(name, name)}=={version}']
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f'{name} {version}: pip found no wheel for Python {python}: {(done.stderr.strip().splitlines() or ["no message"])[-1]}')
    return max(folder.glob(f'{name}-*.whl'), key=lambda p: p.stat().st_mtime)


def trim(wheel, keep):
    "The same wheel without the other libraries for CUDA, ROCm and XPU; `keep` is a part of the name of the one that stays."
    with zipfile.ZipFile(wheel) as old: files = {i: old.read(i) for i in old.infolist()}
    is_library = lambda name: name.endswith('.so') and Path(name).name.startswith('libbitsandbytes_')
    out = {i.filename for i in files if is_library(i.filename) and keep not in i.filename}
    if not any(is_library(i.filename) and keep in i.filename for i in files):
        there = sorted(Path(n).stem.removeprefix('libbitsandbytes_') for n in out)
        raise SystemExit(f'{wheel.name}: no library for {keep}; it has {", ".join(there)}')
    smaller = wheel.with_suffix('.part')
    with zipfile.ZipFile(smaller, 'w', zipfile.ZIP_DEFLATED) as new:
        for i, data in files.items():
            if i.filename in out: continue
            if i.filename.endswith('.dist-info/RECORD'):  # the list of files, by which tools check an installation
                data = b''.join(line for line in data.splitlines(keepends=True) if line.split(b',')[0].decode() not in out)
            new.writestr(i, data)
    smaller.replace(wheel)
    return len(out)


def tree_bytes():
    "Size of the files that git knows or does not ignore."
    done = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True)
    return sum((ROOT/f).stat().st_size for f in done.stdout.split('\0') if f and (ROOT/f).is_file())


def fetch(names, folder, python, cuda, limit):
    "Download, trim and weigh."
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob('*.whl'): old.unlink()
    for name in names:
        if not (version := version_of(name)): raise SystemExit(f'{name} is not installed here, so its version is not known; pip install {NAMES.get(name, name)} first')
        wheel = fetch_one(name, version, folder, python)
        left_out = trim(wheel, f'cuda{cuda}') if name == 'bitsandbytes' else 0
        print(f'{wheel.name:75} {wheel.stat().st_size/2**20:6.1f} MiB' + (f', {left_out} libraries left out' if left_out else ''))
    wheels, tree = sum(p.stat().st_size for p in folder.glob('*.whl')), tree_bytes()
    print(f'wheels {wheels/2**20:.1f} MiB, tree {tree/2**20:.1f} MiB, together {(wheels + tree)/2**20:.1f} of {limit} MiB')
    if wheels + tree > limit*2**20: raise SystemExit(f'too large by {(wheels + tree)/2**20 - limit:.1f} MiB: leave out --cells or --peer')


def install(folder):
    "Unpack the wheels of packages that are not there."
    wheels = sorted(folder.glob('*.whl'))
    if not wheels: raise SystemExit(f'{folder}: no wheels; run `python tools/gpu_wheels.py fetch` where there is a network')
    site = folder/'site'
    site.mkdir(exist_ok=True)
    here = f'cp{sys.version_info[0]}{sys.version_info[1]}'
    for wheel in wheels:
        name, tag = wheel.name.split('-')[0], wheel.name.split('-')[2]
        if importlib.util.find_spec(name) is not None and not (site/name).exists():
            print(f'{name}: there already')
            continue
        if tag.startswith('cp') and tag != here and '-abi3-' not in wheel.name: raise SystemExit(f'{wheel.name} is not for this Python ({here}); fetch again with --python {sys.version_info[0]}.{sys.version_info[1]}')
        with zipfile.ZipFile(wheel) as z: z.extractall(site)
        print(f'{name}: unpacked')
    print(f'export PYTHONPATH={site.resolve()}:{ROOT}')


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('what', choices=['fetch', 'install'])
    p.add_argument('--peer', action='store_true', help='with TRL, for the rows that compare')
    p.add_argument('--cells', action='store_true', help='with nbdev, for the cells marked gpu')
    p.add_argument('--folder', type=Path, default=ROOT/'build'/'gpu_wheels')
    p.add_argument('--python', default='3.12', help="the box's Python")
    p.add_argument('--cuda', default='130', help="the box's CUDA, as PyTorch names it: torch.version.cuda without its point")
    p.add_argument('--limit', type=float, default=64, help='MiB of wheels and tree together')
    a = p.parse_args()
    if a.what == 'install': return install(a.folder)
    fetch([*TRAIN, *(PEER if a.peer else ()), *(CELLS if a.cells else ())], a.folder, a.python, a.cuda, a.limit)


if __name__ == '__main__': main()
