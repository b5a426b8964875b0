"""While two processes load a base and cut it into parts, their machine holds about one copy of it; their memory is watched from outside."""
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from forked_ranks import free_port
from safetensors.torch import save_file
from tiny_run import ENV, record
from transformers import LlamaConfig

from llama_nb.memory import weight_bytes

pytestmark = pytest.mark.skipif(not hasattr(os, 'memfd_create') or not os.path.exists('/proc/self/smaps_rollup'), reason='needs Linux')
DEVICE = 'cpu'  # where the parts go; `test_nccl` sets another
WIDTH, INNER = 512, 2048  # 4.2 million weights a layer, 2.2 MB in 4 bits


def random_llama(folder, layers, width=WIDTH, inner=INNER):
    "A random model in the Hugging Face format, in bfloat16; returns its config."
    folder.mkdir()
    shape = LlamaConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8, vocab_size=512,
                        architectures=['LlamaForCausalLM'], dtype='bfloat16')
    g = torch.Generator().manual_seed(0)
    def weights(*size): return (torch.randn(*size, generator=g)/50).bfloat16()
    found = {'model.embed_tokens.weight': weights(512, width), 'lm_head.weight': weights(512, width), 'model.norm.weight': torch.ones(width).bfloat16()}
    for i in range(layers):
        for part, size in dict(q_proj=(width, width), k_proj=(width, width), v_proj=(width, width), o_proj=(width, width)).items():
            found[f'model.layers.{i}.self_attn.{part}.weight'] = weights(*size)
        for part, size in dict(gate_proj=(inner, width), up_proj=(inner, width), down_proj=(width, inner)).items(): found[f'model.layers.{i}.mlp.{part}.weight'] = weights(*size)
        for part in ('input_layernorm', 'post_attention_layernorm'): found[f'model.layers.{i}.{part}.weight'] = torch.ones(width).bfloat16()
    save_file(found, folder/'model.safetensors', metadata={'format': 'pt'})
    shape.save_pretrained(folder)
    return shape


def shared_bytes(pids):
    "Bytes of the files in memory that these processes have open or mapped, each counted once and whole."
    files = {}
    for pid in pids:
        for fd in Path(f'/proc/{pid}/fd').iterdir():
            try:
                if 'memfd:llama_nb' in os.readlink(fd): files[fd.stat().st_ino] = fd.stat().st_size
            except OSError: pass  # closed meanwhile
        for line in Path(f'/proc/{pid}/maps').read_text().splitlines():
            if 'memfd:llama_nb' not in line: continue
            span, _, _, _, inode = line.split()[:5]
            start, end = (int(n, 16) for n in span.split('-'))
            files[int(inode)] = max(files.get(int(inode), 0), end - start)
    return sum(files.values())


def own_bytes(pid):
    "What a process has allocated for itself; pages of files on the disk, which the system can drop at any time, do not count."
    return 1024*int(re.search(r'Pss_Anon:\s+(\d+)', Path(f'/proc/{pid}/smaps_rollup').read_text())[1])


def held(pids): return sum(map(own_bytes, pids)) + shared_bytes(pids)


class Ranks:
    "Two processes that load a base together."
    def __init__(self, kind, base, small):
        env = {**ENV, 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
        command = [sys.executable, str(Path(__file__).with_name('staging_rank.py')), kind, str(base), str(small), DEVICE]
        self.processes = [subprocess.Popen(command, env={**env, 'RANK': str(i), 'LOCAL_RANK': str(i)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           stderr=subprocess.PIPE, text=True) for i in range(2)]

    def said(self, word):
        "The line of each that begins with a word."
        found = []
        for p in self.processes:
            line = next((line for line in iter(p.stdout.readline, '') if line.startswith(word)), None)
            assert line is not None, p.communicate()[1][-3000:]
            found.append(line.split()[1:])
        return found

    def go_on(self):
        for p in self.processes:
            p.stdin.write('\n')
            p.stdin.flush()

    def end(self):
        for p in self.processes: p.communicate(timeout=60)
        assert [p.returncode for p in self.processes] == [0, 0]


def measure(kind, base, small):
    "Highest and last memory of both on top of what they had before; what the base is, and what each has of it."
    ranks = Ranks(kind, base, small)
    pids = [int(pid) for pid, in ranks.said('begin')]
    before, peak, watching = held(pids), [0], True
    def watch():
        while watching:
            peak[0] = max(peak[0], held(pids))
            time.sleep(0.005)
    thread = threading.Thread(target=watch)
    thread.start()
    ranks.go_on()
    try: found = ranks.said('cut')
    finally:
        watching = False
        thread.join()
    after = held(pids)
    ranks.go_on()
    ranks.end()
    return peak[0] - before, after - before, found


def one_copy(tmp_path, layers, *sizes):
    shape = random_llama(tmp_path/'base', layers, *sizes)
    random_llama(tmp_path/'small', 1, 64, 128)
    copy = sum(weight_bytes(shape))
    peak, after, ranks = measure('staged', tmp_path/'base', tmp_path/'small')
    objects, layer = 20_000_000, copy/layers  # what Python needs for two models without weights
    assert peak <= copy + 2*layer + objects and after <= copy + objects, (peak/copy, after/copy)
    assert all(int(here) <= 0.505*int(whole) for _, here, whole in ranks), ranks
    assert ranks[0] == ranks[1]
    record('two processes load a base and cut it', packed_mb=round(copy/1e6), peak_copies=round(peak/copy, 2), copies_afterwards=round(after/copy, 2))
    return copy, ranks[0][0], peak


def test_two_processes_need_one_copy(tmp_path): one_copy(tmp_path, 24)


@pytest.mark.slow
def test_each_for_itself_needs_two(tmp_path):
    "The larger base, about 200 MB in 4 bits; and what the measurement says if each process loads it: two copies, of the same numbers."
    copy, known, peak = one_copy(tmp_path, 24, 1024, 4096)
    assert peak <= 1.2*copy, peak/copy
    peak, _, ranks = measure('apart', tmp_path/'base', tmp_path/'small')
    assert peak > 1.8*copy and {r[0] for r in ranks} == {known}, peak/copy
    record('two processes load a base, each for itself', packed_mb=round(copy/1e6), peak_copies=round(peak/copy, 2))
