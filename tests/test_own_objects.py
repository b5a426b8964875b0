"""What you hand to a trainer yourself: data, models, adapters, callbacks, optimizers; and what its model is good for afterwards."""
import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_run import ENV
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from llama_nb.attention import plain_attention
from llama_nb.config import DataConfig, EvaluationConfig, LoRAConfig, ModelConfig, TrainingConfig, load_config
from llama_nb.data import load_data
from llama_nb.errors import CheckpointError, ConfigError, DataError, LlamaNbError
from llama_nb.lora import adapted_linears, adapter_tensors
from llama_nb.model import load_tokenizer, load_tuned
from llama_nb.train import LLAMATrainer

IDS = torch.arange(20, 60)[None]


def chats(n=12, word='heron'):
    return [{'messages': [{'role': 'user', 'content': f'{word} {i}?'}, {'role': 'assistant', 'content': f'{i} of them, standing.'}]} for i in range(n)]


def trainer(place, name=None, held=dict(), split=dict(), **objects):
    training = {key: objects.pop(key) for key in list(objects) if key in TrainingConfig.__dataclass_fields__}
    return LLAMATrainer(ModelConfig(str(place/'tiny'), **dict(use_4bit=False, max_length=128) | held), LoRAConfig(r=4),
                        objects.pop('data_config', DataConfig(str(place/'chats.jsonl'), **dict(val_size=.2) | split)),
                        TrainingConfig(str(place/'runs'), name, **dict(learning_rate=1e-2, max_steps=3, compute='fp32') | training), device='cpu', **objects)


def logits(model):
    with torch.no_grad(), plain_attention(model.eval()): return model(input_ids=IDS).logits.float()


class Watch(TrainerCallback):
    "Counts steps, and asks for a checkpoint after the first one."
    steps = 0
    def on_step_end(self, args, state, control, **kwargs):
        Watch.steps += 1
        control.should_save = control.should_save or state.global_step == 1
        return control


@pytest.mark.parametrize('how', ['instance', 'class', 'in train', 'in hf_trainer'])
def test_callbacks(place, how):
    Watch.steps = 0
    given = {'instance': [Watch()], 'class': [Watch]}.get(how, ())
    made = trainer(place, callbacks=given, save_steps=50)
    if how == 'in hf_trainer': made.hf_trainer.add_callback(Watch())
    run = made.train(progress=False, callbacks=[Watch()] if how == 'in train' else ())
    assert Watch.steps == 3 and (run.folder/'checkpoint-1').is_dir()


class Enough(TrainerCallback):
    "Ends a run at its second step."
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2
        return control


def test_a_callback_may_end_a_run(place):
    "The run is finished and its adapter published; a resume does not go on."
    run = trainer(place, 'enough', callbacks=[Enough()], max_steps=6, save_steps=1).train(progress=False)
    assert run.status == 'finished' and len(run.metrics('loss')) == 2
    weights = (run.folder/'adapter_model.safetensors').read_bytes()
    assert weights == (run.folder/'checkpoint-2'/'adapter_model.safetensors').read_bytes()
    again = trainer(place, 'enough', max_steps=6, save_steps=1).train(resume=True, progress=False)
    assert len(again.metrics('loss')) == 2 and (again.folder/'adapter_model.safetensors').read_bytes() == weights


def test_early_stopping_of_transformers(place):
    "Their callback gets the metric it asks for; without a validation set it is refused."
    worse = dict(callbacks=[EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=50.)], max_steps=8, eval_steps=1, save_steps=1)
    run = trainer(place, load_best_model_at_end=True, **worse).train(progress=False)
    assert run.status == 'finished' and [step for step, _ in run.metrics('eval_loss')][-1] < 8
    assert next(e for e in run.events() if e['kind'] == 'chosen')['published'] == min(run.metrics('eval_loss'), key=lambda found: found[1])[0]
    with pytest.raises(ConfigError, match='EarlyStoppingCallback needs a validation loss'): trainer(place, split=dict(val_size=0.), **worse).train(progress=False)


def test_an_optimizer_of_another_model_is_refused(place):
    made, other = trainer(place), torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match='holds no trained parameter of this model'): made.train(progress=False, optimizers=(torch.optim.SGD(other.parameters(), lr=.1), None))


def test_own_optimizer_and_scheduler_resume_exactly(place):
    def train(resume=False):
        made = trainer(place, 'sgd', max_steps=4, save_steps=2)
        own = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=.5, momentum=.9)
        return made.train(resume=resume, progress=False, optimizers=(own, torch.optim.lr_scheduler.StepLR(own, 1, .5)))
    whole = train()
    assert [rate for _, rate in whole.metrics('learning_rate')] == [.5, .25, .125, .0625]
    before = (whole.folder/'adapter_model.safetensors').read_bytes(), whole.metrics('loss')
    shutil.rmtree(whole.folder/'checkpoint-4')
    again = train(resume=whole)
    assert ((again.folder/'adapter_model.safetensors').read_bytes(), again.metrics('loss')) == before


def own_sgd(made, lr=.5, gamma=.5):
    own = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=lr, momentum=.9)
    return own, torch.optim.lr_scheduler.StepLR(own, 1, gamma)


@pytest.mark.parametrize('how', ['train', 'hf_trainer'])
def test_an_own_optimizer_is_asked_for_again(place, how):
    "Without it, with another one or another schedule a resume is refused in one line; with the same one it goes on."
    def make(): return trainer(place, f'again-{how}', max_steps=4, save_steps=2)
    made = make()
    if how == 'train': whole = made.train(progress=False, optimizers=own_sgd(made))
    else:
        made.hf_trainer.optimizer, made.hf_trainer.lr_scheduler = own_sgd(made)
        whole = made.train(progress=False)
    before = (whole.folder/'adapter_model.safetensors').read_bytes()
    card = (whole.folder/'README.md').read_text()
    assert 'an object given in Python: SGD(lr=0.5' in card and 'learning rate |' not in card
    shutil.rmtree(whole.folder/'checkpoint-4')
    wrong = {'its optimizer was an object of your own, SGD': lambda made: (None, None), 'its optimizer was SGD': lambda made: own_sgd(made, lr=.25),
             'its scheduler was StepLR': lambda made: own_sgd(made, gamma=.9), 'its scheduler was an object of your own': lambda made: (own_sgd(made)[0], None)}
    for told, optimizers in wrong.items():
        made = make()
        with pytest.raises(ConfigError, match=told) as refused: made.train(resume=whole, progress=False, optimizers=optimizers(made))
        assert 'optimizers=(optimizer, scheduler)' in str(refused.value) and len(str(refused.value)) < 200
    made = make()
    made.train(resume=whole, progress=False, optimizers=own_sgd(made))
    assert (whole.folder/'adapter_model.safetensors').read_bytes() == before


def test_a_run_by_its_settings_takes_no_other_optimizer(place):
    whole = trainer(place, 'settings', max_steps=4, save_steps=2).train(progress=False)
    shutil.rmtree(whole.folder/'checkpoint-4')
    made = trainer(place, 'settings', max_steps=4, save_steps=2)
    with pytest.raises(ConfigError, match='its optimizer was that of its settings, not SGD'): made.train(resume=whole, progress=False, optimizers=own_sgd(made))
    other = own_sgd(made)
    with pytest.raises(ConfigError, match='LBFGS asks for a closure'): made.train(progress=False, optimizers=(torch.optim.LBFGS([p for p in made.model.parameters() if p.requires_grad]), None))
    with pytest.raises(ConfigError, match='changes the rates of another optimizer'): made.train(progress=False, optimizers=(own_sgd(made)[0], other[1]))
    with pytest.raises(ConfigError, match='changes the rates of another optimizer'): made.train(progress=False, optimizers=(None, other[1]))


