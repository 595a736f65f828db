"""Tier: gpu. The claims about the triton kernels that the interpreter has checked, on a device."""

from tests.triton_cases import (  # noqa: F401
    _poisoned_outputs,
    _small_tiles,
    test_a_step_is_seven_kernels_and_nothing_else,
    test_a_whole_direction,
    test_affine_may_be_missing_and_vectors_may_have_gaps,
    test_batch_moments,
    test_batch_norm_and_its_gradient,
    test_chunks_are_normalised_by_themselves,
    test_compiled_in_one_graph_when_asked_for_by_name,
    test_group_norm_and_its_gradient,
    test_layers_equal_the_reference_twice_differentiated,
    test_moments_of_many_splits_at_a_large_mean,
    test_offsets_go_beyond_2_to_31,
    test_row_norm_and_its_gradient,
    test_running_statistics,
    test_who_moves_running_statistics,
)
