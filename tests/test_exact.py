"""Resumed equals uninterrupted in every set-up, to the last bit on a CPU; what has changed is refused by name; faults in the numbers stop a run."""
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from fork_run import Count, finished, fork, make_chats, make_trainer, record, same, train, until, wait

from llama_nb import loop
from llama_nb.checkpoints import write_manifest
from llama_nb.errors import ConfigError, DataError, NonFiniteError
from llama_nb.resume import PARTS
from llama_nb.runs import Run
from llama_nb.scaling import LossScaler
from llama_nb.train import LLAMATrainer

# what makes exact resuming hard: sections of settings, and the step in which the first process is cut off
SETUPS = {
    'plain, middle of an epoch': (dict(gradient_accumulation_steps=1), 4),
    'accumulation 3, uneven epoch': (dict(gradient_accumulation_steps=3), 3),
    'accumulation 4': (dict(gradient_accumulation_steps=4), 2),
    'checkpoint on the border of an epoch': (dict(gradient_accumulation_steps=11, max_steps=4), 2),
    'batch of 2, last one partial': (dict(per_device_train_batch_size=2, gradient_accumulation_steps=1), 5),
    'evaluation between': (dict(eval_steps=2), 3),
    'not packed': (dict(packing=False, per_device_train_batch_size=4), 3),
    'two epochs later': (dict(gradient_accumulation_steps=6, max_steps=8), 5),
    'plain twin of the fast path': (dict(fast_path=False), 3),
    'recomputed activations': (dict(gradient_checkpointing=True), 3),
    'inputs of layers in host memory': (dict(activation_offloading=True, gradient_accumulation_steps=2), 3),
    'another optimizer and schedule': (dict(optim='adafactor', lr_scheduler_type='linear', weight_decay=0.1), 3),
    'float32': (dict(compute='fp32'), 3),
    'float16 with overflows': (dict(compute='fp16'), 3),
}


@pytest.mark.parametrize('setup', SETUPS)
def test_resumed_is_uninterrupted(tiny, setup, monkeypatch):
    "Killed as soon as a checkpoint is there, resumed twice; every logged number and every byte of the adapter."
    training, at = SETUPS[setup]
    if setup.startswith('float16'): monkeypatch.setattr(loop, 'LossScaler', partial(LossScaler, start=2.**30, interval=2))  # overflows at first, and after each growth
    trainer = make_trainer(tiny[0], warm=False, **{'max_steps': 6, **training})
    name = 'exact-' + setup.replace(' ', '-').replace(',', '')
    whole = finished(trainer, f'{name}-whole')
    counted = Count(tiny[0]/'runs'/name, 'checkpoint')
    for more, resume in ((at, False), (1, True)):
        before = counted()
        log = tiny[0]/f'{name}.log'
        child = fork(train(trainer, name, resume), log)
        until(lambda: counted() >= before + more, child)
        os.kill(child, signal.SIGTERM if setup == 'accumulation 4' else signal.SIGKILL)
        code = wait(child)
        assert code in (-9, 130, 0), f'exit code {code}: {log.read_text()[-2000:]}'  # 0: it had come to its end
    run = finished(trainer, name, resume=True)
    same(run, whole)
    if setup.startswith('float16'):
        skipped, scales = (dict(whole.metrics(n)) for n in ('skipped_steps', 'loss_scale'))
        assert skipped[6] >= 2 and len(set(scales.values())) > 2, (skipped, scales)
        for name in ('skipped_steps', 'loss_scale'): assert run.metrics(name) == whole.metrics(name)
    record('resumed is uninterrupted', setup=setup, identical=True)


@pytest.fixture(scope='module')
def half(tiny):
    "A run that was stopped after three steps of eight."
    place, trainer = tiny
    def stop_after_three(_):
        step = Run.log
        def log(self, kind, **data):
            if kind == 'train' and data['step'] == 2: (self.folder/'STOP').touch()
            return step(self, kind, **data)
        Run.log = log
    assert wait(fork(train(trainer, 'half', before=stop_after_three))) == 130
    return Run(place/'runs'/'half')


def changed_base(place):
    "A folder with the same tokenizer and another model."
    from llama_nb.shapes import tiny_llama
    folder = Path(shutil.copytree(place/'tiny', place/'other-base', dirs_exist_ok=True))
    config = json.loads((folder/'config.json').read_text())
    tiny_llama(vocab_size=config['vocab_size'], max_position_embeddings=config['max_position_embeddings'], seed=7).save_pretrained(folder)
    return folder


