"""Replies to held-out prompts while training: kept step by step, and without any effect on the training."""
import json

from llama_nb.generate import samples_timeline
from tiny_run import finish, make_tiny, write_config


def test_losses_and_weights_are_those_of_a_run_without_samples(tmp_path):
    tiny, found = tmp_path/'tiny', {}
    make_tiny(tiny)
    for name, prompts in (('silent', 0), ('talking', 2)):
        config = write_config(tmp_path/f'{name}.yaml', tiny, tmp_path/'runs', name, max_steps=6, eval_steps=2)
        code, out = finish('train', '--config', config, f'evaluation.sample_prompts={prompts}', 'evaluation.max_new_tokens=8')
        assert code == 0, out
        run = tmp_path/'runs'/name
        events = [json.loads(line) for line in (run/'events.jsonl').read_text().splitlines()]
        found[name] = run, events, [(e['step'], e.get('loss'), e.get('eval_loss'), e.get('grad_norm')) for e in events if e['kind'] in ('train', 'eval')]
    silent, talking = found['silent'], found['talking']
    assert len(talking[2]) >= 9 and talking[2] == silent[2]  # dropout included: no random number was taken away
    assert (talking[0]/'adapter_model.safetensors').read_bytes() == (silent[0]/'adapter_model.safetensors').read_bytes()
    assert not (silent[0]/'samples').exists()
    kept = {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in (talking[0]/'samples').iterdir()}
    assert sorted(kept) == ['step-2', 'step-4', 'step-6'] and all(len(rows) == 2 for rows in kept.values())
    told = [e for e in talking[1] if e['kind'] == 'samples']
    assert [e['step'] for e in told] == [2, 4, 6] and all(e['seconds'] >= 0 for e in told)
    assert '2 prompts' in samples_timeline(talking[0]).text
