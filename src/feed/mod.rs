//! From data to batches: data sets as named by configurations, the sequences that the language model reads, the batches
//! of a stage, and copies to the device.

mod ahead;
mod batches;
mod data_set;
mod device;
mod template;

pub use ahead::Ahead;
pub use batches::Feed;
pub use data_set::{DataSet, Share};
pub(crate) use device::PAD;
pub use device::{Batch, HostBatch, HostPart, PartSizes, Uploaded, images_to_device};
pub use template::Template;
