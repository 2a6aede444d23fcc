"Small GGUF files for tests, written as llama.cpp's converter writes them; and llama.cpp itself."

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from filelock import FileLock
from tiny_models import llama_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from socratic_finetune.config import data_path

# what is downloaded or converted once for all runs of the tests
HOME = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'socratic_finetune'
CYLLAMA = 'cyllama==0.2.18'

SIZES = dict(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.2,
)
FAMILIES = {  # model type -> what differs from `SIZES`
    'llama': dict(tie_word_embeddings=False),
    'qwen2': dict(tie_word_embeddings=True),
    'qwen3': dict(tie_word_embeddings=True, head_dim=32),
    'gemma2': dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=64),
    # one layer of six attends to all: llama.cpp wants one at least
    'gemma3_text': dict(
        head_dim=32, query_pre_attn_scalar=32, sliding_window=64, num_hidden_layers=6
    ),
}


def byte_level_tokenizer(folder, n_merges=300):
    "Save the pocket model's tokenizer with its first merges alone: large ones take their time."
    tokenizer = AutoTokenizer.from_pretrained(data_path('pocket', 'base'))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state['model']['merges'] = state['model']['merges'][:n_merges]
    merged = {''.join(pair) for pair in state['model']['merges']}
    special = {token['content'] for token in state['added_tokens']}
    by_id = sorted(state['model']['vocab'], key=state['model']['vocab'].get)
    kept = [token for token in by_id if len(token) == 1 or token in merged | special]
    state['model']['vocab'] = {token: i for i, token in enumerate(kept)}
    for token in state['added_tokens']:
        token['id'] = state['model']['vocab'][token['content']]
    tokenizer.save_pretrained(folder)
    (folder / 'tokenizer.json').write_text(json.dumps(state), encoding='utf8')


def make_model(folder, family, kind='gpt2', **changes):
    "Save a model with random weights that bfloat16 holds exactly, with a tokenizer of a kind."
    if kind == 'llama':
        llama_tokenizer(folder)
    else:
        byte_level_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    ids['pad_token_id'] = tokenizer.pad_token_id
    sizes = {**SIZES, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **ids, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith('bias') or 'norm' in name:  # else they are all 0 or 1
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), tokenizer


