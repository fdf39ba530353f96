"""What devices send is read off the text of a program."""

from train.benchmark.collectives import Collective, find_collectives

# Lines of a step that libtpu 0.0.42 compiled for 4 chips, without their metadata.
TPU = """
ENTRY %main.288_spmd (param.183: s32[]) -> (s32[]) {
  %psum.864 = f32[2,8]{1,0:T(2,128)S(1)} all-reduce(%pad_maximum_fusion), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%region_2.4, backend_config={"collective_algorithm_config":{"emitter":"SinglePhaseRingSumEmitter"}}
  %get-tuple-element.2 = f32[2,16]{1,0:T(2,128)S(1)} get-tuple-element(%all-reduce.194), index=1
  %all-reduce.188 = (f32[3,3,8,8]{3,2,1,0:T(8,128)}, /*index=1*/bf16[10]{0:T(128)S(1)}) all-reduce(%fusion.1, %fusion.2), channel_id=1, to_apply=%region_2.4, backend_config={"collective_algorithm_config":{"emitter":"RotatedPincerEmitter"}}
  %all-reduce.187 = (s32[]{:T(128)}, s32[]{:T(128)}) all-reduce(%a, %b), channel_id=1, to_apply=%region_223.225
}
"""  # noqa: E501


def test_bytes_and_algorithms_are_read_from_a_program_of_a_tpu():
    assert find_collectives(TPU) == [
        Collective("all-reduce", 2 * 8 * 4, "SinglePhaseRingSum"),
        Collective("all-reduce", 9 * 64 * 4 + 10 * 2, "RotatedPincer"),
        Collective("all-reduce", 2 * 4),
    ]


def test_what_runs_between_a_start_and_its_end_is_beside_it():
    text = """
      %x = f32[8]{0} fusion(%p), backend_config={"estimated_cycles":"1000"}
      %a = f32[8]{0} all-reduce-start(%x), channel_id=3
      %b = (f32[8]{0}, f32[64]{0}) all-gather-start(%x), channel_id=4
      %y = f32[8]{0:T(128)} fusion(%p), backend_config={"estimated_cycles":"70"}
      %g = f32[8]{0} get-tuple-element(%y), index=0
      %c = f32[8]{0} all-reduce-done(%a)
      %z = f32[8]{0} custom-call(%p), custom_call_target="__cudnn$convForward"
      %d = f32[64]{0} all-gather-done(%b)
      %w = f32[8]{0} fusion(%d), backend_config={"estimated_cycles":"1000"}
      %e = s4[8]{0} all-gather(%w), channel_id=5
    """
    assert find_collectives(text) == [
        Collective("all-reduce", 32, num_beside=1, cycles_beside=70),
        Collective("all-gather", 256, num_beside=2, cycles_beside=70),
        Collective("all-gather", 4),
    ]
