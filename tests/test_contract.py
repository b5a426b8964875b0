"""What we use of other packages that they have not promised: one row each, so that a new version fails here, with the name of what changed.

A row says where the name lives, what we expect of it, and which of our modules stands on it. The last tests look for what is missing in the table:
methods that our classes override, private names that our modules touch, and modules imported from the inside of a package."""
import ast
import functools
import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest
import sys

PACKAGES = ('transformers', 'peft', 'accelerate', 'bitsandbytes', 'torch', 'datasets', 'evaluate', 'tokenizers', 'huggingface_hub')
PACKAGE = Path(importlib.util.find_spec('llama_nb').origin).parent  # the one that is installed here


@dataclass(frozen=True)
class Row:
    path: str  # where it lives, e.g. `transformers.Trainer._save_checkpoint`; `a|b`: one of them
    takes: tuple = ()  # argument names that it must take, besides `self`
    where: str = ''  # which of our modules uses it
    starts: bool = False  # `takes` stand in this order at the start, because we pass them by position
    takes_more: bool = False  # it must also accept other keywords (`**kwargs`)

    @property
    def name(self): return self.path.split('|')[0].split('.')[-1]


def _rows(where, paths, takes=(), **kwargs): return [Row(path, tuple(takes), where, **kwargs) for path in paths.split()]


