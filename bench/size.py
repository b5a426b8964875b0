"""How much memory a data set takes on its way from a file to examples: reading, cleaning and encoding, as `LLAMATrainer` and `llama-nb data` do it."""
import ctypes
import gc
import importlib
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from bench.common import save
from bench.stream import MB, resident, write_chats

SIZES_MB = (200,)


class Highest:
    "The most memory of this process while a block runs, above what it had when the watch was made; a thread looks every 20 ms."
    def __init__(self): self.start = resident()

    @classmethod
    def clean(cls):
        "A watch that starts after this process has returned what it no longer uses, which would hide later growth."
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return cls()

    def __enter__(self):
        self.peak, self.done = resident(), threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def _look(self):
        while not self.done.wait(.02): self.peak = max(self.peak, resident())

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()
        self.peak = max(self.peak, resident())

    @property
    def growth_mb(self): return round((self.peak - self.start)/MB)


def one(size_mb):
    "Make a file, load it, check its texts, and encode it; memory above the start after each step."
    from llama_nb.config import DataConfig
    from llama_nb.data import load_data
    from llama_nb.dialogue import encode
    from llama_nb.examples import encode_all
    from llama_nb.model import load_tokenizer
    from llama_nb.quality import check_data
    from llama_nb.sources import demo_model
    tokenizer = load_tokenizer(demo_model())
    for name in ('datasets', 'pyarrow.compute', 'rensa', 'py3langid.langid'): importlib.import_module(name)  # the code of these libraries is not what is measured
    for text in ('Hello.', 'How are you?'): encode([{'role': 'user', 'content': text}, {'role': 'assistant', 'content': text}], tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path, found = Path(folder)/'chats.jsonl', {}
        count = write_chats(path, size_mb*MB)
        watch = Highest.clean()
        with watch: data = load_data(path, val_size=.01)
        found['reading_mb'] = watch.growth_mb
        with watch: data = check_data(data, fix=('repeat', 'near repeat', 'leak', 'near leak'))
        found['cleaning_mb'] = watch.growth_mb
        with watch: examples, ledger = encode_all(data.train, tokenizer, DataConfig(on_overflow='drop'), 8192)
        found['encoding_mb'] = watch.growth_mb
        held = resident() - watch.start
        assert len(data.train) + len(data.validation) + len(data.removed) == count and len(examples) + len(ledger) == len(data.train)
        return dict(file_mb=round(path.stat().st_size/MB), conversations=count, **found, held_at_end_mb=round(held/MB),
                    examples_mb=round(examples.table.nbytes/MB), tokens=int(examples.lengths.sum()))


def main():
    "Each size in a process of its own. Memory is what is measured; other work on the machine does not change it."
    rows = {}
    for size in SIZES_MB:
        done = subprocess.run([sys.executable, '-m', 'bench.size', str(size)], check=True, capture_output=True, text=True)
        row = rows[f'{size} MB'] = json.loads(done.stdout.splitlines()[-1])
        steps = ', '.join(f'{step} {row[f"{step}_mb"]:,} MB' for step in ('reading', 'cleaning', 'encoding'))
        print(f'{size} MB, {row["conversations"]:,} conversations: most memory {steps}')
    return save('size', rows, max_length=8192, tokenizer='demo model', val_size=.01)


if __name__ == '__main__': print(json.dumps(one(int(sys.argv[1]))))
