"""Two "hosts" as network namespaces joined by a virtual cable: one run over both, and what happens when the cable is cut. Needs root."""
import os
import shutil
import subprocess
import sys
import time

import pytest
from test_launch import config, events
from tiny_run import ENV, make_tiny, record

from llama_nb.checkpoints import verify_checkpoint
from llama_nb.runs import Run

HOSTS = ('llama-nb-0', 'llama-nb-1')


def ip(*args): return subprocess.run(['ip', *args], capture_output=True, text=True)


@pytest.fixture
def hosts():
    "Two namespaces, 10.77.0.1 and 10.77.0.2."
    if not shutil.which('ip') or os.geteuid() != 0 or ip('netns', 'add', HOSTS[0]).returncode:
        pytest.skip('two hosts need network namespaces: iproute2 and root')
    ip('netns', 'add', HOSTS[1])
    ip('link', 'add', 'cable0', 'netns', HOSTS[0], 'type', 'veth', 'peer', 'name', 'cable1', 'netns', HOSTS[1])
    for i, host in enumerate(HOSTS):
        ip('-n', host, 'address', 'add', f'10.77.0.{i + 1}/24', 'dev', f'cable{i}')
        for device in ('lo', f'cable{i}'): ip('-n', host, 'link', 'set', device, 'up')
    yield HOSTS
    for host in HOSTS: ip('netns', 'del', host)


@pytest.mark.slow
def test_a_cut_cable_ends_both(hosts, tmp_path):
    "Both train together; the cable is cut: both end within 60 s with one line, and the checkpoint is valid."
    make_tiny(tmp_path/'tiny')
    settings = config(tmp_path, 'hosts', max_steps=2000, save_steps=4, ddp_timeout=15)
    processes = []
    for i, host in enumerate(hosts):
        command = ['ip', 'netns', 'exec', host, sys.executable, '-m', 'llama_nb', 'train', '--config', str(settings), '--num-machines', '2',
                   '--machine-rank', str(i), '--main-process-ip', '10.77.0.1', '--main-process-port', '29777']
        processes.append(subprocess.Popen(command, env={**ENV, 'GLOO_SOCKET_IFNAME': f'cable{i}'}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    folder, until = tmp_path/'runs'/'hosts', time.monotonic() + 420
    while events(folder, 'checkpoint') < 2 and time.monotonic() < until and all(p.poll() is None for p in processes): time.sleep(0.1)
    if events(folder, 'checkpoint') < 2: # what went wrong?
        for p in processes: p.kill()
        raise AssertionError([p.communicate()[0][-1500:] for p in processes])
    ip('-n', hosts[0], 'link', 'set', 'cable0', 'down')
    cut = time.monotonic()
    said = [p.communicate(timeout=90)[0] for p in processes]
    took = time.monotonic() - cut
    assert took < 60, took
    for text in said: assert 'llama-nb: ' in text.strip().splitlines()[-1] and 'Traceback' not in text, text
    assert [p.returncode for p in processes] == [1, 1], said
    run = Run(folder)
    assert verify_checkpoint(run.latest_valid(), run.id) == []
    record('two hosts, the cable is cut', seconds_until_both_end=round(took, 1), said=[text.strip().splitlines()[-1] for text in said])
