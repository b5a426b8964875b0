"""The Triton kernels without a GPU: Triton's own interpreter runs them on CPU tensors, in a process of its own because it is chosen at import."""
import importlib.util
import json
import os
import subprocess
import sys

import pytest

CODE = '''
import json, torch
from llama_nb.layers import kernel_errors
print(json.dumps({str(d): kernel_errors('cpu', d) for d in (torch.bfloat16, torch.float16, torch.float32)}))
'''


@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='Triton is not installed; it comes with PyTorch for CUDA')
def test_kernels_in_the_interpreter():
    done = subprocess.run([sys.executable, '-c', CODE], env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for dtype, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert len(found) == 11
        for name, error in found.items(): assert error < (32 if dtype == 'torch.float32' else 1), (dtype, name, error)  # in roundings of the dtype
