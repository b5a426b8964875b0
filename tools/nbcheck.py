"""Run the notebooks as tests, each in a process of its own, and close with 'N passed, N failed'.

    python tools/nbcheck.py [nbs/14_model.ipynb ...] [--module] [--flags "slow"] [--jobs 2] [--timeout 600]

As written, a notebook runs as `nbdev_test` would run it. With `--module`, cells that export are replaced by the exported
module, so that the same tests exercise what a user installs; notebooks that export nothing have no such second run.
What did not run is listed, never counted: printed lines that start with 'SKIPPED ', cells behind a flag, `skip_exec`.
As written, a notebook is checked twice: its cells run without an error, and they give the outputs that are stored in it."""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import outputs

ROOT = Path(__file__).resolve().parent.parent
EXPORTS = {'export', 'exports', 'exporti'}
# two workers with two threads each on two cores wait on one another: many times slower than one thread each
ENV = dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='agg', HF_HUB_OFFLINE='1',
           HF_EVALUATE_OFFLINE='1', WANDB_MODE='offline', LLAMA_NB_CACHE=str(ROOT/'.cache'))
_running = set()  # child processes, so that an interrupted run leaves none behind


@dataclass
class Result:
    "What one notebook's run showed."
    name: str  # path below nbs/
    ok: bool = False
    ran: bool = True  # False: the front matter says `skip_exec`
    seconds: float = 0.
    skips: list = field(default_factory=list)  # lines the notebook printed that start with 'SKIPPED '
    not_run: dict = field(default_factory=dict)  # flag -> number of cells it kept from running
    error: str = ''
    stale: list = field(default_factory=list)  # cells whose stored output is not what they give now
    compared: int = 0  # cells whose output was compared
    varies: int = 0  # cells of which only the kinds of output were compared

    def notes(self):
        "One line per reason why something of this notebook did not run."
        cells = ', '.join(f'{n} {flag}' for flag, n in self.not_run.items())
        stored = f'{self.name}: {self.varies} outputs vary by machine, and only their presence was checked'
        return ([] if self.ran else [f'{self.name}: skip_exec, nothing run']) + [f'{self.name}: {s}' for s in self.skips] + (
            [f'{self.name}: {cells} {"cell" if sum(self.not_run.values()) == 1 else "cells"} not run'] if cells else []) + [stored]*bool(self.varies)


def environment():
    "The environment of every check: one thread a process, offline, no display. What the caller has set stays."
    env = {**ENV, **os.environ}
    if not env.get('LLAMA_NB_TEST_DATA'): env.pop('LLAMA_NB_TEST_DATA', None)  # make exports an absent folder as ''
    env.pop('IN_TEST', None)  # nbdev_export does nothing under it
    return env


def notebooks():
    "Every notebook that is a test, in reading order; those whose name starts with `_` or `.` are not."
    hidden = lambda p: any(part[0] in '._' for part in p.relative_to(ROOT).parts)
    return sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not hidden(p))


def exports(path):
    "The module this notebook exports, or None."
    from execnb.nbio import read_nb
    from nbdev.processors import _default_exp
    return _default_exp(read_nb(path))


def run_here(path, module=False, flags=()):
    "Run one notebook in this process."
    import importlib

    from execnb.shell import CaptureShell
    from fastcore.basics import str2bool
    from fastcore.xtras import working_directory
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor

    cfg = get_config()
    sys.path.insert(0, str(cfg.config_path))
    os.environ['IN_TEST'] = '1'
    name = exports(path)
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    result = Result(label(path))
    if str2bool(getattr(nb, 'frontmatter_', {}).get('skip_exec', False)): return Result(result.name, ok=True, ran=False)
    off, not_run = set(cfg.tst_flags.split()) - set(flags), Counter()
    shell = CaptureShell(path)
    directives = lambda cell: getattr(cell, 'directives_', None) or {}

    def left_out(cell):
        if cell.cell_type != 'code' or 'nbdev_export(' in cell.source: return True
        found = directives(cell)
        if found.get('eval:', [''])[0].lower() == 'false': return True
        if off & found.keys():
            not_run.update(sorted(off & found.keys())[:1])
            return True
        if module and EXPORTS & found.keys(): return True
        cell.outputs = []  # what the cell gives replaces what is stored
        return False

    def collect(cell):
        for out in cell.get('outputs', []):
            text = out.get('text', '')
            result.skips += [line for line in ''.join(text).splitlines() if line.startswith('SKIPPED ')]
        if module or cell.cell_type != 'code' or cell.id not in stored: return
        if any(kind == 'error' for kind, _ in outputs.shown(cell.outputs)): return  # it raised, which is told as such
        if any(line.startswith('SKIPPED ') for _, text in outputs.shown(cell.outputs) for line in text.splitlines()): return
        varies = outputs.VARIES in directives(cell)
        why = outputs.stale(stored[cell.id][1], cell.outputs, exact=by_the_letter(path), varies=varies)
        result.compared, result.varies = result.compared + 1, result.varies + varies
        if why: result.stale.append(f'cell {stored[cell.id][0]} ({cell.source.strip().splitlines()[0][:60]})\n  {why}')

    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    stored = {c['id']: (i, c['outputs']) for i, c in enumerate(cells) if c['cell_type'] == 'code'}
    if module:
        names = vars(importlib.import_module(f'{cfg.lib_path.name}.{name}'))
        shell.user_ns.update({k: v for k, v in names.items() if not k.startswith('__')})
    try:
        with working_directory(path.parent): shell.run_all(nb, exc_stop=True, preproc=left_out, postproc=collect)
        result.ok = True
    except Exception: result.error = shell.prettytb(fname=path)
    result.not_run = dict(not_run)
    return result


