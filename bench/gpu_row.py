"""One row of the GPU benchmark, in a process of its own: `python -m bench.gpu_row <row> <report.json> [--device cpu] [--tiny]`.

Models have real shapes and random weights, made layer by layer on the device and put into 4 bits at once: no download, no disk. `--tiny` is the CPU twin: every line of
our rows with small shapes. Torch is imported inside the functions, so that the names of the rows can be had without it."""
import argparse
import copy
import importlib.util
import json
import logging
import math
import os
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

R, ALPHA, RATE = 16, 32, 2e-4
SHAPES = {'7B': dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000),
          '13B': dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=40, vocab_size=32000),
          '8B': dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256)}
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512)


class Here:
    "Where and how large; set once from the command line."
    device, tiny, seq, tokens, few, warm, timed, median = 'cuda', False, 2048, 16384, 2048, 3, 8, 300

    @classmethod
    def set(cls, device, tiny):
        cls.device, cls.tiny = device, tiny
        cls.seq, cls.tokens, cls.few, cls.warm, cls.timed, cls.median = (128, 512, 128, 1, 2, 40) if tiny else (2048, 16384, 2048, 3, 8, 300)


def shape_of(name, **more):
    "A `LlamaConfig` of that size; a small one for the twin."
    from transformers import LlamaConfig
    return LlamaConfig(**{**(SMALL if Here.tiny else SHAPES[name]), 'max_position_embeddings': 4096, 'tie_word_embeddings': False, 'use_cache': False, **more})


def examples(vocab, tokens, seed=0):
    "Conversations of at least so many tokens together: lognormal lengths, at most a row, 45 % taught, in one to three turns."
    from llama_nb.conversation import Example
    rng, made, total = random.Random(seed), [], 0
    while total < tokens:
        n, turns = min(Here.seq, max(24, round(rng.lognormvariate(math.log(Here.median), 0.7)))), rng.choice((1, 2, 3))
        ids, labels, at = [rng.randrange(3, vocab) for _ in range(n)], [-100]*n, 0
        for k in range(turns):
            end = n*(k + 1)//turns
            taught = end - max(1, round(.45*(end - at)))
            labels[taught:end], at = ids[taught:end], end
        made.append(Example(input_ids=ids, labels=labels, spans=(), row=None))
        total += n
    return made


def build(shape, dtype=None, seed=0):
    "A Llama of random weights, its linears in nested NF4; one matrix at a time in 16 bits."
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from llama_nb.quantization import import_bitsandbytes
    bnb, dtype = import_bitsandbytes(), dtype or torch.bfloat16
    g = torch.Generator(Here.device).manual_seed(seed)
    def normal(*size): return (0.02*torch.randn(*size, generator=g, device=Here.device, dtype=torch.float32)).to(torch.bfloat16).to(dtype)
    with torch.device('meta'): model = AutoModelForCausalLM.from_config(copy.deepcopy(shape), dtype=dtype)  # it keeps its settings in there
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, old in list(part.named_children()):
                if not isinstance(old, torch.nn.Linear): continue
                with torch.device('meta'): new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=dtype, quant_type='nf4', compress_statistics=True)
                new.weight = bnb.nn.Params4bit(normal(old.out_features, old.in_features), requires_grad=False, quant_type='nf4', compress_statistics=True, module=new).to(Here.device)
                new.support_avx512bf16_for_cpu = False
                setattr(part, name, new)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) or type(module) is torch.nn.Linear: module.weight = torch.nn.Parameter(normal(*module.weight.shape), requires_grad=False)
        elif 'RMSNorm' in type(module).__name__: module.weight = torch.nn.Parameter(torch.ones(module.weight.shape, device=Here.device, dtype=dtype), requires_grad=False)
    with torch.device(Here.device): model.model.rotary_emb = LlamaRotaryEmbedding(shape)  # frequencies in float32, whatever the dtype
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not left, left
    model.is_loaded_in_4bit = True  # what peft goes by
    return model


