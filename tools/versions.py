"""Install the package as a user does, with other versions of what it stands on, and take it the whole way.

    python tools/versions.py oldest|locked|newest [--python python3.13] [--folder .cache/versions] [--model demo]
    python tools/versions.py table [--check]

`oldest` takes the lower bound of every requirement in settings.ini, `locked` the pins of constraints.txt, `newest` whatever is on the index today;
torch is always the one of constraints.txt. The environments stay in `--folder` and serve again: `newest` is brought up to date, the others are made
anew when their requirements change. Then, outside the checkout: `pip check`, the contract test, `doctor`, `selfcheck`, a training with validation and
checkpoints, the same training resumed from the middle, `evaluate`, `chat` with one prompt and with several turns. Ends with exit code 1 at the first
step that fails, and says what it printed.

`table` writes llama_nb/versions.json, from which `doctor` knows what is needed and what was tested; with `--check` it ends with exit code 1 if the file
is not what settings.ini and constraints.txt say."""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = shutil.ignore_patterns('.*', 'runs', 'build', 'dist', '*.egg-info', '__pycache__', '_docs', '_proc', 'nbs', 'bench')
SETS = ('oldest', 'locked', 'newest')

MAKE_MODEL = '''
import sys
from llama_nb.shapes import tiny_llama
from llama_nb.template import toy_tokenizer
tokenizer = toy_tokenizer('byte', 'chatml')
tokenizer.save_pretrained(sys.argv[1])
tiny_llama(vocab_size=len(tokenizer), hidden_size=128, max_position_embeddings=2048).save_pretrained(sys.argv[1])
'''
GAP = '''
import sys
from safetensors.torch import load_file
a, b = map(load_file, sys.argv[1:])
print(max(float((a[name] - b[name]).abs().max()) for name in a))
'''
# Several turns with a tuned model: the second prompt begins with what was read already. And what the libraries say is going away.
TALK = '''
import json, logging, sys, warnings
warnings.simplefilter('always')
told = []
warnings.showwarning = lambda message, *args, **kwargs: told.append(str(message))
class Listener(logging.Handler):
    def emit(self, record): told.append(record.getMessage())
from transformers.utils import logging as hf_logging
hf_logging.add_handler(Listener())
from llama_nb.config import load_config
from llama_nb.generate import ChatSession, generate_replies
from llama_nb.model import load_tuned
from llama_nb.train import LLAMATrainer
config = load_config(sys.argv[2], ['training.output_dir=' + sys.argv[3], 'training.max_steps=2'])
trainer = LLAMATrainer.from_config(config)
trainer.train(progress=False)
trainer.evaluate()
model, tokenizer = load_tuned(sys.argv[1])[:2]
chat = ChatSession(model, tokenizer, max_new_tokens=8)
chat.say('What is a tide?')
chat.messages = [{'role': 'user', 'content': 'What is a tide?'}, {'role': 'assistant', 'content': chat.last.text or 'Water.'}]
asked = [*chat.messages, {'role': 'user', 'content': 'And why twice a day?'}]
chat.say(asked[-1]['content'])
alone = generate_replies(model, tokenizer, [asked], max_new_tokens=8)[0].token_ids
print(json.dumps({'reused': chat.reused, 'same': alone == chat.last.token_ids, 'deprecated': sorted({t for t in told if 'deprecat' in t.lower() or 'will be removed' in t.lower()})}))
'''


def settings():
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def lower_bounds():
    "`name==version` for each requirement of settings.ini."
    found = (re.match(r'([\w.-]+)>=([\w.]+)', word) for word in settings()['requirements'].split())
    return [f'{m[1]}=={m[2]}' for m in found]


def torch_pin():
    "The line of constraints.txt that says which torch."
    return next(line.strip() for line in (ROOT/'constraints.txt').read_text(encoding='utf-8').splitlines() if line.startswith('torch=='))


def constraints(kind):
    "What pip must keep to, one line each."
    if kind == 'locked': return [line for line in (ROOT/'constraints.txt').read_text(encoding='utf-8').splitlines() if re.match(r'\w', line)]
    return [torch_pin(), *(line for line in (lower_bounds() if kind == 'oldest' else []) if not line.startswith('torch=='))]


def table():
    "What llama_nb/versions.json holds: of each requirement the oldest version that works, the first that does not, and the tested one."
    pins = {name.lower().replace('_', '-'): version for name, version in re.findall(r'^([\w.-]+)==([\w.]+)', (ROOT/'constraints.txt').read_text(encoding='utf-8'), re.M)}
    def facts(words):
        found = {}
        for word in words:
            name, bounds = re.match(r'([\w.-]+)(.*)', word).groups()
            limits = {sign: version for sign, version in re.findall(r'(>=|==|<)([\w.]+)', bounds)}
            found[name] = {'least': limits.get('>=', limits.get('==')), 'below': limits.get('<'), 'tested': pins.get(name.lower().replace('_', '-'))}
        return {name: {k: v for k, v in f.items() if v is not None} for name, f in found.items()}
    s, end = settings(), '_requirements'
    extras = {key.removesuffix(end): facts(s[key].split()) for key in s if key.endswith(end) and key != 'dev' + end}
    return json.dumps({'python': s['min_python'], 'packages': facts(s['requirements'].split()), 'extras': extras}, indent=1) + '\n'


