//! Captions of COCO: one file with pictures, captions and licences, or the splits of Karpathy.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;

use super::cache::Skipped;
use super::draw::Split;
use super::folder::{Files, is_inside, without_nan};
use super::json;
use super::plain::read_text;
use super::sample::Sample;
use super::source::{DataSource, Listed, Wanted};
use super::texts::said;
use crate::error::{Error, Result};
use crate::files::parent;

const WANTED: &str = "wanted {\"images\": [{\"id\": .., \"file_name\": \"..\"}], \"annotations\": [{\"image_id\": .., \
                      \"caption\": \"..\"}]} as in captions_train2017.json";

/// Captions in a COCO file.
pub(super) struct FromCoco;

#[derive(Deserialize)]
struct Coco {
    images: Vec<Image>,
    #[serde(default)]
    annotations: Vec<Annotation>,
    #[serde(default)]
    licenses: Vec<Licence>,
}

/// A picture of COCO, or of a split file of Karpathy: the latter has no ID, but its sentences.
#[derive(Deserialize)]
struct Image {
    id: Option<Id>,
    #[serde(alias = "filename")]
    file_name: String,
    license: Option<Id>,
    filepath: Option<String>,
    split: Option<String>,
    #[serde(default)]
    sentences: Vec<Sentence>,
}

#[derive(Deserialize)]
struct Annotation {
    #[serde(default)]
    id: Option<Id>,
    image_id: Id,
    caption: Option<String>,
}

#[derive(Deserialize)]
struct Sentence {
    raw: String,
}

#[derive(Deserialize)]
struct Licence {
    id: Id,
    name: String,
    url: Option<String>,
}

/// Numbers in COCO, but texts in some data sets of its form.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(untagged)]
enum Id {
    Number(i64),
    Text(String),
}

impl DataSource for FromCoco {
    fn name(&self) -> &'static str {
        "coco"
    }

    fn open(&self, part: &Wanted) -> Result<Listed> {
        let path = part.path.unwrap_or(Path::new(""));
        let root = part.images.unwrap_or(parent(path)).to_path_buf();
        let Coco { images, annotations, licenses } = parse(path, &read_text(path)?)?;
        let mut ignored = Skipped::default();
        let mut captions = by_picture(path, annotations, &images, &mut ignored)?;
        let (mut samples, mut by_licence) = (Vec::new(), HashMap::<Id, usize>::new());
        for image in images.into_iter().filter(|i| i.is_in(part.split)) {
            let name = match &image.filepath {
                Some(folder) => format!("{folder}/{}", image.file_name),
                None => image.file_name,
            };
            if !is_inside(&name) {
                let what = format!(
                    "file_name {name:?} is not a path inside {}; move the picture there",
                    root.display()
                );
                return Err(Error::data(path, what));
            }
            let said = image.sentences.into_iter().filter_map(|s| said(Some(s.raw)));
            let said: Vec<String> =
                image.id.and_then(|id| captions.remove(&id)).into_iter().flatten().chain(said).collect();
            if said.is_empty() {
                ignored.add(&root.join(&name), "it has no caption");
                continue;
            }
            if let Some(licence) = image.license {
                *by_licence.entry(licence).or_default() += 1;
            }
            samples.push(Sample { image: root.join(name), captions: said, ..Sample::default() });
        }
        if samples.is_empty() {
            let what = format!("no pictures with captions found ({} ignored); {WANTED}", ignored.count);
            return Err(Error::data(path, what));
        }
        let pictures = Box::new(Files::new(&root, &samples));
        let about = about(&licenses, by_licence);
        Ok(Listed { root, samples, pictures, ignored, about })
    }
}

impl Image {
    /// Whether a split file has it in this part; files without splits are one part. Karpathy's `restval` belongs to the
    /// training part, and his `val` to neither.
    fn is_in(&self, part: Split) -> bool {
        matches!(
            (self.split.as_deref(), part),
            (None, _) | (Some("train" | "restval"), Split::Train) | (Some("test"), Split::Test)
        )
    }
}

fn parse(path: &Path, text: &str) -> Result<Coco> {
    let parsed = serde_json::from_str(text).or_else(|e| match without_nan(text) {
        Some(text) => serde_json::from_str(&text),
        None => Err(e),
    });
    parsed.map_err(|e| json::wrong(path, &e, WANTED))
}

/// The captions of each picture in the order of their IDs.
fn by_picture(
    path: &Path,
    mut annotations: Vec<Annotation>,
    images: &[Image],
    ignored: &mut Skipped,
) -> Result<HashMap<Id, Vec<String>>> {
    if !annotations.is_empty() && annotations.iter().all(|a| a.caption.is_none()) {
        let what = "its annotations have no captions; name captions_*.json in place of instances_*.json";
        return Err(Error::data(path, what));
    }
    annotations.sort_by(|a, b| a.id.cmp(&b.id));
    let mut captions: HashMap<Id, Vec<String>> = HashMap::new();
    for Annotation { image_id, caption, .. } in annotations {
        match said(caption) {
            Some(caption) => captions.entry(image_id).or_default().push(caption),
            None => ignored.add(path, "a caption is empty"),
        }
    }
    let known: std::collections::HashSet<&Id> = images.iter().filter_map(|i| i.id.as_ref()).collect();
    let lost = captions.iter().filter(|(id, _)| !known.contains(id)).map(|(_, c)| c.len()).sum();
    for _ in 0..lost {
        ignored.add(path, "the picture of a caption is not listed");
    }
    Ok(captions)
}