def _permuted(weight, n_heads):
    "Rows of q or k in the order in which llama.cpp turns pairs of numbers."
    half = weight.shape[0] // n_heads // 2
    return weight.reshape(n_heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _tensors(model, architecture):
    "Names and arrays of a model's weights as the file has them."
    config = model.config
    names = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    mapping = gguf.get_tensor_name_map(names[architecture], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == 'lm_head.weight' and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy().copy()
        if architecture == 'llama' and '.q_proj.' in name:
            array = _permuted(array, config.num_attention_heads)
        if architecture == 'llama' and '.k_proj.' in name:
            array = _permuted(array, config.num_key_value_heads)
        if architecture.startswith('gemma') and 'norm' in name:
            array = array + 1
        stem, _, suffix = name.rpartition('.')
        yield f'{mapping.get_name(stem)}.{suffix}', np.ascontiguousarray(array)


def _add_sizes(writer, config):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = (
        getattr(config, 'head_dim', None) or config.hidden_size // config.num_attention_heads
    )
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if config.model_type == 'llama':
        writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope.get('full_attention', rope)['rope_theta']))
    if config.model_type.startswith('gemma'):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == 'gemma2':
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_tokenizer(writer, folder, kind, pre, is_gemma):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = json.loads((folder / 'tokenizer.json').read_text())['model']
    added = tokenizer.added_tokens_decoder
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    types = [gguf.TokenType.NORMAL] * len(tokens)
    for i, token in enumerate(tokens):
        if i in added:
            types[i] = gguf.TokenType.UNKNOWN if token == '<unk>' else gguf.TokenType.CONTROL
        elif kind == 'llama' and token.startswith('<0x'):
            types[i] = gguf.TokenType.BYTE
    merges = [pair if isinstance(pair, list) else pair.split(' ') for pair in model['merges']]
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == 'llama':  # no merges: a token's score tells how early it is merged
        rank = {''.join(pair): -float(i) for i, pair in enumerate(merges)}
        writer.add_token_scores([rank.get(token, -1e4) for token in tokens])
        writer.add_add_bos_token(True)
        writer.add_add_space_prefix(not is_gemma)
    else:
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([' '.join(pair) for pair in merges])
        writer.add_add_bos_token(False)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def write_gguf(
    path, folder, model, kind='gpt2', pre='gpt-2', tensor_type=None, edit=None, **names
):
    """Write a model and the tokenizer in its folder as a GGUF file.

    `edit` may add to the writer; `names` replaces `architecture`.
    """
    architecture = model.config.model_type.removesuffix('_text')
    writer = gguf.GGUFWriter(path, names.get('architecture', architecture))
    writer.add_type('model')
    writer.add_name('tiny')
    _add_sizes(writer, model.config)
    _add_tokenizer(writer, folder, kind, pre, architecture.startswith('gemma'))
    for name, array in _tensors(model, architecture):
        if tensor_type is not None and array.ndim == 2 and array.shape[1] % 32 == 0:
            array = gguf.quantize(array, tensor_type)
            writer.add_tensor(name, array, raw_dtype=tensor_type)
        else:
            writer.add_tensor(name, array)
    if edit:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA_CPP = """
import json
import sys

from cyllama.llama import llama_cpp as api


def greedy(model, prompt, n):
    params = api.LlamaContextParams()
    params.n_ctx = len(prompt) + n
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = 0  # float32
    params.flash_attn_type = 0
    context = api.LlamaContext(model, params, False)
    sampler = api.LlamaSampler(api.LlamaSamplerChainParams())
    sampler.add_greedy()
    made = []
    batch = api.llama_batch_get_one(prompt, 0)
    for _ in range(n):
        context.decode(batch)
        made.append(sampler.sample(context, -1))
        if model.get_vocab().is_eog(made[-1]):
            break
        batch = api.llama_batch_get_one(made[-1:], len(prompt) + len(made) - 1)
    return made


path, texts, prompts, n = json.loads(sys.argv[1])
model = api.LlamaModel(path, api.LlamaModelParams(), False)
tokenize = model.get_vocab().tokenize
tokens = [tokenize(text, add_special=False, parse_special=True) for text in texts]
print()
print(json.dumps([tokens, [greedy(model, prompt, n) for prompt in prompts]]))
"""


@cache
def pip_install(requirement):
    "The folder of a wheel, downloaded once outside the repository; None where it cannot be had."
    name = f'{requirement.replace("==", "-")}-py{sys.version_info.major}{sys.version_info.minor}'
    target = HOME / 'wheels' / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f'{target}.lock'):  # two workers of pytest may ask at once
        if target.is_dir():
            return target
        command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps']
        command += ['--only-binary', ':all:', '--disable-pip-version-check', '--retries', '1']
        hidden = target.with_name(f'.{name}.{os.getpid()}')
        done = subprocess.run([*command, '--target', hidden, requirement], capture_output=True)
        if done.returncode != 0:
            return None
        os.replace(hidden, target)
    return target


def find_wheel():
    "The folder of llama.cpp's wheel; an empty text if it is installed, None if it is not there."
    return '' if importlib.util.find_spec('cyllama') else pip_install(CYLLAMA)


def llama_cpp(path, texts=(), prompts=(), n=16):
    """What llama.cpp makes of a GGUF file: tokens of texts, greedy tokens after prompts.

    In a process of its own, since it ends the process when it does not like a file. Skips the test
    where there is no llama.cpp.
    """
    site = find_wheel()
    if site is None:
        pytest.skip(f'all else is right, but {CYLLAMA}, which has llama.cpp, cannot be downloaded')
    task = json.dumps([str(path), list(texts), list(prompts), n])
    command = [sys.executable, '-c', LLAMA_CPP, task]
    finished = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors='replace',
        env={**os.environ, 'PYTHONPATH': str(site)},
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(finished.stdout.splitlines()[-1])
