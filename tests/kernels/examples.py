"""Packed linear layers of all kinds, and what they give."""

import torch
from hypothesis import strategies as st

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_codes(outputs, inputs, bits, generator):
    codes = torch.randint(0, 2 if bits == 1 else 3, (outputs, inputs), generator=generator)
    return (codes * 2 - 1 if bits == 1 else codes - 1).to(torch.int8)


def reference(x, codes, scale, bias, activation_bits=8, full_range=False, clip=None, largest=None):
    """Sum in int64, and rescale as ((sum * input_scale) * weight_scale) + bias, in float32."""
    half = {4: 8, 8: 128, 16: 127 * 256 + 128}[activation_bits]
    low, high = (-half if full_range else 1 - half), half - 1
    rows = x.reshape(-1, x.shape[-1]).float()
    rows = rows if clip is None else rows.clamp(-clip, clip)
    magnitude = rows.abs().amax(1, keepdim=True) if largest is None else largest.expand(len(rows), 1)
    divisor = (magnitude / torch.full_like(magnitude, -low)).clamp(min=torch.finfo(torch.float32).tiny)
    quotient = (rows / divisor).round().clamp(low, high)
    broken = ~magnitude.isfinite() | quotient.isnan().any(1, keepdim=True)
    input_codes = quotient.nan_to_num().to(torch.int64)
    input_scale = divisor.masked_fill(broken, torch.nan)
    output = None
    for part, weight, one in zip(input_codes.chunk(len(scale), 1), codes.chunk(len(scale), 1), scale, strict=True):
        value = (part @ weight.long().t()).float() * input_scale * one
        output = value if output is None else output + value
    output = output if bias is None else output + bias.float()
    return output.to(x.dtype).view(*x.shape[:-1], len(codes))


@st.composite
def cases(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 5]))
    return {
        "tokens": draw(
            st.sampled_from([(0,), (1,), (2,), (3,), (5,), (7,), (13,), (2, 3), (1, 1, 4), (47,), (97,), ()])
        ),
        "inputs": groups * draw(st.sampled_from([1, 2, 3, 4, 15, 16, 17, 31, 32, 33, 64, 100, 256, 300])),
        "outputs": draw(st.sampled_from([1, 2, 7, 15, 16, 17, 48, 63, 64, 65, 80, 127, 130, 256, 300, 330])),
        "groups": groups,
        "per_tensor": draw(st.booleans()),
        "bits": draw(st.sampled_from([1, 2])),
        "dtype": draw(st.sampled_from(TYPES)),
        "activation_bits": draw(st.sampled_from([4, 8, 8, 16])),
        "full_range": draw(st.booleans()),
        "clip": draw(st.sampled_from([None, None, 0.7])),
        "static": draw(st.booleans()),
        "bias": draw(st.sampled_from([None, *TYPES])),
        "layout": draw(st.sampled_from(["contiguous", "sliced", "transposed"])),
        "magnitude": draw(st.sampled_from([1e-42, 1e-38, 1e-4, 1.0, 1e5])),
        "odd": draw(st.sampled_from([None, None, float("nan"), float("inf"), float("-inf"), 0.0])),
        "threads": draw(st.sampled_from([1, 2, 3])),
        "seed": draw(st.integers(0, 1000)),
    }


def build(case):
    """Return the input, codes, scales and bias of a case, and how the input is quantized."""
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (*case["tokens"], case["inputs"])
    x = torch.randn(shape, generator=generator) * case["magnitude"] * 10 ** torch.randn(1, generator=generator)
    if case["odd"] is not None and x.numel():
        x.view(-1)[torch.randint(0, x.numel(), (1,), generator=generator)] = case["odd"]
    x = x.to(case["dtype"])
    if case["layout"] == "sliced":
        x = torch.cat([x, x], -1)[..., : case["inputs"]]
    elif case["layout"] == "transposed" and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    codes = random_codes(case["outputs"], case["inputs"], case["bits"], generator)
    rows = 1 if case["per_tensor"] and case["groups"] == 1 else case["outputs"]
    scale = torch.rand(rows, case["groups"], generator=generator).half()
    bias = None if case["bias"] is None else torch.randn(case["outputs"], generator=generator).to(case["bias"])
    how = {
        "activation_bits": case["activation_bits"],
        "full_range": case["full_range"] and case["activation_bits"] < 16,
        "clip": case["clip"],
        "largest": torch.tensor(1.3) * case["magnitude"] if case["static"] else None,
    }
    return x, codes, scale, bias, how
