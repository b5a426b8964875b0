"""Training speed on a CPU: the demo model in 4 bits, the same conversations, side by side with TRL; each row in its own process."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from bench.common import RESULTS, save
from bench.row import ALPHA, COUNT, CPU, EQUAL_ROWS, MAX_LENGTH, MEDIAN, R, RATE, SECONDS, STEPS, WARM_UP

# what is to be reached: name, of which row, of which number, at least (or at most), what it is compared with
TARGETS = [('tokens/s, of TRL as shipped', 'real_tokens_per_s', ['TRL as shipped'], 6.0), ('tokens/s, of TRL at its best', 'real_tokens_per_s', ['TRL, no checkpointing', 'TRL, no checkpointing, packed'], 3.5),
           ('tokens/s, of row 1', 'real_tokens_per_s', ['careful bf16 recipe (row 1)'], 3.3), ('tokens/s, of row 2', 'real_tokens_per_s', ['row 1 without checkpointing (row 2)'], 2.0)]


def apart(suite, name, timeout=300):
    "One row in a process of its own; what it said last if it failed."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder)/'report.json'
        done = subprocess.run([sys.executable, '-m', 'bench.row', suite, name, str(report)], capture_output=True, text=True, timeout=timeout,
                              env={**os.environ, 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'PYTHONPATH': os.pathsep.join(filter(None, [str(RESULTS.parent.parent), os.environ.get('LLAMA_NB_PEER')]))})
        if report.exists(): return json.loads(report.read_text())
        return dict(not_run=(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1][:300])


def compare(rows):
    "Ours against the others: each target with what was found. What ran twice counts with its mean, and the ratio's range over both is told."
    us, found = rows['llama_nb'], {}
    both = lambda name, key: [rows[n][key] for n in (name, f'{name} again') if key in rows.get(n, {})]
    for name, key, others, least in TARGETS:
        known = max([both(o, key) for o in others if both(o, key)], key=mean, default=None)
        if not known: continue
        mine = both('llama_nb', key)
        found[name] = dict(ratio=round(mean(mine)/mean(known), 2), lowest=round(min(mine)/max(known), 2), highest=round(max(mine)/min(known), 2), at_least=least)
    first, shipped = rows.get('careful bf16 recipe (row 1)', {}), rows.get('TRL as shipped', {})
    if 'steps' in first: found['CPU-seconds per token, of row 1'] = dict(ratio=round(us['cpu_s_per_1000_tokens']/first['cpu_s_per_1000_tokens'], 3), at_most=0.36)
    if 'steps' in shipped: found['peak extra memory, of TRL as shipped'] = dict(ratio=round(us['peak_extra_mib']/shipped['peak_extra_mib'], 2), at_most=1.0)
    return {k: {**v, 'reached': v['ratio'] >= v['at_least'] if 'at_least' in v else v['ratio'] <= v['at_most']} for k, v in found.items()}


# of the equal work: against whom, which number, at least
EQUAL_TARGETS = [('TRL as shipped', 'step_tokens_per_s', 5.0), ('TRL as shipped', 'whole_tokens_per_s', 4.0), ('TRL at its best', 'step_tokens_per_s', 3.5), ('TRL at its best', 'whole_tokens_per_s', None)]


def compare_equal(rows):
    "Ours against TRL on the same conversations and the same taught tokens, steps and whole calls apart. Raises `ValueError` if the work was not the same."
    found, work = {}, ('conversations', 'tokens', 'taught_tokens', 'seen_tokens')
    for taught in ('every token taught', 'answers taught'):
        mine = rows.get(f'llama_nb, {taught}', {})
        for other, key, least in EQUAL_TARGETS:
            theirs = rows.get(f'{other}, {taught}', {})
            if 'steps' not in mine or 'steps' not in theirs: continue
            if different := [w for w in work if mine[w] != theirs[w]]: raise ValueError(f'{other}, {taught}: not the same work: {", ".join(f"{w} {theirs[w]:,} instead of {mine[w]:,}" for w in different)}')
            ratio = round(mine[key]/theirs[key], 2)
            found[f"{other}, {taught}, {'a step' if key.startswith('step') else 'the whole call'}"] = dict(ratio=ratio, at_least=least, reached=None if least is None else ratio >= least)
    return found


def equal():
    "The equal work: each row in a process of its own; about ten minutes on two cores."
    rows, load = {}, os.getloadavg()[0]
    for name in EQUAL_ROWS:
        rows[name] = apart('equal', name, timeout=400)
        print(f'{name:42}', json.dumps(rows[name])[:300], flush=True)
    ratios = compare_equal(rows)
    for name, ratio in ratios.items(): print(f'{name:60}', ratio)
    return save('cpu_equal', rows, ratios=ratios, load_average_at_start=round(load, 2), model='SmolLM2-135M-Instruct, NF4 nested, bf16 compute', max_length=MAX_LENGTH, lora_r=R, lora_alpha=ALPHA, threads=os.environ.get('OMP_NUM_THREADS', 'all cores'))


def draw(rows, path):
    "Bars of real tokens per second."
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    shown = {k: v for k, v in rows.items() if 'steps' in v}
    fig, ax = plt.subplots(figsize=(7, 0.45*len(shown) + 1))
    ax.barh(list(shown), [v['real_tokens_per_s'] for v in shown.values()], color=['#D55E00' if k.startswith('llama_nb') else '#0072B2' for k in shown])
    for i, v in enumerate(shown.values()): ax.text(v['real_tokens_per_s'], i, f" {v['real_tokens_per_s']:.0f}  ({v['peak_extra_mib']:,} MiB)", va='center', fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel='real tokens per second (peak memory beyond the model)', xlim=(0, 1.3*max(v['real_tokens_per_s'] for v in shown.values())))
    fig.savefig(path, dpi=100, bbox_inches='tight')


def main(part=''):
    "`python -m bench cpu [equal]`: the rows of one step's speed, or the equal work."
    return equal() if part == 'equal' else steps()


def steps(names=tuple(CPU)):
    "The gate first; then every row; the three that are compared most once more, in turn, to show the noise."
    rows, load = {}, os.getloadavg()[0]  # a busy machine shows here: such a result is worth nothing
    for name in names:
        rows[name] = apart('cpu', name)
        print(f'{name:38}', json.dumps(rows[name])[:400], flush=True)
        if name == 'gate' and not rows[name].get('passed'): sys.exit('the correctness gate failed: no number is worth printing')
    ratios = compare(rows) if 'steps' in rows.get('llama_nb', {}) else {}
    for name, ratio in ratios.items(): print(f'{name:38}', ratio)
    draw(rows, RESULTS/'cpu.png')
    return save('cpu', rows, ratios=ratios, load_average_at_start=round(load, 2), model='SmolLM2-135M-Instruct, NF4 nested, bf16 compute', conversations=COUNT, median_words=MEDIAN, max_length=MAX_LENGTH, lora_r=R,
                lora_alpha=ALPHA, learning_rate=RATE, warm_up_steps=WARM_UP, timed_steps_at_least=STEPS, seconds_at_least=SECONDS, threads=os.environ.get('OMP_NUM_THREADS', 'all cores'))
