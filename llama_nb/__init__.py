"""Fine-tune Llama chat models on your own conversations with 4-bit LoRA, in notebooks you can read.

Importing this package loads nothing heavy: each name below is fetched from its module when it is first used."""
__version__ = "0.1.0"

_MODULES = {
    'errors': 'LlamaNbError ConfigError DataError ResourceError CheckpointError NonFiniteError DivergenceError OutOfMemoryError ThresholdError RunInterrupted',
    'config': 'ModelConfig LoRAConfig DataConfig TrainingConfig EvaluationConfig RunConfig load_config save_config preset PRESETS',
    'views': 'View',
    'quantization': 'nf4_levels fp4_levels quantize_blockwise dequantize_blockwise bits_per_weight bnb_config',
    'lora': 'add_lora trainable_parameters check_adapter',
    'model': 'load_tokenizer load_model load_tuned demo_model tiny_llama model_shape architecture',
    'template': 'Message Conversation ChatTemplate',
    'segments': 'get_template',
    'dialogue': 'Example encode encode_prompt show_mask show_batch verify_masks',
    'files': 'BadRow',
    'formats': 'read_conversations',
    'quality': 'DataReport',
    'data': 'AlpacaDatasetLoader DailyDialogDatasetLoader ChatDatasetLoader CombinedDatasetLoader TooFewError load_data check_data save_data',
    'examples': 'encode_all ExampleSet Ledger',
    'packing': 'pack PackedCollator',
    'attention': 'attention_kernel',
    'layers': 'fuse_layers_ unfuse_layers_',
    'linears': 'LoRALinear fuse_lora_ unfuse_lora_',
    'fastpath': 'apply_fast_path_ plain_attention packed_attention supervised_loss batch_loss',
    'memory': 'plan MemoryPlan',
    'checkpoints': 'verify_checkpoint',
    'runs': 'Run list_runs watch',
    'guards': '',  # a name can not be a module and a function at once: `from llama_nb.guards import guards`
    'generate': 'generate_replies stream_reply ChatSession samples_timeline',
    'metrics': 'Perplexity Bleu ChrF Rouge corpus_bleu',
    'report': 'EvaluationReport load_report bootstrap_interval paired_difference',
    'losses': 'PerplexityEvaluator top_losses explain',
    'evaluation': 'QualitativeEvaluator EvaluationFramework compare run_lm_eval',
    'resume': '',
    'loop': '',
    'train': 'LLAMATrainer',
    'doctor': 'selfcheck',  # likewise `from llama_nb.doctor import doctor`
    'demo': 'run_demo',
}
_OWNER = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = ['__version__', *_OWNER]


def __getattr__(name):
    "Fetch a public name, or a module, at first use."
    import importlib
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
