"""Conversations longer than the model was made for: refused with the setting that stretches RoPE, which every later use repeats."""
import json
import re

import pytest
import torch
from tiny_run import finish, make_tiny

from llama_nb.config import DataConfig, LoRAConfig, ModelConfig, TrainingConfig
from llama_nb.errors import ConfigError
from llama_nb.model import load_model, load_tuned
from llama_nb.sources import ROPE_FILE
from llama_nb.train import LLAMATrainer

IDS = torch.arange(3, 250).repeat(3)[None, :600]


@pytest.fixture(scope='module')
def short(tmp_path_factory):
    "A tiny model with positions for 512 tokens, and data with longer conversations."
    folder = tmp_path_factory.mktemp('rope')
    make_tiny(folder/'tiny')
    config = json.loads((folder/'tiny'/'config.json').read_text())
    (folder/'tiny'/'config.json').write_text(json.dumps(config | dict(max_position_embeddings=512)))
    text = 'the quick brown fox jumps over a lazy dog '
    rows = [dict(messages=[dict(role='user', content=f'{i} {text*i}'), dict(role='assistant', content=text*(i % 7 + 1))]) for i in range(1, 18)]
    (folder/'long.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return folder


def trainer(short, name, max_length, scaling=None):
    return LLAMATrainer(
        ModelConfig(str(short/'tiny'), use_4bit=False, max_length=max_length, rope_scaling=scaling, bnb_4bit_compute_dtype='float32'), LoRAConfig(r=4),
        DataConfig(str(short/'long.jsonl'), val_size=.2), TrainingConfig(output_dir=str(short/'runs'), run_name=name, max_steps=2, learning_rate=1e-2, compute='fp32'), device='cpu')


def logits(model):
    with torch.no_grad(): return model(IDS).logits


def test_too_long_is_refused_with_the_setting(short):
    with pytest.raises(ConfigError, match=r'positions for 512 tokens.*model\.rope_scaling=auto'): trainer(short, 'no', 1024).rows()
    with pytest.raises(ConfigError, match='positions for 614 tokens'): trainer(short, 'no', 1024, {'rope_type': 'linear', 'factor': 1.2}).rows()


@pytest.mark.parametrize('scaling', ['auto', {'rope_type': 'linear', 'factor': 2}, {'rope_type': 'dynamic', 'factor': 2.0}, {'rope_type': 'yarn', 'factor': 2, 'beta_fast': 16}])
def test_stretched_in_training_and_in_every_later_use(short, scaling):
    name = scaling if isinstance(scaling, str) else scaling['rope_type']
    made = trainer(short, name, 1024, scaling)
    run = made.train(progress=False)
    trained = logits(made.model)
    # recorded: in the run, beside the adapter, in each checkpoint, on the card
    settled = run.config['model']['rope_scaling']
    assert settled == ({'rope_type': 'yarn', 'factor': 2.0} if scaling == 'auto' else scaling)
    assert json.loads((run.folder/ROPE_FILE).read_text())['rope_scaling'] == settled
    assert (run.checkpoints()[-1]/ROPE_FILE).is_file()
    card = (run.folder/'README.md').read_text()
    assert 'stretched' in card and 'rope_parameters=' in card
    # used again: by a run, a checkpoint, and a bare copy of the adapter
    bare = short/f'bare-{name}'
    bare.mkdir()
    for file in ('adapter_model.safetensors', 'adapter_config.json', ROPE_FILE): (bare/file).write_bytes((run.folder/file).read_bytes())
    for place in (run, run.checkpoints()[-1], bare): torch.testing.assert_close(logits(load_tuned(place, device='cpu')[0]), trained, rtol=1e-4, atol=1e-5)
    plain = logits(load_model(ModelConfig(str(short/'tiny'), use_4bit=False, bnb_4bit_compute_dtype='float32'), device='cpu'))
    assert (logits(load_model(ModelConfig(str(short/'tiny'), use_4bit=False, max_length=1024, rope_scaling=scaling, bnb_4bit_compute_dtype='float32'), device='cpu')) - plain).abs().max() > 1e-3
    assert trainer(short, name, 1024, scaling).train(resume=run, progress=False).status == 'finished'
    with pytest.raises(ConfigError, match='model.rope_scaling'): trainer(short, name, 1024, {'rope_type': 'linear', 'factor': 3}).train(resume=run, progress=False)


def test_the_code_on_the_card_gives_the_same_model(short):
    run = trainer(short, 'card', 1024, 'auto').train(progress=False)
    code = re.findall(r'```python\n(.*?)```', (run.folder/'README.md').read_text(), re.S)[0].replace('folder = "."', f'folder = {str(run.folder)!r}')
    made = {}
    exec(code, made)
    torch.testing.assert_close(logits(made['model']), logits(load_tuned(run, device='cpu')[0]), rtol=1e-4, atol=1e-5)


def test_settings_are_checked():
    for wrong, said in (({'rope_type': 'ntk', 'factor': 2}, "allowed: 'linear'"), ({'rope_type': 'linear'}, 'factor'), ({'rope_type': 'linear', 'factor': 1}, 'number > 1'),
                        ({'rope_type': 'linear', 'factor': 2, 'beta_fast': 1}, 'unknown'), ('yes', 'auto')):
        with pytest.raises(ConfigError, match=said): ModelConfig('x', rope_scaling=wrong)


def test_from_the_command_line(short):
    code, out = finish('train', '--preset', 'demo', f'model.model_name={short}/tiny', 'model.use_4bit=false', 'model.max_length=1024', f'data.dataset_name={short}/long.jsonl',
                       f'training.output_dir={short}/cli', 'training.run_name=long', 'training.max_steps=1', 'model.rope_scaling={rope_type: linear, factor: 2}')
    assert code == 0, out
    code, out = finish('chat', short/'cli'/'long', '--prompt', 'hello', '--max-new-tokens', '4')
    assert code == 0, out


@pytest.mark.parametrize('scaling, max_length', [('auto', 1200), ({'rope_type': 'dynamic', 'factor': 2.0}, 1000)])
def test_a_stretched_model_in_memory_keeps_its_rope(short, scaling, max_length):
    name = f'memory{max_length}'
    mine = load_model(ModelConfig(str(short/'tiny'), use_4bit=False, max_length=max_length, rope_scaling=scaling, bnb_4bit_compute_dtype='float32'), device='cpu')
    made = LLAMATrainer(model=mine, lora_config=LoRAConfig(r=4), data_config=DataConfig(str(short/'long.jsonl'), val_size=.2),
                        training_config=TrainingConfig(output_dir=str(short/'runs'), run_name=name, max_steps=2, learning_rate=1e-2, compute='fp32'))
    run = made.train(progress=False)
    saved = run.config['model']
    assert saved['rope_scaling'] == mine.stretched_rope['rope_scaling']
    again = load_tuned(run.folder, device='cpu')[0]
    assert torch.equal(logits(again), logits(made.model.eval()))
    plain = load_model(ModelConfig(str(short/'tiny'), use_4bit=False, bnb_4bit_compute_dtype='float32'), device='cpu')
    with again.disable_adapter(): assert not torch.allclose(logits(plain), logits(again), atol=1e-3)
    if scaling != 'auto':
        mine = load_model(made.config.model, device='cpu')  # the first one holds an adapter by now
        with pytest.raises(ConfigError, match='stretched for 1000'): LLAMATrainer(ModelConfig(max_length=512), model=mine, data_config=DataConfig(str(short/'long.jsonl')))
