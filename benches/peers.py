"""Times of flash-linear-attention (fla) and of PyTorch's attention on the shapes of `kernels --suite`.

    python benches/peers.py peers.json

Needs an NVIDIA GPU, torch, and for fla's rows the package flash-linear-attention; what is missing is
said and left out, a call that fails has a row that says why. Run it right before `kernels --peers "$PWD/peers.json"`, on
the same, otherwise idle GPU.

fla tunes each kernel over dozens of configurations, which takes minutes to compile in one process. So
workers compile first, each its share of the configurations, into Triton's cache on disk; the process
that measures finds them there. GLA_PEER_WORKERS sets their number; 0 and 1 start none.
"""

import json
import os
import subprocess
import sys

WORKERS = int(os.environ.get("GLA_PEER_WORKERS") or min(16, os.cpu_count() or 1))
worker = os.environ.get("GLA_PEER_WORKER")

# (gate, B, T, H, K, V), as in the suite
CHUNKED = [
    ("vector", 8, 2048, 4, 128, 256),
    ("vector", 8, 4096, 4, 256, 512),
    ("vector", 2, 16384, 4, 256, 512),
    ("vector", 1, 65536, 4, 128, 256),
    ("vector", 8, 2048, 16, 128, 128),
    ("none", 8, 1024, 16, 128, 128),
    ("none", 8, 2048, 16, 128, 128),
    ("none", 8, 2048, 4, 128, 256),
    # they share kernels with the rows above, and what these were tuned to
    ("scalar", 8, 2048, 4, 128, 256),
    ("fixed", 8, 2048, 4, 128, 256),
]
# as many steps in all, in fewer and longer sequences
SWEEP = [
    ("vector", 16, 1024, 16, 128, 128),
    ("vector", 4, 4096, 16, 128, 128),
    ("vector", 2, 8192, 16, 128, 128),
    ("vector", 1, 16384, 16, 128, 128),
    ("none", 16, 1024, 16, 128, 128),
    ("none", 4, 4096, 16, 128, 128),
    ("none", 2, 8192, 16, 128, 128),
    ("none", 1, 16384, 16, 128, 128),
]
DECODE = [(1, 4, 256, 512), (32, 4, 256, 512), (256, 4, 256, 512)]

try:
    import torch
    import torch.nn.functional as F
    import triton
    from triton.testing import do_bench
except ImportError as missing:
    sys.exit(f"peers.py: no peer can be measured: {missing}")
if not torch.cuda.is_available():
    sys.exit("peers.py: no peer can be measured: torch sees no GPU")
try:
    import fla
    from fla.ops.gla import chunk_gla, fused_recurrent_gla
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla
except Exception as missing:  # whatever it is, attention needs none of it
    fla = None
    print(f"peers.py: fla's rows are left out: {missing}", flush=True)

rows = []
if worker is None:
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, cuDNN {torch.backends.cudnn.version()}"
    print(f"peers.py: {versions}, {torch.cuda.get_device_name()}", flush=True)


