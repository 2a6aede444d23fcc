"Finetuning on models that are made here: one like TinyLlama-Chat, and some of other families."

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import tiny_models
import torch
from peft import PeftModel
from tiny_models import llama_tokenizer, losses, quiet, rows, settings, small_checkpoint, weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from socratic_finetune import finetune as finetune_module
from socratic_finetune.config import Run, SocraticError, settings_for
from socratic_finetune.finetune import (
    add_adapter,
    auto_batch_size,
    choose_batches,
    encode_rows,
    estimate,
    finetune,
    format_duration,
    make_trainer,
    run_finetune,
    training_arguments,
)
from socratic_finetune.models import load_base
from socratic_finetune.prompting import collate, encode, prompt_ids, render, set_chat_format
from socratic_finetune.tutor import Tutor

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group('finetune')
tiny = tiny_models.tiny  # the tests on a GPU import it from here
chat_formats = pytest.mark.parametrize('chat_format', ['native', 'llama2'])


# --- which tokens have a label ------------------------------------------------------------------


def zephyr_parts(messages):
    for message in messages:
        yield f'<|{message["role"]}|>\n', False
        yield message['content'] + '</s>', message['role'] == 'assistant'
        yield '\n', False


def llama2_parts(messages):
    yield '<s>', False
    system = ''
    for message in messages:
        content = message['content']
        if message['role'] == 'system':
            system = f'<<SYS>>\n{content}\n<</SYS>>\n\n'
        elif message['role'] == 'user':
            yield f'[INST] {system}{content} [/INST]', False
            system = ''
        else:
            yield f' {content} </s>', True


# what each format makes of a conversation, written anew: text, and whether it has a label
PARTS = {'native': zephyr_parts, 'llama2': llama2_parts}
FRAGMENTS = ['what', 'pushes', 'the charge', 'π', '“so”', '日本', '👩‍🔬', 'a\nb', '\n\n', '  ']
FRAGMENTS += ["Ohm's", '[INST]', '<|user|>', '?', 'x²', '- one', 'ß']


def conversations():
    "One to four turns; letters that the tokenizer lacks, line breaks, and spaces at the ends."
    rng = random.Random(0)

    def text():
        words = ' '.join(rng.choices(FRAGMENTS, k=rng.randint(1, 12)))
        return rng.choice(['', ' ', '\n']) + words + rng.choice(['', ' ', '\n'])

    for _ in range(40):
        messages = []
        for _ in range(rng.randint(1, 4)):
            messages.append(dict(role='user', content=text()))
            messages.append(dict(role='assistant', content=text()))
        if rng.random() < 0.5:
            messages.insert(0, dict(role='system', content='You are a tutor.'))
        yield messages


def check_labels(tokenizer, messages, parts):
    "Labels are the tutor's tokens and no others; exactly one BOS, and each turn teaches its end."
    text = ''.join(part for part, _ in parts)
    assert render(tokenizer, messages) == text
    expected = [has_label for part, has_label in parts for _ in part]  # for each character
    row = encode(tokenizer, messages)
    ids = row['input_ids']
    labels = row['labels']
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoding['offset_mapping']
    offsets = [(0, 0)] * (len(ids) - len(offsets)) + offsets
    covered = [False] * len(text)
    for (start, end), token, label in zip(offsets, ids, labels, strict=True):
        if label == -100:
            continue
        assert label == token and all(expected[start:end]), text[start:end]
        covered[start:end] = [True] * (end - start)
    assert covered == expected
    assert ids.count(1) == 1 and ids[0] == 1
    assert labels.count(2) == sum(message['role'] == 'assistant' for message in messages)
    prompt = prompt_ids(tokenizer, messages[:-1])
    assert prompt == ids[: len(prompt)] and labels[len(prompt)] != -100 and prompt.count(1) == 1


