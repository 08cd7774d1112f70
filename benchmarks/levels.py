"""Environments in which a process runs as if the processor had less. Set before torch is imported."""

# What PyTorch and the libraries that it calls may use, by what this package's kernels may.
_LIBRARIES = {
    "baseline": ("default", "SSE4_2", "SSE41"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512", "AVX512_CORE_VNNI"),
    "avx512_bf16": ("avx512", "AVX512", "AVX512_CORE_BF16"),
    "amx_bf16": ("avx512", "AVX512", "ALL"),
}
_VARIABLES = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


def environment(instruction_set: str) -> dict[str, str]:
    """Environment variables by name; of no instruction set, none."""
    if not instruction_set:
        return {}
    libraries = dict(zip(_VARIABLES, _LIBRARIES[instruction_set], strict=True))
    return {"SCSDPO_CPU_CAPABILITY": instruction_set, **libraries}
