"Trainings that are killed, damaged, or run out of room, and go on as if nothing had happened."

import errno
import math
import os
import signal
import subprocess
from importlib import import_module
from pathlib import Path

import processes
import pytest
import torch
from tiny_models import quiet, rows, settings, weights
from transformers import TrainerCallback

from socratic_finetune import checkpoints
from socratic_finetune.checkpoints import (
    checkpoint_step,
    explain_out_of_resources,
    fingerprint,
    latest_checkpoint,
    verify_checkpoint,
    write_checksums,
)
from socratic_finetune.config import SocraticError
from socratic_finetune.finetune import encode_rows, finetune
from socratic_finetune.models import load_base

pytestmark = pytest.mark.xdist_group('finetune')


class BeforeStep(TrainerCallback):
    "Does something before a step."

    def __init__(self, step, action):
        self.step = step
        self.action = action

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


def finish(tiny, folder, undisturbed):
    "Resume, and end as if nothing had happened; returns what was reported."
    lines = []
    finetune(settings(tiny), rows(), folder / 'adapter', folder / 'checkpoints', lines.append)
    assert weights(folder / 'adapter') == undisturbed[0]
    left = [path.name for path in folder.iterdir() if path.name.startswith(('.', 'a', 'c'))]
    assert left == ['adapter'], 'nothing else is left'
    return lines


def train_and_die(tiny, folder, module, name, count):
    "In a process of its own: train, and be killed when a function is called for the nth time."
    parent, _, last = module.rpartition('.')
    is_class = last[:1].isupper()
    owner = getattr(import_module(parent), last) if is_class else import_module(module)
    calls = []
    original = getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    finetune(settings(tiny), rows(), folder / 'adapter', folder / 'checkpoints', quiet)


def kill_when(*args):
    process = processes.server().Process(target=train_and_die, args=args)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


# --- killed -------------------------------------------------------------------------------------

BEFORE_THE_FIRST = ('torch.optim.AdamW', 'step', 2)
BETWEEN_TWO = ('torch.optim.AdamW', 'step', 17)
IN_THE_MIDDLE_OF_ONE = ('torch', 'save', 8)  # of optimizer, scheduler, random state
WITHOUT_CHECKSUMS = ('socratic_finetune.finetune', 'write_checksums', 3)
WHILE_THE_ADAPTER_IS_SAVED = ('peft.PeftModel', 'save_pretrained', 11)
BEFORE_THE_ADAPTER_IS_SAVED = ('socratic_finetune.finetune', 'save_adapter', 1)


@pytest.mark.parametrize(
    'module, name, count',
    [
        BEFORE_THE_FIRST,
        BETWEEN_TWO,
        IN_THE_MIDDLE_OF_ONE,
        WITHOUT_CHECKSUMS,
        WHILE_THE_ADAPTER_IS_SAVED,
        BEFORE_THE_ADAPTER_IS_SAVED,
    ],
)
def test_killed_and_resumed_ends_bit_for_bit_the_same(
    tiny, tmp_path, undisturbed, module, name, count
):
    kill_when(tiny, tmp_path, module, name, count)
    assert not (tmp_path / 'adapter').exists(), 'no half adapter'
    lines = finish(tiny, tmp_path, undisturbed)
    if (module, name, count) != BEFORE_THE_FIRST:
        assert 'going on from checkpoint-' in ' '.join(lines)


def test_a_new_adapter_replaces_the_old_one_or_leaves_it(tiny, tmp_path, undisturbed):
    one_epoch = settings(tiny, num_train_epochs=1)
    finetune(one_epoch, rows(8), tmp_path / 'adapter', report=quiet)
    old = weights(tmp_path / 'adapter')
    kill_when(tiny, tmp_path, *WHILE_THE_ADAPTER_IS_SAVED)
    assert weights(tmp_path / 'adapter') == old
    hidden = [path for path in tmp_path.iterdir() if path.name.startswith('.adapter.')]
    assert hidden, 'the half one has another name'
    finish(tiny, tmp_path, undisturbed)


# --- damaged, or of another training ------------------------------------------------------------


def test_damaged_checkpoints_are_passed_over_and_named(tiny, tmp_path, undisturbed):
    kill_when(tiny, tmp_path, 'torch.optim.AdamW', 'step', 24)
    kept = sorted((tmp_path / 'checkpoints').glob('checkpoint-*'), key=checkpoint_step)
    older, newest = kept[-2:]
    data = bytearray((newest / 'adapter_model.safetensors').read_bytes())
    data[-100] ^= 1  # one bit, which no reader of the format would notice
    (newest / 'adapter_model.safetensors').write_bytes(data)
    lines = finish(tiny, tmp_path, undisturbed)
    assert lines[0] == f'{newest.name} is cut off or damaged, and is passed over'
    assert f'going on from {older.name}' in lines[1]


