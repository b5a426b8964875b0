"""Fine-tune Llama chat models on your own conversations with 4-bit LoRA, in notebooks you can read.

Importing this package loads nothing heavy: each name below is fetched from its module when it is first used. That holds
for `from llama_nb import *` too, see the chapter on lazy names."""
import logging
import sys

from .lazy import hold, is_existence_check, lazy_name, namespace_of_star

__version__ = "0.1.0"

# on a CPU the import of bitsandbytes, by peft too, asks for an optional kernel that is not used here
logging.getLogger('bitsandbytes.backends.cpu.ops').setLevel(logging.ERROR)

_MODULES = {
    'errors': 'LlamaNbError ConfigError DataError ResourceError CheckpointError NonFiniteError DivergenceError OutOfMemoryError ThresholdError RunInterrupted',
    'config': 'ModelConfig LoRAConfig DataConfig TrainingConfig EvaluationConfig RunConfig load_config preset PRESETS',
    'views': 'View',
    'lazy': '',
    'network': '',
    'quantization': 'nf4_levels fp4_levels quantize_blockwise dequantize_blockwise bits_per_weight bnb_config',
    'lora': 'add_lora trainable_parameters check_adapter',
    'shapes': 'tiny_llama',
    'sources': 'demo_model model_shape',
    'model': 'load_tokenizer load_model load_tuned architecture',
    'conversation': 'Message ToolCall Conversation Example',
    'template': 'ChatTemplate',
    'tokens': '',
    'layouts': '',
    'segments': 'get_template',
    'dialogue': 'encode encode_prompt',
    'masks': 'show_mask show_batch',
    'verification': 'verify_masks verify_tools added_tokens',
    'prepared': 'read_prepared',
    'row_faults': '',
    'auditing': 'audit AuditReport',
    'files': 'BadRow',
    'formats': 'read_conversations',
    'data_report': 'DataReport',
    'data': 'AlpacaDatasetLoader DailyDialogDatasetLoader ChatDatasetLoader CombinedDatasetLoader MixedDatasetLoader TooFewError load_data save_data',
    'quality': 'check_data',
    'examples': 'encode_all ExampleSet Ledger',
    'packing': 'pack PackedCollator',
    'attention': 'attention_kernel plain_attention packed_attention',
    'layers': 'fuse_layers_ unfuse_layers_',
    'linears': 'LoRALinear fuse_lora_ unfuse_lora_',
    'loss': 'supervised_loss batch_loss',
    'fastpath': 'apply_fast_path_',
    'memory': 'plan MemoryPlan',
    'offloading': '',
    'shards': '',
    'staging': '',
    'ranks': '',
    'checkpoints': 'verify_checkpoint',
    'runs': 'Run list_runs watch save_config',
    'card': '',
    'safe_trainer': 'SafeTrainer Guard',
    'guards': '',
    'mirror': 'fetch_run',
    'trackers': '',  # a name cannot be a module and a function at once: `from llama_nb.trackers import guards`
    'launch': 'Machines',
    'preflight': 'measure_all_reduce',
    'generate': 'generate_replies stream_reply ChatSession samples_timeline',
    'metrics': 'Perplexity Bleu ChrF Rouge corpus_bleu',
    'intervals': 'bootstrap_interval paired_difference',
    'report': 'EvaluationReport load_report',
    'losses': 'PerplexityEvaluator top_losses explain',
    'evaluation': 'QualitativeEvaluator EvaluationFramework evaluate_saved run_lm_eval',
    'comparison': 'compare',
    'stopping': '',
    'inputs': '',
    'own_objects': '',
    'resume': '',
    'loop': '',
    'training_data': '',
    'checks': '',
    'publishing': '',
    'auto_settings': '',
    'starting': '',
    'overrides': '',
    'train': 'LLAMATrainer',
    'worker': '',
    'doctor': 'selfcheck',  # likewise `from llama_nb.doctor import doctor`
    'demo': 'run_demo',
}
_OWNER = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = ['__version__', *_OWNER]
# modules that import no torch; the names of all others wait for their first use after `import *`
_LIGHT = set('''errors config views shapes conversation template tokens layouts segments dialogue masks verification prepared auditing files
formats data_report data quality examples memory checkpoints runs'''.split())
_LAZY = {name: lazy_name(f'{__name__}.{module}', name) for name, module in _OWNER.items() if module not in _LIGHT}


def _stand_in(name, frame):
    "A name as `import *` gets it: a stand-in for one of a heavy module; `None` if the real object is wanted."
    if name not in _LAZY: return None
    if is_existence_check(frame): return _LAZY[name]
    namespace = namespace_of_star(frame)
    if namespace is None: return None
    hold(_LAZY[name], namespace)
    return _LAZY[name]


def __getattr__(name):
    "Fetch a public name, or a module, at first use."
    import importlib
    if (lazy := _stand_in(name, sys._getframe(1))) is not None: return lazy
    if name in _OWNER:
        value = getattr(importlib.import_module(f'{__name__}.{_OWNER[name]}'), name)
    elif name in _MODULES or name == 'cli':
        value = importlib.import_module(f'{__name__}.{name}')
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__, *_MODULES})
