"""Encoding beside `apply_chat_template`, and packing a million conversations: real dialogues, real tokenizers, one process."""
import os
import random
import time
from pathlib import Path

from bench.common import save, spread

EXAMPLES, MAX_LENGTH = 1_000_000, 2048
LIMITS = {'pack': dict(limit_s=10, limit_fill=0.98)}  # what a user was promised; encoding: no slower than the peer


def timed(work):
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def tokenizers():
    "The demo model's, and the real ones of Llama 2 and 3."
    from transformers import AutoTokenizer
    from llama_nb.model import load_tokenizer
    from llama_nb.sources import demo_model
    folder = Path(os.environ['LLAMA_NB_TEST_DATA'])/'tokenizers'
    return {'demo': load_tokenizer(demo_model()), **{n: AutoTokenizer.from_pretrained(folder/n) for n in ('llama2', 'llama3')}}


def encode_rows(conversations, repeats):
    "Seconds for the whole set, ours (ids, labels and spans, checked) and the peer's (ids only) in turn."
    from llama_nb.dialogue import encode
    plain, rows = [c.to_dicts() for c in conversations], {}
    for name, tokenizer in tokenizers().items():
        ours, peer = [], []
        for i in range(repeats + 1):
            a, examples = timed(lambda: [len(encode(c, tokenizer)) for c in conversations])
            b, ids = timed(lambda: [len(tokenizer.apply_chat_template(m)['input_ids']) for m in plain])
            if i: ours.append(a), peer.append(b)  # the first round warms both
        rows[f'encode, {name}'] = {**spread(ours), 'conversations': len(conversations), 'tokens': sum(examples)}
        rows[f'apply_chat_template, {name}'] = {**spread(peer), 'tokens': sum(ids)}
        print(f"{name:7} encode {rows[f'encode, {name}']['median_s']:.2f} s, apply_chat_template {rows[f'apply_chat_template, {name}']['median_s']:.2f} s")
    return rows


def pack_rows(lengths, repeats):
    "Seconds to place a million conversations whose lengths are drawn from these, and then to lay every row."
    from llama_nb.conversation import Example
    from llama_nb.packing import pack
    rng = random.Random(0)
    kinds = {n: Example([1]*n, [1]*n) for n in set(lengths)}
    examples = [kinds[n] for n in rng.choices(lengths, k=EXAMPLES)]
    place, lay = [], []
    for _ in range(repeats):
        a, rows = timed(lambda: pack(examples, MAX_LENGTH))
        b, tokens = timed(lambda: sum(len(r) for r in rows))
        place.append(a), lay.append(b)
    fill = tokens/(len(rows)*MAX_LENGTH)
    print(f'pack: {EXAMPLES:,} examples into {len(rows):,} rows, {fill:.2%} full, {sorted(place)[repeats//2]:.2f} s')
    return {'pack': {**spread(place), 'examples': EXAMPLES, 'rows': len(rows), 'fill': round(fill, 4), **LIMITS['pack']}, 'lay every row': {**spread(lay), 'tokens': tokens}}


def main(repeats=5):
    "DailyDialog's training part, from the folder named by LLAMA_NB_TEST_DATA."
    from llama_nb.data import DailyDialogDatasetLoader
    from llama_nb.dialogue import encode
    conversations = list(DailyDialogDatasetLoader(Path(os.environ['LLAMA_NB_TEST_DATA'])/'data/dailydialog').read('train'))  # made once: both encode what is at hand
    rows = encode_rows(conversations, repeats)
    tokenizer = tokenizers()['demo']
    rows |= pack_rows([len(encode(c, tokenizer)) for c in conversations], 3)
    return save('encode', rows, repeats=repeats, data='DailyDialog, training part', max_length=MAX_LENGTH)
