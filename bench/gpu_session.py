"""The GPU benchmark for a short booking: one process, one 7B built once, a result file after every item: `python -m bench gpu first|second [--seconds N] [--device cpu --tiny]`.

What can be wrong comes before what can be slow, and an item that fails is told and ends nothing. `first` has 330 seconds and `second` 300, by its own clock: an item begins only
if its usual time is left, and one that takes too long is stopped, earlier if others wait. `--device cpu --tiny` runs the same items with small shapes: a test, not a measurement."""
import json
import signal
import time
from contextlib import contextmanager

from bench.gpu_row import GATE_SLACK, Here, adapted, attention_errors, examples, gate, machine, ours, planner, shape_of, trl, without_checkpointing

SECONDS = dict(first=330, second=300)
MODEL = {}  # the one 7B, from the first item that needs it on


def seven_billion():
    "The model of most items, built once."
    if '7B' not in MODEL: MODEL['7B'] = adapted(shape_of('7B'), started=False)
    return MODEL['7B']


def versions():
    "What runs here."
    import torch

    from bench.common import machine as facts
    found = dict(torch=torch.__version__, cuda=torch.version.cuda, **facts())
    if Here.device == 'cuda':
        free, total = torch.cuda.mem_get_info()
        found |= dict(capability='.'.join(map(str, torch.cuda.get_device_capability())), free_gib=round(free/2**30, 1), total_gib=round(total/2**30, 1))
    return found


def kernels():
    "Errors of the Triton kernels, in roundings."
    if Here.device == 'cpu': return dict(not_run='kernels need a GPU')
    import torch

    from llama_nb.layers import kernel_errors
    return {str(d).removeprefix('torch.'): {k: round(v, 2) for k, v in kernel_errors('cuda', d).items()} for d in (torch.bfloat16, torch.float16, torch.float32)}


def unpacking():
    "Our unpacking of 4-bit weights against bitsandbytes' own: the largest difference, which has to be 0."
    import torch

    from llama_nb.linears import packed_parts, unpack
    from llama_nb.quantization import import_bitsandbytes
    bnb, found = import_bitsandbytes(), {}
    for kind in ('nf4', 'fp4'):
        for nested in (False, True):
            W = bnb.nn.Params4bit(torch.randn(256, 512), requires_grad=False, quant_type=kind, compress_statistics=nested).to(Here.device)
            gap = unpack(*packed_parts(W), torch.bfloat16) - bnb.functional.dequantize_4bit(W.data, W.quant_state).to(torch.bfloat16)
            found[f"{kind}{', nested' if nested else ''}"] = gap.abs().max().item()
    return found


