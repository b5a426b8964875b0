"""Training speed and memory on one GPU, rows A to J of the specification: `python -m bench gpu [first|second|a|b] [--device cpu --tiny] [--seconds N] [--out FOLDER]`, within ten minutes.
`first` and `second` are one process each for a short booking, see `bench/gpu_session.py`. Without a part the rows that matter most come first, and what had no time says so; the parts, each with ten minutes of its own, add it.

With `--device cpu --tiny` the same rows run with small shapes in this process: a test of the benchmark, not a measurement."""
import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import gpu_session as session
from bench.common import RESULTS, machine
from bench.gpu_row import ALPHA, FIRST, PARTS, RATE, ROWS, Here, row

# name, row, where the number stands, direction, limit; for one H200
TARGETS = [('7B, bf16, real tokens/s', 'F  llama_nb, 7B', ('real_tokens_per_s',), '>=', 17000), ('7B, bf16, compiled layers, real tokens/s', 'F  llama_nb, compiled layers, 7B', ('real_tokens_per_s',), '>=', 17000),
           ('7B, bf16, compiled layers, stretch', 'F  llama_nb, compiled layers, 7B', ('real_tokens_per_s',), '>=', 19000), ('7B, fp8, compiled layers, real tokens/s', 'H  llama_nb, fp8, compiled layers, 7B', ('real_tokens_per_s',), '>=', 23000),
           ('13B, bf16, real tokens/s', 'I  llama_nb, 13B', ('real_tokens_per_s',), '>=', 8800), ('8B, bf16, real tokens/s', 'I  llama_nb, 8B', ('real_tokens_per_s',), '>=', 15500),
           ('7B, fp8, real tokens/s', 'H  llama_nb, fp8, 7B', ('real_tokens_per_s',), '>=', 23000), ('8B, one row of 2,048, GiB allocated', 'smallest memory, one row, 8B', ('max_allocated_gib',), '<=', 7.6),
           ('7B, 4 x 2,048, all layers recomputed, GiB allocated', 'planner, 7B', ('settings', 4, 'measured_gib'), '<=', 8.5), ('plan against measured, furthest of eight', 'planner, 7B', ('furthest',), '<=', 0.1),
           ('bf16 products, TFLOP/s', 'machine', ('bf16 16384x4096x11008, TFLOP/s',), '>=', 600)]
SECONDS = 570  # a call on a lent machine may take ten minutes
UNGATED = 'machine', 'gate'  # they measure no training
LATE = dict(not_run='no time left in this call')


def targets(rows):
    "Each target with what was found: reached, missed, or not measured."
    made = []
    for name, where, path, sign, limit in TARGETS:
        found = rows.get(where, {})
        try:
            for key in path: found = found[key]
        except (KeyError, IndexError, TypeError): found = None
        found = found if isinstance(found, (int, float)) else None
        made.append(dict(target=name, row=where.strip(), wanted=f'{sign} {limit:,}', found=found, reached='not measured' if found is None else 'gate not passed' if 'gate' in rows[where] else bool(found >= limit if sign == '>=' else found <= limit)))
    return made


def apart(name, device, tiny, timeout):
    "One row in a process of its own; what it said last if it failed."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder)/'report.json'
        command = [sys.executable, '-m', 'bench.gpu_row', name, str(report), '--device', device] + ['--tiny']*tiny
        env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'PYTHONPATH': os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get('PYTHONPATH')]))}
        try: done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
        except subprocess.TimeoutExpired: return dict(not_run=f'no end within {timeout:.0f} s')
        if report.exists() and report.stat().st_size: return json.loads(report.read_text())
        return dict(not_run=(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1][:300])


def draw(rows, path):
    "Bars of real tokens per second."
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    shown = {k: v for k, v in rows.items() if 'steps' in v}
    if not shown: return
    fig, ax = plt.subplots(figsize=(7, 0.45*len(shown) + 1))
    ax.barh(list(shown), [v['real_tokens_per_s'] for v in shown.values()], color=['#D55E00' if 'llama_nb' in k or 'again' in k else '#0072B2' for k in shown])
    for i, v in enumerate(shown.values()): ax.text(v['real_tokens_per_s'], i, f" {v['real_tokens_per_s']:,.0f}" + (f"  ({v['max_allocated_gib']:.1f} GiB)" if 'max_allocated_gib' in v else ''), va='center', fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel='real tokens per second (most memory allocated)', xlim=(0, 1.35*max(v['real_tokens_per_s'] for v in shown.values())))
    fig.savefig(path, dpi=100, bbox_inches='tight')
    plt.close(fig)


