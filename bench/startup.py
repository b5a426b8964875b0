"""How long the first second of use takes: `import llama_nb` and `llama-nb --help`, each in fresh processes."""
import os
import subprocess
import sys
import time
from pathlib import Path

from bench.common import save, spread

LIMITS = {'import llama_nb': 0.5, 'llama-nb --help': 1.0}  # seconds, what a user was promised


def seconds(command, repeats):
    "Wall time of a command, once to warm the file cache and then `repeats` times."
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'})
        if i: times.append(time.perf_counter() - start)
    return times


def main(repeats=7):
    "Measure both commands beside an empty Python process, and save the result."
    script = Path(sys.executable).with_name('llama-nb')
    commands = {'python alone': [sys.executable, '-c', 'pass'], 'import llama_nb': [sys.executable, '-c', 'import llama_nb'],
                'llama-nb --help': [str(script), '--help']}
    rows = {name: {**spread(seconds(command, repeats)), 'limit_s': LIMITS.get(name)} for name, command in commands.items()}
    path = save('startup', rows, repeats=repeats, warm_file_cache=True)
    for name, row in rows.items(): print(f"{name:18} {row['median_s']:6.3f} s  (limit {row['limit_s'] or '-'})")
    return path