def eight_bits():
    "The fp8 product of the device against the float32 twin of a CPU, relative."
    import torch

    from llama_nb.quantization import check_fp8, fp8_matmul, quantize_fp8, rows_to_fp8
    check_fp8(Here.device)
    found = {}
    for fast in (False, True):
        x, W = (torch.randn(n, 512, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (96, 256))
        true = fp8_matmul(*quantize_fp8(x), *quantize_fp8(W), torch.float32)
        here = fp8_matmul(*rows_to_fp8(x.to(Here.device)), *quantize_fp8(W.to(Here.device)), fast=fast).float().cpu()
        found['fast accumulation' if fast else 'exact accumulation'] = float(f'{((here - true).norm()/true.norm()).item():.2g}')
    return found


def batch_of(tokens):
    "A flat batch on the device."
    import torch

    from llama_nb.packing import PackedCollator, pack
    rows, n = pack(examples(shape_of('7B').vocab_size, int(1.3*tokens) + Here.seq), Here.seq), max(1, tokens//Here.seq)
    return {k: v.to(Here.device) if isinstance(v, torch.Tensor) else v for k, v in PackedCollator(0, 16)([rows[i] for i in range(n)]).items()}


def twice():
    "The same step twice: equal bits, with and without deterministic kernels?"
    import torch

    from llama_nb.loop import deterministic
    from llama_nb.loss import batch_loss
    model, batch, found = adapted(shape_of('7B', num_hidden_layers=2)), batch_of(Here.few), {}
    trained = [p for p in model.parameters() if p.requires_grad]
    for on in (False, True):
        def gradients():
            with deterministic(on): return torch.cat([g.flatten() for g in torch.autograd.grad(batch_loss(model, batch)[0], trained)])
        one, two = gradients(), gradients()
        found['deterministic' if on else 'as it comes'] = dict(same_bits=bool(torch.equal(one, two)), relative_gap=float(f'{((one - two).norm()/one.norm()).item():.2g}'))
    return found


def attention_rates():
    "Packed attention over conversations of 300 and of 2,048 tokens: milliseconds and TFLOP/s of both passes."
    import torch

    from bench.gpu_row import timed
    from llama_nb.attention import newest_flash, packed_attention
    H, D, T = (4, 16, 512) if Here.tiny else (32, 128, 16384)
    q, k, v = (torch.randn(1, H, T, D, device=Here.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    found = {}
    for length in (40, 128) if Here.tiny else (300, 2048):
        borders = torch.tensor([*range(0, T, length), T], dtype=torch.int32, device=Here.device)
        def both(): packed_attention(None, q, k, v, cu_seqlens=borders, max_seqlen=length)[0].sum().backward()
        flop = 7*T*length*H*D  # causal: forwards 2, backwards 5
        for on in (False, True):
            with newest_flash(Here.device, on) as name:
                if on and not name: continue
                seconds = timed(both, 3)
            found[f'{length} tokens{", " + name if name else ""}'] = dict(ms=round(1000*seconds, 2), tflops=round(flop/seconds/1e12, 4 if Here.tiny else 1))
    return found


def product(**settings):
    "An item: the trainer on the one 7B, with its peak beside the plan."
    def run():
        found = ours('7B', model=seven_billion(), **settings)
        if 'max_allocated_gib' in found: found['planned_of_allocated'] = round((found['planned_gib'] - .5)/found['max_allocated_gib'], 3)  # the plan counts CUDA's own half GiB
        return found
    return run


def plan_rows(): return planner('7B', seven_billion())


def drop_model():
    "Make room for other sizes."
    import gc
    MODEL.clear()
    gc.collect()
    return {}


CORRECT = {'versions': (versions, 2), 'attention against float32': (attention_errors, 10), 'kernels against torch': (kernels, 15), 'gate': (gate, 20)}
SURE = {'unpacking against bitsandbytes': (unpacking, 3), 'fp8 product against its twin': (eight_bits, 8), 'same step twice': (twice, 10)}
RATES = {'machine': (machine, 20), 'attention rates': (attention_rates, 8)}
STEPS = {'7B': (product(), 15), '7B, profile': (product(profile=True), 15), '7B, fp8': (product(compute='fp8'), 20), '7B, fp8, profile': (product(compute='fp8', profile=True), 20), 'planner, 7B': (plan_rows, 30),
         '7B, 2k tokens': (lambda: ours('7B', Here.few, model=seven_billion()), 8), '7B, compiled': (product(compiled=True), 45), "7B, torch's operations": (product(kernels=False), 12), '7B, all recomputed': (product(checkpointing=True), 15),
         '7B, no unpacked copy': (product(with_copy=False), 12), "7B, 2k tokens, torch's operations": (lambda: ours('7B', Here.few, kernels=False, model=seven_billion()), 8),
         '7B, all recomputed, inputs in host memory': (product(checkpointing=True, offload=True), 15), '7B, fp8, compiled': (product(compute='fp8', compiled=True), 45)}
AGAIN = {k: STEPS[k] for k in ('7B', '7B, fp8', '7B, 2k tokens')}  # what a second call looks at again, while the one 7B is there
PEERS = {'other sizes': (drop_model, 1), 'TRL, packed, our attention, 7B': (lambda: trl('7B', packing=True, attention='varlen'), 60), '8B': (lambda: ours('8B'), 25), '13B': (lambda: ours('13B'), 35),
         'TRL as shipped, 7B': (lambda: trl('7B'), 60), '8B, one row, all recomputed': (lambda: ours('8B', Here.seq, checkpointing=True, with_copy=False), 20)}
LAST = {'TRL, packed, our attention, Liger, 7B': (lambda: without_checkpointing('7B', packing=True, attention='varlen', liger=True), 60), **{k: STEPS[k] for k in ('7B, profile', '7B, fp8, profile', '7B, compiled')}}
# what matters first: by their usual times, all items up to the last target and the two rows of TRL fit into a call
ITEMS = dict(first={**CORRECT, **SURE, **RATES, **STEPS}, second={**CORRECT, **AGAIN, **PEERS, **SURE, **LAST})
# item, where the number stands, direction, limit; for one H200
WANTED = [('7B', ('real_tokens_per_s',), '>=', 19000), ('7B, fp8', ('real_tokens_per_s',), '>=', 23000), ('8B', ('real_tokens_per_s',), '>=', 15500), ('13B', ('real_tokens_per_s',), '>=', 8800),
          ('8B, one row, all recomputed', ('max_allocated_gib',), '<=', 7.6), ('planner, 7B', ('furthest',), '<=', .1)]


@contextmanager
def at_most(seconds):
    "Raise `TimeoutError` in the block after so many seconds."
    def stop(*_): raise TimeoutError(f'no end within {seconds:.0f} s')
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def item(run, seconds):
    "The result of an item with its time, or why there is none."
    began = time.monotonic()
    try:
        with at_most(seconds): found = run()
    except Exception as e: found = dict(not_run=f'{type(e).__name__}: {(str(e).strip().splitlines() or [""])[0][:300]}')
    if Here.device == 'cuda':
        import torch
        torch.cuda.empty_cache()
    return {**found, 'seconds': round(time.monotonic() - began, 1)}


def longest(part, name, left):
    "Seconds after which an item is stopped: four times its usual time and 10, but only twice and 10 if the items after it need the rest."
    names, usual = list(ITEMS[part]), ITEMS[part][name][1]
    after = sum(ITEMS[part][n][1] for n in names[names.index(name) + 1:])
    most = 4*usual + 10
    return min(left, most) if Here.tiny else min(left, most, max(2*usual + 10, left - after))


def wanted(rows):
    "Each target with what was found."
    made = []
    for name, path, sign, limit in WANTED:
        found = rows.get(name, {})
        for key in path: found = found.get(key) if isinstance(found, dict) else None
        made.append(dict(item=name, wanted=f'{sign} {limit:,}', found=found, reached='not measured' if found is None else bool(found >= limit if sign == '>=' else found <= limit)))
    return made


def run(part, seconds, out):
    "All items of a call; the file is written after each. Returns its path."
    began, rows, path = time.monotonic(), {}, out/f'gpu_{part}.json'
    Here.warm, Here.timed = (1, 2) if Here.tiny else (3, 5)
    for name, (f, usual) in ITEMS[part].items():
        left = seconds - (time.monotonic() - began)
        rows[name] = dict(not_run=f'no time left: {left:.0f} s') if left < (min(usual, 5) if Here.tiny else usual) else item(f, longest(part, name, left))
        print(f'{seconds - left:5.0f} s  {name:40}', json.dumps({k: v for k, v in rows[name].items() if k != 'profile'})[:400], flush=True)
        gate_found = rows.get('gate', {})
        result = dict(part=part, device=Here.device, tiny=Here.tiny, limit_s=seconds, took_s=round(time.monotonic() - began, 1), gate_passed=gate_found.get('passed'), gate_slack=GATE_SLACK, wanted=[] if Here.tiny else wanted(rows), rows=rows)
        path.write_text(json.dumps(result, indent=1) + '\n')
    for t in result['wanted']: print(f"{t['item']:40} wanted {t['wanted']:10} found {t['found']}: {t['reached']}")
    return path
