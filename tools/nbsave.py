"""Run notebooks and keep their outputs: what a reader sees in the repository and on the docs site.

    python tools/nbsave.py nbs/14_model.ipynb [...] [--flags "slow"]

Skips what `nbdev_test` skips: `#| eval: false`, cells behind a flag that was not asked for, and the closing export call.
Skipped cells keep the outputs they have. Ends with exit code 1 if a cell raised."""
import argparse
import os
import re
import sys
from pathlib import Path

import nbformat
from execnb.nbio import read_nb, write_nb
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbdev.clean import clean_nb
from nbdev.config import get_config

DIRECTIVE = re.compile(r'^\s*#\s*\|\s*(.+?)\s*$', re.M)


def skipped(source, flags):
    "Whether the tests would not run this cell."
    found = {d.split()[0].rstrip(':'): d for d in DIRECTIVE.findall(source)}
    off = set(get_config().tst_flags.split()) - set(flags)
    return 'nbdev_export(' in source or bool(off & found.keys()) or found.get('eval', '').replace(' ', '') == 'eval:false'


def lasting(output):
    "Whether an output belongs on the page: no warnings, log lines or progress bars."
    if ''.join(output.get('text', '')).startswith('[INFO] Running in WANDB'): return False  # transformers prints it on import
    bar = '%|' in ''.join(output.get('data', {}).get('text/plain', ''))
    return output.get('name') != 'stderr' and not (bar and 'application/vnd.jupyter.widget-view+json' in output['data'])


def run(path, flags):
    "Execute one notebook in a fresh kernel, in its own folder, and write its outputs back."
    nb = nbformat.read(path, as_version=4)
    client = NotebookClient(nb, timeout=900, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}})
    ok = True
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if cell.cell_type != 'code' or skipped(cell.source, flags): continue
            try: client.execute_cell(cell, i)
            except CellExecutionError as e:
                print(f'{path.name} cell {i}: {cell.source[:200]}\n{e}', file=sys.stderr)
                ok = False
                break
    if ok:
        for cell in nb.cells:
            if cell.cell_type == 'code': cell.outputs = [o for o in cell.outputs if lasting(o)]
        nbformat.write(nb, path)
        nb = read_nb(path)
        clean_nb(nb)
        write_nb(nb, path)
    print(f"{'ok  ' if ok else 'FAIL'} {path.name}")
    return ok


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('files', nargs='+', type=Path)
    p.add_argument('--flags', default='')
    a = p.parse_args()
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    os.environ['NO_PROGRESS'] = '1'  # stage lines and bars do not belong to the page
    os.environ.pop('MPLBACKEND', None)  # a kernel draws into the notebook
    root = get_config().config_path
    os.environ['PYTHONPATH'] = os.pathsep.join([str(root), *filter(None, [os.environ.get('PYTHONPATH')])])
    sys.exit(not all([run(f.absolute(), a.flags.split()) for f in a.files]))
