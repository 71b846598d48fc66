//! The built-in data, as training uses it.

use std::collections::BTreeSet;

use ett::config::{DataConfig, StageKind};
use ett::data::{Crop, DataSet, Source};
use ett::rng::Philox;

use crate::common::Outcome;

fn config(source: Source, size: usize) -> DataConfig {
    DataConfig { source, size, train_samples: 60, test_samples: 20, ..DataConfig::default() }
}

#[test]
fn built_in_data_is_like_a_folder_and_the_same_every_time() -> Outcome {
    for (source, size) in [(Source::Scenes, 32), (Source::Words, 64), (Source::Mixed, 48)] {
        let cfg = config(source, size);
        let train = DataSet::train(&cfg)?;
        let test = DataSet::test(&cfg)?.ok_or("20 test pictures")?;
        assert_eq!((train.images.len(), train.samples.len(), test.images.len()), (60, 60, 20));
        assert_eq!(train.root.to_str(), Some(source.name()));
        assert_eq!((train.images.on_disk(), train.images.skipped().count), (0, 0));
        for kind in [StageKind::Tokenizer, StageKind::Text, StageKind::Align, StageKind::Chat] {
            assert_eq!(train.usable(kind).len(), 60, "{}", kind.name());
        }
        let captions = |data: &DataSet| -> BTreeSet<_> {
            data.samples.iter().filter_map(|s| s.drawing_prompt().map(String::from)).collect()
        };
        assert!(captions(&train).is_disjoint(&captions(&test)) && captions(&test).len() > 10);
        // A larger set begins with the same pictures; a random crop of a square picture is the picture itself.
        let more = DataSet::train(&DataConfig { train_samples: 70, crop: Crop::Random, ..cfg.clone() })?;
        assert_eq!(more.samples[..60], train.samples);
        for i in [0, 59] {
            let drawn = |data: &DataSet| data.images.get(i, &mut Philox::new(3, 0));
            assert_eq!(drawn(&more)?, drawn(&train)?);
            assert_eq!((drawn(&train)?.image.height, drawn(&train)?.image.width), (size, size));
        }
        assert!(DataSet::test(&DataConfig { test_samples: 0, ..cfg })?.is_none());
    }
    Ok(())
}