def test_arguments_set_on_hf_trainer_are_kept(place):
    "They stand in the run's settings, and a resume without them is refused by name."
    made = trainer(place, 'arguments', max_steps=4, save_steps=2)
    made.hf_trainer.args.max_grad_norm = 1e-3
    run = made.train(progress=False)
    before = (run.folder/'adapter_model.safetensors').read_bytes()
    assert run.config['training']['max_grad_norm'] == 1e-3
    shutil.rmtree(run.folder/'checkpoint-4')
    with pytest.raises(ConfigError, match='max_grad_norm: 0.001 → 1.0'): trainer(place, 'arguments', max_steps=4, save_steps=2).train(resume=run, progress=False)
    LLAMATrainer.from_config(load_config(run.folder/'config.yaml'), device='cpu').train(resume=run, progress=False)
    assert (run.folder/'adapter_model.safetensors').read_bytes() == before


def uninterrupted_again(run, last):
    "The weights of a run whose last checkpoint is removed, and of its resume from `config.yaml` alone."
    before = (run.folder/'adapter_model.safetensors').read_bytes()
    shutil.rmtree(run.folder/f'checkpoint-{last}')
    LLAMATrainer.from_config(load_config(run.folder/'config.yaml'), device='cpu').train(resume=run, progress=False)
    return before, (run.folder/'adapter_model.safetensors').read_bytes()


LATE = [dict(lr_scheduler_type='cosine_with_restarts', lr_scheduler_kwargs={'num_cycles': 2}), dict(max_steps=7, logging_steps=2), dict(lr_scheduler_type='polynomial', adam_beta2=.9)]


@pytest.mark.parametrize('given', LATE)
def test_what_the_loop_reads_late_is_recorded_and_resumed(place, given):
    "With it goes what depends on it, such as the steps of the warm-up: a resume from `config.yaml` equals the whole run."
    made = trainer(place, max_steps=4, save_steps=1, warmup_ratio=.5)
    for name, value in given.items(): setattr(made.hf_trainer.args, name, value)
    run = made.train(progress=False)
    assert {name: run.config['training'][name] for name in given} == given
    before, after = uninterrupted_again(run, given.get('max_steps', 4))
    assert before == after


def not_read(hf, name, value): setattr(hf.args, name, value)


NOT_TAKEN = {
    'label_smoothing_factor': (lambda hf: not_read(hf, 'label_smoothing_factor', .3), 'set training.label_smoothing$'), 'seed': (lambda hf: not_read(hf, 'seed', 7), 'set training.seed$'),
    'per_device_train_batch_size': (lambda hf: not_read(hf, 'per_device_train_batch_size', 3), 'set training.per_device_train_batch_size$'),
    'data_collator': (lambda hf: setattr(hf, 'data_collator', hf.eval_collator.__class__(0, 8)), 'leave it as it is'), 'neftune_noise_alpha': (lambda hf: setattr(hf, 'neftune_noise_alpha', 3.), 'set training.neftune'),
    'compute_loss': (lambda hf: setattr(hf, 'compute_loss', lambda *args: 0), 'leave it as it is'), 'eval_dataset': (lambda hf: setattr(hf, 'eval_dataset', hf.train_dataset), 'validation='),
    'train_dataset': (lambda hf: hf.train_dataset.members.reverse(), 'data='), 'learning_rate': (lambda hf: not_read(hf, 'learning_rate', float('inf')), 'training.learning_rate: found inf'),
    'lr_scheduler_kwargs': (lambda hf: not_read(hf, 'lr_scheduler_kwargs', {'cycles': 3}), 'cosine takes no cycles')}


@pytest.mark.parametrize('name', NOT_TAKEN)
def test_what_no_setting_would_record_is_refused_by_name(place, name):
    "Nothing is left of the run, and what is set on its loop afterwards is not lost without a word."
    change, told = NOT_TAKEN[name]
    made = trainer(place, 'refused', split=dict(val_size=.3))
    hf = made.hf_trainer
    change(hf)
    with pytest.raises(ConfigError, match=told) as refused: made.train(progress=False)
    assert name in str(refused.value) and len(str(refused.value)) <= 200 and made.run is None and not (place/'runs'/'refused').exists()
    hf.args.learning_rate = 3e-3
    with pytest.raises(ConfigError, match='learning_rate: set on the loop of a run that was refused'): made.train(progress=False)
    assert not (place/'runs'/'refused').exists()


def test_a_half_frozen_adapter_is_frozen_again(place):
    "Card and facts name what was frozen, also after `hf_trainer`; a resume that would train it is refused."
    def make(frozen, **more):
        made = trainer(place, 'half-frozen', max_steps=4, save_steps=2, **more)
        if more.get('callbacks'): made.hf_trainer
        for name, p in made.model.named_parameters():
            if frozen in name: p.requires_grad_(False)
        return made
    made = make('layers.0', callbacks=[Dies()])
    with pytest.raises(Killed): made.train(progress=False)
    for other in ('nothing', 'layers.1'):
        with pytest.raises(ConfigError, match='frozen adapter weights: 14 of 28 .*freeze the same ones'): make(other).train(resume=made.run, progress=False)
    run = make('layers.0').train(resume=made.run, progress=False)
    start = make('nothing').model.state_dict()
    weights = {name: t for name, t in adapter_tensors(run.folder).items() if 'lora_A' in name}
    moved = {name for name, t in weights.items() if not torch.equal(t, start[name.replace('.weight', '.default.weight')])}
    assert moved == {name for name in weights if 'layers.1' in name}
    assert '| frozen weights of the adapter | 14 of 28' in (run.folder/'README.md').read_text()
    before = published(run)
    shutil.rmtree(run.folder/'checkpoint-4')
    with pytest.raises(ConfigError, match='freeze the same ones'): make('nothing').train(resume=run, progress=False)
    assert published(make('layers.0').train(resume=run, progress=False)) == before


def test_an_optimizer_is_used_for_one_run(place):
    made = trainer(place, 'used', max_steps=2, save_steps=1)
    own = own_sgd(made)
    first = published(made.train(progress=False, optimizers=own))
    with pytest.raises(ConfigError, match='SGD has made steps already.*make a new one'): made.train(progress=False, optimizers=own)
    assert made.run.name == 'used' and not (place/'runs'/'used-2').exists() and published(made.train(progress=False, optimizers=own_sgd(made))) == first


def test_an_optimizer_that_hf_trainer_makes_is_that_of_the_settings(place):
    made = trainer(place, max_steps=4, save_steps=2, loraplus_lr_ratio=4.)
    made.hf_trainer.create_optimizer_and_scheduler(4)
    run = made.train(progress=False)
    assert 'own optimizer' not in json.loads((run.folder/'run.json').read_text())['settings']
    before, after = uninterrupted_again(run, 4)
    assert before == after


def test_an_evaluation_you_ask_for_leaves_the_record_of_the_run(place):
    made = trainer(place, max_steps=4, save_steps=2, eval_steps=2, load_best_model_at_end=True, learning_rate=.5)
    before = made.hf_trainer.evaluate()['eval_loss']
    run = made.train(progress=False)
    kept = run.metrics('eval_loss'), {path.name: path.read_text() for path in (run.folder/'validation').iterdir()}
    assert [step for step, _ in kept[0]] == [2, 4] and set(kept[1]) == {'step-2.json', 'step-4.json'}
    assert made.hf_trainer.evaluate()['eval_loss'] != before
    assert (run.metrics('eval_loss'), {path.name: path.read_text() for path in (run.folder/'validation').iterdir()}) == kept