TRAINER = 'transformers.Trainer.'
LLAMA = 'transformers.models.llama.modeling_llama.'
CACHE = 'transformers.cache_utils.'
EVENTS = 'on_train_begin on_train_end on_epoch_end on_step_begin on_step_end on_pre_optimizer_step on_optimizer_step on_evaluate on_save on_log'
TABLE = [
    # transformers.Trainer: what SafeTrainer and PackedTrainer override, and what they call
    Row(TRAINER + '_save_checkpoint', ('model', 'trial'), 'guards', starts=True),
    Row(TRAINER + '_maybe_log_save_evaluate', (), 'guards'),
    Row(TRAINER + '_evaluate', ('trial',), 'guards', starts=True),
    Row(TRAINER + '_get_output_dir', ('trial',), 'guards'),
    Row(TRAINER + '_save', ('output_dir', 'state_dict'), 'guards', starts=True),
    Row(TRAINER + '_load_from_checkpoint', ('resume_from_checkpoint', 'model'), 'guards, publishing, train', starts=True),
    Row(TRAINER + '_load_optimizer_and_scheduler', ('checkpoint',), 'guards, loop', starts=True),
    Row(TRAINER + '_load_rng_state', ('checkpoint',), 'guards', starts=True),
    Row(TRAINER + '_load_scaler', ('checkpoint',), 'guards', starts=True),
    Row(TRAINER + '_save_optimizer_and_scheduler', ('output_dir',), 'loop', starts=True),
    Row(TRAINER + 'create_optimizer', (), 'loop'),
    Row(TRAINER + 'create_scheduler', ('num_training_steps', 'optimizer'), 'loop', starts=True),
    Row(TRAINER + 'prediction_step', ('model', 'inputs', 'prediction_loss_only', 'ignore_keys'), 'loop', starts=True),
    Row('peft.optimizers.create_loraplus_optimizer', ('model', 'optimizer_cls', 'lr', 'loraplus_lr_ratio'), 'loop'),
    Row('transformers.optimization.TYPE_TO_SCHEDULER_FUNCTION', (), 'loop'),
    Row('transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK', (), 'trackers'),
    Row('torch.optim.lr_scheduler.LambdaLR', ('optimizer', 'lr_lambda'), 'loop', starts=True),
    Row(TRAINER + '_get_grad_norm', ('model',), 'guards'),
    Row(TRAINER + '_get_train_sampler', ('train_dataset',), 'loop', starts=True),
    Row(TRAINER + '_prepare_inputs', ('inputs',), 'loop', starts=True),
    Row(TRAINER + 'get_batch_samples', ('epoch_iterator', 'num_batches', 'device'), 'guards'),
    Row(TRAINER + 'training_step', ('model', 'inputs', 'num_items_in_batch'), 'guards'),
    Row(TRAINER + 'compute_loss', ('model', 'inputs', 'return_outputs', 'num_items_in_batch'), 'loop', starts=True),
    Row(TRAINER + '_load_callback_state', (), 'loop'),
    Row(TRAINER + '_determine_best_metric', ('metrics', 'trial'), 'guards', starts=True),
    Row('transformers.trainer_callback.ExportableState', (), 'safe_trainer'),
    Row('transformers.training_args.OptimizerNames', (), 'checks'),
    Row('peft.tuners.tuners_utils.BaseTunerLayer', (), 'inputs'),
    Row('torch.optim.lr_scheduler.ReduceLROnPlateau', ('optimizer',), 'overrides', starts=True),
    Row('torch._dynamo.config.patch', (), 'linears'),
    Row(TRAINER + 'floating_point_ops', ('inputs',), 'loop', starts=True),
    Row(TRAINER + 'evaluate', ('eval_dataset', 'ignore_keys', 'metric_key_prefix'), 'guards, loop', starts=True),
    Row(TRAINER + 'log', ('logs',), 'guards, loop', starts=True),
    Row(TRAINER + 'add_callback', ('callback',), 'guards', starts=True),
    Row(TRAINER + 'remove_callback', ('callback',), 'overrides, train', starts=True),
    Row(TRAINER + 'train', ('resume_from_checkpoint',), 'train'),
    *_rows('guards', ' '.join(f'transformers.TrainerCallback.{event}' for event in EVENTS.split()), ('args', 'state', 'control'), starts=True, takes_more=True),
    Row('transformers.TrainerState.load_from_json', ('json_path',), 'train', starts=True),
    Row('transformers.TrainerState.save_to_json', ('json_path',), 'publishing', starts=True),
    # Llama's modules, whose forward we replace in training
    Row(LLAMA + 'LlamaRMSNorm.forward', ('hidden_states',), 'layers', starts=True),
    Row(LLAMA + 'LlamaRotaryEmbedding.forward', ('x', 'position_ids'), 'layers, memory', starts=True),
    Row(LLAMA + 'LlamaAttention.forward', ('hidden_states', 'position_embeddings', 'attention_mask'), 'layers', takes_more=True),
    Row(LLAMA + 'LlamaMLP.forward', ('x',), 'layers', starts=True),
    Row(LLAMA + 'LlamaDecoderLayer.forward', ('hidden_states', 'position_embeddings'), 'layers, memory', takes_more=True),
    Row('transformers.LlamaForCausalLM.forward', ('input_ids', 'attention_mask', 'position_ids', 'use_cache', 'logits_to_keep', 'labels'), 'fastpath, generate, losses', takes_more=True),
    Row('transformers.LlamaForCausalLM.set_attn_implementation', ('attn_implementation',), 'attention, losses', starts=True),
    *_rows('losses, fastpath, generate', 'transformers.LlamaForCausalLM.get_output_embeddings transformers.LlamaForCausalLM.get_decoder transformers.LlamaForCausalLM.get_input_embeddings'),
    Row('transformers.LlamaForCausalLM.activation_checkpointing_enable|transformers.LlamaForCausalLM.gradient_checkpointing_enable', (), 'loop'),
    Row('transformers.LlamaForCausalLM.activation_checkpointing_disable|transformers.LlamaForCausalLM.gradient_checkpointing_disable', (), 'loop'),
    Row('transformers.LlamaForCausalLM.is_activation_checkpointing|transformers.LlamaForCausalLM.is_gradient_checkpointing', (), 'loop'),
    Row('transformers.AttentionInterface.register', ('key', 'value'), 'attention', starts=True),
    # keys and values of replies
    Row(CACHE + 'DynamicCache', ('config',), 'generate'),
    *_rows('generate', ' '.join(CACHE + 'DynamicCache.' + n for n in 'batch_select_indices crop get_seq_length'.split())),
    Row(CACHE + 'DynamicLayer.lazy_initialization', ('key_states', 'value_states'), 'generate', starts=True),
    Row(CACHE + 'DynamicLayer.update', ('key_states', 'value_states'), 'generate', starts=True),
    Row(CACHE + 'DynamicLayer.batch_select_indices', ('indices',), 'generate', starts=True),
    *_rows('generate', ' '.join(CACHE + 'DynamicLayer.' + n for n in 'crop get_seq_length get_mask_sizes'.split())),
    # loading
    Row('transformers.modeling_gguf_pytorch_utils', (), 'model'),
    Row('transformers.BitsAndBytesConfig', ('load_in_4bit', 'bnb_4bit_quant_type', 'bnb_4bit_use_double_quant', 'bnb_4bit_compute_dtype'), 'quantization'),
    *_rows('model', ' '.join('transformers.utils.logging.' + n for n in
           'get_verbosity set_verbosity set_verbosity_error is_progress_bar_enabled disable_progress_bar enable_progress_bar'.split())),
    # datasets
    Row('datasets.utils.metadata.MetadataConfigs.from_dataset_card_data', ('dataset_card_data',), 'data', starts=True),
    Row('datasets.utils.metadata.MetadataConfigs', (), 'data'),
    Row('datasets.data_files.resolve_pattern', ('pattern', 'base_path'), 'data', starts=True),
    Row('datasets.data_files.sanitize_patterns', ('patterns',), 'data', starts=True),
    # peft
    Row('peft.PeftModel.save_pretrained', ('save_directory', 'save_embedding_layers'), 'guards'),
    Row('peft.PeftModel.from_pretrained', ('model', 'model_id'), 'lora, doctor', starts=True),
    *_rows('attention, losses', 'peft.PeftModel.get_base_model peft.PeftModel.disable_adapter'),
    Row('peft.get_peft_model', ('model', 'peft_config'), 'lora', starts=True),
    Row('peft.get_peft_model_state_dict', ('model',), 'lora', starts=True),
    *_rows('linears', ' '.join('peft.tuners.lora.LoraLayer.' + n for n in 'get_base_layer disable_adapters merged active_adapters'.split())),
    Row('peft.tuners.lora.Linear.forward', ('x',), 'linears', starts=True, takes_more=True),
    # bitsandbytes
    Row('bitsandbytes.functional.quantize_4bit', ('A', 'blocksize', 'compress_statistics', 'quant_type'), 'doctor'),
    Row('bitsandbytes.functional.dequantize_4bit', ('A', 'quant_state'), 'lora, doctor', starts=True),
    Row('bitsandbytes.nn.Linear4bit', (), 'evaluation, doctor'),
    Row('bitsandbytes.nn.Params4bit', (), 'model'),
    # torch
    *_rows('fastpath, layers, linears', 'torch.nn.Module._call_impl torch.nn.Module._compiled_call_impl torch.nn.Module.compile'),
    Row('torch.Tensor._version', (), 'generate'),
    *_rows('attention', 'torch.nn.attention.flex_attention.BlockMask.from_kv_blocks torch.nn.attention.flex_attention.flex_attention'),
    *_rows('attention', 'torch.nn.attention.varlen.varlen_attn', ('query', 'key', 'value', 'cu_seq_q', 'cu_seq_k', 'max_q', 'max_k'), starts=True),
    *_rows('attention, linears', 'torch.library.custom_op', ('name',), starts=True),
    *_rows('guards', 'torch.nn.utils.get_total_norm', ('tensors',), starts=True),
    *_rows('memory, offloading', 'torch.autograd.graph.saved_tensors_hooks', ('pack_hook', 'unpack_hook'), starts=True),
    Row('torch.optim.AdamW', ('fused',), 'config'),
    # several ranks
    Row(TRAINER + 'get_train_dataloader', (), 'loop'), Row(TRAINER + 'store_flos', (), 'loop'), Row(TRAINER + '_save_rng_state', ('output_dir',), 'safe_trainer', starts=True),
    Row(TRAINER + '_get_num_items_in_batch', ('batch_samples', 'device'), 'loop', starts=True),
    Row(TRAINER + '_move_model_to_device', ('model', 'device'), 'loop', starts=True),
    Row(TRAINER + '_prepare_for_training', ('max_steps', 'train_dataloader', 'resume_from_checkpoint'), 'loop', starts=True),
    Row('accelerate.data_loader.DataLoaderShard', ('dataset', 'device'), 'loop', starts=True, takes_more=True),
    *_rows('ranks', 'torch.distributed.rendezvous.rendezvous torch.distributed.distributed_c10d._get_default_store torch.distributed.init_process_group torch.distributed.PrefixStore'),
    *_rows('shards', 'torch.distributed.get_world_size torch.distributed.device_mesh.init_device_mesh torch.distributed.tensor.DTensor'),
    Row('torch.distributed.fsdp.fully_shard', ('offload_policy',), 'shards'), Row('torch.distributed.fsdp.CPUOffloadPolicy', ('pin_memory',), 'shards'),
    Row('torch.distributed.fsdp.OffloadPolicy', (), 'shards'),
    Row('torch.from_file', (), 'staging'), Row('torch.utils._python_dispatch.TorchDispatchMode', (), 'staging'),
    Row('transformers.PreTrainedModel.from_pretrained', ('pretrained_model_name_or_path',), 'model', starts=True, takes_more=True),
    Row('torch.distributed.launcher.api.LaunchConfig', (), 'worker'),
    *_rows('worker', 'torch.distributed.launcher.api.elastic_launch torch.distributed.elastic.multiprocessing.DefaultLogsSpecs torch.distributed.elastic.multiprocessing.Std'),
    Row('torch.distributed.elastic.multiprocessing.errors.ChildFailedError', (), 'worker'),
    # the others
    Row('evaluate.Metric._feature_names', (), 'metrics'),
    Row('evaluate.Metric.compute', ('predictions', 'references'), 'metrics', takes_more=True),
    Row('accelerate.Accelerator.unwrap_model', ('model',), 'guards', starts=True),
    Row('huggingface_hub.constants.HF_HUB_OFFLINE', (), 'doctor'),
    Row('huggingface_hub.get_token', (), 'checks, doctor'),
    Row('huggingface_hub.utils.validate_repo_id', ('repo_id',), 'checks', starts=True),
    Row('huggingface_hub.utils.HFValidationError', (), 'checks'),
    Row('transformers.activations.ACT2FN', (), 'sources'),
    Row('transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS', (), 'sources'),
    Row('transformers.PreTrainedTokenizerFast.backend_tokenizer', (), 'tokens, starting'),
]


