"Exports: merged weights, GGUF files that llama.cpp reads, Ollama's template, refusals."

import json
import os
import re
import shutil

import gguf as gguf_package
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_gguf import TEXTS, no_hub, smollm2  # noqa: F401
from tiny_gguf import CYLLAMA, find_wheel, llama_cpp, make_model
from tiny_models import ZEPHYR, llama_tokenizer, quiet
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from socratic_finetune import export
from socratic_finetune.config import SocraticError, data_path, settings_for
from socratic_finetune.gguf import convert_gguf
from socratic_finetune.pipeline import adapter_settings, app
from socratic_finetune.prompting import LLAMA2_TEMPLATE, set_chat_format, to_messages
from socratic_finetune.tutor import Tutor

pytestmark = pytest.mark.xdist_group('gguf')
POCKET = data_path('pocket', 'adapter')
TARGETS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'down_proj']
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def add_adapter(base, folder, tokenizer, scale=0.05, **changes):
    "Save an adapter with random matrices for the model in a folder."
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **changes)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if 'lora_' in name:
            parameter.data.normal_(0, scale)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tutor_of(base, adapter, chat_format='native'):
    "Settings of a tutor in float32, and the tutor."
    plain = dict(device='cpu', dtype='float32', fast_kernels=False, quantize='none')
    chosen = settings_for('pocket', base_model=str(base), chat_format=chat_format, **plain)
    return chosen, Tutor.load(chosen, adapter)


def ask(tutor, n=3):
    "A few conversations with and without a second question, a system prompt, odd letters."
    conversations = export.sample_conversations(tutor.settings, n)
    odd = 'In 2024 it was 3.5 °C, ½ of 7 – naïve  日本 😀?'
    conversations.append(to_messages(odd, tutor.settings.system_prompt))
    return conversations


@pytest.fixture
def wheel(monkeypatch):
    "llama.cpp, installed or downloaded; skips where it is not."
    site = find_wheel()
    if site is None:
        pytest.skip(f'all else is right, but {CYLLAMA}, which has llama.cpp, is not there')
    if site:
        monkeypatch.syspath_prepend(site)
        monkeypatch.setenv('PYTHONPATH', f'{site}{os.pathsep}{os.environ.get("PYTHONPATH", "")}')


# --- merged -------------------------------------------------------------------------------------


@pytest.mark.parametrize('changes', [{}, dict(use_rslora=True), dict(alpha_pattern={'q_proj': 3})])
def test_merged_is_unmerged_rounded_once(changes, tmp_path):
    model, tokenizer = make_model(tmp_path / 'base', 'llama', 'llama')
    adapter = add_adapter(tmp_path / 'base', tmp_path / 'adapter', tokenizer, **changes)
    chosen, tutor = tutor_of(tmp_path / 'base', adapter)
    folder = export.export_tutor(chosen, adapter, tmp_path / 'merged', 'merged', report=quiet)
    merged = load_file(folder / 'model.safetensors')
    stored = load_file(tmp_path / 'base' / 'model.safetensors')
    whole = tutor.copies['tuned'].state_dict()
    assert merged.keys() == stored.keys()
    for name, weight in merged.items():
        assert weight.dtype == stored[name].dtype == torch.bfloat16
        error = (weight.float() - whole[name]).abs()
        assert (error <= whole[name].abs() * 2**-8 + 1e-6).all(), name
        assert torch.equal(weight, stored[name]) == (f'{name[:-7]}'.split('.')[-1] not in TARGETS)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.chat_template == tutor.tokenizer.chat_template
    assert tutor.end_ids == {export.merged_tutor(folder, chosen).tokenizer.eos_token_id}


def test_no_more_than_a_few_rows_are_in_memory():
    weights = export.list_weights(data_path('pocket', 'base'))
    largest = max(weights, key=lambda weight: weight.nbytes)
    pieces = [len(rows) * rows.shape[1] for rows in largest.rows(n_numbers=10_000)]
    assert max(pieces) <= 10_000 and sum(pieces) == largest.nbytes // 2


