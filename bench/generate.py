"""Replies of mixed lengths: ours beside one at a time and beside stock batched `generate`, per kind of number."""
import json
import sys
import time

import torch

from bench.common import RESULTS, save, spread

PROMPTS, NEW_TOKENS, BATCH = 48, 128, 16
REPEATS = {'bfloat16': 3, 'float32': 2, '4-bit': 1} # what fits into six minutes on two cores


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
    from llama_nb.dialogue import stop_ids
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


def measure(kind, repeats):
    "All ways on one model in turn, `repeats` times; the slow ways only once, one at a time on every sixth prompt of those sorted by reply length."
    from llama_nb.config import ModelConfig
    from llama_nb.model import demo_model, load_model, load_tokenizer
    folder = demo_model()
    tokenizer, model = load_tokenizer(folder), load_model(ModelConfig(model_name=folder, use_4bit=kind == '4-bit'), device='cpu')
    model = (model if kind == '4-bit' else model.to(getattr(torch, kind))).eval()
    conversations, ids = prompts(tokenizer)
    found, lengths, same = {name: [] for name in WAYS}, {}, {}
    ours(model, tokenizer, conversations[:2], ids[:2], 2) # the first pass of a process is never like the others
    for repeat in range(repeats):
        for name, (way, batch_size, more) in reversed(WAYS.items()):
            if name in ('one at a time', 'stock, by length') and repeat or name == 'stock, by length' and repeats == 1: continue
            few = sorted(range(len(ids)), key=lambda i: len(same['ours'][i]))[3::6] if name == 'one at a time' else range(len(ids))
            start = time.perf_counter()
            replies = way(model, tokenizer, [conversations[i] for i in few], [ids[i] for i in few], batch_size, **more)
            seconds = time.perf_counter() - start
            lengths[name], same[name] = [len(r) for r in replies], replies
            found[name].append(seconds)
    found = {name: seconds for name, seconds in found.items() if seconds}
    rows = {name: {**spread(found[name]), 'replies': len(lengths[name]), 'tokens': sum(lengths[name]), 'tokens_per_s': round(sum(lengths[name])/spread(found[name])['median_s'], 1)} for name in found}
    for name in found: rows[name]['ours_is_faster'] = round(rows['ours']['tokens_per_s']/rows[name]['tokens_per_s'], 2)
    rows['ours']['equal_to_stock'] = sum(a == b for a, b in zip(same['ours'], same['stock, in order']))
    rows['ours']['reply_lengths'] = sorted(lengths['ours'])
    return rows


def main(kinds=('bfloat16', 'float32')):
    "Measure each kind of number, and save the result; kinds measured before and not now keep theirs."
    path = RESULTS/'generate.json'
    rows = json.loads(path.read_text())['rows'] if path.exists() else {}
    for kind in kinds:
        rows[kind] = measure(kind, REPEATS[kind])
        for name, row in rows[kind].items(): print(f"{kind:9} {name:17} {row['tokens_per_s']:7.1f} tokens/s, ours is {row['ours_is_faster']:.2f} times as fast", flush=True)
    return save('generate', rows, model='SmolLM2-135M-Instruct', prompts=PROMPTS, max_new_tokens=NEW_TOKENS, batch_size=BATCH, repeats=REPEATS, threads=torch.get_num_threads(), greedy=True)


if __name__ == '__main__': print('wrote', main(tuple(sys.argv[1:]) or ('bfloat16', 'float32')))
