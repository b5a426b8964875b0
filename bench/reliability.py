"""What a run survives: the tests of kills, crashes, damage, full disks, resumes, faults, hostile files, secrets, interrupts, a long run and of the tests themselves, with their figures."""
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from bench.common import save

ROOT = Path(__file__).resolve().parents[1]
FILES = [p.stem for p in sorted((ROOT/'tests').glob('test_*.py')) if ' record(' in p.read_text(encoding='utf-8')]  # every test that keeps figures
COMMAND = 'python -m bench reliability'
PLAN = {  # what a test records -> its number in the plan
    'random kill -9': 'T1', 'killed twice, by the command line': 'T1', 'kill -9 during an upload': 'T1', 'kill -9 of one of two ranks': 'T1', 'kill -9 of the launcher': 'T1',
    'crash at a file operation': 'T2',
    'damage matrix': 'T3', 'damaged manifest': 'T3', 'stale checkpoint': 'T3', 'resumed from the one before': 'T3',
    'disk full': 'T4', 'limit on file sizes': 'T4', 'no room before training': 'T4',
    'resumed is uninterrupted': 'T5', 'changed setting': 'T6', 'missing part': 'T6',
    'non-finite number': 'T7', 'resumed after a non-finite number': 'T7', 'loss that explodes': 'T7', 'nothing taught': 'T7', 'clean runs': 'T7', 'memory that is not there': 'T7',
    'invariances': 'T8', 'ranks against one process': 'T8', 'data in memory on two processes': 'T8', 'parts of the base in host memory': 'T8', 'fsdp with an NF4 base against ddp': 'T8', 'two processes load a base and cut it': 'T8', 'two processes load a base, each for itself': 'T8',
    'hostile file': 'T13', 'trial of a template': 'T13', 'secret canaries': 'T15', 'imports': 'T16', 'static rule': 'T16', 'soak': 'T17',
    'interrupts': 'T18', 'interrupted twice': 'T18', 'interrupted, by the command line': 'T18', 'stopped from another process': 'T18', 'two processes on one run': 'T18', 'notebook kernel': 'T18',
    'one of two ranks is asked to stop': 'T18', 'interrupt of two processes': 'T18', 'a rank stands still': 'T18', 'two hosts, the cable is cut': 'T18', 'a scheduler asks two machines': 'T18',
    'mutants': 'T19'}


def said(value): return 'yes' if value is True else 'no' if value is False else ' '.join(map(str, value)) if isinstance(value, list) else f'{value:,}' if isinstance(value, int) else str(value)


def figures_of(rows):
    "The figures of the cases of one test in one line: of one case each; of several what they share, least and most of numbers, and how often each of a few words."
    if len(rows) == 1: return '; '.join(f'{k} {said(v)}' for k, v in rows[0].items() if not isinstance(v, list) or len(v) < 5)
    told = []
    for name in dict.fromkeys(k for r in rows for k in r):
        values = [r[name] for r in rows if name in r]
        if isinstance(values[0], list): continue
        kinds = Counter(map(said, values))
        if len(kinds) == 1: told.append(f'{name} {said(values[0])}' + (f' in {len(values)}' if len(values) < len(rows) else ''))
        elif all(type(v) in (int, float) for v in values): told.append(f'{name} {min(values):,} to {max(values):,}')
        elif len(kinds) <= 6: told.append(f"{name} {', '.join(f'{k} {n}' for k, n in kinds.items())}")
    return '; '.join(told)


def summarise(lines):
    "One row per kind of test, in the order of the plan: its number there, cases, their figures in a line, and the cases one by one."
    found = {}
    for line in lines: found.setdefault(line.pop('test'), []).append(line)
    order = sorted(found, key=lambda name: list(PLAN).index(name))
    return {name: dict(plan=PLAN[name], cases=len(found[name]), figures=figures_of(found[name]), rows=found[name]) for name in order}


def main(figures=None):
    "Run the tests and write `bench/results/reliability.json`; `figures`: a file of an earlier run, instead of running them now."
    with tempfile.TemporaryDirectory() as tmp:
        path, code = Path(figures or Path(tmp)/'figures.jsonl'), None
        if figures is None:
            tests = [str(ROOT/'tests'/f'{name}.py') for name in FILES]
            code = subprocess.run([sys.executable, '-m', 'pytest', '-q', *tests, '--flags', 'slow'], cwd=ROOT, env={**os.environ, 'LLAMA_NB_FIGURES': str(path), 'OMP_NUM_THREADS': '1'}).returncode
        rows = summarise([json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()])
    if figures is not None: return save('reliability', rows, command=f'{COMMAND} (from the figures of single runs: only the rows below were run)')
    return save('reliability', rows, command=COMMAND, exit_code=code, tests=FILES)


if __name__ == '__main__': print('wrote', main(*sys.argv[1:]))
