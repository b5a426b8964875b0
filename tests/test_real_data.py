"""The main job on real data: the demo model, the command line alone. Needs LLAMA_NB_TEST_DATA; with 300 conversations about five minutes each on two cores."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = os.environ.get('LLAMA_NB_TEST_DATA')
pytestmark = pytest.mark.skipif(not DATA, reason='LLAMA_NB_TEST_DATA is not set: no DailyDialog release and no Alpaca rows here')
THREADS = {'OMP_NUM_THREADS': str(os.cpu_count()), 'MKL_NUM_THREADS': str(os.cpu_count()), 'OMP_WAIT_POLICY': 'PASSIVE'}  # all cores, without burning them while waiting
SETS = {'dailydialog': ('dailydialog/train.zip', 'Hi! How was your day?'), 'alpaca': ('alpaca/alpaca_data.json', 'Name the three primary colors.')}


def llama_nb(*args):
    "Run the command line; its one JSON object."
    done = subprocess.run([sys.executable, '-m', 'llama_nb', *map(str, args), '--json'], capture_output=True, text=True, timeout=1500,
                          env={**os.environ, 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1', **THREADS})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize('name, n', [('dailydialog', 100), *(pytest.param(name, 300, marks=pytest.mark.slow) for name in SETS)])
def test_conversations_teach_and_the_reply_ends(name, n, tmp_path):
    file, question = SETS[name]
    (tmp_path/'run.yaml').write_text(f'''
model: {{model_name: demo, max_length: 768}}
lora: {{r: 16, lora_alpha: 32}}
data: {{dataset_name: {name}, data_path: {Path(DATA)/'data'/file}, max_samples: {n + 30}, val_size: {30/(n + 30)}}}
training: {{output_dir: {tmp_path/'runs'}, run_name: {name}, learning_rate: 1e-3, num_train_epochs: 1, per_device_train_batch_size: 1, eval_steps: 1000, save_steps: 1000}}
evaluation: {{metrics: [perplexity], num_samples: 30}}
''')
    told = llama_nb('train', '--config', tmp_path/'run.yaml', '--evaluate')
    sizes = json.loads((Path(told['run'])/'data.json').read_text())
    assert sizes['train']['conversations'] == n and sizes['validation']['conversations'] == 30
    for base in ('base_4bit', 'base_16bit'):
        change = told['evaluation']['differences'][f'tuned - {base}']['perplexity']
        print(f"{name}: tuned - {base}: {change['value']:+.2f} perplexity [{change['low']:+.2f}, {change['high']:+.2f}], {change['relative']:+.0%}")
        assert change['low'] < change['high'] < 0
    reply = llama_nb('chat', told['run'], '--prompt', question, '--max-new-tokens', 256)
    assert reply['reply'].strip() and reply['ended'], reply['num_tokens']
