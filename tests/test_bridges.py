"""The bridge to lm-evaluation-harness, on a task of our own in a folder, with no socket; skipped where lm_eval is not installed."""
import json
import math

import pytest

harness = pytest.importorskip('lm_eval', reason='lm-evaluation-harness: lm_eval is not installed')

DOCS = ['The cat sat on the mat, and looked at the moon.', 'Nobody in the village  had seen a ship like this one before.', 'Again?\nYes, again.']
TASK = """
task: own_text
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError('a benchmark of our own tried to use the network')
    for name in ('create_connection', 'getaddrinfo'): monkeypatch.setattr(f'socket.{name}', refuse)


@pytest.fixture
def task(tmp_path):
    (tmp_path/'text.jsonl').write_text(''.join(json.dumps({'text': d}) + '\n' for d in DOCS))
    (tmp_path/'own_text.yaml').write_text(TASK.format(file=tmp_path/'text.jsonl'))
    return tmp_path


@pytest.fixture(scope='module')
def tuned():
    import torch

    from llama_nb.config import LoRAConfig
    from llama_nb.lora import add_lora
    from llama_nb.model import load_tokenizer
    from llama_nb.shapes import tiny_llama
    from llama_nb.sources import demo_model
    tokenizer = load_tokenizer(demo_model())
    model = add_lora(tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512), LoRAConfig(r=4))
    for name, p in model.named_parameters():
        if 'lora_B' in name: p.data = 0.2*torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return model, tokenizer


def nll(model, tokenizer, text):
    "Nats of a text behind one beginning token, as transformers computes them."
    import torch

    from llama_nb.attention import plain_attention
    ids = torch.tensor([[tokenizer.bos_token_id or tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]])
    with torch.no_grad(), plain_attention(model): return model(input_ids=ids, labels=ids).loss.item()*(ids.shape[1] - 1)


def test_tuned_and_base_on_a_task_of_our_own(task, tuned, no_sockets):
    from llama_nb.evaluation import run_lm_eval
    from llama_nb.losses import adapter_off
    from llama_nb.metrics import Perplexity, count_words
    model, tokenizer = tuned
    modes, attention = [m.training for m in model.modules()], model.get_base_model().config._attn_implementation
    found = run_lm_eval(model, tokenizer, ['own_text'], include_path=task, with_base=True, batch_size=2)
    assert [m.training for m in model.modules()] == modes and model.get_base_model().config._attn_implementation == attention
    sums = {'tuned': [nll(model, tokenizer, d) for d in DOCS]}
    with adapter_off(model): sums['base'] = [nll(model, tokenizer, d) for d in DOCS]
    assert sums['tuned'] != sums['base']
    for system, nlls in sums.items():
        ours = Perplexity().compute(nll_sums=nlls, num_tokens=[1]*3, num_words=sum(map(count_words, DOCS)), num_bytes=sum(len(d.encode()) for d in DOCS))
        theirs = {k.split(',')[0]: v for k, v in found[system]['own_text'].items()}
        for name in ('word_perplexity', 'byte_perplexity', 'bits_per_byte'): assert math.isclose(ours[name], theirs[name], rel_tol=1e-4), (system, name)


def test_word_perplexity_is_theirs():
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.api.task import PerplexityTask

    from llama_nb.metrics import Perplexity, count_words
    assert [count_words(d) for d in (*DOCS, '', ' x ')] == [PerplexityTask.count_words(d) for d in (*DOCS, '', ' x ')]
    nlls, words, size = [31.5, 40.25, 9.0], [count_words(d) for d in DOCS], [len(d.encode()) for d in DOCS]
    got = Perplexity().compute(nll_sums=nlls, num_tokens=[9, 9, 9], num_words=sum(words), num_bytes=sum(size))
    assert math.isclose(got['word_perplexity'], weighted_perplexity([(-x, n) for x, n in zip(nlls, words)]), rel_tol=1e-12)
    assert math.isclose(got['bits_per_byte'], bits_per_byte([(-x, n) for x, n in zip(nlls, size)]), rel_tol=1e-12)


def test_without_an_adapter_there_is_no_base(tuned):
    from llama_nb.evaluation import run_lm_eval
    from llama_nb.shapes import tiny_llama
    with pytest.raises(ValueError, match='no adapter'): run_lm_eval(tiny_llama(), tuned[1], ['own_text'], with_base=True)