# --- GGUF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'family, kind', [('llama', 'llama'), ('llama', 'gpt2'), ('qwen3', 'gpt2')]
)
def test_llama_cpp_says_the_same(family, kind, wheel, tmp_path):
    model, tokenizer = make_model(tmp_path / 'base', family, kind)
    adapter = add_adapter(tmp_path / 'base', tmp_path / 'adapter', tokenizer)
    chosen, tutor = tutor_of(tmp_path / 'base', adapter)
    conversations = ask(tutor)
    expected = export.tutor_replies(tutor, conversations, 12)
    file = export.export_tutor(chosen, adapter, tmp_path, 'gguf', 'f16', report=quiet)
    forced = [answer['reply'] for answer in expected]
    chosen_there = export.llama_cpp_replies(file, conversations, forced=forced)
    found = export.agreement(expected, chosen_there)
    assert found['prompts'] == len(conversations)
    assert found['tokens'] > 0.95


def test_a_file_that_was_exported_can_be_a_base(tmp_path, monkeypatch):
    monkeypatch.setenv('SOCRATIC_CACHE', str(tmp_path / 'cache'))
    model, tokenizer = make_model(tmp_path / 'base', 'llama', 'gpt2')
    adapter = add_adapter(tmp_path / 'base', tmp_path / 'adapter', tokenizer)
    chosen, tutor = tutor_of(tmp_path / 'base', adapter)
    file = export.export_tutor(chosen, adapter, tmp_path, 'gguf', 'f16', report=quiet)
    folder = convert_gguf(file, quiet)
    back = load_file(folder / 'model.safetensors')
    for name, weight in tutor.copies['tuned'].state_dict().items():
        if name in back:  # not the tied one
            torch.testing.assert_close(back[name].float(), weight, rtol=2**-7, atol=1e-4)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.chat_template == tutor.tokenizer.chat_template
    assert [loaded(text)['input_ids'] for text in TEXTS] == [
        tutor.tokenizer(text)['input_ids'] for text in TEXTS
    ]


@pytest.mark.parametrize('chat_format', ['native', 'llama2'])
@pytest.mark.parametrize('manner', ['LlamaTokenizer', 'PreTrainedTokenizerFast'])
def test_spaces_and_bos_of_sentencepiece(chat_format, manner, wheel, tmp_path):
    model, _ = make_model(tmp_path / 'base', 'llama', 'llama')
    llama_tokenizer(tmp_path / 'base', manner)
    loader = PreTrainedTokenizerFast if manner == 'PreTrainedTokenizerFast' else AutoTokenizer
    tokenizer = loader.from_pretrained(tmp_path / 'base')
    set_chat_format(tokenizer, chat_format)
    adapter = add_adapter(tmp_path / 'base', tmp_path / 'adapter', tokenizer)
    chosen, tutor = tutor_of(tmp_path / 'base', adapter, chat_format)
    _, behind_special = export.space_manner(tutor.tokenizer)
    assert behind_special == (manner == 'PreTrainedTokenizerFast'), 'both manners are tested'
    file = export.export_tutor(chosen, adapter, tmp_path, 'gguf', report=quiet)
    conversations = [*ask(tutor), [dict(role='user', content=' hello')]]
    answers = export.llama_cpp_replies(file, conversations, 1)
    expected = [tutor.prompt(messages) for messages in conversations[:-1]]
    assert [answer['prompt'] for answer in answers[:-1]] == expected
    assert all(answer['prompt'].count(tokenizer.bos_token_id) == 1 for answer in answers)


@pytest.mark.parametrize('rule', ['qwen2', 'llama-bpe', 'smollm', 'gpt-2'])
def test_words_are_cut_as_the_file_says(rule, wheel, tmp_path):
    model, tokenizer = make_model(tmp_path / 'base', 'llama', 'gpt2')
    state = json.loads((tmp_path / 'base' / 'tokenizer.json').read_text())
    state['pre_tokenizer'] = pre_tokenizer(
        next(k for k, v in export.WORD_RULES.items() if v == rule)
    )
    (tmp_path / 'base' / 'tokenizer.json').write_text(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / 'base')
    assert export.tokenizer_kind(tokenizer) == ('gpt2', rule)
    adapter = add_adapter(tmp_path / 'base', tmp_path / 'adapter', tokenizer)
    chosen, tutor = tutor_of(tmp_path / 'base', adapter)
    file = export.export_tutor(chosen, adapter, tmp_path, 'gguf', report=quiet)
    texts = [*TEXTS, "We'LL see 12345 x\r\n\r\n  y", "don't  stop\n"]
    tokens, _ = llama_cpp(file, texts)
    assert tokens == [tutor.tokenizer(t, add_special_tokens=False)['input_ids'] for t in texts]


