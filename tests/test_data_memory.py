"""Reading, checking, encoding and packing hold the texts once, in Arrow, and never all conversations as Python objects."""
import json
import subprocess
import sys
from pathlib import Path

from tiny_run import ENV

ROOT = Path(__file__).resolve().parents[1]


def test_memory_grows_by_the_texts_and_not_by_objects():
    "As objects, 40 MB of chats take about 90 MB; an index of MinHash sketches took 3 kB for each conversation."
    done = subprocess.run([sys.executable, str(ROOT/'tests'/'size_run.py'), '40'], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['conversations'] > 30_000 and found['table_mb'] > 20, found
    assert found['reading'] < 1.6*found['file_mb'], found  # the texts once
    assert found['cleaning'] < 1.5*found['file_mb'], found  # hashes of texts and sketches
    assert found['encoding'] < 1.8*found['table_mb'] + 15, found  # the ids once, no text of them for the fingerprint
