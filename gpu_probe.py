import cProfile, pstats, sys, time, io
sys.path.insert(0, "benchmarks")
import torch
from torch.profiler import profile, ProfilerActivity
from scsdpo_kernels import linear_divergence
from scsdpo_kernels.schedules import chunked
from scsdpo_kernels import kernels
from inputs import reasoning

def ms(run, n=7):
    for _ in range(2): run()
    out = []
    for _ in range(n):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record(); run(); b.record(); b.synchronize(); out.append(a.elapsed_time(b))
    return sorted(out)[n // 2]

def problem(rows, width, vocabulary):
    h, w, t = reasoning(rows, width, vocabulary, torch.bfloat16, device="cuda")
    h.requires_grad_(); w.requires_grad_()
    def step():
        h.grad = w.grad = None
        linear_divergence(h, w, t).loss.backward()
    return step

def profiled(name, step):
    for _ in range(3): step()
    torch.cuda.synchronize()
    a = time.perf_counter(); step(); host = time.perf_counter() - a; torch.cuda.synchronize(); wall = time.perf_counter() - a
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
        step(); torch.cuda.synchronize()
    events = sorted(((e.time_range.start, e.time_range.end, e.name) for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA))
    busy = sum(e - s for s, e, _ in events); span = events[-1][1] - events[0][0]
    print(f"=== {name}: host {1e3*host:.2f} ms, wall {1e3*wall:.2f} ms, event time {ms(step):.2f} ms; GPU busy {busy/1e3:.2f} of span {span/1e3:.2f} ms, {len(events)} kernels")
    total = {}
    for s, e, n in events:
        c, d = total.get(n[:100], (0, 0)); total[n[:100]] = (c + 1, d + (e - s) / 1e3)
    for n, (c, d) in sorted(total.items(), key=lambda x: -x[1][1])[:16]: print(f"{d:9.3f} ms {c:4d} x {n}")
    gaps = sorted(((b[0] - a[1], a[2][:40], b[2][:40]) for a, b in zip(events, events[1:])), reverse=True)[:6]
    print("gaps us", gaps)

for name, shape in {"8B 8192": (8192, 4096, 151936), "8B 256": (256, 4096, 151936), "0.6B 256": (256, 1024, 151936), "OLMo 8192": (8192, 4096, 100278)}.items():
    step = problem(*shape)
    profiled(name, step)
    if name == "8B 8192":
        for rows in (128, 256, 384, 512, 768, 1024, 2048):
            chunked.BUFFER_BYTES["gpu"] = rows * 8 * shape[2]; chunked.MIN_ROWS = 1
            print("chunk", rows, f"{ms(step, 3):.2f} ms")
        chunked.BUFFER_BYTES["gpu"] = 1216 * 2**20; chunked.MIN_ROWS = 256
    del step; torch.cuda.empty_cache()
step = problem(256, 1024, 151936)
for _ in range(5): step()
torch.cuda.synchronize()
p = cProfile.Profile(); p.enable()
for _ in range(20): step(); torch.cuda.synchronize()
p.disable(); s = io.StringIO(); pstats.Stats(p, stream=s).sort_stats("tottime").print_stats(32); print(s.getvalue()[:6000])
del step
D = 4096
for V in (100278, 50257, 151936):
    S = -(-V // 64) * 64
    W = torch.randn(V, D, device="cuda").bfloat16(); h = torch.randn(1024, D, device="cuda").bfloat16()
    z = torch.empty(1024, S, device="cuda")[:, :V]; G = torch.randn(1024, S, device="cuda").bfloat16()[:, :V]
    A = V // 64 * 64; B = V - A
    f32 = dict(out_dtype=torch.float32)
    print(V, "logits", ms(lambda: torch.mm(h, W.t(), out=z, **f32)), "head part alone", ms(lambda: torch.mm(h, W[:A].t(), out=z[:, :A], **f32)), "tail", B and ms(lambda: torch.mm(h, W[A:].t(), out=z[:, A:], **f32)))
    dh = torch.empty(1024, D, device="cuda")
    print(V, "dH", ms(lambda: torch.mm(G, W, out=dh, **f32)), "aligned", ms(lambda: torch.mm(G[:, :A], W[:A], out=dh, **f32)), "tail", B and ms(lambda: torch.addmm(dh, G[:, A:], W[A:], out=dh, **f32)))
    dw = torch.empty(V, D, device="cuda").bfloat16()
    print(V, "dW", ms(lambda: torch.mm(G.t(), h, out=dw)), "aligned", ms(lambda: torch.mm(G[:, :A].t(), h, out=dw[:A])), "tail", B and ms(lambda: torch.mm(G[:, A:].t(), h, out=dw[A:])))
    if V % 64:
        z8 = torch.empty(1024, S, device="cuda"); W8 = torch.randn(S, D, device="cuda").bfloat16()
        print("  multiples of 8 only: logits", ms(lambda: torch.mm(h, W[:V//8*8].t(), out=z[:, :V//8*8], **f32)))