def pre_tokenizer(rule):
    "A rule of `WORD_RULES` as `tokenizer.json` has it."
    steps = []
    for step in rule:
        if step in ('words', 'bytes'):
            flags = dict(add_prefix_space=False, trim_offsets=True, use_regex=step == 'words')
            steps.append(dict(type='ByteLevel', **flags))
        elif step == 'digits':
            steps.append(dict(type='Digits', individual_digits=True))
        else:
            pattern = dict(Regex=step)
            steps.append(dict(type='Split', pattern=pattern, behavior='Isolated', invert=False))
    return dict(type='Sequence', pretokenizers=steps)


def test_the_pocket_tutor_speaks_alike(wheel, tmp_path):
    chosen = settings_for('pocket')
    tutor = Tutor.load(chosen, POCKET)
    conversations = ask(tutor, 5)
    expected = export.tutor_replies(tutor, conversations)
    forced = [answer['reply'] for answer in expected]
    for quantization, share in (('f16', 0.99), ('q8_0', 0.9)):
        file = export.export_tutor(chosen, POCKET, tmp_path, 'gguf', quantization, report=quiet)
        found = export.agreement(
            expected, export.llama_cpp_replies(file, conversations, forced=forced)
        )
        assert found['prompts'] == len(conversations) and found['tokens'] >= share
    assert {path.name for path in tmp_path.glob('*.gguf')} == {'tutor-f16.gguf', 'tutor-q8_0.gguf'}


def test_smollm2_speaks_alike(wheel, smollm2, tmp_path):  # noqa: F811
    asked = settings_for('smollm2', device='cpu', dtype='float32')
    base = export.Path(export.resolve_base_model(asked.base_model))
    tokenizer = AutoTokenizer.from_pretrained(base)
    adapter = add_adapter(base, tmp_path / 'adapter', tokenizer, scale=0.01)
    config = json.loads((adapter / 'adapter_config.json').read_text())
    config['base_model_name_or_path'] = asked.base_model
    (adapter / 'adapter_config.json').write_text(json.dumps(config))
    tutor = Tutor.load(asked, adapter)
    conversations = ask(tutor, 1)
    expected = export.tutor_replies(tutor, conversations, 8)
    file = export.export_tutor(asked, adapter, tmp_path, 'gguf', report=quiet)
    forced = [answer['reply'] for answer in expected]
    found = export.agreement(
        expected, export.llama_cpp_replies(file, conversations, forced=forced)
    )
    assert found['prompts'] == len(conversations) and found['tokens'] >= 0.9


def test_the_adapter_alone_is_what_merging_adds(wheel, tmp_path):
    model, tokenizer = make_model(tmp_path / 'base', 'llama', 'gpt2')
    adapter = add_adapter(tmp_path / 'base', tmp_path / 'adapter', tokenizer, use_rslora=True)
    chosen, _ = tutor_of(tmp_path / 'base', adapter)
    files = export.tutor_files(chosen, adapter)
    export.write_gguf(tmp_path / 'base.gguf', files, 'f16', {})
    export.write_gguf(tmp_path / 'tuned.gguf', files, 'f16')
    lora = export.export_tutor(chosen, adapter, tmp_path / 'lora', 'gguf-adapter', report=quiet)
    assert export.llama_cpp_replies(tmp_path / 'base.gguf', [], lora=lora) == []
    base, tuned, added = (
        {tensor.name: torch.tensor(tensor.data).float() for tensor in reader.tensors}
        for reader in map(
            gguf_package.GGUFReader, (tmp_path / 'base.gguf', tmp_path / 'tuned.gguf', lora)
        )
    )
    alpha = gguf_package.GGUFReader(lora).get_field('adapter.lora.alpha').contents()
    names = {name.removesuffix('.lora_a') for name in added if name.endswith('.lora_a')}
    assert len(names) == len(TARGETS) * model.config.num_hidden_layers
    for name in names:
        a, b = added[f'{name}.lora_a'], added[f'{name}.lora_b']
        merged = base[name] + alpha / len(a) * b @ a
        torch.testing.assert_close(merged, tuned[name], rtol=2e-3, atol=2e-3)


