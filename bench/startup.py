"""How long a user waits for a sign of life: importing, `--help`, an error in a file, and `llama-nb train` to its first line and to its first step.

    python -m bench startup

Each measurement is a fresh process. `train` runs in a terminal of its own (a pseudo-terminal), as a user would see it; its first
step is taken from the run's event log. `python -m bench startup NAME` writes another result file, e.g. to keep an older state beside the new one."""
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

from bench.common import save, spread

LIMITS = {'import llama_nb': 0.5, 'llama-nb --help': 1.0, 'train: first sign': 2.0, 'train: bad file': 2.0, 'train: missing model': 5.0}  # seconds, what a user was promised
SCRIPT = Path(sys.executable).with_name('llama-nb')
QUIET = {'PYTHONDONTWRITEBYTECODE': '1'}


def seconds(command, repeats):
    "Wall time of a command, once to warm the file cache and then `repeats` times."
    times = []
    for i in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **QUIET})
        if i: times.append(time.perf_counter() - start)
    return times


def in_terminal(command, until, timeout_s=180):
    "Run a command in a pseudo-terminal until `until()` is true; seconds to its first output and the longest silence after it."
    start = time.perf_counter()
    child, terminal = pty.fork()
    if not child:
        os.environ.update(QUIET, COLUMNS='80')
        for name in ('CI', 'NO_PROGRESS'): os.environ.pop(name, None)
        os.execv(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))  # a new terminal has no size, and bars draw nothing
    first = last = None
    silence, out = 0.0, b''
    try:
        while time.perf_counter() - start < timeout_s and not until():
            if select.select([terminal], [], [], 0.02)[0]:
                try: piece = os.read(terminal, 65536)
                except OSError: break  # the command has ended
                now = time.perf_counter() - start
                out += piece
                if piece.strip():
                    silence = max(silence, now - last) if last is not None else 0.0
                    first, last = (now if first is None else first), now
        return first, silence, time.perf_counter() - start, out.decode(errors='replace')
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)


def train_once(folder):
    "Seconds to the first sign and to the end of the first optimizer step of a training of the demo model, and the longest silence between the two."
    events = Path(folder)/'first'/'events.jsonl'

    def stepped():
        lines = events.read_text().splitlines() if events.exists() else []
        return any(json.loads(line)['kind'] == 'train' for line in lines if line.endswith('}'))

    command = [str(SCRIPT), 'train', '--preset', 'demo', f'training.output_dir={folder}', 'training.run_name=first']
    return in_terminal(command, stepped)


def main(name='startup', repeats=7, trainings=5):
    "Measure everything beside an empty Python process, and save the result."
    with tempfile.TemporaryDirectory() as tmp:
        bad = Path(tmp)/'bad.jsonl'
        bad.write_text('{"messages": [{"role": "user", "content": "Hello"}, {"role": "asistant", "content": "Hi"}]}\n'*20)
        commands = {'python alone': [sys.executable, '-c', 'pass'], 'import llama_nb': [sys.executable, '-c', 'import llama_nb'], 'llama-nb --help': [str(SCRIPT), '--help']}
        rows = {label: spread(seconds(command, repeats)) for label, command in commands.items()}
        train = [str(SCRIPT), 'train', '--preset', 'demo', f'training.output_dir={tmp}/runs']
        rows['train: bad file'] = spread(seconds([*train, f'data.data_path={bad}'], 3))
        rows['train: missing model'] = spread(seconds([*train, f'model.model_name={tmp}/no-such-model'], 3))
        found = []
        for i in range(trainings + 1):  # the first one warms the file cache
            with tempfile.TemporaryDirectory() as folder: found.append(train_once(folder))
        first, silence, step, _ = zip(*found[1:])
        rows |= {'train: first sign': spread(first), 'train: first step': spread(step), 'train: longest silence': spread(silence)}
    rows = {label: {**row, 'limit_s': LIMITS.get(label)} for label, row in rows.items()}
    path = save(name, rows, repeats=repeats, trainings=trainings, warm_file_cache=True)
    for label, row in rows.items(): print(f"{label:24} {row['median_s']:7.3f} s  (limit {row['limit_s'] or '-'})")
    return path
