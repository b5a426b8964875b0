"""The GPU benchmark's CPU twin: every row of ours with small shapes, so that the first run on a GPU is not the first run at all."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import gpu_session as session  # noqa: E402
from bench.gpu import LATE, TARGETS, targets, write  # noqa: E402
from bench.gpu_row import FIRST, ROWS, Here, shape_of, written  # noqa: E402
from tiny_run import ENV  # noqa: E402


def bench(*arguments): return subprocess.run([sys.executable, '-m', 'bench', 'gpu', *map(str, arguments)], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300)


def test_every_row_small(tmp_path):
    before = sorted((ROOT/'bench'/'results').iterdir())
    done = bench('--device', 'cpu', '--tiny', '--out', tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path/'gpu.json').read_text())
    rows = result['rows']
    assert list(rows) == list(ROWS) and (tmp_path/'gpu.png').exists()
    assert rows['gate']['passed'] and rows['gate']['fp8']['gradients'] < .2 and rows['gate']['fp8']['gradients'] > rows['gate']['ours']['gradients']
    for name, row in rows.items():
        if 'llama_nb' in name or 'again' in name or 'smallest' in name:
            assert 'not_run' not in row, (name, row)
            assert row['steps'] == 2 and row['slowest'] <= row['real_tokens_per_s'] <= row['fastest'] and row['supervised_tokens_per_s'] < .5*row['real_tokens_per_s']
        elif 'TRL' in name or 'unsloth' in name: assert row.get('not_run') or row['steps'] == 2
    ours = {k: rows[k] for k in ('F  llama_nb, 7B', 'G  llama_nb, all layers recomputed, 7B', 'H  llama_nb, fp8, 7B', 'F  llama_nb, compiled layers, 7B', 'F  again')}
    plain, recomputed, eight, compiled, again = (r['loss'] for r in ours.values())
    assert plain == again and abs(recomputed - plain) < 1e-6 and abs(compiled - plain) < 1e-3 and 0 < abs(eight - plain) < 1e-2  # the same work in each row
    assert [r['recomputed_layers'] for r in ours.values()] == [0, 2, 0, 0, 0]
    assert len({r['tokens_per_step'] for r in ours.values()}) == 1  # filling is not counted
    assert len(rows['planner, 7B']['settings']) == 8
    assert max(rows['machine']['attention with fewer key heads']['errors']) < .02
    assert {t['reached'] for t in result['targets']} == {'not measured'}  # small shapes reach nothing
    assert sorted((ROOT/'bench'/'results').iterdir()) == before


def test_targets_say_what_was_reached():
    rows = {'F  llama_nb, 7B': dict(real_tokens_per_s=18000.), 'planner, 7B': dict(settings=[{}]*4 + [dict(measured_gib='out of memory')], furthest=.05), 'H  llama_nb, fp8, 7B': dict(not_run='why')}
    found = {t['target']: t['reached'] for t in targets(rows)}
    assert len(found) == len(TARGETS)
    assert found['7B, bf16, real tokens/s'] is True and found['plan against measured, furthest of eight'] is True
    assert [found[k] for k in ('7B, fp8, real tokens/s', '7B, 4 x 2,048, all layers recomputed, GiB allocated', '8B, bf16, real tokens/s')] == ['not measured']*3
    rows['F  llama_nb, 7B']['real_tokens_per_s'] = 16000.
    assert targets(rows)[0]['reached'] is False
    rows['F  llama_nb, 7B']['gate'] = 'not passed'
    assert targets(rows)[0]['reached'] == 'gate not passed'


def test_a_failed_gate_marks_what_follows_and_ends_nothing(tmp_path, monkeypatch):
    import bench.gpu as bench_gpu
    found = {'machine': dict(copy=1.), 'gate': dict(passed=False), 'F  llama_nb, 7B': dict(real_tokens_per_s=99999., steps=2, max_allocated_gib=1.)}
    monkeypatch.setattr(bench_gpu, 'row', lambda name: found.get(name, LATE))
    bench_gpu.main(['--device', 'cpu', '--tiny', '--out', str(tmp_path)])
    rows = json.loads((tmp_path/'gpu.json').read_text())['rows']
    assert rows['F  llama_nb, 7B']['gate'] == 'not passed' and 'gate' not in rows['machine'] and len(rows) == len(ROWS) and LATE == dict(not_run='no time left in this call')


def test_gpu_step_of_tests_names_its_files():
    "On a bare machine pytest must not import tests whose packages are missing."
    sys.path.insert(0, str(ROOT/'tools'))
    import gpu
    (command,), why = gpu.commands('tests', ROOT, 60)
    named = [a for a in command if a.startswith('tests')]
    assert why is None and named == gpu.gpu_tests() and 'tests/test_no_sync.py' in named and 'tests/test_metrics_offline.py' not in named


def test_what_matters_most_comes_first_and_nothing_measured_is_lost(tmp_path):
    measured = {'machine': dict(gpu='x'), 'J  llama_nb, few tokens, 7B': dict(real_tokens_per_s=1., steps=2)}
    assert len(set(FIRST)) == len(FIRST) and set(FIRST) < set(ROWS)
    write(tmp_path, measured, 'x', False)
    _, result = write(tmp_path, {'machine': dict(gpu='x', copy=2.), 'J  llama_nb, few tokens, 7B': LATE, 'gate': LATE}, 'x', False)
    assert result['rows'] == {'machine': dict(gpu='x', copy=2.), 'gate': LATE, 'J  llama_nb, few tokens, 7B': measured['J  llama_nb, few tokens, 7B']}
    done = bench('--device', 'cpu', '--tiny', '--seconds', '1', '--out', tmp_path/'late')
    rows = json.loads((tmp_path/'late'/'gpu.json').read_text())['rows']
    assert done.returncode == 0 and 'correctness gate was not run' in done.stdout and set(rows) == set(ROWS) and all(row == LATE for row in rows.values())


def test_weights_in_a_folder_are_a_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    Here.set('cpu', True)
    shape = shape_of('8B')
    model = AutoModelForCausalLM.from_pretrained(written(shape, tmp_path))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in AutoModelForCausalLM.from_config(shape).named_parameters()}
    assert .018 < float(model.lm_head.weight.float().std()) < .022 and float(model.model.norm.weight.min()) == 1
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == '</s>'


def test_refuses_what_measures_nothing(tmp_path):
    import torch
    assert bench('--device', 'cpu', '--tiny').returncode == 2 and bench('--device', 'cpu', '--out', tmp_path).returncode == 2
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    done = bench('a', '--out', tmp_path)
    assert done.returncode == 1 and 'no CUDA device here' in done.stderr and not list(tmp_path.iterdir())
    done = subprocess.run([sys.executable, 'tools/gpu.py', '--out', str(tmp_path)], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and 'no CUDA device here' in done.stderr


@pytest.mark.parametrize('part', ['first', 'second'])
def test_a_booking_in_one_process(tmp_path, part):
    "Every item runs, in its order, with a result file; the one model is left as it came by each."
    done = bench(part, '--device', 'cpu', '--tiny', '--out', tmp_path, '--seconds', 250)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path/f'gpu_{part}.json').read_text())
    rows, peers = result['rows'], [n for n in result['rows'] if 'TRL' in n]
    assert list(rows) == list(session.ITEMS[part]) and result['gate_passed'] and result['took_s'] < 250 and result['wanted'] == []
    assert {n for n, r in rows.items() if 'not_run' in r} <= {*peers, 'kernels against torch'}, rows
    assert {v for k, v in rows['unpacking against bitsandbytes'].items() if k != 'seconds'} == {0.0}
    assert all(r['same_bits'] for n, r in rows['same step twice'].items() if n != 'seconds')
    if part == 'second': return
    losses = {n: r['loss'] for n, r in rows.items() if 'loss' in r and '2k' not in n}
    assert losses['7B'] == losses['7B, profile'] == losses["7B, torch's operations"] == losses['7B, no unpacked copy'], losses
    assert losses['7B, all recomputed, inputs in host memory'] == losses['7B, all recomputed'] and rows['7B, all recomputed, inputs in host memory']['offloaded_inputs'], losses
    assert all(abs(loss/losses['7B'] - 1) < .02 for loss in losses.values()) and rows['7B, profile']['profile'][0]['share'] > 0


def test_a_gate_without_numbers_is_not_passed(monkeypatch):
    "A reference loss of 0 divides nothing, and proves nothing."
    import torch
    from bench import gpu_row
    assert [gpu_row.relative(*pair) for pair in ((0., 0.), (-1e-9, 0.), (-.5, 2.), (3., -4.))] == [0., float('inf'), .25, .75]
    Here.set('cpu', True)
    fine = gpu_row.gate()
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, 'cross_entropy', lambda *args, **kwargs: 0*real(*args, **kwargs))
    found = gpu_row.gate()
    assert fine['passed'] and found['loss'] == 0 and not found['passed'] and found['ours']['loss'] == float('inf')


def test_an_item_without_time_or_with_a_fault_ends_nothing(tmp_path, monkeypatch):
    import time
    Here.set('cpu', True)
    def slow(): time.sleep(20)
    def broken(): raise RuntimeError('a fault')
    monkeypatch.setattr(session, 'ITEMS', dict(first={'broken': (broken, 1), 'slow': (slow, 1), 'fine': (lambda: dict(x=1), 1), 'long': (slow, 900)}))
    monkeypatch.setattr(Here, 'tiny', False)
    monkeypatch.setattr(session, 'longest', lambda part, name, left: 2 if name == 'slow' else left)
    rows = json.loads(session.run('first', 30, tmp_path).read_text())['rows']
    assert rows['broken']['not_run'] == 'RuntimeError: a fault' and 'no end within 2 s' in rows['slow']['not_run'] and rows['fine']['x'] == 1 and 'no time left' in rows['long']['not_run']


def test_what_matters_fits_into_a_call():
    "By their usual times, all items up to the last target fit, in the second call also both rows of TRL, and what is wrong comes first."
    peers = ['TRL, packed, our attention, 7B', 'TRL as shipped, 7B']
    for part, needed in dict(first=[], second=peers).items():
        names, usual = list(session.ITEMS[part]), [seconds for _, seconds in session.ITEMS[part].values()]
        needed = [*needed, *(t for t, *_ in session.WANTED if t in names)]
        assert sum(usual[:max(map(names.index, needed)) + 1]) <= session.SECONDS[part], part
        assert max(map(names.index, session.CORRECT)) < min(map(names.index, needed)), part
    assert {t for t, *_ in session.WANTED} <= {n for part in session.ITEMS.values() for n in part}
    second = list(session.ITEMS['second'])
    assert second.index('7B') < second.index('other sizes') < second.index(peers[0]) and 'planner, 7B' in session.ITEMS['first']


def test_a_slow_item_leaves_time_for_the_others(monkeypatch):
    monkeypatch.setattr(Here, 'tiny', False)
    monkeypatch.setattr(session, 'ITEMS', dict(first={'one': (None, 20), 'two': (None, 60), 'last': (None, 5)}))
    assert [session.longest('first', 'one', left) for left in (300, 130, 100, 40)] == [90, 65, 50, 40]
    assert [session.longest('first', 'last', left) for left in (300, 12)] == [30, 12]


def test_the_plan_is_within_five_percent_of_the_allocator():
    "Peaks of PyTorch's own allocator for a 7B, from the committed counts: eight settings, planned again by today's code."
    from llama_nb.config import LoRAConfig, ModelConfig, TrainingConfig
    from llama_nb.memory import CUDA_CONTEXT_BYTES, plan
    counts = json.loads((ROOT/'bench'/'results'/'gpu_counts.json').read_text())
    tiny, Here.tiny = Here.tiny, False
    try: shape = shape_of('7B')
    finally: Here.tiny = tiny
    assert len(counts['plan']) == 8
    for r in counts['plan']:
        for layer_bytes in (None, 109_928):  # by the formula, and as measured on one layer
            made = plan(ModelConfig(max_length=2048), TrainingConfig(per_device_train_batch_size=r['rows']), LoRAConfig(r=16, target_modules='all-linear'), shape=shape,
                        checkpointed_layers=r['recomputed_layers'], layer_bytes=layer_bytes)
            off = (made.total - CUDA_CONTEXT_BYTES)/2**30/r['measured_gib'] - 1
            assert abs(off) <= .05, (r, off)
    for r in counts['offloading']:
        Here.tiny = False
        try: shape = shape_of('8B', max_position_embeddings=r['tokens'])
        finally: Here.tiny = tiny
        made = plan(ModelConfig(max_length=r['tokens']), TrainingConfig(per_device_train_batch_size=1), LoRAConfig(r=16, target_modules='all-linear'), shape=shape,
                    checkpointed_layers=r['recomputed_layers'], offloaded_inputs=r['inputs_in_host_memory'])
        off = (made.total - CUDA_CONTEXT_BYTES)/2**30/r['allocated_gib'] - 1
        assert abs(off) <= .05 and made.settings['pinned_host_bytes']/2**30 == r['pinned_gib'], (r, off)