def test_checksums_are_found_missing_wrong_or_unreadable(tmp_path):
    (tmp_path / 'optimizer.pt').write_bytes(b'moments')
    assert not verify_checkpoint(tmp_path), 'not written to its end'
    write_checksums(tmp_path)
    assert verify_checkpoint(tmp_path)
    (tmp_path / 'checksums.json').write_text('{')
    assert not verify_checkpoint(tmp_path)
    write_checksums(tmp_path)
    (tmp_path / 'optimizer.pt').unlink()
    assert not verify_checkpoint(tmp_path)


def test_checkpoints_of_another_training_are_removed(tmp_path):
    assert latest_checkpoint(None, 'one') is None
    assert latest_checkpoint(tmp_path / 'kept', 'one') is None
    for step in (9, 10):
        folder = tmp_path / 'kept' / f'checkpoint-{step}'
        folder.mkdir()
        (folder / 'optimizer.pt').write_bytes(b'moments')
        write_checksums(folder)
    assert latest_checkpoint(tmp_path / 'kept', 'one').endswith('checkpoint-10')
    assert latest_checkpoint(tmp_path / 'kept', 'two') is None
    assert [path.name for path in (tmp_path / 'kept').iterdir()] == ['fingerprint.txt']


def test_a_fingerprint_depends_on_rows_settings_and_base_alone(tiny):
    model, tokenizer = load_base(settings(tiny))
    encoded, _ = encode_rows(rows(4), tokenizer, 256)
    usual = fingerprint(settings(tiny), encoded, model)
    assert fingerprint(settings(tiny, workers=3, sample_generations=9), encoded, model) == usual
    different = {
        fingerprint(settings(tiny, lora_r=8), encoded, model),
        fingerprint(settings(tiny, seed=1), encoded, model),
        fingerprint(settings(tiny), encoded[:3], model),
    }
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    different.add(fingerprint(settings(tiny), encoded, model))
    assert len(different | {usual}) == 5


# --- NaN, full disk, full GPU -------------------------------------------------------------------


def test_a_nan_loss_stops_training_and_spoils_nothing(tiny, tmp_path, undisturbed):
    def spoil(model):
        lora_b = next(p for name, p in model.named_parameters() if 'lora_B' in name)
        lora_b.data.fill_(math.nan)

    message = r'the loss became nan at step 17: lower learning_rate \(now 0.0002\)'
    kept = tmp_path / 'checkpoints'
    with pytest.raises(SocraticError, match=message):
        finetune(
            settings(tiny),
            rows(),
            tmp_path / 'adapter',
            kept,
            quiet,
            callbacks=[BeforeStep(16, spoil)],
        )
    assert not (tmp_path / 'adapter').exists()
    assert verify_checkpoint(kept / 'checkpoint-15')
    assert 'going on from checkpoint-15' in finish(tiny, tmp_path, undisturbed)[0]


def mount_small_disk(folder):
    command = ['mount', '-t', 'tmpfs', '-o', 'size=20m', 'tmpfs', str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_a_full_disk_is_explained_and_keeps_the_last_checkpoint(tiny, tmp_path, undisturbed):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if os.geteuid() or not mount_small_disk(disk):
        pytest.skip('needs the right to mount a small disk')

    def fill(model):
        with pytest.raises(OSError), open(disk / 'other', 'wb') as file:
            while True:
                file.write(bytes(4096))
                file.flush()

    try:
        with pytest.raises(SocraticError, match='No space left on the disk of .*disk/checkpoints'):
            finetune(
                settings(tiny),
                rows(),
                disk / 'adapter',
                disk / 'checkpoints',
                quiet,
                callbacks=[BeforeStep(10, fill)],
            )
        assert not (disk / 'adapter').exists()
        assert verify_checkpoint(disk / 'checkpoints' / 'checkpoint-9')
        (disk / 'other').unlink()
        assert 'going on from checkpoint-9' in ' '.join(finish(tiny, disk, undisturbed))
    finally:
        subprocess.run(['umount', str(disk)])


@pytest.mark.parametrize(
    'error',
    [
        OSError(errno.ENOSPC, 'No space left on device'),
        RuntimeError('PytorchStreamWriter failed writing file data/3: file write failed'),
    ],
)
def test_a_full_disk_while_the_adapter_is_saved_leaves_no_half_one(
    tiny, tmp_path, monkeypatch, undisturbed, error
):
    original = checkpoints.write_atomic

    def fail(path, content):
        if Path(path).name == 'training.json':
            raise error
        return original(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, 'write_atomic', fail)
        with pytest.raises(SocraticError, match='No space left'):
            finetune(settings(tiny), rows(), tmp_path / 'adapter', tmp_path / 'checkpoints', quiet)
    assert [path.name for path in tmp_path.iterdir()] == ['checkpoints']
    finish(tiny, tmp_path, undisturbed)


@pytest.mark.parametrize(
    'error',
    [
        torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'),
        RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate'),
        RuntimeError('MPS backend out of memory'),
    ],
)
def test_a_full_gpu_is_explained(error):
    message = 'memory of the GPU is full: halve batch_size'
    with pytest.raises(SocraticError, match=message), explain_out_of_resources('runs'):
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match='shapes'), explain_out_of_resources('runs'):
        raise RuntimeError('mat1 and mat2 shapes cannot be multiplied')
