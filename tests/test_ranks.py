"""Several ranks over gloo: the numbers of one process, one stop for all, and a resumed run that equals an uninterrupted one."""
import os
import random
import signal
import time

import pytest
import torch
from fork_run import Count, make_trainer, record, same, until, wait
from forked_ranks import ended, ranks, trained
from safetensors.torch import load_file

from llama_nb.checkpoints import verify_checkpoint
from llama_nb.runs import Run

SIZES = (1, 2, 4)  # numbers of ranks that are compared
EXACT = dict(compute='fp32', max_steps=6, packing=False, per_device_train_batch_size=1, save_steps=2, eval_steps=3)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    "A trainer without dropout: whatever the number of ranks, the gradients must be the same. 27 rows: 8 do not divide them."
    return make_trainer(tmp_path_factory.mktemp('plain'), lora=dict(lora_dropout=0.), model=dict(bnb_4bit_compute_dtype='float32'), **EXACT)


def keep_gradients(trainer, number):
    "Save the gradients of each step just before the optimizer uses them."
    from transformers import TrainerCallback
    folder = trainer.config.training.output_dir
    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            assert trainer.hf_trainer.model_wrapped is trainer.model # accelerate has put nothing around it
            found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
            torch.save(found, f'{folder}/{trainer.config.training.run_name}-{state.global_step}-{number}.pt')
    trainer.given = trainer.given._replace(callbacks=(Keep(),))


def gradients(trainer, name, step, number=0): return torch.load(f'{trainer.config.training.output_dir}/{name}-{step}-{number}.pt', map_location='cpu')
def weights(run): return load_file(run.folder/'adapter_model.safetensors')
def gap(a, b): return max(float((a[k] - b[k]).abs().max()) for k in a)


