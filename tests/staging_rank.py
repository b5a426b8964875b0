"""A rank of `test_staging`: loads a base together with the other one and cuts it; waits for a line of input before and after."""
import os
import sys

import torch

from llama_nb.config import LoRAConfig, ModelConfig
from llama_nb.model import base_fingerprint, load_model
from llama_nb.ranks import leave_ranks, meet, rank_device, start_ranks
from llama_nb.shards import frozen_layer_bytes, shard_base_
from llama_nb.staging import load_staged, return_freed_memory_

LORA = LoRAConfig(r=2, target_modules=['q_proj'])


def told(*words):
    "Say something and wait for the answer."
    print(*words, flush=True)
    sys.stdin.readline()


def work(load, base, device, **settings):
    "Load and cut; what the base is, and what is here."
    model = load(ModelConfig(model_name=base, **settings), LORA, device if load is load_staged else 'cpu')
    known = ','.join(base_fingerprint(model).values())
    shard_base_(model, device, after_layer=meet)
    return model, known


def main(kind, base, small, device):
    torch.set_num_threads(1)
    device = rank_device() if device == 'cuda' else 'cpu'
    start_ranks(device, 120)
    load = load_staged if kind == 'staged' else load_model
    work(load, small, device)  # whatever is imported late is here now
    return_freed_memory_()
    meet()
    told('begin', os.getpid())
    model, known = work(load, base, device)
    return_freed_memory_()
    meet()
    told('cut', known, *frozen_layer_bytes(model))
    leave_ranks()


if __name__ == '__main__': main(*sys.argv[1:])
