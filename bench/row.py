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


EQUAL = 48  # conversations of the equal work: one epoch


def real_conversations(count=EQUAL):
    "The first DailyDialog training conversations that fit, and where they come from: the release in $LLAMA_NB_TEST_DATA, else the sample that is shipped."
    import os

    from llama_nb.config import DataConfig
    from llama_nb.data import load_data
    root = os.environ.get('LLAMA_NB_TEST_DATA')
    path = Path(root)/'data'/'dailydialog'/'train.zip' if root else None
    source = str(path) if path and path.exists() else 'sample'
    found = load_data(DataConfig('dailydialog', data_path=source, val_size=0., on_bad='skip')).train
    return [[{'role': m.role, 'content': m.content} for m in c.messages] for c in list(found)[:count]], 'DailyDialog, first release' if source != 'sample' else 'DailyDialog, the shipped sample'


def equal_examples(taught):
    "What every row of the equal work trains on: the same ids and the same taught tokens."
    from llama_nb.dialogue import encode
    from llama_nb.model import load_tokenizer
    made, source = real_conversations()
    tokenizer = load_tokenizer('demo')
    examples = [encode(m, tokenizer, train_on=taught) for m in made]
    numbers = dict(conversations=len(made), tokens=sum(map(len, examples)), taught_tokens=sum(label != -100 for e in examples for label in e.labels[1:]), source=source, taught=taught)
    return made, examples, numbers


class Whole:
    "Seconds of a whole call, and of its steps: each step's real tokens and seconds, the first step left out of the rate."
    def __init__(self, numbers): self.numbers, self.began, self.marks, self.tokens, self.seen = numbers, time.perf_counter(), [], [], 0

    def watch(self, trainer, pad):
        from transformers import TrainerCallback
        inner, mine = trainer.training_step, self

        def training_step(model, inputs, *args, **kwargs):
            mask, ids = inputs.get('attention_mask'), inputs['input_ids']
            mine.seen += int(mask.sum()) if mask is not None else ids.numel() - (ids.shape[1] - 1 - int((ids[0] != pad).nonzero()[-1]) if pad is not None else 0)
            return inner(model, inputs, *args, **kwargs)
        trainer.training_step = training_step

        class Steps(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs): mine.marks.append(time.perf_counter())

            def on_step_end(self, args, state, control, **kwargs):
                mine.marks.append(time.perf_counter())
                mine.tokens.append(mine.seen)
                mine.seen = 0
        trainer.add_callback(Steps())

    def report(self, **more):
        whole, seconds = time.perf_counter() - self.began, [b - a for a, b in zip(self.marks, self.marks[1:])]
        rate = sum(self.tokens[1:])/sum(seconds[1:]) if len(seconds) > 1 else self.tokens[0]/seconds[0]
        return {**self.numbers, 'seen_tokens': sum(self.tokens), 'step_tokens_per_s': round(rate, 1), 'steps': len(seconds), 'steps_s': round(sum(seconds), 2), 'whole_s': round(whole, 2),
                'whole_tokens_per_s': round(self.numbers['tokens']/whole, 1), **more}


def equal_trl(taught, **settings):
    "TRL over the equal work once: loading the model, training, saving the adapter. It gets ids and masks, so it need not encode."
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from llama_nb.model import load_tokenizer
    _, examples, numbers = equal_examples(taught)
    with tempfile.TemporaryDirectory() as folder:
        whole = Whole(numbers)
        args = SFTConfig(folder, num_train_epochs=1, report_to='none', logging_strategy='no', save_strategy='no', disable_tqdm=True, use_cpu=True, **settings)
        data = Dataset.from_list([{'input_ids': e.input_ids, 'assistant_masks': [int(label != -100) for label in e.labels]} for e in examples])
        trainer = SFTTrainer(four_bit(torch.bfloat16), args, train_dataset=data, processing_class=load_tokenizer('demo'),
                             peft_config=LoraConfig(r=R, lora_alpha=ALPHA, target_modules='all-linear', task_type='CAUSAL_LM'))
        whole.watch(trainer, None)
        trainer.train()
        trainer.save_model(folder)
        return whole.report(settings={k: str(v) for k, v in settings.items()})


