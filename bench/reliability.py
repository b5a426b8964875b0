"""What a run survives: the slow tests of kills, crashes, damage, full disks, resumes, faults, interrupts and a long run, with their figures."""
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from bench.common import save

ROOT = Path(__file__).resolve().parents[1]
FILES = 'test_kill test_damage test_exact test_stop test_hostile test_secrets test_soak test_mutants'.split()
COMMAND = 'python -m bench reliability'


def summarise(lines):
    "One row per kind of test: figures of single tests as they are, many cases of one kind as their count."
    found = {}
    for line in lines: found.setdefault(line.pop('test'), []).append(line)
    return {name: rows[-1] if len({json.dumps(sorted(r)) for r in rows}) == 1 and 'trials' in rows[-1] or len(rows) == 1 else
            {'cases': len(rows), **{k: dict(Counter(str(r[k]) for r in rows)) for k in rows[0] if len({str(r.get(k)) for r in rows}) < len(rows)}, 'rows': rows} for name, rows in found.items()}


def main(figures=None):
    "Run the tests and write `bench/results/reliability.json`; `figures`: a file of an earlier run, instead of running them now."
    with tempfile.TemporaryDirectory() as tmp:
        path, code = Path(figures or Path(tmp)/'figures.jsonl'), None
        if figures is None:
            tests = [str(ROOT/'tests'/f'{name}.py') for name in FILES]
            code = subprocess.run([sys.executable, '-m', 'pytest', '-q', *tests, '--flags', 'slow'], cwd=ROOT, env={**os.environ, 'LLAMA_NB_FIGURES': str(path), 'OMP_NUM_THREADS': '1'}).returncode
        rows = summarise([json.loads(line) for line in path.read_text().splitlines()])
    if figures is not None: return save('reliability', rows, command=f'{COMMAND} (from the figures of single runs: only the rows below were run)')
    return save('reliability', rows, command=COMMAND, exit_code=code, tests=FILES)


if __name__ == '__main__': print('wrote', main(*sys.argv[1:]))
