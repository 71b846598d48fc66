//! What changes from step to step lies in one small device tensor, the step state, that kernels read: a captured
//! sequence of launches then replays with the values of the new step. Its layout is a part of the contract.

/// Places in the step state, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// Learning rate of a parameter group.
    Rate(usize),
    /// `1 / (1 - beta1^t)` of a parameter group.
    Bias1(usize),
    /// `1 / (1 - beta2^t)` of a parameter group.
    Bias2(usize),
    /// Largest gradient norm of a parameter group's optimizer; 0: no clipping.
    Clip(usize),
    /// Weight of a loss: the gradient that its scalar receives.
    Weight(usize),
    /// One over the supervised text tokens of the whole batch.
    InvTokens,
    /// One over the supervised codes of the whole batch.
    InvCodes,
    /// One over the pictures of the whole batch.
    InvPictures,
    /// One over the elements (pixels times channels) of these pictures.
    InvElements,
    /// One over the patch logits that the discriminator gives of them.
    InvPatches,
    /// One over the visual tokens of one part of the batch, over all ranks.
    InvVisual,
}

impl Slot {
    /// Parameter groups a state has room for.
    pub const GROUPS: usize = 16;
    /// Losses a state has room for.
    pub const LOSSES: usize = 16;
    /// Elements of a state.
    pub const LEN: usize = 4 * Self::GROUPS + Self::LOSSES + 6;

    /// Index of this slot.
    pub fn index(self) -> usize {
        match self {
            Slot::Rate(g) => 4 * g,
            Slot::Bias1(g) => 4 * g + 1,
            Slot::Bias2(g) => 4 * g + 2,
            Slot::Clip(g) => 4 * g + 3,
            Slot::Weight(l) => 4 * Self::GROUPS + l,
            Slot::InvTokens => 4 * Self::GROUPS + Self::LOSSES,
            Slot::InvCodes => 4 * Self::GROUPS + Self::LOSSES + 1,
            Slot::InvPictures => 4 * Self::GROUPS + Self::LOSSES + 2,
            Slot::InvElements => 4 * Self::GROUPS + Self::LOSSES + 3,
            Slot::InvPatches => 4 * Self::GROUPS + Self::LOSSES + 4,
            Slot::InvVisual => 4 * Self::GROUPS + Self::LOSSES + 5,
        }
    }
}
