"""Chips by name, what is compiled for them, and what their compiler says of it."""

import jax
import jax.numpy as jnp
import pytest

from inertia_jax.chips.cache import cached_cycles
from inertia_jax.chips.chip import CHIPS, Chip, find_chip
from inertia_jax.chips.compiler import compile_for, topology
from inertia_jax.chips.estimate import (
    Count,
    count_cycles,
    estimate,
    mark,
    mark_cycles,
)

# What libtpu 0.0.42 made of a loop and a switch for v5e, without what is not read.
PROGRAM = """\
HloModule jit_f, is_scheduled=true

%fused.8 (param_0.8: bf16[64,64]) -> bf16[64,64] {
  %param_0.8 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %convolution.6 = bf16[64,64]{1,0:T(8,128)(2,1)} convolution(%param_0.8), \
backend_config={"window_config":{"estimated_cycles":"999"}}
}

%body.2 (arg.0: (s32[], bf16[64,64])) -> (s32[], bf16[64,64]) {
  %arg.0 = (s32[]{:T(128)}, bf16[64,64]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %get-tuple-element.41 = s32[]{:T(128)} get-tuple-element(%arg.0), index=0
  %add.5 = s32[]{:T(128)} add(%get-tuple-element.41, %get-tuple-element.41)
  %fusion.2 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} fusion(%add.5), kind=kOutput, \
calls=%fused.8, backend_config={"window_config":{"estimated_cycles":"6236"}}
  ROOT %tuple.15 = (s32[]{:T(128)}, bf16[64,64]{1,0}) tuple(%add.5, %fusion.2)
}

%region_2.4 (arg.5: (bf16[64,64])) -> (bf16[64,64]) {
  %fusion.5 = bf16[64,64]{1,0:T(8,128)(2,1)} fusion(%arg.5), calls=%fused.8, \
backend_config={"window_config":{"estimated_cycles":"7302"}}
  ROOT %tuple.16 = (bf16[64,64]{1,0:T(8,128)(2,1)}) tuple(%fusion.5)
}

%region_4.6 (while.0: (bf16[64,64])) -> (bf16[64,64]) {
  ROOT %while.0 = (bf16[64,64]{1,0:T(8,128)(2,1)}) parameter(0)
}

ENTRY %main.7 (x.1: bf16[64,64], flag.1: s32[]) -> bf16[64,64] {
  %x.1 = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(0)
  %copy-start = (bf16[64,64]{1,0}, u32[]{:S(2)}) copy-start(%x.1)
  %copy-done = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %fusion.6 = bf16[64,64]{1,0} fusion(%copy-done), kind=kOutput, calls=%fused.8, \
backend_config={"window_config":{"estimated_cycles":"9102","is_mask":false}}
  %while.1 = (s32[]{:T(128)}, bf16[64,64]{1,0}) while(%fusion.6), \
condition=%condition.3, body=%body.2
  %conditional.5 = (bf16[64,64]{1,0}) conditional(%flag.1, %while.1, %while.1), \
branch_computations={%region_2.4, %region_4.6}
  ROOT %out = bf16[64,64]{1,0} get-tuple-element(%conditional.5), index=0
}
"""


def test_cycles_are_those_of_the_entry_of_loops_once_and_of_all_branches():
    # By hand: three fusions and the body's; the copy and the body's sum have none.
    expected = Count(9102 + 6236 + 7302, num_operations=5, num_uncosted=2)
    assert count_cycles(PROGRAM) == expected


# Two products that were joined, one alone in a loop, a copy, and what has no mark.
MARKED = """\
%two (p: bf16[8,8]) -> bf16[8,8] {
  %convolution.1 = bf16[8,8]{1,0} convolution(%p), \
metadata={op_name="jit(f)/mark<a/b>/mark<a/b/c>/conv"}, \
backend_config={"estimated_cycles":"900"}
  %relu = bf16[8,8]{1,0} maximum(%convolution.1), \
metadata={op_name="jit(f)/mark<z>/max"}
  ROOT %dot.1 = bf16[8,8]{1,0} dot(%relu), \
metadata={op_name="jit(f)/mark<d>/dot_general"}
}

%body (arg: (bf16[8,8])) -> (bf16[8,8]) {
  ROOT %f = bf16[8,8]{1,0} fusion(%arg), calls=%two, \
backend_config={"estimated_cycles":"30"}
}

ENTRY %main (x: bf16[8,8]) -> bf16[8,8] {
  %while.1 = bf16[8,8]{1,0} while(%x), condition=%condition, body=%body
  %copy.1 = bf16[8,8]{0,1} copy(%x), metadata={op_name="jit(f)/mark<d>/transpose"}, \
backend_config={"estimated_cycles":"7"}
  %negate.1 = bf16[8,8]{1,0} negate(%x), backend_config={"estimated_cycles":"100"}
  %add.1 = bf16[8,8]{1,0} add(%x, %x), metadata={op_name="jit(f)/mark<e>/add"}
}
"""


