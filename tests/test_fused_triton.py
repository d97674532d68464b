import itertools
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.dense_head import (
    dense_gradients,
    dense_maxima,
    largest_error,
    magnitude_of_gradients,
    random_case,
    whole_number_case,
)

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux on x86_64 only")
from trainer.encoding import triton_head  # noqa: E402
from trainer.encoding.triton_head import CONFIGS, backward, forward  # noqa: E402

REALISTIC = [512, 3, 0, 129, 1, 480, 64, 31, 257]
CONFIG_LIST = [(precision, config) for precision, configs in CONFIGS.items() for config in configs]


@pytest.mark.slow
def test_the_head_is_right_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_triton_head.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 15


def test_tensors_of_the_cpu_are_refused_outside_the_interpreter():
    with pytest.raises(ValueError, match=r"needs its tensors on one CUDA device, not on \['cpu'\]"):
        forward(*random_case([3], 4, 5).inputs, want_positions=True)


# ------------------------------------------------------------------ compiled, without a GPU: ptxas is in Triton's wheel
def compiled(kernel, capability, config, constants, **types):
    """The kernel as it would be built for a GPU: width 960, all pointers aligned."""
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={name: constants.get(name) for name in kernel.arg_names if name not in types},
        attrs={
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if "*" in types.get(name, "")
        },
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(
        source, target=target, options={"num_warps": config.num_warps, "num_stages": config.num_stages}
    )


def compiled_maxima(capability, precision, config, positions=True, width=960, dtype="bf16"):
    dtype = f"*{dtype}" if precision == "half" else "*fp32"
    types = {"hidden": dtype, "weight": dtype, "bias": dtype, "offsets": "*i32", "maxima": "*fp32"}
    types |= {"positions": "*i32"} if positions else {}
    types |= dict.fromkeys(["texts", "vocabulary", "group", "length_bucket"], "i32")
    precision = "ieee" if precision == "half" else precision
    constants = {"WIDTH": width, "PRECISION": precision} | config.kwargs
    return compiled(triton_head._maxima, capability, config, constants, **types)


def waits_for_tensor_cores(kernel):
    """How many products may still be in flight where the machine code waits for them, in order."""
    return re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", kernel.asm["sass"])


@pytest.fixture(autouse=True)
def kernels_of_its_own(tmp_path, monkeypatch, request):
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def test_on_an_h100_the_tensor_cores_are_kept_fed():
    kernel = compiled_maxima(90, *CONFIG_LIST[0])
    assert "HGMMA.64x256x16.F32.BF16" in kernel.asm["sass"]
    # Inside the loop the newest product stays in flight; it is waited for where a tile's maxima are taken, and at the end.
    # ptxas waits after every single product when it cannot follow the accumulator, so with a mask under a condition.
    assert waits_for_tensor_cores(kernel) == ["1", "0", "0"]
    assert not re.search(r"\bSTL\b", kernel.asm["sass"])  # no register is spilled to memory
    assert "FMNMX.NAN" in kernel.asm["sass"]
    assert kernel.metadata.shared <= 227 * 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision,config", CONFIG_LIST, ids=[f"{name} {config.kwargs} {config.num_stages}" for name, config in CONFIG_LIST]
)
def test_every_config_compiles_for_an_h100_and_an_a100(precision, config):
    for positions in (True, False):
        hopper = compiled_maxima(90, precision, config, positions)
        assert waits_for_tensor_cores(hopper) == ([] if precision == "ieee" else ["1", "0", "0"])
        assert not re.search(r"\bSTL\b", hopper.asm["sass"])
        assert ("mma.sync" in compiled_maxima(80, precision, config, positions).asm["ptx"]) == (precision != "ieee")


