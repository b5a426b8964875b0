"""The longer runs that the tutorials read: train, evaluate, and keep what may be kept: `python -m bench tutorials`.

Real data, whose licences forbid to pass its rows on: what stays are settings, losses, metrics, row numbers and generated replies."""
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

from bench.common import machine

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT/'nbs'/'tutorials'/'results'
DIALOGUES, INSTRUCTIONS = 'dailydialog/train.zip', 'alpaca/alpaca_data.json'  # below the data folder
COMMON = {'model.max_length': 1024, 'data.on_overflow': 'drop', 'training.learning_rate': 1e-3, 'training.gradient_accumulation_steps': 2, 'training.eval_steps': 'auto',
          'training.save_steps': 'auto', 'evaluation.metrics': '[perplexity,bleu,rouge,chrf]', 'evaluation.batch_size': 16, 'evaluation.max_new_tokens': 64}
RUNS = {  # 2,072 dialogues of up to 512 tokens are learned, 600 instructions, and both together
    'dialogues': {'data.dataset_name': 'dailydialog', 'data.data_path': '{data}/' + DIALOGUES, 'data.max_samples': 2400, 'data.val_size': 0.13, 'model.max_length': 512,
                  'training.gradient_accumulation_steps': 4, 'training.eval_steps': 58, 'training.save_steps': 58, 'evaluation.max_new_tokens': 48},
    'instructions': {'data.dataset_name': 'alpaca', 'data.data_path': '{data}/' + INSTRUCTIONS, 'data.val_size': 0.25, 'training.num_train_epochs': 2.0},
    'both': {'data.dataset_name': 'both', 'data.data_path': '{{alpaca: {data}/' + INSTRUCTIONS + ', dailydialog: {data}/' + DIALOGUES + '}}',
             'data.mix_weights': '{{alpaca: 1, dailydialog: 3}}', 'data.val_size': 0.13}}


def settings(name):
    "Overrides of one run, as the command line takes them; `{data}` stands for the data folder."
    return {k: str(v) for k, v in {**COMMON, **RUNS[name]}.items()}


def llama_nb(*args):
    "The command line in a process of its own."
    subprocess.run([sys.executable, '-m', 'llama_nb', *args], check=True, env={**os.environ, 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false'})


def made(name, runs, data):
    "The folder of a finished and evaluated run; it goes on where it was interrupted."
    folder = runs/name
    if not (folder/'adapter_model.safetensors').exists():
        given = [f'{k}={v.format(data=data)}' for k, v in settings(name).items()]
        if folder.exists(): llama_nb('train', '--resume', str(folder))
        else: llama_nb('train', '--preset', 'demo', *given, f'training.output_dir={runs}', f'training.run_name={name}')
    if not (folder/'eval'/'validation'/'metrics.json').exists(): llama_nb('evaluate', str(folder), '--no-data-text')
    return folder


def held_out(folder):
    "Conversations of a run: trained on, held out."
    from llama_nb.config import load_config
    from llama_nb.data import load_data
    data = load_data(load_config(folder/'config.yaml').data)
    return data.train, data.validation


def literature(replies, conversations):
    "BLEU-1 and BLEU-2 as papers on dialogue count them: averaged over replies, lowercased, split at white space, nltk's seventh smoothing."
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    references = {str(c.row): c.messages[-1].content for c in conversations}
    smooth = SmoothingFunction().method7
    def averaged(n, which):
        one = lambda said, row: sentence_bleu([references[row].lower().split()], said.lower().split(), weights=(1/n,)*n, smoothing_function=smooth) if said.strip() else 0.0
        return sum(one(r['replies'][which]['text'], r['row']) for r in replies)/len(replies)
    return {which: {f'bleu-{n}, averaged over replies, smoothed': round(averaged(n, which), 4) for n in (1, 2)} for which in replies[0]['replies']}


def keep(name, folder):
    "Write what the tutorial reads: no text of the data."
    from llama_nb.runs import Run
    run, at = Run(folder), folder/'eval'/'validation'
    samples = [json.loads(line) for line in (at/'samples.jsonl').read_text().splitlines()]
    if any(s['prompt'] or s['reference'] for s in samples): sys.exit(f'{at} holds text of the data')
    facts, train = json.loads((folder/'data.json').read_text()), [e for e in run.events() if e['kind'] == 'train']
    told = {k: facts[k] for k in ('train', 'validation') if k in facts}
    result = dict(date=datetime.date.today().isoformat(), **machine(), command='python -m bench tutorials', settings={k: v.format(data='$LLAMA_NB_TEST_DATA/data') for k, v in settings(name).items()}, data=dict(conversations=facts['conversations'], held_out=facts['held_out'],
                  taught_tokens=facts['taught_tokens'], fingerprint=facts['fingerprint'], parts=told), steps=len(train), tokens=sum(e['tokens'] for e in train), seconds_of_steps=round(sum(e['seconds'] for e in train)),
                  loss=[[s, round(v, 4)] for s, v in run.metrics('loss')], eval_loss=[[s, round(v, 4)] for s, v in run.metrics('eval_loss')],
                  literature=literature(samples, held_out(folder)[1]), report=json.loads((at/'metrics.json').read_text()))
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT/f'{name}.json').write_text(json.dumps(result, indent=1, ensure_ascii=False) + '\n')
    lines = [{k: s[k] for k in ('row', 'replies', 'loss')} for s in samples]
    (KEPT/f'{name}.replies.jsonl').write_text('\n'.join(json.dumps(s, ensure_ascii=False) for s in lines) + '\n')


def across(folders):
    "Every adapter on the same conversations, which none of them has been trained on: sums of nats and tokens, one pair each."
    from llama_nb.losses import PerplexityEvaluator, adapter_off
    from llama_nb.model import load_tokenizer, load_tuned
    from llama_nb.data_report import conversation_key
    seen = {conversation_key(c) for folder in folders.values() for c in held_out(folder)[0]}
    unseen = [c for c in held_out(folders['both'])[1] if conversation_key(c) not in seen]
    tokenizer, measured = load_tokenizer('demo'), {}
    for name, folder in folders.items():
        model = load_tuned(folder)[0]
        score = lambda: {str(l.row): [round(l.nll, 5), l.num_tokens] for l in PerplexityEvaluator(model, tokenizer, max_length=1024, on_overflow='drop', batch_size=16).per_conversation(unseen)}
        measured[name] = score()
        if name == 'both':
            with adapter_off(model): measured['base'] = score()
    rows = [dict(row=str(c.row), dataset=c.meta['dataset'], **{name: sums[str(c.row)] for name, sums in measured.items()}) for c in unseen if all(str(c.row) in sums for sums in measured.values())]
    result = dict(date=datetime.date.today().isoformat(), **machine(), command='python -m bench tutorials', note='nats and taught tokens of each conversation under each model', rows=rows)
    (KEPT/'across.json').write_text(json.dumps(result, ensure_ascii=False).replace('{"row"', '\n{"row"') + '\n')


def main(runs=None, data=None):
    "All three runs, then all three models on the same held-out conversations; takes an hour or two on two cores, and goes on where it stopped."
    root = os.environ.get('LLAMA_NB_TEST_DATA')
    if not root: sys.exit('LLAMA_NB_TEST_DATA is not set: these runs need the real data')
    runs, data, folders = Path(runs or ROOT/'runs'/'tutorials'), data or Path(root)/'data', {}
    for name in RUNS:
        folders[name] = made(name, runs, data)
        keep(name, folders[name])
        print('kept', name, flush=True)
    across(folders)
    return KEPT


if __name__ == '__main__': print('wrote', main(*sys.argv[1:]))
