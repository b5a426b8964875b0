"""Canaries: keys, a home folder and dialogues in the environment, on the command line and in the data; none of them is found in what a run leaves behind."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fork_run import make_chats, record
from tiny_run import ENV, make_tiny, write_config

HOME = '/tmp/canary-home-of-ada'
SECRETS = {'hub token': 'hf_' + 'cAnArYcAnArY' + '0123456789AbCdEf', 'key of a service': 'sk-' + 'canary-' + '0123456789abcdefghij', 'wandb key': 'deadbeef'*5}
WORDS = 'canary sentence about a purple giraffe in the attic'


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A tiny model and conversations below a home folder whose name must not spread."
    home = tmp_path_factory.mktemp('canary-home-of-ada')
    make_tiny(home/'tiny')
    rows = [json.loads(line) for line in make_chats(home/'plain.jsonl').read_text().splitlines()]
    for row in rows: row['messages'][1]['content'] = WORDS
    (home/'chats.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return home


def run(place, *args, name, code=0):
    "`llama-nb train` with canaries in environment and data; returns what it printed."
    env = {**ENV, 'HOME': str(place), 'HF_TOKEN': SECRETS['hub token'], 'OPENAI_API_KEY': SECRETS['key of a service'], 'WANDB_API_KEY': SECRETS['wandb key'], 'WANDB_MODE': 'offline'}
    config = write_config(place/f'{name}.yaml', place/'tiny', place/'runs', name, max_steps=4, save_steps=2, report_to=['wandb', 'tensorboard'])
    import yaml
    settings = yaml.safe_load(config.read_text())
    settings['data'] = dict(dataset_name=str(place/'chats.jsonl'), val_size=0.1)
    config.write_text(yaml.safe_dump(settings))
    done = subprocess.run([sys.executable, '-m', 'llama_nb', 'train', '--config', str(config), *args], env=env, capture_output=True, text=True, cwd=place)
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout + done.stderr


def hits(folder, words, leave_out=()):
    "Files that hold one of the words."
    return [f'{p.relative_to(folder)}: {w}' for p in sorted(folder.rglob('*')) if p.is_file() and p.name not in leave_out for w in words if w.encode() in p.read_bytes()]


# settings hold the paths they were given, and an adapter the folder of its base: without them nothing could be loaded again
PATHS = ('config.yaml', 'adapter_config.json')


def test_a_run_keeps_no_secret(place):
    "Not in its log, checkpoints, model card, curves, nor in what wandb and TensorBoard have written; and no sentence of the data."
    pytest.importorskip('wandb'), pytest.importorskip('tensorboard')
    said = run(place, name='canary')
    folder = place/'runs'/'canary'
    assert list(folder.glob('wandb/offline-run-*')) and list(folder.glob('tensorboard/*'))
    found = hits(folder, [*SECRETS.values(), WORDS]) + hits(folder, [str(place)], PATHS)
    files = sum(p.is_file() for p in folder.rglob('*'))
    assert found == [] and not [s for s in (*SECRETS.values(), WORDS, str(place)) if s in said], (found, said[-500:])
    record('secret canaries', case='run with wandb and tensorboard', files=files, hits=len(found))


def test_an_error_tells_no_secret(place):
    "A key given as a setting, a data file that is not there, a broken row: one line each, without key, home folder or more than a few words."
    said = run(place, f'data.dataset_name={place}/nowhere/{SECRETS["hub token"]}.jsonl', name='wrong', code=4)
    assert not [s for s in (*SECRETS.values(), str(place)) if s in said], said
    (place/'broken.jsonl').write_text(json.dumps({'messages': [{'role': 'user', 'content': WORDS*20}, {'role': 'assistant', 'content': None}]}) + '\n')
    said = run(place, f'data.dataset_name={place}/broken.jsonl', name='broken', code=4)
    assert WORDS not in said and str(place) not in said and 'broken.jsonl:1' in said, said
    record('secret canaries', case='error texts', hits=0)


def test_a_fault_in_training_shortens_the_text(place):
    "The rows of a NaN are named; of their text at most 80 characters are shown on the terminal, and none in the run folder."
    code = f'''
import sys, math; sys.path.insert(0, {str(Path(__file__).parent)!r})
from llama_nb.train import LLAMATrainer
from llama_nb.config import load_config
trainer = LLAMATrainer.from_config(load_config({str(place/'canary.yaml')!r}, ['training.run_name=sick', 'training.report_to=[]']), device='cpu')
trainer.model.get_base_model().lm_head.register_forward_hook(lambda m, args, out: out*math.nan)
from llama_nb.errors import one_line
try: trainer.train(progress=False)
except Exception as e: print(one_line(e, 1000))
'''
    done = subprocess.run([sys.executable, '-c', code], env={**ENV, 'HOME': str(place)}, capture_output=True, text=True, cwd=place)
    assert 'step 1: loss is nan' in done.stdout and 'chats.jsonl:' in done.stdout, done.stderr[-1000:]
    shown = done.stdout.split("'")[1] if "'" in done.stdout else ''
    assert len(shown) <= 80
    assert hits(place/'runs'/'sick', [WORDS, *SECRETS.values()]) == [] and hits(place/'runs'/'sick', [str(place)], PATHS) == []
    record('secret canaries', case='fault in training', hits=0)


def test_no_notebook_and_no_page_of_ours_holds_a_secret():
    "Kept outputs of the notebooks: nothing that looks like a key, and no home folder."
    import re
    root, found, read = Path(__file__).resolve().parents[1], [], 0
    keys = re.compile(r'hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9]{20,}|/home/[a-z]+/|/root/')
    for path in [*(root/'nbs').rglob('*.ipynb'), root/'README.md']:
        if path.suffix == '.md': texts = [path.read_text(encoding='utf-8')]
        else: texts = [json.dumps(c.get('outputs', [])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]
        read += 1
        found += [f'{path.name}: {m[0]}' for t in texts for m in keys.finditer(t)]
    record('secret canaries', case='kept outputs of notebooks', files=read, hits=len(found))
    assert not found, found