/// The licences with the number of their pictures, in the order of the file.
fn about(licences: &[Licence], mut counts: HashMap<Id, usize>) -> Vec<(String, String)> {
    let mut lines = Vec::new();
    let pictures = |n| if n == 1 { "1 picture".to_string() } else { format!("{n} pictures") };
    for Licence { id, name, url } in licences {
        if let Some(n) = counts.remove(id) {
            let url = url.as_ref().map(|u| format!(" ({u})")).unwrap_or_default();
            lines.push(("licence".to_string(), format!("{name}{url}: {}", pictures(n))));
        }
    }
    let unknown: usize = counts.into_values().sum();
    if unknown > 0 {
        lines.push(("licence".to_string(), format!("not named by the file: {}", pictures(unknown))));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Columns;
    use crate::data::image::Image as Pixels;
    use crate::data::save_png;
    use crate::data::scratch::Scratch;

    fn open(path: &Path, images: Option<&Path>, split: Split) -> Result<Listed> {
        let columns = Columns::default();
        FromCoco.open(&Wanted { split, path: Some(path), images, columns: &columns, samples: 0, size: 0 })
    }

    const COCO: &str = r#"{"info": {"year": NaN}, "licenses": [{"url": "http://x", "id": 1, "name": "A"}, {"id": 2, "name": "B"}],
        "images": [{"id": 7, "file_name": "b.png", "height": 1, "width": 2, "license": 1}, {"id": 5, "file_name": "a.png", "license": 3},
                   {"id": 6, "file_name": "c.png", "license": 1}, {"id": 9, "file_name": "d.png", "license": 1}],
        "annotations": [{"id": 3, "image_id": 7, "caption": "third\n"}, {"id": 1, "image_id": 7, "caption": "first"},
                        {"id": 2, "image_id": 5, "caption": "of a"}, {"id": 4, "image_id": 6, "caption": " "},
                        {"id": 5, "image_id": 8, "caption": "lost"}, {"id": 6, "image_id": 9, "caption": "of d"}]}"#;

    #[test]
    fn pictures_have_their_captions_in_order() {
        let dir = Scratch::new("coco");
        dir.write("annotations/c.json", COCO.as_bytes());
        std::fs::create_dir_all(dir.path("pics")).unwrap();
        save_png(dir.path("pics/b.png"), &Pixels::from_u8(1, 2, &[7; 6]).unwrap()).unwrap();
        let file = dir.path("annotations/c.json");
        let listed = open(&file, Some(&dir.path("pics")), Split::Train).unwrap();
        assert_eq!(listed.samples[0].captions, ["first", "third"]);
        let images: Vec<_> = listed.samples.iter().map(|s| s.image.clone()).collect();
        assert_eq!(images, ["b.png", "a.png", "d.png"].map(|n| dir.path("pics").join(n)));
        assert_eq!(listed.pictures.decode(0, 1).unwrap().rgb, [7; 6]);
        assert_eq!(listed.ignored.count, 3);
        let names = listed.ignored.names();
        for want in
            ["c.json: a caption is empty", "picture of a caption is not listed", "c.png: it has no caption"]
        {
            assert!(names.contains(want), "{names}");
        }
        let about: Vec<&str> = listed.about.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!(about, ["A (http://x): 2 pictures", "not named by the file: 1 picture"]);
        assert_eq!(open(&file, None, Split::Test).unwrap().samples[1].image, dir.path("annotations/a.png"));
    }

    #[test]
    fn split_files_give_the_part_that_is_asked_for() {
        let dir = Scratch::new("karpathy");
        let image = |name: &str, split: &str| {
            serde_json::json!({"filepath": "val2014", "filename": name, "split": split, "cocoid": 1,
                               "sentences": [{"raw": format!("{name} one."), "tokens": []}, {"raw": "two"}]})
        };
        let images = [
            image("a.jpg", "train"),
            image("b.jpg", "restval"),
            image("c.jpg", "val"),
            image("d.jpg", "test"),
        ];
        let text = serde_json::json!({"images": images, "dataset": "coco"}).to_string();
        dir.write("dataset_coco.json", text.as_bytes());
        let open = |split| open(&dir.path("dataset_coco.json"), None, split).unwrap().samples;
        let train = open(Split::Train);
        assert_eq!((train.len(), &train[0].image), (2, &dir.path("val2014/a.jpg")));
        assert_eq!(train[1].captions, ["b.jpg one.", "two"]);
        let test = open(Split::Test);
        assert_eq!((test.len(), &test[0].image), (1, &dir.path("val2014/d.jpg")));
    }

    #[test]
    fn errors_name_file_and_remedy() {
        let dir = Scratch::new("coco-errors");
        let error = |text: &str| {
            dir.write("c.json", text.as_bytes());
            open(&dir.path("c.json"), None, Split::Train).unwrap_err().to_string()
        };
        for (text, want) in [
            (
                "{\"images\": [\n{\"id\": 1}]}",
                "line 2, column 9: missing field `file_name`; wanted {\"images\"",
            ),
            ("{\"annotations\": []}", "missing field `images`"),
            ("[]", "line 1, column 2: invalid length 0"),
            ("{\"images\": []}", "no pictures with captions found (0 ignored)"),
            (r#"{"images": [{"id": 1, "file_name": "../a"}]}"#, "file_name \"../a\" is not a path inside"),
            (r#"{"images": [], "annotations": [{"id": 1, "image_id": 1}]}"#, "name captions_*.json in place"),
        ] {
            let e = error(text);
            assert!(e.contains("c.json: ") && e.contains(want), "{e}\nwanted {want}");
        }
        for cut in 0..COCO.len() {
            assert!(error(&COCO[..cut]).contains("c.json: line "));
        }
    }
}