class Failed(Exception): "A step that did not do what it should; its last lines."


def run(*command, timeout=600, **kwargs):
    "Run a command; its stdout. Raises `Failed` with the end of its output."
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout, **kwargs)
    if done.returncode: raise Failed(f"{' '.join(str(c)[:80] for c in command[:6])}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def clean_environment():
    "The environment without a checkout in it."
    return {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV')} | {'PYTHONNOUSERSITE': '1', 'PIP_DISABLE_PIP_VERSION_CHECK': '1'}


def make_environment(kind, folder, python):
    "A virtual environment with the package and what it asks for; the one of last time where the requirements are the same."
    limits = constraints(kind)
    version = run(python, '-c', 'import sys; print("{}.{}".format(*sys.version_info))').strip()
    asked, place = json.dumps([limits, settings()['requirements']]), folder/f'{kind}-{version}'
    env, bin, ready = clean_environment(), place/'bin', place/'made-from.json'
    if not ready.is_file() or ready.read_text(encoding='utf-8') != asked:
        shutil.rmtree(place, ignore_errors=True)
        run(python, '-m', 'venv', place, env=env)
        run(bin/'python', '-m', 'pip', 'install', '-q', torch_pin(), timeout=3000, env=env)
    (place/'limits.txt').write_text('\n'.join(limits) + '\n', encoding='utf-8')
    with tempfile.TemporaryDirectory() as tmp:
        tree = shutil.copytree(ROOT, Path(tmp)/'tree', ignore=NOT_OURS)
        newer = ['--upgrade', '--upgrade-strategy', 'eager'] if kind == 'newest' else []
        run(bin/'python', '-m', 'pip', 'install', '-q', *newer, '-c', place/'limits.txt', tree, 'pytest>=8', timeout=3000, env=env)
        run(bin/'python', '-m', 'pip', 'install', '-q', '--no-deps', '--force-reinstall', tree, env=env)  # this tree's, also where the version is the same
    ready.write_text(asked, encoding='utf-8')
    return bin


def the_whole_way(kind, bin, work, model):
    "Each step: what it is, and what to call."
    env = clean_environment() | {'HF_HUB_OFFLINE': '1', 'HF_EVALUATE_OFFLINE': '1', 'WANDB_MODE': 'offline', 'MPLBACKEND': 'agg', 'TOKENIZERS_PARALLELISM': 'false', 'NO_PROGRESS': '1'}
    there, python = dict(cwd=work, env=env), bin/'python'
    def cli(*words): return json.loads(run(bin/'llama-nb', *words, '--json', **there))
    tiny, config, runs = work/'tiny', work/'run.yaml', work/'runs'

    def pip_check(): run(python, '-m', 'pip', 'check', **there)
    def contract(): run(python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', ROOT/'tests'/'test_contract.py', **there)
    def doctor():
        report = cli('doctor')
        if not report['ok'] or not report['rows']: raise Failed(json.dumps(report, indent=1))
    def selfcheck():
        report = cli('selfcheck')
        if not report['ok']: raise Failed(json.dumps(report, indent=1))
    def train():
        if model == 'tiny': run(python, '-c', MAKE_MODEL, tiny, **there)
        config.write_text(f'''
model: {{model_name: {json.dumps(str(tiny) if model == 'tiny' else model)}, max_length: 512}}
lora: {{r: 4, lora_dropout: 0.1}}
data: {{dataset_name: dailydialog, data_path: sample, max_samples: 24, val_size: 0.2, on_overflow: drop_turns}}
training: {{output_dir: {json.dumps(str(runs))}, run_name: whole, learning_rate: 0.01, max_steps: 4, gradient_accumulation_steps: 2, save_steps: 2, eval_steps: 2}}
evaluation: {{num_samples: 3, max_new_tokens: 8}}
''', encoding='utf-8')
        cli('train', '--config', config)
        events = [json.loads(line) for line in (runs/'whole'/'events.jsonl').read_text(encoding='utf-8').splitlines()]
        kinds = [e.get('kind', e.get('event')) for e in events]
        if kinds.count('eval') < 2: raise Failed(f'{kinds.count("eval")} validations instead of two: {kinds}')
        for step in (2, 4):
            if not (runs/'whole'/f'checkpoint-{step}'/'MANIFEST.json').is_file(): raise Failed(f'no checkpoint-{step}')
    def accumulate():
        "Two micro-batches give the same adapter as one batch of both, in float32."
        same = ('lora.lora_dropout=0', 'training.compute=fp32', 'training.packing=false', 'training.eval_steps=4')
        for rows, micro_batches in ((2, 1), (1, 2)):
            cli('train', '--config', config, *same, f'training.run_name=rows-{rows}', f'training.per_device_train_batch_size={rows}',
                f'training.gradient_accumulation_steps={micro_batches}')
        gap = float(run(python, '-c', GAP, *(runs/f'rows-{rows}'/'adapter_model.safetensors' for rows in (2, 1)), **there))
        if gap > 1e-4: raise Failed(f'the adapters differ by {gap}')
    def resume():
        "From the middle to the end once more: the same weights, to the bit."
        adapter, old = runs/'whole'/'adapter_model.safetensors', runs/'whole'/'checkpoint-4'
        before = adapter.read_bytes()
        shutil.rmtree(old)
        adapter.unlink()
        cli('train', '--resume', runs/'whole')
        if adapter.read_bytes() != before: raise Failed('the resumed run ended with other weights')
    def evaluate():
        cli('evaluate', runs/'whole')
    def chat():
        if 'reply' not in (answer := cli('chat', runs/'whole', '--prompt', 'What is a tide?', '--max-new-tokens', '8')): raise Failed(str(answer))
    def turns():
        told = json.loads(run(python, '-c', TALK, runs/'whole', config, work/'more', **there).splitlines()[-1])
        ours = [t for t in told['deprecated'] if not t.startswith(('`torch.jit.', '_check_is_size'))]  # what libraries call among themselves
        if not told['reused'] or not told['same'] or (ours and kind == 'newest'): raise Failed(json.dumps(told, indent=1))
    return {'pip check': pip_check, 'contract': contract, 'doctor': doctor, 'selfcheck': selfcheck, 'train with validation and checkpoints': train,
            'two micro-batches = one batch': accumulate, 'resume from the middle': resume, 'evaluate': evaluate, 'chat --prompt': chat, 'several turns, and nothing deprecated': turns}


def versions_of(bin):
    "The packages that matter, as installed."
    names = [re.match(r'[\w.-]+', word)[0] for word in settings()['requirements'].split()]
    code = f'import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))'
    return json.loads(run(bin/'python', '-c', code))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('kind', choices=(*SETS, 'table'))
    p.add_argument('--python', default=sys.executable, help='the interpreter to make the environment from')
    p.add_argument('--folder', type=Path, default=Path(os.environ.get('LLAMA_NB_VERSIONS') or ROOT/'.cache'/'versions'), help='where environments are kept')
    p.add_argument('--model', default='tiny', help='tiny: random weights; or what model.model_name takes, e.g. demo')
    p.add_argument('--dry-run', action='store_true', help='ask pip only whether the versions resolve')
    p.add_argument('--check', action='store_true', help='with table: write nothing, only compare')
    a = p.parse_args()
    if a.kind == 'table':
        path = ROOT/'llama_nb'/'versions.json'
        if a.check: sys.exit(None if path.is_file() and path.read_text(encoding='utf-8') == table() else 'llama_nb/versions.json is not what settings.ini and constraints.txt say: run python tools/versions.py table')
        path.write_text(table(), encoding='utf-8')
        return
    if a.dry_run:
        with tempfile.TemporaryDirectory() as tmp:
            (limits := Path(tmp)/'limits.txt').write_text('\n'.join(constraints(a.kind)) + '\n', encoding='utf-8')
            tree = shutil.copytree(ROOT, Path(tmp)/'tree', ignore=NOT_OURS)
            run(a.python, '-m', 'venv', Path(tmp)/'venv', env=clean_environment())
            print(run(Path(tmp)/'venv'/'bin'/'python', '-m', 'pip', 'install', '-q', '--dry-run', '-c', limits, tree, timeout=3000, env=clean_environment()).strip())
        return
    try:
        began = time.monotonic()
        bin = make_environment(a.kind, a.folder.absolute(), a.python)
        print(f"ok   {a.kind}: " + ', '.join(f'{n} {v}' for n, v in versions_of(bin).items()) + f' ({time.monotonic() - began:.0f} s)', flush=True)
        with tempfile.TemporaryDirectory() as tmp:
            for name, step in the_whole_way(a.kind, bin, Path(tmp), a.model).items():
                began = time.monotonic()
                step()
                print(f'ok   {a.kind}: {name} ({time.monotonic() - began:.0f} s)', flush=True)
    except (Failed, subprocess.TimeoutExpired) as e:
        sys.exit(f"FAIL {a.kind}: {name if 'name' in locals() else 'installing'}\n{e}")


if __name__ == '__main__': main()
