"""A large file is checked and encoded in the memory of a small one."""
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_100_mb_of_chats_take_less_than_100_mb():
    done = subprocess.run([sys.executable, '-m', 'bench.stream', '100'], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['file_mb'] >= 100 and found['conversations'] > 50_000 and found['tokens'] > 25e6
    assert 0 < found['growth_mb'] < 100, found
