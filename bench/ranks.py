"""One process against two on the CPU: the demo model in 4 bits, the same rows in the same steps; each row a call of `train()` as a user makes it."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.common import RESULTS, save

COUNT, MEDIAN, MAX_LENGTH, R = 320, 85, 1024, 16
STEPS, WARM_UP, ROWS = 8, 2, 4  # steps of a run; the first ones left out; micro-batches of a step on all processes together
LIMIT = ('two processes share the cores and the memory bandwidth of one machine, so the rows show what working in two processes costs or gains there, '
         'not what a second GPU brings')


def row(num_processes, steps=STEPS):
    "Tokens per second of a step, from the times in the event log; and the losses, which must be the same for any number of processes."
    from bench.chats import conversations, write
    from llama_nb.config import DataConfig, LoRAConfig, ModelConfig, TrainingConfig
    from llama_nb.train import LLAMATrainer
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder)/'chats.jsonl', conversations(COUNT, MEDIAN))
        training = TrainingConfig(folder, 'row', max_steps=steps, save_steps=1000, num_processes=num_processes, gradient_accumulation_steps=ROWS//num_processes, per_device_train_batch_size=1)
        run = LLAMATrainer(ModelConfig('demo', max_length=MAX_LENGTH), LoRAConfig(r=R), DataConfig(str(path), val_size=0.0), training, device='cpu').train(progress=False)
        return figures([e for e in run.events() if e['kind'] == 'train'], num_processes)


def figures(events, num_processes):
    "The row of a run, from its `train` events."
    seconds = [b['time'] - a['time'] for a, b in zip(events, events[1:])][WARM_UP - 1:]
    tokens = [e['tokens'] for e in events][WARM_UP:]
    rates = [n/s for n, s in zip(tokens, seconds)]
    return dict(processes=num_processes, tokens_per_s=round(median(rates), 1), slowest=round(min(rates), 1), fastest=round(max(rates), 1), steps=len(rates),
                tokens=sum(tokens), taught_tokens=sum(e['taught_tokens'] for e in events[WARM_UP:]), losses=[round(float(e['loss']), 4) for e in events])


def compare(one, two):
    "Two processes against one. Raises `ValueError` if they did not do the same work."
    for key in ('tokens', 'taught_tokens', 'steps'):
        if one[key] != two[key]: raise ValueError(f'not the same work: {key} {two[key]} instead of {one[key]}')
    worst = max(abs(a - b)/abs(a) for a, b in zip(one['losses'], two['losses']))
    if worst > 0.02: raise ValueError(f'not the same training: losses differ by {worst:.1%}')
    return dict(ratio=round(two['tokens_per_s']/one['tokens_per_s'], 3), largest_difference_of_losses=round(worst, 5))


def apart(num_processes, steps):
    "One row in a process of its own."
    code = f'import json; from bench.ranks import row; print("ROW" + json.dumps(row({num_processes}, {steps})))'
    env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'PYTHONPATH': os.pathsep.join(filter(None, [str(RESULTS.parent.parent), os.environ.get('PYTHONPATH')]))}
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=900)
    found = next((line for line in done.stdout.splitlines() if line.startswith('ROW')), None)
    if found is None: sys.exit((done.stderr.strip().splitlines() or ['no row'])[-1][:300])
    return json.loads(found[3:])


def main(steps=STEPS):
    "`python -m bench ranks`: one process, two, one again; about five minutes on two cores."
    from llama_nb.preflight import measure_all_reduce, speed_text
    load, rows = os.getloadavg()[0], {}  # a busy machine shows here: such a result is worth nothing
    for name, n in {'1 process': 1, '2 processes': 2, '1 process again': 1}.items():
        rows[name] = apart(n, int(steps))
        print(f'{name:18}', json.dumps(rows[name])[:300], flush=True)
    ratios = compare(rows['1 process'], rows['2 processes'])
    print(ratios, LIMIT, sep='\n')
    return save('ranks', rows, ratios=ratios, limit=LIMIT, all_reduce=speed_text(measure_all_reduce()), load_average_at_start=round(load, 2), model='SmolLM2-135M-Instruct, NF4 nested', conversations=COUNT,
                max_length=MAX_LENGTH, lora_r=R, lora_dropout=0.0, micro_batches_per_step=ROWS, warm_up_steps=WARM_UP, threads=os.environ.get('OMP_NUM_THREADS', 'all cores'))