def equal_ours(taught, **training):
    "Ours over the equal work once: reading and checking the file, loading the model, training with its checkpoints, the published folder."
    from bench.chats import write
    from llama_nb.config import DataConfig, LoRAConfig, ModelConfig, TrainingConfig
    from llama_nb.loop import PackedTrainer
    from llama_nb.train import LLAMATrainer
    made, _, numbers = equal_examples(taught)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder)/'chats.jsonl', made)
        whole, train = Whole(numbers), PackedTrainer.train
        trainer = LLAMATrainer(ModelConfig('demo', max_length=MAX_LENGTH), LoRAConfig(r=R, lora_alpha=ALPHA), DataConfig(str(path), val_size=0., train_on=taught),
                               TrainingConfig(output_dir=folder, num_train_epochs=1, **training), device='cpu')

        def watched(self, *args, **kwargs):
            whole.watch(self, trainer.tokenizer.pad_token_id)
            return train(self, *args, **kwargs)
        PackedTrainer.train = watched
        try: trainer.train(progress=False)
        finally: PackedTrainer.train = train
        return whole.report(settings=training)


def frozen_limit(rows=MAX_LENGTH):
    "The bound of any method with these weights: every frozen product forwards and once backwards in bf16, at the rate of this machine, and nothing else."
    import torch

    from llama_nb.config import ModelConfig
    from llama_nb.shapes import matrix_shapes
    from llama_nb.sources import model_shape
    shape = model_shape(ModelConfig('demo'))
    sizes = [*(s for s in matrix_shapes(shape).values() for _ in range(shape.num_hidden_layers)), (shape.vocab_size, shape.hidden_size)]
    seconds = 0.
    for n, k in sorted(set(sizes)):
        x, W, best = torch.randn(rows, k).bfloat16(), torch.randn(n, k).bfloat16(), []
        for _ in range(5):
            began = time.perf_counter()
            x @ W.t() @ W
            best.append(time.perf_counter() - began)
        seconds += min(best)*sizes.count((n, k))
    return dict(step_tokens_per_s=round(rows/seconds, 1), rows=rows, products=2*len(sizes))


BEST = dict(gradient_checkpointing=False, packing=True, per_device_train_batch_size=1, max_length=MAX_LENGTH)
EQUAL_ROWS = {'limit: the frozen products alone': frozen_limit,
              **{f'{name}, {label}': (lambda f=f, taught=taught: f(taught)) for taught, label in (('all', 'every token taught'), ('assistant', 'answers taught'))
                 for name, f in (('TRL as shipped', equal_trl), ('TRL at its best', lambda taught: equal_trl(taught, **BEST)), ('llama_nb', equal_ours))}}
CPU = {'gate': gate, 'TRL as shipped': trl, 'TRL, no checkpointing': lambda: trl(gradient_checkpointing=False),
       'TRL, no checkpointing, packed': lambda: trl(gradient_checkpointing=False, packing=True, per_device_train_batch_size=1),
       'careful bf16 recipe (row 1)': lambda: careful(True, True), 'row 1 without checkpointing (row 2)': lambda: careful(False, True), 'llama_nb': ours}
CPU |= {f'{name} again': CPU[name] for name in ('TRL as shipped', 'TRL, no checkpointing, packed', 'llama_nb')} | {'llama_nb, compiled layers': lambda: ours(compile=True)}

if __name__ == '__main__':
    logging.disable(logging.WARNING)
    warnings.filterwarnings('ignore')
    rows = {'cpu': CPU, 'equal': EQUAL_ROWS}[sys.argv[1]]
    result = rows[sys.argv[2]]()
    Path(sys.argv[3]).write_text(json.dumps(result))
