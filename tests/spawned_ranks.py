"""Ranks in processes of their own, for GPUs: a process that has loaded torch with CUDA cannot be forked. Each loads its trainer from the config.

`python tests/spawned_ranks.py FILE` is one rank; FILE holds what it does, written by `dill`, because tests pass functions of their own."""
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import dill
import torch
from fork_run import make_trainer, to_the_end
from tiny_run import ENV

from llama_nb.train import LLAMATrainer


class Spawning:
    "Stands for the loaded trainer of the forked tests: a config and a device, which each rank makes a trainer of."
    def __init__(self, config, device): self.config, self.device, self.run = config, torch.device(device), None

    def start_rank(self, log, *rank):
        "Start one rank; returns its process id, as `fork` does."
        handle, path = tempfile.mkstemp(suffix='.rank')
        with os.fdopen(handle, 'wb') as f: dill.dump((self.config, self.device.type, *rank), f, recurse=True)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try: return os.posix_spawn(sys.executable, [sys.executable, __file__, path], ENV, file_actions=[(os.POSIX_SPAWN_DUP2, out, 1), (os.POSIX_SPAWN_DUP2, out, 2)])
        finally: os.close(out)


def make_spawning(device, place, warm=True, **settings):
    "As `make_trainer`, for ranks on a device; `deterministic`, because tests compare bits."
    return Spawning(make_trainer(place, warm=False, deterministic=device != 'cpu', **settings).config, device)


def main(path):
    config, device, number, size, port, name, resume, before, timeout_s, training = dill.loads(Path(path).read_bytes())
    os.unlink(path)
    if size > 1:
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    training = dict(run_name=name, num_processes=size, ddp_timeout=timeout_s) | training
    def work():
        config_here = replace(config, training=replace(config.training, **training))
        trainer = LLAMATrainer.from_config(config_here, device=None if device == 'cuda' else device)
        if before: before(trainer, number)
        trainer.train(resume=resume, progress=False)
    to_the_end(work)


if __name__ == '__main__': main(*sys.argv[1:])
