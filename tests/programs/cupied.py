"""CuPy: an FFT, a kernel compiled by NVRTC, two streams and events between them."""
import asked
import cupy
import numpy

SOURCE = """
extern "C" __global__ void saxpy(float *y, const float *x, float a, int n) {
    int i = blockDim.x * blockIdx.x + threadIdx.x;
    if (i < n) y[i] += a * x[i];
}
"""
N = 1 << 22
kernel = cupy.RawKernel(SOURCE, "saxpy")
x = cupy.arange(N, dtype=cupy.float32) % 7
y = cupy.zeros(N, dtype=cupy.float32)
first, second = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
event = cupy.cuda.Event()
turns = 0


def work():
    """The second stream waits for the first: 1 and then 2 times x are added."""
    global turns
    with first:
        kernel((N // 256,), (256,), (y, x, cupy.float32(1), numpy.int32(N)))
        event.record(first)
    with second:
        second.wait_event(event)
        kernel((N // 256,), (256,), (y, x, cupy.float32(2), numpy.int32(N)))
    second.synchronize()
    turns = (turns + 1) % 10000
    if turns == 0:
        y.fill(0)
        cupy.cuda.get_current_stream().synchronize()


def spectrum():
    return cupy.asnumpy(abs(cupy.fft.fft(x[: 1 << 16]))[:64])


cupy.cuda.get_current_stream().synchronize()
work()
reference = spectrum()


def answer():
    return {"ok": bool(numpy.allclose(spectrum(), reference, rtol=1e-3, atol=1e-1)), "same": asked.digest(reference.tobytes())}


def go():
    for _ in range(10):
        work()
    fresh = cupy.RawKernel(SOURCE.replace("+= a", f"+= {turns + 1}.0f * a"), "saxpy")
    z = cupy.zeros(N, dtype=cupy.float32)
    fresh((N // 256,), (256,), (z, x, cupy.float32(1), numpy.int32(N)))
    return {"ok": bool((y == 3 * turns * x).all()) and bool((z == (turns + 1) * x).all()), "turns": turns}


asked.serve({"answer": answer, "go": go}, work)
