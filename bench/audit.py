"""How many prepared rows `audit` checks in a minute: real dialogues, real tokenizers, one process."""
import os
from pathlib import Path

from bench.common import save, spread
from bench.encode import timed, tokenizers

LIMIT_ROWS_PER_MINUTE = 20_000  # what a user was promised


def main(repeats=3, count=5_000):
    "DailyDialog's training part: rows that are right, alone and beside their conversations, and rows that teach everything."
    from llama_nb.auditing import audit
    from llama_nb.data import DailyDialogDatasetLoader
    from llama_nb.dialogue import encode
    folder = Path(os.environ['LLAMA_NB_TEST_DATA'])/'data/dailydialog'
    conversations, rows = list(DailyDialogDatasetLoader(folder).read('train'))[:count], {}
    for name, tokenizer in tokenizers().items():
        right = [dict(input_ids=e.input_ids, labels=e.labels) for e in (encode(c, tokenizer) for c in conversations)]
        whole = [dict(input_ids=r['input_ids']) for r in right]
        cases = {'alone': (right, None), 'beside the conversations': (right, conversations), 'everything taught': (whole, None)}
        for case, (made, beside) in cases.items():
            taken = [timed(lambda: audit(made, beside, tokenizer)) for _ in range(repeats + 1)][1:]  # the first round warms it
            found = spread([seconds for seconds, _ in taken])
            per_minute = round(60*count/found['median_s'])
            rows[f'{name}, {case}'] = {**found, 'rows': count, 'rows_per_minute': per_minute, 'exact': taken[0][1].exact, 'limit_rows_per_minute': LIMIT_ROWS_PER_MINUTE}
            print(f'{name:7} {case:25} {per_minute:9,} rows a minute')
    return save('audit', rows, repeats=repeats, data='DailyDialog, training part')
