"""A tiny model with a tokenizer of bytes, and runs of it in processes of their own; shared by the tests of runs."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'OMP_NUM_THREADS': '1', 'NO_PROGRESS': '1',
       'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}


def make_tiny(folder):
    "Save a two-layer random Llama and a ChatML tokenizer of 256 bytes."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from llama_nb.template import TEMPLATES
    from llama_nb.shapes import tiny_llama
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token='<|im_start|>', eos_token='<|im_end|>', pad_token='<pad>')
    tokenizer.chat_template = TEMPLATES['chatml'].text
    tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(folder)


def write_config(path, tiny, runs, name, **training):
    "A run with everything that makes exact resuming hard: dropout, accumulation, several epochs, evaluations."
    config = dict(
        model=dict(model_name=str(tiny), use_4bit=False, max_length=512), lora=dict(r=4, lora_dropout=0.1),
        data=dict(dataset_name='dailydialog', data_path='sample', max_samples=20, val_size=0.1, on_overflow='drop_turns'),
        training=dict(output_dir=str(runs), run_name=name, learning_rate=0.01, max_steps=16, gradient_accumulation_steps=2, save_steps=2, eval_steps=6) | training)
    path.write_text(yaml.safe_dump(config))
    return path


def start(*args):
    "Start `llama-nb ...` as a process of its own."
    return subprocess.Popen([sys.executable, '-m', 'llama_nb', *map(str, args)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*args, timeout=240):
    "Run `llama-nb ...` to its end; returns exit code and output."
    process = start(*args)
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


def wait_for(process, condition, timeout=180):
    "Wait until `condition()` is true while the process lives; returns whether it lived until then."
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if condition(): return True
        if process.poll() is not None: return False
        time.sleep(0.005)
    process.kill()
    raise TimeoutError(process.communicate()[0][-2000:])


def record(test, **figures):
    "Keep the figures of a test where `python -m bench reliability` looks for them."
    if path := os.environ.get('LLAMA_NB_FIGURES'):
        with open(path, 'a') as f: f.write(json.dumps({'test': test, **figures}) + '\n')


def make_place(folder):
    "A folder with the tiny model and short conversations, for runs of a notebook."
    from fork_run import make_chats
    make_tiny(folder/'tiny')
    make_chats(folder/'chats.jsonl')
    return folder
