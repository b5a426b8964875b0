"""How much memory it takes to check and encode a JSON Lines file of any size: rows are read, checked, encoded and stored one at a time."""
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.common import save

MB = 10**6
LIMITS_MB = {100: 100, 1000: 1000}  # size of the file -> resident growth that a user was promised to stay below


def write_chats(path, size_bytes, seed=0):
    "A file of made-up conversations of 2 to 12 messages until it has this size; how many there are."
    rng, count = random.Random(seed), 0
    syllables = [a + b for a in 'b d f g k l m n p r s t v w z ch sh th st tr'.split() for b in 'a e i o u ai ee ou ar en in on'.split()]
    words = [''.join(rng.choices(syllables, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(20_000)]
    with open(path, 'w', encoding='utf-8') as f:
        while f.tell() < size_bytes:
            for _ in range(200):
                said = [' '.join(rng.choices(words, k=min(400, 1 + int(rng.lognormvariate(2.7, 0.9))))) for _ in range(2*rng.randint(1, 6))]
                f.write(json.dumps({'messages': [{'role': ('user', 'assistant')[i % 2], 'content': f'{text.capitalize()}.'} for i, text in enumerate(said)]}) + '\n')
                count += 1
    return count


def resident():
    "Bytes of this process that lie in memory now."
    return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')


def encode_file(path, folder, tokenizer):
    "Check and encode a file into another one; conversations, tokens and how far memory grew above its start."
    from llama_nb.config import DataConfig
    from llama_nb.examples import encode_all
    from llama_nb.formats import stream_conversations
    highest = start = resident()

    def watched(stream):
        nonlocal highest
        for i, conversation in enumerate(stream):
            if i % 500 == 0: highest = max(highest, resident())
            yield conversation

    examples, ledger = encode_all(watched(stream_conversations(path)), tokenizer, DataConfig(on_overflow='drop'), 8192, Path(folder)/'encoded.arrow')
    highest = max(highest, resident())
    return dict(conversations=len(examples), touched=len(ledger), tokens=int(examples.lengths.sum()), taught_tokens=examples.num_taught, growth_mb=round((highest - start)/MB, 1))


def one(size_mb):
    "Make a file, encode it, and say what it took."
    from llama_nb.dialogue import encode
    from llama_nb.model import load_tokenizer
    from llama_nb.sources import demo_model
    tokenizer = load_tokenizer(demo_model())
    for name in ('datasets', 'pyarrow.compute'): importlib.import_module(name)  # the code of these libraries is not what is measured
    for text in ('Hello.', 'How are you?'): encode([{'role': 'user', 'content': text}, {'role': 'assistant', 'content': text}], tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'chats.jsonl'
        count = write_chats(path, size_mb*MB)
        found = encode_file(path, folder, tokenizer)
        assert found['conversations'] + found['touched'] == count
        return dict(file_mb=round(path.stat().st_size/MB), **found)


def main():
    "Each size in a process of its own. Memory is what is measured; other work on the machine does not change it."
    rows = {}
    for size, limit in LIMITS_MB.items():
        done = subprocess.run([sys.executable, '-m', 'bench.stream', str(size)], check=True, capture_output=True, text=True)
        rows[f'{size} MB'] = {**json.loads(done.stdout.splitlines()[-1]), 'limit_mb': limit}
    for name, row in rows.items(): print(f"{name:>8}: {row['conversations']:,} conversations, {row['tokens']:,} tokens, memory grew by {row['growth_mb']} MB (limit {row['limit_mb']})")
    return save('stream', rows, max_length=8192, tokenizer='demo model')


if __name__ == '__main__': print(json.dumps(one(int(sys.argv[1]))))
