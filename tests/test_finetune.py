"Finetuning on checkpoints that are made here: one as TinyLlama-Chat, small ones of other families, and processes that are killed."
import errno, json, math, multiprocessing, os, random, signal, subprocess, sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from socratic_finetune import finetune as f
from socratic_finetune.config import SocraticError, choose_device, data_path, settings_for
from socratic_finetune.generate import read_rows
from socratic_finetune.prompting import collate, encode, prompt_ids, render, set_chat_format
from socratic_finetune.tutor import Tutor

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group('finetune')
PROCESSES = multiprocessing.get_context('forkserver')   # from one that has imported all, and done nothing: cheap to start, cheap to kill
PROCESSES.set_forkserver_preload(['socratic_finetune.finetune', 'trl.trainer.sft_trainer', 'peft'])

# as in the tokenizer_config.json of TinyLlama-1.1B-Chat-v1.0
ZEPHYR = ("{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
          "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
          "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
          "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")


def llama_tokenizer(folder, kind='LlamaTokenizer'):
    "A tokenizer in Llama's manner: BPE without a pre-tokenizer, `▁` for a space, bytes where a letter is unknown, `<s>` in front, `</s>` for padding too."
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = [m['content'] for r in read_rows(data_path('tutor_v1_sft.jsonl'))[0][:300] for m in r['messages']]
    draft.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=600, show_progress=False, limit_alphabet=70))
    bpe = json.loads(draft.to_str())['model']
    names = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), *bpe['vocab']]
    tok = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [tuple(m) for m in bpe['merges']], unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    tok.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    tok.post_processor = processors.TemplateProcessing(single='<s> $A', pair='<s> $A <s> $B', special_tokens=[('<s>', 1)])
    tok.add_special_tokens(['<unk>', '<s>', '</s>'])
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder/'tokenizer.json'))
    (folder/'tokenizer_config.json').write_text(json.dumps(dict(
        tokenizer_class=kind, add_bos_token=True, add_eos_token=False, bos_token='<s>', eos_token='</s>', unk_token='<unk>', pad_token='</s>', padding_side='right',
        legacy=False, clean_up_tokenization_spaces=False, model_max_length=2048, use_default_system_prompt=False, chat_template=ZEPHYR)), encoding='utf8')
    return len(names)


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "A folder with a model as TinyLlama-Chat: its tokenizer, its architecture with two small layers, random weights in bfloat16."
    folder = tmp_path_factory.mktemp('tinyllama')
    vocab = llama_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, rope_theta=10000., tie_word_embeddings=False)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def rows(n=24, split=False):
    talk = lambda i: [dict(role='user', content=f'What is {i} and {i}?'), dict(role='assistant', content=f'What do {i} fingers and {i} fingers make?')]
    return [dict(id=f'row-{i}', topic=f'sum {i}', messages=talk(i), split='validation' if split and i % 4 == 0 else 'train') for i in range(n)]


def settings(tiny, **changes):
    return settings_for('tinyllama', base_model=str(tiny), **{**dict(device='cpu', dtype='float32', num_train_epochs=5, batch_size=4, gradient_accumulation_steps=1, max_new_tokens=8, sample_generations=0), **changes})


def quiet(_): pass


def weights(folder): return (folder/'adapter_model.safetensors').read_bytes()


# --- right ------------------------------------------------------------------------------------------------------------

def pieces(chat_format, talk):
    "What the format makes of a conversation, said anew: pieces of text, with whether they are to be learned."
    if chat_format == 'base':
        for m in talk:
            yield f"<|{m['role']}|>\n", False
            yield m['content'] + '</s>', m['role'] == 'assistant'
            yield '\n', False
        return
    yield '<s>', False
    system = ''
    for m in talk:
        if m['role'] == 'system': system = f"<<SYS>>\n{m['content']}\n<</SYS>>\n\n"
        elif m['role'] == 'user':
            yield f"[INST] {system}{m['content']} [/INST]", False
            system = ''
        else: yield f" {m['content']} </s>", True


