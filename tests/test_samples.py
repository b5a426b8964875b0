"""The samples that travel with the package: enough, valid by our own reader, varied, and fairly split."""
import json
from itertools import combinations

import pytest

from llama_nb.data import AlpacaDatasetLoader, DailyDialogDatasetLoader, load_data, sample_path
from llama_nb.config import DataConfig
from llama_nb.formats import read_conversations

LOADERS = {'dialogues': DailyDialogDatasetLoader, 'instructions': AlpacaDatasetLoader}


def five_grams(conversation):
    "Runs of five words, over all messages, in lower case and without punctuation."
    words = [w for m in conversation.messages for w in (''.join(ch for ch in t if ch.isalnum()) for t in m.content.casefold().split()) if w]
    return {tuple(words[i:i + 5]) for i in range(len(words) - 4)}


def largest_jaccard(pairs):
    "The largest overlap of two sets of 5-grams, and where it stands."
    best = (0., None)
    for (a, x), (b, y) in pairs:
        common = len(x & y)
        if common: best = max(best, (common/len(x | y), f'{a} and {b}'))
    return best


def grams(conversations): return [(str(c.row), five_grams(c)) for c in conversations]


@pytest.mark.parametrize('name', LOADERS)
def test_valid_by_our_own_reader(name):
    read = read_conversations(sample_path(name))
    assert len(read) >= 120 and not read.bad and not read.notes
    assert read.format == dict(dialogues='messages', instructions='alpaca')[name]


def test_dialogues_have_four_to_ten_turns_of_two_speakers():
    for c in read_conversations(sample_path('dialogues')):
        roles = [m.role for m in c.messages]
        assert 4 <= len(roles) <= 10 and roles == ['user', 'assistant']*(len(roles)//2), f'{c.row}: {roles}'


def test_ids_are_unique():
    ids = [c.meta.get('id') for c in read_conversations(sample_path('dialogues'))]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize('name', LOADERS)
def test_no_two_are_alike(name):
    overlap, where = largest_jaccard(combinations(grams(read_conversations(sample_path(name))), 2))
    assert overlap < 0.3, f'5-gram Jaccard {overlap:.2f}: {where}'


@pytest.mark.parametrize('name', ['alpaca', 'dailydialog', 'both'])
def test_held_out_is_not_like_train(name):
    data = load_data(DataConfig(dataset_name=name, data_path='sample'))
    assert data.validation and data.report.duplicates == data.report.duplicates_across_split == 0
    overlap, where = largest_jaccard((a, b) for a in grams(data.train) for b in grams(data.validation))
    assert overlap < 0.2, f'5-gram Jaccard {overlap:.2f}: {where}'


@pytest.mark.parametrize('name', LOADERS)
def test_nothing_looks_like_a_template_or_a_secret(name):
    text = sample_path(name).read_text(encoding='utf-8')
    assert LOADERS[name]('sample').report.control_strings == 0
    assert text.isprintable() or all(line.isprintable() for line in text.splitlines())
    assert not any(mark in text for mark in ('http://', 'https://', '@'))
    assert all(json.loads(line) for line in text.splitlines())
