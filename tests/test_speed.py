"Faster layers compute what the plain ones compute."

import copy
import subprocess
import sys

import psutil
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicLayer

from socratic_finetune import speed
from socratic_finetune.config import SocraticError
from socratic_finetune.speed import GrowingLayer, ThreadGovernor, growing_cache, threads_beside

SHAPE = {
    'vocab_size': 100,
    'hidden_size': 64,
    'intermediate_size': 96,
    'num_hidden_layers': 2,
    'num_attention_heads': 8,
    'num_key_value_heads': 2,
}
IDS = torch.arange(36).reshape(3, 12)
MASK = torch.tensor([[1] * 12, [1] * 8 + [0] * 4, [1] * 3 + [0] * 9])


def tiny_llama(**changes):
    "A Llama with random weights that are the same each time."
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).eval()


def with_adapter(dropout=0.0, model=None):
    "A model with an adapter whose B is not zero."
    torch.manual_seed(1)
    names = ['q_proj', 'o_proj']
    config = LoraConfig(r=4, lora_dropout=dropout, target_modules=names, task_type='CAUSAL_LM')
    tuned = get_peft_model(model or tiny_llama(), config)
    for name, weight in tuned.named_parameters():
        if 'lora_B' in name:
            nn.init.normal_(weight, std=0.1)
    return tuned.train()


def sample_rows():
    "Three rows of 9, 16 and 12 tokens with six in common; the first label is the seventh token."
    rows = []
    for row, new_tokens in enumerate((5, 12, 8)):
        new = list(range(20, 20 + new_tokens))
        labels = [-100] * (6 + row) + new[2 + row :]
        rows.append({'input_ids': [1, 7, 8, 9, *new], 'labels': labels})
    return rows


def pad(rows, length=16):
    "Rows as a padded batch."
    ids = [row['input_ids'] + [0] * (length - len(row['input_ids'])) for row in rows]
    labels = [row['labels'] + [-100] * (length - len(row['labels'])) for row in rows]
    ids = torch.tensor(ids)
    labels = torch.tensor(labels)
    return {'input_ids': ids, 'labels': labels, 'attention_mask': (ids > 0).long()}


def loss_of(model, batch):
    "Mean cross-entropy of the labels."
    inputs = {key: value for key, value in batch.items() if key != 'labels'}
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, batch['labels'][:, 1:].flatten())


def assert_close(a, b, atol):
    torch.testing.assert_close(a, b, atol=atol, rtol=0, check_dtype=False)


