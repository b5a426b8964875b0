"""Runs of several ranks in forked processes: everything heavy is imported and loaded once, then each rank is a copy.

A rank gets the environment that torchrun would give it, and trains through the same door as any program under torchrun."""
import os
import socket
from pathlib import Path

from fork_run import fork, renamed, wait

from llama_nb.ranks import start_ranks
from llama_nb.runs import Run


def free_port():
    "A port nobody uses now."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def join(trainer, number, size, port, timeout_s):
    "Become rank `number` of `size`."
    from accelerate.state import AcceleratorState, GradientState, PartialState
    for state in (AcceleratorState, GradientState, PartialState): state._reset_state()  # the parent trained alone
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port), OMP_NUM_THREADS='1')
    start_ranks(trainer.device, timeout_s)


def ranks(trainer, name, size, resume=False, before=None, timeout_s=30, **training):
    "Start the ranks of a run; returns their process ids. `before(trainer, number)` is called in each of them."
    port = free_port()
    if (start := getattr(trainer, 'start_rank', None)) is not None:  # on GPUs, which a forked process cannot use
        return [start(log(trainer, name, number), number, size, port, name, resume, before, timeout_s, training) for number in range(size)]
    def work(number):
        def train():
            renamed(trainer, name, num_processes=size, **training)
            if size > 1: join(trainer, number, size, port, timeout_s)
            if before: before(trainer, number)
            trainer.train(resume=resume, progress=False)
        return train
    return [fork(work(number), log(trainer, name, number)) for number in range(size)]


def log(trainer, name, number):
    "Where a rank writes what it says."
    return Path(trainer.config.training.output_dir).parent/f'{name}-{number}.log'


def ended(trainer, name, children):
    "Wait for all ranks; exit codes and what each said."
    codes = [wait(child) for child in children]
    return codes, [log(trainer, name, i).read_text() if log(trainer, name, i).exists() else '' for i in range(len(children))]


def trained(trainer, name, size, **options):
    "Train a run to its end on several ranks; returns the `Run`."
    codes, said = ended(trainer, name, ranks(trainer, name, size, **options))
    assert codes == [0]*size, f'{codes}: {[text[-1500:] for text in said]}'
    return Run(Path(trainer.config.training.output_dir)/name)
