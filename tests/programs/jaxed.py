"""JAX, jitted. Its allocator is chosen by XLA_PYTHON_CLIENT_PREALLOCATE and XLA_PYTHON_CLIENT_MEM_FRACTION."""
import asked
import jax
import jax.numpy as jnp
import numpy

key = jax.random.PRNGKey(1)
big = jax.random.normal(key, (4096, 4096))


@jax.jit
def forward(x):
    for _ in range(4):
        x = jnp.tanh(x @ big * 0.02)
    return x


@jax.jit
def step(x):
    return jnp.roll(x, 1).at[0].add(1)


x = jax.random.normal(jax.random.PRNGKey(2), (256, 4096))
reference = numpy.asarray(forward(x))
state, model = jnp.arange(1000), numpy.arange(1000)


def work():
    global state, model
    state = step(state).block_until_ready()
    model = numpy.roll(model, 1)
    model[0] += 1


def answer():
    found = numpy.asarray(forward(x))
    near = bool(numpy.allclose(found, reference, rtol=1e-3, atol=1e-3))
    return {"ok": near, "exact": bool((found == reference).all()), "same": asked.digest(reference.tobytes())}


def go():
    for _ in range(10):
        work()
    # A shape that it has not seen: a compile.
    rows = 8 + int(model[0]) % 64
    fresh = numpy.asarray(jax.jit(lambda a: (a @ a.T).sum())(jnp.ones((rows, 32))))
    return {"ok": bool((numpy.asarray(state) == model).all()) and float(fresh) == 32.0 * rows * rows}


asked.serve({"answer": answer, "go": go}, work, devices=str(jax.devices()))