def assert_same_gradients(a, b, atol=1e-6):
    "The trained parameters of two models have the same names and gradients."
    for (name, p), (other_name, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other_name
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert_close(p.grad, q.grad, atol)


# --- time and FLOPs ---


def test_best_seconds_calls_as_often_as_asked():
    calls = []
    assert speed.best_seconds(lambda: calls.append(1), 3) >= 0
    assert len(calls) == 3


def test_flops_of_trained_frozen_and_adapted_matrices():
    model = tiny_llama(tie_word_embeddings=False)
    forward = speed.count_flops(model, 10, training=False)
    full = speed.count_flops(model, 10)
    frozen = speed.count_flops(model.requires_grad_(False), 10)
    assert full['matrices'] == 3 * forward['matrices']
    assert frozen['matrices'] == 2 * forward['matrices']
    assert forward['logits'] == 2 * 100 * 64
    adapted = speed.count_flops(with_adapter(), 10)
    n_adapter = sum(p.numel() for p in with_adapter().parameters() if p.requires_grad)
    assert adapted['adapters'] == 3 * 2 * n_adapter
    assert adapted['matrices'] == frozen['matrices']


# --- attention ---


def test_grouped_attention_equals_torch():
    reference = tiny_llama()
    grouped = tiny_llama()
    assert speed.use_grouped_attention(grouped)
    assert speed.use_grouped_attention(grouped)  # twice is as good as once
    labels = IDS.masked_fill(MASK == 0, -100)
    outputs = [m(IDS, attention_mask=MASK, labels=labels) for m in (reference, grouped)]
    for output in outputs:
        output.loss.backward()
    assert_close(outputs[0].logits[MASK > 0], outputs[1].logits[MASK > 0], 1e-5)
    assert_same_gradients(reference, grouped)
    left = MASK.flip(1)  # padding at the left, as in a batch of replies
    logits = [m(IDS, attention_mask=left).logits[left > 0] for m in (reference, grouped)]
    assert_close(*logits, 1e-5)


def test_grouped_attention_generates_the_same_tokens():
    grouped = tiny_llama()
    speed.use_grouped_attention(grouped)
    replies = []
    for model in (tiny_llama(), grouped):
        replies.append(model.generate(IDS[:1], max_new_tokens=10, do_sample=False, pad_token_id=0))
    assert torch.equal(*replies)


def test_long_rows_take_torchs_kernel(monkeypatch):
    grouped = tiny_llama()
    speed.use_grouped_attention(grouped)
    before = grouped(IDS).logits
    called = []
    kernel = speed.sdpa_attention_forward

    def record(*args, **options):
        called.append(1)
        return kernel(*args, **options)

    monkeypatch.setattr(speed, 'sdpa_attention_forward', record)
    assert_close(grouped(IDS).logits, before, 1e-5)
    assert not called
    monkeypatch.setattr(speed, 'MAX_SCORES', 10)
    assert_close(grouped(IDS).logits, before, 1e-5)
    assert len(called) == SHAPE['num_hidden_layers']


def test_a_model_with_another_kernel_is_left_alone():
    eager = tiny_llama()
    eager.set_attn_implementation('eager')
    assert not speed.use_grouped_attention(eager)
    assert not speed.supports_packing(eager)


# --- packing ---


def test_packed_loss_and_gradients_equal_padded_ones():
    reference = tiny_llama()
    grouped = tiny_llama()
    speed.use_grouped_attention(grouped)
    pack = speed.pack_rows(sample_rows())
    assert pack['packed_lengths'] == [5, 4, 11, 7]
    padded = loss_of(reference, pad(sample_rows()))
    packed = loss_of(grouped, pack)
    assert_close(padded, packed, 1e-5)
    padded.backward()
    packed.backward()
    assert_same_gradients(reference, grouped)


def test_packing_keeps_a_sliding_window():
    shape = {**SHAPE, 'num_attention_heads': 4, 'sliding_window': 3}
    windowed = MistralForCausalLM(MistralConfig(**shape)).eval()
    plain = copy.deepcopy(windowed)
    assert speed.use_grouped_attention(windowed)
    assert speed.supports_packing(windowed)
    padded = loss_of(plain, pad(sample_rows()))
    assert_close(padded, loss_of(windowed, speed.pack_rows(sample_rows())), 1e-5)


def test_packing_is_tried_and_not_assumed():
    grouped = tiny_llama()
    assert not speed.supports_packing(grouped)
    speed.use_grouped_attention(grouped)
    assert speed.supports_packing(grouped)
    assert speed.supports_packing(with_adapter(model=grouped))
    qwen = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)).eval()
    speed.use_grouped_attention(qwen)
    assert speed.supports_packing(qwen)


def test_prefix_that_rows_share():
    assert speed.pack_rows(sample_rows()[:1])['packed_lengths'] == [0, 9]
    row = {'input_ids': [1, 2, 3], 'labels': [-100, 2, 3]}  # its first token predicts a label
    assert speed.pack_rows([row, row])['packed_lengths'] == [0, 3, 3]


def test_microbatches_hold_all_rows():
    rows = sample_rows()
    packs = speed.pack_microbatches(rows, 20)['packs']  # 37 tokens in two
    assert [pack['packed_lengths'] for pack in packs] == [[0, 16], [5, 7, 4]]
    one = speed.pack_microbatches(rows, 99)
    assert torch.equal(one['labels'], speed.pack_rows(rows)['labels'])
    assert len(speed.pack_microbatches(rows, float('inf'))['packs']) == 1


# --- LoRA layers and dropout ---


def test_adapters_are_the_same_by_name_file_and_gradient():
    plain = with_adapter()
    fast = speed.speed_up_adapters(speed.speed_up_adapters(with_adapter()))
    for model in (plain, fast):
        model(IDS, labels=IDS).loss.backward()
    assert_same_gradients(plain, fast)
    assert list(get_peft_model_state_dict(plain)) == list(get_peft_model_state_dict(fast))
    with pytest.raises(SocraticError, match='no LoRA layer'):
        speed.speed_up_adapters(tiny_llama())