def find(path):
    "What stands at a dotted path; raises `AttributeError` or `ImportError` if it is not there."
    parts = path.split('.')
    for n in range(len(parts), 0, -1):
        try: found = importlib.import_module('.'.join(parts[:n]))
        except ModuleNotFoundError as e:
            if not (e.name or '').startswith(parts[0]) or n == 1: raise
            continue
        for part in parts[n:]: found = getattr(found, part)
        return found


def change(row, look=find):
    "What is no longer so, in words; empty if all is as expected."
    found = None
    for path in row.path.split('|'):
        try: found = look(path)
        except (AttributeError, ImportError): continue
        break
    else: return f"{' or '.join(row.path.split('|'))} is gone (used in {row.where})"
    if not row.takes and not row.takes_more: return ''
    parameters = inspect.signature(found).parameters
    names = [n for n in parameters if n not in ('self', 'cls')]
    wanted, told = f"({', '.join(row.takes)})", f"it takes ({', '.join(names)}) (used in {row.where})"
    more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    lost = names[:len(row.takes)] != list(row.takes) if row.starts else not (set(row.takes) <= set(names))
    if lost: return f'{path} no longer takes {wanted}{" in this order" if row.starts and set(row.takes) <= set(names) else ""}: {told}'
    return f'{path} no longer takes other keywords: {told}' if row.takes_more and not more else ''