def conversations():
    "Of one to four turns, with and without a system prompt; letters that the tokenizer lacks, line breaks, and spaces at the ends."
    rng = random.Random(0)
    words = ['what', 'pushes', 'the charge', 'π', '“so”', '日本', '👩‍🔬', 'a\nb', '\n\n', '  ', "Ohm's", '[INST]', '<|user|>', '?', 'x²', '- one', 'ß']
    say = lambda: rng.choice(['', ' ', '\n']) + ' '.join(rng.choices(words, k=rng.randint(1, 12))) + rng.choice(['', ' ', '\n'])
    for _ in range(40):
        turns = [dict(role=r, content=say()) for _ in range(rng.randint(1, 4)) for r in ('user', 'assistant')]
        yield ([dict(role='system', content='You are a tutor.')] if rng.random() < 0.5 else []) + turns


@pytest.mark.parametrize('kind', ['LlamaTokenizer', 'PreTrainedTokenizerFast'])
@pytest.mark.parametrize('chat_format', ['base', 'llama2'])
def test_labels_are_the_tutors_tokens_and_no_others(tiny, tmp_path, chat_format, kind):
    folder = tiny
    if kind != 'LlamaTokenizer': llama_tokenizer(folder := tmp_path, kind)
    tok = AutoTokenizer.from_pretrained(folder)
    set_chat_format(tok, chat_format)
    assert tok.pad_token_id == tok.eos_token_id == 2 and tok.bos_token_id == 1
    for talk in conversations():
        parts, turns = list(pieces(chat_format, talk)), sum(m['role'] == 'assistant' for m in talk)
        text = ''.join(p for p, _ in parts)
        assert render(tok, talk) == text
        learned = [on for p, on in parts for _ in p]   # for each character
        row = encode(tok, talk)
        ids, labels = row['input_ids'], row['labels']
        offsets = tok(text, add_special_tokens=False, return_offsets_mapping=True)['offset_mapping']
        offsets = [(0, 0)]*(len(ids) - len(offsets)) + offsets
        covered = [False]*len(text)
        for (a, b), i, l in zip(offsets, ids, labels):
            if l == -100: continue
            assert l == i and all(learned[a:b]), (tok.convert_ids_to_tokens(i), text[a:b])
            covered[a:b] = [True]*(b - a)
        assert covered == learned
        assert ids.count(1) == 1 and ids[0] == 1, 'exactly one BOS, in front'
        assert labels.count(2) == turns, 'each turn teaches how to end'
        p = prompt_ids(tok, talk[:-1])
        assert p == ids[:len(p)] and labels[len(p)] != -100 and p.count(1) == 1


@pytest.mark.parametrize('chat_format', ['base', 'llama2'])
def test_end_of_turn_is_trained_where_padding_is_the_same_token(tiny, chat_format):
    tok = AutoTokenizer.from_pretrained(tiny)
    set_chat_format(tok, chat_format)
    encoded = [encode(tok, r['messages']) for r in rows(3)] + [encode(tok, rows(1)[0]['messages']*3)]
    batch = collate(encoded, tok.pad_token_id)
    assert (batch['labels'] == 2).sum(1).tolist() == [1, 1, 1, 3]
    assert ((batch['input_ids'] == 2) & (batch['attention_mask'] == 0)).any(), 'there is padding, of the same token'
    assert (batch['labels'][batch['attention_mask'] == 0] == -100).all()
    assert batch['attention_mask'].sum(1).tolist() == [len(e['input_ids']) for e in encoded]


@pytest.mark.parametrize('chat_format', ['base', 'llama2'])
def test_no_row_is_cut_to_a_question(tiny, chat_format):
    tok = AutoTokenizer.from_pretrained(tiny)
    set_chat_format(tok, chat_format)
    talk, kept = rows(1)[0]['messages']*2, []
    for limit in range(1, len(encode(tok, talk)['input_ids']) + 1):
        try: row = encode(tok, talk, limit)
        except SocraticError as e: assert f'within {limit} tokens' in str(e)
        else:
            kept.append(limit)
            assert len(row['input_ids']) == limit and any(l != -100 for l in row['labels'])
    assert kept == list(range(kept[0], kept[-1] + 1)) and kept[0] == len(prompt_ids(tok, talk[:1])) + 1