def test_an_adapter_can_still_be_switched_off_and_merged():
    fast = speed.speed_up_adapters(with_adapter()).eval()
    with torch.no_grad():
        tuned = fast(IDS).logits
        with fast.disable_adapter():
            assert_close(fast(IDS).logits, tiny_llama()(IDS).logits, 1e-6)
        assert_close(fast.merge_and_unload()(IDS).logits, tuned, 1e-5)


def test_adapter_of_a_bf16_base_stays_in_32_bits():
    half = speed.speed_up_adapters(with_adapter(0.05, tiny_llama().bfloat16()))
    half(IDS, labels=IDS).loss.backward()
    trained = [p for p in half.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.grad.dtype for p in trained} == {torch.float32}
    assert all(p.grad.abs().sum() > 0 for p in trained)


def test_dropout_indices_are_independent_and_evenly_spread():
    n = 1_000_000
    indices = speed.dropout_mask_indices(n, 0.05, seed=3)
    assert len(indices) / n == pytest.approx(0.05, abs=1e-3)
    assert torch.equal(indices, speed.dropout_mask_indices(n, 0.05, seed=3))
    assert len(indices.unique()) == len(indices)
    assert indices[0] >= 0
    assert indices[-1] < n
    tenths = torch.bincount(indices * 10 // n)
    assert (tenths / len(indices) - 0.1).abs().max() < 5e-3
    for k in (1, 2, 10, 40):
        longer = (indices.diff() > k).float().mean().item()
        assert longer == pytest.approx(0.95**k, abs=5e-3)


def test_dropout_drops_the_same_inputs_forward_and_backward():
    torch.manual_seed(0)
    x = torch.randn(200, 64, requires_grad=True)
    weight = nn.Parameter(torch.randn(4, 64))
    torch.manual_seed(0)
    out = speed.DropoutLinear.apply(x, weight, 0.3)
    torch.manual_seed(0)
    seed = int(torch.randint(2**62, ()))
    dropped = torch.zeros(x.numel(), dtype=torch.bool)
    dropped[speed.dropout_mask_indices(x.numel(), 0.3, seed)] = True
    expected = (x.masked_fill(dropped.view(x.shape), 0) / 0.7) @ weight.T
    assert_close(out, expected, 1e-5)
    gradients = []
    for result in (out, expected):
        gradients.append(torch.autograd.grad(result.square().mean(), (x, weight)))
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, 1e-5)


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.randn(200, 64)
    weight = torch.randn(4, 64)
    draws = [speed.DropoutLinear.apply(x, weight, 0.3) for _ in range(2000)]
    assert (torch.stack(draws).mean(0) - x @ weight.T).abs().mean() < 0.15


# --- MLP, norm and loss in chunks ---


def test_chunked_layers_equal_plain_ones():
    plain = with_adapter()
    chunked = with_adapter()
    assert speed.chunk_layers(chunked) == ['LlamaMLP', 'LlamaRMSNorm']
    assert speed.chunk_layers(chunked) == ['LlamaMLP', 'LlamaRMSNorm']  # twice is as good as once
    with torch.no_grad():
        assert torch.equal(chunked(IDS).logits, plain(IDS).logits)
    for model in (plain, chunked):
        model(IDS, labels=IDS).loss.backward()
    assert_same_gradients(plain, chunked)


def test_a_copy_of_chunked_layers_uses_its_own_weights():
    chunked = tiny_llama().requires_grad_(False)
    speed.chunk_layers(chunked)
    other = copy.deepcopy(chunked)
    other.model.norm.weight.zero_()
    assert other(IDS).logits.abs().max() == 0
    assert chunked(IDS).logits.abs().max() > 0


def test_layers_that_compute_something_else_are_left_alone():
    class ShiftedNorm(type(tiny_llama().model.norm)):
        "A norm as Gemma's, whose weights count from one."

        def forward(self, x):
            return super().forward(x) * (1 + self.weight) / self.weight

    other = tiny_llama().requires_grad_(False)
    other.model.norm.__class__ = ShiftedNorm
    for layer in other.model.layers:
        layer.mlp.act_fn = nn.GELU()
    before = other(IDS).logits
    assert speed.chunk_layers(other) == ['LlamaRMSNorm']
    assert torch.equal(other(IDS).logits, before)