@pytest.mark.parametrize('row', TABLE, ids=lambda row: row.path)
def test_signature(row):
    told = change(row)
    assert not told, told


def test_a_change_is_named():
    "The failing line says what changed, as a person would."
    class Stand:
        def gone_argument(self, model): pass
        def turned(self, trial, model): pass
        def same(self, model, trial, extra=None): pass
        def closed(self, model): pass
    look = lambda path: getattr(Stand, path.split('.')[-1])
    row = lambda name, *takes, **more: Row(f'transformers.Trainer.{name}', takes, 'guards', **more)
    assert change(row('gone_argument', 'model', 'trial'), look) == 'transformers.Trainer.gone_argument no longer takes (model, trial): it takes (model) (used in guards)'
    assert 'no longer takes (model, trial) in this order: it takes (trial, model)' in change(row('turned', 'model', 'trial', starts=True), look)
    assert change(row('turned', 'model', 'trial'), look) == '' == change(row('same', 'model', 'trial', starts=True), look)
    assert 'no longer takes other keywords' in change(row('closed', 'model', takes_more=True), look)
    assert change(row('nowhere'), look) == 'transformers.Trainer.nowhere is gone (used in guards)'


# What only an object shows

@functools.cache
def tuned(use_4bit=True):
    "A two-layer Llama under LoRA, plain or with its linears in four bits."
    import torch
    from llama_nb.config import LoRAConfig
    from llama_nb.lora import add_lora
    from llama_nb.shapes import tiny_llama
    from llama_nb.quantization import import_bitsandbytes
    model = tiny_llama()
    if use_4bit:
        bnb = import_bitsandbytes()
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, linear in list(part.named_children()):
                    if type(linear) is not torch.nn.Linear: continue
                    packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type='nf4', compress_statistics=True)
                    packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type='nf4', compress_statistics=True)
                    setattr(part, name, packed.to('cpu'))
    return add_lora(model, LoRAConfig(r=2))


