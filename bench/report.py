"""How long the data report takes: 50,000 made-up conversations checked for repeats, leaks, secrets, odd characters and language, without and with a tokenizer."""
import random
import time

from bench.common import save, spread

ROWS, LIMIT_S = 50_000, 60  # what a user was promised


def conversations(seed=0):
    "Conversations of 4 to 8 messages of 5 to 24 words, from the vocabulary of the shipped samples."
    from llama_nb.data import sample_path
    from llama_nb.conversation import Conversation, Message, Source
    from llama_nb.formats import read_conversations
    rng = random.Random(seed)
    words = sorted({w for name in ('dialogues', 'instructions') for c in read_conversations(sample_path(name)) for m in c.messages for w in m.content.split()})
    def text(): return ' '.join(rng.choices(words, k=rng.randrange(5, 25)))
    return [Conversation(tuple(Message(r, text()) for r in ('user', 'assistant')*rng.randrange(2, 5)), Source('made', i)) for i in range(ROWS)]


def main(repeats=2):
    "Each row `repeats` times, in one process."
    from llama_nb.data import load_data
    from llama_nb.quality import check_data
    from llama_nb.model import load_tokenizer
    from llama_nb.sources import demo_model
    data, tokenizer, rows = load_data(conversations()), load_tokenizer(demo_model()), {}
    for name, settings in {'without a tokenizer': {}, 'with the demo tokenizer': dict(tokenizer=tokenizer, max_length=512)}.items():
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            report = check_data(data, **settings).report
            times.append(time.perf_counter() - began)
        rows[name] = {**spread(times), 'limit_s': LIMIT_S, 'conversations': sum(report.num_conversations.values()), 'words': report.num_words, 'tokens': report.tokens.get('total')}
        print(f"{name:24} {rows[name]['median_s']:6.1f} s  (limit {LIMIT_S})")
    return save('report', rows, repeats=repeats, conversations=ROWS)