def test_the_number_of_ranks_changes_nothing(plain):
    "1 x 8, 2 x 4 and 4 x 2: gradients of each step, weights, losses and validation; 27 rows, so the last step of an epoch is not full."
    found = {size: trained(plain, f'by-{size}', size, before=keep_gradients, gradient_accumulation_steps=8//size) for size in SIZES}
    worst = 0.
    for size in SIZES[1:]:
        for step in range(6):
            one = gradients(plain, 'by-1', step)
            for number in range(size): worst = max(worst, gap(one, gradients(plain, f'by-{size}', step, number)))
        worst = max(worst, gap(weights(found[1]), weights(found[size])))
        for name in ('loss', 'eval_loss', 'learning_rate'):
            ours, one = found[size].metrics(name), found[1].metrics(name)
            assert [s for s, _ in ours] == [s for s, _ in one]
            assert max(abs(a - b) for (_, a), (_, b) in zip(ours, one)) < 1e-5, name
        taught = [[e['taught_tokens'] for e in run.events() if e['kind'] == 'train'] for run in (found[1], found[size])]
        tokens = [[e['tokens'] for e in run.events() if e['kind'] == 'train'] for run in (found[1], found[size])]
        assert taught[0] == taught[1] and tokens[0] == tokens[1]
        held = [sorted(p.read_text() for p in (run.folder/'validation').iterdir()) for run in (found[1], found[size])]
        assert [text.count('[') for text in held[0]] == [text.count('[') for text in held[1]]  # no conversation twice, none left out
    assert worst < 1e-6, worst
    record('ranks against one process', ranks=list(SIZES[1:]), worst_difference=worst)


def test_a_mean_of_means_would_be_seen(plain):
    "The same comparison fails if each rank divides by its own tokens: it is not blind."
    def own_count(trainer, number):
        from llama_nb import loop
        loop.summed = lambda numbers: [2*n for n in numbers]  # as if the other rank had as many taught tokens as this one
        keep_gradients(trainer, number)
    trained(plain, 'own-count', 2, before=own_count, gradient_accumulation_steps=4, max_steps=1)
    assert gap(gradients(plain, 'by-1', 0), gradients(plain, 'own-count', 0)) > 1e-4


def test_another_number_of_ranks_goes_on_in_the_same_order(plain):
    "3 steps on 2 x 4, the rest on 1 x 8: refused by name, unless allowed; then it is the run of one process."
    children = ranks(plain, 'moved', 2, before=lambda trainer, number: stop_after(trainer, number, 3), gradient_accumulation_steps=4)
    codes, said = ended(plain, 'moved', children)
    assert codes == [130, 130], said
    codes, said = ended(plain, 'moved', ranks(plain, 'moved', 1, resume=True, gradient_accumulation_steps=8))
    assert codes == [2] and 'training.num_processes: 2 → 1' in said[0], said
    codes, said = ended(plain, 'moved', ranks(plain, 'moved', 1, resume=True, gradient_accumulation_steps=4, allow_changes=('training.num_processes',)))
    assert codes == [2] and '2 × 4 micro-batches' in said[0], said
    allowed = ('training.num_processes', 'training.gradient_accumulation_steps')
    moved = trained(plain, 'moved', 1, resume=True, gradient_accumulation_steps=8, allow_changes=allowed)
    assert gap(weights(moved), weights(Run(moved.folder.parent/'by-1'))) < 1e-6


def stop_after(trainer, number, step):
    "Ask rank 1 alone to stop, by a signal."
    from transformers import TrainerCallback
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step - 1 and number == 1: os.kill(os.getpid(), signal.SIGTERM)
    trainer.given = trainer.given._replace(callbacks=(Stop(),))


OFTEN = dict(save_steps=1, eval_steps=3, gradient_accumulation_steps=2, max_steps=8)


@pytest.fixture(scope='module')
def whole(tiny):
    "Two ranks with dropout that nobody disturbs."
    return trained(tiny[1], 'two-whole', 2, **OFTEN)


def test_one_rank_is_asked_and_all_stop(tiny, whole):
    "A signal to rank 1 only: both end at the same step, one checkpoint is written, and the resumed run is the undisturbed one, bit for bit."
    codes, said = ended(tiny[1], 'two-asked', ranks(tiny[1], 'two-asked', 2, before=lambda t, n: stop_after(t, n, 4), **OFTEN))
    assert codes == [130, 130], said
    run = Run(whole.folder.parent/'two-asked')
    assert run.status == 'interrupted' and run.latest_valid().name == 'checkpoint-4'
    assert [e['step'] for e in run.events() if e['kind'] == 'checkpoint'].count(4) == 1
    assert {p.name for p in run.latest_valid().glob('rng_state*')} == {'rng_state_0.pth', 'rng_state_1.pth'}
    same(trained(tiny[1], 'two-asked', 2, resume=True, **OFTEN), whole)
    record('one of two ranks is asked to stop', both_stop_at_one_step=True, identical_after_resume=True)


def test_the_random_states_differ(whole):
    "Each rank draws its own dropout."
    first, second = ((whole.latest_valid()/f'rng_state_{r}.pth').read_bytes() for r in (0, 1))
    assert first != second


def test_nan_on_one_rank_stops_all(tiny):
    "The loss of rank 1 is NaN in step 3: both end with the same error, which names its rows; the last checkpoint is of step 2."
    def spoil(trainer, number):
        from llama_nb.loop import PackedTrainer
        plain_loss = PackedTrainer.compute_loss
        def loss(self, model, inputs, *args, **kwargs):
            found = plain_loss(self, model, inputs, *args, **kwargs)
            return found*float('nan') if number == 1 and self.state.global_step == 2 and model.training else found
        PackedTrainer.compute_loss = loss
    codes, said = ended(tiny[1], 'two-nan', ranks(tiny[1], 'two-nan', 2, before=spoil, **OFTEN))
    assert codes == [1, 1]
    for text in said:
        last = text.strip().splitlines()[-1]
        assert last.startswith('NonFiniteError: step 3: loss is nan in micro-batch 1 of 2 of process 2; rows chats.jsonl:'), text
    run = Run(tiny[0]/'runs'/'two-nan')
    assert run.latest_valid().name == 'checkpoint-2' and run.status == 'crashed'


def kill_a_rank(tiny, whole, name, g):
    "kill -9 one rank at a random moment; the other ends by itself, the last checkpoint is valid, the resumed run is the undisturbed one."
    trainer, folder = tiny[1], tiny[0]/'runs'/name
    children = ranks(trainer, name, 2, **OFTEN)
    victim, counted, k = g.randint(0, 1), Count(folder, g.choice(['train', 'save_begin', 'checkpoint'])), g.randint(2, 7)
    until(lambda: counted() >= k, children[victim])
    time.sleep(g.random()*0.05)
    killed = time.monotonic()
    os.kill(children[victim], signal.SIGKILL)
    codes, said = ended(trainer, name, children)
    took = time.monotonic() - killed
    assert took < 30, took
    run = Run(folder)
    newest = run.checkpoints()[-1] if run.checkpoints() else None
    assert newest is None or verify_checkpoint(newest, run.id) == []
    if run.status != 'finished': same(trained(trainer, name, 2, resume=True, **OFTEN), whole)
    return took, codes[1 - victim]


def kills(tiny, whole, n):
    g, took = random.Random(18), []
    for i in range(n): took.append(kill_a_rank(tiny, whole, f'two-killed-{i}', g)[0])
    record('kill -9 of one of two ranks', trials=n, valid_checkpoint=n, identical_after_resume=n, longest_end_s=round(max(took), 2))


def test_a_killed_rank(tiny, whole): kills(tiny, whole, 2)


@pytest.mark.slow
def test_ten_killed_ranks(tiny, whole): kills(tiny, whole, 10)


FOUR_BIT = dict(lora=dict(lora_dropout=0.), model=dict(use_4bit=True, bnb_4bit_compute_dtype='float32'))


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    "A trainer with an NF4 base, in float32."
    return make_trainer(tmp_path_factory.mktemp('packed'), **FOUR_BIT, **EXACT | dict(gradient_accumulation_steps=2))


def keep_shares(trainer, number):
    "Keep the gradients, and say what the frozen weights are and how much of them is here."
    keep_gradients(trainer, number)
    from llama_nb import train
    from llama_nb.shards import frozen_layer_bytes, is_shard
    plain = train.share_base_
    def share(trainer, run):
        plain(trainer, run)
        layers = trainer.model.get_base_model().model.layers
        frozen = [p for p in layers.parameters() if not p.requires_grad]
        here, whole = frozen_layer_bytes(trainer.model)
        os.write(1, f'SHARE {all(map(is_shard, frozen))} {len(frozen)} {here/whole}\n'.encode())
    train.share_base_ = share


@pytest.mark.parametrize('checkpointing', [False, True])
def test_fsdp_of_a_4bit_base_is_ddp(packed, checkpointing):
    "Gradients of each step equal data parallelism, each rank holds half of the packed bytes as DTensors, validation is the same, and one process loads the checkpoint."
    names = {kind: f'{kind}-{checkpointing}' for kind in ('ddp', 'fsdp')}
    options = dict(gradient_checkpointing=checkpointing)
    ddp = trained(packed, names['ddp'], 2, before=keep_gradients, parallel='ddp', **options)
    codes, said = ended(packed, names['fsdp'], ranks(packed, names['fsdp'], 2, before=keep_shares, parallel='fsdp', **options))
    assert codes == [0, 0], said
    shares = [line.split() for text in said for line in text.splitlines() if line.startswith('SHARE')]
    assert len(shares) == 2 and all(share[1] == 'True' and int(share[2]) >= 14 and float(share[3]) <= 0.55 for share in shares), shares
    fsdp = Run(ddp.folder.parent/names['fsdp'])
    cut = next(e for e in fsdp.events() if e['kind'] == 'shards')
    assert max(cut['bytes']) == cut['planned_bytes'] and sum(cut['bytes']) == cut['whole_bytes'], cut  # as the memory plan says
    worst = max(gap(gradients(packed, names['ddp'], step), gradients(packed, names['fsdp'], step, number)) for step in range(6) for number in (0, 1))
    assert worst < 1e-6 and gap(weights(ddp), weights(fsdp)) < 1e-6, worst
    for name in ('loss', 'eval_loss'): assert dict(fsdp.metrics(name)) == pytest.approx(dict(ddp.metrics(name)), abs=1e-6), name
    saved = load_file(fsdp.latest_valid()/'adapter_model.safetensors')
    assert saved and all('lora_' in name for name in saved)
    if checkpointing: return
    from peft import AutoPeftModelForCausalLM
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(fsdp.folder))  # no trace of us
    mine = {n.replace('.default', ''): p for n, p in loaded.named_parameters() if 'lora_' in n}
    assert gap(weights(ddp), mine) < 1e-6
    record('fsdp with an NF4 base against ddp', worst_difference=worst, share_per_rank=max(float(share[3]) for share in shares))


def keep_moved(trainer, number):
    "As `keep_shares`; then nothing may move the model any more, and it says where the frozen weights are, and what moves with them."
    keep_shares(trainer, number)
    from llama_nb import train
    plain = train.share_base_
    def share(trainer, run):
        plain(trainer, run)
        model = trainer.model
        def moved(*args, **kwargs): raise AssertionError('the cut model was moved as a whole')
        model._apply = model.get_base_model()._apply = moved
        policies = {type(layer._get_fsdp_state()._fsdp_param_group.offload_policy).__name__ for layer in model.get_base_model().model.layers}
        places = {(p.to_local().device.type, p.device_mesh.device_type) for p in model.get_base_model().model.layers.parameters() if not p.requires_grad}
        assert not any('lora_' in n and hasattr(p, 'to_local') for n, p in model.named_parameters())  # the adapter stays on the device, whole
        os.write(1, f'PLACE {policies} {places}\n'.encode())
    train.share_base_ = share


@pytest.mark.parametrize('bits', [4, 32])
def test_parts_in_host_memory_change_nothing(packed, tmp_path, bits):
    "With `fsdp_cpu_offload` every gradient, loss and byte of the checkpoint is that of fsdp, and a stopped run resumes bit for bit."
    trainer = packed if bits == 4 else make_trainer(tmp_path, **FOUR_BIT | dict(model=dict(use_4bit=False, bnb_4bit_compute_dtype='float32')),
                                                    **EXACT | dict(gradient_accumulation_steps=2))
    names = {kind: f'{kind}-{bits}' for kind in ('device', 'host')}
    options = dict(parallel='fsdp', max_steps=3, save_steps=1)
    fsdp = trained(trainer, names['device'], 2, before=keep_gradients, **options)
    def stopping(trainer, number):
        keep_moved(trainer, number)
        keeping = trainer.given.callbacks
        stop_after(trainer, number, 2)
        trainer.given = trainer.given._replace(callbacks=(*keeping, *trainer.given.callbacks))
    codes, said = ended(trainer, names['host'], ranks(trainer, names['host'], 2, before=stopping, fsdp_cpu_offload=True, **options))
    assert codes == [130, 130], said
    assert [line for text in said for line in text.splitlines() if line.startswith('PLACE')] == [f"PLACE {{'CPUOffloadPolicy'}} {{('cpu', '{trainer.device.type}')}}"]*2, said
    assert [line.split()[1] for text in said for line in text.splitlines() if line.startswith('SHARE')] == ['True', 'True']  # all are DTensors
    host = trained(trainer, names['host'], 2, resume=True, before=keep_gradients, fsdp_cpu_offload=True, **options)
    assert [e['on_host'] for run in (fsdp, host) for e in run.events() if e['kind'] == 'shards'] == [False, True, True]
    worst = max(gap(gradients(trainer, names['device'], step, number), gradients(trainer, names['host'], step, number)) for step in range(3) for number in (0, 1))
    assert worst < 1e-6, worst
    assert host.metrics('loss') == fsdp.metrics('loss') and host.metrics('eval_loss') == fsdp.metrics('eval_loss')
    for name in ('adapter_model.safetensors', 'optimizer.pt'):
        ours, known = (run.latest_valid()/name for run in (host, fsdp))
        assert ours.read_bytes() == known.read_bytes(), name
    record('parts of the base in host memory', bits=bits, worst_difference=worst)


def test_fsdp_resumes(packed):
    "Stopped after 3 steps by one rank and resumed: the weights of an undisturbed run, bit for bit."
    codes, said = ended(packed, 'fsdp-moved', ranks(packed, 'fsdp-moved', 2, before=lambda t, n: stop_after(t, n, 3), parallel='fsdp'))
    assert codes == [130, 130], said
    moved = trained(packed, 'fsdp-moved', 2, resume=True, parallel='fsdp')
    whole = Run(moved.folder.parent/'fsdp-False')
    assert moved.metrics('loss') == whole.metrics('loss') and gap(weights(moved), weights(whole)) == 0


def test_a_silent_rank_ends_the_run(tiny, whole):
    "Rank 1 stands still, as behind a cut cable: rank 0 waits as long as it was told, here 6 s, and ends; the checkpoint is valid."
    children = ranks(tiny[1], 'two-silent', 2, timeout_s=6, **OFTEN | dict(max_steps=400, save_steps=2))
    folder = tiny[0]/'runs'/'two-silent'
    counted = Count(folder, 'checkpoint')
    until(lambda: counted() >= 1, children[0], timeout_s=200)
    os.kill(children[1], signal.SIGSTOP)
    since = time.monotonic()
    code = wait(children[0])
    took = time.monotonic() - since
    os.kill(children[1], signal.SIGKILL)
    wait(children[1])
    assert code == 1 and took < 40, (code, took)
    run = Run(folder)
    assert verify_checkpoint(run.latest_valid(), run.id) == [] and run.status == 'crashed'
    record('a rank stands still', ended=True)