def llama(): return tuned().get_base_model()
def decoder_layer(): return llama().model.layers[0]
def adapted(): return decoder_layer().self_attn.q_proj
def streamed():
    from datasets import Dataset
    return Dataset.from_list([{'prompt': 'Hi'}]).to_iterable_dataset()


def dynamic_cache():
    import torch
    from transformers.cache_utils import DynamicCache
    cache = DynamicCache(config=llama().config)
    cache.layers[0].update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16))
    return cache


@functools.cache
def trainer():
    "A stock trainer that has never run."
    import tempfile
    from transformers import Trainer, TrainingArguments
    return Trainer(tuned(False), TrainingArguments(tempfile.mkdtemp(), report_to='none', use_cpu=True, disable_tqdm=True), train_dataset=[{'input_ids': [1]}])


def recomputed():
    "A layer that is recomputed in the backward pass."
    from llama_nb.loop import set_checkpointing_
    model = tuned(False)
    set_checkpointing_(model, True)
    return model.get_base_model().model.layers[0]


def scheduler():
    import torch
    return torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.), lambda step: 1.)


OBJECTS = [  # what makes it, what to call it, the attributes we read or set, where
    (lambda: sys, 'sys', '_getframe', '__init__'),
    (trainer, 'a transformers.Trainer', 'args state control callback_handler optimizer lr_scheduler accelerator model data_collator train_dataset eval_dataset model_accepts_loss_kwargs _train_batch_size current_flos _created_lr_scheduler', 'guards, loop'),
    (scheduler, 'a LambdaLR', '_last_lr lr_lambdas base_lrs last_epoch', 'loop'),
    (lambda: trainer().args, 'transformers.TrainingArguments', '_n_gpu n_gpu world_size eval_strategy save_total_limit device per_device_eval_batch_size', 'loop, guards'),
    (lambda: trainer().state, 'transformers.TrainerState', 'global_step max_steps epoch log_history', 'guards, publishing, train'),
    (lambda: trainer().control, 'transformers.TrainerControl', 'should_save should_evaluate should_log should_training_stop', 'guards'),
    (lambda: trainer().callback_handler, "the trainer's callback handler", 'callbacks on_evaluate', 'guards, loop, overrides, train'),
    (lambda: trainer().accelerator, 'accelerate.Accelerator', 'unwrap_model gradient_accumulation_steps', 'loop, guards'),
    (lambda: llama().config, 'transformers.LlamaConfig', '_attn_implementation _name_or_path use_cache max_position_embeddings num_key_value_heads tie_word_embeddings hidden_act', 'attention, evaluation, model'),
    (llama, 'transformers.LlamaForCausalLM', 'model lm_head generation_config', 'fastpath, generate'),
    (lambda: llama().model, 'LlamaModel', 'layers norm rotary_emb', 'memory, layers'),
    (decoder_layer, 'LlamaDecoderLayer', 'self_attn mlp input_layernorm post_attention_layernorm gradient_checkpointing _compiled_call_impl', 'layers, loop'),
    (recomputed, 'a LlamaDecoderLayer that is recomputed', '_gradient_checkpointing_func', 'offloading'),
    (lambda: decoder_layer().self_attn, 'LlamaAttention', 'config head_dim q_proj k_proj v_proj o_proj attention_dropout scaling', 'layers'),
    (lambda: decoder_layer().mlp, 'LlamaMLP', 'config gate_proj up_proj down_proj', 'layers'),
    (lambda: decoder_layer().input_layernorm, 'LlamaRMSNorm', 'weight variance_epsilon', 'layers'),
    (dynamic_cache, 'DynamicCache', 'layers', 'generate'),
    (lambda: dynamic_cache().layers[0], 'DynamicLayer', 'keys values is_initialized', 'generate'),
    (streamed, 'a datasets.IterableDataset', '_formatting with_format', 'files'),
    (tuned, 'peft.PeftModel', 'peft_config active_adapter', 'fastpath, losses'),
    (adapted, "peft's LoRA linear", '_disable_adapters active_adapters merged_adapters disable_adapters merged lora_A lora_B lora_dropout scaling base_layer lora_variant lora_bias fan_in_fan_out r lora_alpha _forward_hooks _forward_pre_hooks', 'inputs, linears, generate'),
    (lambda: adapted().base_layer, 'bitsandbytes.nn.Linear4bit', 'compute_dtype weight in_features', 'linears, doctor'),
    (lambda: adapted().base_layer.weight.quant_state, 'bitsandbytes.functional.QuantState', 'nested absmax shape blocksize quant_type state2 offset', 'linears'),
    (lambda: adapted().base_layer.weight.quant_state.state2, "the QuantState of nested scales", 'absmax code blocksize', 'linears'),
]


