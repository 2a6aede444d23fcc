"What holds on a GPU as well; passed over where there is none."
import gc, json, os, subprocess, sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd, pytest, torch
from peft import PeftModel
from test_finetune import quiet, rows, settings, tiny
from transformers import AutoModelForCausalLM

from socratic_finetune import finetune as f
from socratic_finetune.config import SocraticError, choose_device, settings_for
from socratic_finetune.prompting import collate
from socratic_finetune.tutor import Tutor

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU here'), pytest.mark.xdist_group('gpu')]


def on_gpu(tiny, **changes): return settings(tiny, **{**dict(device='cuda', num_train_epochs=1, batch_size=4, gradient_accumulation_steps=4), **changes})


def learned(out):   # so far does a processor's loss fall on these rows in as many steps
    losses = [h['loss'] for h in out['log'] if 'loss' in h]
    return losses[-1] < 0.95*losses[0]


def test_it_is_chosen_and_trains_in_one_pass_what_a_processor_takes_in_four(tiny, tmp_path):
    assert choose_device(settings_for('tinyllama'))[0].type == 'cuda'
    lines, made = [], on_gpu(tiny, device='auto', dtype='auto', num_train_epochs=10, learning_rate=1e-2)
    out = f.finetune(made, rows(40, split=True), tmp_path/'adapter', report=lines.append)
    assert 'cuda' in lines[0] and lines[1].endswith('judging by two batches of 16 rows') and out['steps'] == 20 and out['memory_gb'] > 0
    assert learned(out)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path/'adapter')     # on a processor
    assert plain.device.type == 'cpu' and any(p.abs().sum() > 0 for n, p in plain.named_parameters() if 'lora_B' in n)


def test_gradient_is_that_of_padded_32_bit_numbers_on_a_processor(tiny, tmp_path):
    made, found = on_gpu(tiny, lora_dropout=0.), {}
    for device in ('cpu', 'cuda'):
        model, tok = f.load_base(made.model_copy(update=dict(device=device)))
        torch.manual_seed(0)
        tuned, encoded = f.add_adapter(model, made), f.encode_rows(rows(16), tok, 256)[0]
        for n, p in sorted(tuned.named_parameters()):
            if p.requires_grad: p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))).mul(0.02).to(p.device)
        if device == 'cpu': loss = tuned(**collate(encoded, tok.pad_token_id, multiple=256)).loss
        else:
            trainer = f.make_trainer(tuned, tok, encoded, [], made, tmp_path, device)
            assert {type(m).__name__ for n, m in tuned.named_modules() if n.endswith('lora_A.default')} == {'Down'}   # sped up
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(encoded)))
        tuned.zero_grad()
        loss.backward()
        found[device] = {n: p.grad.cpu() for n, p in tuned.named_parameters() if p.requires_grad} | dict(loss=loss.detach().cpu())
    for n, g in found['cpu'].items(): assert (found['cuda'][n] - g).norm() < 1e-3*g.norm(), n


def test_float16_is_trained_with_scaled_gradients(tiny, tmp_path):
    out = f.finetune(on_gpu(tiny, dtype='float16', num_train_epochs=20, learning_rate=1e-2), rows(32), tmp_path/'adapter', report=quiet)
    assert learned(out)


@pytest.mark.skipif(not find_spec('bitsandbytes'), reason='bitsandbytes is not installed')
def test_a_base_in_4_bits_is_trained_and_asked(tiny, tmp_path):
    made = on_gpu(tiny, dtype='bfloat16', quantize='4bit', num_train_epochs=10, learning_rate=1e-2)
    out = f.finetune(made, rows(32), tmp_path/'adapter', report=quiet)
    assert learned(out)
    tutor = Tutor.load(made, tmp_path/'adapter')
    assert all(isinstance(tutor.reply('Why?', arm), str) for arm in tutor.arms) and len(tutor.reply_batch(['Why?', 'What is 3 and 3?'])) == 2


def test_replies_are_those_of_a_processor_one_by_one_and_together(tiny, tmp_path):
    made, asked = on_gpu(tiny, num_train_epochs=10, learning_rate=1e-2, max_new_tokens=24), ['Why?', 'What is 3 and 3?', 'What is 4 and 4, and why is it so?']
    f.finetune(made, rows(32), tmp_path/'adapter', report=quiet)
    gpu, processor = Tutor.load(made, tmp_path/'adapter'), Tutor.load(made.model_copy(update=dict(device='cpu')), tmp_path/'adapter')
    for arm in gpu.arms:
        assert [gpu.reply(q, arm) for q in asked] == gpu.reply_batch(asked, arm) == processor.reply_batch(asked, arm)
    assert isinstance(gpu.reply('Why?', temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=1), str)
    with pytest.raises(SocraticError, match='is for replies on a CPU'): Tutor.load(made.model_copy(update=dict(quantize='8bit')), tmp_path/'adapter')


def test_a_full_gpu_is_said_in_words(tiny, tmp_path):
    room = torch.cuda.mem_get_info()[1]
    try:
        gc.collect()   # trainers of tests before refer to themselves
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 4e6)/room)
        with pytest.raises(SocraticError, match='memory of the GPU is full: halve batch_size'):
            f.finetune(on_gpu(tiny, batch_size=64, gradient_accumulation_steps=1), rows(64), tmp_path/'adapter', report=quiet)
    finally: torch.cuda.set_per_process_memory_fraction(1.)


def test_the_whole_pipeline_runs_there(tmp_path):
    env = {**os.environ, 'SOCRATIC_RUNS': str(tmp_path/'runs'), 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run([sys.executable, '-m', 'socratic_finetune.pipeline', 'run', '--run', 'gpu', '--set', 'device=cuda'], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = pd.read_csv(tmp_path/'runs'/'gpu'/'eval_scores.csv').groupby('model').socratic.mean()
    assert scores['tuned'] > 0.8 > 0.2 > scores['base']
    assert json.loads((tmp_path/'runs'/'gpu'/'finetune.json').read_text())['memory_gb'] > 0