# --- Ollama -------------------------------------------------------------------------------------


def go(template, values):
    "What Go makes of a template of ours: `if`, `else`, `range`, `end`, fields and strings."
    pieces = re.split(r'\{\{ (.*?) \}\}', template)
    steps = [(kind, piece) for i, piece in enumerate(pieces) for kind in [('text', 'do')[i % 2]]]

    def block(i, here, shown):
        "Run up to the `end` or `else` of this block; returns the text and where it stopped."
        text = ''
        while i < len(steps):
            kind, piece = steps[i]
            if kind == 'text':
                text += piece
            elif piece == 'end' or piece.startswith('else'):
                return text if shown else '', i
            elif piece.startswith('if '):
                made, i = branches(i, here, shown)
                text += made
            elif piece == 'range .Messages':
                for message in values['Messages']:
                    made, end = block(i + 1, message, shown)
                    text += made
                i = end
            elif piece.startswith('"'):
                text += json.loads(piece)
            else:
                text += here[piece.removeprefix('.')]
            i += 1
        return text, i

    def branches(i, here, shown):
        "Run an `if` with its `else if` and `else`; returns the text and the place of its `end`."
        made = ''
        done = False
        while True:
            condition = re.sub('^(else )?if ', '', steps[i][1])
            if condition == 'else':
                holds = True
            elif equal := re.fullmatch(r'eq \.(\w+) "(\w+)"', condition):
                holds = here[equal[1]] == equal[2]
            else:
                holds = bool(here[condition.removeprefix('.')])
            text, i = block(i + 1, here, shown and holds and not done)
            made += text
            done = done or holds
            if steps[i][1] == 'end':
                return made, i

    return block(0, values, True)[0]


def ollama_says(template, messages):
    "The prompt that Ollama makes of a conversation."
    system = '\n\n'.join(m['content'] for m in messages if m['role'] == 'system')
    turns = [dict(Role=m['role'], Content=m['content']) for m in messages]
    return go(template, dict(System=system, Messages=turns))


@pytest.mark.parametrize('template', ['pocket', CHATML, ZEPHYR, LLAMA2_TEMPLATE])
def test_ollama_s_template_says_what_the_tokenizer_s_says(template):
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    if template != 'pocket':
        tokenizer.chat_template = template
    made = export.ollama_template(tokenizer, tokenizer.chat_template)
    turns = [dict(role=r, content=c) for r, c in (*export.PROBE, *export.FOLLOW_UP)]
    system = dict(role='system', content='Ask, "do not" tell.\nNever.')
    for n in (1, 3, 5):
        for messages in (turns[:n], [system, *turns[:n]]):
            expected = export._apply(tokenizer, tokenizer.chat_template, messages)
            assert ollama_says(made, messages) == expected


def test_a_template_that_go_cannot_say_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(POCKET)
    counting = "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(SocraticError, match='in another way than the first ones'):
        export.ollama_template(tokenizer, counting)
    strict = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}"
    strict += "{% endif %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(SocraticError, match='refuses a system prompt or a turn'):
        export.ollama_template(tokenizer, strict)


@pytest.mark.parametrize('base_gguf', [None, 'base.gguf'])
def test_the_modelfile_names_what_is_there(base_gguf, tmp_path):
    chosen = settings_for('pocket', max_new_tokens=40)
    base = tmp_path / base_gguf if base_gguf else None
    path = export.export_tutor(
        chosen, POCKET, tmp_path / 'o', 'ollama', base_gguf=base, report=quiet
    )
    text = path.read_text()
    named = re.findall(r'^(?:FROM|ADAPTER) \./(.+)$', text, re.M)
    assert {file.name for file in path.parent.iterdir()} == {'Modelfile', *named}
    assert (f'FROM {base}\nADAPTER ./tutor-lora-f16.gguf' in text) == bool(base)
    assert f'SYSTEM """{chosen.system_prompt}"""' in text
    assert 'PARAMETER stop "</s>"\n' in text and 'PARAMETER num_predict 40\n' in text
    with pytest.raises(SocraticError, match='cannot hold three quotes'):
        odd = settings_for('pocket', system_prompt='Say """ often.')
        export.export_tutor(odd, POCKET, tmp_path / 'odd', 'ollama', report=quiet)
    assert not (tmp_path / 'odd').exists()