def test_gradient_of_silu_without_torchs_operator(monkeypatch):
    x = torch.randn(50)
    grad = torch.randn(50)
    by_operator = torch.empty(50)
    speed._silu_backward(grad, x, by_operator)
    monkeypatch.setattr(speed, '_aten_silu_backward', None)
    by_formula = torch.empty(50)
    speed._silu_backward(grad, x, by_formula)
    assert_close(by_formula, by_operator, 1e-6)


@pytest.mark.parametrize('dtype, atol', [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_chunked_cross_entropy_equals_torchs(dtype, atol):
    torch.manual_seed(0)
    logits = torch.randn(70, 32000, dtype=dtype, requires_grad=True)  # three chunks, one not full
    targets = torch.randint(32000, (70,))
    chunked = speed.chunked_cross_entropy(logits, targets)
    expected = F.cross_entropy(logits.float(), targets, reduction='sum')
    assert_close(chunked, expected, 1e-3)
    gradients = [torch.autograd.grad(loss / 70, logits)[0] for loss in (chunked, expected)]
    assert_close(*gradients, atol / 70)
    with torch.no_grad():
        assert_close(speed.chunked_cross_entropy(logits, targets), expected, 1e-3)


# --- one door ---


def test_accelerate_model_for_replies_changes_attention_only():
    model = speed.accelerate_model(tiny_llama())
    assert model.config._attn_implementation == 'grouped'
    assert not any('forward' in vars(module) for module in model.modules())
    assert_close(model(IDS).logits, tiny_llama()(IDS).logits, 1e-5)


def test_accelerate_model_for_training_equals_the_plain_model():
    plain = with_adapter()
    fast = speed.accelerate_model(with_adapter(), training=True)
    assert speed.accelerate_model(fast, training=True) is fast  # twice is as good as once
    for model in (plain, fast):
        model(IDS, labels=IDS).loss.backward()
    assert_same_gradients(plain, fast)
    kinds = {type(module).__name__ for module in fast.modules()}
    assert kinds >= {'InPlaceLoraLinear', 'LoraA', 'LoraB'}
    with pytest.raises(SocraticError, match='no LoRA layer'):
        speed.accelerate_model(tiny_llama(), training=True)


# --- prepacked weights ---


def test_prepacked_weights_give_the_same_logits():
    half = with_adapter(model=tiny_llama().bfloat16()).eval()
    with torch.no_grad():
        before = half(IDS).logits
        prepacked = speed.prepack_weights(half)
        assert_close(prepacked(IDS).logits, before, 0.05)
    n_prepacked = sum(type(m).__name__ == 'PrepackedLinear' for m in prepacked.modules())
    assert n_prepacked == (15 if speed.supports_prepacking(torch.bfloat16) else 0)


def test_weights_in_32_bits_are_left_alone():
    with torch.no_grad():
        logits = speed.prepack_weights(tiny_llama())(IDS).logits
        assert torch.equal(logits, tiny_llama()(IDS).logits)


needs_int8 = pytest.mark.skipif(not speed.supports_int8(), reason='torch has no 8-bit products')


@needs_int8
def test_a_large_element_does_not_hide_other_tokens():
    torch.manual_seed(0)
    layer = nn.Linear(96, 40)
    x = torch.randn(2, 5, 96)
    x[0, 0, 3] = 1000.0
    with torch.no_grad():
        rounded = speed.Int8Linear(layer)(x)
        exact = layer(x)
        assert_close(rounded[1], exact[1], 0.05)
        assert_close(rounded[0, 1:], exact[0, 1:], 0.05)
        alone = speed.Int8Linear(layer)(x[:1, 1:2])
    assert_close(alone, rounded[:1, 1:2], 0.02)


@needs_int8
def test_an_8_bit_model_keeps_its_adapter():
    tuned = with_adapter().eval()
    with torch.no_grad():
        before = tuned(IDS).logits
        assert_close(speed.prepack_weights(tuned, 8)(IDS).logits, before, 0.1)
    adapted = [module for module in tuned.modules() if hasattr(module, 'base_layer')]
    assert {type(module.base_layer).__name__ for module in adapted} == {'Int8Linear'}
    assert speed.int8_speedup(torch.bfloat16, size=(64, 64), copies=1, repeats=1) > 0


def test_without_8_bit_products_nothing_is_rounded(monkeypatch):
    monkeypatch.setattr(speed, 'supports_int8', lambda: False)
    assert speed.int8_speedup(torch.bfloat16) == 0
    with pytest.raises(SocraticError, match='quantize="none"'):
        speed.prepack_weights(tiny_llama(), 8)


# --- a cache that grows ------------------------------------------------------------------------


@pytest.mark.parametrize('capacity', [1, 40, 200])
def test_a_growing_cache_holds_what_transformers_does(capacity):
    torch.manual_seed(0)
    layers = DynamicLayer(), GrowingLayer()
    steps = [torch.randn(3, 2, n, 4) for n in (capacity, 1, 1, 70, 1)]
    for step in steps:
        usual, growing = [layer.update(step, step + 1) for layer in layers]
        assert all(map(torch.equal, usual, growing))
    for layer in layers:
        layer.batch_select_indices(torch.tensor([0, 2]))
        layer.update(steps[1][:2], steps[1][:2])
        layer.crop(-5)
        layer.update(steps[2][:2], steps[2][:2])
        layer.batch_repeat_interleave(2)
        layer.update(steps[1][[0, 0, 1, 1]], steps[1][[0, 0, 1, 1]])
    assert torch.equal(layers[0].keys, layers[1].keys)
    assert torch.equal(layers[0].values, layers[1].values)


def test_tokens_are_appended_without_a_copy():
    layer = GrowingLayer()
    states = torch.randn(2, 2, 10, 4)
    layer.update(states, states)
    address = layer.keys.data_ptr()
    for _ in range(20):
        layer.update(states[:, :, :1], states[:, :, :1])
    assert layer.keys.data_ptr() == address and layer.keys.shape[2] == 30


def test_layers_with_a_window_are_left_to_transformers():
    config = MistralConfig(num_hidden_layers=2, sliding_window=4)
    assert not any(isinstance(layer, GrowingLayer) for layer in growing_cache(config).layers)


# --- threads beside busy programs --------------------------------------------------------------


@pytest.fixture
def governor(monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield ThreadGovernor(interval=0.0)
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    'busy, most, cores, expected',
    [(0, 2, 2, 2), (0.6, 2, 2, 1), (5, 2, 2, 1), (1, 4, 4, 3), (1, 2, 8, 2), (-0.2, 2, 2, 2)],
)
def test_each_thread_has_a_core(busy, most, cores, expected):
    assert threads_beside(busy, most, cores) == expected


def test_threads_follow_the_load(governor, monkeypatch):
    monkeypatch.setattr('psutil.cpu_count', lambda: 4)
    load = iter([(1.0, 3.0), (2.0, 6.0), (3.0, 6.0)])  # three busy cores, three, none
    governor.last = (0.0, 0.0)
    monkeypatch.setattr(governor, 'read', lambda: next(load))
    assert [governor.adjust() for _ in range(3)] == [1, 1, 4]
    assert torch.get_num_threads() == 4


def test_the_load_is_that_of_other_programs(governor):
    start, before = governor.read()
    subprocess.run([sys.executable, '-c', 'x = 0\nwhile x < 4_000_000: x += 1'], check=True)
    end, after = governor.read()
    assert 0 < after - before <= (end - start) * psutil.cpu_count() + 0.1


def test_number_of_threads_that_is_asked_for_is_kept(monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    governor = ThreadGovernor(interval=0.0)
    governor.last = (0.0, -1e9)
    before = torch.get_num_threads()
    assert governor.adjust() == before == torch.get_num_threads()


def test_a_second_governor_is_not_held_to_the_first_ones_low(governor, monkeypatch):
    monkeypatch.setattr('psutil.cpu_count', lambda: 4)
    governor.last = (0.0, 0.0)
    monkeypatch.setattr(governor, 'read', lambda: (1.0, 3.0))  # three busy cores
    with governor:
        assert governor.adjust() == 1
    assert ThreadGovernor().most == torch.get_num_threads() == 4
