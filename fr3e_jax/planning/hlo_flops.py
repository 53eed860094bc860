"""FLOPs of single instructions: matrix products, convolutions, and the splash attention kernel."""

import math
import re

import numpy as np

from fr3e_jax.planning.hlo_text import Instruction


def product_flops(instruction: Instruction, computation: dict[str, Instruction]) -> float:
    """FLOPs of a matrix product or convolution; 0 for any other instruction.

    Args:
      computation: instructions by name, those of the operands among them.
    """
    if instruction.operation not in ("dot", "convolution"):
        return 0.0
    operands = [computation[name].arrays[0].sizes for name in instruction.operands if name in computation]
    if len(operands) < 2:
        return 0.0
    if instruction.operation == "dot":
        contracted = instruction.numbers("lhs_contracting_dims")
        return 2.0 * instruction.arrays[0].elements * math.prod(operands[0][i] for i in contracted)
    return convolution_flops(instruction, operands[0], operands[1])


def convolution_flops(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """FLOPs of a convolution, the form that TPUs give matrix products; products with padding do not count.

    Args:
      left, right: sizes of the two operands.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.line)
    assert labels is not None
    lhs, rhs, out = labels.groups()
    result = instruction.arrays[0].sizes
    total = 2.0 * result[out.index("b")] * result[out.index("f")] * right[rhs.index("i")]
    spatial = [x for x in out if x.isdigit()]
    match = re.search(r"window=\{([^}]*)\}", instruction.line)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", match[1] if match else ""))
    for axis, name in enumerate(spatial):
        sizes = left[lhs.index(name)], right[rhs.index(name)], result[out.index(name)]
        total *= valid_pairs(window, axis, *sizes)
    return total


def valid_pairs(window: dict[str, str], axis: int, size: int, kernel: int, result: int) -> int:
    """Number of pairs of a result and an element of the kernel that meet an input which is not padding.

    Args:
      window: attributes of the convolution's window, `stride` and others, with a number for each axis.
      axis: the spatial axis that is counted.
      size, kernel, result: sizes of input, kernel and result on that axis.
    """

    def attribute(name: str, default: str) -> str:
        return window[name].split("x")[axis] if name in window else default

    stride, low = int(attribute("stride", "1")), int(attribute("pad", "0_0").split("_")[0])
    input_dilation, kernel_dilation = int(attribute("lhs_dilate", "1")), int(attribute("rhs_dilate", "1"))
    # For each element k of the kernel: the results r with 0 <= r * stride - start <= end, and input_dilation
    # divides that. A batch of products is a convolution with a kernel as long as the batch, too long for a
    # table of all pairs.
    start = low - np.arange(kernel, dtype=np.int64) * kernel_dilation
    common = math.gcd(stride, input_dilation)
    period = input_dilation // common
    first = start // common * pow(stride // common, -1, period) % period
    least = np.maximum(-(-start // stride), 0)
    most = np.minimum((start + (size - 1) * input_dilation) // stride, result - 1)
    count = (most - first) // period - (least - 1 - first) // period
    return int(np.where((start % common == 0) & (most >= least), count, 0).sum())


def attention_flops(kernel: Instruction) -> float:
    """FLOPs of a call of the splash attention kernel, from its name and the shapes of its operands.

    A block of scores on the diagonal is computed whole. Forward has two matrix products for each block, the
    gradient of queries three, that of keys and values four.
    """
    match = re.search(
        r"operand_layout_constraints=\{(.*?)\}, (?:custom_call|metadata|frontend|backend)", kernel.line
    )
    sizes = [
        tuple(map(int, axes.split(",")))
        for axes in re.findall(r"(?:bf16|f32)\[([\d,]+)\]", match[1] if match else "")
    ]
    arrays = [x for x in sizes if len(x) >= 3]
    if "splash" not in kernel.name or len(arrays) < 2:
        return 0.0
    query, key = arrays[0], arrays[1]
    products = 4 if "dkv" in kernel.name else 3 if "_dq" in kernel.name else 2
    length, slots, width = query[-2], key[-2], query[-1]
    pairs = length * (slots - length) + length * (length + min(512, length)) / 2
    return 2.0 * products * float(np.prod(query[:-2])) * pairs * width