def write(folder, rows, device, tiny):
    "The result so far; rows of another call on the same GPU stay."
    path, gpu = folder/'gpu.json', next((r['gpu'] for r in rows.values() if 'gpu' in r), device)
    if path.exists():
        before = json.loads(path.read_text())
        if before.get('gpu') == gpu and before['settings']['tiny'] == tiny: rows = {**rows, **{n: r for n, r in before['rows'].items() if n not in rows or rows[n] == LATE}}
    rows = {name: rows[name] for name in ROWS if name in rows}
    packages = {p: v for p, v in machine()['versions'].items()}
    result = dict(date=datetime.date.today().isoformat(), gpu=gpu, **{**machine(), 'versions': packages}, targets=targets({} if tiny else rows), rows=rows,
                  settings=dict(device=device, tiny=tiny, row_tokens=Here.seq, tokens_per_micro_step=Here.tokens, median_tokens=Here.median, supervised=0.45, lora_alpha=ALPHA, learning_rate=RATE, warm_up_steps=Here.warm, timed_steps=Here.timed,
                                weights='random, nested NF4', peak_tflops=790, targets_for='one H200'))
    path.write_text(json.dumps(result, indent=1) + '\n')
    return path, result


def main(arguments=()):
    "All rows of a part, the gate before any number, which marks them if it fails; what is found is written after every row."
    parser = argparse.ArgumentParser(prog='python -m bench gpu')
    parser.add_argument('part', nargs='?', choices=['first', 'second', 'a', 'b'], help='first, second: one process each, within 330 and 300 seconds; a, b: half of the rows, a process each; if left out, all that fit')
    parser.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
    parser.add_argument('--tiny', action='store_true', help='small shapes, in this process')
    parser.add_argument('--out', type=Path, default=RESULTS)
    parser.add_argument('--seconds', type=float, help='no row begins after that')
    a = parser.parse_args(list(arguments))
    if a.device == 'cpu' and not a.tiny: parser.error('on a CPU only --tiny makes sense')
    if a.device == 'cpu' and a.out.resolve() == RESULTS.resolve(): parser.error('a CPU measures nothing here; give --out another folder')
    if a.device == 'cuda':
        import torch
        if not torch.cuda.is_available(): sys.exit('no CUDA device here; python -m bench gpu --device cpu --tiny --out FOLDER runs the same rows small')
    a.out.mkdir(parents=True, exist_ok=True)
    Here.set(a.device, a.tiny)
    if a.part in session.SECONDS: return session.run(a.part, a.seconds or session.SECONDS[a.part], a.out)
    a.seconds = a.seconds or SECONDS
    began, rows = time.monotonic(), {}
    for name in PARTS[a.part] if a.part else [*FIRST, *(n for n in ROWS if n not in FIRST)]:
        left = a.seconds - (time.monotonic() - began)
        if left < 20: rows[name] = LATE
        else: rows[name] = row(name) if a.device == 'cpu' else apart(name, a.device, a.tiny, min(left, 180))
        if 'not_run' not in rows[name] and name not in UNGATED and 'gate' in rows and not rows['gate'].get('passed'): rows[name] = {**rows[name], 'gate': 'not passed'}
        print(f'{name:48}', json.dumps(rows[name])[:600], flush=True)
        path, result = write(a.out, rows, a.device, a.tiny)
        if name == 'gate' and not rows[name].get('passed'): print(f"the correctness gate {'failed' if 'passed' in rows[name] else 'was not run'}: the numbers below are marked", flush=True)
    draw(result['rows'], a.out/'gpu.png')
    for t in result['targets']: print(f"{t['target']:55} wanted {t['wanted']:10} found {t['found']}: {t['reached']}")
    return path