@pytest.mark.parametrize('make, what, names, where', OBJECTS, ids=[o[1] for o in OBJECTS])
def test_object(make, what, names, where):
    found = make()
    gone = [name for name in names.split() if not hasattr(found, name)]
    assert not gone, f"{what} has no {', '.join(gone)} any more (used in {where})"


def test_operations():
    "Operations of the dispatcher, with the arguments we give them."
    import torch
    from llama_nb.quantization import import_bitsandbytes
    import_bitsandbytes()
    expected = {'bitsandbytes::dequantize_4bit': ('A', 'absmax', 'blocksize', 'quant_type', 'shape', 'dtype'), 'bitsandbytes::dequantize_blockwise': ('A', 'absmax', 'code', 'blocksize', 'dtype'),
                'aten::_softmax_backward_data': ('grad_output', 'output', 'dim', 'input_dtype'), 'aten::silu_backward': ('grad_output', 'self'),
                'aten::_scaled_mm': ('self', 'mat2', 'scale_a', 'scale_b'), 'aten::_foreach_copy_': ('self', 'src'),
                'aten::_efficient_attention_forward': ('query', 'key', 'value', 'bias', 'cu_seqlens_q', 'cu_seqlens_k', 'max_seqlen_q', 'max_seqlen_k', 'dropout_p', 'custom_mask_type', 'compute_log_sumexp')}
    for name, names in expected.items():
        space, op = name.split('::')
        found = [a.name for a in getattr(getattr(torch.ops, space), op).default._schema.arguments]
        assert tuple(found[:len(names)]) == names, f"torch.ops.{space}.{op} no longer takes ({', '.join(names)}): it takes ({', '.join(found)}) (used in linears, attention, layers, quantization)"


