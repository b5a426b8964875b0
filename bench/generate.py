"""Replies of mixed lengths: ours beside one at a time and beside stock batched `generate`, per kind of number."""
import json
import sys
import time

import torch

from bench.common import RESULTS, save, spread

PROMPTS, NEW_TOKENS, BATCH = 48, 128, 16
BUDGET_S = {'bfloat16': 110, 'float32': 190, '4-bit': 150} # all three in less than eight minutes on two cores
PROFILED = dict(prompts=16, new_tokens=64, kind='bfloat16', ops=8) # with torch.profiler, after the measurement


def prompts(tokenizer):
    "Conversations and their prompt ids: the shipped instructions, which ask for replies of very different lengths."
    from llama_nb.config import DataConfig
    from llama_nb.data import load_data
    from llama_nb.dialogue import encode_prompt
    data = load_data(DataConfig(dataset_name='alpaca', data_path='sample', val_size=0.0)).train[:PROMPTS]
    return data, [encode_prompt(c, tokenizer) for c in data]


def ours(model, tokenizer, conversations, ids, batch_size):
    "Our replies, as ids."
    from llama_nb.generate import generate_replies
    return [r.token_ids for r in generate_replies(model, tokenizer, conversations, max_new_tokens=NEW_TOKENS, batch_size=batch_size)]


def stock(model, tokenizer, conversations, ids, batch_size, by_length=False):
    "transformers' own `generate` on left-padded batches, in the order given or sorted by length; what stands behind a stop id is not a reply."
    from llama_nb.segments import stop_ids
    stops, out = sorted(stop_ids(tokenizer)), {}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i])) if by_length else list(range(len(ids)))
    for start in range(0, len(order), batch_size):
        group = order[start:start + batch_size]
        width = max(len(ids[i]) for i in group)
        padded = torch.tensor([[0]*(width - len(ids[i])) + ids[i] for i in group])
        mask = torch.tensor([[0]*(width - len(ids[i])) + [1]*len(ids[i]) for i in group])
        made = model.generate(padded, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=stops, pad_token_id=0)[:, width:].tolist()
        for i, row in zip(group, made): out[i] = row[:next((k + 1 for k, t in enumerate(row) if t in stops), len(row))]
    return [out[i] for i in range(len(ids))]


WAYS = {'one at a time': (ours, 1, {}), 'stock, in order': (stock, BATCH, {}), 'stock, by length': (stock, BATCH, {'by_length': True}), 'ours': (ours, BATCH, {})}
FEW = slice(3, None, 6) # of the prompts, sorted by the length of their replies: those answered one at a time


def profile(model, tokenizer, conversations, ids):
    "Where a batch spends its time: share of each operation, for ours and for stock, and the passes through the model."
    from torch.profiler import ProfilerActivity
    global NEW_TOKENS
    before, NEW_TOKENS, found = NEW_TOKENS, PROFILED['new_tokens'], {}
    try:
        for name in ('ours', 'stock, in order'):
            way, batch_size, more = WAYS[name]
            with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as seen: way(model, tokenizer, conversations[:PROFILED['prompts']], ids[:PROFILED['prompts']], batch_size, **more)
            ops = sorted(seen.key_averages(), key=lambda op: -op.self_cpu_time_total)
            total = sum(op.self_cpu_time_total for op in ops)
            found[name] = {op.key: round(op.self_cpu_time_total/total, 3) for op in ops[:PROFILED['ops']]} | {'all': 1.0, 'self_cpu_s': round(total/1e6, 2)}
    finally: NEW_TOKENS = before
    return found


def passes(model, run):
    "What `run` returns, and how many times it went through the model."
    count = []
    hook = model.register_forward_pre_hook(lambda *_: count.append(1))
    try: return run(), len(count)
    finally: hook.remove()


def measure(kind, budget_s=None, at_least=2, at_most=3):
    "All ways on one model in turn: ours and stock in order `at_least` times, the slow ways once; more where the budget [s] has room."
    from llama_nb.config import ModelConfig
    from llama_nb.model import load_model, load_tokenizer
    from llama_nb.sources import demo_model
    budget_s = BUDGET_S[kind] if budget_s is None else budget_s
    folder = demo_model()
    tokenizer, model = load_tokenizer(folder), load_model(ModelConfig(model_name=folder, use_4bit=kind == '4-bit'), device='cpu')
    model = (model if kind == '4-bit' else model.to(getattr(torch, kind))).eval()
    conversations, ids = prompts(tokenizer)
    found, replies, num_passes, begun = {}, {}, {}, time.perf_counter()
    ours(model, tokenizer, conversations[:2], ids[:2], 2) # the first pass of a process is never like the others

    def go(name):
        few = sorted(range(len(ids)), key=lambda i: len(replies['ours'][i]))[FEW] if name == 'one at a time' else range(len(ids))
        way, batch_size, more = WAYS[name]
        start = time.perf_counter()
        replies[name], num_passes[name] = passes(model, lambda: way(model, tokenizer, [conversations[i] for i in few], [ids[i] for i in few], batch_size, **more))
        found.setdefault(name, []).append(time.perf_counter() - start)

    fits = lambda *names: time.perf_counter() - begun + sum(found[name][-1] for name in names) <= budget_s
    pair = ('ours', 'stock, in order')
    for name in (*pair, 'one at a time', *pair*(at_least - 1)): go(name)
    if fits('stock, in order'): go('stock, by length')
    while len(found['ours']) < at_most and fits(*pair):
        for name in pair: go(name)
    rows = {}
    for name in [name for name in WAYS if name in found]:
        tokens = sum(map(len, replies[name]))
        rows[name] = {**spread(found[name]), 'replies': len(replies[name]), 'tokens': tokens, 'passes': num_passes[name], 'tokens_per_s': round(tokens/spread(found[name])['median_s'], 1)}
    for row in rows.values(): row['ours_is_faster'] = round(rows['ours']['tokens_per_s']/row['tokens_per_s'], 2)
    rows['ours']['equal_to_stock'] = sum(a == b for a, b in zip(replies['ours'], replies['stock, in order']))
    rows['ours']['reply_lengths'] = sorted(map(len, replies['ours']))
    if kind == PROFILED['kind']: rows['profile'] = profile(model, tokenizer, conversations, ids)
    return rows


def main(kinds=tuple(BUDGET_S)):
    "Measure each kind of number, and save the result; kinds measured before and not now keep theirs."
    path = RESULTS/'generate.json'
    kept = json.loads(path.read_text()) if path.exists() else {}
    rows, shares = kept.get('rows', {}), kept.get('profile')
    for kind in kinds:
        rows[kind] = measure(kind)
        shares = rows[kind].pop('profile', shares)
        for name, row in rows[kind].items(): print(f"{kind:9} {name:17} {row['tokens_per_s']:7.1f} tokens/s in {row['passes']:4} passes, ours is {row['ours_is_faster']:.2f} times as fast", flush=True)
    path = save('generate', rows, model='SmolLM2-135M-Instruct', prompts=PROMPTS, max_new_tokens=NEW_TOKENS, batch_size=BATCH, budget_s=BUDGET_S, profiled=PROFILED, threads=torch.get_num_threads(), greedy=True)
    result = json.loads(path.read_text())
    if shares: path.write_text(json.dumps(result | {'profile': shares}, indent=1) + '\n')
    return path


if __name__ == '__main__': print('wrote', main(tuple(sys.argv[1:]) or tuple(BUDGET_S)))
