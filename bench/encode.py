"""The data rooms: encoding beside `apply_chat_template`, and packing a million conversations. Needs LLAMA_NB_TEST_DATA."""
import gc
import os
import random
import statistics
import sys
import time
from pathlib import Path

from bench.common import save, spread

MILLION, MAX_LENGTH, LEAST_FILL = 10**6, 2048, 0.98


def encoding(repeats=3):
    "All DailyDialog training conversations, ours and transformers' own, in turns; seconds."
    from llama_nb.data import DailyDialogDatasetLoader
    from llama_nb.dialogue import encode
    from llama_nb.model import load_tokenizer
    tokenizer = load_tokenizer('demo')
    loaded = list(DailyDialogDatasetLoader(data_path=str(Path(os.environ['LLAMA_NB_TEST_DATA'])/'data'/'dailydialog'/'train.zip')).load('train'))
    plain = [[{'role': m.role, 'content': m.content} for m in c.messages] for c in loaded]
    ours, stock = [], []
    for i in range(repeats):
        began = time.perf_counter()
        lengths = [len(encode(c, tokenizer)) for c in loaded]
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        for m in plain: tokenizer.apply_chat_template(m)
        stock.append(time.perf_counter() - began)
    return lengths, {'encode, with labels': {**spread(ours), 'conversations': len(loaded)}, 'apply_chat_template, without labels': spread(stock),
                     'ratio of medians': round(statistics.median(ours)/statistics.median(stock), 3), 'at most': 1.0}


def packing(lengths):
    "A million examples of these lengths into full rows; seconds and fill."
    from llama_nb.dialogue import Example
    from llama_nb.packing import pack
    rng = random.Random(0)
    drawn = [min(MAX_LENGTH, n) for n in rng.choices(lengths, k=MILLION)]
    ids = {n: list(range(n)) for n in set(drawn)}  # lists are shared, so that memory is not what is measured
    examples, times = [Example(input_ids=ids[n], labels=ids[n]) for n in drawn], []
    for _ in range(3):
        began = time.perf_counter()
        rows = pack(examples, MAX_LENGTH)
        times.append(time.perf_counter() - began)
        fill = sum(map(len, rows))/(len(rows)*MAX_LENGTH)
        del rows
        gc.collect()
    return {**spread(times), 'examples': MILLION, 'tokens_per_row': MAX_LENGTH, 'fill': round(fill, 5), 'least_fill': LEAST_FILL, 'limit_s': 10.0}


def main():
    "Both, and the result file. A file of a gigabyte, checked and encoded, is to be added here."
    if not os.environ.get('LLAMA_NB_TEST_DATA'): sys.exit('LLAMA_NB_TEST_DATA: not set; it names the folder with the real data')
    lengths, rows = encoding()
    for name, row in (rows := {'encoding': rows, 'packing': packing(lengths)}).items(): print(name, row, flush=True)
    return save('encode', rows, load_average_at_end=round(os.getloadavg()[0], 2), tokenizer='SmolLM2-135M-Instruct', data='DailyDialog, train', processes=1)