def test_4_bits_come_back_by_the_operation_we_call():
    import torch
    from llama_nb.linears import packed_parts, unpack
    weight = adapted().base_layer.weight
    from bitsandbytes.functional import dequantize_4bit
    again = unpack(*packed_parts(weight), torch.float32)
    assert torch.equal(again, dequantize_4bit(weight.data, weight.quant_state).float()), 'bitsandbytes unpacks a nested 4-bit weight in another way'


def test_a_fused_optimizer_skips_a_step_when_told():
    "`found_inf`, which torch.amp sets on an optimizer: what a NaN must not pass."
    import torch
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1., fused=True)
    weight.grad = torch.ones(3)
    optimizer.found_inf = torch.tensor(1.)
    optimizer.step()
    assert torch.equal(weight.data, torch.ones(3)), 'torch.optim.AdamW(fused=True) no longer looks at found_inf (used in guards)'
    del optimizer.found_inf
    optimizer.step()
    assert not torch.equal(weight.data, torch.ones(3))


def test_the_cache_has_a_name_we_know():
    from llama_nb.generate import _cache_name
    from transformers import LlamaForCausalLM
    names = inspect.signature(LlamaForCausalLM.forward).parameters
    assert _cache_name(LlamaForCausalLM) in names, f'LlamaForCausalLM.forward has another name for its cache: it takes ({", ".join(names)}) (used in generate, layers)'


def test_a_shorter_cache_is_cut_by_a_negative_number():
    cache = dynamic_cache()
    cache.layers[0].crop(-1)
    assert cache.get_seq_length() == 2, f'DynamicLayer.crop(-1) leaves {cache.get_seq_length()} of 3 tokens (used in generate)'


