"""Runs in forked processes: everything heavy is imported and loaded once, so that a process that dies costs a second.

A child starts as a copy of a process that has loaded torch, data and model; it trains, is killed or interrupted like any other
process, and tells its exit code. No part of the library is replaced."""
import gc
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tiny_run import make_tiny, record  # noqa: F401 (`record` for the tests that fork)

from llama_nb.config import DataConfig, LoRAConfig, ModelConfig, TrainingConfig
from llama_nb.errors import exit_code, one_line
from llama_nb.runs import Run
from llama_nb.train import LLAMATrainer

torch.set_num_threads(1)  # a pool of threads does not survive a fork
NAMES = ('loss', 'eval_loss', 'grad_norm', 'learning_rate')


def make_chats(path, rows=30):
    "Short conversations of different lengths, one a line."
    words = 'the quick brown fox jumps over a lazy dog while nobody looks'.split()
    def chat(i): return [dict(role='user', content=' '.join(words[i % 7:][:2 + i % 3])), dict(role='assistant', content=' '.join(words[::-1][i % 5:][:1 + i % 4]))]
    if not path.exists(): path.write_text(''.join(json.dumps(dict(messages=chat(i), id=i)) + '\n' for i in range(rows)))
    return path


def make_trainer(place, lora=dict(), data=dict(), model=dict(), warm=True, **training):
    "A trainer on the tiny model of a folder: dropout, accumulation, several epochs; data and model are loaded."
    if not (place/'tiny').exists(): make_tiny(place/'tiny')
    trainer = LLAMATrainer(
        ModelConfig(**{'model_name': place/'tiny', 'use_4bit': False, 'max_length': 128, **model}), LoRAConfig(**{'r': 4, 'lora_dropout': 0.1, **lora}),
        DataConfig(**{'dataset_name': str(make_chats(place/'chats.jsonl')), 'val_size': 0.1, **data}),
        TrainingConfig(**{'output_dir': str(place/'runs'), 'learning_rate': 0.01, 'max_steps': 8, 'gradient_accumulation_steps': 2, 'save_steps': 1, 'eval_steps': 100, **training}), device='cpu')
    if not warm: return trainer
    config = trainer.config
    renamed(trainer, None, output_dir=str(place/'warm'), max_steps=1).train(progress=False)  # whatever is loaded late is loaded now
    trainer.config = config
    gc.collect(), gc.freeze()  # what is here stays; a child need not look through it
    return trainer


def renamed(trainer, name, **training):
    "The same trainer, loaded as it is, for a run of another name."
    trainer.config = replace(trainer.config, training=replace(trainer.config.training, run_name=name, **training))
    trainer.run = None
    return trainer


def fork(work, log=os.devnull):
    "Run `work()` in a copy of this process; returns its id. Its output and its error, in one line, go to the file `log`."
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child: return child
    to_the_end(work, log)


def to_the_end(work, log=None):
    "Run `work()` as all that is left of this process; its exit code is that of the command line, and an error is one line."
    code = 70
    try:
        if log is not None:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(out, 1), os.dup2(out, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)  # the pool of the parent is no good here; made anew while there is one thread, nobody finds it half made
        work()
        code = 0
    except BaseException as e:
        code = exit_code(e)
        os.write(1, f'{type(e).__name__}: {one_line(e, 1000)}\n'.encode())
    finally: os._exit(code)


def wait(child):
    "Exit code of a child, `-9` if it was killed."
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(trainer, name, resume=False, before=None, **training):
    "What a child does: train the run of that name."
    def work():
        renamed(trainer, name, **training)
        if before: before(trainer)
        trainer.train(resume=resume, progress=False)
    return work


def finished(trainer, name, resume=False, log=os.devnull, before=None, **training):
    "Train a run to its end in a child; returns the `Run`."
    log = Path(trainer.config.training.output_dir).parent/f'{name}.log' if log == os.devnull else Path(log)
    code = wait(fork(train(trainer, name, resume, before, **training), log))
    assert code == 0, f'exit code {code}: {log.read_text()[-2000:]}'
    return Run(Path(training.get('output_dir', trainer.config.training.output_dir))/name)


def same(run, whole):
    "Every logged number and every byte of the adapter, and an end."
    for name in NAMES: assert run.metrics(name) == whole.metrics(name), f'{run.name}: {name}'
    assert (run.folder/'adapter_model.safetensors').read_bytes() == (whole.folder/'adapter_model.safetensors').read_bytes(), run.name
    assert run.status == 'finished'
    assert not [p.name for p in run.folder.iterdir() if p.name.startswith(('.tmp', '.trash'))]


def until(condition, child, timeout_s=60):
    "Look every half millisecond until `condition()`; whether the child still lives then."
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition(): return True
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT): return False
        time.sleep(0.0005)
    raise TimeoutError('the condition never came true')


class Count:
    "How often a kind of event stands in a log that is being written; reads only what is new."
    def __init__(self, run_folder, kind): self.path, self.key, self.at, self.n = run_folder/'events.jsonl', f'"kind": "{kind}"'.encode(), 0, 0
    def __call__(self):
        if not self.path.exists(): return 0
        with open(self.path, 'rb') as f:
            f.seek(self.at)
            block = f.read()
        block = block[:block.rfind(b'\n') + 1]
        self.at, self.n = self.at + len(block), self.n + block.count(self.key)
        return self.n
