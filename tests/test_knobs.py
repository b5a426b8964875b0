"""Each setting of a run does something, and a run that is stopped and resumed under it is the same run, bit for bit."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from llama_nb.config import DataConfig, LoRAConfig, ModelConfig, TrainingConfig
from llama_nb.errors import CheckpointError, RunInterrupted
from llama_nb.train import LLAMATrainer
from tiny_run import make_tiny

KNOBS = {
    'schedule': dict(lr_scheduler_type='warmup_stable_decay', warmup_steps=3, lr_scheduler_kwargs={'decay_type': 'linear'}),
    'optimizer': dict(adam_beta1=.8, adam_beta2=.95, adam_epsilon=1e-6, optim_args={'amsgrad': True}, weight_decay=.1),
    'loraplus': dict(loraplus_lr_ratio=8.0, weight_decay=.1),
    'loss': dict(label_smoothing=.1, neftune_noise_alpha=5.0),
    'loss on the plain path': dict(label_smoothing=.1, neftune_noise_alpha=5.0, fast_path=False),
    'workers and batches': dict(dataloader_num_workers=1, per_device_eval_batch_size=2),
    'epochs': dict(save_strategy='epoch', eval_strategy='epoch', save_steps='auto', eval_steps='auto', max_steps=-1, num_train_epochs=3.0, gradient_accumulation_steps=4),
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


BASES = {'8 bits': dict(load_in_8bit=True), 'biases': dict(use_4bit=False), 'biases of adapted layers': dict(use_4bit=False)}
BIAS = {'biases': 'all', 'biases of adapted layers': 'lora_only'}


@pytest.mark.parametrize('name', BASES)
def test_resumed_is_the_same_run_on_other_bases(tiny, name):
    "A base in 8 bits, and one whose layers have biases, some or all of them trained."
    from safetensors.torch import load
    folder = tiny/'biased'
    if name in BIAS and not folder.exists():
        from llama_nb.shapes import tiny_llama
        shutil.copytree(tiny/'tiny', folder)
        base = tiny_llama(vocab_size=259, max_position_embeddings=2048)
        base.config.attention_bias = True
        torch.manual_seed(0)
        type(base)(base.config).save_pretrained(folder)
    def train(resume=False):
        made = trainer(tiny, name.replace(' ', '-'), {}, {'bias': BIAS.get(name, 'none')})
        config = replace(made.config, model=ModelConfig(str(folder if name in BIAS else tiny/'tiny'), max_length=256, **BASES[name]))
        return LLAMATrainer.from_config(config, device='cpu').train(resume=resume, progress=False)
    whole = train()
    before = whole.metrics('loss'), weights(whole)
    trained = [key for key, value in load(before[1]).items() if key.endswith('.bias') and value.abs().max() > 0]
    assert len(trained) == (8 if name in BIAS else 0), trained  # q, k, v and o of two layers
    for checkpoint in whole.checkpoints()[1:]: shutil.rmtree(checkpoint)
    again = train(resume=whole)
    assert (again.metrics('loss'), weights(again)) == before


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


@pytest.mark.parametrize('kwargs', [{'lr_end': .5}, {'power': 'steep', 'lr_end': 'low'}])
def test_a_schedule_that_cannot_be_is_one_line(tiny, kwargs):
    "What the schedule itself refuses: an end above the rate, or no number."
    from llama_nb.errors import ConfigError
    with pytest.raises(ConfigError, match='training.lr_scheduler_kwargs: polynomial: '):
        trainer(tiny, 'steep', dict(lr_scheduler_type='polynomial', lr_scheduler_kwargs=kwargs), {}).train(progress=False)


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


def test_early_stopping_proven_ends_the_run_and_publishes_the_pick(tiny):
    "With a large delta no further gain is plausible at the third evaluation; the adapter is that of the pick."
    knobs = dict(early_stopping='proven', early_stopping_delta=50.0, max_steps=12, eval_steps=2, learning_rate=1e-3)
    made = LLAMATrainer(ModelConfig(str(tiny/'tiny'), use_4bit=False, max_length=256), LoRAConfig(r=4),
                        DataConfig('dailydialog', 'sample', max_samples=48, val_size=.5, on_overflow='drop_turns'),
                        TrainingConfig(output_dir=str(tiny/'runs'), run_name='proven', save_total_limit=9, per_device_train_batch_size=1, **knobs), device='cpu')
    run = made.train(progress=False)
    stopped, chosen = (next(e for e in run.events() if e['kind'] == kind) for kind in ('stopped', 'chosen'))
    assert stopped['step'] == 6 < 12 and run.status == 'finished' and stopped['bound'] < 50
    assert chosen['published'] <= chosen['best'] <= 6 and chosen['published'] == 2, chosen  # all are within delta of the best
    for step in (chosen['published'], chosen['best']): assert (run.folder/f'checkpoint-{step}').is_dir()
    assert weights(run) == (run.folder/f"checkpoint-{chosen['published']}"/'adapter_model.safetensors').read_bytes()
    assert f"the weights of step {chosen['published']}" in (run.folder/'README.md').read_text()


class Stop(TrainerCallback):
    "Asks for a stop within one step, as another process does."
    def __init__(self, step): self.step = step
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step: (Path(args.output_dir)/'STOP').touch()


def proven(tiny, name, **knobs):
    training = dict(early_stopping='proven', early_stopping_delta=50.0, max_steps=12, eval_steps=2, learning_rate=1e-3) | knobs
    return LLAMATrainer(ModelConfig(str(tiny/'tiny'), use_4bit=False, max_length=256), LoRAConfig(r=4),
                        DataConfig('dailydialog', 'sample', max_samples=48, val_size=.5, on_overflow='drop_turns'),
                        TrainingConfig(output_dir=str(tiny/'runs'), run_name=name, save_total_limit=9, per_device_train_batch_size=1, **training), device='cpu')


def outcome(run):
    "What a run has come to."
    state = json.loads((run.folder/'trainer_state.json').read_text())
    ends = [(e['kind'], e['step']) for e in run.events() if e['kind'] in ('stopped', 'finished')]
    return run.metrics('loss'), run.metrics('eval_loss'), weights(run), state['global_step'], ends[-2:], [c.name for c in run.checkpoints()]


def test_a_stop_that_is_proven_in_an_interrupted_step_stays_one(tiny):
    "Interrupted in the step whose evaluation ends the run, before that evaluation, or just after it."
    wanted = outcome(proven(tiny, 'proven-whole').train(progress=False))
    assert wanted[3] == 6
    with pytest.raises(RunInterrupted): proven(tiny, 'proven-cut').train(progress=False, callbacks=[Stop(6)])
    run = proven(tiny, 'proven-cut').train(resume=True, progress=False)
    assert outcome(run) == wanted
    events = run.path.read_text().splitlines()  # as if the process had died between the evaluation and the decision
    run.path.write_text('\n'.join(events[:next(i for i, line in enumerate(events) if '"stopped"' in line)]) + '\n')
    (run.folder/'adapter_model.safetensors').unlink()
    assert outcome(proven(tiny, 'proven-cut').train(resume=True, progress=False)) == wanted


def test_early_stopping_of_transformers_resumes_exactly(tiny):
    "Its count of evaluations without a gain outlives an interrupt, in the step that ends the run and in one before it."
    def make(name, *more):
        made = proven(tiny, name, early_stopping=None, early_stopping_delta=.01, load_best_model_at_end=True, eval_steps=1, save_steps=1)
        return lambda resume=False: made.train(resume=resume, progress=False, callbacks=[*more, EarlyStoppingCallback(3, 50.0)])
    wanted = outcome(make('patient')())
    assert wanted[3] == 4, 'the first evaluation counts as a gain, three more do not'
    for step in (2, 3, 4):
        with pytest.raises(RunInterrupted): make(f'patient-{step}', Stop(step))()
        assert outcome(make(f'patient-{step}')(resume=True)) == wanted, step


def test_load_best_model_at_end_publishes_the_lowest_loss(tiny):
    "A rate that is too high makes later losses worse, so the last checkpoint is not the best."
    run = trainer(tiny, 'lowest', dict(load_best_model_at_end=True, learning_rate=.5, eval_steps=1, max_steps=6), {}).train(progress=False)
    losses = dict(run.metrics('eval_loss'))
    best = min(losses, key=losses.get)
    assert best != max(losses), losses
    assert weights(run) == (run.folder/f'checkpoint-{best}'/'adapter_model.safetensors').read_bytes()


def test_push_to_hub_uploads_a_finished_run_and_nothing_unasked(tiny, monkeypatch):
    import huggingface_hub
    calls = []
    class Api:
        def create_repo(self, name, private, exist_ok): calls.append(('repo', name, private))
        def upload_folder(self, repo_id, folder_path, allow_patterns): calls.append(('upload', repo_id, tuple(allow_patterns)))
        def __getattr__(self, name): raise AssertionError(f'{name} was asked of the Hub')
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    monkeypatch.setattr(huggingface_hub, 'get_token', lambda: 'hf_not_a_token')
    monkeypatch.setattr(huggingface_hub.constants, 'is_offline_mode', lambda: False)
    trainer(tiny, 'unasked', {}, {}, max_steps=1).train(progress=False)
    assert calls == []
    run = trainer(tiny, 'asked', dict(push_to_hub=True, hub_model_id='me/mine'), {}, max_steps=1).train(progress=False)
    assert [c[:2] for c in calls] == [('repo', 'me/mine'), ('upload', 'me/mine')] and calls[0][2] is True
    sent = [p.name for p in run.folder.iterdir() if any(p.match(pattern) for pattern in calls[1][2])]
    assert 'adapter_model.safetensors' in sent and not {'events.jsonl', 'config.yaml', 'data.json', 'trained_rows.txt', 'optimizer.pt'} & set(sent)
    assert any(e['kind'] == 'uploaded' for e in run.events())


def test_trainable_token_indices_train_those_rows_alone(tiny):
    made = trainer(tiny, 'tokens', {}, dict(trainable_token_indices=[5, 7]), max_steps=2)
    from safetensors.torch import load
    before = made.model.get_base_model().get_input_embeddings()
    base = getattr(before, 'original_module', before).weight.detach().clone()
    found = {n: t for n, t in load(weights(made.train(progress=False))).items() if 'token' in n}
    assert [len(t) for t in found.values()] == [2], found.keys()
    after = made.model.get_base_model().get_input_embeddings()
    assert torch.equal(getattr(after, 'original_module', after).weight, base), 'the rows of other tokens moved'


def test_loraplus_trains_B_at_its_own_rate(tiny):
    made = trainer(tiny, 'plus', dict(loraplus_lr_ratio=8.0, lr_scheduler_type='constant', warmup_ratio=0.0), {}, max_steps=1)
    made.train(progress=False)
    groups = made.hf_trainer.optimizer.param_groups
    by_name = {id(p): n for n, p in made.model.named_parameters()}
    rates = {kind: {round(g['lr'], 6) for g in groups for p in g['params'] if kind in by_name[id(p)]} for kind in ('lora_A', 'lora_B')}
    assert rates == {'lora_A': {.01}, 'lora_B': {.08}}


def test_neftune_and_label_smoothing_change_training_and_not_validation(tiny):
    "The first validation loss, before any step has acted on the weights, is that of a plain run; the training loss is not."
    plain = trainer(tiny, 'plain-loss', {}, {}, max_steps=1, learning_rate=1e-9).train(progress=False)
    for name, knobs in (('noise', dict(neftune_noise_alpha=20.0)), ('smooth', dict(label_smoothing=.3))):
        run = trainer(tiny, name, knobs, {}, max_steps=1, learning_rate=1e-9).train(progress=False)
        assert abs(run.metrics('loss')[0][1] - plain.metrics('loss')[0][1]) > 1e-4, name
        assert abs(run.metrics('eval_loss')[0][1] - plain.metrics('eval_loss')[0][1]) < 1e-5, name


def test_a_chat_template_counts_for_a_tokenizer_in_memory(tiny):
    from llama_nb.model import load_tokenizer
    own = load_tokenizer(str(tiny/'tiny'))
    before = own.chat_template
    text = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    made = LLAMATrainer(ModelConfig(str(tiny/'tiny'), use_4bit=False), data_config=DataConfig('dailydialog', 'sample', chat_template=text), tokenizer=own, device='cpu')
    assert made.tokenizer.chat_template == text and own.chat_template == before


def test_load_in_8bit_holds_the_base_in_8_bits(tiny):
    made = LLAMATrainer(ModelConfig(str(tiny/'tiny'), load_in_8bit=True, max_length=256), LoRAConfig(r=4), DataConfig('dailydialog', 'sample', max_samples=12, val_size=.25, on_overflow='drop_turns'),
                        TrainingConfig(output_dir=str(tiny/'runs'), run_name='eight', max_steps=2, learning_rate=1e-2, per_device_train_batch_size=1), device='cpu')
    run = made.train(progress=False)
    assert {type(m).__name__ for n, m in made.model.named_modules() if n.endswith('q_proj.base_layer')} == {'Linear8bitLt'}
    from llama_nb.model import load_tuned
    assert {type(m).__name__ for n, m in load_tuned(run, device='cpu')[0].named_modules() if n.endswith('q_proj.base_layer')} == {'Linear8bitLt'}


def test_special_tokens_take_their_roles(tiny):
    made = LLAMATrainer(ModelConfig(str(tiny/'tiny'), use_4bit=False, special_tokens={'unk_token': '<pad>'}, additional_special_tokens=['A']), device='cpu')
    assert made.tokenizer.unk_token == '<pad>' and 'A' in made.tokenizer.all_special_tokens


def test_report_to_opens_only_what_was_named(tiny):
    run = trainer(tiny, 'tracked', dict(report_to=('tensorboard',)), {}, max_steps=1).train(progress=False)
    assert list((run.folder/'tensorboard').glob('events*')) and not (run.folder/'wandb').exists()
    assert not (trainer(tiny, 'untracked', {}, {}, max_steps=1).train(progress=False).folder/'tensorboard').exists()


def test_a_chat_template_counts_for_a_tokenizer_by_name(tiny, tmp_path):
    "The template's text, or a Jinja file; one that is not there is named."
    from llama_nb.errors import ConfigError
    (tmp_path/'own.jinja').write_text("{% for m in messages %}<|im_start|>{{ m['role'] }}> {{ m['content'] }}<|im_end|>{% endfor %}")
    def named(template): return LLAMATrainer(ModelConfig(str(tiny/'tiny'), use_4bit=False), data_config=DataConfig('dailydialog', 'sample', chat_template=template), device='cpu').tokenizer
    assert named(str(tmp_path/'own.jinja')).chat_template == (tmp_path/'own.jinja').read_text()
    assert named('{{ messages }}').chat_template == '{{ messages }}'
    with pytest.raises(ConfigError, match='no.jinja: cannot be read'): named(str(tmp_path/'no.jinja'))
