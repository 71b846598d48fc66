"""The PyTorch operators against published formulations in float64, from the same inputs.

Run by test-gpu. With the library for the CPU (`make -C kernels shim`) the same tests run on tiny CPU tensors, except those
of streams, graphs and memory.
"""

import subprocess
import sys
import unittest

import torch
from torch.nn import functional as F

import ett_kernels as ek
from ett_kernels import ops
from published import PublishedQuantizer, quantize

CPU = ek.library.on_cpu
DEVICE = torch.device("cpu" if CPU else "cuda")
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16

# Largest error, in the norm of a whole tensor. float32: some kernels cut factors into bfloat16 numbers, with which a product of
# rows a and b has an error of about 2^-19 |a| |b|. Here that is 5e-5 of a score, which is the relative error of a probability;
# the entropies divide it by the temperature: SPLIT. bfloat16: an output is rounded once, 2^-9 = 2e-3, as are probabilities
# or normalised values on the way to a gradient.
BOUND, SPLIT = {F32: 2e-5, BF16: 1e-2}, {F32: 5e-4, BF16: 1e-2}


FIRST_CALL = """
import torch, ett_kernels
from ett_kernels._library import Array
z, e = (torch.randn(n, 64, device="cuda").bfloat16() for n in (300, 1000))
idx = torch.empty(300, dtype=torch.int32, device="cuda")
array = lambda t, dtype: Array(t.data_ptr(), dtype, t.shape, t.stride())
call = ett_kernels.library.call("nearest", z=array(z, "bf16"), e=array(e, "bf16"), idx=array(idx, "i32"), metric=0)
workspace = torch.empty(max(call.workspace_bytes, 1), dtype=torch.uint8, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, capture_error_mode="thread_local"):
    call.launch(torch.cuda.current_stream().cuda_stream, workspace.data_ptr())
idx.fill_(-1)
graph.replay()
best = (z.float() @ e.float().t()).argmax(1)
assert (idx == best).float().mean() > 0.99, "the replay found other codes"
"""


def normal(*shape, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, dtype=F64, generator=generator)).to(DEVICE)


def integers(limit, *shape, seed):
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Case:
    """One operator: ours and the published form, both functions of the tensors that get gradients. Parameters are float32
    beside bfloat16 activations."""

    def __init__(self, name, ours, published, activations, parameters=(), bound=BOUND):
        self.name, self.ours, self.published = name, ours, published
        self.activations, self.parameters, self.bound = activations, parameters, bound

    def inputs(self, dtype):
        # bfloat16 values in all cases, so that only errors of the kernels show.
        rounded = [x.to(dtype).to(F64) for x in (*self.activations, *self.parameters)]
        types = [dtype] * len(self.activations) + [F32] * len(self.parameters)
        return [x.to(t).requires_grad_() for x, t in zip(rounded, types)]


def as_tuple(x):
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def gradients(function, inputs):
    """Outputs and gradients, for gradients of the outputs that depend on their shapes alone."""
    outputs = as_tuple(function(*inputs))
    g = [normal(*y.shape, seed=100 + i).to(BF16).to(y.dtype) for i, y in enumerate(outputs)]
    return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, inputs, g))