def changed_tokenizer(place):
    "A folder with the same model and a tokenizer that knows one merge more."
    folder = Path(shutil.copytree(place/'tiny', place/'other-tokenizer', dirs_exist_ok=True))
    raw = json.loads((folder/'tokenizer.json').read_text())
    raw['model']['ignore_merges'] = True
    (folder/'tokenizer.json').write_text(json.dumps(raw))
    return folder


def shorter(place):
    "The same file of conversations without its last line."
    path = place/'shorter.jsonl'
    path.write_text(''.join(make_chats(place/'chats.jsonl').read_text().splitlines(keepends=True)[:-1]))
    return path


# one change each: sections, what the refusal says, what allows it (`None`: nothing can)
CHANGES = {
    'data': (lambda p: dict(data=dict(dataset_name=str(shorter(p)))), 'data.conversations: 27 → 26', ['data.dataset_name']),
    'data seed': (lambda p: dict(data=dict(seed=7)), 'data.seed: 42 → 7', ['data.seed']),
    'order seed': (lambda p: dict(seed=7), 'training.seed: 42 → 7', ['training.seed']),
    'batch': (lambda p: dict(per_device_train_batch_size=2), 'training.per_device_train_batch_size: 1 → 2', ['training.per_device_train_batch_size']),
    'accumulation': (lambda p: dict(gradient_accumulation_steps=3), 'training.gradient_accumulation_steps: 2 → 3', ['training.gradient_accumulation_steps']),
    'max_length': (lambda p: dict(model=dict(max_length=100)), 'model.max_length: 128 → 100', ['model.max_length', 'data.dataset_name']),
    'template': (lambda p: dict(data=dict(template='chatml')), 'data.template: auto → chatml', ['data.template']),
    'tokenizer': (lambda p: dict(model=dict(model_name=str(changed_tokenizer(p)))), 'tokenizer: ', ['model.model_name']),
    'base weights': (lambda p: dict(model=dict(model_name=str(changed_base(p)))), 'base weights: ', ['model.model_name']),
    'LoRA rank': (lambda p: dict(lora=dict(r=8)), 'lora.r: 4 → 8', None),
    'LoRA scale': (lambda p: dict(lora=dict(lora_alpha=32)), 'lora.lora_alpha: 16 → 32', ['lora.lora_alpha']),
    'schedule': (lambda p: dict(lr_scheduler_type='linear'), 'training.lr_scheduler_type: cosine → linear', ['training.lr_scheduler_type']),
    'steps': (lambda p: dict(max_steps=10), 'training.max_steps: 8 → 10', ['training.max_steps']),
}


def resume_copy(half, name, place, **changes):
    "A trainer with changed settings that is to go on with a copy of the run."
    shutil.rmtree(half.folder.parent/name, ignore_errors=True)
    shutil.copytree(half.folder, half.folder.parent/name)
    return make_trainer(place, warm=False, **{'run_name': name, **changes})


@pytest.mark.parametrize('change', CHANGES)
def test_a_changed_setting_is_refused(tiny, half, change):
    "By name, old → new, before anything is written; named in `allow_changes` it is taken, where that can be."
    make, told, allow = CHANGES[change]
    changes = make(tiny[0])
    trainer = resume_copy(half, 'changed', tiny[0], **changes)
    with pytest.raises(ConfigError) as e: trainer.train(resume=True, progress=False)
    assert told in str(e.value) and 'put them back, or name them in training.allow_changes' in str(e.value), str(e.value)
    assert Run(half.folder.parent/'changed').status == 'interrupted'
    if allow is None:
        trainer.config = replace(trainer.config, training=replace(trainer.config.training, allow_changes=('lora.r',)))
        with pytest.raises(ConfigError, match='cannot be allowed'): trainer.train(resume=True, progress=False)
    else:
        assert wait(fork(train(trainer, 'changed', resume=True, allow_changes=tuple(allow)), tiny[0]/'log')) == 0, (tiny[0]/'log').read_text()[-500:]
    record('changed setting', change=change, refused=True, allowed=allow is not None)


