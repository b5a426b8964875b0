"""What importing costs and who may import whom: the house rules that no single notebook can see."""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import record

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT/'llama_nb'
CHAPTERS = {}  # module name -> number of its notebook
for path in sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb')):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    found = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code'), re.M)
    if found: CHAPTERS[found[1]] = int(path.name[:2])
MODULES = {name: ast.parse((PACKAGE/f'{name}.py').read_text(encoding='utf-8')) for name in CHAPTERS}
NO_TORCH = ('config', 'errors', 'lazy', 'network', 'views', 'shapes', 'conversation', 'files', 'formats', 'checkpoints', 'runs', 'card', 'cli')
HEAVY = ('torch', 'transformers', 'peft', 'bitsandbytes', 'datasets', 'accelerate', 'evaluate', 'matplotlib', 'ipywidgets', 'wandb', 'trl', 'numpy')


def python(code, **env):
    "Run code in a fresh process from the project's folder; its last line as JSON."
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def own_imports(tree):
    "Our modules that a module imports, anywhere in it: `from .errors import x`, `from llama_nb.errors import x`, `import llama_nb.errors`."
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ''
            if node.level == 1 or module.split('.')[0] == 'llama_nb':
                parts = module.split('.') if node.level == 1 else module.split('.')[1:]
                yield from [parts[0]] if parts and parts[0] else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            yield from [a.name.split('.')[1] for a in node.names if a.name.startswith('llama_nb.')]


def declared(tree):
    "The names of a module's `__all__`."
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(t, 'id', None) == '__all__' for t in node.targets): return list(ast.literal_eval(node.value))
    return []


PUBLIC = {name: declared(tree) for name,tree in MODULES.items() if name != 'cli'}


def test_every_module_has_its_notebook():
    stems = {p.stem for p in PACKAGE.glob('*.py')} - {'__init__', '__main__', '_modidx'}
    assert stems == set(CHAPTERS)
    assert len(set(CHAPTERS.values())) == len(CHAPTERS), 'two notebooks share a number'


def test_a_lower_number_never_imports_a_higher_one():
    wrong = [f'{name} ({CHAPTERS[name]:02}) imports {other} ({CHAPTERS[other]:02})' for name,tree in MODULES.items()
             for other in own_imports(tree) if other in CHAPTERS and CHAPTERS[other] >= CHAPTERS[name]]
    assert not wrong, '; '.join(wrong)


def own_names(tree):
    "Pairs of one of our modules and a name taken from it, anywhere in a module."
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom): continue
        module = node.module or ''
        if node.level == 1 and module: yield from ((module, a.name) for a in node.names)
        elif module.startswith('llama_nb.'): yield from ((module.split('.')[1], a.name) for a in node.names)


def defined(tree):
    "The names that a module binds itself at its top level: not those it imports."
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names.add(node.name)
        elif not isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names


def test_a_name_is_imported_from_the_module_that_defines_it():
    passed_on = [f'{name} takes {what} from {module}' for name,tree in MODULES.items() for module,what in own_names(tree)
                 if module in MODULES and what not in defined(MODULES[module])]
    assert not passed_on, '; '.join(passed_on)


def test_no_private_name_crosses_a_module_border():
    crossing = [f'{name} takes {what} from {module}' for name,tree in MODULES.items() for module,what in own_names(tree) if what.startswith('_')]
    assert not crossing, '; '.join(crossing)


def test_methods_stand_in_their_class():
    "No `SomeClass.method = function` at the top level of a module."
    classes = {n.name for tree in MODULES.values() for n in tree.body if isinstance(n, ast.ClassDef)}
    assigned = [f'{name}: {ast.unparse(node)[:60]}' for name,tree in MODULES.items() for node in tree.body if isinstance(node, ast.Assign)
                for t in node.targets if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id in classes]
    assert not assigned, '; '.join(assigned)


def test_the_package_and_the_light_modules_import_nothing_heavy_and_open_no_socket():
    found = python(f'''
import json, socket, sys
asked = []
class Refused(socket.socket):
    def connect(self, address): asked.append(str(address)); raise OSError('no network while importing')
    connect_ex = connect
socket.socket = Refused
def refuse(*a, **k): asked.append(str(a[:2])); raise OSError('no network while importing')
socket.create_connection = socket.getaddrinfo = refuse
import llama_nb
after = dict(package=sorted(set({HEAVY!r}) & sys.modules.keys()))
for name in {NO_TORCH!r}:
    __import__('llama_nb.' + name)
    after[name] = sorted(set({HEAVY[:-1]!r}) & sys.modules.keys())
from llama_nb import *
after['import *'] = sorted(set({HEAVY[:-1]!r}) & sys.modules.keys())
for name in llama_nb.__all__: repr(globals()[name])  # tools that list variables do this
after['repr'] = sorted(set({HEAVY[:-1]!r}) & sys.modules.keys())
owners = {{n: getattr(__import__('llama_nb.' + m, fromlist=[n]), n) for n,m in llama_nb._OWNER.items()}}
for name in llama_nb.__all__: globals()[name].__class__  # the first use of each
wrong = [n for n,owned in owners.items() if getattr(llama_nb, n, None) is not owned or globals().get(n) is not owned]
print(json.dumps([after, asked, [n for n in llama_nb.__all__ if n not in globals()], wrong]))''')
    after, asked, missing, wrong = found
    assert after == dict.fromkeys(['package', *NO_TORCH, 'import *', 'repr'], [])
    record('imports', modules=len(after), heavy=sum(map(len, after.values())), connections=len(asked))
    assert asked == []  # the names load every module: none of them calls home
    assert missing == []
    assert wrong == []  # a module named like its function must not hide it


