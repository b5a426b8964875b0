"""The tests of several processes once more, on GPUs over NCCL: the same functions, with other fixtures. `pytest --flags gpu tests/test_nccl.py`.

Without GPUs, LLAMA_NB_RANKS_ON=cpu runs them through the same processes of their own over gloo, which shows that this file itself works."""
import os
from unittest.mock import patch

import pytest
import test_launch
import test_launch_kernel
import test_ranks
import test_staging
import torch
from spawned_ranks import make_spawning
from test_launch import place  # noqa: F401
from test_launch_kernel import kernel  # noqa: F401
from test_ranks import packed, plain, whole  # noqa: F401

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get('LLAMA_NB_RANKS_ON', 'cuda')


@pytest.fixture(scope='module', autouse=True)
def backend(tmp_path_factory):
    "Two GPUs or a skip; then the ranks of all tests of this file are processes of their own on these."
    found = torch.cuda.device_count()
    if DEVICE == 'cuda' and found < 2: pytest.skip(f'NCCL needs two GPUs, and this machine has {found}')
    sizes = (1, 2, 4) if DEVICE == 'cpu' or found >= 4 else (1, 2)
    def make(place, **settings): return make_spawning(DEVICE, place, **settings)
    with patch.multiple(test_ranks, make_trainer=make, SIZES=sizes), patch.object(test_staging, 'DEVICE', DEVICE):
        yield 'nccl' if DEVICE == 'cuda' else 'gloo'


@pytest.fixture(scope='module')
def tiny(tmp_path_factory, backend):
    "As in conftest: a folder with a tiny model, and the trainer that ranks start from."
    folder = tmp_path_factory.mktemp('tiny')
    return folder, test_ranks.make_trainer(folder)


for module in (test_ranks, test_launch, test_launch_kernel, test_staging):
    globals().update({name: test for name, test in vars(module).items() if name.startswith('test_')})