@pytest.mark.parametrize('fact, told', [('versions.torch', 'versions.torch: 0.0.1 → '), ('device', 'device: cuda → cpu'), ('training.num_processes', 'training.num_processes: 2 → 1')])
def test_another_place_is_refused(tiny, half, fact, told):
    "Versions, device and number of processes, as another machine would have written them."
    trainer = resume_copy(half, 'elsewhere', tiny[0])
    run = Run(half.folder.parent/'elsewhere')
    newest = run.checkpoints()[-1]
    facts = json.loads((newest/'run.json').read_text())
    if fact == 'versions.torch': facts['versions']['torch'] = '0.0.1'
    elif fact == 'device': facts['settings'][fact] = 'cuda'
    else: facts['settings'] |= {fact: 2, 'training.gradient_accumulation_steps': 1}  # a step of as many micro-batches
    (newest/'run.json').write_text(json.dumps(facts))
    write_manifest(newest, 3, run.id)
    with pytest.raises(ConfigError, match=told): trainer.train(resume=True, progress=False)
    allowed = (fact, 'training.gradient_accumulation_steps') if fact == 'training.num_processes' else (fact,)
    assert wait(fork(train(trainer, 'elsewhere', resume=True, allow_changes=allowed))) == 0
    record('changed setting', change=fact, refused=True, allowed=True)


@pytest.mark.parametrize('part', [*PARTS, 'rng_state.pth'])
def test_a_missing_part_is_not_gone_on_without(tiny, half, part):
    "A checkpoint whose manifest is right but which lacks a state: the stock trainer goes on silently with other numbers."
    trainer = resume_copy(half, 'lacking', tiny[0])
    newest = Run(half.folder.parent/'lacking').checkpoints()[-1]
    (newest/part).unlink()
    write_manifest(newest, 3, half.id)
    with pytest.raises(Exception, match=f'has no {part}'): trainer.train(resume=True, progress=False)
    record('missing part', part=part, refused=True)


def planted(where, value, at):
    "Break the numbers of one step in the forward pass, the gradient, or a weight."
    def patch(trainer):
        head = trainer.model.get_base_model().lm_head
        now = lambda: trainer.hf_trainer is not None and trainer.hf_trainer.state.global_step == at - 1 and trainer.model.training
        if where == 'forward': head.register_forward_hook(lambda m, args, out: out*value if now() else out)
        if where == 'gradient': next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(lambda g: g*value if now() else g)
        if where == 'weight':
            def spoil(m, args):
                if now():
                    with torch.no_grad(): head.weight.data.view(-1)[0] = value
            head.register_forward_pre_hook(spoil)
    return patch


