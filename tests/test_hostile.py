"""Files made to harm: no code of theirs runs, nothing is written outside, and each ends within seconds in one line."""
import json
import os
import pickle
import resource
import shutil
import struct
import time
import zipfile
from pathlib import Path

import pytest
from fork_run import fork, record, train, wait
from safetensors.torch import save_file

from llama_nb.checkpoints import MANIFEST, verify_checkpoint, write_manifest
from llama_nb.errors import LlamaNbError
from llama_nb.runs import Run

LIMIT_S, LIMIT_BYTES = 5, 500*2**20


class Evil:
    "A pickle that leaves a mark when it is loaded."
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return (os.mkdir, (self.mark,))


def within_limits(work, log):
    "Run `work` in a child with a limit on memory and time; returns its exit code, its last line and its seconds."
    def limited():
        now = int(next(line.split()[1] for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmSize')))*1024
        resource.setrlimit(resource.RLIMIT_AS, (now + LIMIT_BYTES, now + LIMIT_BYTES))
        try: work()
        except LlamaNbError as e:
            assert '\n' not in str(e), str(e)
            raise
    Path(log).unlink(missing_ok=True)
    began, child = time.monotonic(), fork(limited, log)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > began + LIMIT_S: os.kill(child, 9)
        time.sleep(0.01)
    took, code = time.monotonic() - began, wait(child)
    lines = Path(log).read_text().splitlines()
    return code, lines[-1] if lines else '', round(took, 2)


LOADABLE = ['optimizer.pt', 'scheduler.pt', 'rng_state.pth', 'trainer_state.json', 'run.json', 'adapter_model.safetensors', 'adapter_config.json', 'adapter_model.bin',
            'pytorch_model.bin', 'training_args.bin', 'scaler.pt', 'custom_checkpoint_0.pkl', 'random_states_0.pkl', 'data.npy', 'optimizer.bin', 'model.pickle']


@pytest.mark.parametrize('name', LOADABLE)
def test_a_pickle_in_a_checkpoint_does_not_run(tiny, undisturbed, name, tmp_path):
    "Under each name that a loader might look for, with a manifest that fits: refused in one line, or not looked at."
    mark = tmp_path/'ran'
    run = Run(shutil.copytree(undisturbed.folder, undisturbed.folder.parent/'hostile', dirs_exist_ok=True))
    for checkpoint in run.checkpoints():
        (checkpoint/name).write_bytes(pickle.dumps(Evil(mark)))
        write_manifest(checkpoint, int(checkpoint.name.split('-')[1]), run.id)
    shutil.rmtree(run.checkpoints()[-1])  # so that there is a step to take
    code = wait(fork(train(tiny[1], 'hostile', resume=True), tmp_path/'log'))
    said = (tmp_path/'log').read_text().splitlines()
    assert not mark.exists(), 'code ran'
    passed_by = name == 'adapter_config.json' or name.endswith(('.bin', '.pkl', '.npy', '.pickle'))  # not looked at: the checkpoint is skipped, or this file of it
    assert code == (0 if passed_by else 1), (code, said)
    if code: assert said[-1].startswith(('CheckpointError: ', 'ConfigError: ')) and len(said[-1]) < 300, said
    shutil.rmtree(run.folder)
    record('hostile file', kind='pickle', name=name, code_ran=False)


def test_code_files_are_refused(undisturbed, tmp_path):
    "A file of a kind whose loader may run code makes a checkpoint invalid, even if its manifest lists it."
    for name in LOADABLE[7:10] + LOADABLE[11:]:
        copy = Path(shutil.copytree(undisturbed.checkpoints()[-1], tmp_path/name/'checkpoint-8'))
        (copy/name).write_bytes(b'x')
        write_manifest(copy, 8, undisturbed.id)
        assert verify_checkpoint(copy) == [f'{name} is of a kind that can run code when it is loaded']


def test_a_pickle_in_a_published_run_does_not_run(undisturbed, tmp_path):
    "The same at the top of a run folder, where `load_tuned` looks: only safetensors and JSON are read."
    from llama_nb.model import load_tuned
    for name in ('adapter_model.bin', 'pytorch_model.bin', 'training_args.bin', 'adapter_model.safetensors'):
        folder = Path(shutil.copytree(undisturbed.folder, tmp_path/name, ignore=shutil.ignore_patterns('checkpoint-*')))
        if name.endswith('.bin') and name.startswith('adapter'): (folder/'adapter_model.safetensors').unlink()
        (folder/name).write_bytes(pickle.dumps(Evil(tmp_path/'ran')))
        if name.startswith('adapter'):
            with pytest.raises(LlamaNbError) as e: load_tuned(folder, device='cpu')
            assert '\n' not in str(e.value)
        else: load_tuned(folder, device='cpu')
        assert not (tmp_path/'ran').exists()


def safetensors_files(good):
    "Eight files that are not what they say."
    head = lambda text, data=b'': struct.pack('<Q', len(text)) + text + data
    entry = lambda begin, end, shape='[4]': b'{"a":{"dtype":"F32","shape":%s,"data_offsets":[%d,%d]}}' % (shape.encode(), begin, end)
    return {'a header of 2^60 bytes': struct.pack('<Q', 2**60) + b'{}', 'a header that is no JSON': head(b'{"a":'), 'offsets behind the end': head(entry(0, 2**40)), 'a shape that overflows': head(entry(0, 16, '[4611686018427387904,4]'), bytes(16)),
            'overlapping tensors': head(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}', bytes(24)), 'cut in the middle': good[:len(good)//2], 'empty': b'',
            'not a number': None}


def test_hostile_safetensors(undisturbed, tmp_path):
    "As the adapter of a run: one line, no time, no memory."
    from llama_nb.lora import check_adapter
    folder = Path(shutil.copytree(undisturbed.folder, tmp_path/'run', ignore=shutil.ignore_patterns('checkpoint-*')))
    path = folder/'adapter_model.safetensors'
    from safetensors.torch import load_file
    tensors, files = load_file(path), safetensors_files(path.read_bytes())
    for what, content in files.items():
        path.unlink()
        if content is None: save_file({k: v*float('nan') for k, v in tensors.items()}, path)
        else: path.write_bytes(content)
        code, said, took = within_limits(lambda: check_adapter(folder), tmp_path/'log')
        assert code == 1 and said.startswith('CheckpointError: ') and len(said) < 300, (what, code, said)
        record('hostile file', kind='safetensors', name=what, refused=True, seconds=took)
    save_file(dict(list(tensors.items())[:-1]), path)
    code, said, took = within_limits(lambda: check_adapter(folder), tmp_path/'log')
    assert code == 1 and 'incomplete' in said, said  # peft warns and goes on


def gguf_files():
    "Six headers that announce more than there is."
    name = lambda text: struct.pack('<Q', len(text)) + text
    head = lambda tensors, pairs, rest=b'': b'GGUF' + struct.pack('<IQQ', 3, tensors, pairs) + rest
    return {'an array bomb': head(0, 1, name(b'a') + struct.pack('<IIQ', 9, 4, 2**40)), 'a list of lists': head(0, 1, name(b'a') + struct.pack('<IIQ', 9, 9, 2**20)*3),
            'a text of 2^62 bytes': head(0, 1, name(b'a') + struct.pack('<IQ', 8, 2**62)), '2^60 pairs': head(0, 2**60), '2^60 tensors': head(2**60, 0),
            'a tensor of 2^62 numbers': head(1, 0, name(b'w') + struct.pack('<IQQIQ', 2, 2**31, 2**31, 0, 0))}


def test_hostile_gguf(tmp_path):
    "As a model: one line within seconds; the format's own reader is busy with the first of these until memory is full."
    from llama_nb.sources import model_shape
    for what, content in gguf_files().items():
        (tmp_path/'model.gguf').write_bytes(content)
        code, said, took = within_limits(lambda: model_shape(str(tmp_path/'model.gguf')), tmp_path/'log')
        assert code == 3 and said.startswith('ResourceError: ') and 'not a valid GGUF file' in said, (what, code, said)
        record('hostile file', kind='gguf', name=what, refused=True, seconds=took)


TEMPLATES = {
    'attributes of classes': "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    'globals of a helper': "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
    'globals of an own function': "{{ raise_exception.__globals__ }}{{ strftime_now.__self__.__class__ }}",
    'a file to include': "{% include '/etc/passwd' %}",
    'a change of the messages': "{{ messages.append(1) }}",
    'a range without end': "{% for i in range(10000000000) %}x{% endfor %}",
    'format with attributes': "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    'an import': "{% import 'os' as os %}{{ os.mkdir('MARK') }}",
    # those that want time or memory; each must be refused
    'a loop in a loop': "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
    'a macro that calls itself twice': "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    'a text a billion times': "{{ 'x' * 10**9 }}",
    'a billion spaces': "{{ 'x'.center(10**9) }}",
    'a number of ten billion digits': "{{ 10**(10**10) }}",
    'a list of lists of lists': "{{ (range(100000)|list * 1000)|sort }}",
    'a text that doubles with each message': "{% set n = namespace(x='x') %}{% for m in messages %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    'only in a long conversation': "{% if messages|length > 100 %}{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}{% endif %}",
    'only in one of seven messages': "{% if messages|length == 7 %}{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}{% endif %}",
    'a length of the content': "{% for m in messages %}{% for a in range(m.content|length ** 3) %}{% for b in range(90000) %}{% endfor %}{% endfor %}{% endfor %}",
    'brackets in brackets': "{{ " + '['*3000 + ']'*3000 + " }}",
    'no Jinja at all': "{% for %}{{",
}
GREEDY = list(TEMPLATES)[8:]
WRITES = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"


@pytest.mark.parametrize('what', TEMPLATES)
def test_hostile_chat_template(tiny, what, tmp_path):
    "A tokenizer's own template that tries to get out, or that takes time or memory: refused, or without effect; never code, never a hang."
    from llama_nb.dialogue import encode
    from llama_nb.model import load_tokenizer
    folder = Path(shutil.copytree(tiny[0]/'tiny', tmp_path/'model'))
    mark = tmp_path/'ran'
    (folder/'chat_template.jinja').write_text(TEMPLATES[what].replace('MARK', str(mark)) + WRITES)
    turn = [dict(role='user', content='{{ 7*7 }}'), dict(role='assistant', content='fine')]
    def work():
        tokenizer = load_tokenizer(folder)
        for chat in (turn, [dict(role='system', content='x'), *turn*3], turn*51): encode(chat, tokenizer, 'tokenizer')
    code, said, took = within_limits(work, tmp_path/'log')
    assert not mark.exists() and code in (0, 2, 4), (code, said)  # not killed by the clock
    if code or what in GREEDY: assert said.startswith(('ConfigError: ', 'DataError: ')) and 'template' in said and len(said) < 300, (code, said)
    record('hostile file', kind='jinja', name=what, code_ran=False, refused=bool(code), seconds=took)


def test_an_unknown_template_that_means_no_harm(tiny, tmp_path):
    "Followed as before; its trial costs a process of its own once, and a longer conversation another one."
    from llama_nb.dialogue import encode
    from llama_nb.model import load_tokenizer
    from llama_nb.template import try_template
    folder = Path(shutil.copytree(tiny[0]/'tiny', tmp_path/'model'))
    (folder/'chat_template.jinja').write_text('{# not seen before #}' + WRITES)
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    turn = [dict(role='user', content='{{ 7*7 }}'), dict(role='assistant', content='fine')]
    before, spent = try_template.cache_info().misses, used()
    for chat in (turn, turn*2, turn*30): ids = encode(chat, load_tokenizer(folder), 'tokenizer').input_ids
    spent = used() - spent
    assert ids == encode(chat, tiny[1].tokenizer, 'chatml').input_ids
    assert try_template.cache_info().misses == before + 1 and spent < 0.3, spent
    encode(turn*40, load_tokenizer(folder), 'tokenizer')
    assert try_template.cache_info().misses == before + 2
    record('trial of a template', cpu_s=round(spent, 3), passed=True)


def test_names_that_lead_outside(tmp_path, undisturbed):
    "From a manifest, an archive, a folder of data and a run's name: nothing is read or written outside."
    from llama_nb.config import TrainingConfig
    from llama_nb.data import DailyDialogDatasetLoader
    from llama_nb.formats import read_conversations
    from llama_nb.runs import create_run
    outside = tmp_path/'outside.jsonl'
    outside.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    before = outside.read_bytes()
    for name in ('../x', '/etc/x', 'a/../../x', '..', '.', 'a\\b', 'x\0y', 'my first run', '-x'):
        with pytest.raises(LlamaNbError): create_run(tmp_path/'runs', name)
        with pytest.raises(LlamaNbError): TrainingConfig(run_name=name)
    copy = Path(shutil.copytree(undisturbed.checkpoints()[-1], tmp_path/'checkpoint-8'))
    for path in ('../outside.jsonl', str(outside), 'a/../../outside.jsonl'):
        manifest = json.loads((copy/MANIFEST).read_text())
        manifest['files'][0]['path'] = path
        (copy/MANIFEST).write_text(json.dumps(manifest))
        assert verify_checkpoint(copy) == [f'{MANIFEST} names files outside'], path
    archive = tmp_path/'train.zip'
    with zipfile.ZipFile(archive, 'w') as z:
        z.writestr('../../escaped/dialogues_train.txt', 'hello __eou__ hi __eou__\n')
        z.writestr('/tmp/escaped_dialogues_train.txt', 'x')
    try: DailyDialogDatasetLoader(data_path=str(archive)).load('train')
    except LlamaNbError: pass
    assert not (tmp_path.parent/'escaped').exists() and not Path('/tmp/escaped_dialogues_train.txt').exists()
    folder = tmp_path/'data'
    folder.mkdir()
    (folder/'link.jsonl').symlink_to(outside)
    with pytest.raises(LlamaNbError, match='leads out of the data folder'): list(read_conversations(folder))
    assert outside.read_bytes() == before
    record('hostile file', kind='names', name='traversal', writes_outside=0)
