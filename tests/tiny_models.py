"Small models, rows and settings for tests: a model like TinyLlama-Chat, and others of its size."

import json
from functools import cache

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from socratic_finetune.config import data_path, settings_for
from socratic_finetune.finetune import finetune
from socratic_finetune.rows import read_rows

# as in the tokenizer_config.json of TinyLlama-1.1B-Chat-v1.0
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    '{% endfor %}'
)


@cache
def byte_pairs():
    "Vocabulary and merges of a small BPE model, trained on bundled rows."
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.Metaspace()
    bundled, _ = read_rows(data_path('tutor_v1_sft.jsonl'))
    texts = [message['content'] for row in bundled[:300] for message in row['messages']]
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, limit_alphabet=70)
    draft.train_from_iterator(texts, trainer)
    trained = json.loads(draft.to_str())['model']
    return trained['vocab'], [tuple(merge) for merge in trained['merges']]


def llama_tokenizer(folder, kind='LlamaTokenizer'):
    """Save a tokenizer in Llama's manner; returns the size of its vocabulary.

    BPE without a pre-tokenizer, `▁` for a space, bytes where a letter is unknown, `<s>` in front,
    and `</s>` for padding too.
    """
    vocabulary, merges = byte_pairs()
    names = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)), *vocabulary]
    ids = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token='<unk>', fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace('▁', ' '),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(' ', 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single='<s> $A', pair='<s> $A <s> $B', special_tokens=[('<s>', 1)]
    )
    tokenizer.add_special_tokens(['<unk>', '<s>', '</s>'])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / 'tokenizer.json'))
    config = dict(
        tokenizer_class=kind,
        add_bos_token=True,
        add_eos_token=False,
        bos_token='<s>',
        eos_token='</s>',
        unk_token='<unk>',
        pad_token='</s>',
        padding_side='right',
        legacy=False,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        use_default_system_prompt=False,
        chat_template=ZEPHYR,
    )
    (folder / 'tokenizer_config.json').write_text(json.dumps(config), encoding='utf8')
    return len(names)


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "A folder with a model like TinyLlama-Chat: two small layers, random weights in bfloat16."
    folder = tmp_path_factory.mktemp('tinyllama')
    vocab_size = llama_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        rope_theta=10000.0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def undisturbed(tiny, tmp_path_factory):
    "Weights and losses of the usual training when nothing happens to it."
    folder = tmp_path_factory.mktemp('undisturbed')
    out = finetune(settings(tiny), rows(), folder / 'adapter', report=quiet)
    return weights(folder / 'adapter'), losses(out)


def conversation(n):
    question = dict(role='user', content=f'What is {n} and {n}?')
    answer = f'What do {n} fingers and {n} fingers make?'
    return [question, dict(role='assistant', content=answer)]


def rows(n=24, split=False):
    "Training rows on sums; with `split`, every fourth is for validation."
    made = []
    for i in range(n):
        part = 'validation' if split and i % 4 == 0 else 'train'
        made.append(dict(id=f'row-{i}', topic=f'sum {i}', messages=conversation(i), split=part))
    return made


def settings(tiny, **changes):
    "Settings of the usual training: 30 steps in float32 on a CPU."
    usual = dict(
        device='cpu',
        dtype='float32',
        num_train_epochs=5,
        batch_size=4,
        gradient_accumulation_steps=1,
        max_new_tokens=8,
        sample_generations=0,
    )
    return settings_for('tinyllama', base_model=str(tiny), **{**usual, **changes})


def small_checkpoint(folder, config):
    "Save a random model with the pocket tokenizer; returns settings of a training of one step."
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(data_path('pocket', 'base')).save_pretrained(folder)
    return settings_for(
        'pocket',
        base_model=str(folder),
        num_train_epochs=1,
        batch_size=8,
        warmup_ratio=0.0,
        learning_rate=1e-2,
        max_grad_norm=10.0,
        sample_generations=0,
    )


def quiet(line):
    "A report that nobody reads."


def weights(folder):
    return (folder / 'adapter_model.safetensors').read_bytes()


def losses(out):
    return [entry['loss'] for entry in out['log'] if 'loss' in entry]
