//! What icons look like: whether they come out at all, and their colours.

use ett::data::Split;
use ett::data::vector::{Drawings, Item, Origin, Paint, Picture};
use rayon::prelude::*;

use super::Outcome;
use super::colours::{HUES, distance, hue};
use super::sets::Icon;

/// Side of the pictures that are measured, in pixels.
const SIDE: usize = 48;
/// Fewer pixels than this share are as good as none.
const BLANK: f64 = 0.01;
/// A colour is the main one from this share of the icon on.
const MAIN: f64 = 0.75;
/// Colours closer than this are hard to tell apart.
const CLOSE: f64 = 70.0;

/// An icon and its colours.
pub struct Seen {
    pub icon: Icon,
    /// Its opaque pixels.
    pixels: Vec<[u8; 3]>,
    /// The one colour of most of it.
    pub main: Option<&'static str>,
}

impl Seen {
    /// Whether the icon stands out from a background; the colour of a plain one is not looked at.
    pub fn stands_out(&self, background: [u8; 3]) -> bool {
        let near = self.pixels.iter().filter(|p| distance(**p, background) < CLOSE).count();
        (near as f64) < 0.3 * self.pixels.len() as f64
    }
}

/// An icon that is left out: its origin, its name and the reason.
pub type Dropped = (usize, String, String);

/// Draws every icon on white and on black, and leaves out those that cannot be drawn or are blank.
pub fn measure(icons: Vec<Icon>, origins: &[Origin]) -> Outcome<(Vec<Seen>, Vec<Dropped>)> {
    let bodies = icons.iter().map(|i| i.body.clone()).collect();
    let pictures = (0..icons.len()).flat_map(|body| {
        [255, 0].map(|grey| Picture {
            split: Split::Train,
            size: [SIDE, SIDE],
            background: Paint([grey; 3]),
            items: vec![Item::Icon { body, at: [0, 0, SIDE, SIDE], paint: Paint([128; 3]) }],
            captions: Vec::new(),
            prompt: None,
            questions: Vec::new(),
        })
    });
    let all = Drawings::new("measured", origins.to_vec(), Vec::new(), bodies, pictures.collect())?;
    let seen: Vec<Result<Seen, Dropped>> = icons
        .into_par_iter()
        .enumerate()
        .map(|(i, icon)| {
            let pixels = all.draw(2 * i).and_then(|white| Ok((white, all.draw(2 * i + 1)?)));
            let left_out = |why: String| (icon.body.origin, icon.body.name.clone(), why);
            let (white, black) = pixels.map_err(|e| left_out(e.to_string()))?;
            let pairs = white.rgb.chunks_exact(3).zip(black.rgb.chunks_exact(3));
            // Where the icon is opaque, the background makes no difference.
            let pixels: Vec<[u8; 3]> = pairs
                .filter(|(w, b)| w.iter().zip(*b).all(|(w, b)| w.abs_diff(*b) < 64))
                .map(|(w, _)| [w[0], w[1], w[2]])
                .collect();
            if (pixels.len() as f64) < BLANK * (SIDE * SIDE) as f64 {
                return Err(left_out("comes out blank".into()));
            }
            let hues: Vec<_> = pixels.iter().filter_map(|p| hue(*p)).collect();
            let share = |name: &str| hues.iter().filter(|h| **h == name).count() as f64 / pixels.len() as f64;
            let main = HUES.into_iter().find(|name| !icon.plain && share(name) >= MAIN);
            Ok(Seen { icon, pixels, main })
        })
        .collect();
    let (mut kept, mut dropped) = (Vec::new(), Vec::new());
    for one in seen {
        match one {
            Ok(seen) => kept.push(seen),
            Err(why) => dropped.push(why),
        }
    }
    Ok((kept, dropped))
}