def adapted(shape, dtype=None, fast=True, started=True):
    "LoRA on every linear, in training mode."
    import torch

    from llama_nb.config import LoRAConfig
    from llama_nb.fastpath import apply_fast_path_
    from llama_nb.lora import add_lora
    torch.manual_seed(0)
    model = add_lora(build(shape, dtype), LoRAConfig(r=R, lora_alpha=ALPHA, target_modules='all-linear'))
    if started:  # an update that does something: with B = 0 half of the gradients are zero
        for n, p in model.named_parameters():
            if 'lora_B' in n: p.data.copy_(0.02*torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    if fast: apply_fast_path_(model)
    return model.train()


class Clock:
    "Time of each optimizer step by events that nobody waits for before the end, real tokens, and peak memory after the warm-up."
    def __init__(self): self.marks, self.tokens, self.kept = [self.mark()], [], 0

    def mark(self):
        if Here.device != 'cuda': return time.perf_counter()
        import torch
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(self, tokens):
        "The end of a step of so many real tokens, a number or a tensor on the device."
        import torch
        self.marks.append(self.mark())
        self.tokens.append(tokens)
        if len(self.tokens) == Here.warm and Here.device == 'cuda': torch.cuda.reset_peak_memory_stats()

    def report(self, shape, made, **more):
        "Median and spread of the steps after the warm-up."
        from statistics import median

        import torch
        if Here.device == 'cuda': torch.cuda.synchronize()
        seconds = [a.elapsed_time(b)/1000 if Here.device == 'cuda' else b - a for a, b in zip(self.marks, self.marks[1:])][Here.warm:]
        tokens = [float(t) for t in self.tokens][Here.warm:]
        rates = sorted(t/s for t, s in zip(tokens, seconds))
        lengths = [len(e.input_ids) for e in made]
        s = sum(n*n for n in lengths)/sum(lengths)  # length of the conversation that a token finds itself in, on average
        N = shape.num_hidden_layers*(2*shape.hidden_size**2 + 2*shape.hidden_size*shape.num_key_value_heads*shape.hidden_size//shape.num_attention_heads + 3*shape.hidden_size*shape.intermediate_size)
        flop = 4*(N + shape.vocab_size*shape.hidden_size) + 7*s*shape.hidden_size*shape.num_hidden_layers  # causal: half of s, as 2 and 5 count already
        taught = sum(sum(l != -100 for l in e.labels) for e in made)/sum(lengths)
        memory = dict(max_allocated_gib=round(torch.cuda.max_memory_allocated()/2**30, 2), max_reserved_gib=round(torch.cuda.max_memory_reserved()/2**30, 2)) if Here.device == 'cuda' else {}
        return dict(real_tokens_per_s=round(median(rates), 1), slowest=round(rates[0], 1), fastest=round(rates[-1], 1), supervised_tokens_per_s=round(median(rates)*taught, 1), steps=len(rates),
                    warm_up_steps=Here.warm, tokens_per_step=round(median(tokens)), mean_document=round(s), mfu_of_790_tflops=round(median(rates)*flop/790e12, 3), **memory, **more)


def set_kernels_(model, on):
    "One kernel each for RoPE, SwiGLU, and norm with residual stream, or torch's operations."
    for module in model.modules():
        if isinstance(getattr(module, 'kernels', None), bool): module.kernels = on


def profiled(trainer):
    "The kernels that take most of the last step, by their own time on the device."
    import torch
    from transformers import TrainerCallback
    kind = torch.profiler.ProfilerActivity
    watch, found = torch.profiler.profile(activities=[kind.CPU, kind.CUDA] if Here.device == 'cuda' else [kind.CPU]), []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == args.max_steps - 1: watch.start()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step != args.max_steps: return
            if Here.device == 'cuda': torch.cuda.synchronize()
            watch.stop()
            own = lambda e: getattr(e, 'self_device_time_total', 0) if Here.device == 'cuda' else e.self_cpu_time_total
            events = [e for e in watch.key_averages() if own(e) > 0 and (Here.device == 'cpu' or str(e.device_type).endswith('CUDA'))]
            whole = sum(map(own, events)) or 1
            found.extend(dict(kernel=e.key[:120], calls=e.count, ms=round(own(e)/1000, 2), share=round(own(e)/whole, 4)) for e in sorted(events, key=own, reverse=True)[:40])
    trainer.add_callback(Watch())
    return found


def ours(size, tokens=None, compute='bf16', checkpointing='auto', with_copy=True, compiled=False, kernels=True, model=None, profile=False, offload='auto'):
    "Our trainer with its guards, as the planner sets it up; a `model` that is given is trained from its own start and left as it came."
    import torch
    from transformers import PrinterCallback, TrainerCallback

    from llama_nb.attention import attention_kernel
    from llama_nb.config import LoRAConfig, ModelConfig, TrainingConfig
    from llama_nb.fastpath import fp8_copies_
    from llama_nb.layers import recompute_norms_
    from llama_nb.linears import compile_layers_, uncompile_layers_, unpack_copies_, unpack_scales_
    from llama_nb.trackers import guards
    from llama_nb.memory import decide, measured_layer_bytes, plan
    from llama_nb.packing import pack
    from llama_nb.quantization import check_fp8
    from llama_nb.runs import create_run
    from llama_nb.loop import PackedTrainer, batch_collator, room_bytes, set_checkpointing_, training_arguments
    tokens, steps, shape = tokens or Here.tokens, Here.warm + Here.timed, shape_of(size)
    if compute == 'fp8': check_fp8(Here.device)
    made = examples(shape.vocab_size, int(1.2*tokens*steps) + Here.seq)
    rows, lora = pack(made, Here.seq), LoRAConfig(r=R, lora_alpha=ALPHA, target_modules='all-linear')
    given, model = model is not None, adapted(shape, started=False) if model is None else model
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad} if given else {}
    set_kernels_(model, kernels)
    with tempfile.TemporaryDirectory() as folder:
        t = TrainingConfig(output_dir=folder, per_device_train_batch_size=max(1, tokens//Here.seq), gradient_checkpointing=checkpointing, activation_offloading=offload, compute=compute, kernels=kernels, max_steps=steps, save_steps=10**6, logging_steps=10**6, learning_rate=RATE)
        planned = decide(ModelConfig(max_length=Here.seq), room_bytes() if Here.device == 'cuda' else 2**36, t, lora, with_copy=with_copy, shape=shape, layer_bytes=measured_layer_bytes(model))
        s = planned.settings
        if not with_copy and s['decoded_scales']:  # the least memory: no unpacked scales either
            planned = plan(*planned.inputs[1:4], shape=shape, checkpointed_layers=s['checkpointed_layers'], recomputed_norms=s['recomputed_norms'], offloaded_inputs=s['offloaded_inputs'], layer_bytes=measured_layer_bytes(model))
            s = planned.settings
        set_checkpointing_(model, s['checkpointed_layers'], s['offloaded_inputs'])
        copies = unpack_copies_(model) if s['dequantised_copy'] else unpack_scales_(model) if s['decoded_scales'] else 0
        if compute == 'fp8': copies = fp8_copies_(model)
        recompute_norms_(model, s['recomputed_norms'])
        if compiled:
            torch._dynamo.reset()  # rows of the twin share a process
            compile_layers_(model, backend='aot_eager' if Here.tiny else 'inductor')
        run = create_run(folder, 'bench', None)
        args = training_arguments(t, run.folder, steps, s['rows'], False, Here.device == 'cpu')
        size = s['rows']
        assert len(rows) >= steps*size, 'a second epoch would change the order'
        trainer = PackedTrainer(model, args, batch_collator(0, size, Here.seq, compiled), rows, callbacks=guards(run, progress=False), run=run, fast_path=True, dtype=torch.bfloat16, config=t)
        trainer.remove_callback(PrinterCallback)
        clock = Clock()

        class Steps(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs): clock.step(sum(rows.num_tokens[size*(state.global_step - 1):size*state.global_step]))  # without filling
        trainer.add_callback(Steps())
        table = profiled(trainer) if profile else []
        try: trainer.train()
        finally:
            if given:
                for n, p in model.named_parameters():
                    if n in start: p.data.copy_(start[n])
                for undo in (unpack_copies_, unpack_scales_, fp8_copies_): undo(model, on=False)
                uncompile_layers_(model)
                set_checkpointing_(model, False)
                set_kernels_(model, True)
                recompute_norms_(model, False)
                model.zero_grad()
        head = shape.hidden_size//shape.num_attention_heads
        kernel = attention_kernel(Here.device, torch.bfloat16, (tokens + 128*100)*shape.num_attention_heads*head)
        more = dict(profile=table) if profile else {}
        return clock.report(shape, made, **more, kernels=kernels, attention=kernel, recomputed_layers=s['checkpointed_layers'], offloaded_inputs=s['offloaded_inputs'], recomputed_norms=s['recomputed_norms'], copies_gib=round(copies/2**30, 2), compute=compute, compiled=compiled, planned_gib=round(planned.total/2**30, 2), loss=trainer.state.log_history[-1].get('train_loss'))


def wanted(*packages):
    "The first package that is not there."
    return next((p for p in packages if importlib.util.find_spec(p) is None), None)


def word_tokenizer():
    "A tokenizer of three words: conversations come as numbers already."
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({'<unk>': 0, '<s>': 1, '</s>': 2}, '<unk>')), bos_token='<s>', eos_token='</s>', pad_token='</s>', unk_token='<unk>')


def trl(size, tokens=None, packing=False, attention='sdpa', liger=False, made_by=None, **settings):
    "TRL's SFTTrainer on the same conversations, with its own defaults but for what is named."
    if missing := wanted('trl', 'datasets', *(('liger_kernel',) if liger else ())): return dict(not_run=f'{missing} is not installed')
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AttentionInterface, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from llama_nb.attention import packed_attention
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
        apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False)
    tokens, steps, shape = tokens or Here.tokens, Here.warm + Here.timed, shape_of(size)
    made = examples(shape.vocab_size, int(1.3*tokens*steps) + Here.seq)
    if attention == 'varlen':  # their collator gives the borders under transformers' names for them
        AttentionInterface.register('varlen', lambda module, q, k, v, mask, cu_seq_lens_q=None, max_length_q=None, **kw: packed_attention(module, q, k, v, None, cu_seqlens=cu_seq_lens_q, max_seqlen=None if max_length_q is None else int(max_length_q), **kw))
    model, tokenizer = made_by(shape) if made_by else (build(shape), word_tokenizer())
    if not made_by: model.set_attn_implementation(attention)
    rows = 1 if packing else min(8, max(1, tokens//Here.seq))
    mean = sum(len(e.input_ids) for e in made)/len(made)
    if packing: rows, accumulation = max(1, tokens//Here.seq), 1
    else: accumulation = max(1, round(tokens/mean/rows))  # as many real tokens in a step
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, max_steps=steps, report_to='none', save_strategy='no', logging_strategy='no', disable_tqdm=True, use_cpu=Here.device == 'cpu', packing=packing, max_length=Here.seq,
                         per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, learning_rate=RATE, **settings)
        data = Dataset.from_list([{'input_ids': e.input_ids, 'assistant_masks': [int(l != -100) for l in e.labels]} for e in made])
        lora = None if made_by else LoraConfig(r=R, lora_alpha=ALPHA, target_modules='all-linear', task_type='CAUSAL_LM')
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=lora)
        clock, seen, inner = Clock(), [], trainer.training_step

        def training_step(model, inputs, *args, **kwargs):
            mask = inputs.get('attention_mask')
            seen.append(inputs['input_ids'].numel() if mask is None else mask.sum())
            return inner(model, inputs, *args, **kwargs)
        trainer.training_step = training_step

        class Steps(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                clock.step(sum(seen))
                seen.clear()
        trainer.add_callback(Steps())
        trainer.train()
        recompute = getattr(args, 'activation_checkpointing', getattr(args, 'gradient_checkpointing', None))
        return clock.report(shape, made, attention=attention, recomputed_layers=shape.num_hidden_layers if recompute else 0, rows=rows, accumulation=accumulation, liger=liger)


def without_checkpointing(size, **more):
    "TRL without recomputing, if that fits."
    try: return trl(size, gradient_checkpointing=False, **more)
    except Exception as e:
        if 'out of memory' not in str(e): raise
        return dict(not_run='without recomputing it does not fit in memory')


def written(shape, folder):
    "Random weights of the same kind as a folder in 16 bits, which a loader that knows files only can read."
    import torch
    from transformers import LlamaForCausalLM
    g = torch.Generator(Here.device).manual_seed(0)
    with torch.device('meta'): model = LlamaForCausalLM(copy.deepcopy(shape)).to(torch.bfloat16)
    made = {n: torch.ones(p.shape, dtype=torch.bfloat16) if 'norm' in n else (0.02*torch.randn(*p.shape, generator=g, device=Here.device)).to('cpu', torch.bfloat16) for n, p in model.named_parameters()}
    model.load_state_dict(made, strict=True, assign=True)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def unsloth(size, tokens=None, checkpointing='unsloth', packing=False):
    "unsloth's loader and layers under TRL's trainer, on weights written to a folder; as shipped it recomputes its own way."
    if missing := wanted('unsloth'): return dict(not_run=f'{missing} is not installed')
    from unsloth import FastLanguageModel  # before transformers and trl, as it asks for

    def load(shape):
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = FastLanguageModel.from_pretrained(str(written(shape, folder)), max_seq_length=Here.seq, load_in_4bit=True)
            model = FastLanguageModel.get_peft_model(model, r=R, lora_alpha=ALPHA, lora_dropout=0, bias='none', use_gradient_checkpointing=checkpointing, random_state=0,
                                                     target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'])
            return model, tokenizer
    return {**trl(size, tokens, packing, attention="unsloth's choice", made_by=load), 'checkpointing': str(checkpointing)}


def relative(gap, reference):
    "A gap relative to its reference, in three digits; infinite beside a reference of 0, unless there is no gap."
    return float(f'{abs(gap/reference):.3g}') if reference else math.inf if gap else 0.


GATE_SLACK = 1.1  # both errors are rounding noise of bf16, near 3 %


def gate(size='7B'):
    "Before any number: loss and LoRA gradients of two layers, ours packed in bf16 and fp8 and peft's path one conversation at a time in bf16, against peft's in float32."
    import torch

    from llama_nb.fastpath import fp8_copies_
    from llama_nb.loss import batch_loss
    from llama_nb.packing import PackedCollator, pack
    shape = shape_of(size, num_hidden_layers=2)
    made = examples(shape.vocab_size, min(Here.tokens//8, 2048))
    made = [e for e in made if len(e.input_ids) <= Here.seq//2][:8]
    def tensor(x): return torch.tensor([x], device=Here.device)

    def alone(dtype):
        model, total = adapted(shape, dtype, fast=False), 0.
        taught = sum(l != -100 for e in made for l in e.labels[1:])
        for e in made:
            with torch.autocast(Here.device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16): logits = model(input_ids=tensor(e.input_ids), use_cache=False).logits[0]
            loss = torch.nn.functional.cross_entropy(logits[:-1].float(), tensor(e.labels)[0, 1:], reduction='sum')/taught
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    def packed(fp8=False):
        model = adapted(shape)
        if fp8: fp8_copies_(model)
        total, taught = 0., sum(l != -100 for e in made for l in e.labels[1:])
        for row in pack(made, Here.seq):
            batch = {k: v.to(Here.device) if isinstance(v, torch.Tensor) else v for k, v in PackedCollator(0)([row]).items()}
            loss = batch_loss(model, batch, taught)[0]
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    true, grads = alone(torch.float32)
    def off(found): return dict(loss=relative(found[0] - true, true), gradients=relative((found[1] - grads).norm().item(), grads.norm().item()))
    result = dict(loss=round(true, 4), ours=off(packed()), stock=off(alone(torch.bfloat16)))
    result['passed'] = true > 0 and result['ours']['loss'] < 1e-3 and result['ours']['gradients'] <= GATE_SLACK*result['stock']['gradients']
    try: result['fp8'] = off(packed(True))
    except Exception as e: result['fp8'] = dict(not_run=f'{type(e).__name__}: {str(e)[:200]}')
    return result


def timed(f, repeats=10):
    "Seconds of one call: the best of three series."
    import torch
    if Here.tiny: repeats = 2
    best = math.inf
    f()
    for _ in range(3):
        if Here.device == 'cuda': torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats): f()
        if Here.device == 'cuda': torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began)/repeats)
    return best


def attention_errors():
    "Attention with fewer key heads against float32, one conversation at a time: result and gradients."
    import torch

    from llama_nb.attention import attention_kernel, packed_attention
    def new(*size): return torch.randn(*size, device=Here.device, dtype=torch.bfloat16)
    H, K, D, borders = 32 if not Here.tiny else 4, 8 if not Here.tiny else 2, 128 if not Here.tiny else 16, [0, 40, 41, 100, 128] if Here.tiny else [0, 300, 301, 1500, 2048]
    q, k, v = (new(1, heads, borders[-1], D).requires_grad_() for heads in (H, K, K))
    out = packed_attention(None, q, k, v, cu_seqlens=torch.tensor(borders, dtype=torch.int32, device=Here.device), max_seqlen=max(b - a for a, b in zip(borders, borders[1:])))[0]
    back = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, (q, k, v), back)]
    wide = [t.float().detach().requires_grad_() for t in (q, k, v)]
    parts = [torch.nn.functional.scaled_dot_product_attention(wide[0][:, :, a:b], *(t[:, :, a:b].repeat_interleave(H//K, 1) for t in wide[1:]), is_causal=True) for a, b in zip(borders, borders[1:])]
    true = torch.cat(parts, 2).transpose(1, 2)
    true = [true, *torch.autograd.grad(true, wide, back.float())]
    return dict(kernel=attention_kernel(Here.device), errors=[float(f'{((a.float() - b).norm()/b.norm()).item():.2g}') for a, b in zip(ours, true)])


def machine():
    "What the estimates assume: rates of products in bf16 and fp8, of copying and unpacking, and attention with fewer key heads against one conversation at a time."
    import torch

    from llama_nb.linears import packed_parts, unpack
    from llama_nb.quantization import import_bitsandbytes, check_fp8, fp8_matmul, rows_to_fp8
    shape, found = shape_of('7B'), {}
    d, f, T = shape.hidden_size, shape.intermediate_size, Here.tokens
    def new(*size): return torch.randn(*size, device=Here.device, dtype=torch.bfloat16)
    try: check_fp8(Here.device)
    except Exception as e: found['fp8'] = str(e)
    for n, k in ((d, d), (f, d), (d, f)):
        x, W = new(T, k), new(n, k)
        rate = lambda call: round(2*T*n*k/timed(call)/1e12, 4 if Here.tiny else 1)
        found[f'bf16 {T}x{k}x{n}, TFLOP/s'] = rate(lambda: x @ W.t())
        if 'fp8' not in found:
            a, b = rows_to_fp8(x), rows_to_fp8(W)
            found[f'fp8 {T}x{k}x{n}, TFLOP/s'] = rate(lambda: fp8_matmul(*a, *b, fast=True))
            found[f'fp8 {T}x{k}x{n} and rounding the input, TFLOP/s'] = rate(lambda: fp8_matmul(*rows_to_fp8(x), *b, fast=True))
        del x, W
    big = torch.empty((1 << 14 if Here.tiny else 1 << 30), device=Here.device, dtype=torch.uint8)
    there = torch.empty_like(big)
    found['copy, GB/s'] = round(2*big.numel()/timed(lambda: there.copy_(big))/1e9, 1)
    del big, there
    packed = packed_parts(import_bitsandbytes().nn.Params4bit(new(f, d), requires_grad=False, quant_type='nf4', compress_statistics=True).to(Here.device))
    seconds = timed(lambda: unpack(*packed, torch.bfloat16))
    found['unpacking NF4, GB/s'] = round(2.5*f*d/seconds/1e9, 2)
    found['unpacking a 7B model once, ms'] = round(1000*seconds*6.476e9/(f*d), 1)
    found['attention with fewer key heads'] = attention_errors()
    return found


def planner(size='7B', model=None):
    "Planned against measured peak of a step, over eight settings; every token taught, as the plan assumes."
    import torch

    from llama_nb.config import LoRAConfig, ModelConfig, TrainingConfig
    from llama_nb.loss import batch_loss
    from llama_nb.memory import CUDA_CONTEXT_BYTES, measured_layer_bytes, plan
    from llama_nb.loop import set_checkpointing_
    shape = shape_of(size)
    model, L, rows = model or adapted(shape, started=False), shape.num_hidden_layers, []
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().cpu().clone() for p in trained]  # not where memory is measured
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    layer_bytes = measured_layer_bytes(model)
    context = CUDA_CONTEXT_BYTES if Here.device == 'cuda' else 0  # 0 plans for a CPU; the allocator does not count it
    for n, recomputed in ((1, 0), (1, L), (2, L//2), (4, 0), (4, L), (8, 0), (8, L//2), (8, L)):
        t = TrainingConfig(per_device_train_batch_size=n)
        planned = [plan(ModelConfig(max_length=Here.seq), t, LoRAConfig(r=R, target_modules='all-linear'), shape=shape, context_bytes=context, checkpointed_layers=recomputed, layer_bytes=b).total - context for b in (None, layer_bytes)]
        set_checkpointing_(model, recomputed)
        ids = torch.randint(3, shape.vocab_size, (1, n*Here.seq), device=Here.device)
        labels = ids.clone()
        labels[0, ::Here.seq] = -100
        batch = dict(input_ids=ids, labels=labels, position_ids=torch.arange(Here.seq, device=Here.device).repeat(n)[None], cu_seqlens=torch.arange(0, n*Here.seq + 1, Here.seq, dtype=torch.int32, device=Here.device), max_seqlen=Here.seq,
                     taught=(torch.arange(1, n*Here.seq)[torch.arange(1, n*Here.seq) % Here.seq != 0] - 1).to(Here.device))  # as from the collator: no wait for the device
        measured = None
        try:
            for _ in range(2):
                if Here.device == 'cuda':
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                batch_loss(model, batch)[0].backward()
                optimizer.step()
                optimizer.zero_grad()
            if Here.device == 'cuda': measured = torch.cuda.max_memory_allocated()
        except torch.OutOfMemoryError: measured = 'out of memory'
        ratio = lambda p: round(p/measured, 3) if isinstance(measured, int) else None
        gib = lambda b: round(b/2**30, 2) if isinstance(b, int) else b
        rows.append(dict(rows=n, recomputed_layers=recomputed, planned_gib=gib(planned[0]), calibrated_gib=gib(planned[1]), measured_gib=gib(measured), planned_of_measured=ratio(planned[0]), calibrated_of_measured=ratio(planned[1])))
    set_checkpointing_(model, False)  # left as it came
    for p, before in zip(trained, start): p.data.copy_(before)
    model.zero_grad()
    ratios = [r['calibrated_of_measured'] for r in rows if r['calibrated_of_measured']]
    return dict(settings=rows, furthest=round(max(abs(r - 1) for r in ratios), 3) if ratios else None)


PARTS = {
    'a': {'machine': machine, 'gate': gate,
          'A  TRL as shipped, 7B': lambda: trl('7B'),
          'B  TRL, packing, our varlen attention, 7B': lambda: trl('7B', packing=True, attention='varlen'),
          'C  B with Liger, no recomputing, 7B': lambda: without_checkpointing('7B', packing=True, attention='varlen', liger=True),
          'D  unsloth as shipped, 7B': lambda: unsloth('7B'), 'E  unsloth, no recomputing, packing, 7B': lambda: unsloth('7B', checkpointing=False, packing=True),
          'F  llama_nb, 7B': lambda: ours('7B'),
          'G  llama_nb, all layers recomputed, 7B': lambda: ours('7B', checkpointing=True),
          'H  llama_nb, fp8, 7B': lambda: ours('7B', compute='fp8'),
          'F  again': lambda: ours('7B')},
    'b': {'I  TRL, packing, our varlen attention, 8B': lambda: trl('8B', packing=True, attention='varlen'), 'I  unsloth, 8B': lambda: unsloth('8B', checkpointing=False, packing=True), 'I  llama_nb, 8B': lambda: ours('8B'),
          'I  TRL, packing, our varlen attention, 13B': lambda: trl('13B', packing=True, attention='varlen'), 'I  unsloth, 13B': lambda: unsloth('13B', checkpointing=False, packing=True), 'I  llama_nb, 13B': lambda: ours('13B'),
          'J  TRL as shipped, few tokens, 7B': lambda: trl('7B', Here.few), 'J  unsloth, few tokens, 7B': lambda: unsloth('7B', Here.few, False, True), 'J  llama_nb, few tokens, 7B': lambda: ours('7B', Here.few),
          'smallest memory, one row, 8B': lambda: ours('8B', Here.seq, checkpointing=True, with_copy=False),
          'F  llama_nb, compiled layers, 7B': lambda: ours('7B', compiled=True), 'H  llama_nb, fp8, compiled layers, 7B': lambda: ours('7B', compute='fp8', compiled=True),
          'planner, 7B': planner}}
ROWS = {**PARTS['a'], **PARTS['b']}
FIRST = ['machine', 'gate', 'F  llama_nb, 7B', 'A  TRL as shipped, 7B', 'D  unsloth as shipped, 7B', 'H  llama_nb, fp8, compiled layers, 7B', 'F  llama_nb, compiled layers, 7B', 'I  llama_nb, 8B', 'I  llama_nb, 13B',
         'smallest memory, one row, 8B', 'planner, 7B', 'H  llama_nb, fp8, 7B', 'B  TRL, packing, our varlen attention, 7B', 'G  llama_nb, all layers recomputed, 7B']  # where there is time for some of them only


def row(name):
    "The result of a row, or why there is none."
    try: result = ROWS[name]()
    except Exception as e: result = dict(not_run=f'{type(e).__name__}: {str(e).strip().splitlines()[0][:300] if str(e).strip() else ""}')
    if Here.device == 'cuda':
        import torch
        result['gpu'] = torch.cuda.get_device_name()
    return result


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('name', choices=list(ROWS))
    parser.add_argument('report', type=Path)
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--tiny', action='store_true')
    a = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings('ignore')
    Here.set(a.device, a.tiny)
    a.report.write_text(json.dumps(row(a.name)))
    sys.stdout.flush()
    os._exit(0)  # some peers leave threads that end late
