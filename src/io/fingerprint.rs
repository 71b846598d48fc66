//! Fingerprints of data sets, to check that a resumed run continues with the same data.

use serde::{Deserialize, Serialize};

/// The content of a data set, independent of its location. Two data sets with equal fingerprints and the same pixels
/// give the same batches.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Names of the pictures, relative to the folder, in their order.
    pub names: Texts,
    /// Number of usable pictures.
    pub pictures: usize,
    /// Captions in the order of the pictures.
    pub captions: Texts,
    /// Prompts.
    pub prompts: Texts,
    /// Questions with their answers.
    pub questions: Texts,
}

/// Number of texts, and a checksum of the texts and their positions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Texts {
    /// Number of texts.
    pub count: usize,
    /// CRC-32.
    pub crc32: u32,
}

impl Texts {
    /// Of the texts of samples in their order.
    pub(crate) fn of<'a, I: IntoIterator<Item = &'a [u8]>>(samples: impl Iterator<Item = I>) -> Self {
        let (mut count, mut sum) = (0, crc32fast::Hasher::new());
        for (i, texts) in samples.enumerate() {
            for text in texts {
                count += 1;
                sum.update(&(i as u64).to_le_bytes());
                sum.update(&(text.len() as u64).to_le_bytes());
                sum.update(text);
            }
        }
        Texts { count, crc32: sum.finalize() }
    }
}

impl Fingerprint {
    /// The differences of `now`, in words; empty if there are none.
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let mut all = Vec::new();
        let mut texts = |what: &str, then: Texts, now: Texts, each: usize| {
            if then.count != now.count {
                all.push(format!("{} {what} then, {} now", then.count / each, now.count / each));
            } else if then.crc32 != now.crc32 {
                all.push(format!("different {what}, or a different order"));
            }
        };
        texts("pictures", self.names, now.names, 1);
        texts("captions", self.captions, now.captions, 1);
        texts("prompts", self.prompts, now.prompts, 1);
        texts("questions", self.questions, now.questions, 2);
        if self.pictures != now.pictures && self.names == now.names {
            all.push(format!("{} of the pictures could be used then, {} now", self.pictures, now.pictures));
        }
        all
    }
}
