"""GPUs by name, as far as a cost depends on them. Torch-free."""

from typing import NamedTuple

GIB = 2**30
GPUS_PER_HOST = 8
"""Of the hosts that these GPUs are sold in, joined by NVLink."""
NETWORK_BYTES_PER_S = 50e9
"""Between hosts, for each GPU: one adapter of 400 Gbit/s, as in NVIDIA's DGX H100."""


class Hardware(NamedTuple):
    """One kind of GPU. Rates are those of NVIDIA's data sheets: dense, without sparsity."""

    name: str
    """As `--hardware` takes it."""
    reported: tuple[str, ...]
    """Parts of the name that the driver reports, all of which occur in it."""
    bf16_flops: float
    memory_bytes: float
    """What the driver offers to programs: a few percent off the number on the data sheet."""
    memory_bytes_per_s: float
    link_bytes_per_s: float
    """To the other GPUs of the host, in one direction."""
    multiplies_float8: bool


# Of names that several fit, the first one counts.
HARDWARE = (
    Hardware("h100-pcie", ("H100", "PCIe"), 756e12, 79.1 * GIB, 2.0e12, 64e9, True),
    Hardware("h100", ("H100",), 989e12, 79.1 * GIB, 3.35e12, 450e9, True),
    Hardware("h200", ("H200",), 989e12, 139.8 * GIB, 4.8e12, 450e9, True),
    Hardware("b200", ("B200",), 2250e12, 178.4 * GIB, 8.0e12, 900e9, True),
    Hardware("a100-40gb", ("A100", "40GB"), 312e12, 39.4 * GIB, 1.555e12, 300e9, False),
    Hardware("a100", ("A100",), 312e12, 79.1 * GIB, 2.039e12, 300e9, False),
    Hardware("l40s", ("L40S",), 362e12, 44.4 * GIB, 0.864e12, 32e9, True),
)


def find_hardware(name: str) -> Hardware:
    """The GPU of that name, as `--hardware` or the driver says it. Raises: ValueError for one that is not listed."""
    by_name = {hardware.name: hardware for hardware in HARDWARE}
    if name.lower() in by_name:
        return by_name[name.lower()]
    for hardware in HARDWARE:
        if all(part.lower() in name.lower() for part in hardware.reported):
            return hardware
    raise ValueError(f'no figures of the GPU "{name}"; there are those of {", ".join(by_name)}')