@pytest.mark.parametrize('kind', ['LlamaTokenizer', 'PreTrainedTokenizerFast'])
@chat_formats
def test_labels_are_the_tutors_tokens_and_no_others(tiny, tmp_path, chat_format, kind):
    folder = tiny
    if kind != 'LlamaTokenizer':
        folder = tmp_path
        llama_tokenizer(folder, kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_chat_format(tokenizer, chat_format)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2 and tokenizer.bos_token_id == 1
    for messages in conversations():
        check_labels(tokenizer, messages, list(PARTS[chat_format](messages)))


@chat_formats
def test_end_of_turn_is_trained_where_padding_is_the_same_token(tiny, chat_format):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    set_chat_format(tokenizer, chat_format)
    encoded = [encode(tokenizer, row['messages']) for row in rows(3)]
    encoded.append(encode(tokenizer, rows(1)[0]['messages'] * 3))
    batch = collate(encoded, tokenizer.pad_token_id)
    is_padding = batch['attention_mask'] == 0
    assert (batch['labels'] == 2).sum(1).tolist() == [1, 1, 1, 3]
    assert (batch['input_ids'][is_padding] == 2).any()
    assert (batch['labels'][is_padding] == -100).all()
    assert batch['attention_mask'].sum(1).tolist() == [len(row['input_ids']) for row in encoded]


@chat_formats
def test_rows_are_cut_behind_a_whole_reply(tiny, chat_format):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    set_chat_format(tokenizer, chat_format)
    messages = rows(1)[0]['messages'] * 2
    whole = encode(tokenizer, messages)
    first_end = whole['labels'].index(2) + 1  # behind the first end-of-sequence token
    accepted = []
    for limit in range(1, len(whole['input_ids']) + 1):
        try:
            row = encode(tokenizer, messages, limit)
        except SocraticError as error:
            assert f'within {limit} tokens' in str(error)
            continue
        accepted.append(limit)
        length = len(row['input_ids'])
        assert length == (first_end if limit < len(whole['input_ids']) - 1 else length)
        assert row['labels'] == whole['labels'][:length]
        assert row['labels'].count(2) == (2 if length > first_end else 1)
    assert accepted == list(range(first_end, len(whole['input_ids']) + 1))


def test_rows_without_a_reply_are_counted_and_named(tiny, tmp_path):
    long_question = dict(role='user', content='why ' * 300)
    answer = dict(role='assistant', content='What do you see?')
    long_row = dict(id='the long one', messages=[long_question, answer])
    lines = []
    one_epoch = settings(tiny, num_train_epochs=1, max_length=64)
    out = finetune(one_epoch, [*rows(8), long_row], tmp_path / 'adapter', report=lines.append)
    assert [row['row'] for row in out['dropped']] == ['the long one']
    assert 'within 64 tokens' in out['dropped'][0]['reason']
    assert '8 rows' in lines[0] and '1 dropped (row the long one)' in lines[0]


# --- training -----------------------------------------------------------------------------------


def has_learned(model):
    "Whether an adapter has moved from its beginning, where all of B is zero."
    return any(p.abs().sum() > 0 for name, p in model.named_parameters() if 'lora_B' in name)


@chat_formats
def test_from_checkpoint_to_reply(tiny, tmp_path, chat_format):
    made = settings_for(
        'tinyllama',
        base_model=str(tiny),
        device='cpu',
        chat_format=chat_format,
        num_train_epochs=2,
        max_new_tokens=8,
    )
    out = finetune(made, rows(40, split=True), tmp_path / 'adapter', report=quiet)
    assert out['steps'] == 4
    assert len([entry for entry in out['log'] if 'eval_loss' in entry]) == 2
    tutor = Tutor.load(made, tmp_path / 'adapter')
    assert tutor.arms == ('base', 'tuned') and tutor.prompt('Why?').count(1) == 1
    assert isinstance(tutor.reply('Why?'), str)
    assert len(tutor.reply_batch(['Why?', 'What is 3 and 3?'])) == 2
    base = AutoModelForCausalLM.from_pretrained(tiny)
    assert has_learned(PeftModel.from_pretrained(base, tmp_path / 'adapter'))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'adapter')
    assert tokenizer.chat_template == tutor.tokenizer.chat_template
    assert tokenizer.pad_token_id == 2


def all_losses(out):
    return [entry[key] for entry in out['log'] for key in ('loss', 'eval_loss') if key in entry]