def test_a_prepared_run_that_is_not_trained_leaves_no_folder(place):
    trainer(place, 'first-of-two', max_steps=2, save_steps=1).train(progress=False)
    before = sorted(p.name for p in (place/'runs').iterdir())
    made = trainer(place, 'first-of-two', max_steps=2, save_steps=1)
    for given in (dict(resume=True), dict(optimizers=own_sgd(made)), dict(samples=lambda: [])):
        made.hf_trainer
        with pytest.raises(ConfigError, match=f'{next(iter(given))}: trainer.hf_trainer has prepared the new run first-of-two-2'): made.train(progress=False, **given)
        assert sorted(p.name for p in (place/'runs').iterdir()) == before and made.run is None
    made.hf_trainer.optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=.1)
    with pytest.raises(ConfigError, match='holds no trained parameter'): made.train(progress=False)
    assert sorted(p.name for p in (place/'runs').iterdir()) == before
    assert made.train(resume=True, progress=False).name == 'first-of-two'


REFUSED_KNOBS = [
    (dict(optim='sgd', optim_args={'nesterov': True, 'momentum': 0.0}), 'training.optim_args: sgd: found'),
    (dict(optim='adamw_torch', optim_args={'fused': True, 'foreach': True}), 'training.optim_args: adamw_torch'),
    (dict(optim='adafactor', optim_args={'relative_step': True}), 'training.optim_args: adafactor'),
    (dict(optim='lion_32bit', optim_args={'min_8bit_size': 'small'}), "min_8bit_size: found 'small', allowed: a number"),
    (dict(lr_scheduler_type='inverse_sqrt', lr_scheduler_kwargs={'timescale': 0}), 'training.lr_scheduler_kwargs: inverse_sqrt'),
    (dict(lr_scheduler_type='polynomial', lr_scheduler_kwargs={'power': '2'}), "power: found '2', allowed: a number"),
    (dict(lr_scheduler_type='polynomial', lr_scheduler_kwargs={'power': -1.0}), 'training.lr_scheduler_kwargs: polynomial'),
    (dict(lr_scheduler_type='warmup_stable_decay', warmup_steps=3), 'training.warmup_steps: found 3'),
    (dict(report_to=['neptune']), 'training.report_to: neptune is not installed')]


@pytest.mark.parametrize('knobs, told', REFUSED_KNOBS)
def test_a_value_that_cannot_work_leaves_no_run(place, knobs, told):
    from importlib.util import find_spec
    if 'report_to' in knobs and find_spec('neptune'): pytest.skip('neptune is installed')
    with pytest.raises(ConfigError, match=told) as refused: trainer(place, 'never-made', **knobs).train(progress=False)
    assert len(str(refused.value)) <= 200 and not (place/'runs'/'never-made').exists()


@pytest.mark.parametrize('name', ['linear', 'polynomial', 'warmup_stable_decay', 'cosine_with_restarts'])
def test_a_run_of_one_step_learns_under_every_schedule(place, name):
    made = trainer(place, None, max_steps=1, lr_scheduler_type=name)
    run = made.train(progress=False)
    assert run.metrics('learning_rate') == [(1, made.config.training.learning_rate)]


def test_a_schedule_of_plateaus_resumes_exactly(place):
    "Its steps follow evaluations: the one of the resumed step counts too, whether it was done before the end or not."
    def train(resume=False, stop=None):
        made = trainer(place, 'plateau', max_steps=6, save_steps=2, eval_steps=1, learning_rate=.1)
        own = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=1e-4)
        return made.train(resume=resume, progress=False, optimizers=(own, torch.optim.lr_scheduler.ReduceLROnPlateau(own, patience=0, factor=.5, threshold=.5)))
    whole = train()
    before = (whole.folder/'adapter_model.safetensors').read_bytes(), whole.metrics('learning_rate')
    assert len({rate for _, rate in before[1]}) > 2
    for step in (4, 6): shutil.rmtree(whole.folder/f'checkpoint-{step}', ignore_errors=True)
    again = train(resume=whole)
    assert ((again.folder/'adapter_model.safetensors').read_bytes(), again.metrics('learning_rate')) == before


def test_a_folder_that_was_named_relatively_is_found_from_elsewhere(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    made = LLAMATrainer(ModelConfig('tiny', use_4bit=False, max_length=128), LoRAConfig(r=4), DataConfig('chats.jsonl', val_size=.2),
                        TrainingConfig('relative', max_steps=2, save_steps=1, compute='fp32'), device='cpu')
    run = made.train(progress=False)
    assert str(run.folder) == 'relative/run-1'
    monkeypatch.chdir(tmp_path)
    assert run.folder == place/'relative'/'run-1' and run.status == 'finished' and len(run.checkpoints()) == 2
    torch.testing.assert_close(logits(load_tuned(run, device='cpu')[0]), logits(made.model), rtol=0, atol=1e-5)
    shutil.rmtree(run.folder/'checkpoint-2')
    assert made.train(resume=True, progress=False).folder == run.folder and not list(tmp_path.iterdir())


def test_hf_trainer_prepares_one_run(place):
    made = trainer(place, 'prepared')
    made.hf_trainer.args.max_grad_norm = 1e-9  # so small that nothing is learned
    run = made.train(progress=False)
    assert run.name == 'prepared' and made.hf_trainer.state.global_step == 3
    assert (run.folder/'adapter_model.safetensors').read_bytes() != (trainer(place, 'as-set').train(progress=False).folder/'adapter_model.safetensors').read_bytes()
    assert made.train(progress=False).name == 'prepared-2'


@pytest.mark.parametrize('use_4bit', [True, False])
def test_after_training_the_model_is_any_other(place, use_4bit):
    "Forward passes with a mask, a loss, replies of a padded batch and pipelines, equal to those of the adapter loaded from disk."
    from transformers import pipeline
    made = trainer(place, held=dict(use_4bit=use_4bit))
    run = made.train(progress=False)
    loaded, tokenizer = load_tuned(run, device='cpu')
    batch = tokenizer(['heron?', 'and how many of them stand there?'], return_tensors='pt', padding=True, padding_side='left', return_token_type_ids=False)
    for model in (made.model, loaded): assert float(model(**batch, labels=batch['input_ids']).loss) > 0
    torch.testing.assert_close(made.model(**batch).logits[batch['attention_mask'] == 1], loaded(**batch).logits[batch['attention_mask'] == 1], rtol=1e-4, atol=1e-4)
    replies = [model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.pad_token_id) for model in (made.model, loaded)]
    assert torch.equal(*replies)
    write = pipeline('text-generation', model=made.model, tokenizer=made.tokenizer)
    assert write('heron', max_new_tokens=3, do_sample=False)[0]['generated_text'].startswith('heron')
    assert write([{'role': 'user', 'content': 'heron?'}], max_new_tokens=3, do_sample=False)[0]['generated_text'][-1]['role'] == 'assistant'


@pytest.mark.parametrize('kind', ['list', 'frame', 'Dataset', 'loaded'])
def test_the_data_may_stand_where_its_settings_would(place, kind):
    rows = chats()
    given = {'list': rows, 'frame': pd.DataFrame(rows), 'Dataset': datasets.Dataset.from_list(rows), 'loaded': load_data(rows, val_size=.25)}[kind]
    run = trainer(place, data_config=given, max_steps=1).train(progress=False)
    assert load_config(run.folder/'config.yaml').data.dataset_name == 'in memory'
    with pytest.raises(ConfigError, match='data'): trainer(place, data_config=given, data=given)


