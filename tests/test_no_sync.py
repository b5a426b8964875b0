"""Between two log lines, no training step asks the device for a number: an answer would make the host wait for all that is queued.

On a CPU nothing has to be waited for, so what is counted is the asking itself: every operation of torch whose result the host needs (`item`, truth values, `nonzero`, ...)
and every tensor turned into Python or NumPy, with the function that asked. The branches that a GPU takes are forced: positions of taught tokens come from the collator, attention gets its borders as a tensor."""
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from tiny_run import make_tiny

ASKS = {'_local_scalar_dense', 'item', 'nonzero', 'is_nonzero', 'equal', 'masked_select', 'unique', '_unique2', 'unique_consecutive', 'allclose', 'argwhere', 'bincount'}
SITES = ('llama_nb', 'transformers', 'accelerate', 'peft', 'bitsandbytes', 'optim')


def asked_by():
    "The innermost function of the libraries that train, as `module.function`."
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if any(s in path.parts for s in SITES): return f'{path.stem}.{frame.f_code.co_name}'
        frame = frame.f_back
    return 'elsewhere'


class Asking(TorchDispatchMode):
    "Counts what asks, for each optimizer step."
    def __init__(self):
        super().__init__()
        self.steps = [Counter()]

    def note(self, what, who): self.steps[-1][f'{who}: {what}'] += 1

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f._schema.name.split('::')[1]
        if name in ASKS: self.note(name, asked_by())
        masks = name in ('index', 'index_put', 'index_put_', '_index_put_impl_') and [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
        if masks or name == 'repeat_interleave' and isinstance(args[0], torch.Tensor) and len(args) == 1: self.note(name, asked_by())
        return f(*args, **(kwargs or {}))

    def __enter__(self):
        self.patches = []
        for method in ('tolist', 'cpu', 'numpy'):
            def counted(tensor, *args, _method=method, _plain=getattr(torch.Tensor, method), **kwargs):
                self.note(_method, asked_by())
                return _plain(tensor, *args, **kwargs)
            self.patches.append(patch.object(torch.Tensor, method, counted))
        for p in self.patches: p.start()
        return super().__enter__()

    def __exit__(self, *error):
        for p in self.patches: p.stop()
        return super().__exit__(*error)


def masked(query, key, value, cu_seqlens, max_seqlen, scaling):
    "A stand-in for the kernel of a GPU that works anywhere: the same signature, and no question to the device."
    assert isinstance(max_seqlen, int)
    T, groups = query.shape[2], query.shape[1]//key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    at = torch.arange(T)
    doc = torch.bucketize(at, cu_seqlens[1:], right=True)
    mask = (doc[:, None] == doc) & (at[:, None] >= at)
    scores = (query @ key.transpose(2, 3))*scaling + torch.where(mask, 0., float('-inf')).to(query.dtype)
    return (scores.softmax(-1) @ value)[0].transpose(0, 1)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp('quiet')
    make_tiny(place/'tiny')
    return place


def trainer_of(place, name, device, logging_steps=3, **training):
    from llama_nb.config import DataConfig, LoRAConfig, ModelConfig, TrainingConfig
    from llama_nb.train import LLAMATrainer
    return LLAMATrainer(ModelConfig(str(place/'tiny'), max_length=512), LoRAConfig(r=4, lora_dropout=.1), DataConfig('alpaca', data_path='sample', val_size=0.),
                        TrainingConfig(output_dir=str(place/'runs'), run_name=name, max_steps=9, gradient_accumulation_steps=2, save_steps=1000, logging_steps=logging_steps, **training), device=device)


@pytest.mark.parametrize('compute', ['bf16', 'fp16', 'fp8'])
def test_no_question_between_logs(place, compute):
    import llama_nb.attention as attention
    import llama_nb.loss as loss
    from llama_nb.loop import PackedTrainer
    asking = Asking()

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs): asking.steps.append(Counter())
    made = PackedTrainer.train

    def train(self, *args, **kwargs):
        self.add_callback(Steps())
        with asking: return made(self, *args, **kwargs)
    kernel = lambda device, dtype=None, size=0, dropout=0., with_grad=True: 'varlen_attn'
    with patch.object(PackedTrainer, 'train', train), patch.object(attention, 'attention_kernel', kernel), patch.object(attention, '_flash', masked), \
            patch.object(loss, 'taught_in', lambda batch: batch['taught']):
        run = trainer_of(place, compute, 'cpu', compute=compute).train(progress=False)
    assert len(run.metrics('loss')) == 3
    steps = asking.steps[1:]
    assert len(steps) == 9
    host = ('packing.__call__',)  # the collator, on the host before anything is sent
    found = [{k: n for k, n in step.items() if not k.startswith(host)} for step in steps]
    for i, step in enumerate(found):
        logs = (i + 1) % 3 == 0
        if not logs: assert set(step) <= {'guards.take: tolist'} and sum(step.values()) <= 1, (i + 1, step)  # the guard's read of the step before, sent off a step ago
    asks = found[2]
    assert asks.get('trainer._maybe_log_save_evaluate: _local_scalar_dense') == 2, asks  # the stock loop's own: loss and gradient norm of a log line
    scale = 'scaling.scale: _local_scalar_dense'  # told in a log line of float16 only
    assert (scale in asks) == (compute == 'fp16'), asks
    assert set(asks) <= {'trainer._maybe_log_save_evaluate: _local_scalar_dense', 'guards.take: tolist', 'trackers.on_log: _local_scalar_dense', scale}, asks