def test_rows_without_a_reply_are_counted_and_named(tiny, tmp_path):
    long, lines = dict(id='the long one', messages=[dict(role='user', content='why '*300), dict(role='assistant', content='What do you see?')]), []
    out = f.finetune(settings(tiny, num_train_epochs=1, max_length=64), [*rows(8), long], tmp_path/'adapter', report=lines.append)
    assert [d['row'] for d in out['dropped']] == ['the long one'] and 'within 64 tokens' in out['dropped'][0]['reason']
    assert '8 rows' in lines[0] and '1 dropped (row the long one)' in lines[0]


@pytest.mark.parametrize('chat_format', ['base', 'llama2'])
def test_from_checkpoint_to_reply(tiny, tmp_path, chat_format):
    made = settings_for('tinyllama', base_model=str(tiny), device='cpu', chat_format=chat_format, num_train_epochs=2, max_new_tokens=8)
    lines = []
    out = f.finetune(made, rows(40, split=True), tmp_path/'adapter', report=lines.append)
    assert out['steps'] == 4 and len([h for h in out['log'] if 'eval_loss' in h]) == 2
    tutor = Tutor.load(made, tmp_path/'adapter')
    assert tutor.arms == ('base', 'tuned') and tutor.prompt('Why?').count(1) == 1
    assert isinstance(tutor.reply('Why?'), str) and len(tutor.reply_batch(['Why?', 'What is 3 and 3?'])) == 2
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path/'adapter')
    tok = AutoTokenizer.from_pretrained(tmp_path/'adapter')
    assert tok.chat_template == tutor.tokenizer.chat_template and tok.pad_token_id == 2
    assert any(p.abs().sum() > 0 for n, p in plain.named_parameters() if 'lora_B' in n)


def test_a_large_model_is_chatted_with_in_8_bits_where_they_are_faster(tiny, monkeypatch):
    from socratic_finetune import tutor as t
    from socratic_finetune.speed import supports_int8
    if not supports_int8(): pytest.skip('this torch has no products with 8-bit weights')
    rounded = lambda tutor: any(type(m).__name__ == 'RoundedLinear' for m in tutor.model.modules())
    made, gain = settings_for('tinyllama', base_model=str(tiny), device='cpu', dtype='bfloat16', max_new_tokens=4), [2.]
    monkeypatch.setattr(t, 'int8_speedup', lambda dtype: gain[0])
    assert not rounded(Tutor.load(made, streaming=True))                                  # a small one has nothing to gain
    monkeypatch.setattr(t, 'SMALL', 0)
    fast = Tutor.load(made, streaming=True)
    assert rounded(fast) and '2.0 times as fast' in fast.note and isinstance(fast.reply('Why?', 'base'), str)
    for whole in (Tutor.load(made), Tutor.load(made.model_copy(update=dict(quantize='none')), streaming=True)): assert not rounded(whole) and whole.note == ''
    gain[0] = 1.1
    assert not rounded(Tutor.load(made, streaming=True))
    assert rounded(Tutor.load(made.model_copy(update=dict(quantize='8bit'))))             # whoever asks for it gets it
    monkeypatch.setattr(t, '_for_replies', lambda *_: '')
    monkeypatch.setattr('socratic_finetune.speed.supports_int8', lambda: False)
    from socratic_finetune.speed import prepack_weights
    with pytest.raises(SocraticError, match='quantize="none"'): prepack_weights(Tutor.load(made).model, 8)


def test_a_step_is_the_same_in_few_passes_and_in_many(tiny, tmp_path):
    told = []
    for tokens in (4096, 40):   # all rows of a step at once, or one or two
        out = f.finetune(settings(tiny, num_train_epochs=2, gradient_accumulation_steps=2, lora_dropout=0., max_tokens_per_microbatch=tokens), rows(24, split=True), tmp_path/str(tokens), report=quiet)
        told.append([h[k] for h in out['log'] for k in ('loss', 'eval_loss') if k in h])
    assert len(told[0]) == 8 and told[1] == pytest.approx(told[0], rel=1e-5)


# --- device and number format -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('bf16, dtype', [(True, torch.bfloat16), (False, torch.float16)])
def test_cuda_takes_bfloat16_or_scales_float16(monkeypatch, tmp_path, bf16, dtype):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: bf16 or including_emulation)   # a T4 emulates it, slowly
    device, found, why = choose_device(settings_for('tinyllama'))
    assert (device.type, found) == ('cuda', dtype) and 'bfloat16' in why + str(found)
    monkeypatch.undo()
    args = f.training_arguments(settings_for('tinyllama'), tmp_path, 'cuda', half=found == torch.float16)
    assert args.fp16 is not bf16 and args.bf16 is False and args.mixed_precision == ('no' if bf16 else 'fp16')
    assert choose_device(settings_for('tinyllama', device='cpu', dtype='float32'))[:2] == (torch.device('cpu'), torch.float32)