def test_named_validation_sets_and_the_best_checkpoint(place):
    run = trainer(place, data=chats(), validation={'short': chats(4, 'owl'), 'long': chats(6, 'kingfisher')}, eval_steps=1, load_best_model_at_end=True,
                  compute_metrics=lambda p: {'positions': p.label_ids.size}).train(progress=False)
    for name in ('eval_loss', 'eval_short_loss', 'eval_long_loss', 'eval_positions'): assert len(run.metrics(name)) == 3, name
    best = min(run.metrics('eval_loss'), key=lambda found: found[1])[0]
    assert next(e for e in run.events() if e['kind'] == 'chosen')['best'] == best


def trained(model): return {name.replace('.style', '.default') for name, p in model.named_parameters() if p.requires_grad}


def save_foreign(place, folder, adapter_name='default', **settings):
    "An adapter that peft alone has made; its logits, and the names of what it trains."
    base = AutoModelForCausalLM.from_pretrained(place/'tiny', dtype=torch.float32)
    made = get_peft_model(base, LoraConfig(**dict(r=3, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM') | settings), adapter_name=adapter_name)
    for i, p in enumerate(p for p in made.parameters() if p.requires_grad): p.data += .05*torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    made.save_pretrained(folder)
    return logits(made), trained(made)


FOREIGN = {
    'plain': {}, 'a pattern': dict(target_modules=r'.*layers\.0\..*(q|o)_proj'), 'some layers': dict(layers_to_transform=[1]), 'another name': dict(adapter_name='style'),
    'an excluding pattern': dict(target_modules='all-linear', exclude_modules=r'.*mlp.*'), 'norms': dict(modules_to_save=['norm', 'input_layernorm']),
    'embeddings': dict(target_modules=['embed_tokens']), 'tokens': dict(trainable_token_indices={'embed_tokens': [3, 9]}), 'ranks': dict(rank_pattern={r'layers\.1\..*v_proj': 1})}


@pytest.mark.parametrize('kind', FOREIGN)
def test_an_adapter_of_peft_is_loaded_and_continued(place, tmp_path, kind):
    "Its rank and targets are taken over; the run starts at its weights and is loaded like any other."
    wanted, names = save_foreign(place, tmp_path/'foreign', **FOREIGN[kind])
    torch.testing.assert_close(logits(load_tuned(tmp_path/'foreign', device='cpu')[0]), wanted, rtol=1e-4, atol=1e-4)
    made = LLAMATrainer(training_config=TrainingConfig(str(tmp_path/'runs'), learning_rate=1e-9, max_steps=1, compute='fp32'), data=chats(), adapter=tmp_path/'foreign', device='cpu')
    torch.testing.assert_close(logits(made.model), wanted, rtol=1e-4, atol=1e-4)
    assert trained(made.model) == names
    run = made.train(progress=False)
    torch.testing.assert_close(logits(load_tuned(run, device='cpu')[0]), wanted, rtol=1e-4, atol=1e-4)
    assert made.config.lora.r == 3 and adapted_linears(run.folder) == adapted_linears(next((tmp_path/'foreign').rglob('adapter_config.json')).parent)


@pytest.mark.parametrize('kind', ['another name', 'a pattern'])
def test_a_peft_model_in_memory_is_trained_and_published(place, tmp_path, kind):
    "Whatever the adapter is called and however its layers are named, the run's folder is an adapter folder, and a checkpoint resumes."
    def go_on(resume=False):
        base = AutoModelForCausalLM.from_pretrained(place/'tiny', dtype=torch.float32)
        torch.manual_seed(0)
        targets = r'.*layers\.1\..*(k|v)_proj' if kind == 'a pattern' else ['k_proj']
        model = get_peft_model(base, LoraConfig(r=3, target_modules=targets, task_type='CAUSAL_LM'), adapter_name='default' if kind == 'a pattern' else 'style')
        made = LLAMATrainer(training_config=TrainingConfig(str(tmp_path), 'own', learning_rate=1e-2, max_steps=4, save_steps=2), data=chats(), model=model)
        return made, made.train(resume=resume, progress=False)
    made, run = go_on()
    torch.testing.assert_close(logits(load_tuned(run, device='cpu')[0]), logits(made.model), rtol=1e-4, atol=1e-4)
    before = (run.folder/'adapter_model.safetensors').read_bytes()
    shutil.rmtree(run.folder/'checkpoint-4')
    assert (go_on(resume=True)[1].folder/'adapter_model.safetensors').read_bytes() == before
    assert load_config(run.folder/'config.yaml').lora.target_modules == tuple(adapted_linears(run.folder)) or kind == 'another name'


def test_an_adapter_stays_with_its_base(place):
    from llama_nb.shapes import tiny_llama
    run = trainer(place, max_steps=1).train(progress=False)
    shutil.copytree(place/'tiny', place/'twin', dirs_exist_ok=True)
    tiny_llama(vocab_size=259, max_position_embeddings=2048, seed=3).save_pretrained(place/'twin')
    with pytest.raises(CheckpointError, match='was trained on another base'): LLAMATrainer(ModelConfig(str(place/'twin'), use_4bit=False), data=chats(), adapter=run, device='cpu').model


def test_an_adapter_of_ours_is_continued_and_resumed(place):
    first = trainer(place, 'first', max_steps=2).train(progress=False)
    def go_on(resume=False):
        made = LLAMATrainer(training_config=TrainingConfig(str(place/'runs'), 'second', learning_rate=1e-2, max_steps=4, save_steps=2), data=chats(), adapter=first, device='cpu')
        return made.train(resume=resume, progress=False)
    whole = go_on()
    before = (whole.folder/'adapter_model.safetensors').read_bytes()
    shutil.rmtree(whole.folder/'checkpoint-4')
    assert (go_on(resume=True).folder/'adapter_model.safetensors').read_bytes() == before


def test_the_settings_of_the_run_an_adapter_comes_from_fit_it(place, tmp_path):
    "`all-linear` in them means the layers that its adapter names one by one; a rank it does not have is refused."
    first = trainer(place, max_steps=1).train(progress=False)
    settings = load_config(first.folder/'config.yaml')
    assert settings.lora.target_modules == 'all-linear'
    def go_on(**lora):
        training = replace(settings.training, output_dir=str(tmp_path/'runs'), run_name='second')
        again = replace(settings, training=training, lora=replace(settings.lora, **lora))
        return LLAMATrainer.from_config(again, adapter=first, data=chats(), device='cpu')
    assert go_on().train(progress=False).status == 'finished'
    with pytest.raises(ConfigError, match='the adapter has r 4'): go_on(r=8)


class Killed(BaseException): pass


class Dies(TrainerCallback):
    "Ends the process's training in its first step, as a kill would, before there is a checkpoint."
    def on_step_begin(self, args, state, control, **kwargs): raise Killed


def published(run): return (run.folder/'adapter_model.safetensors').read_bytes()


@pytest.mark.parametrize('kind', ['folder', 'foreign', 'model'])
def test_a_run_killed_before_its_first_checkpoint_starts_again_from_its_adapter(place, tmp_path, kind):
    "From `config.yaml` alone it equals the uninterrupted run; another adapter is refused."
    first = trainer(place, 'origin', max_steps=2).train(progress=False)
    if kind == 'foreign': save_foreign(place, tmp_path/'foreign', adapter_name='style', target_modules=r'.*layers\.1\..*(k|v)_proj')
    def begin(name, **more):
        training = TrainingConfig(str(tmp_path/'runs'), name, learning_rate=1e-2, max_steps=4, save_steps=2, compute='fp32')
        given = dict(model=load_tuned(first, device='cpu')[0]) if kind == 'model' else dict(adapter=first if kind == 'folder' else tmp_path/'foreign')
        return LLAMATrainer(data_config=DataConfig(str(place/'chats.jsonl')), training_config=training, device='cpu', **given, **more)
    whole = begin('whole').train(progress=False)
    with pytest.raises(Killed): begin('half', callbacks=[Dies()]).train(progress=False)
    half = tmp_path/'runs'/'half'
    assert not list(half.glob('checkpoint-*'))
    save_foreign(place, tmp_path/'other', r=8 if kind == 'foreign' else 4, target_modules='all-linear')
    def again(**given): return LLAMATrainer.from_config(load_config(half/'config.yaml'), device='cpu', **given).train(resume=half, progress=False)
    if kind == 'folder':
        save_foreign(place, tmp_path/'twin', r=4, lora_alpha=16, target_modules='all-linear')
        with pytest.raises(ConfigError, match='went on from another adapter'): again(adapter=tmp_path/'twin')
    run = again()
    assert published(run) == published(whole) and run.status == 'finished'


def test_a_run_with_a_new_adapter_does_not_go_on_from_another(place, tmp_path):
    first = trainer(place, 'source', max_steps=1).train(progress=False)
    made = trainer(place, 'fresh', max_steps=2, callbacks=[Dies()])
    with pytest.raises(Killed): made.train(progress=False)
    with pytest.raises(ConfigError, match='began with a new adapter'):
        go_on(tmp_path, None, place/'chats.jsonl', adapter=first).train(resume=made.run, progress=False)


def test_the_copy_of_the_starting_adapter_is_lost(place, tmp_path):
    first = trainer(place, 'source-2', max_steps=1).train(progress=False)
    made = go_on(tmp_path, 'copyless', place/'chats.jsonl', callbacks=[Dies()], adapter=first)
    with pytest.raises(Killed): made.train(progress=False)
    def again(**given): return LLAMATrainer.from_config(load_config(made.run.folder/'config.yaml'), device='cpu', **given).train(resume=made.run, progress=False)
    shutil.rmtree(made.run.folder/'start')
    with pytest.raises(ConfigError, match='not in its folder start any more; give it again'): again()
    assert again(adapter=first).status == 'finished'


def scored(run, data, name, **more):
    from llama_nb.config import EvaluationConfig
    from dataclasses import replace
    from llama_nb.evaluation import evaluate_saved
    quick = replace(load_config(run.folder/'config.yaml'), evaluation=EvaluationConfig(metrics=('perplexity',), num_bootstrap=100))
    return evaluate_saved(run, quick, data=data, name=name, **more)


def as_file(path, rows):
    path.write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    return path


def go_on(tmp_path, name, data, **given):
    training = TrainingConfig(str(tmp_path/'runs'), name, learning_rate=1e-2, max_steps=1, compute='fp32')
    return LLAMATrainer(data_config=DataConfig(str(data), val_size=0.), training_config=training, device='cpu', **given)


@pytest.mark.parametrize('how', ['folder', 'loaded', 'trained'])
def test_an_evaluation_knows_what_the_ancestors_were_trained_on(place, tmp_path, how):
    "Over two generations, through folders, loaded models and the models of finished trainers."
    words = ('owl', 'kingfisher', 'bittern')
    sets = [as_file(tmp_path/f'{word}.jsonl', chats(8, word)) for word in words]
    made = trainer(place, 'eldest', data_config=DataConfig(str(sets[0]), val_size=0.), max_steps=1)
    run = made.train(progress=False)
    for word, data in zip(words[1:], sets[1:]):
        given = {'folder': dict(adapter=run), 'loaded': dict(model=load_tuned(run, device='cpu')[0]), 'trained': dict(model=made.model)}
        made = go_on(tmp_path, word, data, **given[how])
        run = made.train(progress=False)
    for data in sets:
        with pytest.raises(DataError, match='8 of 8 conversations were trained on'): scored(run, data, 'old')
    report = scored(run, sets[0], 'old', allow_trained=True)
    assert '8 of 8 conversations were trained on' in repr(report)
    assert '8 of its rows were trained on' in (run.folder/'README.md').read_text('utf-8')
    assert 'trained before on | 16 other conversations' in (run.folder/'README.md').read_text('utf-8')
    assert scored(run, as_file(tmp_path/'new.jsonl', chats(3, 'avocet')), 'new').settings['data']['trained'] == 0


def test_what_a_plain_adapter_was_trained_on_is_not_known(place, tmp_path):
    "The table and the card say so."
    save_foreign(place, tmp_path/'foreign')
    run = go_on(tmp_path, 'heir', as_file(tmp_path/'owl.jsonl', chats(6, 'owl')), adapter=tmp_path/'foreign').train(progress=False)
    report = scored(run, as_file(tmp_path/'new.jsonl', chats(3, 'avocet')), 'new')
    assert 'trained before on conversations that are not known' in repr(report)
    card = (run.folder/'README.md').read_text('utf-8')
    assert 'trained before on | conversations that are not known' in card and 'earlier training rows are not known' in card


def test_rows_of_before_a_resume_on_other_data_stay_known(place, tmp_path):
    old, new = (as_file(tmp_path/f'{word}.jsonl', chats(8, word)) for word in ('owl', 'rail'))
    def train(data, steps, **more): return trainer(place, 'moved', data_config=DataConfig(str(data), val_size=0.), max_steps=steps, save_steps=1, **more)
    train(old, 2).train(progress=False)
    allowed = ['data.dataset_name', 'training.max_steps']
    run = train(new, 4, allow_changes=allowed).train(resume=True, progress=False)
    for data in (old, new):
        with pytest.raises(DataError, match='8 of 8 conversations were trained on'): scored(run, data, 'seen')


REFUSED = {
    'given twice': 'holds an adapter already', 'add_adapter': 'holds an adapter already', 'merged': 'merge', 'disabled': 'switched off|disabled',
    'norms unfrozen': 'not be saved|does not save', 'two active': 'alone would be saved|does not save'}


@pytest.mark.parametrize('kind', REFUSED)
def test_a_model_whose_training_could_not_be_saved_is_refused(place, tmp_path, kind):
    "In one line, and before the run has a folder."
    base = AutoModelForCausalLM.from_pretrained(place/'tiny', dtype=torch.float32)
    settings = LoraConfig(r=2, target_modules=['q_proj', 'o_proj'], task_type='CAUSAL_LM')
    def begin(model): return LLAMATrainer(data=chats(), model=model, lora_config=LoRAConfig(r=2) if model is base else None,
                                          training_config=TrainingConfig(str(tmp_path/'runs'), 'q', max_steps=1, compute='fp32'))
    if kind == 'given twice': begin(base).model
    elif kind == 'add_adapter': base.add_adapter(settings)
    else:
        mine = get_peft_model(base, settings)
        if kind == 'merged': mine.merge_adapter()
        if kind == 'disabled': mine.base_model.disable_adapter_layers()
        if kind == 'norms unfrozen':
            for name, p in mine.named_parameters(): p.requires_grad_('layernorm' in name or 'lora_' in name)
        if kind == 'two active':
            mine.add_adapter('second', settings)
            mine.base_model.set_adapter(['default', 'second'])
    with pytest.raises(ConfigError, match=REFUSED[kind]) as refused: begin(base if kind in ('given twice', 'add_adapter') else mine).train(progress=False)
    assert len(str(refused.value)) <= 200 and not (tmp_path/'runs'/'q').exists()


def test_weights_unfrozen_in_the_trainers_model_are_refused(place, tmp_path):
    made = trainer(place, 'unfrozen')
    made.model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match='not be saved|does not save'): made.train(progress=False)
    assert not (place/'runs'/'unfrozen').exists()


def test_settings_beside_a_model_must_agree_with_it(place, tmp_path):
    "What nothing would read is refused; what says how text is read is kept, in config.yaml too."
    base = AutoModelForCausalLM.from_pretrained(place/'tiny', dtype=torch.float32)
    def begin(**settings):
        return LLAMATrainer(ModelConfig(**settings), LoRAConfig(r=2), data=chats(), model=base, training_config=TrainingConfig(str(tmp_path), 'agreed', max_steps=1, compute='fp32'))
    for wrong in (dict(model_name='other/thing'), dict(load_in_8bit=True), dict(attn_implementation='eager'), dict(bnb_4bit_compute_dtype='float16')):
        with pytest.raises(ConfigError, match=f'model.{next(iter(wrong))}: found'): begin(**wrong)
    run = begin(model_name=f'{place}/tiny/../tiny', max_length=64, attn_implementation='sdpa', special_tokens={'pad_token': 'z'}).train(progress=False)
    kept = load_config(run.folder/'config.yaml').model
    assert (kept.max_length, kept.attn_implementation, kept.special_tokens, kept.use_4bit) == (64, 'sdpa', {'pad_token': 'z'}, False)


def test_an_evaluation_of_the_run_itself_knows_an_ancestors_rows(place, tmp_path):
    "The rows that an adapter was trained on, held out by the next run."
    old = chats(8, 'owl')
    run = trainer(place, 'elder', data_config=DataConfig(str(as_file(tmp_path/'owl.jsonl', old)), val_size=0.), max_steps=1).train(progress=False)
    from llama_nb.config import EvaluationConfig
    made = LLAMATrainer(data=chats(8, 'rail'), validation=old[:5], adapter=run, device='cpu', training_config=TrainingConfig(str(tmp_path/'runs'), max_steps=1, compute='fp32'),
                        eval_config=EvaluationConfig(metrics=('perplexity',), num_bootstrap=100))
    made.train(progress=False)
    assert '5 of 5 conversations were trained on' in repr(made.evaluate()) and '5 of its rows were trained on' in (made.run.folder/'README.md').read_text('utf-8')


@pytest.mark.parametrize('trained_in_4bit', [True, False])
def test_another_base_is_refused_in_every_form(place, tmp_path, trained_in_4bit):
    "Other linears, held in another form than in training; and other settings beside the same weights."
    run = trainer(place, held=dict(use_4bit=trained_in_4bit), max_steps=1).train(progress=False)
    base = AutoModelForCausalLM.from_pretrained(place/'tiny', dtype=torch.float32)
    base.model.layers[0].self_attn.k_proj.weight.data *= 1.02
    shutil.copytree(place/'tiny', tmp_path/'other')
    base.save_pretrained(tmp_path/'other')
    for use_4bit in (True, False):
        load_tuned(run, device='cpu', use_4bit=use_4bit)
        with pytest.raises(CheckpointError, match='its weights differ'): load_tuned(run, device='cpu', base=tmp_path/'other', use_4bit=use_4bit)
    shutil.copytree(place/'tiny', tmp_path/'turned')
    config = json.loads((tmp_path/'turned'/'config.json').read_text())
    (tmp_path/'turned'/'config.json').write_text(json.dumps(config | {'rms_norm_eps': .25}))
    with pytest.raises(CheckpointError, match='RoPE, norm or activation'): load_tuned(run, device='cpu', base=tmp_path/'turned')
    made = LLAMATrainer(ModelConfig(str(tmp_path/'turned'), use_4bit=trained_in_4bit, max_length=128), LoRAConfig(r=4), DataConfig(str(place/'chats.jsonl'), val_size=.2),
                        TrainingConfig(str(place/'runs'), learning_rate=1e-2, max_steps=2, compute='fp32', allow_changes=('training.max_steps',)), device='cpu')
    with pytest.raises(ConfigError, match='base settings'): made.train(resume=run, progress=False)


WRONG = {
    'compute_metrics': (dict(compute_metrics=5), 'compute_metrics: found int'), 'device': (dict(device='gpu'), "device: found 'gpu'"), 'adapter': (dict(adapter=[1]), 'adapter: found list'),
    'tokenizer': (dict(tokenizer='demo'), 'tokenizer: found str'), 'callbacks': (dict(callbacks=Watch()), 'callbacks: found Watch'),
    'data': (dict(data=5), 'data: found int')}


@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_object_is_refused_by_name(name):
    objects, told = WRONG[name]
    with pytest.raises(ConfigError, match=told): LLAMATrainer(**objects)


@pytest.mark.parametrize('place', [None, 5, ['run-1']])
def test_load_tuned_wants_a_place(place):
    with pytest.raises(ConfigError, match=f'found {type(place).__name__}; give a run, its folder'): load_tuned(place)


@pytest.mark.parametrize('samples, told', [
    (5, 'samples: found int'), (0, 'samples: found int'), ('heron', 'samples: found str'), (lambda prompt: [], 'making sample replies failed'),
    (lambda: 7, 'making sample replies failed'), (lambda: ['a reply'], 'found str; return dictionaries')])
def test_samples_that_cannot_be_made_leave_no_run(place, samples, told):
    made = trainer(place, 'unsampled', max_steps=1)
    with pytest.raises(LlamaNbError, match=told): made.train(progress=False, samples=samples)
    assert made.run is None and not (place/'runs'/'unsampled').exists()


def missing_key(p): return {'score': {}['wings']}


@pytest.mark.parametrize('strategy', ['steps', 'epoch'])
@pytest.mark.parametrize('measured, told', [
    (lambda p: None, 'compute_metrics: found None; return a dictionary of numbers'), (lambda p: {'name': 'heron'}, 'compute_metrics: found .*heron'),
    (lambda p: .5, 'compute_metrics: found 0.5'), (lambda p: {'each': p.label_ids}, 'compute_metrics: found'), (missing_key, 'compute_metrics: your function raised KeyError')])
def test_metrics_that_cannot_work_are_found_before_the_first_step(place, measured, told, strategy):
    Watch.steps = 0
    made = trainer(place, 'unmeasurable', compute_metrics=measured, callbacks=[Watch()], eval_strategy=strategy, max_steps=4)
    with pytest.raises(ConfigError, match=told): made.train(progress=False)
    assert Watch.steps == 0 and made.run is None and not (place/'runs'/'unmeasurable').exists()


def test_metrics_that_need_more_than_one_batch_are_not_refused(place):
    "The trial hands over one batch first, and all rows if that is not enough; the run itself sees all rows."
    seen = []
    def counted(p):
        seen.append(p.predictions.shape[1])
        if seen[-1] < max(200, *seen[:-1], 0): raise ValueError('too few tokens')
        return {'tokens': seen[-1]}
    run = trainer(place, 'measured', split=dict(val_size=.4), compute_metrics=counted, max_steps=2, per_device_train_batch_size=1).train(progress=False)
    assert seen[0] < 200 < seen[1] == seen[-1], seen
    assert [value for _, value in run.metrics('eval_tokens')] == [seen[-1]]*len(run.metrics('eval_tokens')) != []


def test_a_run_that_a_later_check_refuses_leaves_no_folder(place):
    "The loop has begun, the trial has not."
    made = trainer(place, 'unmeasured', max_steps=1, split=dict(val_size=0), callbacks=[EarlyStoppingCallback(1)])
    with pytest.raises(ConfigError, match='EarlyStoppingCallback needs a validation loss'): made.train(progress=False)
    assert made.run is None and not (place/'runs'/'unmeasured').exists()


class Falls(TrainerCallback):
    "Ends the process, as it were, after a step."
    def __init__(self, step): self.step = step
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: raise InterruptedError('fell')


def fallen(made, step):
    with pytest.raises(InterruptedError): made.train(progress=False, callbacks=[Falls(step)])
    return made.run


def gone_on_with(run, **objects): return LLAMATrainer.from_config(load_config(run.folder/'config.yaml'), device='cpu', **objects).train(resume=run, progress=False)


@pytest.mark.parametrize('step', [1, 3])
def test_validation_sets_that_were_renamed_or_cut_elsewhere_are_refused(place, step):
    "The rows are the same; killed before a checkpoint and after one."
    near, far = chats(5, 'egret'), chats(4, 'stork')
    run = fallen(trainer(place, 'sets', data=chats(12), validation={'near': near, 'far': far}, max_steps=4, save_steps=2), step)
    for sets in ({'near': near, 'distant': far}, {'near': near[:4], 'far': near[4:] + far}, near + far):
        with pytest.raises(ConfigError, match='validation sets: near 5, far 4 → .*; give the same sets, under the same names, again with validation='):
            gone_on_with(run, data=chats(12), validation=sets)
    again = gone_on_with(run, data=chats(12), validation={'near': near, 'far': far})
    assert again.status == 'finished' and again.metrics('eval_near_loss') and again.metrics('eval_far_loss')


def test_validation_that_had_no_names_gets_none(place):
    run = fallen(trainer(place, 'unnamed-sets', data=chats(12), validation=chats(6, 'egret'), max_steps=4, save_steps=2), 3)
    with pytest.raises(ConfigError, match='validation sets: None → near 6'): gone_on_with(run, data=chats(12), validation={'near': chats(6, 'egret')})
    assert gone_on_with(run, data=chats(12), validation=chats(6, 'egret')).status == 'finished'


@pytest.mark.parametrize('step', [1, 3])
@pytest.mark.parametrize('in_memory', [True, False])
def test_a_run_with_a_tokenizer_of_its_own_asks_for_it_again(place, step, in_memory):
    def own():
        made = load_tokenizer(place/'tiny')
        made.chat_template = made.chat_template.replace("+ '\\n' +", "+ '\\n~' +").replace('assistant\\n', 'assistant\\n~')
        return made
    data = dict(data=chats(12)) if in_memory else {}
    run = fallen(trainer(place, 'own-template', tokenizer=own(), max_steps=4, save_steps=2, **data), step)
    with pytest.raises(ConfigError, match='template: .* → .*give the same tokenizer and template again with tokenizer=') as told: gone_on_with(run, **data)
    assert 'data.rows' not in str(told.value) and 'data=' not in str(told.value)
    assert gone_on_with(run, tokenizer=own(), **data).status == 'finished'
    plain = fallen(trainer(place, 'plain-template', max_steps=4, save_steps=2, **data), step)
    with pytest.raises(ConfigError, match='none, if the run had none'): gone_on_with(plain, tokenizer=own(), **data)
    assert gone_on_with(plain, **data).status == 'finished'


def test_a_run_with_a_changed_model_asks_for_it_again(place):
    def changed():
        made = AutoModelForCausalLM.from_pretrained(place/'tiny', dtype=torch.float32)
        made.model.norm.weight.data *= 1.25
        return made
    run = fallen(trainer(place, 'changed-model', model=changed(), max_steps=4, save_steps=2), 3)
    with pytest.raises(ConfigError, match='base weights: .*give the same model again with model='): gone_on_with(run)
    assert gone_on_with(run, model=changed()).status == 'finished'


@pytest.mark.parametrize('lose', ['merge_and_unload', 'unload', 'delete_adapter'])
def test_a_trainer_whose_adapter_is_gone_says_so(place, lose):
    "Before training, after it, and for the evaluation and the model given to another trainer."
    made = trainer(place, 'gone', max_steps=1)
    made.train(progress=False)
    getattr(made.model, lose)(*['default']*(lose == 'delete_adapter'))
    before = files_below(place/'runs')
    for use in (lambda: made.train(progress=False), lambda: made.hf_trainer and made.train(progress=False), made.evaluate,
                lambda: trainer(place, 'gone-too', model=made.model, tokenizer=made.tokenizer, max_steps=1).train(progress=False)):
        with pytest.raises(ConfigError, match='model: it has no adapter any more'): use()
    assert files_below(place/'runs') == before


@pytest.mark.parametrize('tokens', [{'lm_head': [5]}, {'embed_tokens': [5], 'lm_head': [6]}])
def test_an_adapter_with_settings_we_cannot_train_is_named_as_such(place, tmp_path, tokens):
    base = AutoModelForCausalLM.from_pretrained(place/'tiny', dtype=torch.float32)
    get_peft_model(base, LoraConfig(r=2, target_modules=['q_proj'], task_type='CAUSAL_LM', trainable_token_indices=tokens)).save_pretrained(tmp_path/'tokens')
    with pytest.raises(ConfigError, match='^adapter: found trainable_token_indices=.*merge it into its base') as told: trainer(place, adapter=tmp_path/'tokens')
    assert len(str(told.value)) <= 200 and 'lora.' not in str(told.value)


def files_below(folder): return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


@pytest.mark.parametrize('name', ['../heron', '..', '.', '', 'a/b', 'checkpoint-3', 'checkpoint-70-16bit', 'validation-16bit', 'VALIDATION', 5, b'test', 'n'*300])
def test_scores_stay_in_their_run_and_under_names_of_their_own(place, name, monkeypatch):
    "Refused before anything is scored, with a run or without."
    def scoring(*args, **kwargs): raise AssertionError('scored before the name was checked')
    monkeypatch.setattr('llama_nb.evaluation.EvaluationFramework.evaluate', scoring)
    made = trainer(place, 'scored', max_steps=1)
    for name_given in (name, str(place/'elsewhere')):
        with pytest.raises(ConfigError, match='^name .*choose another name') as told: made.evaluate(name=name_given)
        assert len(str(told.value)) <= 200
    if name != 5: return
    made.train(progress=False)
    before = files_below(place)
    with pytest.raises(ConfigError, match='^name 5'): made.evaluate(name=5)
    assert files_below(place) == before


def test_scores_under_a_name_that_is_free(place):
    made = trainer(place, 'named-scores', max_steps=1, eval_config=EvaluationConfig(metrics=('perplexity',), num_bootstrap=100, sample_prompts=0))
    run = made.train(progress=False)
    for name in (None, 'validation', 'by-hand'): made.evaluate(name=name)
    assert sorted(p.name for p in (run.folder/'eval').iterdir()) == ['by-hand', 'validation']


def test_wandb_keeps_one_run_over_a_resume(place, caplog):
    "One id in both halves, and the printed line names the place."
    def train(resume): return trainer(place, 'tracked', max_steps=2, save_steps=1, report_to=['wandb']).train(resume=resume, progress=False)
    with caplog.at_level(logging.WARNING, 'llama_nb'): run = train(False)
    shutil.rmtree(run.folder/'checkpoint-2')
    train(True)
    assert len({p.name.rpartition('-')[2] for p in (run.folder/'wandb').glob('offline-run-*')}) == 1
    line = next(r.getMessage() for r in caplog.records if 'wandb sync' in r.getMessage())
    assert list(Path('/').glob(line.rpartition('sync ')[2].lstrip('/'))), line


LOCALE = '''
import os, sys
sys.path.insert(0, 'tests')
from dataclasses import replace
from pathlib import Path
from test_own_objects import *
place = Path(sys.argv[1])
rows = [{'messages': [{'role': 'user', 'content': f'Où est le héron ? 鹭在哪里 {i}'}, {'role': 'assistant', 'content': f'Là-bas, à gauche: {i} 只'}]} for i in range(8)]
data = place/'data.jsonl'
data.write_text(chr(10).join(json.dumps(r, ensure_ascii=False) for r in rows), encoding='utf-8')
settings = place/'run.yaml'
settings.write_text(f'model: {{model_name: {place}/tiny, use_4bit: false, max_length: 256}}\\ndata: {{dataset_name: {data}, val_size: 0.25}}\\n'
                    f'training: {{output_dir: {place}/runs, run_name: first, max_steps: 1}}\\nevaluation: {{num_samples: 2, max_new_tokens: 4, num_bootstrap: 100}}\\n', encoding='utf-8')
made = LLAMATrainer.from_config(load_config(settings), device='cpu')
run = made.train(progress=False)
made.evaluate()
card = run.folder/'README.md'
card.write_text(card.read_text('utf-8') + '\\nCafé au lait, 茶\\n', encoding='utf-8')
made.evaluate()
assert card.read_text('utf-8').rstrip().endswith('Café au lait, 茶')
load_tuned(run, device='cpu')
print(ascii(made.chat('Où ça ? 哪里')))
print('all read as UTF-8 in', __import__('locale').getpreferredencoding(False))
'''


@pytest.mark.parametrize('charmap', ['ASCII', 'GBK', 'CP1252'])
def test_text_is_utf8_in_every_locale(place, tmp_path, charmap):
    "Data, settings, card and reports with French and Chinese, where the system's encoding is another."
    shutil.copytree(place/'tiny', tmp_path/'tiny')
    env = {**ENV, 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'LC_ALL': 'C'}
    if charmap != 'ASCII':
        name = {'GBK': 'zh_CN', 'CP1252': 'en_US'}[charmap]
        if shutil.which('localedef') is None: pytest.skip('localedef is not installed')
        made = subprocess.run(['localedef', '-i', name, '-f', charmap, str(tmp_path/f'{name}.{charmap}')], capture_output=True, text=True)
        if made.returncode > 1: pytest.skip(f'localedef cannot make {name}.{charmap}: {made.stderr[-100:]}')
        env |= {'LOCPATH': str(tmp_path), 'LC_ALL': f'{name}.{charmap}'}
    script = tmp_path/'script.py'
    script.write_text(LOCALE, encoding='utf-8')
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], env=env, cwd=Path(__file__).parent.parent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode('utf-8', 'replace')[-1500:]
    assert b'all read as UTF-8 in' in done.stdout and b'UTF-8' not in done.stdout.rsplit(b' ', 1)[1], done.stdout


@pytest.mark.parametrize('held', [dict(), dict(use_4bit=False, load_in_8bit=True), dict(use_4bit=False)], ids=['4 bits', '8 bits', '16 bits'])
def test_a_model_in_bfloat16_stays_so(place, tmp_path, held):
    "It is not computed in float32, and so it is refused to ask for that."
    from llama_nb.model import load_model
    mine = load_model(ModelConfig(str(place/'tiny'), bnb_4bit_compute_dtype='bfloat16', **held), device='cpu')
    training = TrainingConfig(str(tmp_path), 'half', learning_rate=1e-2, max_steps=2)
    with pytest.raises(ConfigError, match="found 'fp32', but the model that you gave computes in bfloat16"):
        LLAMATrainer(lora_config=LoRAConfig(r=2), training_config=replace(training, compute='fp32'), data=chats(), model=mine)
    made = LLAMATrainer(lora_config=LoRAConfig(r=2), training_config=training, data=chats(), model=mine)
    run = made.train(progress=False)
    assert load_config(run.folder/'config.yaml').model.bnb_4bit_compute_dtype == 'bfloat16'
    again = load_tuned(run, device='cpu')[0]
    assert again.get_input_embeddings().weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits(again), logits(made.model.eval()), rtol=0, atol=0.02)