def test_loading_says_what_is_missing(tmp_path):
    from transformers import AutoModelForCausalLM
    from llama_nb.shapes import tiny_llama
    tiny_llama().save_pretrained(tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert 'missing_keys' in info and not info['missing_keys'], f'from_pretrained(output_loading_info=True) tells {sorted(info)} (used in model)'


def test_training_arguments_take_what_we_set(tmp_path):
    "Every field by its name; one that is gone raises a `TypeError` that names it."
    from llama_nb.config import TrainingConfig
    from llama_nb.loop import training_arguments
    made = training_arguments(TrainingConfig(), tmp_path, 10, 1, True, True)
    assert made.save_steps == 2 and str(made.save_strategy).endswith(('steps', 'STEPS'))


# Whether the table is complete

def modules():
    "Our modules by name, as trees."
    return {p.stem: ast.parse(p.read_text(encoding='utf-8')) for p in sorted(PACKAGE.glob('*.py')) if p.stem != '_modidx'}


def known():
    "All names of the table."
    return {row.name for row in TABLE} | {n for path in TABLE for n in (p.split('.')[-1] for p in path.path.split('|'))} | {n for o in OBJECTS for n in o[2].split()}


def foreign_bases(cls):
    "Classes of other packages among the parents."
    return [base for base in cls.__mro__[1:] if base.__module__.split('.')[0] in PACKAGES and base.__module__ != 'torch.autograd.function']


def our_children():
    "Our classes with a parent from another package, whoever makes them."
    from llama_nb import generate, guards, layers, linears, loop, safe_trainer, trackers
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    named = [c for m in (generate, guards, loop, safe_trainer, trackers) for c in vars(m).values() if isinstance(c, type) and c.__module__ == m.__name__ and foreign_bases(c)]
    made = [layers._child(layers.FusedLast, LlamaDecoderLayer), *layers._children().values(), linears._fused_class(type(adapted()).__mro__[2] if isinstance(adapted(), linears.LoRALinear) else type(adapted()))]
    return named + made


def test_every_method_we_override_is_in_the_table():
    "Whatever stands in our class and in a parent of another package; a mixin's methods count where it is mixed in."
    paths = {p for row in TABLE for p in row.path.split('|')}
    children, missing = our_children(), []
    assert {'PackedTrainer', '_Roomy', 'Guard', 'FiniteGuard', 'FusedAttention_LlamaAttention', 'FusedLast_LlamaDecoderLayer'} <= {c.__name__ for c in children}, [c.__name__ for c in children]
    for child in children:
        theirs = foreign_bases(child)
        ours = [base for base in child.__mro__ if base.__module__.startswith('llama_nb')]
        for name in {n for base in ours for n, value in vars(base).items() if inspect.isfunction(value) and not n.startswith('__')}:
            if any(name in vars(base) for base in theirs) and not any(p.endswith(f'.{name}') for p in paths):
                missing.append(f"{theirs[0].__name__}.{name}, overridden by {child.__name__}")
    assert not missing, f'add to TABLE: {sorted(set(missing))}'
    from llama_nb.loop import PackedTrainer
    from transformers import Trainer
    overridden = {n for base in PackedTrainer.__mro__ if base.__module__.startswith('llama_nb') for n in vars(base) if not n.startswith('__') and callable(getattr(Trainer, n, None))}
    assert len(overridden) > 12 and not {n for n in overridden if TRAINER + n not in paths}, overridden


STANDARD = {'_replace', '_asdict', '_fields', '_is_avx512_bf16_supported',  # of named tuples; and one that we ask for with a default
            '_exit', '_is_accelerate_prepared'}  # of os; and a mark whose effect tests/test_ranks.py looks at


def private_names(tree):
    "Attributes with a leading underscore that a module reads, sets or asks for by name, with their lines."
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith('_') and not node.attr.startswith('__'): yield node.attr, node.lineno
        asked = isinstance(node, ast.Call) and getattr(node.func, 'id', '') in ('getattr', 'hasattr', 'setattr', 'delattr') and len(node.args) > 1
        if asked and isinstance(node.args[1], ast.Constant) and str(node.args[1].value).startswith('_') and not str(node.args[1].value).startswith('__'): yield node.args[1].value, node.lineno


def our_names(trees):
    "What our modules define: functions, classes, variables, fields, attributes of `self`, names of copies kept in `__dict__`."
    names = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, 'id', '') == 'self': names.add(node.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'keep_copies_': names.add(node.args[1].value)
    return names


def unknown(trees, names):
    "Private names of other packages that are not in the table."
    ours = our_names(trees)
    return sorted({f'{module}.py:{line}: {name}' for module, tree in trees.items() for name, line in private_names(tree) if name not in ours | names | STANDARD})


def test_every_private_name_we_touch_is_in_the_table():
    schemas = {'_softmax_backward_data', '_scaled_mm', '_efficient_attention_forward', '_foreach_copy_'}  # in `test_operations`
    missing = unknown(modules(), known() | schemas)
    assert not missing, f'private names of other packages; add them to TABLE or OBJECTS: {missing}'
    made_up = {'x': ast.parse("model._new_secret(1); hasattr(model, '_other_secret'); self._mine = 1; y._mine")}
    assert unknown(made_up, set()) == ['x.py:1: _new_secret', 'x.py:1: _other_secret']


def inner_imports(trees):
    "What is imported from below the top of another package: `module.name`."
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.split('.')[0] in PACKAGES:
                for alias in node.names: yield f'{node.module}.{alias.name}', module


OPEN = ('torch.nn.functional', 'torch.utils.data.', 'torch.utils.checkpoint.checkpoint', 'torch.utils.tensorboard', 'huggingface_hub.constants', 'transformers.utils.logging')  # documented


def test_every_inner_module_we_import_is_in_the_table():
    paths = {p for row in TABLE for p in row.path.split('|')}
    inner = {p: m for p, m in inner_imports(modules()) if p.count('.') > 1 and not p.startswith(OPEN)}
    missing = [f'{p} (in {m})' for p, m in inner.items() if not any(q == p or q.startswith(p + '.') for q in paths)]
    assert len(inner) > 5 and not missing, f'add to TABLE: {missing}'
