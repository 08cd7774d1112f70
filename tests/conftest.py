"""Before torch and Triton are imported: what both do in the tests is set here."""

import importlib.util
import os
import sys
from pathlib import Path

# Compile afresh, since torch.compile's cache on disk does not see an operator's backward.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
# Threads that wait for work sleep: where several processes share the processor, spinning takes most of its time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import levels

os.environ |= levels.environment(os.environ.get("SCSDPO_CPU_CAPABILITY", ""))

import pytest
import torch

# Triton kernels run on the GPU, or without one on CPU tensors in Triton's interpreter.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
if DEVICE == "cpu" and HAS_TRITON:
    import interpreter

    interpreter.remember()


# Files that run the CPU's own kernels, and do not choose the instruction set themselves.
ON_PROCESSOR = {
    "test_entry_clip",
    "test_linear_divergence",
    "test_main_grad",
    "test_objectives",
    "test_operator",
    "test_per_token",
    "test_policy",
    "test_properties",
    "test_routed_teachers",
    "test_scsdpo_loss",
    "test_shared_prefix",
    "test_trust_region",
}
# What tests of these files look at that is the same on every processor, in their names.
ON_ANY_PROCESSOR = ("triton", "opcheck", "compile", "gradcheck", "by_name", "names_the_argument", "trl")


# What `pytest -m short` runs, by file: names of tests, or None for all. Together they reach every module of the package
# but the adapters of trainers that are not installed.
SHORT = {
    "test_dealing": None,
    "test_docs": ("test_blocks_run", "test_links_lead_somewhere"),
    "test_hf_kernels": None,
    "test_linear_divergence": (
        "test_half_precision_contract",
        "test_shared_fp32_head_keeps_relative_precision",
        "test_no_rows",
        "test_importance_ratio_is_a_detached_weight",
        "test_chunked_equals_reference_in_every_field",
    ),
    "test_main_grad": ("test_two_losses_add_up_and_a_forward_alone_adds_nothing", "test_refusals"),
    "test_matmul": ("test_is_torchs_product", "test_bf16_with_its_instructions", "test_nothing_to_do"),
    "test_operator": (
        "test_opcheck_of_every_argument",
        "test_bad_input_names_the_argument",
        "test_compiled_with_other_numbers_and_sizes",
        "test_the_question_whether_a_schedule_runs_is_traced",
        "test_upstream_gradient_scales",
    ),
    "test_package": ("test_import_brings_torch_and_nothing_else_heavy", "test_public_signatures"),
    "test_per_token": ("test_any_upstream_gradient",),
    "test_question_weights": ("test_equals_the_definition", "test_the_kernel_equals_the_definition"),
    "test_row_divergence": ("test_forbidden_entries_contribute_their_limit", "test_peaked_rows_keep_their_gradient"),
    "test_scaling": None,
    "test_scsdpo_loss": ("test_reductions",),
    "test_transformers": ("test_a_teacher_comes_in_another_precision", "test_generation_and_logits_are_untouched"),
    "test_trust_region": None,
}
# Those of them that import Triton's kernels, which there are on Linux.
WITH_TRITON = {"test_hf_kernels", "test_question_weights", "test_row_divergence", "test_scaling"}


def pytest_ignore_collect(collection_path, config):
    """The short tests need what they use, and nothing of what the other files import; likewise a processor's."""
    if collection_path.suffix != ".py":
        return None
    stem = collection_path.stem
    if config.option.markexpr == "processor":
        return True if stem not in ON_PROCESSOR else None
    if config.option.markexpr == "short":
        return True if stem not in SHORT or (stem in WITH_TRITON and not HAS_TRITON) else None


# Files that take minutes, so that no process works on one of them alone at the end.
LONGEST = (
    "test_trl",
    "test_triton_targets",
    "test_row_divergence",
    "test_policy",
    "test_ptx",
    "test_objectives",
    "test_benchmarks",
    "test_divergences",
    "test_metrics",
    "test_examples",
    "test_trl_fused",
    "test_every_model",
    "test_demo",
    "test_trainer_step",
)


def pytest_collection_modifyitems(items):
    """Longest first. Marks what `./dev test` runs again at lesser instruction sets, and what is short."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        if item.path.stem in ON_PROCESSOR and not any(word in item.name for word in ON_ANY_PROCESSOR):
            item.add_marker("processor")
        names = SHORT.get(item.path.stem, ())
        if (names is None or item.originalname in names) and (HAS_TRITON or "triton" not in item.name):
            item.add_marker("short")


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def ranks(request, tmp_path_factory):
    """Four processes, or under `-m gpu` as many as there are GPUs, if those are fewer."""
    from ranks import Ranks

    most = 4 if request.param == "gloo" else min(4, torch.cuda.device_count())
    ranks = Ranks(tmp_path_factory.mktemp("rendezvous"), most, request.param)
    yield ranks
    ranks.stop()


@pytest.fixture
def gpu_kernels(monkeypatch):
    """A GPU's kernels, on the tensors of the CPU that a test has.

    Without a GPU, in Triton's interpreter. With one, what `Problem.call` is given goes there and its result comes back.
    """
    if DEVICE == "cpu":
        from scsdpo_kernels.kernels import triton_kernels
        from scsdpo_kernels.schedules import chunked

        monkeypatch.setattr(chunked, "kernels_of", lambda device: triton_kernels())
        return
    from problems import Problem, linear_divergence
    from torch.utils._pytree import tree_map_only

    call = Problem.call

    def placed(given, device):
        return tree_map_only(torch.Tensor, lambda x: x.to(device), given)

    def call_on_a_gpu(problem, op=linear_divergence, **options):
        def there(*args, **more):
            return placed(op(*placed(args, DEVICE), **placed(more, DEVICE)), "cpu")

        return call(problem, there, **options)

    monkeypatch.setattr(Problem, "call", call_on_a_gpu)


# Of `kernels` and `schedule`. The reference has no kernels: on a GPU there are its tensors, and else it runs once.
every_schedule = pytest.mark.parametrize(
    "kernels, schedule",
    [("cpu", "chunked"), ("triton", "chunked"), ("cpu", "reference"), *[("triton", "reference")] * (DEVICE == "cuda")],
    indirect=["kernels"],
)


def few_in_the_interpreter(kernels, many, few):
    """Triton's interpreter takes 20 milliseconds and more for a row."""
    return few if kernels == "triton" and DEVICE == "cpu" else many


@pytest.fixture
def unchecked(monkeypatch):
    """What a GPU does with `rows=`, where nothing is checked."""
    from scsdpo_kernels.schedules import rows

    def kept_rows(problem, **_):
        return rows.Chosen(problem.rows, True, [len(problem.rows)] * len(problem.teachers))

    monkeypatch.setattr(rows, "kept_rows", kept_rows)


@pytest.fixture(params=["cpu", "triton"])
def kernels(request):
    """The native kernels, and a GPU's."""
    if request.param == "triton":
        request.getfixturevalue("gpu_kernels")
    return request.param
