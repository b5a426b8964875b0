"""Metrics against their oracles on 200 pairs, in a process where no socket can be opened and with an empty home folder."""
import json
import math
import os
import random
import subprocess
import sys

import pytest

WORDS = "I you we went go to the a market house today, tomorrow. nice! really? don't 3.5 1,000 café naïve — 你好 हिन्दी 🙂 &amp; re-\nturn".split(' ')


def pairs(n=200, seed=0):
    "Replies and references: equal, near, far, one word, empty, of several scripts."
    rng = random.Random(seed)
    text = lambda low, high: ' '.join(rng.choices(WORDS, k=rng.randint(low, high)))
    references = [text(1, 25) for _ in range(n)]
    predictions = []
    for i, reference in enumerate(references):
        words = reference.split(' ')
        kind = i % 5
        if kind == 1: words = [w if rng.random() < .8 else rng.choice(WORDS) for w in words]
        if kind == 2: words = text(0, 25).split(' ')
        if kind == 3: words = words[:1]
        predictions.append('' if kind == 4 and i % 10 == 4 else ' '.join(words))
    return predictions, references


def ascii_pairs():
    "The same with the non-ASCII words taken out: what rouge-score's own tokenizer was made for."
    clean = lambda text: text.encode('ascii', 'ignore').decode()
    predictions, references = pairs(seed=1)
    return [clean(t) for t in predictions], [clean(t) for t in references]


