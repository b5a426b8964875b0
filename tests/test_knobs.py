"""Each setting of a run does something, and a run that is stopped and resumed under it is the same run, bit for bit."""
import shutil

import pytest
import torch

from llama_nb.config import DataConfig, LoRAConfig, ModelConfig, TrainingConfig
from llama_nb.errors import CheckpointError
from llama_nb.train import LLAMATrainer
from tiny_run import make_tiny

KNOBS = {
    'schedule': dict(lr_scheduler_type='warmup_stable_decay', warmup_steps=3, lr_scheduler_kwargs={'decay_type': 'linear'}),
    'optimizer': dict(adam_beta1=.8, adam_beta2=.95, adam_epsilon=1e-6, optim_args={'amsgrad': True}, weight_decay=.1),
    'loraplus': dict(loraplus_lr_ratio=8.0, weight_decay=.1),
    'loss': dict(label_smoothing=.1, neftune_noise_alpha=5.0),
    'loss on the plain path': dict(label_smoothing=.1, neftune_noise_alpha=5.0, fast_path=False),
    'workers and batches': dict(dataloader_num_workers=1, per_device_eval_batch_size=2),
    'epochs': dict(save_strategy='epoch', eval_strategy='epoch', max_steps=-1, num_train_epochs=3.0, gradient_accumulation_steps=4),
    'best': dict(load_best_model_at_end=True),
}
LORA = {
    'schedule': dict(layers_to_transform=[1], rank_pattern={'q_proj': 8}, alpha_pattern={'v_proj': 32}),
    'optimizer': dict(exclude_modules=['k_proj'], trainable_token_indices=[5, 7]),
}


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp('knobs')
    make_tiny(folder/'tiny')
    return folder


def trainer(tiny, name, knobs, lora, **more):
    training = dict(output_dir=str(tiny/'runs'), run_name=name, learning_rate=1e-2, max_steps=6, save_steps=2, eval_steps=2,
                    per_device_train_batch_size=1, save_total_limit=9)
    return LLAMATrainer(ModelConfig(str(tiny/'tiny'), use_4bit=False, max_length=256), LoRAConfig(r=4, lora_dropout=.1, **lora),
                        DataConfig('dailydialog', 'sample', max_samples=12, val_size=.25, on_overflow='drop_turns'),
                        TrainingConfig(**training | knobs | more), device='cpu')


def weights(run): return (run.folder/'adapter_model.safetensors').read_bytes()


@pytest.mark.parametrize('name', KNOBS)
def test_resumed_is_the_same_run(tiny, name):
    "All checkpoints but the first are gone: the resumed run makes them again, equal to the last bit."
    label = name.replace(' ', '-')
    whole = trainer(tiny, label, KNOBS[name], LORA.get(name, {})).train(progress=False)
    before = {key: whole.metrics(key) for key in ('loss', 'eval_loss', 'learning_rate')}, weights(whole)
    first, *later = whole.checkpoints()
    assert later, 'nothing to resume'
    for checkpoint in later: shutil.rmtree(checkpoint)
    again = trainer(tiny, label, KNOBS[name], LORA.get(name, {})).train(resume=whole, progress=False)
    assert ({key: again.metrics(key) for key in before[0]}, weights(again)) == before


def test_each_knob_changes_the_run(tiny):
    "The settings that should change what is learned do, and the others do not."
    plain = weights(trainer(tiny, 'plain', {}, {}).train(progress=False))
    for name in ('schedule', 'optimizer', 'loraplus', 'loss'):
        run = trainer(tiny, f'{name}-alone', KNOBS[name], {}).train(progress=False)
        assert weights(run) != plain, name
    run = trainer(tiny, 'workers-alone', KNOBS['workers and batches'], {}).train(progress=False)
    assert weights(run) == plain


def test_a_run_of_one_step_learns(tiny):
    run = trainer(tiny, 'one', {}, {}, max_steps=1).train(progress=False)
    from safetensors.torch import load
    assert max(float(t.abs().max()) for name, t in load(weights(run)).items() if 'lora_B' in name) > 0
    assert run.metrics('learning_rate')[0][1] > 0


def test_save_only_model_says_that_it_cannot_be_resumed(tiny):
    run = trainer(tiny, 'light', dict(save_only_model=True), {}).train(progress=False)
    newest = run.checkpoints()[-1]
    assert not (newest/'optimizer.pt').exists()
    with pytest.raises(CheckpointError, match='save_only_model'):
        trainer(tiny, 'light', dict(save_only_model=True), {}).train(resume=run, progress=False)


def test_fast_and_plain_paths_agree_under_every_adapter(tiny):
    "The fast path honours each choice of layers, ranks, tokens and biases, or leaves the piece to peft."
    from llama_nb.fastpath import apply_fast_path_
    from llama_nb.lora import add_lora
    from llama_nb.loss import batch_loss
    from llama_nb.packing import PackedCollator
    from llama_nb.conversation import Example
    from llama_nb.shapes import tiny_llama
    from transformers import LlamaForCausalLM
    ids = torch.randint(3, 500, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = PackedCollator(0)([Example(input_ids=ids, labels=ids, spans=(), row=None)])
    choices = [*LORA.values(), dict(bias='all'), dict(modules_to_save=['lm_head']), dict(use_dora=True), dict(layers_to_transform=[0])]
    for choice in choices:
        found = []
        for fast in (True, False):
            torch.manual_seed(0)
            base = tiny_llama()
            base.config.attention_bias = 'bias' in choice
            model = add_lora(LlamaForCausalLM(base.config), LoRAConfig(r=4, **choice)).train()
            for name, p in model.named_parameters():
                if p.requires_grad: p.data += .02*torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
            if fast: loss = batch_loss(apply_fast_path_(model), batch)[0]
            else:
                logits = model(input_ids=batch['input_ids'], use_cache=False).logits[0, :-1]
                loss = torch.nn.functional.cross_entropy(logits, batch['labels'][0, 1:], ignore_index=-100)
            loss.backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            assert all(g is not None for g in grads.values()), (choice, [n for n, g in grads.items() if g is None])
            found.append((loss.detach(), grads))
        (a, ga), (b, gb) = found
        assert abs(a - b) < 1e-5, choice
        assert ga.keys() == gb.keys()
        for name in ga: torch.testing.assert_close(ga[name], gb[name], rtol=1e-3, atol=1e-6, msg=f'{choice} {name}')
