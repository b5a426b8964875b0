"""How fast a file of chats is read, and its texts are scanned: MB a second, beside `datasets.load_dataset` on the same file, in turn."""
import statistics
import tempfile
from pathlib import Path

from bench.common import save, spread
from bench.encode import timed
from bench.stream import MB, write_chats

SIZE_MB = 50


def works(path, folder):
    """The measured works by name, each with a number to compare.

    'into Arrow': the rows of the file as an Arrow table; ours also checks each of them. 'and each row as Python': then every text is looked at."""
    import datasets
    from llama_nb.formats import read_conversations
    from llama_nb.quality import scan_text
    count = iter(range(10**6))

    def peer(): return datasets.load_dataset('json', data_files=str(path), split='train', cache_dir=str(Path(folder)/f'cache{next(count)}'))
    def ours_rows(): return sum(len(m.content) for c in read_conversations(path) for m in c.messages)
    def peer_rows(): return sum(len(m['content']) for row in peer() for m in row['messages'])
    def scanned(): return sum(len(scan_text(m.content)) for c in scanning for m in c.messages)
    scanning = read_conversations(path)
    return {'read into Arrow': lambda: len(read_conversations(path)), 'load_dataset into Arrow': lambda: len(peer()),
            'read, and each row as Python': ours_rows, 'load_dataset, and each row as Python': peer_rows, 'scan every text': scanned}


def main(repeats=5):
    "The works one after another, `repeats` times, so that each pair meets the same machine; the first round is not counted."
    import datasets
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'chats.jsonl'
        write_chats(path, SIZE_MB*MB)
        size, works_by_name = path.stat().st_size/MB, works(path, folder)
        taken, found = {name: [] for name in works_by_name}, {}
        for i in range(repeats + 1):
            for name, work in works_by_name.items():
                seconds, found[name] = timed(work)
                if i: taken[name].append(seconds)
    for what in ('into Arrow', ', and each row as Python'):
        ours, peer = (next(n for n in found if n.startswith(start) and n.endswith(what)) for start in ('read', 'load_dataset'))
        assert found[ours] == found[peer]  # the same rows, the same characters
    rows = {name: {**spread(seconds), 'mb_per_s': round(size/statistics.median(seconds), 1)} for name, seconds in taken.items()}
    for name, row in rows.items(): print(f"{name:40} {row['mb_per_s']:8.1f} MB a second")
    return save('read', rows, repeats=repeats, file_mb=round(size), data='made-up chats of 2 to 12 messages')