@pytest.mark.parametrize('how', ['resized', 'merged'])
def test_a_model_that_was_changed_in_memory_is_saved_first(place, tmp_path, how):
    "Its run could not be loaded from the name of its base; saved with its tokenizer it can."
    from llama_nb.model import load_tokenizer
    mine, tokenizer = AutoModelForCausalLM.from_pretrained(place/'tiny'), load_tokenizer(place/'tiny')
    if how == 'resized':
        tokenizer.add_tokens(['<heron>'])
        mine.resize_token_embeddings(len(tokenizer))
    else:
        tuned = get_peft_model(mine, LoraConfig(r=2, target_modules=['v_proj'], init_lora_weights=False))
        mine = tuned.merge_and_unload()
    def make(model):
        lora = LoRAConfig(r=2, modules_to_save=['embed_tokens', 'lm_head'] if how == 'resized' else None)
        return LLAMATrainer(lora_config=lora, training_config=TrainingConfig(str(tmp_path/'runs'), max_steps=1, compute='fp32'), data=chats(), model=model, tokenizer=tokenizer)
    told = 'it was resized to 260 tokens, and .* has 259' if how == 'resized' else 'its weights are not those of'
    with pytest.raises(ConfigError, match=f'{told}.*save it with its tokenizer'): make(mine)
    for part in (mine, tokenizer): part.save_pretrained(tmp_path/'saved')
    made = make(AutoModelForCausalLM.from_pretrained(tmp_path/'saved'))
    run = made.train(progress=False)
    torch.testing.assert_close(logits(load_tuned(run, device='cpu')[0]), logits(made.model), rtol=0, atol=1e-5)