@pytest.mark.parametrize('new, dtype', [(True, torch.bfloat16), (False, torch.float32)])
def test_apple_takes_what_needs_no_scaling(monkeypatch, new, dtype):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch.backends.mps, 'is_macos_or_newer', lambda major, minor: new)
    assert choose_device(settings_for('tinyllama', device='mps'))[1] == dtype


def test_float16_without_scaling_is_refused(tiny, tmp_path):
    with pytest.raises(SocraticError, match='scaled gradients, which cpu does not have'):
        f.finetune(settings(tiny, dtype='float16'), rows(8), tmp_path/'adapter', report=quiet)


def a_trainer(tiny, tmp_path, **changes):
    made = settings(tiny, **changes)
    model, tok = f.load_base(made)
    train = f.encode_rows(rows(16), tok, 256)[0]
    return f.make_trainer(f.add_adapter(model, made), tok, train, [], made, tmp_path/'c', 'cpu'), model


def test_adapter_and_optimiser_are_float32_on_a_bfloat16_base(tiny, tmp_path):
    trainer, model = a_trainer(tiny, tmp_path, dtype='bfloat16', num_train_epochs=1)
    trainer.train()
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    state = [v for s in trainer.optimizer.state.values() for k, v in s.items() if k != 'step']
    assert state and {v.dtype for v in state} == {torch.float32}
    assert {v.dtype for v in torch.load(tmp_path/'c'/'checkpoint-4'/'optimizer.pt', weights_only=True)['state'][0].values()} == {torch.float32}


def test_adapter_of_a_4_bit_base_is_float32_too(tiny, tmp_path):
    made = settings(tiny, dtype='bfloat16')
    model, tok = f.load_base(made)
    tuned = f.add_adapter(model, made)
    for m in (model, tuned): m.is_loaded_in_4bit, m.is_quantized = True, False   # what TRL looks at
    f.make_trainer(tuned, tok, f.encode_rows(rows(4), tok, 256)[0], [], made, tmp_path, 'cpu')
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}


def test_4_bits_are_asked_of_bitsandbytes_on_cuda_alone(tiny, monkeypatch):
    made, cuda = settings(tiny, quantize='4bit'), torch.device('cuda')
    with pytest.raises(SocraticError, match='needs a CUDA GPU, and the device here is cpu'): f.load_base(made)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(SocraticError, match='needs bitsandbytes: pip install'): f._loading(made, cuda, torch.float16)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: SimpleNamespace())
    how = f._loading(made, cuda, torch.float16)
    assert how['quantization_config'].load_in_4bit and how['quantization_config'].bnb_4bit_quant_type == 'nf4'
    assert how['quantization_config'].bnb_4bit_compute_dtype == torch.float16 and how['device_map'] == {'': 0}


# --- cut off, damaged, out of room -------------------------------------------------------------------------------------

class At(TrainerCallback):
    "Does something before a step."
    def __init__(self, step, do): self.step, self.do = step, do
    def on_step_begin(self, args, state, control, model=None, **kw):
        if state.global_step == self.step: self.do(model)


@pytest.fixture(scope='session')
def undisturbed(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp('undisturbed')
    out = f.finetune(settings(tiny), rows(), folder/'adapter', report=quiet)
    return weights(folder/'adapter'), [h['loss'] for h in out['log'] if 'loss' in h]


def finish(tiny, tmp_path, undisturbed):
    "Go on, and end as if nothing had happened; returns what was reported."
    lines = []
    f.finetune(settings(tiny), rows(), tmp_path/'adapter', tmp_path/'checkpoints', lines.append)
    assert weights(tmp_path/'adapter') == undisturbed[0]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(('.', 'a', 'c'))) == ['adapter'], 'nothing is left lying about'
    return lines


