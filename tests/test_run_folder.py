"""A finished run is a standard PEFT folder: it loads in a process that has never heard of this library."""
import json
import subprocess
import sys

import pytest
import yaml
from tiny_run import ENV, finish

PROMPT = 'How was your day?'

# what a stranger would write, with nothing but the folder; its settings are those of the run
STRANGER = '''
import json, sys
import torch, yaml
from peft import AutoPeftModelForCausalLM
from bitsandbytes.functional import has_avx512bf16
from transformers import AutoTokenizer, BitsAndBytesConfig
folder, out = sys.argv[1:]
settings, dtype = yaml.safe_load(open(f'{folder}/config.yaml'))['model'], getattr(torch, json.load(open(f'{folder}/environment.json'))['compute_dtype'])
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=settings['bnb_4bit_quant_type'], bnb_4bit_use_double_quant=settings['use_nested_quant'], bnb_4bit_compute_dtype=dtype)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer.apply_chat_template([{'role': 'user', 'content': sys.stdin.read()}], add_generation_prompt=True, return_tensors='pt', return_dict=True)['input_ids']
found = {}
for name, more in (('16-bit', {}), ('4-bit', dict(quantization_config=four_bit, device_map={'': 'cpu'}))):
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype, **more).eval()
    for repacked in (False, True):  # on CPUs with AVX512-BF16, bitsandbytes repacks weights at the first evaluation, with rounded scales
        for m in model.modules():
            if hasattr(m, 'support_avx512bf16_for_cpu'): m.support_avx512bf16_for_cpu = repacked and has_avx512bf16()
        with torch.no_grad(): found[name, repacked] = model(ids).logits.float()
torch.save({'ids': ids, **found}, out)
assert not [m for m in sys.modules if m.split('.')[0] == 'llama_nb']
'''

OURS = '''
import sys
import torch
from bitsandbytes.functional import has_avx512bf16
from llama_nb.model import load_tuned
folder, out = sys.argv[1:]
model, tokenizer = load_tuned(folder, device='cpu')
found, ids = {}, torch.load(out)['ids']
for repacked in (False, True):
    if repacked:
        for m in model.modules():
            if hasattr(m, 'support_avx512bf16_for_cpu'): m.support_avx512bf16_for_cpu = has_avx512bf16()
    with torch.no_grad(): found[repacked] = model(ids).logits.float()
torch.save({'repacks': bool(has_avx512bf16()), **found}, out + '.ours')
'''


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "Three steps on the demo model, in 4 bits."
    folder = tmp_path_factory.mktemp('folder')
    config = folder/'config.yaml'
    config.write_text(yaml.safe_dump(dict(
        preset='demo', data=dict(max_samples=12), training=dict(output_dir=str(folder/'runs'), run_name='short', max_steps=3, learning_rate=0.001))))
    code, out = finish('train', '--config', config)
    assert code == 0, out
    return folder/'runs'/'short'


def test_layout(run):
    "Everything a PEFT tool or a later reader looks for, and nothing that should not be there."
    names = {p.name for p in run.iterdir()}
    assert names >= {'adapter_model.safetensors', 'adapter_config.json', 'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja', 'README.md', 'config.yaml',
                     'data.json', 'environment.json', 'events.jsonl', 'trainer_state.json', 'plots'}
    assert (run/'plots'/'training.png').is_file() and not list(run.rglob('*.bin'))
    assert (run/'adapter_model.safetensors').stat().st_mode == (run/'config.yaml').stat().st_mode  # by the umask, not 0600
    assert json.loads((run/'adapter_config.json').read_text())['base_model_name_or_path']
    card = (run/'README.md').read_text()
    assert 'More Information Needed' not in card and str(run.parent) not in card


def test_loads_without_us(run, tmp_path, capsys):
    "Equal logits in the run's own settings; the 16-bit base is another model, and by how much is printed."
    import torch
    out = str(tmp_path/'logits.pt')
    env = {**ENV, 'PYTHONPATH': ''}
    done = subprocess.run([sys.executable, '-c', STRANGER, str(run), out], input=PROMPT, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run([sys.executable, '-c', OURS, str(run), out], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, ours = torch.load(out), torch.load(out + '.ours')
    def apart(a, b): return (a - b).abs().max().item()
    assert apart(theirs['4-bit', False], ours[False]) == 0  # as it was trained
    assert apart(theirs['4-bit', True], ours[True]) == 0  # as bitsandbytes runs it on this CPU when nobody asks
    difference = apart(theirs['16-bit', False], ours[False])
    assert 0 < difference < float('inf')
    with capsys.disabled():
        print(f'\n4-bit load: max |Δlogit| 0; 16-bit load: {difference:.2f}')
        if ours['repacks']: print(f"bitsandbytes' repacked layout on this CPU (AVX512-BF16): {apart(ours[False], ours[True]):.2f} from the layout of training")