def test_a_step_is_the_same_in_few_passes_and_in_many(tiny, tmp_path):
    by_limit = []
    for max_tokens in (4096, 40):  # all rows of a step at once, or one or two
        made = settings(
            tiny,
            num_train_epochs=2,
            gradient_accumulation_steps=2,
            lora_dropout=0.0,
            max_tokens_per_microbatch=max_tokens,
        )
        folder = tmp_path / str(max_tokens)
        out = finetune(made, rows(24, split=True), folder, report=quiet)
        by_limit.append(all_losses(out))
    assert len(by_limit[0]) == 8 and by_limit[1] == pytest.approx(by_limit[0], rel=1e-5)


def test_a_training_without_fast_kernels_has_the_same_loss(tiny, tmp_path):
    results = []
    for fast_kernels in (True, False):
        made = settings(tiny, num_train_epochs=2, lora_dropout=0.0, fast_kernels=fast_kernels)
        folder = tmp_path / str(fast_kernels)
        results.append(all_losses(finetune(made, rows(split=True), folder, report=quiet)))
    assert len(results[0]) == 12 and results[1] == pytest.approx(results[0], rel=1e-5)


def test_without_fast_kernels_the_gradient_of_a_step_is_the_same(tiny, tmp_path):
    steps = {}
    for fast_kernels in (True, False):
        trainer, model, train = small_trainer(
            tiny, tmp_path, fast_kernels=fast_kernels, lora_dropout=0.0
        )
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
        loss = trainer.compute_loss(model, trainer.data_collator(train))
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        steps[fast_kernels] = (loss.item(), torch.cat(gradients))
        ours = [m for m in model.modules() if type(m).__module__.startswith('socratic_finetune')]
        assert bool(ours) == fast_kernels, 'layers are replaced, or none is'
        assert (model.config._attn_implementation == 'grouped') == fast_kernels
        assert (trainer.data_collator.func is collate) != fast_kernels
    assert steps[False][0] == pytest.approx(steps[True][0], rel=1e-5)
    difference = (steps[False][1] - steps[True][1]).norm() / steps[True][1].norm()
    assert difference < 1e-4


def small_trainer(tiny, folder, **changes):
    made = settings(tiny, **changes)
    base, tokenizer = load_base(made)
    train, _ = encode_rows(rows(16), tokenizer, 256)
    model = add_adapter(base, made)
    trainer = make_trainer(model, tokenizer, train, [], made, folder / 'kept', 'cpu')
    return trainer, model, train


def test_without_fast_kernels_batches_are_padded(tiny):
    made = settings(tiny, fast_kernels=False, gradient_accumulation_steps=2)
    base, tokenizer = load_base(made)
    train, _ = encode_rows(rows(16), tokenizer, 256)
    batches, arguments = choose_batches(add_adapter(base, made), tokenizer, train, made)
    assert batches == made and arguments['group_size'] == 8
    assert set(arguments['data_collator'](train[:4])) == {'input_ids', 'labels', 'attention_mask'}


@pytest.mark.parametrize('memory, merged', [(30, (4, 4)), (15, (8, 2)), (8, (8, 2)), (4, (16, 1))])
def test_a_gpu_takes_as_many_batches_at_once_as_fit(monkeypatch, memory, merged):
    monkeypatch.setattr(finetune_module, '_batch_memory', lambda *args: memory)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (40, 80))  # free, of all
    made = settings_for('tinyllama', batch_size=4, gradient_accumulation_steps=4)
    model = SimpleNamespace(device=torch.device('cuda'))
    chosen = auto_batch_size(model, None, [], made)
    assert (chosen.batch_size, chosen.gradient_accumulation_steps) == merged


# --- number formats -----------------------------------------------------------------------------


@pytest.mark.parametrize('fp16', [True, False])
def test_only_float16_is_scaled(tmp_path, fp16):
    args = training_arguments(settings_for('tinyllama'), tmp_path, 'cuda', n_rows=100, fp16=fp16)
    assert args.fp16 is fp16 and args.bf16 is False
    assert args.mixed_precision == ('fp16' if fp16 else 'no')


