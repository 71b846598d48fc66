//! Makes a file of vector graphics from icon sets, emoji labels, words and fonts: pictures of one icon, of several icons
//! and of words, with captions and questions. `examples/fetch-icons.sh` fetches the packages and runs this program:
//!
//! ```text
//! icons PACKAGES OUT.vector [LIMIT]
//! ```
//!
//! PACKAGES holds the unpacked packages and `packages.json`, which names their versions and checksums. LIMIT keeps only as many
//! icons of each set, for a quick look. The same packages give the same bytes.

mod colours;
mod compose;
mod letters;
mod measure;
mod names;
pub mod sets;

use std::path::{Path, PathBuf};
use std::time::Instant;

use ett::data::Split;
use ett::data::vector::{Drawings, Origin};
use serde::Deserialize;

pub type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Seed of everything random here.
pub const SEED: u64 = 2026;

/// A fetched package, as the script lists it.
#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    sha256: String,
}

/// The unpacked packages.
pub struct Packages {
    root: PathBuf,
    list: Vec<Package>,
}

impl Packages {
    fn open(root: &Path) -> Outcome<Self> {
        let list = std::fs::read(root.join("packages.json"))?;
        Ok(Packages { root: root.into(), list: serde_json::from_slice(&list)? })
    }

    /// A file of a package.
    pub fn path(&self, package: &str, file: &str) -> PathBuf {
        self.root.join(package.replace('/', "+")).join(file)
    }

    /// The JSON in a file of a package.
    pub fn json(&self, package: &str, file: &str) -> Outcome<serde_json::Value> {
        let path = self.path(package, file);
        let bytes = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// A source in this package; its name, licence and author are still to be filled in.
    pub fn origin(&self, package: &str) -> Outcome<Origin> {
        let of = self.list.iter().find(|p| p.name == package);
        let of = of.ok_or_else(|| format!("packages.json does not list {package}"))?;
        Ok(Origin {
            name: package.into(),
            what: String::new(),
            package: package.into(),
            version: of.version.clone(),
            sha256: of.sha256.clone(),
            licence: String::new(),
            author: String::new(),
            url: String::new(),
            used: 0,
        })
    }
}

pub fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (packages, out, limit) = match arguments.as_slice() {
        [packages, out] => (packages, out, usize::MAX),
        [packages, out, limit] => (packages, out, limit.parse()?),
        _ => return Err("usage: icons PACKAGES OUT.vector [LIMIT]".into()),
    };
    build(Path::new(packages), Path::new(out), limit)
}

/// Makes the file `out`.
pub fn build(packages: &Path, out: &Path, limit: usize) -> Outcome {
    let started = Instant::now();
    let packages = Packages::open(packages)?;
    let mut origins = Vec::new();
    let icons = sets::read(&packages, &mut origins, limit)?;
    let read = icons.len();
    let (icons, dropped) = measure::measure(icons, &origins)?;
    for (origin, name, why) in dropped.iter().take(10) {
        println!("dropped {}/{name}: {why}", origins[*origin].name);
    }
    println!("{read} icons, {} of them dropped because they fail or come out blank", dropped.len());

    let alphabets = letters::read(&packages, &mut origins)?;
    let words = letters::words(&packages, &mut origins)?;
    let (bodies, pictures) = compose::compose(&icons, &alphabets, &words);
    for body in &bodies {
        origins[body.origin].used += 1;
    }
    let count = |split| pictures.iter().filter(|p| p.split == split).count();
    let (train, test) = (count(Split::Train), count(Split::Test));
    let texts: usize = pictures.iter().map(|p| p.captions.len()).sum();
    let questions: usize = pictures.iter().map(|p| p.questions.len()).sum();
    println!("{train} training and {test} test pictures of {} icons and {} words", bodies.len(), words.len());
    println!("{texts} captions, {questions} questions");
    println!();
    for origin in &origins {
        let Origin { name, what, package, version, licence, author, used, .. } = origin;
        println!("{name}: {used} {what}; {licence}; {author}; {package} {version}");
    }
    println!();

    let made = format!(
        "examples/icons with seed {SEED}; one name in {} and one word in {} is held out, in all styles",
        names::HELD_OUT,
        names::HELD_OUT
    );
    let drawings = Drawings::new(made, origins, alphabets, bodies, pictures)?;
    let written = drawings.save(out)?;
    println!(
        "{}: {} bytes, CRC-32 {:08x}, made in {:.0} s",
        out.display(),
        written.bytes,
        written.crc32,
        started.elapsed().as_secs_f64()
    );
    Ok(())
}
