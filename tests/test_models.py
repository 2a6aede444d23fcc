"Loading a base model, and what a machine is asked about."

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import settings

from socratic_finetune import models
from socratic_finetune.config import SocraticError, settings_for

pytestmark = pytest.mark.xdist_group('finetune')


# --- device and number format -------------------------------------------------------------------


@pytest.mark.parametrize('bf16, dtype', [(True, torch.bfloat16), (False, torch.float16)])
def test_cuda_takes_bfloat16_where_it_is_native(monkeypatch, bf16, dtype):
    def is_bf16_supported(including_emulation=True):  # a T4 emulates it, slowly
        return bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', is_bf16_supported)
    device, chosen, reason = models.choose_device(settings_for('tinyllama'))
    assert (device.type, chosen) == ('cuda', dtype)
    assert 'bfloat16' in reason + str(chosen)


@pytest.mark.parametrize('new, dtype', [(True, torch.bfloat16), (False, torch.float32)])
def test_apple_takes_what_needs_no_scaling(monkeypatch, new, dtype):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch.backends.mps, 'is_macos_or_newer', lambda major, minor: new)
    assert models.choose_device(settings_for('tinyllama', device='mps'))[1] == dtype


@pytest.mark.parametrize('seconds, dtype', [(1.0, torch.bfloat16), (1.9, torch.float32)])
def test_a_cpu_takes_bfloat16_only_where_it_is_faster(monkeypatch, seconds, dtype):
    times = {torch.float32: 2.0, torch.bfloat16: seconds}
    monkeypatch.setattr(models, '_matmul_seconds', times.__getitem__)
    chosen = models.choose_device(settings_for('tinyllama', device='cpu'))
    assert chosen[1] == dtype and f'{2 / seconds:.1f} times as fast' in chosen[2]


def test_settings_overrule_what_is_found():
    asked = settings_for('tinyllama', device='cpu', dtype='float32')
    assert models.choose_device(asked)[:2] == (torch.device('cpu'), torch.float32)
    if not torch.cuda.is_available():
        with pytest.raises(SocraticError, match="device='cuda' is not on this machine"):
            models.choose_device(settings_for('tinyllama', device='cuda'))


# --- loading ------------------------------------------------------------------------------------


def test_4_bits_are_asked_of_bitsandbytes_on_cuda_alone(tiny, monkeypatch):
    asked = settings(tiny, quantize='4bit')
    cuda = torch.device('cuda')
    with pytest.raises(SocraticError, match='needs a CUDA GPU, and the device here is cpu'):
        models.load_base(asked)
    monkeypatch.setattr(models, 'find_spec', lambda name: None)
    with pytest.raises(SocraticError, match='needs bitsandbytes: pip install'):
        models.quantization_arguments(asked, cuda, torch.float16)
    monkeypatch.setattr(models, 'find_spec', lambda name: SimpleNamespace())
    arguments = models.quantization_arguments(asked, cuda, torch.float16)
    config = arguments['quantization_config']
    assert config.load_in_4bit and config.bnb_4bit_quant_type == 'nf4'
    assert config.bnb_4bit_compute_dtype == torch.float16
    assert arguments['device_map'] == {'': 0}


def test_a_model_keeps_the_name_that_the_settings_gave_it():
    model, tokenizer = models.load_base(settings_for('pocket'))
    assert model.name_or_path == model.config._name_or_path == 'pocket'
    assert not model.training and tokenizer.chat_template


def test_a_folder_that_is_no_causal_model_is_refused(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='llama')))
    with pytest.raises(SocraticError, match='cannot be loaded as a causal language model'):
        models.load_base(settings_for('pocket', base_model=str(tmp_path)))


def test_fast_kernels_can_be_switched_off(tiny):
    ids = torch.tensor([[1, 5, 9, 12, 7]])
    logits = []
    for fast_kernels, attention in ((True, 'grouped'), (False, 'sdpa')):
        model, _ = models.load_base(settings(tiny, fast_kernels=fast_kernels))
        assert model.config._attn_implementation == attention
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.allclose(*logits, atol=1e-4)


# --- processes and memory -----------------------------------------------------------------------


def test_one_process_is_the_main_process_of_one():
    state = models.distributed_state('cpu')
    assert (state.num_processes, state.process_index, state.is_main_process) == (1, 0, True)
    with state.main_process_first():
        state.wait_for_everyone()


def test_peak_memory_grows_with_what_is_held_and_is_this_process_s_own():
    script = (
        'import torch\n'
        'from socratic_finetune.models import peak_memory\n'
        "before = peak_memory('cpu')\n"
        'held = torch.ones(500_000_000, dtype=torch.uint8)\n'
        "print(peak_memory('cpu') - before)\n"
    )
    command = [sys.executable, '-c', script]
    root = Path(models.__file__).parents[1]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert 0.4 < float(finished.stdout) < 0.7
    models.synchronize('cpu')