def cases():
    b, t, h, d = (2, 5, 4, 16) if CPU else (2, 200, 4, 64)
    m, k, v, c = (7, 30, 40, 24) if CPU else (333, 1000, 3000, 256)
    settings = dict(temperature=0.2)
    target = integers(v, m, seed=9)
    target[2] = -100
    head = lambda x: x.repeat_interleave(2, 1)  # key/value heads for the published form
    mask = lambda q, key: torch.ones(q.shape[2], key.shape[2], dtype=torch.bool, device=DEVICE).tril(key.shape[2] - q.shape[2])
    weight = normal(m, seed=8).abs().float()
    heads = normal(b, h, t, d, seed=1), normal(b, h // 2, t + 3, d, seed=2), normal(b, h // 2, t + 3, d, seed=3)
    attention = lambda causal: Case(
        f"attention, causal {causal}",
        lambda q, key, value: ek.attention(q, key, value, causal=causal),
        lambda q, key, value: F.scaled_dot_product_attention(q, head(key), head(value), mask(q, key) if causal else None),
        heads,
    )
    without_idx = lambda zq, idx, *losses: (zq, *(x for x in losses if x is not None))
    ours = lambda entropies: lambda z, e: without_idx(*ek.ibq_quantize(z, e, entropies=entropies, **settings))
    theirs = lambda z, e: without_idx(*quantize(z, e, **settings))
    z, e = normal(m, c, seed=4, scale=0.3), normal(k, c, seed=5, scale=0.3)
    first, second = (z @ e.t()).topk(2, 1).values.unbind(1)
    codes = (z[first - second > 1e-3],), (e,)  # rounding must not choose another code
    return [
        Case("ibq", ours(True), theirs, *codes, SPLIT),
        Case("ibq without entropies", ours(False), lambda z, e: theirs(z, e)[:2], *codes, SPLIT),
        attention(False),
        attention(True),
        Case("linear_cross_entropy", lambda x, w: ek.linear_cross_entropy(x, w, target),
             lambda x, w: F.cross_entropy(x @ w.t(), target), (normal(m, c, seed=6),), (normal(v, c, seed=7, scale=0.1),),
             SPLIT),
        Case("cross_entropy", lambda x: ek.cross_entropy(x, target), lambda x: F.cross_entropy(x, target),
             (normal(m, v, seed=6),)),
        Case("cross_entropy, weights", lambda x: ek.cross_entropy(x, target, weight, reduction="sum"),
             lambda x: (F.cross_entropy(x, target, reduction="none") * weight).sum(), (normal(m, v, seed=6),)),
        Case("group_norm_silu", lambda x, w, s: ek.group_norm_silu(x, 4, w, s),
             lambda x, w, s: F.silu(F.group_norm(x, 4, w, s, 1e-6)), (normal(2, c, 5, 6, seed=1),),
             (normal(c, seed=2), normal(c, seed=3))),
        Case("rms_norm", lambda x, w: ek.rms_norm(x, w), lambda x, w: F.rms_norm(x, (c,), w, 1e-6),
             (normal(3, m, c, seed=1),), (normal(c, seed=2),)),
        Case("rms_norm, residual", lambda x, r, w: ek.rms_norm(x, w, residual=r),
             lambda x, r, w: (F.rms_norm(x + r, (c,), w, 1e-6), x + r), (normal(m, c, seed=1), normal(m, c, seed=4)),
             (normal(c, seed=2),)),
        Case("layer_norm", lambda x, w, s: ek.layer_norm(x, w, s), lambda x, w, s: F.layer_norm(x, (c,), w, s),
             (normal(m, c, seed=1),), (normal(c, seed=2), normal(c, seed=3))),
    ]  # fmt: skip


class TorchTest(unittest.TestCase):
    def near(self, got, wanted, bound, what):
        self.assertEqual(got.shape, wanted.shape, what)
        error = ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
        self.assertLessEqual(error, bound, what)  # false for NaN, too

    def same(self, got, wanted, what):
        for i, (g, w) in enumerate(zip(got, wanted, strict=True)):
            self.assertTrue(torch.equal(g, w), f"{what}, tensor {i}")

    def test_values_and_gradients(self):
        for case in cases():
            for dtype in (F32, BF16):
                with self.subTest(case.name, dtype=dtype):
                    inputs = case.inputs(dtype)
                    outputs, grads = gradients(case.ours, inputs)
                    wanted = gradients(case.published, [x.detach().to(F64).requires_grad_() for x in inputs])
                    for i, (got, want) in enumerate(zip(outputs, wanted[0], strict=True)):
                        self.near(got, want, case.bound[dtype], f"output {i}")
                    for i, (x, got, want) in enumerate(zip(inputs, grads, wanted[1], strict=True)):
                        self.assertEqual(got.dtype, x.dtype)
                        self.near(got, want, case.bound[dtype], f"gradient {i}")

    def test_calls_repeat_their_bits(self):
        for case in cases():
            inputs = case.inputs(BF16)
            first, again = gradients(case.ours, inputs), gradients(case.ours, inputs)
            self.same(sum(first, []), sum(again, []), case.name)

    def test_opcheck(self):
        m, k, c = 6, 12, 16
        x, w, e = (normal(*s, seed=i).float().requires_grad_() for i, s in enumerate([(m, c), (c,), (k, c)]))
        image = normal(2, 3, 3, c, seed=4).float().requires_grad_()
        i32 = lambda *values: torch.tensor(values, dtype=torch.int32, device=DEVICE)
        target, scale, cu = i32(*range(m)), torch.ones(1, device=DEVICE), i32(0, 2, m)
        attention = (cu, cu, 2, 2, 4, 4, 0.5, True)
        calls = [
            (ops.nearest, (x.detach(), e.detach(), "l2")),
            (ops.ibq, (x, e, 0.1, 1e-5, 1.0, 0.25, True)),
            (ops.ibq, (x, e, 0.1, 1e-5, 1.0, 0.25, False)),
            (ops.attention, (x, x, x, *attention)),
            (ops.linear_cross_entropy, (x, e, target, scale)),
            (ops.cross_entropy, (x, target, None, scale)),
            (ops.group_norm, (image, w, w, 4, 1e-6, True)),
            (ops.layer_norm, (x, w, w, 1e-6)),
            (ops.rms_norm, (x, None, w, 1e-6)),
            (ops.rms_norm, (x, x.detach() + 1, w, 1e-6)),
        ]
        for operator, arguments in calls:
            with self.subTest(operator._qualname):
                torch.library.opcheck(operator, arguments)
        plain = lambda operator, *arguments: [t.detach() for t in operator(*arguments)]
        x, w, e, image = (t.detach() for t in (x, w, e, image))
        one = torch.ones((), device=DEVICE)
        stats = plain(ops.ibq, x, e, 0.1, 1e-5, 1.0, 0.25, True)[4:]
        backward = [
            (ops.ibq_backward, (x, one, one, one, x, e, *stats, 0.1, 1.0, 0.25, True, True)),
            (ops.attention_backward, (x, x, x, x, *plain(ops.attention, x, x, x, *attention), *attention)),
            (ops.linear_cross_entropy_backward,
             (one, x, e, target, scale, plain(ops.linear_cross_entropy, x, e, target, scale)[1], True)),
            (ops.cross_entropy_backward,
             (one, x, target, None, scale, plain(ops.cross_entropy, x, target, None, scale)[1])),
            (ops.group_norm_backward, (image, image, w, w, *plain(ops.group_norm, image, w, w, 4, 1e-6, True)[1:], True)),
            (ops.layer_norm_backward, (x, x, w, w, *plain(ops.layer_norm, x, w, w, 1e-6)[1:])),
            (ops.rms_norm_backward, (x, None, x, w, plain(ops.rms_norm, x, None, w, 1e-6)[2])),
        ]  # fmt: skip
        for operator, arguments in backward:
            with self.subTest(operator._qualname):
                torch.library.opcheck(operator, arguments)

    def test_compile(self):
        """All operators in one graph without breaks, forward and backward."""
        every = cases()
        inputs = [case.inputs(BF16) for case in every]

        def together(*flat):
            flat, results = iter(flat), []
            for case, own in zip(every, inputs):
                results += as_tuple(case.ours(*(next(flat) for _ in own)))
            return results

        compiled = torch.compile(together, fullgraph=True, backend="aot_eager" if CPU else "inductor")
        flat = sum(inputs, [])
        for got, want in zip(sum(gradients(compiled, flat), []), sum(gradients(together, flat), []), strict=True):
            # The kernels' bits are the same; compiled code between them may sum in another order.
            self.near(got, want, 1e-2 if got.dtype == BF16 else 1e-5, "compiled")

    def test_export(self):
        module = ek.nn.IBQQuantizer(30, 16, use_entropy_loss=True).to(DEVICE)
        z = normal(2, 16, 3, 3, seed=1).float()
        program = torch.export.export(module, (z,), dynamic_shapes=({0: torch.export.Dim("b")},))
        self.assertIn("ett_kernels.ibq.default", str(program.graph))
        for x in (z, z[:1].repeat(3, 1, 1, 1)):
            self.same([program.module()(x)[0]], [module(x)[0]], "exported")

    def test_autocast(self):
        """Operators of products compute as with bfloat16 activations, the others as without autocast."""
        for case in cases():
            inputs = case.inputs(F32)
            with torch.autocast(DEVICE.type, BF16):
                got = gradients(case.ours, inputs)
            products = case.name.startswith(("ibq", "attention", "linear"))
            types = [BF16 if products and i < len(case.activations) else F32 for i in range(len(inputs))]
            want = gradients(lambda *x: case.ours(*(v.to(t) for v, t in zip(x, types))), inputs)
            self.same(sum(got, []), sum(want, []), case.name)
        with torch.autocast(DEVICE.type, torch.float16), self.assertRaisesRegex(TypeError, "wanted bfloat16"):
            ek.nearest(normal(3, 8, seed=1).float(), normal(4, 8, seed=2).float())

    def test_nearest(self):
        m, k, d = (9, 33, 16) if CPU else (500, 4000, 64)
        z, e = normal(m, d, seed=1), normal(k, d, seed=2)
        for dtype in (F32, BF16):
            a, b = z.to(dtype), e.to(dtype)
            dot, distance = a.double() @ b.double().t(), torch.cdist(a.double(), b.double())
            # A code is right if its score is the best within rounding.
            found = dot.gather(1, ek.nearest(a, b)[:, None])[:, 0]
            self.assertTrue((found >= dot.max(1).values - 1e-3).all())
            found = distance.gather(1, ek.nearest(a, b, "l2")[:, None])[:, 0]
            self.assertTrue((found <= distance.min(1).values + 1e-3).all())
        self.assertEqual(ek.nearest(z.float().view(m, 1, d), e.float()).shape, (m, 1))

    def test_strides_and_empty_tensors(self):
        x, w = normal(12, 16, seed=1).float(), normal(16, seed=2).float()
        wanted = ek.rms_norm(x, w)
        self.same([ek.rms_norm(x.t().contiguous().t(), w)], [wanted], "transposed")
        self.same([ek.rms_norm(torch.cat([x, x], 1)[:, :16], w)], [wanted], "columns of a wider tensor")
        self.assertEqual(ek.rms_norm(x[:0], w).shape, (0, 16))

    def test_module(self):
        """IBQQuantizer beside the published module with the same state dict."""
        n, c, size = (30, 16, 3) if CPU else (2000, 64, 16)
        torch.manual_seed(0)  # the best two scores of each token differ by more than their rounding errors
        for l2 in (False, True):
            published = PublishedQuantizer(n, c, entropy_temperature=0.2).to(DEVICE)
            module = ek.nn.IBQQuantizer(n, c, use_entropy_loss=True, entropy_temperature=0.2, l2_normalize=l2).to(DEVICE)
            published.embedding.weight.data.mul_(0.3)
            module.load_state_dict(published.state_dict())
            z = normal(2, c, size, size, seed=1, scale=0.5).float().requires_grad_()
            results = []
            for quantizer in (module, published.double()):
                x, parameter = (z, module.embedding.weight) if quantizer is module else (z.double(), published.embedding.weight)
                if l2 and quantizer is published:
                    x, codebook = F.normalize(x, dim=1), F.normalize(parameter, dim=1)
                    quantizer = lambda x, codebook=codebook: torch.func.functional_call(
                        published, {"embedding.weight": codebook}, (x,)
                    )
                zq, losses, (_, _, idx) = quantizer(x)
                total = (zq * normal(*zq.shape, seed=2)).sum() + losses[0] + 0.3 * losses[3]
                results.append((zq, *losses, *torch.autograd.grad(total, (z, parameter)), idx))
            for i, (got, want) in enumerate(zip(*(r[:-1] for r in results), strict=True)):
                self.near(got, want, 1e-3, f"result {i}, l2_normalize {l2}")
            self.assertTrue(torch.equal(results[0][-1], results[1][-1]))
            idx = results[0][-1]
            self.near(module.get_codebook_entry(idx, (2, size, size, c)), results[0][0], 1e-6, "get_codebook_entry")
        self.assertEqual(list(module.state_dict()), ["embedding.weight"])
        plain = ek.nn.IBQQuantizer(n, c).to(DEVICE)
        self.assertEqual(plain(z)[1].shape, ())
        self.assertEqual(plain(z[:, :, 0])[0].shape, z[:, :, 0].shape)
        for wrong in (dict(cosine_similarity=True), dict(remap="used.npy")):
            with self.assertRaisesRegex(NotImplementedError, next(iter(wrong))):
                ek.nn.IBQQuantizer(n, c, **wrong)
        with self.assertRaisesRegex(ValueError, "wanted .2?"):
            plain(z[:, :8])

    def test_a_frozen_codebook_gets_no_gradient(self):
        z, e = normal(6, 16, seed=1).float().requires_grad_(), normal(9, 16, seed=2).float()
        wanted = z.detach().clone().requires_grad_(), e.clone().requires_grad_()
        for a, b in ((z, e), wanted):
            ek.ibq_quantize(a, b, temperature=0.2).zq.square().sum().backward()
        self.assertIsNone(e.grad)
        self.near(z.grad, wanted[0].grad, 1e-5, "dz")

    def test_faults_and_errors(self):
        x, w = normal(3, 16, seed=1).float(), normal(5, 16, seed=2).float()
        ek.check_faults()
        ek.linear_cross_entropy(x, w, torch.tensor([0, 5, 1], device=DEVICE))
        with self.assertRaisesRegex(ek.FaultError, "linear_xent_fwd: element 1 is 5, wanted at least 0 and below 5"):
            ek.check_faults()
        ek.check_faults()
        with self.assertRaisesRegex(TypeError, "argument `z` is torch.float16, wanted float32 or bfloat16"):
            ek.nearest(x.half(), w.half())
        with self.assertRaisesRegex(ek.KernelError, "nearest: argument `z` is .*f64"):
            ek.nearest(x.double(), w.double())
        with self.assertRaisesRegex(ek.ArgumentError, "argument `w` is"):
            ek.rms_norm(x, w[0, :7])
        if not CPU:
            with self.assertRaisesRegex(ValueError, "tensors are on cpu"):
                ek.nearest(x.cpu(), w.cpu())

    @unittest.skipIf(CPU, "needs a GPU")
    def test_second_stream(self):
        for case in cases():
            inputs = case.inputs(BF16)
            wanted = gradients(case.ours, inputs)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10**7)  # anything that ran on the default stream would be too early
                moved = [(x.detach() + 0).requires_grad_() for x in inputs]
                got = gradients(case.ours, moved)
            torch.cuda.current_stream().wait_stream(stream)
            self.same(sum(got, []), sum(wanted, []), case.name)

    @unittest.skipIf(CPU, "needs a GPU")
    def test_cuda_graph(self):
        for case in cases():
            inputs = case.inputs(BF16)
            g = [normal(*y.shape, seed=100 + i).to(y.dtype) for i, y in enumerate(as_tuple(case.ours(*inputs)))]

            def step():
                outputs = as_tuple(case.ours(*inputs))
                return [*outputs, *torch.autograd.grad(outputs, inputs, g)]

            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step()
            with torch.no_grad():
                for x in inputs:
                    x.mul_(0.5)
            graph.replay()
            self.same([y.detach() for y in captured], [y.detach() for y in step()], case.name)

    @unittest.skipIf(CPU, "needs a GPU")
    def test_the_first_call_may_be_captured(self):
        """In a process of its own, where no kernel has run before."""
        subprocess.run([sys.executable, "-c", FIRST_CALL], check=True)

    @unittest.skipIf(CPU, "needs a GPU")
    def test_memory(self):
        """Nothing of size tokens x codes, forward or backward."""
        m, k, d = 8192, 65536, 256
        z, e = normal(m, d, seed=1).bfloat16().requires_grad_(), normal(k, d, seed=2).float().requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = ek.ibq_quantize(z, e)
        (found.zq.sum() + found.quant + found.sample - found.avg).backward()
        # The codebook's gradient twice (sums and result), its copy in bfloat16, and the kernels' workspace.
        self.assertLess(torch.cuda.max_memory_allocated() - before, 3 * 4 * k * d + 2**27)


if __name__ == "__main__":
    unittest.main()