def test_counter_sees_questions():
    "The proof would be worth nothing if the counter were blind."
    with Asking() as asking:
        t = torch.arange(4.)
        t.sum().item(), bool(t[0] > 1), t[t > 1], t.nonzero(), t.tolist(), t.numpy(), float(t[1]), torch.equal(t, t)
    counted = Counter(k.split(': ')[1] for k in asking.steps[0].elements())
    assert counted == {'_local_scalar_dense': 3, 'index': 1, 'nonzero': 1, 'tolist': 1, 'numpy': 1, 'equal': 1}, counted


def test_batches_are_pinned_and_sent_without_waiting(place):
    "On a GPU: page-locked batches, sent with `non_blocking`; checked here up to the calls themselves."
    from torch.utils.data._utils.pin_memory import pin_memory

    from llama_nb.config import TrainingConfig
    from llama_nb.packing import PackedCollator, PackedRow
    from llama_nb.loop import training_arguments
    args = {cpu: training_arguments(TrainingConfig(), place/'args', 10, 1, False, cpu) for cpu in (True, False)}
    assert [args[cpu].dataloader_pin_memory for cpu in (True, False)] == [False, True]
    assert [args[cpu].accelerator_config.non_blocking for cpu in (True, False)] == [False, True]
    batch, pinned, sent = PackedCollator(0)([PackedRow([1, 2, 3], [-100, 2, 3], (3,), (None,))]), [], []
    with patch.object(torch.Tensor, 'pin_memory', lambda t, *a: pinned.append(t) or t): out = pin_memory(batch)
    assert len(pinned) == 5 and out['max_seqlen'] == 3 and out['rows'] == [None]
    from accelerate.utils import send_to_device
    to = torch.Tensor.to
    with patch.object(torch.Tensor, 'to', lambda t, *a, **k: sent.append(k.get('non_blocking')) or to(t, *a, **k)): send_to_device(out, torch.device('cpu'), non_blocking=True)
    assert sent == [True]*5
    with patch('accelerate.data_loader.send_to_device', side_effect=send_to_device) as used:
        trainer = trainer_of(place, 'sent', 'cpu')
        with patch('llama_nb.train.training_arguments', lambda *a: args_with(training_arguments(*a), True)): trainer.train(progress=False)
    assert used.call_args_list and all(c.kwargs.get('non_blocking') for c in used.call_args_list)  # the setting reaches the loader


def args_with(args, non_blocking):
    args.accelerator_config.non_blocking = non_blocking
    return args


def test_shapes_of_the_gpu_path():
    "The fp8 product as a GPU would get it, on tensors without numbers: layouts and sizes are checked by torch's own rules for CUDA, and any question to the device is an error."
    from torch._subclasses.fake_tensor import FakeTensorMode

    import llama_nb.quantization as quantization
    from llama_nb.attention import attention_kernel
    from llama_nb.linears import lora_backward, lora_forward
    assert attention_kernel('cuda') == 'varlen_attn'
    with FakeTensorMode(), torch.no_grad(), patch.object(quantization, '_rows_to_fp8', lambda: quantization.quantize_fp8):
        new = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device='cuda')
        for rows, n, k in ((48, 64, 32), (1, 4096, 11008), (300, 1024, 4096)):
            x, A, B, grad, W = new(1, rows, k), new(16, k, dtype=torch.float32), new(n, 16, dtype=torch.float32), new(1, rows, n), new(n, k)
            eights = [*quantization.quantize_fp8(W), *quantization.quantize_fp8(new(k, n))]
            for kind, parts in (('', [W]), ('fp8', eights)):
                for bias in (None, new(n)):
                    y, low = lora_forward(x, None, A, B, bias, 2., [n, k], kind, *parts)
                    assert y.shape == grad.shape and y.dtype == torch.bfloat16 and y.device.type == 'cuda' and low.shape == (rows, 16)
                dx, _, dA, dB = lora_backward(grad, x, None, A, B, 2., [n, k], kind, parts, True, low)
                assert dx.shape == x.shape and dA.shape == A.shape and dB.shape == B.shape and dA.dtype == torch.float32
        with pytest.raises(Exception, match='col_major'): torch._scaled_mm(eights[0], eights[2], scale_a=eights[1], scale_b=eights[3].t(), out_dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize('compute', ['bf16', 'fp16', 'fp8'])
def test_no_wait_on_a_gpu(place, compute):
    "The same on a GPU, where torch itself raises at any operation that waits."
    from llama_nb.errors import ConfigError
    from llama_nb.loop import PackedTrainer
    if compute == 'fp8' and torch.cuda.get_device_capability() < (8, 9):
        with pytest.raises(ConfigError, match='compute capability 8.9'): trainer_of(place, 'gpu-fp8', 'cuda', compute=compute).train(progress=False)
        return

    class Strict(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step >= 3: torch.cuda.set_sync_debug_mode('error')  # the first steps load kernels

        def on_step_end(self, args, state, control, **kwargs):
            if control.should_log or control.should_save: torch.cuda.set_sync_debug_mode('default')
    made = PackedTrainer.train

    def train(self, *args, **kwargs):
        self.callback_handler.callbacks.insert(1, Strict())  # behind the stock one that decides whether to log
        return made(self, *args, **kwargs)
    try:
        with patch.object(PackedTrainer, 'train', train): run = trainer_of(place, f'gpu-{compute}', 'cuda', compute=compute).train(progress=False)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert len(run.metrics('loss')) == 3