def by_the_letter(path): return 'docs' in path.parts or path.name == 'index.ipynb'


def label(path): return path.relative_to(ROOT/'nbs').as_posix()


def run_apart(path, module=False, flags='', timeout=600):
    "Run one notebook in a process of its own; one that hangs or crashes is a failed notebook, nothing more."
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as tmp:
        report, log = Path(tmp)/'report.json', Path(tmp)/'log'
        measure = ['-m', 'coverage', 'run', '-p'] if os.environ.get('NB_COVERAGE') else []
        cmd = [sys.executable, *measure, __file__, str(path), '--flags', flags, '--report', str(report)] + ['--module'] * module
        with log.open('wb') as out:  # a file, not a pipe: a grandchild that lives on cannot hold us up
            child = subprocess.Popen(cmd, cwd=ROOT, env=environment(), stdout=out, stderr=out, start_new_session=True)
            _running.add(child)
            try: code = child.wait(timeout)
            except subprocess.TimeoutExpired: code = f'no end within {timeout} s'
            finally: stop(child)
        text = log.read_text(encoding='utf-8', errors='replace')
        result = Result(**json.loads(report.read_text())) if report.exists() else Result(label(path), error='no report')
        if code != 0: result.ok, result.error = False, f'exit code: {code}\n{text}{result.error}'
    result.seconds = time.monotonic() - began
    return result


def stop(child):
    "End a child and whatever it started."
    _running.discard(child)
    try: os.killpg(child.pid, signal.SIGKILL)  # its group outlives it if it left children
    except ProcessLookupError: pass
    child.wait()


def run_all(files, module=False, flags='', jobs=2, timeout=600, show=print):
    "Run notebooks apart, `jobs` at a time; `show` gets one line for each as it ends, with the end of its error if it failed."
    def one(path):
        r = run_apart(path, module, flags, timeout)
        state = 'ok   ' if r.ok and r.ran else 'skip ' if r.ok else 'FAIL '
        show(f'{state}{r.name}{" (module)" * module} {r.seconds:.1f} s' + (f'\n{r.error[-4000:].rstrip()}' if not r.ok else ''))
        for cell in r.stale: show(f'STALE {r.name} {cell}')
        return r
    with ThreadPoolExecutor(jobs) as pool:
        try: return list(pool.map(one, files))
        except BaseException:  # Ctrl-C here would leave the children, which are in groups of their own
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(_running): stop(child)
            raise


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('files', nargs='*', type=Path)
    p.add_argument('--module', action='store_true', help='run the tests against the exported modules')
    p.add_argument('--flags', default='', help='flags whose cells run too, such as "slow"')
    p.add_argument('--jobs', type=int, default=2)
    p.add_argument('--timeout', type=int, default=600, help='seconds for one notebook')
    p.add_argument('--report', type=Path, help=argparse.SUPPRESS)
    a = p.parse_args()
    files = [f.resolve() for f in a.files] or notebooks()
    if a.report:
        r = run_here(files[0], a.module, a.flags.split())
        a.report.write_text(json.dumps(vars(r)))
        return
    if a.module: files = [f for f in files if exports(f)]
    results = run_all(files, a.module, a.flags, a.jobs, a.timeout, show=lambda s: print(s, flush=True))
    for note in (n for r in results for n in r.notes()): print('skipped', note)
    passed, failed = sum(r.ok and r.ran for r in results), sum(not r.ok for r in results)
    old = [r.name for r in results if r.stale]
    if old: print(f'stored outputs are not what the cells give; run: python tools/nbsave.py {" ".join(f"nbs/{name}" for name in old)}')
    passed, failed = passed + sum(r.ok and not r.stale for r in results if r.compared), failed + len(old)
    print(f'{passed} passed, {failed} failed')
    sys.exit(bool(failed or not passed))


if __name__ == '__main__': main()
