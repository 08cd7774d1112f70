"""README.md's figure: memory and time on a GPU, and errors, of the fused loss and of the baselines.

`benchmarks/report.py` draws it from result files of throughput.py and accuracy.py. Titles are made of their numbers.
"""

from implementations import COLOURS, IMPLEMENTATIONS
from measuring import ERROR_LIMIT, RESULTS, described
from smollm2 import NAME as SMOLLM2

SOURCES = RESULTS / "throughput-nvidia-h200.json", RESULTS / "accuracy-intel-xeon-processor-2-cores.json"
PATH = RESULTS / "headline.png"
CASE = "Qwen3-8B, bfloat16, 8192 tokens"
OURS, EAGER = "chunked", "eager PyTorch"
FULL_LOGITS = (EAGER, "torch.compile'd eager", "SDPO, eager")


def plot(times: dict, errors: dict):
    """times, errors: what the two files of `SOURCES` have."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained", dpi=110)
    memory, time, error = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
    (case,) = (case["implementations"] for case in times["cases"] if case["name"] == CASE)
    shown = {name: case[name] for name in IMPLEMENTATIONS if "seconds" in case.get(name, {})}
    _bars(memory, {name: x["peak_mib"] / 1024 for name, x in shown.items()}, shown, "GiB over inputs and gradients")
    _bars(time, {name: 1e3 * x["seconds"] for name, x in shown.items()}, shown, "ms, forward and backward")
    memory.set_yticks(range(len(shown)), [x["label"].replace(" fused", "\nfused") for x in shown.values()], fontsize=8)
    time.set_yticks(range(len(shown)), [])
    ratios = [shown[name]["peak_mib"] / shown[OURS]["peak_mib"] for name in FULL_LOGITS]
    least = min(x["peak_mib"] for x in shown.values()) / shown[OURS]["peak_mib"]
    _title(
        memory,
        f"Full logits take {min(ratios):.0f} to {max(ratios):.0f} times our memory,\nthe least of all {least:.1f}",
    )
    ratios = [x["seconds"] / shown[OURS]["seconds"] for name, x in shown.items() if name != OURS]
    _title(time, f"The baselines take {min(ratios):.2f} to {max(ratios):.2f} times\nour time")
    _errors(error, errors["records"])
    figure.supxlabel(
        f"Jensen-Shannon. Left and middle: {CASE}, {described(times['machine'])}; hatched: the gradient is over 1% "
        f"off.\nRight, colours as on the left: bf16, {described(errors['machine'])}; stars: {SMOLLM2}.",
        fontsize=8,
    )
    return figure


def _title(axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, fontweight="bold")


def _bars(axes, values: dict[str, float], records: dict[str, dict], label: str) -> None:
    for row, (name, value) in enumerate(values.items()):
        wrong = records[name]["wrong"]
        axes.barh(row, value, color=COLOURS[name], hatch="///" if wrong else None, edgecolor="white", height=0.75)
        axes.text(value, row, f" {value:.1f}", va="center", fontsize=9)
    axes.set(xlabel=label, xlim=(0, 1.2 * max(values.values())))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def _errors(axes, records: list[dict]) -> None:
    own = [x for x in records if (x["dtype"], x["beta"]) == ("bfloat16", 0.5) and "errors" in x]
    own = [x for x in own if x["implementation"] != "reference"]
    names = [name for name in IMPLEMENTATIONS if name != OURS and any(x["implementation"] == name for x in own)]
    for name in [*names, OURS]:  # ours above the others
        style = {"color": COLOURS[name], "markersize": 4, "linewidth": 2.5 if name == OURS else 1}
        for real, form in ((False, "o-"), (True, "*")):
            points = [x for x in own if x["implementation"] == name and (x["inputs"] == SMOLLM2) == real]
            style |= {"markersize": 14, "markeredgecolor": "white"} if real else {}
            axes.loglog([x["kl"] for x in points], [x["errors"]["hidden"] for x in points], form, **style)
    axes.axhline(ERROR_LIMIT["bfloat16"], color="gray", linestyle=":", linewidth=1)
    axes.invert_xaxis()
    axes.set(xlabel="mean KL(teacher ‖ student), nats", ylabel="relative error of the hidden states' gradient")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    of_model = {x["implementation"]: x["errors"]["hidden"] for x in own if x["inputs"] == SMOLLM2}
    _title(axes, f"On a real self-teacher eager bf16 is {of_model[EAGER]:.0%} off,\nours {of_model[OURS]:.1%}")