def test_star_import_is_fast_and_its_names_are_the_real_ones_once_used():
    "Settings cost no torch; a heavy name can be subclassed, asked about, pickled and called, and is then the class itself."
    found = python("""
import json, sys, time
since = time.process_time()
from llama_nb import *
spent, before = time.process_time() - since, 'torch' in sys.modules
TrainingConfig(max_steps=3), ModelConfig('demo'), LoRAConfig(r=4)
kept = LLAMATrainer
assert 'torch' not in sys.modules
class Mine(LLAMATrainer): pass
import copy, functools, inspect, io, pickle, contextlib
import llama_nb.train
real = llama_nb.train.LLAMATrainer
checks = dict(
    swapped=LLAMATrainer is real and llama_nb.LLAMATrainer is real, kept=kept is not real and kept == real and real == kept,
    subclass=Mine.__mro__[1] is real and issubclass(Mine, kept), isinstance=isinstance(Mine.__new__(Mine), kept),
    signature=inspect.signature(kept) == inspect.signature(real), partial=functools.partial(kept).func is kept,
    pickle=pickle.loads(pickle.dumps(kept)) is real, tab='from_config' in dir(kept) and dir(kept) == dir(real),
    function=inspect.signature(load_model) == inspect.signature(llama_nb.load_model), imported='torch' in sys.modules,
    annotation=(kept | None) == (real | None), doc=kept.__doc__ == real.__doc__)
with contextlib.redirect_stdout(io.StringIO()) as out: help(kept)
checks['help'] = 'Fine-tunes a Llama chat model' in out.getvalue()
def explicit():
    from llama_nb import PerplexityEvaluator
    return PerplexityEvaluator
checks['named'] = explicit() is sys.modules['llama_nb.losses'].PerplexityEvaluator
print(json.dumps([spent, before, [k for k,v in checks.items() if not v]]))""")
    spent, before, wrong = found
    assert not before and not wrong
    assert spent < 2, f'{spent:.1f} s of processor time'


CONTRACT = """ModelConfig LoRAConfig DataConfig TrainingConfig EvaluationConfig RunConfig load_config preset
LlamaNbError ConfigError ResourceError DataError View nf4_levels fp4_levels quantize_blockwise dequantize_blockwise bnb_config add_lora trainable_parameters check_adapter
load_tokenizer load_model demo_model tiny_llama Message Conversation ChatTemplate Example encode show_mask verify_masks read_conversations BadRow
AlpacaDatasetLoader DailyDialogDatasetLoader ChatDatasetLoader CombinedDatasetLoader MixedDatasetLoader load_data DataReport pack PackedCollator apply_fast_path_ packed_attention
supervised_loss plan MemoryPlan Run list_runs watch generate_replies ChatSession Perplexity Bleu Rouge PerplexityEvaluator QualitativeEvaluator EvaluationFramework
EvaluationReport compare LLAMATrainer selfcheck audit AuditReport""".split()


def test_the_package_offers_the_promised_names_and_each_is_public_where_it_lives():
    listed = ast.literal_eval(python('import json, llama_nb; print(json.dumps(repr([llama_nb.__all__, llama_nb._OWNER])))'))
    names, owners = listed
    assert sorted(set(CONTRACT) - set(names)) == []
    stray = {n: m for n,m in owners.items() if n not in PUBLIC.get(m, ())}
    assert not stray, f'not in the __all__ of its module: {stray}'

    assert not [n for n in names if n in CHAPTERS], 'a public name that is also a module: importing the module would hide it'


RULES = {'weights_only=False': r'weights_only\s*=\s*False', 'trust_remote_code=True': r'trust_remote_code\s*=\s*True', 'pickle.load': r'\bpickle\.loads?\b',
         'eval(': r'(?<![\w.])eval\(', 'shell=True': r'shell\s*=\s*True', '0.0.0.0': r'0\.0\.0\.0', 'evaluate.load': r'\bevaluate\.load\b', 'nltk.download': r'\bnltk\.download\b'}


@pytest.mark.parametrize('rule', RULES)
def test_static_rule(rule):
    hits, lines = [], 0
    for path in PACKAGE.rglob('*.py'):
        for i,line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
            lines += 1
            code = re.sub(r'(\'\'\'|""").*?\1', '', line)
            if re.search(RULES[rule], code): hits.append(f'{path.name}:{i}: {line.strip()[:80]}')
    record('static rule', rule=rule, lines=lines, hits=len(hits))
    assert not hits, '\n'.join(hits)


def test_exported_code_does_not_print_or_change_the_process():
    "Printing belongs to the command line, global switches to the user's program; `main` of cli owns its process."
    hits = []
    for name,tree in MODULES.items():
        for node in tree.body:  # module level only: importing changes nothing
            for call in [n for n in ast.walk(node) if isinstance(n, ast.Call)] if isinstance(node, (ast.Expr, ast.Assign)) else []:
                text = ast.unparse(call.func)
                if text in ('print', 'random.seed', 'torch.manual_seed', 'np.random.seed', 'warnings.filterwarnings', 'warnings.simplefilter', 'torch.set_default_dtype', 'os.putenv'): hits.append(f'{name}: {text}')
            if isinstance(node, ast.Assign) and any(ast.unparse(t).startswith('os.environ[') for t in node.targets): hits.append(f'{name}: {ast.unparse(node)}')
        hits += [f'{name}: print' for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == 'print' and not n.keywords]
    assert not hits, '\n'.join(hits)
