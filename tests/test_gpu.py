"What holds on a GPU as well; skipped where there is none."
# ruff: noqa: F401, F811  (the fixture `tiny` is imported, and then a parameter)

import gc
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from test_finetune import quiet, rows, settings, tiny
from transformers import AutoModelForCausalLM

from socratic_finetune.config import SocraticError, settings_for
from socratic_finetune.models import choose_device
from socratic_finetune.finetune import add_adapter, encode_rows, finetune, make_trainer
from socratic_finetune.models import load_base
from socratic_finetune.prompting import collate
from socratic_finetune.tutor import Tutor

ROOT = Path(__file__).parents[1]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU here')
needs_bitsandbytes = pytest.mark.skipif(
    not find_spec('bitsandbytes'), reason='bitsandbytes is not installed'
)
pytestmark = [needs_gpu, pytest.mark.xdist_group('gpu')]


def gpu_settings(tiny, **changes):
    "Settings of a small training on the GPU."
    usual = {'device': 'cuda', 'num_train_epochs': 1, 'batch_size': 4}
    return settings(tiny, **{**usual, 'gradient_accumulation_steps': 4, **changes})


def loss_fell(result):
    "Whether the loss fell as far as it does on a CPU on these rows in as many steps."
    losses = [entry['loss'] for entry in result['log'] if 'loss' in entry]
    return losses[-1] < 0.95 * losses[0]


def adapter_has_learned(model):
    "Whether any B differs from its start, zero."
    return any(p.abs().sum() > 0 for name, p in model.named_parameters() if 'lora_B' in name)


def test_gpu_is_chosen_and_trains_in_one_pass_what_a_cpu_does_in_four(tiny, tmp_path):
    device, *_ = choose_device(settings_for('tinyllama'))
    assert device.type == 'cuda'
    lines = []
    training = gpu_settings(
        tiny, device='auto', dtype='auto', num_train_epochs=10, learning_rate=1e-2
    )
    result = finetune(training, rows(40, split=True), tmp_path / 'adapter', report=lines.append)
    assert 'cuda' in lines[0]
    assert lines[1].endswith('judging by two batches of 16 rows')
    assert result['steps'] == 20
    assert result['memory_gb'] > 0
    assert loss_fell(result)

    base = AutoModelForCausalLM.from_pretrained(tiny)
    on_cpu = PeftModel.from_pretrained(base, tmp_path / 'adapter')
    assert on_cpu.device.type == 'cpu'
    assert adapter_has_learned(on_cpu)


def loss_and_gradients(tuned, loss):
    "The loss and the gradients of the trained parameters, on the CPU."
    tuned.zero_grad()
    loss.backward()
    found = {name: p.grad.cpu() for name, p in tuned.named_parameters() if p.requires_grad}
    return {**found, 'loss': loss.detach().cpu()}


def tuned_with_known_adapter(training):
    "A model whose adapter is the same on each device and not zero, its tokenizer, and rows."
    model, tokenizer = load_base(training)
    tuned = add_adapter(model, training)
    for name, p in sorted(tuned.named_parameters()):
        if p.requires_grad:
            generator = torch.Generator().manual_seed(len(name))
            p.data = torch.randn(p.shape, generator=generator).mul(0.02).to(p.device)
    encoded, _ = encode_rows(rows(16), tokenizer, 256)
    return tuned, tokenizer, encoded