@pytest.mark.slow
@pytest.mark.parametrize("width", [192, 200, 193], ids=["whole blocks", "part of a block", "odd"])
def test_every_width_compiles(width):
    for config in CONFIGS["half"]:
        assert "wgmma.mma_async" in compiled_maxima(90, "half", config, width=width, dtype="fp16").asm["ptx"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_sums_of_the_gradients_compile_without_atomics(dtype):
    one, half = {"gradient": "*fp32", "out": f"*{dtype}", "vocabulary": "i32"}, f"*{dtype}"
    kernels = {
        triton_head._sum_over_texts: one | {"hidden": half, "positions": "*i32", "texts": "i32"},
        triton_head._sum_over_words: one | {"weight": half, "order": "*i64", "starts": "*i64"},
    }
    constants = {"WIDTH": 960, "BLOCK_TEXTS": 8, "BLOCK_PAIRS": 8, "BLOCK_WIDTH": 1024}
    for kernel, types in kernels.items():
        found = compiled(kernel, 90, triton.Config({}), constants, **types)
        assert not re.search(r"\b(atom|red)\.", found.asm["ptx"])
        assert not re.search(r"\bSTL\b", found.asm["sass"])  # no register is spilled to memory


# ------------------------------------------------------------------------------------------------------ on a GPU
@pytest.fixture
def multiply_in():
    """Sets torch's precision of float32 products for one test."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield lambda precision: setattr(matmul, "fp32_precision", precision)
    matmul.fp32_precision = before


def both(case, seed=0):
    """Maxima, positions, a gradient with zeros where inactive, and the three gradients it gives."""
    maxima, positions = forward(*case.inputs, want_positions=True)
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(maxima.shape, generator=generator).to(maxima.device) * (maxima > 0)
    return maxima, positions, gradient, backward(gradient, positions, case.hidden, case.weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width,vocabulary", [(192, 50_000), (384, 1_003), (640, 51_200), (960, 51_200), (193, 1_003)])
def test_whole_numbers_are_exact_on_the_gpu(width, vocabulary, dtype):
    case = whole_number_case(REALISTIC, width, vocabulary, dtype, device="cuda")
    maxima, positions = forward(*case.inputs, want_positions=True)
    expected, rows = dense_maxima(case)
    assert torch.equal(maxima.double(), expected.clamp_min(0))
    assert torch.equal(positions.long(), torch.where(expected > 0, rows, -1))
    gradient = torch.randint(-3, 4, maxima.shape).cuda().float() * (maxima > 0)
    got = backward(gradient, positions, case.hidden, case.weight)
    for ours, dense in zip(got, dense_gradients(case, gradient), strict=True):
        assert torch.equal(ours, dense.to(ours.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0.0, 3.5], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_results_are_within_the_rounding_of_a_float32_sum_on_the_gpu(dtype, shift):
    case = random_case(REALISTIC, 768, 50_000, dtype, shift, device="cuda")
    maxima, positions, gradient, got = both(case)
    assert (maxima - dense_maxima(case)[0].clamp_min(0)).abs().max() <= largest_error(case)
    # Where two tokens differ by less than rounding, the gradient may go to either: the reference takes ours.
    scattered = torch.zeros(len(case.hidden), len(case.weight), dtype=torch.float64, device="cuda")
    active = gradient.nonzero().unbind(1)
    scattered[positions[active].long(), active[1]] = gradient[active].double()
    dense = scattered @ case.weight.double(), scattered.t() @ case.hidden.double(), scattered.sum(0)
    terms = (scattered != 0).sum(1).max().item() + 2
    for ours, wanted, magnitude in zip(got, dense, magnitude_of_gradients(case, gradient, positions), strict=True):
        bound = terms * 2.0**-24 * magnitude + torch.finfo(ours.dtype).eps * wanted.abs()
        assert ((ours - wanted).abs() <= bound).all()


@pytest.mark.gpu
def test_bf16_on_the_gpu_is_float32_of_the_same_numbers():
    case = random_case(REALISTIC, 960, 51_200, torch.bfloat16, device="cuda")
    half, _ = forward(*case.inputs, want_positions=False)
    single, _ = forward(case.hidden.float(), case.weight.float(), case.bias, case.offsets, want_positions=False)
    assert (half - single).abs().max() <= 2 * largest_error(case)


@pytest.mark.gpu
def test_tf32_is_used_only_where_torch_allows_it(multiply_in):
    case = random_case(REALISTIC, 768, 1_003, torch.float32, device="cuda")
    exact = dense_maxima(case)[0].clamp_min(0)
    norms = (case.hidden.norm(dim=1).max() * case.weight.norm(dim=1).max()).item()
    multiply_in("ieee")
    assert (forward(*case.inputs, want_positions=False)[0] - exact).abs().max() <= largest_error(case)
    multiply_in("tf32")
    error = (forward(*case.inputs, want_positions=False)[0] - exact).abs().max().item()
    assert largest_error(case) < error <= 2 * 2.0**-10 * norms  # ten bits of each factor are read


@pytest.mark.gpu
@pytest.mark.parametrize("precision", CONFIGS)
def test_all_configs_give_the_same_bits(precision, monkeypatch, multiply_in):
    dtype = torch.bfloat16 if precision == "half" else torch.float32
    multiply_in("tf32" if precision == "tf32" else "ieee")
    case = random_case(REALISTIC, 960, 1_003, dtype, device="cuda")
    results = []
    for config in CONFIGS[precision]:
        alone = triton.autotune([config], key=[])(triton_head._maxima)
        monkeypatch.setitem(triton_head._TUNED, precision, alone)
        results.append(forward(*case.inputs, want_positions=True))
    for (maxima, positions), (others, other_positions) in itertools.pairwise(results):
        assert torch.equal(maxima, others)
        assert torch.equal(positions, other_positions)


@pytest.mark.gpu
def test_two_runs_on_the_gpu_are_bit_equal():
    case = random_case([512, 3, 0, 400] * 8, 960, 51_200, torch.bfloat16, device="cuda")
    one, other = both(case), both(case)
    for left, right in zip([*one[:3], *one[3]], [*other[:3], *other[3]], strict=True):
        assert torch.equal(left, right)


@pytest.mark.gpu
def test_nan_and_infinity_come_through_on_the_gpu():
    case = random_case([300, 40, 0], 192, 1_003, torch.bfloat16, device="cuda")
    case.hidden[299, 7] = torch.nan
    case.hidden[301] = 0
    case.hidden[301, 0] = torch.inf
    case.weight[:, 0] = case.weight[:, 0].abs() + 1
    maxima, positions = forward(*case.inputs, want_positions=True)
    assert maxima[0].isnan().all()
    assert (positions[0] == -1).all()
    assert (maxima[1] == torch.inf).all()
    assert (positions[1] == 301).all()
    assert (maxima[2] == 0).all()


@pytest.mark.gpu
def test_more_than_two_to_the_31_cells_are_addressed():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("takes 40 GiB of GPU memory")
    texts, vocabulary = 42_000, 51_200
    case = random_case([0] * (texts - 2) + [5, 3], 64, vocabulary, torch.bfloat16, device="cuda")
    assert texts * vocabulary > 2**31
    maxima, positions = forward(*case.inputs, want_positions=True)
    last = dense_maxima(random_case([5, 3], 64, vocabulary, torch.bfloat16, device="cuda"))[0].clamp_min(0)
    assert (maxima[-2:] - last).abs().max() <= largest_error(case)
    assert positions[-1].max() == 7
    gradient = torch.zeros_like(maxima)
    gradient[-1, -1] = 1
    positions[-1, -1] = 7
    d_hidden, _, _ = backward(gradient, positions, case.hidden, case.weight)
    assert torch.equal(d_hidden[7], case.weight[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("shift,share", [(0.0, 1.0), (5.0, 0.02)], ids=["all active", "few active"])
def test_memory_is_results_plus_some_bytes_a_cell_and_a_tenth_of_the_logits_way(shift, share):
    case = random_case([512] * 32, 960, 51_200, torch.bfloat16, shift, device="cuda")
    both(case)  # tuned and compiled

    def peak(step):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    maxima, positions = forward(*case.inputs, want_positions=True)
    gradient = (maxima > 0).float()
    assert gradient.mean() <= share
    cells, results = maxima.numel(), (case.hidden.numel() + case.weight.numel()) * 2
    del maxima
    assert peak(lambda: forward(*case.inputs, want_positions=True)) <= 8 * cells + 2**20
    # 70 bytes a cell when all are active: 16 for the pairs' two int64 coordinates, 12 for row, word and gradient, the rest
    # for the sort and the pairs in its order.
    ours = peak(lambda: backward(gradient, positions, case.hidden, case.weight))
    assert ours <= results + 80 * share * cells + 4 * cells + 64 * 2**20

    def with_logits():
        hidden, weight = (t.detach().requires_grad_() for t in (case.hidden, case.weight))
        logits = torch.nn.functional.linear(hidden, weight, case.bias.to(hidden.dtype)).view(32, 512, -1)
        logits.relu().log1p().max(1).values.float().backward(gradient)

    assert (ours + 8 * cells) * 10 <= peak(with_logits)
