//! The numbered examples, which assert what they claim.

use crate::common::{Outcome, gpu_turn};

#[path = "../../examples/2_kernel_and_oracle.rs"]
mod kernel_and_oracle;
#[path = "../../examples/3_small_model.rs"]
mod small_model;
#[path = "../../examples/1_tensor_and_gradient.rs"]
mod tensor_and_gradient;
#[path = "../../examples/4_training_step.rs"]
mod training_step;

#[test]
fn example_1_computes_a_gradient() -> Outcome {
    tensor_and_gradient::main()
}

#[test]
fn example_2_compares_a_kernel_with_its_oracle() -> Outcome {
    // It uses a GPU if there is one.
    gpu_turn();
    kernel_and_oracle::main()
}

#[test]
fn example_3_trains_a_small_model() -> Outcome {
    small_model::main()
}

#[test]
fn example_4_trains_a_language_model() -> Outcome {
    training_step::main()
}
