"""Everything that only a GPU can check, within ten minutes: the cells and tests marked `gpu`, then as much of the benchmark as time is left for, what matters most first.

    python tools/gpu.py [cells] [tests] [a] [b] [bench] [--out FOLDER]

Without a name cells, tests and benchmark share ten minutes. A step that is named has ten minutes of its own; `a` and `b` are the two halves of the benchmark, and add what an earlier call had no time for. Uses the packages that are installed: nothing is fetched, the tree itself is put on the path.
What was found goes to `gpu_suite.json`, and the benchmark's to `gpu.json`, in --out, else $OUT, else bench/results/. Ends with 0 if all passed, 1 if something failed, 2 without a CUDA device."""
import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ('transformers', 'peft', 'bitsandbytes', 'accelerate', 'pydantic', 'yaml')  # to train
STEPS, TOGETHER = ('cells', 'tests', 'a', 'b', 'bench'), {'cells': 150, 'tests': 60, 'bench': None}  # seconds at most where they share a call; the benchmark takes the rest
NEEDS_DEMO = ('nbs/14_model.ipynb',)  # left out where the demo model was not fetched before
SECONDS = 570  # a call on a lent machine may take ten minutes


def has(package):
    "Whether a package can be imported, and its version if it has one."
    if importlib.util.find_spec(package) is None: return None
    try: return importlib.metadata.version('PyYAML' if package == 'yaml' else package)
    except importlib.metadata.PackageNotFoundError: return 'there'


def run(command, seconds):
    "A command with the tree on its path; exit code, seconds and the end of what it said."
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])), 'HF_HUB_OFFLINE': '1', 'HF_EVALUATE_OFFLINE': '1', 'WANDB_MODE': 'offline',
           'TOKENIZERS_PARALLELISM': 'false', 'NO_PROGRESS': '1', 'MPLBACKEND': 'agg'}
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds)
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as e: code, text = 'no end', (e.stdout or b'').decode(errors='replace') if isinstance(e.stdout, bytes) else e.stdout or ''
    print(text[-6000:], flush=True)
    return dict(command=' '.join(Path(c).name if os.path.isabs(c) else c for c in command), code=code, seconds=round(time.monotonic() - began, 1), last=text.strip().splitlines()[-1:] or [''])


def flagged():
    "Notebooks with cells for a GPU."
    return [p.relative_to(ROOT).as_posix() for p in sorted((ROOT/'nbs').glob('*.ipynb')) if re.search(r'"#\| gpu', p.read_text(encoding='utf-8'))]


def gpu_tests():
    "Files with tests for a GPU: pytest imports no others, which may need packages that are not here."
    return [p.relative_to(ROOT).as_posix() for p in sorted((ROOT/'tests').glob('test_*.py')) if re.search(r'mark\.gpu', p.read_text(encoding='utf-8'))]


def demo_is_there():
    "Whether the demo model lies in the cache; asking for it would fetch it."
    from llama_nb.sources import DEMO_MODEL, cache_folder
    return (cache_folder()/DEMO_MODEL['folder']/'config.json').is_file()


def commands(step, out, left):
    "What a step runs, and what it cannot run here."
    if step == 'cells':
        if missing := [p for p in ('nbdev', 'execnb', 'fastcore') if not has(p)]: return [], f'{", ".join(missing)} not installed: cells marked gpu were not run'
        files = [f for f in flagged() if f not in NEEDS_DEMO or demo_is_there()]
        return [[sys.executable, 'tools/nbcheck.py', *files, '--flags', 'gpu', '--jobs', '2', '--timeout', str(int(left/2))]], None
    if step == 'tests':
        if not has('pytest'): return [], 'pytest not installed: tests marked gpu were not run'
        return [[sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', 'gpu', '--flags', 'gpu', *gpu_tests()]], None
    return [[sys.executable, '-m', 'bench', 'gpu', *([step] if step in 'ab' else ['--seconds', str(int(left))]), '--out', str(out)]], None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('steps', nargs='*', metavar='|'.join(STEPS), help='which; all if left out')
    parser.add_argument('--out', type=Path, default=Path(os.environ.get('OUT') or ROOT/'bench'/'results'))
    a = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if unknown := set(a.steps) - set(STEPS): parser.error(f'unknown: {", ".join(sorted(unknown))}')
    import torch
    if not torch.cuda.is_available():
        print('no CUDA device here; python -m bench gpu --device cpu --tiny --out FOLDER and the tests without a mark check what a CPU can', file=sys.stderr)
        sys.exit(2)
    if missing := [p for p in NEEDED if not has(p)]:
        print(f'not installed: {", ".join(missing)}', file=sys.stderr)
        sys.exit(2)
    a.out.mkdir(parents=True, exist_ok=True)
    report = dict(gpu=torch.cuda.get_device_name(), capability='.'.join(map(str, torch.cuda.get_device_capability())), torch=torch.__version__, cuda=torch.version.cuda,
                  versions={p: has(p) for p in (*NEEDED, 'trl', 'liger_kernel', 'unsloth', 'triton')}, steps={})
    path = a.out/'gpu_suite.json'
    if path.exists() and (before := json.loads(path.read_text())).get('gpu') == report['gpu']: report['steps'] = before['steps']
    began, steps = time.monotonic(), a.steps or list(TOGETHER)
    for step in steps:
        left = SECONDS if a.steps else min(TOGETHER[step] or SECONDS, SECONDS - (time.monotonic() - began))
        made, lacking = commands(step, a.out, left)
        report['steps'][step] = dict(not_run=lacking) if lacking else dict(runs=[run(c, left + 15) for c in made])
        path.write_text(json.dumps(report, indent=1) + '\n')
    failed = [s for s in steps if any(r['code'] != 0 for r in report['steps'][s].get('runs', ()))]
    for step in steps: print(step, report['steps'][step].get('not_run') or ', '.join(f"exit code {r['code']} after {r['seconds']} s" for r in report['steps'][step]['runs']))
    print(f'wrote {path.name}; ' + (f'failed: {", ".join(failed)}' if failed else 'all passed'))
    sys.exit(bool(failed))


if __name__ == '__main__': main()