def test_float16_without_scaling_is_refused(tiny, tmp_path):
    half = settings(tiny, dtype='float16')
    with pytest.raises(SocraticError, match='scaled gradients, which cpu does not have'):
        finetune(half, rows(8), tmp_path / 'adapter', report=quiet)


def test_adapter_and_optimizer_are_float32_on_a_bfloat16_base(tiny, tmp_path):
    trainer, model, _ = small_trainer(tiny, tmp_path, dtype='bfloat16', num_train_epochs=1)
    trainer.train()
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert frozen == {torch.bfloat16} and trained == {torch.float32}
    moments = []
    for state in trainer.optimizer.state.values():
        moments += [value for name, value in state.items() if name != 'step']
    assert moments and {moment.dtype for moment in moments} == {torch.float32}
    saved_file = tmp_path / 'kept' / 'checkpoint-4' / 'optimizer.pt'
    saved = torch.load(saved_file, weights_only=True)
    assert {value.dtype for value in saved['state'][0].values()} == {torch.float32}


def test_adapter_of_a_4_bit_base_is_float32_too(tiny, tmp_path):
    made = settings(tiny, dtype='bfloat16')
    base, tokenizer = load_base(made)
    tuned = add_adapter(base, made)
    for model in (base, tuned):  # what TRL looks at
        model.is_loaded_in_4bit = True
        model.is_quantized = False
    train, _ = encode_rows(rows(4), tokenizer, 256)
    make_trainer(tuned, tokenizer, train, [], made, tmp_path, 'cpu')
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}


# --- more than one process ----------------------------------------------------------------------

LAUNCH = '-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1'
LAUNCH += ' --mixed_precision no --dynamo_backend no --main_process_port 0'