CHANGED_BASE = {'pissa': dict(init_lora_weights='pissa', target_modules=['q_proj', 'down_proj']), 'bias': dict(bias='all', target_modules=['v_proj'])}


@pytest.mark.parametrize('kind', CHANGED_BASE)
def test_an_adapter_whose_start_is_in_its_base_is_resumed(place, tmp_path, kind):
    "With and without a checkpoint, from `config.yaml` alone; biases that the base does not have are left out."
    save_foreign(place, tmp_path/'foreign', r=4, **CHANGED_BASE[kind])
    def begin(name, **more):
        training = TrainingConfig(str(tmp_path/'runs'), name, learning_rate=1e-2, max_steps=3, save_steps=2, compute='fp32')
        return LLAMATrainer(data_config=DataConfig(str(place/'chats.jsonl')), training_config=training, device='cpu', adapter=tmp_path/'foreign', **more)
    whole = begin('whole').train(progress=False)
    lora = whole.config['lora']
    assert (lora['init_lora_weights'], lora['bias']) == ('pissa' if kind == 'pissa' else True, 'none')
    with pytest.raises(Killed): begin('half', callbacks=[Dies()]).train(progress=False)
    half = tmp_path/'runs'/'half'
    run = LLAMATrainer.from_config(load_config(half/'config.yaml'), device='cpu').train(resume=half, progress=False)
    before, after = uninterrupted_again(whole, 3)
    assert before == after == published(run)
    torch.testing.assert_close(logits(load_tuned(run, device='cpu')[0]), logits(load_tuned(whole, device='cpu')[0]), rtol=0, atol=0)
