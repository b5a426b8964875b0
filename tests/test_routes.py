"""One set of settings gives one adapter, whether it is written in a notebook, in YAML or on the command line, and wherever the data is."""
import hashlib
import json

import torch
import yaml
from tiny_run import finish

from llama_nb.config import DataConfig, LoRAConfig, ModelConfig, TrainingConfig, load_config
from llama_nb.data import load_data
from llama_nb.train import LLAMATrainer

torch.set_num_threads(1)  # as a process of the command line has in these tests
MODEL, LORA = dict(use_4bit=True, max_length=128), dict(r=4, lora_dropout=.1, rank_pattern={'q_proj': 8})
TRAINING = dict(learning_rate=.01, max_steps=4, save_steps=2, eval_steps=2, gradient_accumulation_steps=2, lr_scheduler_type='linear', warmup_steps=1)


def sha(folder): return hashlib.sha256((folder/'adapter_model.safetensors').read_bytes()).hexdigest()


def notebook(place, name, data_config=None, **objects):
    made = LLAMATrainer(ModelConfig(str(place/'tiny'), **MODEL), LoRAConfig(**LORA), data_config or DataConfig(val_size=.1),
                        TrainingConfig(output_dir=str(place/'runs'), run_name=name, **TRAINING), device='cpu', **objects)
    return made.train(progress=False).folder


def test_three_routes_one_adapter(place):
    file = DataConfig(str(place/'chats.jsonl'), val_size=.1)
    wanted = sha(notebook(place, 'notebook', file))
    sections = dict(model=dict(model_name=str(place/'tiny'), **MODEL), lora=LORA, data=dict(dataset_name=str(place/'chats.jsonl'), val_size=.1),
                    training=dict(output_dir=str(place/'runs'), run_name='yaml', **TRAINING))
    (place/'run.yaml').write_text(yaml.safe_dump(sections))
    assert sha(LLAMATrainer.from_config(load_config(place/'run.yaml'), device='cpu').train(progress=False).folder) == wanted
    code, out = finish('train', '--config', place/'run.yaml', 'training.run_name=cli-yaml')
    assert code == 0 and sha(place/'runs'/'cli-yaml') == wanted, out
    words = [f'{section}.{key}={json.dumps(value) if isinstance(value, (dict, bool)) else value}' for section, values in sections.items() for key, value in values.items()]
    (place/'other.yaml').write_text('lora: {r: 16}\n')  # each of its settings is overridden
    code, out = finish('train', '--config', place/'other.yaml', *words, 'training.run_name=cli-words')
    assert code == 0 and sha(place/'runs'/'cli-words') == wanted, out


def test_data_in_memory_gives_the_same_adapter(place):
    "A list, a generator, a Dataset, a DataFrame, and what load_data returns."
    import datasets
    rows = [json.loads(line) for line in (place/'chats.jsonl').read_text().splitlines()]
    wanted = sha(notebook(place, 'from-file', DataConfig(str(place/'chats.jsonl'), val_size=.1)))
    objects = {'list': rows, 'generator': (row for row in rows), 'dataset': datasets.Dataset.from_list(rows), 'frame': datasets.Dataset.from_list(rows).to_pandas(),
               'loaded': load_data(str(place/'chats.jsonl'), val_size=.1)}
    for name, data in objects.items(): assert sha(notebook(place, f'memory-{name}', data=data)) == wanted, name
