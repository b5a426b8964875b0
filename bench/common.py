"""What every measurement shares: the facts of the machine and the form of a result file."""
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
from pathlib import Path

RESULTS = Path(__file__).parent/'results'
PACKAGES = 'llama_nb torch transformers peft bitsandbytes datasets accelerate trl'.split()


def machine():
    "Processor, cores and versions; no host name, user name or path."
    def version(name):
        try: return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError: return None
    cpu = next((line.split(':', 1)[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')),
               platform.processor()) if Path('/proc/cpuinfo').exists() else platform.processor()
    return dict(cpu=cpu, cores=os.cpu_count(), python=platform.python_version(), versions={p: version(p) for p in PACKAGES})


def spread(seconds):
    "Median, least and most of repeated measurements, in seconds."
    return dict(median_s=round(statistics.median(seconds), 3), min_s=round(min(seconds), 3), max_s=round(max(seconds), 3), n=len(seconds))


def save(name, rows, **settings):
    "Write `bench/results/<name>.json` and give back its path."
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS/f'{name}.json'
    result = dict(date=datetime.date.today().isoformat(), **machine(), settings=settings, rows=rows)
    path.write_text(json.dumps(result, indent=1) + '\n')
    return path
