"""Three real validation curves of the demo model, and where a proven stop would have ended each run.

    python -m bench stopping [--steps 36] [NAME ...]    (with names, only those curves are measured again)

Each run trains to its end, so that what a stop would have missed is known. With the real data sets in `LLAMA_NB_TEST_DATA` they are
used, else the shipped samples. The result file keeps losses by conversation and no text."""
import json
import os
import tempfile
from pathlib import Path

from bench.common import RESULTS, save
from llama_nb.config import DataConfig, LoRAConfig, ModelConfig, TrainingConfig
from llama_nb.data import load_data
from llama_nb.stopping import ERROR_RATE, best_and_pick, gain_to_come, read_losses
from llama_nb.train import LLAMATrainer

DELTA, EVERY = 0.02, 3  # nats per token; steps between evaluations


def sources():
    "Name -> where the conversations come from, and the learning rate: too high a one turns the curve up."
    place = Path(os.environ.get('LLAMA_NB_TEST_DATA') or '/nowhere')/'data'
    real = {'alpaca': place/'alpaca'/'alpaca_data.json', 'dailydialog': place/'dailydialog'}
    def config(name): return dict(dataset_name=name, data_path=str(real[name]) if real[name].exists() else 'sample')
    return {'alpaca': (config('alpaca'), 2e-4), 'dailydialog': (config('dailydialog'), 2e-4), 'dailydialog, few and fast': (config('dailydialog'), 3e-3)}


def curve(source, rate, steps, folder, few, most=300):
    "Evaluations of one run: steps, and nats and tokens of each held-out conversation."
    data = DataConfig(**source, max_samples=60 if few else most, val_size=0.5 if few else 0.1, on_overflow='drop_turns')
    trainer = LLAMATrainer(
        ModelConfig('demo', max_length=128), LoRAConfig(r=8), data,
        TrainingConfig(output_dir=str(folder), learning_rate=rate, max_steps=steps, eval_steps=EVERY, save_steps=steps, per_device_train_batch_size=2), device='cpu')
    return read_losses(trainer.train(progress=False))


def judged(found, steps):
    "What the rule says of a curve that is known to its end."
    at, losses = list(found), list(found.values())
    bounds = [gain_to_come(at[:k], losses[:k], steps) for k in range(1, len(at) + 1)]
    stop = next((k for k in range(3, len(at) + 1) if k == len(at) or bounds[k - 1] < DELTA), len(at))
    best, pick = best_and_pick(losses[:stop], DELTA)
    means = [float(rows[:, 0].sum()/rows[:, 1].sum()) for rows in losses]
    return dict(steps=at, losses=[round(m, 5) for m in means], bounds=[None if b == float('inf') else round(b, 5) for b in bounds],
                conversations=len(losses[0]), stop=at[stop - 1], best=at[best], pick=at[pick],
                missed=round(min(means[:stop]) - min(means), 5))  # what training to the end would still have gained


def main(argv=()):
    steps = int(argv[argv.index('--steps') + 1]) if '--steps' in argv else 36
    only = [name for name in argv if name in sources()]
    rows = json.loads((RESULTS/'stopping.json').read_text())['rows'] if only else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (source, rate) in sources().items():
            if only and name not in only: continue
            most = 700 if name == 'alpaca' else 300  # many of its answers are longer than a row
            rows[name] = judged(curve(source, rate, steps, folder, 'few' in name, most), steps) | dict(learning_rate=rate, sample=source['data_path'] == 'sample')
            print(name, rows[name], flush=True)
    return save('stopping', rows, steps=steps, delta=DELTA, error_rate=ERROR_RATE, model='demo', max_length=128)