@pytest.fixture(autouse=True)
def no_sockets(monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError('a metric tried to use the network')
    for name in ('socket', 'create_connection', 'getaddrinfo'): monkeypatch.setattr(f'socket.{name}', refuse)


def test_bleu_is_sacrebleu():
    import sacrebleu
    from llama_nb.metrics import Bleu, corpus_bleu
    predictions, references = pairs()
    expected = sacrebleu.corpus_bleu(predictions, [references]).score
    assert 5 < expected < 95
    assert abs(100*corpus_bleu(predictions, references) - expected) < 0.01
    assert abs(100*Bleu().compute(predictions=predictions, references=references)['bleu'] - expected) < 0.01
    for i in range(200): # one pair at a time: empty orders, empty texts, no 4-gram at all
        expected = sacrebleu.corpus_bleu([predictions[i]], [[references[i]]]).score
        assert abs(100*corpus_bleu([predictions[i]], [references[i]]) - expected) < 0.01, (predictions[i], references[i])


def test_bleu_lowercase_and_several_references():
    import sacrebleu
    from llama_nb.metrics import Bleu
    predictions, references = pairs()
    more = references[1:] + references[:1]
    expected = sacrebleu.corpus_bleu(predictions, [references, more], lowercase=True).score
    got = Bleu().compute(predictions=predictions, references=[list(r) for r in zip(references, more)], lowercase=True)
    assert abs(100*got['bleu'] - expected) < 0.01
    assert 'nrefs:2|case:lc' in got['signature']


def test_chrf_is_sacrebleu():
    import sacrebleu
    from llama_nb.metrics import ChrF, chrf_from_stats, chrf_stats
    predictions, references = pairs()
    expected = sacrebleu.corpus_chrf(predictions, [references]).score
    assert 5 < expected < 95
    assert abs(100*ChrF().compute(predictions=predictions, references=references)['chrf'] - expected) < 0.01
    for p, r in zip(predictions, references): # one pair at a time: empty texts, no run of six
        assert abs(100*chrf_from_stats(chrf_stats(p, r)) - sacrebleu.corpus_chrf([p], [[r]]).score) < 0.01, (p, r)
    more = references[1:] + references[:1]
    several = ChrF().compute(predictions=predictions, references=[list(r) for r in zip(references, more)])
    assert abs(100*several['chrf'] - sacrebleu.corpus_chrf(predictions, [references, more]).score) < 0.01 and 'nrefs:2' in several['signature']


def test_rouge_is_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer
    from llama_nb.metrics import ROUGE_TYPES, Rouge, rouge_scores, split_sentences
    stock = RougeScorer(list(ROUGE_TYPES))
    for (predictions, references), tokenizer, lines in [(ascii_pairs(), 'unicode', split_sentences), (pairs(), 'rouge_score', str)]:
        expected = [stock.score(lines(r), lines(p)) for p, r in zip(predictions, references)]
        got = rouge_scores(predictions, references, tokenizer=tokenizer)
        for t in ROUGE_TYPES:
            assert got[t].tolist() == [row[t].fmeasure for row in expected] # exactly
            mean = Rouge().compute(predictions=predictions, references=references, tokenizer=tokenizer)[t]
            assert math.isclose(mean, sum(row[t].fmeasure for row in expected)/200, rel_tol=1e-12)


def test_on_200_real_replies():
    "Each second turn of a real dialogue as the prediction for the one before it: unlike texts of natural lengths."
    if not os.environ.get('LLAMA_NB_TEST_DATA'): pytest.skip('real data: LLAMA_NB_TEST_DATA is not set')
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer
    from llama_nb.config import DataConfig
    from llama_nb.data import load_data
    from llama_nb.metrics import ROUGE_TYPES, bleu_from_stats, bleu_stats, chrf_from_stats, chrf_stats, corpus_bleu, rouge_scores, split_sentences
    from llama_nb.intervals import bootstrap_interval
    source = os.path.join(os.environ['LLAMA_NB_TEST_DATA'], 'data', 'dailydialog', 'validation.zip')
    talks = load_data(DataConfig(dataset_name='dailydialog', data_path=source, max_samples=300, val_size=0.1)).train[:200]
    predictions, references = [t.messages[1].content for t in talks], [t.messages[0].content for t in talks]
    assert len(talks) == 200
    expected = sacrebleu.corpus_bleu(predictions, [references]).score
    assert abs(100*corpus_bleu(predictions, references) - expected) < 0.01
    table = [bleu_stats(p, r) for p, r in zip(predictions, references)]
    assert abs(100*bootstrap_interval(table, bleu_from_stats).value - expected) < 0.01
    assert abs(100*chrf_from_stats(sum(map(chrf_stats, predictions, references))) - sacrebleu.corpus_chrf(predictions, [references]).score) < 0.01
    stock, got, ours = RougeScorer(list(ROUGE_TYPES)), rouge_scores(predictions, references, tokenizer='rouge_score'), rouge_scores(predictions, references)
    for i, (p, r) in enumerate(zip(predictions, references)):
        assert {t: got[t][i] for t in ROUGE_TYPES} == {t: s.fmeasure for t, s in stock.score(r, p).items()}
        if (p + r).isascii(): assert {t: ours[t][i] for t in ROUGE_TYPES} == {t: s.fmeasure for t, s in stock.score(split_sentences(r), split_sentences(p)).items()}


SCRIPT = """
import json, socket, sys
def refuse(*args, **kwargs): raise AssertionError('network')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from llama_nb.metrics import Bleu, ChrF, Distinct, EndedRate, LengthRatio, Perplexity, Repetition, Rouge, TokenAccuracy
kept = [Bleu() for _ in range(3)] # alive side by side, as in several processes
pairs = dict(predictions=['the cat sat on the mat'], references=['the cat sat on a mat'])
for metric in kept: metric.add_batch(**pairs)
out = [m.compute() for m in kept] + [M().compute(**pairs) for M in (Rouge, ChrF, LengthRatio)] + [M().compute(data=['a b a b']) for M in (Distinct, Repetition)]
out += [Perplexity().compute(nll_sums=[1.0], num_tokens=[2]), TokenAccuracy().compute(predictions=[1], references=[1]), EndedRate().compute(data=[True])]
print(json.dumps(out))
"""


def test_no_litter_and_no_network_from_import_on(tmp_path):
    home, temporary = tmp_path/'home', tmp_path/'tmp'
    home.mkdir(), temporary.mkdir()
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'XDG_'))} | dict(HOME=str(home), TMPDIR=str(temporary), HF_HUB_OFFLINE='1')
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [root, os.environ.get('PYTHONPATH')]))
    done = subprocess.run([sys.executable, '-c', SCRIPT], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    out = json.loads(done.stdout.splitlines()[-1])
    assert out[0] == out[1] == out[2] and out[0]['bleu'] > 0.5
    assert [p for p in temporary.rglob('*')] == []
    assert [p for p in home.rglob('*') if p.is_file()] == []