def train_and_die(tiny, folder, module, name, count):
    "In a process of its own: train, and be killed when a function is called for the nth time."
    head, _, tail = module.rpartition('.')
    where = getattr(import_module(head), tail) if tail[:1].isupper() else import_module(module)
    calls, inner = [], getattr(where, name)
    def counted(*args, **kw):
        calls.append(1)
        if len(calls) == count: os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kw)
    setattr(where, name, counted)
    f.finetune(settings(tiny), rows(), folder/'adapter', folder/'checkpoints', quiet)


def killed(*args):
    process = PROCESSES.Process(target=train_and_die, args=args)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize('module, name, count', [
    ('torch.optim.AdamW', 'step', 2),                       # before the first checkpoint
    ('torch.optim.AdamW', 'step', 17),                      # between two
    ('torch', 'save', 8),                                   # in the middle of one: of optimizer, scheduler, random state
    ('socratic_finetune.finetune', 'write_checksums', 3),              # one is written, and not yet sealed
    ('peft.PeftModel', 'save_pretrained', 11),              # while the adapter is saved in the end
    ('socratic_finetune.finetune', 'save_adapter', 1),      # just before
])
def test_killed_and_resumed_ends_bit_for_bit_the_same(tiny, tmp_path, undisturbed, module, name, count):
    killed(tiny, tmp_path, module, name, count)
    assert not (tmp_path/'adapter').exists(), 'no half adapter'
    lines = finish(tiny, tmp_path, undisturbed)
    assert count == 2 or 'going on from checkpoint-' in ' '.join(lines)


def test_a_new_adapter_replaces_the_old_one_or_leaves_it(tiny, tmp_path, undisturbed):
    old = f.finetune(settings(tiny, num_train_epochs=1), rows(8), tmp_path/'adapter', report=quiet) and weights(tmp_path/'adapter')
    killed(tiny, tmp_path, 'peft.PeftModel', 'save_pretrained', 11)
    assert weights(tmp_path/'adapter') == old and [p for p in tmp_path.iterdir() if p.name.startswith('.adapter.')], 'the half one has another name'
    finish(tiny, tmp_path, undisturbed)


def test_damaged_checkpoints_are_passed_over_and_named(tiny, tmp_path, undisturbed):
    killed(tiny, tmp_path, 'torch.optim.AdamW', 'step', 24)
    *_, older, newest = sorted((tmp_path/'checkpoints').glob('checkpoint-*'), key=lambda p: int(p.name.rpartition('-')[2]))
    data = bytearray((newest/'adapter_model.safetensors').read_bytes())
    data[-100] ^= 1                                         # one bit, which no reader of the format would notice
    (newest/'adapter_model.safetensors').write_bytes(data)
    lines = finish(tiny, tmp_path, undisturbed)
    assert lines[0] == f'{newest.name} is cut off or damaged, and is passed over' and f'going on from {older.name}' in lines[1]


def test_a_loss_that_is_no_number_stops_it_and_spoils_nothing(tiny, tmp_path, undisturbed, monkeypatch):
    inner = f._callbacks
    def spoil(model): next(p for n, p in model.named_parameters() if 'lora_B' in n).data.fill_(math.nan)
    with monkeypatch.context() as m:
        m.setattr(f, '_callbacks', lambda *args: [*inner(*args), At(16, spoil)])
        with pytest.raises(SocraticError, match=r'the loss became nan at step 17: lower learning_rate \(now 0.0002\)'):
            f.finetune(settings(tiny), rows(), tmp_path/'adapter', tmp_path/'checkpoints', quiet)
    assert not (tmp_path/'adapter').exists() and f.verify_checkpoint(tmp_path/'checkpoints'/'checkpoint-15')
    assert 'going on from checkpoint-15' in finish(tiny, tmp_path, undisturbed)[0]