def launch_two(arguments, folder):
    "Run a program in two processes without a GPU; returns what they printed."
    environment = {
        **os.environ,
        'SOCRATIC_RUNS': str(folder / 'runs'),
        'PYTHONPATH': str(ROOT),
        'HF_HUB_OFFLINE': '1',
        'OMP_NUM_THREADS': '1',
        'CUDA_VISIBLE_DEVICES': '',
    }
    finished = subprocess.run(
        [sys.executable, *LAUNCH.split(), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


def test_two_processes_take_the_steps_of_one(tiny, tmp_path, undisturbed):
    data = tmp_path / 'rows.jsonl'
    data.write_text(''.join(json.dumps(row) + '\n' for row in rows()), encoding='utf8')
    flags = []
    for name in (
        'dtype',
        'num_train_epochs',
        'batch_size',
        'gradient_accumulation_steps',
        'max_new_tokens',
        'sample_generations',
    ):
        flags += ['--set', f'{name}={getattr(settings(tiny), name)}']
    command = ['-m', 'socratic_finetune.pipeline', 'train', '--base_model', str(tiny)]
    command += ['--data_path', str(data), '--run', 'two', *flags]
    finished = launch_two(command, tmp_path)
    folder = tmp_path / 'runs' / 'two'
    out = json.loads((folder / 'finetune.json').read_text())
    assert losses(out) == pytest.approx(undisturbed[1], rel=0.01) and len(losses(out)) == 30
    assert finished.stdout.count('trained on 24 rows') == 1
    assert finished.stdout.count('in 2 processes; 24 rows of') == 1
    assert finished.stderr.count('30/30') <= 2
    written = sorted(path.name for path in folder.iterdir())
    assert written == ['.lock', 'adapter', 'finetune.json', 'run.json']
    stages = json.loads((folder / 'run.json').read_text())['stages']
    assert stages['finetune']['memory_gb'] > 0


def fork_two(code, *args, folder):
    "Run a piece of Python in two processes that know of each other as those of a launch do."
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    meeting = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE=2)
    forks = []
    for rank in (0, 1):
        env = processes.environment_without(RANK=rank, LOCAL_RANK=rank, **meeting)
        forks.append(processes.Fork(code, *args, cwd=folder, env=env))
    return [fork.wait() for fork in forks]


STAGE_OF_TWO = """
import sys
from socratic_finetune.config import Run
from socratic_finetune.finetune import run_finetune
from socratic_finetune.models import distributed_state

with distributed_state('cpu').main_process_first():
    run = Run.open('stage')
out = run_finetune(run, data_path=sys.argv[1], max_rows=16)
print('process', distributed_state('cpu').process_index, out['n_rows'], len(out['quarantined']))
"""


def test_a_stage_of_two_processes_is_written_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv('SOCRATIC_RUNS', str(tmp_path / 'runs'))
    Run.open('stage', settings(tiny, num_train_epochs=1))
    data = tmp_path / 'rows.jsonl'
    lines = [json.dumps(row) for row in rows(20)]
    data.write_text('\n'.join([*lines, 'no row']) + '\n', encoding='utf8')
    finished = fork_two(STAGE_OF_TWO, data, folder=tmp_path)
    for number, process in enumerate(finished):
        assert process.returncode == 0, process.stderr[-3000:]
        assert f'process {number} 16 1' in process.stdout
    assert ''.join(process.stdout for process in finished).count('in 2 processes') == 1
    saved = json.loads((tmp_path / 'runs' / 'stage' / 'finetune.json').read_text())
    assert saved['n_rows'] == 16 and saved['quarantined'][0]['line'] == 21
    stages = json.loads((tmp_path / 'runs' / 'stage' / 'run.json').read_text())['stages']
    assert stages['finetune']['status'] == 'done' and stages['finetune']['steps'] == 4


def test_a_stage_reads_the_bundled_rows_where_the_run_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv('SOCRATIC_RUNS', str(tmp_path))
    run = Run.open('alone', settings_for('pocket', sample_generations=0))
    seen = []

    def stand_in(settings, rows, folder, checkpoints, report):
        seen.extend(rows)
        numbers = dict(steps=1, tokens=2, tokens_per_second=3, trainable=4, memory_gb=5.0)
        return dict(numbers, log=[])

    monkeypatch.setattr(finetune_module, 'finetune', stand_in)
    out = run_finetune(run, max_rows=7, report=quiet)
    assert len(seen) == out['n_rows'] == 7 and out['quarantined'] == []
    assert json.loads(run.path('finetune.json').read_text()) == out


# --- estimate, replies on the way, early stopping -----------------------------------------------


def test_estimate_and_memory_are_reported(tiny, tmp_path):
    lines = []
    out = finetune(settings(tiny), rows(), tmp_path / 'adapter', report=lines.append)
    assert lines[1].startswith('about ') and lines[1].endswith('judging by two batches')
    assert ' GB' in lines[1] and 0.1 < out['memory_gb'] < 100
    assert [format_duration(s) for s in (12, 600, 36000)] == ['12 s', '10 min', '10.0 h']


def test_estimate_changes_nothing_and_counts_what_is_left(tiny, tmp_path):
    trainer, model, train = small_trainer(tiny, tmp_path)
    before = {name: p.clone() for name, p in model.named_parameters()}
    seconds, memory = estimate(trainer, train, [], settings(tiny))
    assert seconds > 0 and memory > 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    assert estimate(trainer, train, [], settings(tiny), remaining=0.0)[0] == 0


def test_replies_on_the_way_are_in_the_log_and_change_nothing(tiny, tmp_path):
    with_replies = settings(tiny, sample_generations=2, num_train_epochs=2)
    out = finetune(with_replies, rows(split=True), tmp_path / 'with', report=quiet)
    replies = [entry for entry in out['log'] if 'reply' in entry]
    assert [entry['step'] for entry in replies] == [0, 5, 10]
    assert all(isinstance(entry['reply'], str) for entry in replies)
    assert 'What is 0 and 0?' in out['prompt'] and 'fingers' not in out['prompt']
    without = settings(tiny, num_train_epochs=2)
    finetune(without, rows(split=True), tmp_path / 'without', report=quiet)
    assert weights(tmp_path / 'with') == weights(tmp_path / 'without')
    json.dumps(out)


def rows_that_get_worse():
    "What is learned from the training rows makes the replies of the validation rows less likely."
    strange = dict(role='assistant', content='zq xj vk ' * 4)
    made = []
    for row in rows(split=True):
        if row['split'] == 'validation':
            row['messages'] = [row['messages'][0], strange]
        made.append(row)
    return made


def test_early_stopping_keeps_the_best_adapter(tiny, tmp_path):
    made = settings(
        tiny,
        early_stopping_patience=2,
        learning_rate=3e-2,
        num_train_epochs=10,
        warmup_ratio=0.0,
    )
    out = finetune(made, rows_that_get_worse(), tmp_path / 'adapter', report=quiet)
    evaluations = {e['step']: e['eval_loss'] for e in out['log'] if 'eval_loss' in e}
    best = min(evaluations, key=evaluations.get)
    assert out['steps'] < 50 and out['best_step'] == best
    assert list(evaluations).index(best) == len(evaluations) - 3
    base, tokenizer = load_base(made)
    encoded, _ = encode_rows(rows_that_get_worse(), tokenizer, 512)
    validation = [row for row in encoded if row['split'] == 'validation']
    batch = collate(validation, tokenizer.pad_token_id)
    with torch.no_grad():
        loss = PeftModel.from_pretrained(base, tmp_path / 'adapter')(**batch).loss.item()
    assert loss == pytest.approx(evaluations[best], rel=1e-3)


def test_early_stopping_needs_validation_rows(tiny, tmp_path):
    made = settings(tiny, early_stopping_patience=2)
    message = 'early_stopping_patience=2 needs validation rows, and these 8 leave none'
    with pytest.raises(SocraticError, match=message):
        finetune(made, rows(8), tmp_path / 'none', report=quiet)


# --- any causal language model ------------------------------------------------------------------

SMALL = dict(
    vocab_size=6144,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
SMOLLM = dict(
    tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=1, hidden_size=48
)
FAMILIES = {
    'llama': ('llama', {}),
    'smollm': ('llama', SMOLLM),
    'mistral': ('mistral', dict(sliding_window=64)),
    'qwen2': ('qwen2', dict(tie_word_embeddings=True)),
    'qwen3': ('qwen3', {}),
    'gemma': ('gemma', {}),
    'gemma2': ('gemma2', dict(sliding_window=64)),
    'gemma3': ('gemma3_text', dict(sliding_window=64)),
}


@pytest.mark.parametrize('family', FAMILIES)
def test_one_step_lowers_the_loss_and_plain_peft_loads_it(tmp_path, family):
    model_type, changes = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**SMALL, **changes})
    made = small_checkpoint(tmp_path / 'base', config)
    out = finetune(made, rows(8), tmp_path / 'adapter', report=quiet)
    assert out['steps'] == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'adapter')
    base = AutoModelForCausalLM.from_pretrained(tmp_path / 'base')
    model = PeftModel.from_pretrained(base, tmp_path / 'adapter').eval()
    encoded, _ = encode_rows(rows(8), tokenizer, 512)
    batch = collate(encoded, tokenizer.pad_token_id)
    with torch.no_grad():
        after = model(**batch).loss.item()
        with model.disable_adapter():
            before = model(**batch).loss.item()
    assert out['log'][0]['loss'] == pytest.approx(before, rel=1e-4) and after < before - 1e-3


def test_a_model_with_other_layers_names_them(tmp_path):
    config = AutoConfig.for_model(
        'gpt2',
        vocab_size=6144,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    made = small_checkpoint(tmp_path / 'base', config)
    message = (
        'has no layer k_proj, o_proj, q_proj, v_proj: '
        'its linear layers are c_attn, c_fc, c_proj; set target_modules'
    )
    with pytest.raises(SocraticError, match=message):
        finetune(made, rows(8), tmp_path / 'adapter', report=quiet)
    fitting = made.model_copy(update=dict(target_modules=('c_attn',)))
    assert finetune(fitting, rows(8), tmp_path / 'adapter', report=quiet)['steps'] == 1
    base = AutoModelForCausalLM.from_pretrained(tmp_path / 'base')
    assert has_learned(PeftModel.from_pretrained(base, tmp_path / 'adapter'))
