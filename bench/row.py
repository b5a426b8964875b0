"""One row of a benchmark, in a process of its own: `python -m bench.row cpu <row> <report.json>`."""
import json
import logging
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

COUNT, MEDIAN, MAX_LENGTH, R, ALPHA, RATE = 320, 85, 1024, 16, 32, 2e-4  # words; about 120 tokens with the template
WARM_UP, COMPILING, STEPS, SECONDS = 1, 4, 3, 10.  # steps left out, and while layers are compiled; fewest timed; seconds of these after which no further step begins


PAD = None  # id of filling at the end of a row, where a row may have any


class Clock:
    "Wall and CPU seconds and real tokens of each optimizer step, and the memory on top of the loaded model."
    def __init__(self, seconds=SECONDS, warm_up=WARM_UP):
        self.tokens, self.steps, self.losses, self.seconds, self.warm_up = 0, [], [], seconds, warm_up
        self.reset_memory()
        self.began, self.at = time.perf_counter(), (time.perf_counter(), time.process_time())

    def reset_memory(self):
        try: Path('/proc/self/clear_refs').write_text('5')
        except OSError: pass
        self.before = self.resident('VmRSS')

    @staticmethod
    def resident(key): return int(re.search(rf'{key}:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024

    def step(self):
        "The end of a step; true once enough is measured."
        now = time.perf_counter(), time.process_time()
        self.steps.append((now[0] - self.at[0], now[1] - self.at[1], self.tokens))
        self.tokens, self.at = 0, now
        if len(self.steps) == self.warm_up: self.began = now[0]
        return len(self.steps) >= self.warm_up + STEPS and now[0] - self.began > self.seconds

    def report(self, **more):
        from statistics import median
        timed = self.steps[self.warm_up:]
        rates = sorted(tokens/wall for wall, _, tokens in timed)
        return dict(real_tokens_per_s=round(median(rates), 1), slowest=round(rates[0], 1), fastest=round(rates[-1], 1), steps=len(timed),
                    cpu_s_per_1000_tokens=round(1000*median(cpu/tokens for _, cpu, tokens in timed), 3), tokens_per_step=round(median(t for *_, t in timed)),
                    peak_extra_mib=round(self.resident('VmHWM') - self.before), first_loss=self.losses and round(self.losses[0], 4), **more)


def watch(trainer, clock):
    "Count the real tokens a `transformers.Trainer` sees, and stop it when enough is measured."
    from transformers import TrainerCallback
    inner = trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        mask, borders = inputs.get('attention_mask'), inputs.get('cu_seqlens')
        filling = inputs['input_ids'].shape[1] - 1 - int((inputs['input_ids'][0] != PAD).nonzero()[-1]) if PAD is not None and borders is not None else 0
        clock.tokens += int(mask.sum()) if mask is not None else inputs['input_ids'].numel() - filling
        loss = inner(model, inputs, *args, **kwargs)
        clock.losses.append(float(loss))
        return loss
    trainer.training_step = training_step

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = clock.step() or control.should_training_stop
    trainer.add_callback(Stop())


def four_bit(dtype):
    "The demo model in 4 bits, as transformers loads it."
    import torch
    from llama_nb.sources import demo_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    return AutoModelForCausalLM.from_pretrained(demo_model(), dtype=dtype, device_map={'': 'cpu'}, quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16))


def trl(**settings):
    "TRL's SFTTrainer, with its own defaults but for `settings`."
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from bench.chats import conversations
    from llama_nb.model import load_tokenizer
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, max_steps=1000, report_to='none', save_strategy='no', logging_strategy='no', disable_tqdm=True, use_cpu=True, **settings)
        trainer = SFTTrainer(four_bit(torch.bfloat16), args, train_dataset=Dataset.from_list([{'messages': m} for m in conversations(COUNT, MEDIAN)]),
                             processing_class=load_tokenizer('demo'), peft_config=LoraConfig(r=R, lora_alpha=ALPHA, target_modules='all-linear', task_type='CAUSAL_LM'))
        clock = Clock()
        watch(trainer, clock)
        trainer.train()
        names = ('per_device_train_batch_size', 'packing', 'padding_free', 'max_length', 'bf16', 'assistant_only_loss', 'loss_type', 'optim')
        shown = {k: str(getattr(args, k)) for k in names}
        shown['checkpointing'] = str(getattr(args, 'activation_checkpointing', getattr(args, 'gradient_checkpointing', None)))
        return clock.report(settings=shown, attention=trainer.model.config._attn_implementation)