def warm_workers():
    """Fills Triton's cache; what fails here fails again, and is reported, when it is measured."""
    print(f"peers.py: {WORKERS} workers compile fla's kernels", flush=True)
    env = dict(os.environ)
    started = []
    for n in range(WORKERS):
        env["GLA_PEER_WORKER"] = str(n)
        started.append(
            subprocess.Popen(
                [sys.executable, __file__],
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
    for process in started:
        process.wait()


def take_a_share():
    """Makes this worker's tuner try every WORKERS-th configuration."""
    from triton.runtime.autotuner import Autotuner

    every = Autotuner.prune_configs

    def share(self, kwargs):
        configs = every(self, kwargs)
        first = int(worker) % len(configs)
        return configs[first::WORKERS] or [configs[first]]

    Autotuner.prune_configs = share


def peak_mib(call):
    """Of one call, its inputs included; the first compiles and tunes, which takes memory of its own."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def told(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def add(name, gate, passes, sizes, call, rep=200, dtype="bf16"):
    if worker is not None:
        call()
        return
    row = dict(zip("BTHKV", sizes), name=name, gate=gate, dtype=dtype, ms=None)
    row["pass"] = passes
    try:
        row["peak_mib"] = peak_mib(call)
        row["ms"] = float(do_bench(call, warmup=50, rep=rep, return_mode="median"))
        print(f"{name:34} {gate:6} {passes:6} {sizes} {row['ms']:.4f} ms", flush=True)
    except Exception as error:  # a pass that is refused is not one that was not measured
        row["error"] = told(error)
        print(f"{name:34} {gate:6} {passes:6} {sizes} failed: {row['error']}", flush=True)
    rows.append(row)
    # what is measured is kept, and whole, should the run end early
    path = sys.argv[1] if len(sys.argv) > 1 else "peers.json"
    with open(path + ".partial", "w") as out:
        json.dump(rows, out, indent=1)
    os.replace(path + ".partial", path)


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def both(name, gate, sizes, forward, leaves, d_shape):
    def without_gradient():
        with torch.no_grad():
            forward()

    d_out = []  # not before the first backward: it is no part of the forward's memory

    def with_gradient():
        if not d_out:
            d_out.append(random(*d_shape))
        forward().backward(d_out[0])
        for leaf in leaves:
            leaf.grad = None

    add(name, gate, "fwd", sizes, without_gradient)
    add(name, gate, "fwdbwd", sizes, with_gradient)


def chunked(gate, b, t, h, k_dim, v_dim):
    if worker is not None:
        b = min(b, 2)  # the same kernels in less memory, of which workers have a share
    sizes = (b, t, h, k_dim, v_dim)
    q, k = (random(b, t, h, k_dim).requires_grad_() for _ in range(2))
    v = random(b, t, h, v_dim).requires_grad_()
    leaves = [q, k, v]
    log_gate = lambda *shape: F.logsigmoid(torch.randn(*shape, device="cuda")) / 16
    if gate == "vector":
        g = log_gate(b, t, h, k_dim).requires_grad_()
        leaves.append(g)
        name, forward = "chunk_gla", lambda: chunk_gla(q, k, v, g)[0]
    elif gate == "scalar":
        g = log_gate(b, t, h).requires_grad_()
        leaves.append(g)
        name, forward = "chunk_simple_gla", lambda: chunk_simple_gla(q, k, v, g)[0]
    elif gate == "fixed":
        g = log_gate(h)
        name, forward = "chunk_simple_gla, no dg", lambda: chunk_simple_gla(q, k, v, g_gamma=g)[0]
    else:
        name, forward = "chunk_linear_attn", lambda: chunk_linear_attn(q, k, v, normalize=False)[0]
    both(f"fla {fla.__version__} {name}", gate, sizes, forward, leaves, v.shape)


def attention(name, backend, b, t, h, dim):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (random(b, h, t, dim).requires_grad_() for _ in range(3))
    forward = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        both(name, "none", (b, t, h, dim, dim), forward, [q, k, v], q.shape)


def decode(b, h, k_dim, v_dim):
    q, k, v = random(b, 1, h, k_dim), random(b, 1, h, k_dim), random(b, 1, h, v_dim)
    g = F.logsigmoid(torch.randn(b, 1, h, k_dim, device="cuda")) / 16
    state = torch.zeros(b, h, k_dim, v_dim, device="cuda")
    step = lambda: fused_recurrent_gla(q, k, v, g, initial_state=state, output_final_state=True)
    name = f"fla {fla.__version__} fused_recurrent_gla"
    add(name, "vector", "decode", (b, 1, h, k_dim, v_dim), step)


def train(b, t):
    """A step of GLA-340M as fla builds it: bf16 weights, AdamW."""
    from fla.models import GLAConfig, GLAForCausalLM

    # workers share the device: a whole model for each would not fit
    layers, b = (24, b) if worker is None else (1, 2)
    config = GLAConfig(hidden_size=1024, num_hidden_layers=layers, num_heads=4, vocab_size=32000, tie_word_embeddings=True)
    model = GLAForCausalLM(config).to("cuda", torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.randint(0, 32000, (b, t), device="cuda")

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    add(f"fla {fla.__version__} GLAForCausalLM 340M", "vector", "train", (b, t, 4, 128, 256), step, rep=3000)


def matmul(size):
    """What the device's tensor cores do: the ceiling of all else."""
    a, b = random(size, size), random(size, size)
    add("matrix product (torch)", "", "matmul", (1, size, 1, size, size), lambda: a @ b)


def copy(size):
    """What the device's memory does, the other ceiling: T is the number of bytes that are read and written."""
    x, y = (torch.zeros(size, device="cuda", dtype=torch.uint8) for _ in range(2))
    add("copy (torch)", "", "copy", (1, 2 * size, 1, 1, 1), lambda: y.copy_(x), dtype="uint8")


def attempt(measure, *sizes):
    try:
        measure(*sizes)
    except Exception as error:  # of the inputs or of a model: the others go on
        print(f"peers.py: {measure.__name__}{sizes} failed: {told(error)}", flush=True)


if worker is not None:
    take_a_share()
else:
    attempt(matmul, 8192)
    attempt(copy, 1 << 30)
    for b, t in ((8, 1024), (16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384)):
        attempt(attention, "FlashAttention-2 (torch)", "FLASH_ATTENTION", b, t, 16, 128)
        attempt(attention, "cuDNN attention (torch)", "CUDNN_ATTENTION", b, t, 16, 128)
    if fla and WORKERS > 1:
        warm_workers()
if fla:
    for case in CHUNKED:
        attempt(chunked, *case)
    for case in DECODE:
        attempt(decode, *case)
    if worker is None:  # kernels that the cases above have compiled
        for case in SWEEP:
            attempt(chunked, *case)
    attempt(train, 8, 2048)