# --- what is refused, and what is left behind ---------------------------------------------------


def test_refusals_come_before_the_work(tmp_path, monkeypatch):
    model, tokenizer = make_model(tmp_path / 'base', 'gemma2', 'llama')
    adapter = add_adapter(tmp_path / 'base', tmp_path / 'adapter', tokenizer)
    chosen, _ = tutor_of(tmp_path / 'base', adapter)
    with pytest.raises(SocraticError, match=r'its type is gemma2, not one of llama, .*"merged"'):
        export.export_tutor(chosen, adapter, tmp_path / 'out', 'gguf', report=quiet)
    assert export.export_tutor(chosen, adapter, tmp_path / 'm', 'merged', report=quiet).is_dir()
    monkeypatch.setattr(export.shutil, 'disk_usage', lambda place: export.np.recarray)
    monkeypatch.setattr(export.np.recarray, 'free', 1000, raising=False)
    with pytest.raises(SocraticError, match='needs .* MB, and 0 MB are free on its disk'):
        export.export_tutor(chosen, adapter, tmp_path / 'out', 'merged', report=quiet)
    assert not (tmp_path / 'out').exists()


def test_an_adapter_of_another_shape_is_named(tmp_path):
    _, tokenizer = make_model(tmp_path / 'base', 'llama')
    make_model(tmp_path / 'other', 'llama', hidden_size=32)
    adapter = add_adapter(tmp_path / 'base', tmp_path / 'adapter', tokenizer)
    config = (adapter / 'adapter_config.json').read_text()
    (adapter / 'adapter_config.json').write_text(config.replace('/base"', '/other"'))
    chosen = settings_for('pocket', base_model=str(tmp_path / 'other'))
    with pytest.raises(SocraticError, match=r'does not fit .*_proj.weight, 64 by \d+, which is'):
        export.export_tutor(chosen, adapter, tmp_path / 'out', 'merged', report=quiet)


def test_a_killed_export_leaves_the_old_file_and_is_tidied_up(tmp_path, monkeypatch):
    folder = tmp_path / 'export'
    file = export.export_tutor(settings_for('pocket'), POCKET, folder, 'gguf', report=quiet)
    before = file.read_bytes()
    (tmp_path / '.export.killed').mkdir()
    (tmp_path / '.export.killed' / 'half.gguf').write_bytes(b'GGUF')

    def fail(*arguments):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as broken:
        broken.setattr(gguf_package.GGUFWriter, 'write_tensor_data', fail)
        with pytest.raises(SocraticError, match='cannot be written .No space left.* make room'):
            export.export_tutor(settings_for('pocket'), POCKET, folder, 'gguf', report=quiet)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ['export']


def test_llama_cpp_s_own_words_are_passed_on(wheel, tmp_path):
    (tmp_path / 'broken.gguf').write_bytes(b'GGUF of something else')
    with pytest.raises(SocraticError, match='llama.cpp refuses .*broken.gguf'):
        export.llama_cpp_replies(tmp_path / 'broken.gguf', [[dict(role='user', content='Hi')]])


def test_the_command(tmp_path):
    done = CliRunner().invoke(
        app, ['export', '--run', str(tmp_path / 'run'), '--format', 'gguf-adapter']
    )
    assert done.exit_code == 0, done.exception
    assert re.search(r'MB to write, [\d,]+ MB free', done.output)
    assert (tmp_path / 'run' / 'export' / 'gguf-adapter' / 'tutor-lora-f16.gguf').is_file()


def test_an_adapter_goes_along_without_this_machines_paths(tmp_path):
    adapter = tmp_path / 'adapter'
    shutil.copytree(data_path('pocket', 'adapter'), adapter)
    training = json.loads((adapter / 'training.json').read_text())
    training['settings'] |= dict(topics='/x/my_cards', questions='/x/asked.jsonl')
    (adapter / 'training.json').write_text(json.dumps(training))
    export.copy_adapter(adapter, tmp_path / 'copied')
    assert adapter_settings(tmp_path / 'copied').topics == ''  # not a folder that is missing
    assert adapter_settings(tmp_path / 'copied').questions == 'asked.jsonl'