def careful(checkpointing, padded_to_float32, **_):
    "A careful bf16 recipe without a trainer: rows 1 and 2 of the specification's table."
    import torch

    from bench.chats import conversations
    from llama_nb.config import LoRAConfig
    from llama_nb.dialogue import encode
    from llama_nb.lora import add_lora
    from llama_nb.model import load_tokenizer
    tokenizer = load_tokenizer('demo')
    examples = [encode(m, tokenizer) for m in conversations(COUNT, MEDIAN)]
    model = add_lora(four_bit(torch.bfloat16), LoRAConfig(r=R, lora_alpha=ALPHA)).train()
    if padded_to_float32:  # what peft's preparation for k-bit training does
        for p in model.parameters():
            if p.dtype == torch.bfloat16: p.data = p.data.float()
    if checkpointing:
        from llama_nb.loop import set_checkpointing_
        model.enable_input_require_grads()
        set_checkpointing_(model, True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, clock = torch.optim.AdamW(trained, lr=RATE, fused=True), Clock()
    while True:
        for i in range(0, len(examples) - 7, 8):
            group = examples[i:i+8]
            longest = max(map(len, group))
            ids, labels, mask = (torch.full((8, longest), fill) for fill in (0, -100, 0))
            for j, e in enumerate(group):
                ids[j, :len(e)], labels[j, :len(e)], mask[j, :len(e)] = torch.tensor(e.input_ids), torch.tensor(e.labels), 1
            clock.tokens += int(mask.sum())
            with torch.autocast('cpu', dtype=torch.bfloat16): loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clock.losses.append(loss.item())
            if clock.step(): return clock.report(settings=dict(per_device_train_batch_size=8, checkpointing=checkpointing, float32_casts=padded_to_float32), attention='sdpa')


def ours(**training):
    "LLAMATrainer with its defaults, on the same conversations."
    from bench.chats import conversations, write
    from llama_nb.attention import attention_kernel
    from llama_nb.config import DataConfig, LoRAConfig, ModelConfig, TrainingConfig
    from llama_nb.loop import PackedTrainer
    from llama_nb.train import LLAMATrainer
    global PAD
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder)/'chats.jsonl', conversations(COUNT, MEDIAN))
        trainer = LLAMATrainer(ModelConfig('demo', max_length=MAX_LENGTH), LoRAConfig(r=R, lora_alpha=ALPHA), DataConfig(str(path), val_size=0.0),
                               TrainingConfig(output_dir=folder, max_steps=1000, save_steps=1000, **training), device='cpu')
        trainer.rows(), trainer.model
        PAD = trainer.tokenizer.pad_token_id
        clock, made = Clock(warm_up=COMPILING if training.get('compile') else WARM_UP), PackedTrainer.train

        def train(self, *args, **kwargs):
            watch(self, clock)
            clock.began, clock.at = time.perf_counter(), (time.perf_counter(), time.process_time())
            return made(self, *args, **kwargs)
        PackedTrainer.train = train
        from llama_nb.errors import RunInterrupted
        try: trainer.train(progress=False)
        except RunInterrupted: pass
        finally: PackedTrainer.train = made
        hf = trainer.hf_trainer
        shown = dict(per_device_train_batch_size=hf.args.per_device_train_batch_size, packing=True, max_length=MAX_LENGTH, checkpointing=any(getattr(m, 'gradient_checkpointing', False) for m in hf.model.modules()), **training)
        return clock.report(settings=shown, attention=attention_kernel('cpu') if trainer.config.training.fast_path else 'sdpa')


def gate():
    "Before any number: loss and LoRA gradients of both paths in bf16, against float32."
    import torch

    from bench.chats import conversations
    from llama_nb.config import LoRAConfig, ModelConfig
    from llama_nb.dialogue import encode
    from llama_nb.fastpath import apply_fast_path_, uses_autocast
    from llama_nb.loss import batch_loss
    from llama_nb.model import load_model, load_tokenizer
    from llama_nb.packing import PackedCollator, pack
    tokenizer = load_tokenizer('demo')
    batch = PackedCollator(0)(pack([encode(m, tokenizer) for m in conversations(8, MEDIAN)], MAX_LENGTH))

    def measured(dtype, lora):
        torch.manual_seed(0)
        model, g = load_model(ModelConfig('demo', bnb_4bit_compute_dtype=dtype), LoRAConfig(r=R, lora_alpha=ALPHA), 'cpu').train(), torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            if 'lora_B' in name: torch.nn.init.normal_(p, std=0.02, generator=g)
        apply_fast_path_(model, lora=lora, layers=lora)
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=dtype == 'bfloat16' and uses_autocast(model)): loss = batch_loss(model, batch)[0]
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    (loss, exact), fused, stock = measured('float32', False), measured('bfloat16', True), measured('bfloat16', False)
    error = lambda found: ((found[1] - exact).norm()/exact.norm()).item()
    result = dict(loss=loss, loss_error=abs(fused[0] - loss)/loss, stock_loss_error=abs(stock[0] - loss)/loss, gradient_error=error(fused), stock_gradient_error=error(stock))
    result['passed'] = result['loss_error'] < 1e-3 and result['gradient_error'] < result['stock_gradient_error']
    return {k: v if isinstance(v, bool) else float(f'{v:.3g}') for k, v in result.items()}


CPU = {'gate': gate, 'TRL as shipped': trl, 'TRL, no checkpointing': lambda: trl(gradient_checkpointing=False),
       'TRL, no checkpointing, packed': lambda: trl(gradient_checkpointing=False, packing=True, per_device_train_batch_size=1),
       'careful bf16 recipe (row 1)': lambda: careful(True, True), 'row 1 without checkpointing (row 2)': lambda: careful(False, True), 'llama_nb': ours}
CPU |= {f'{name} again': CPU[name] for name in ('TRL as shipped', 'TRL, no checkpointing, packed', 'llama_nb')} | {'llama_nb, compiled layers': lambda: ours(compile=True)}

if __name__ == '__main__':
    logging.disable(logging.WARNING)
    warnings.filterwarnings('ignore')
    rows = {'cpu': CPU}[sys.argv[1]]
    result = rows[sys.argv[2]]()
    Path(sys.argv[3]).write_text(json.dumps(result))
