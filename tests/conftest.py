"""Marks for tests that a plain run leaves out: `@pytest.mark.slow`, `.gpu`, `.network`; `pytest --flags "slow"` runs them too."""
import configparser
from pathlib import Path

import pytest

settings = configparser.ConfigParser(delimiters=['='])
settings.read(Path(__file__).parent.parent/'settings.ini', encoding='utf-8')
FLAGS = settings['DEFAULT']['tst_flags'].split()  # the same flags that cells carry


def pytest_addoption(parser):
    parser.addoption('--flags', default='', help='flags whose tests run too, such as "slow gpu"')


def pytest_configure(config):
    for flag in FLAGS: config.addinivalue_line('markers', f'{flag}: runs only with --flags {flag}')


LONGEST = ('test_real_data', 'test_templates', 'test_stream', 'test_encoder_fuzz')  # files that take minutes start first, so that two workers end together


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    asked = config.getoption('--flags').split()
    for item in items:
        for flag in FLAGS:
            if flag in item.keywords and flag not in asked:
                item.add_marker(pytest.mark.skip(reason=f'{flag}: run with --flags {flag}'))


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "A folder with a tiny model, and a loaded trainer on it that forked processes start from."
    from fork_run import make_trainer
    place = tmp_path_factory.mktemp('tiny')
    return place, make_trainer(place)


@pytest.fixture(scope='session')
def undisturbed(tiny):
    "The run that nobody disturbs: eight steps, a checkpoint after each."
    from fork_run import finished
    return finished(tiny[1], 'whole')


@pytest.fixture(scope='module')
def place(tmp_path_factory, request):
    "A folder of its own for each file: a tiny model in `tiny` and conversations in `chats.jsonl`."
    from tiny_run import make_place
    return make_place(tmp_path_factory.mktemp(request.module.__name__))