def test_full_disk_says_so_and_keeps_the_last_checkpoint(tiny, tmp_path, undisturbed, monkeypatch):
    disk = tmp_path/'disk'
    disk.mkdir()
    mount = lambda *options: subprocess.run(['mount', '-t', 'tmpfs', '-o', *options, 'tmpfs', str(disk)], capture_output=True).returncode
    if os.geteuid() or mount('size=20m'): pytest.skip('needs the right to mount a small disk')
    try:
        def fill(model):
            with pytest.raises(OSError), open(disk/'other', 'wb') as file:
                while True: file.write(bytes(4096)); file.flush()
        inner = f._callbacks
        with monkeypatch.context() as m:
            m.setattr(f, '_callbacks', lambda *args: [*inner(*args), At(10, fill)])
            with pytest.raises(SocraticError, match='No space left on the disk of .*disk/checkpoints: make room'):
                f.finetune(settings(tiny), rows(), disk/'adapter', disk/'checkpoints', quiet)
        assert not (disk/'adapter').exists() and f.verify_checkpoint(disk/'checkpoints'/'checkpoint-9')
        (disk/'other').unlink()
        assert 'going on from checkpoint-9' in ' '.join(finish(tiny, disk, undisturbed))
    finally: subprocess.run(['umount', str(disk)])


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), RuntimeError('PytorchStreamWriter failed writing file data/3: file write failed')])
def test_a_full_disk_while_the_adapter_is_saved_leaves_no_half_one(tiny, tmp_path, monkeypatch, undisturbed, error):
    inner = f.write_atomic
    def full(path, content):
        if Path(path).name == 'training.json': raise error
        return inner(path, content)
    with monkeypatch.context() as m:
        m.setattr(f, 'write_atomic', full)
        with pytest.raises(SocraticError, match='No space left'): f.finetune(settings(tiny), rows(), tmp_path/'adapter', tmp_path/'checkpoints', quiet)
    assert [p.name for p in tmp_path.iterdir()] == ['checkpoints']
    finish(tiny, tmp_path, undisturbed)


def test_a_full_gpu_is_said_in_words():
    for error in (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate')):
        with pytest.raises(SocraticError, match='memory of the GPU is full: halve batch_size'), f.explain_out_of_resources('runs'): raise error


# --- more than one process ---------------------------------------------------------------------------------------------

def test_two_processes_take_the_steps_of_one(tiny, tmp_path, undisturbed):
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows()), encoding='utf8')
    made = settings(tiny)
    flags = [x for k in ('dtype', 'num_train_epochs', 'batch_size', 'gradient_accumulation_steps', 'max_new_tokens', 'sample_generations') for x in ('--set', f'{k}={getattr(made, k)}')]
    env = {**os.environ, 'SOCRATIC_RUNS': str(tmp_path/'runs'), 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no',
                           '--dynamo_backend', 'no', '--main_process_port', '0', '-m', 'socratic_finetune.pipeline', 'train', '--base_model', str(tiny),
                           '--data_path', str(tmp_path/'rows.jsonl'), '--run', 'two', *flags], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path/'runs'/'two'/'finetune.json').read_text())
    losses = [h['loss'] for h in told['log'] if 'loss' in h]
    assert losses == pytest.approx(undisturbed[1], rel=0.01) and len(losses) == 30
    assert done.stdout.count('trained on 24 rows') == 1 and done.stdout.count('in 2 processes; 24 rows of') == 1 and done.stderr.count('30/30') <= 2
    assert sorted(p.name for p in (tmp_path/'runs'/'two').iterdir()) == ['.lock', 'adapter', 'finetune.json', 'run.json']
    assert json.loads((tmp_path/'runs'/'two'/'run.json').read_text())['stages']['finetune']['memory_gb'] > 0


# --- seen --------------------------------------------------------------------------------------------------------------

def test_estimate_and_memory_are_said(tiny, tmp_path):
    lines = []
    out = f.finetune(settings(tiny), rows(), tmp_path/'adapter', report=lines.append)
    assert lines[1].startswith('about ') and lines[1].endswith('judging by two batches') and ' GB' in lines[1]
    assert 0.1 < out['memory_gb'] < 100
    assert [f.format_duration(s) for s in (12, 600, 36000)] == ['12 s', '10 min', '10.0 h']


def test_estimate_changes_nothing_and_counts_what_is_left(tiny, tmp_path):
    trainer, model = a_trainer(tiny, tmp_path)
    before = {n: p.clone() for n, p in model.named_parameters()}
    train = f.encode_rows(rows(16), trainer.processing_class, 256)[0]
    seconds, memory = f.estimate(trainer, train, [], settings(tiny))
    assert seconds > 0 and memory > 0
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert f.estimate(trainer, train, [], settings(tiny), share=0.)[0] == 0