@pytest.mark.parametrize('where', ['forward', 'gradient', 'weight'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('logging_steps', [1, 50])
def test_a_number_that_is_none_stops_the_run(tiny, where, value, logging_steps, tmp_path):
    "Within one step, with step and rows; trained weights stay finite and are those of the step before."
    def check(trainer):
        planted(where, value, at=3)(trainer)
        train_run = trainer.train
        def checked(**kwargs):
            try: train_run(**kwargs)
            except NonFiniteError as e:
                assert str(e).startswith('step 3: ') and 'chats.jsonl:' in str(e), e
                assert trainer.hf_trainer.state.global_step in (2, 3)
                assert all(p.isfinite().all() for p in trainer.model.parameters() if p.requires_grad)
                assert ('the update was skipped, weights are those of step 2' in str(e)) == (where != 'weight'), e
                raise
        trainer.train = checked
    code = wait(fork(train(tiny[1], f'sick-{where}-{value}-{logging_steps}', before=check, save_steps=2, logging_steps=logging_steps), tmp_path/'log'))
    said = (tmp_path/'log').read_text().splitlines()[-1]
    assert code == 1 and said.startswith('NonFiniteError: step 3: '), said
    run = Run(tiny[0]/'runs'/f'sick-{where}-{value}-{logging_steps}')
    assert [p.name for p in run.checkpoints()] == ['checkpoint-2'] and run.events()[-1]['kind'] == 'failed'
    record('non-finite number', where=where, value=str(value), logging_steps=logging_steps, stopped_in_step=3, weights_finite=True)


def test_a_skipped_update_leaves_the_run_as_it_was(tiny, undisturbed, tmp_path):
    "Once the cause is gone, the run goes on from before the fault to the same end."
    code = wait(fork(train(tiny[1], 'healed', before=planted('forward', math.nan, at=6)), tmp_path/'log'))
    assert code == 1
    same(finished(tiny[1], 'healed', resume=True), undisturbed)
    record('resumed after a non-finite number', identical=True)


def test_ten_clean_runs_raise_no_alarm(tiny, tmp_path):
    "Different seeds and rates: no spike, no fault."
    for seed in range(10):
        run = finished(tiny[1], f'clean-{seed}', log=tmp_path/'log', max_steps=24, save_steps=24, seed=seed, learning_rate=0.003*(seed + 1))
        assert not [e for e in run.events() if e['kind'] == 'spike']
        shutil.rmtree(run.folder)
    record('clean runs', runs=10, false_alarms=0)


def test_a_loss_that_explodes_stops_the_run(tiny, tmp_path):
    "Four steps in a row far above the usual: the newest checkpoint is from before."
    code = wait(fork(train(tiny[1], 'spiking', before=planted_spike(21), max_steps=40, save_steps=2), tmp_path/'log'))
    said = (tmp_path/'log').read_text().splitlines()[-1]
    assert code == 1 and said.startswith('DivergenceError: step 24: loss') and '4 steps in a row' in said, said
    run = Run(tiny[0]/'runs'/'spiking')
    spikes = [e['step'] for e in run.events() if e['kind'] == 'spike']
    assert run.latest_valid().name == 'checkpoint-20' and spikes == [21, 22, 23, 24], spikes
    record('loss that explodes', from_step=21, stopped_after_step=spikes[-1], newest_checkpoint=20)


def planted_spike(at):
    def patch(trainer):
        trainer.model.get_base_model().lm_head.register_forward_hook(lambda m, args, out: out*1000 if trainer.hf_trainer.state.global_step >= at - 1 else out)
    return patch


def test_nothing_taught_is_refused_before_training(tmp_path, tiny):
    "A conversation without an answer would be 0/0: it is refused with its line, when it is read."
    path = tmp_path/'mute.jsonl'
    path.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n'*3)
    trainer = LLAMATrainer(tiny[1].config.model, tiny[1].config.lora, replace(tiny[1].config.data, dataset_name=str(path)), tiny[1].config.training, device='cpu')
    with pytest.raises(DataError, match='mute.jsonl:1'): trainer.rows()
    record('nothing taught', refused_with_its_line=True)


def test_cut_differently_it_is_the_same_training(tiny):
    "The same rows as 12x1, 1x12, 3x4 micro-batches: weights agree to rounding; evaluation does not depend on its batch."
    from safetensors.torch import load_file
    apart, held_out = {}, []
    for rate in (2e-4, 0.01):  # the default and fifty times as much: rounding moves a weight by a share of the rate
        ends = []
        for size, accumulation in ((12, 1), (1, 12), (3, 4)):
            trainer = make_trainer(tiny[0], warm=False, lora=dict(lora_dropout=0.0), data=dict(val_size=0.3), packing=False, compute='fp32', per_device_train_batch_size=size,
                                   gradient_accumulation_steps=accumulation, max_steps=3, save_steps=3, learning_rate=rate)
            run = finished(trainer, f'cut-{size}x{accumulation}-{rate}')
            ends.append(load_file(run.folder/'adapter_model.safetensors'))
        apart[rate] = max((a[k] - ends[0][k]).abs().max().item() for a in ends[1:] for k in a)
    trainer.config = replace(trainer.config, training=replace(trainer.config.training, run_name='held'))
    trainer.train(progress=False)
    for size in (1, 2, 8):
        trainer.hf_trainer.args.per_device_eval_batch_size = size
        held_out.append(trainer.hf_trainer.evaluate()['eval_loss'])
    spread = max(held_out) - min(held_out)
    record('invariances', **{f'weight_difference_at_rate_{rate:g}': float(f'{d:.2g}') for rate, d in apart.items()}, eval_loss_spread=float(f'{spread:.2g}'), eval_batches=[1, 2, 8])
    assert apart[2e-4] <= 1e-6 and apart[0.01] <= 1e-5 and spread <= 1e-5


def test_memory_that_is_not_there(tiny, tmp_path):
    "A real limit on the address space: one line with the failing part and a setting, then the plan; exit code 3."
    import resource
    def limit(trainer):
        now = int(next(line.split()[1] for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmSize')))*1024
        trainer.model.get_base_model().lm_head.register_forward_hook(
            lambda m, args, out: (resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, now + 2**28)), torch.empty(2**28), out)[2] if trainer.hf_trainer.state.global_step == 3 else out)
    code = wait(fork(train(tiny[1], 'too-big', before=limit), tmp_path/'log'))
    said = (tmp_path/'log').read_text().splitlines()[-1]
    assert code == 3 and said.startswith('OutOfMemoryError: out of memory during forward and backward; largest part: '), said
    assert 'set training.' in said
    assert Run(tiny[0]/'runs'/'too-big').latest_valid().name == 'checkpoint-3'
    record('memory that is not there', exit_code=code, newest_checkpoint=3, failed_in_step=4)