def test_gradient_is_that_of_padded_rows_in_32_bits_on_a_cpu(tiny, tmp_path):
    training = gpu_settings(tiny, lora_dropout=0.0)
    tuned, tokenizer, encoded = tuned_with_known_adapter(
        training.model_copy(update={'device': 'cpu'})
    )
    loss = tuned(**collate(encoded, tokenizer.pad_token_id, multiple=256)).loss
    on_cpu = loss_and_gradients(tuned, loss)

    tuned, tokenizer, encoded = tuned_with_known_adapter(training)
    trainer = make_trainer(tuned, tokenizer, encoded, [], training, tmp_path, 'cuda')
    modules = tuned.named_modules()
    kinds = {type(m).__name__ for name, m in modules if name.endswith('lora_A.default')}
    assert kinds == {'LoraA'}
    batch = trainer._prepare_inputs(trainer.data_collator(encoded))
    on_gpu = loss_and_gradients(tuned, trainer.compute_loss(trainer.model, batch))
    for name, gradient in on_cpu.items():
        assert (on_gpu[name] - gradient).norm() < 1e-3 * gradient.norm(), name


def test_float16_is_trained_with_scaled_gradients(tiny, tmp_path):
    training = gpu_settings(tiny, dtype='float16', num_train_epochs=20, learning_rate=1e-2)
    assert loss_fell(finetune(training, rows(32), tmp_path / 'adapter', report=quiet))


@needs_bitsandbytes
def test_a_base_in_4_bits_is_trained_and_asked(tiny, tmp_path):
    training = gpu_settings(
        tiny, dtype='bfloat16', quantize='4bit', num_train_epochs=10, learning_rate=1e-2
    )
    assert loss_fell(finetune(training, rows(32), tmp_path / 'adapter', report=quiet))
    tutor = Tutor.load(training, tmp_path / 'adapter')
    for arm in tutor.arms:
        assert isinstance(tutor.reply('Why?', arm), str)
    assert len(tutor.reply_batch(['Why?', 'What is 3 and 3?'])) == 2


def test_replies_are_those_of_a_cpu_one_by_one_and_together(tiny, tmp_path):
    training = gpu_settings(tiny, num_train_epochs=10, learning_rate=1e-2, max_new_tokens=24)
    finetune(training, rows(32), tmp_path / 'adapter', report=quiet)
    gpu = Tutor.load(training, tmp_path / 'adapter')
    cpu = Tutor.load(training.model_copy(update={'device': 'cpu'}), tmp_path / 'adapter')
    questions = ['Why?', 'What is 3 and 3?', 'What is 4 and 4, and why is it so?']
    for arm in gpu.arms:
        one_by_one = [gpu.reply(question, arm) for question in questions]
        assert one_by_one == gpu.reply_batch(questions, arm)
        assert one_by_one == cpu.reply_batch(questions, arm)
    sampled = gpu.reply('Why?', temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=1)
    assert isinstance(sampled, str)
    int8 = training.model_copy(update={'quantize': '8bit'})
    with pytest.raises(SocraticError, match='is for replies on a CPU'):
        Tutor.load(int8, tmp_path / 'adapter')


def test_a_full_gpu_is_explained(tiny, tmp_path):
    _, total = torch.cuda.mem_get_info()
    training = gpu_settings(tiny, batch_size=64, gradient_accumulation_steps=1)
    gc.collect()  # trainers of earlier tests refer to themselves
    torch.cuda.empty_cache()
    try:
        allowed = torch.cuda.memory_reserved() + 4e6
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        with pytest.raises(SocraticError, match='memory of the GPU is full: halve batch_size'):
            finetune(training, rows(64), tmp_path / 'adapter', report=quiet)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_whole_pipeline_runs_on_a_gpu(tmp_path):
    runs = tmp_path / 'runs'
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    env = {**os.environ, 'SOCRATIC_RUNS': str(runs), 'PYTHONPATH': path, 'HF_HUB_OFFLINE': '1'}
    command = [sys.executable, '-m', 'socratic_finetune.pipeline', 'run', '--run', 'gpu']
    done = subprocess.run(
        [*command, '--set', 'device=cuda'],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    scores = pd.read_csv(runs / 'gpu' / 'eval_scores.csv').groupby('model').socratic.mean()
    assert scores['tuned'] > 0.8 > 0.2 > scores['base']
    assert json.loads((runs / 'gpu' / 'finetune.json').read_text())['memory_gb'] > 0
