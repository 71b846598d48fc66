//! The step state: one small device tensor with the values that change from step to step. Kernels read it, so that a
//! recorded sequence of launches can be replayed with the values of a new step. Its layout is part of the contract.

/// The elements of the step state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// Learning rate of a parameter group.
    Rate(usize),
    /// Gradient norm above which the gradients of a parameter group are clipped; 0 for no clipping.
    Clip(usize),
    /// Weight of a loss: the gradient of its scalar.
    Weight(usize),
    /// 1 / number of supervised text tokens in the whole batch.
    InvTokens,
    /// 1 / number of supervised codes in the whole batch.
    InvCodes,
    /// 1 / number of pictures in the whole batch.
    InvPictures,
    /// 1 / number of elements (pixels times channels) of these pictures.
    InvElements,
    /// 1 / number of patch logits of the discriminator for these pictures.
    InvPatches,
    /// 1 / number of visual tokens in one part of the batch, over all ranks.
    InvVisual,
}

impl Slot {
    /// Maximum number of parameter groups.
    pub const GROUPS: usize = 16;
    /// Maximum number of losses.
    pub const LOSSES: usize = 16;
    /// Number of elements of the step state.
    pub const LEN: usize = 2 * Self::GROUPS + Self::LOSSES + 6;

    /// Index of this slot.
    pub fn index(self) -> usize {
        match self {
            Slot::Rate(g) => 2 * g,
            Slot::Clip(g) => 2 * g + 1,
            Slot::Weight(l) => 2 * Self::GROUPS + l,
            Slot::InvTokens => 2 * Self::GROUPS + Self::LOSSES,
            Slot::InvCodes => 2 * Self::GROUPS + Self::LOSSES + 1,
            Slot::InvPictures => 2 * Self::GROUPS + Self::LOSSES + 2,
            Slot::InvElements => 2 * Self::GROUPS + Self::LOSSES + 3,
            Slot::InvPatches => 2 * Self::GROUPS + Self::LOSSES + 4,
            Slot::InvVisual => 2 * Self::GROUPS + Self::LOSSES + 5,
        }
    }
}
