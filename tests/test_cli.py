"""The command line as a user meets it: real processes, real exit codes, one line for each error."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CLI = [sys.executable, '-m', 'llama_nb']
MESSAGES = [{'role': 'user', 'content': 'What is a tide?'}, {'role': 'assistant', 'content': 'The sea breathing, twice a day.'}]


def environment(**env):
    "What a process of ours sees: this tree, one thread, no Hub."
    given = {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'WANDB_MODE': 'offline'}
    return {**os.environ, **given, **env}


def llama_nb(*args, env=None, cwd=None, input=None):
    "Run `llama-nb args...` in a process of its own."
    return subprocess.run([*CLI, *map(str, args)], capture_output=True, text=True, timeout=300, env=environment(**(env or {})), cwd=cwd, input=input)




def refused(done, code, *words):
    "Assert exit code, one clear last line on stderr that holds the words, before it at most stage lines, nothing on stdout."
    *stages, last = done.stderr.strip().splitlines()
    assert done.returncode == code, f'exit code {done.returncode}, stderr: {done.stderr[-1500:]}'
    assert 'Traceback' not in done.stderr + done.stdout
    assert done.stdout == ''
    assert last.startswith('llama-nb: ') and len(last) < 420, last
    assert len(stages) < 8 and not any(s.startswith('llama-nb: ') or 'Error' in s for s in stages), stages
    for word in words: assert word in last, f'{word!r} is not in {last!r}'


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with a two-layer model that has the demo model's tokenizer, twelve conversations, and a config that trains one on the other."
    folder = tmp_path_factory.mktemp('cli')
    from llama_nb.model import load_tokenizer
    from llama_nb.shapes import tiny_llama
    tokenizer = load_tokenizer('demo')
    model = tiny_llama(vocab_size=None, like='demo', max_position_embeddings=512)
    model.save_pretrained(folder/'tiny')
    tokenizer.save_pretrained(folder/'tiny')
    rows = [{'messages': [{'role': 'user', 'content': f'Name a number after {i}.'}, {'role': 'assistant', 'content': f'{i + 1} is the one.'}]} for i in range(12)]
    (folder/'chats.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (folder/'run.yaml').write_text(f'''
model: {{model_name: {folder/'tiny'}, max_length: 64}}
lora: {{r: 2, lora_alpha: 4}}
data: {{dataset_name: {folder/'chats.jsonl'}, val_size: 0.25}}
training: {{output_dir: {folder/'runs'}, max_steps: 3, per_device_train_batch_size: 1, learning_rate: 1e-3}}
evaluation: {{metrics: [perplexity], num_samples: 3, max_new_tokens: 8, num_bootstrap: 100}}
''')
    return folder


def test_help_version_and_usage():
    shown = llama_nb('--help')
    assert shown.returncode == 0 and all(verb in shown.stdout for verb in 'train evaluate chat data plan runs demo doctor config'.split())
    refused(llama_nb('trian'), 2, "'trian'", '--help')
    refused(llama_nb('train', '--fast'), 2, '--fast', 'llama-nb train --help')
    refused(llama_nb('train'), 2, '--config', '--preset')


def test_a_misspelt_key_is_2_with_a_suggestion(tmp_path):
    refused(llama_nb('config', 'show', 'training.learnin_rate=1e-4'), 2, 'training.learnin_rate', "did you mean 'learning_rate'?")
    (tmp_path/'run.yaml').write_text('training:\n  learnin_rate: 1e-4\n')
    refused(llama_nb('train', '--config', tmp_path/'run.yaml'), 2, 'run.yaml', "did you mean 'learning_rate'?")
    refused(llama_nb('train', '--config', tmp_path/'gone.yaml'), 2, 'gone.yaml', 'not found')


def test_a_wrong_model_name_is_3(place):
    refused(llama_nb('evaluate', place/'nowhere'), 3, 'nowhere', 'no run')
    done = llama_nb('train', '--config', place/'run.yaml', 'model.model_name=meta-lama/Llama-2-7b-hf')
    refused(done, 3, 'meta-lama/Llama-2-7b-hf', 'HF_HUB_OFFLINE')
    assert done.stderr.count('\n') == 1  # before anything was read or loaded


def test_a_crashed_run_says_where(place):
    "A run that died before its first checkpoint is named with its step by everything that would load it."
    folder = place/'runs'/'dead'
    folder.mkdir(parents=True)
    (folder/'events.jsonl').write_text(''.join(json.dumps(e) + '\n' for e in (dict(kind='created', time=1), dict(kind='start', step=0, total_steps=9, time=1), dict(kind='train', step=7, loss=2.0, time=2), dict(kind='failed', step=7, error='TypeError', time=3))))
    (folder/'config.yaml').write_text((place/'run.yaml').read_text())
    for command in (['chat', folder, '--prompt', 'hi'], ['evaluate', folder]): refused(llama_nb(*command), 1, 'dead crashed at step 7, before its first checkpoint')
    shutil.rmtree(folder)


def test_an_unreachable_hub_is_3_for_models_and_4_for_data(place):
    nowhere = {'HF_HUB_OFFLINE': '0', 'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': str(place/'empty_cache')}
    refused(llama_nb('chat', 'someone/some-model', '--prompt', 'hi', env=nowhere), 3, 'someone/some-model')
    refused(llama_nb('data', 'dailydialog', env=nowhere), 4, 'dailydialog', 'sample')


def test_bad_data_is_4(tmp_path):
    (tmp_path/'empty.jsonl').write_text('')
    (tmp_path/'mute.jsonl').write_text('\n'.join(json.dumps({'messages': MESSAGES[:1]}) for _ in range(3)))
    (tmp_path/'silent.jsonl').write_text('\n'.join(json.dumps({'messages': [MESSAGES[0], {'role': 'assistant', 'content': ''}]}) for _ in range(3)))
    refused(llama_nb('data', tmp_path/'gone.jsonl'), 4, 'gone.jsonl')
    refused(llama_nb('data', tmp_path/'empty.jsonl'), 4, 'empty.jsonl', 'empty')
    for name, word in (('mute.jsonl', 'no assistant turn'), ('silent.jsonl', 'assistant content is empty')):
        done = llama_nb('data', tmp_path/name)  # every row is named, although none is good
        assert done.returncode == 4 and 'Traceback' not in done.stderr and len(done.stderr.splitlines()) == 4
        assert f'{name}:1 ' in done.stdout and '(and 2 more rows: 2-3)' in done.stdout and done.stdout.count(word) == 1


def tiny_disk(folder):
    "Words before a command that give it a 3 MB file system at `folder`; `None` where the system allows no user namespace."
    folder.mkdir()
    mount = ['unshare', '--mount', '--user', '--map-root-user', 'sh', '-c', 'mount -t tmpfs -o size=3m none "$0" && exec "$@"', str(folder)]
    allowed = shutil.which('unshare') and subprocess.run([*mount, 'true'], capture_output=True).returncode == 0
    return mount if allowed else None


def test_too_little_disk_is_3(place, tmp_path):
    small = tmp_path/'small'
    command = [*CLI, 'train', '--config', str(place/'run.yaml'), f'training.output_dir={small}']
    if mount := tiny_disk(small): command, env = [*mount, *command], environment()
    else:  # a disk that says it is full: the same check, without a real one
        (tmp_path/'sitecustomize.py').write_text('import shutil, collections\nusage = collections.namedtuple("usage", "total used free")\nshutil.disk_usage = lambda path: usage(3 << 20, 3 << 20, 0)\n')
        env = environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    refused(done, 3, 'disk')


def test_an_error_is_one_json_object_too(tmp_path):
    (tmp_path/'empty.jsonl').write_text('')
    done = llama_nb('data', tmp_path/'empty.jsonl', '--json')
    found = json.loads(done.stdout)
    assert (done.returncode, found['exit_code']) == (4, 4) and 'empty' in found['error']


def test_train_evaluate_chat_and_runs(place):
    done = llama_nb('train', '--config', place/'run.yaml', 'training.run_name=whole', '--evaluate', '--json')
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)  # exactly one object, whatever the libraries print
    assert told['status'] == 'finished' and Path(told['run']) == place/'runs'/'whole'
    assert (place/'runs'/'whole'/'adapter_model.safetensors').is_file()
    answer = llama_nb('chat', told['run'], '--prompt', 'Name a number after 3.', '--max-new-tokens', 5, '--json')
    reply = json.loads(answer.stdout)
    assert answer.returncode == 0 and 1 <= reply['num_tokens'] <= 5 and isinstance(reply['ended'], bool)
    listed = json.loads(llama_nb('runs', place/'runs', '--json').stdout)['runs']
    assert [(r['run'], r['status'], r['step']) for r in listed] == [('whole', 'finished', 3)]
    assert llama_nb('runs', place/'runs').stdout.split()[:1] == ['run']


def test_stage_lines_come_before_torch(place, tmp_path):
    (tmp_path/'torch.py').write_text('raise ImportError("torch is wanted")')
    (tmp_path/'run').mkdir()
    shutil.copy(place/'run.yaml', tmp_path/'run'/'config.yaml')
    (tmp_path/'run'/'data.json').write_text(json.dumps({'chat': {'system': 'Be brief.'}}))
    env = {'PYTHONPATH': os.pathsep.join([str(tmp_path), str(ROOT)])}
    for args, stages in ((['chat', place/'tiny', '--prompt', 'hi'], ['loading']), (['evaluate', tmp_path/'run'], ['evaluating']),
                         (['chat', tmp_path/'run'], ["system message of the training data: 'Be brief.'", 'loading'])):
        done = llama_nb(*args, env=env)
        *said, last = done.stderr.strip().splitlines()
        assert done.returncode == 1 and 'torch is wanted' in last, done.stderr
        assert [line.startswith(stage) for line, stage in zip(said, stages)] == [True]*len(stages), said
    refused(llama_nb('evaluate', tmp_path/'gone', env=env), 3, 'no run')


def test_ctrl_c_is_130_and_resume_finishes(place):
    args = ['train', '--config', str(place/'run.yaml'), 'training.run_name=cut', 'training.max_steps=60']
    process = subprocess.Popen([*CLI, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    events = place/'runs'/'cut'/'events.jsonl'
    for _ in range(1200):
        if process.poll() is not None or (events.exists() and '"train"' in events.read_text()): break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err[-2000:]
    assert 'Traceback' not in err and 'resume' in err.splitlines()[-1], err[-500:]
    resumed = llama_nb('train', '--resume', place/'runs'/'cut', '--json')
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert json.loads(resumed.stdout)['status'] == 'finished'
