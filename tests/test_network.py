"""Without a network, whatever would be fetched by name says so within five seconds, and what is in the cache still loads."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import ROOT, make_tiny

BLOCK = {  # how a network can be missing: packets are dropped, the name server is silent, there is no route
    'dropped': "socket.socket.connect = lambda *a: time.sleep(120)",
    'no name server': "socket.getaddrinfo = lambda *a, **k: time.sleep(120)",
    'no route': "def refuse(*a, **k): raise OSError(101, 'Network is unreachable')\nsocket.socket.connect = refuse\nsocket.getaddrinfo = refuse"}
TRIED = {
    'tokenizer': "load_tokenizer('someone/llama-of-mine')", 'shape': "model_shape('someone/llama-of-mine')",
    'model': "load_model(ModelConfig('someone/llama-of-mine', use_4bit=False), device='cpu')",
    'revision': "load_tokenizer('someone/llama-of-mine', revision='v2')",
    'data set': "load_data('someone/chats')", 'named data set': "load_data(DataConfig('alpaca'))",
    'trainer': "LLAMATrainer(ModelConfig('someone/llama-of-mine'), data=[[{'role': 'user', 'content': f'question {i}'}, {'role': 'assistant', 'content': f'answer {i}'}] for i in range(40)], device='cpu').train()"}


def offline(home):
    env = {k: v for k, v in os.environ.items() if k not in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_DATASETS_OFFLINE') and not k.lower().endswith('_proxy')}
    return env | dict(HF_HOME=str(home), PYTHONPATH=str(ROOT), NO_PROGRESS='1')


def python(code, home):
    done = subprocess.run([sys.executable, '-c', code], env=offline(home), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


CODE = """
import json, socket, time
from llama_nb.model import load_model, load_tokenizer
from llama_nb.sources import model_shape
from llama_nb.data import load_data
from llama_nb.train import LLAMATrainer
from llama_nb.config import DataConfig, ModelConfig
import datasets, datasets.config
import llama_nb.network as network
{block}
found = {{}}
for name, tried in {tried!r}.items():
    network._results.clear()  # each as if it were the first
    since = time.monotonic()
    try: eval(tried); text = 'no error'
    except Exception as e: text = str(e)
    found[name] = [round(time.monotonic() - since, 1), text]
print(json.dumps(found))
"""


@pytest.mark.parametrize('how', BLOCK)
def test_said_within_five_seconds(how, tmp_path):
    found = python(CODE.format(block=BLOCK[how], tried=TRIED), tmp_path)
    assert set(found) == set(TRIED)
    for name, (seconds, text) in found.items():
        assert 'no network' in text and 'cannot be reached' in text and len(text.splitlines()) == 1, (name, text)
        assert seconds < 5, f'{name}: {seconds} s'


def test_a_model_in_the_cache_loads_without_a_network(tmp_path):
    "The cache's own layout, and a network that drops everything."
    repo = tmp_path/'hub'/'models--someone--tiny'
    make_tiny(repo/'snapshots'/('a'*40))
    (repo/'refs').mkdir()
    (repo/'refs'/'main').write_text('a'*40)
    tried = {'tokenizer': "json.dumps(None) if len(load_tokenizer('someone/tiny')) else 1/0", 'model': "load_model(ModelConfig('someone/tiny', use_4bit=False), device='cpu')"}
    found = python(CODE.format(block=BLOCK['dropped'], tried=tried), tmp_path)
    assert [text for _, text in found.values()] == ['no error', 'no error'], found
    assert all(seconds < 12 for seconds, _ in found.values()), found  # three of them are the one try


def test_the_command_line_says_it_before_it_loads_anything(tmp_path):
    (tmp_path/'sitecustomize.py').write_text(f"import socket, time\n{BLOCK['dropped']}\n")
    env = offline(tmp_path)
    env['PYTHONPATH'] = os.pathsep.join([str(tmp_path), env['PYTHONPATH']])
    since = time.monotonic()
    done = subprocess.run([sys.executable, '-m', 'llama_nb', 'train', '--preset', 'llama3-8b', 'data.dataset_name=x.jsonl', 'model.model_name=someone/llama-of-mine'],
                          env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3 and 'no network: huggingface.co cannot be reached' in done.stderr, done.stderr
    assert 'Traceback' not in done.stderr and time.monotonic() - since < 20  # on a busy machine; 3 s of it are the try