def test_replies_on_the_way_are_in_the_log_and_change_nothing(tiny, tmp_path, undisturbed):
    asked = settings(tiny, sample_generations=2, num_train_epochs=2)
    out = f.finetune(asked, rows(split=True), tmp_path/'with', report=quiet)
    replies = [h for h in out['log'] if 'reply' in h]
    assert [h['step'] for h in replies] == [0, 5, 10] and all(isinstance(h['reply'], str) for h in replies)
    assert 'What is 0 and 0?' in out['asked'] and 'fingers' not in out['asked']
    f.finetune(settings(tiny, num_train_epochs=2), rows(split=True), tmp_path/'without', report=quiet)
    assert weights(tmp_path/'with') == weights(tmp_path/'without')
    json.dumps(out)


def test_early_stopping_keeps_the_best_adapter(tiny, tmp_path):
    strange = dict(role='assistant', content='zq xj vk '*4)   # what is learned from the others makes these replies less likely
    some = [r if r['split'] == 'train' else r | dict(messages=[r['messages'][0], strange]) for r in rows(split=True)]
    made = settings(tiny, early_stopping_patience=2, learning_rate=3e-2, num_train_epochs=10, warmup_ratio=0.)
    out = f.finetune(made, some, tmp_path/'adapter', report=quiet)
    looks = {h['step']: h['eval_loss'] for h in out['log'] if 'eval_loss' in h}
    assert out['steps'] < 50 and out['best_step'] == min(looks, key=looks.get) and list(looks).index(out['best_step']) == len(looks) - 3
    base, tok = f.load_base(made)
    batch = collate([e for e in f.encode_rows(some, tok, 512)[0] if e['split'] == 'validation'], tok.pad_token_id)
    with torch.no_grad(): loss = PeftModel.from_pretrained(base, tmp_path/'adapter')(**batch).loss.item()
    assert loss == pytest.approx(looks[out['best_step']], rel=1e-3)
    with pytest.raises(SocraticError, match='early_stopping_patience=2 needs validation rows, and these 8 leave none'): f.finetune(made, rows(8), tmp_path/'none', report=quiet)


# --- any causal language model -----------------------------------------------------------------------------------------

SMALL = dict(vocab_size=6144, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0)
FAMILIES = {'llama': {}, 'smollm': dict(tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=1, hidden_size=48), 'mistral': dict(sliding_window=64),
            'qwen2': dict(tie_word_embeddings=True), 'qwen3': {}, 'gemma': {}, 'gemma2': dict(sliding_window=64), 'gemma3_text': dict(sliding_window=64)}


def checkpoint(folder, config):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(data_path('pocket', 'base')).save_pretrained(folder)
    return settings_for('pocket', base_model=str(folder), num_train_epochs=1, batch_size=8, warmup_ratio=0., learning_rate=1e-2, max_grad_norm=10., sample_generations=0)


@pytest.mark.parametrize('family', FAMILIES)
def test_one_step_lowers_the_loss_and_plain_peft_loads_it(tmp_path, family):
    made = checkpoint(tmp_path/'base', AutoConfig.for_model('llama' if family == 'smollm' else family, **{**SMALL, **FAMILIES[family]}))
    out = f.finetune(made, rows(8), tmp_path/'adapter', report=quiet)
    assert out['steps'] == 1
    tok = AutoTokenizer.from_pretrained(tmp_path/'adapter')
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path/'base'), tmp_path/'adapter').eval()
    batch = collate(f.encode_rows(rows(8), tok, 512)[0], tok.pad_token_id)
    with torch.no_grad():
        after = model(**batch).loss.item()
        with model.disable_adapter(): before = model(**batch).loss.item()
    assert out['log'][0]['loss'] == pytest.approx(before, rel=1e-4) and after < before - 1e-3


def test_a_model_with_other_layers_names_them(tmp_path):
    made = checkpoint(tmp_path/'base', AutoConfig.for_model('gpt2', vocab_size=6144, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2))
    with pytest.raises(SocraticError, match=r'has no layer k_proj, o_proj, q_proj, v_proj: its linear layers are c_attn, c_fc, c_proj; set target_modules'):
        f.finetune(made, rows(8), tmp_path/'adapter', report=quiet)
    out = f.finetune(made.model_copy(update=dict(target_modules=('c_attn',))), rows(8), tmp_path/'adapter', report=quiet)
    assert out['steps'] == 1 and PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path/'base'), tmp_path/'adapter')