def test_cycles_of_what_is_joined_belong_to_the_products_in_it():
    assert mark_cycles(MARKED) == {"a/b": 15.0, "d": 15.0 + 7, "e": 0.0}
    assert count_cycles(MARKED).cycles == 30 + 7 + 100


def test_marks_are_in_the_program():
    def f(x):
        with mark("a/b c"):
            return jnp.sin(x)

    text = jax.jit(f).lower(jnp.ones(3)).as_text(debug_info=True)
    assert "mark<a/b c>" in text


def test_programs_of_other_platforms_have_no_cycles():
    text = jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text()
    with pytest.raises(ValueError, match="must have cycles that its compiler estim"):
        count_cycles(text)


def test_a_chip_is_found_by_its_name():
    assert find_chip("v5e").memory_bytes == 16 * 2**30
    with pytest.raises(ValueError, match=r"'v5'\) must be one of v4, v5e.*mean v5p\?"):
        find_chip("v5")


@pytest.mark.parametrize(
    ("name", "num_chips", "expected"),
    [
        ("v5e", 1, "v5e:2x2"),
        ("v5e", 64, "v5e:8x8"),
        ("v4", 4, "v4:2x2x1"),
        ("v6e", 8, "v6e:2x4"),
        ("v5p", 16, "v5p:2x2x4"),
        ("v5p", 256, "v5p:4x8x8"),
    ],
)
def test_a_machine_is_nearly_square(name, num_chips, expected):
    assert CHIPS[name].topology_name(num_chips) == expected


@pytest.mark.parametrize("num_chips", [0, 2, 3, 12, 512])
def test_no_machine_has_such_a_number_of_chips(num_chips):
    with pytest.raises(
        ValueError, match=rf"`num_chips` \(={num_chips}\) must be 1, or .* up to 256"
    ):
        CHIPS["v5e"].topology_name(num_chips)


def test_without_libtpu_an_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs libtpu: pip install .*\[tpu\]"):
        topology("v5e")


@pytest.fixture
def libtpu(no_shape_checks):
    """The compiler for TPUs, or the test is skipped, saying so."""
    pytest.importorskip("libtpu", reason="needs libtpu, which the extra `tpu` brings")


def test_a_product_is_compiled_for_every_chip(libtpu):
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    for name in CHIPS:
        found = estimate(compile_for(jnp.matmul, x, x, chip=name))
        assert found.flops == 2 * 512**3
        assert found.memory_bytes == 3 * 512 * 512 * 2
        assert found.num_operations > found.num_uncosted
        # No chip is faster than its peak, by the clock that goes with it.
        chip = find_chip(name)
        assert found.cycles / chip.clock_hz > found.flops / chip.bfloat16_flops


def test_what_does_not_fit_is_refused_and_so_are_unknown_machines(libtpu):
    x = jax.ShapeDtypeStruct((1 << 16, 1 << 16), jnp.bfloat16)
    message = r"memory of `device` \(='v5e'\), which it exceeds by 8.25 GiB"
    with pytest.raises(ValueError, match=message):
        compile_for(lambda x: jnp.sin(jnp.sin(x) @ x) @ x, x, chip="v5e")
    nowhere = Chip("v9e", (2, 2), 1e12, 1e12, 1 << 30, 1e9, 4)
    with pytest.raises(ValueError, match="v9e:2x2, must be one that the installed"):
        topology(nowhere)


def test_an_estimate_is_kept_on_disk_by_program_and_chip(monkeypatch, tmp_path):
    compiled = []

    def compile_one(lowered, *, chip):
        compiled.append(chip.name)
        return lowered

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    of_cache = "inertia_jax.chips.cache"
    monkeypatch.setattr(f"{of_cache}.compile_lowered", compile_one)
    monkeypatch.setattr(f"{of_cache}.count_cycles", lambda text: Count(5, 2, 1))
    monkeypatch.setattr(f"{of_cache}.mark_cycles", lambda text: {"a": 2.5})
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.0")
    programs = [jax.jit(jnp.sin).lower(jnp.ones(n)) for n in (3, 3, 4)]
    for program in programs:
        assert cached_cycles(program, chip="v5e") == (5, {"a": 2.5})
    assert compiled == ["v5e"] * 2
    cached_cycles(programs[0], chip="v6e")
    # Marks are no part of the text.
    cached_cycles(programs[0], chip="v5e", marks=["a"])
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.0")
    cached_cycles(programs[0], chip="v5e")
    assert compiled == ["v5e", "v5e", "v6e", "v5e", "v5e"]
    assert len(list((tmp_path / "inertia_jax" / "estimates").iterdir())) == 5
