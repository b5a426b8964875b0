"""A long run: memory, files, threads and what is kept in memory do not grow with the steps."""
import os
import statistics
import time
from pathlib import Path

import pytest
from fork_run import Count, fork, make_trainer, record, renamed, wait

from llama_nb.safe_trainer import KEEP_LOGS
from llama_nb.runs import Run


def measure(pid):
    "What a process holds: resident memory in MB, open files, threads, children."
    status = dict(line.split(':', 1) for line in Path(f'/proc/{pid}/status').read_text().splitlines() if ':' in line)
    children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    return dict(rss_mb=int(status['VmRSS'].split()[0])/1024, files=len(os.listdir(f'/proc/{pid}/fd')), threads=int(status['Threads']), children=len(children))


def slope(points):
    "Least-squares slope of `(x, y)` pairs."
    mx, my = (statistics.mean(v) for v in zip(*points))
    return sum((x - mx)*(y - my) for x, y in points)/sum((x - mx)**2 for x, _ in points)


def soak(place, steps, turns):
    "A run of so many steps with 20 saves and 20 evaluations, then a long conversation, looked at from outside at 20 moments."
    trainer = make_trainer(place, data=dict(val_size=0.2))
    def work():
        renamed(trainer, 'soak', max_steps=steps, gradient_accumulation_steps=1, num_train_epochs=10**6, save_steps=steps//20, eval_steps=steps//20, logging_steps=1)
        trainer.train(progress=False)
        assert len(trainer.hf_trainer.state.log_history) <= KEEP_LOGS + 1
        from llama_nb.generate import ChatSession
        chat = ChatSession(trainer.model, trainer.tokenizer, template='chatml', max_new_tokens=4)
        for i in range(-20, turns):
            if i == 0: before = measure(os.getpid())['rss_mb']  # what is loaded at first use is loaded by now
            if i % 10 == 0: chat.reset()  # the context of the tiny model is short
            chat.say('hi')
        os.write(1, f"chat {measure(os.getpid())['rss_mb'] - before}\n".encode())
    child, folder, seen = fork(work, place/'log'), place/'runs'/'soak', []
    count, every = Count(folder, 'train'), steps//20
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if (n := count()) >= (len(seen) + 1)*every and n < steps: seen.append({'step': n, **measure(child), 'shm': len(os.listdir('/dev/shm'))})
        time.sleep(0.02)
    log = (place/'log').read_text()
    assert wait(child) == 0, log[-2000:]
    return Run(folder), seen, float(next(line for line in log.splitlines() if line.startswith('chat ')).split()[1])


def check(run, seen, chat_mb, steps):
    "The figures, and what they must not exceed."
    late = [s for s in seen if s['step'] > steps/10]
    per_1000 = slope([(s['step']/1000, s['rss_mb']) for s in late])
    times = [e['time'] for e in run.events() if e['kind'] == 'train']
    tenth = steps//10
    gaps = [b - a for a, b in zip(times, times[1:])]
    p50 = [statistics.median(gaps[i:i + tenth]) for i in range(tenth, len(gaps) - tenth, tenth)]
    begun = {e['step']: e['time'] for e in run.events() if e['kind'] == 'save_begin'}
    saves = [(e['time'] - begun[e['step']], e['bytes']) for e in run.events() if e['kind'] == 'checkpoint']
    record('soak', steps=steps, saves=len(saves), evaluations=sum(e['kind'] == 'eval' for e in run.events()), rss_mb_per_1000_steps=round(per_1000, 3),
           rss_mb=[round(s['rss_mb'], 1) for s in seen], files=sorted({s['files'] for s in late}), threads=sorted({s['threads'] for s in late}), chat_turns_rss_mb=round(chat_mb, 2),
           median_step_s_by_tenth=[round(x, 4) for x in p50], checkpoint_bytes=[saves[0][1], saves[-1][1]], median_save_s=round(statistics.median(s for s, _ in saves), 3),
           log_bytes_per_step=round(run.path.stat().st_size/steps, 1))
    assert len(run.metrics('loss')) == steps and len(seen) >= 10
    assert per_1000 <= 2, f'{per_1000:.2f} MB for 1,000 steps'
    for name in ('files', 'threads', 'children', 'shm'): assert max(s[name] for s in late) <= late[0][name] + 1, [s[name] for s in late]
    assert saves[-1][1] < saves[0][1] + 200*(KEEP_LOGS + 40)  # the state is bounded
    assert chat_mb < 4


@pytest.mark.slow
def test_soak(tmp_path):
    "10,000 steps, 20 saves, 20 evaluations, then 200 turns of chat."
    check(*soak(tmp_path, 10_000, 200), 10_000)
