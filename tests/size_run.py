"""Read, check, encode and pack a file of chats, and print how far memory grew in each step; `test_data_memory` starts it."""
import importlib
import json
import sys
import tempfile
from pathlib import Path

from bench.size import Highest
from bench.stream import MB, write_chats
from llama_nb import quality
from llama_nb.config import DataConfig, ModelConfig
from llama_nb.data import load_data
from llama_nb.dialogue import encode
from llama_nb.model import load_tokenizer
from llama_nb.shapes import tiny_llama
from llama_nb.sources import demo_model
from llama_nb.train import LLAMATrainer

quality.languages = lambda conversations: [None]*len(conversations)  # its model takes 100 MB, whatever the size of the data


def highest(step):
    "What a step returns, and how far memory grew, in MB."
    with Highest.clean() as watch: result = step()
    return result, watch.growth_mb


def main(size_mb):
    tokenizer = load_tokenizer(demo_model())
    for name in ('datasets', 'pyarrow.compute', 'rensa', 'transformers'): importlib.import_module(name)
    encode([{'role': 'user', 'content': 'Hello.'}, {'role': 'assistant', 'content': 'Hi.'}], tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'chats.jsonl'
        count = write_chats(path, size_mb*MB)
        data, reading = highest(lambda: load_data(path, val_size=.02))
        data, cleaning = highest(lambda: quality.check_data(data, fix='all'))
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=8192)
    some = data.train.select(range(len(data.train)//4))  # encoding takes the most time
    trainer = LLAMATrainer(ModelConfig(max_length=8192, use_4bit=False), data_config=DataConfig(on_overflow='drop'), data=some,
                           validation=data.validation[:20], model=model, tokenizer=tokenizer, device='cpu')
    rows, encoding = highest(trainer.rows)
    table_mb = round(rows.train.examples.table.nbytes/MB)
    return dict(file_mb=round(size_mb), conversations=count, reading=reading, cleaning=cleaning, encoding=encoding, table_mb=table_mb)


if __name__ == '__main__': print(json.dumps(main(int(sys.argv[1]))))
