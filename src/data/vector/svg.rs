//! Drawing: SVG to pixels, without anything that is not in the file.

use std::collections::HashMap;
use std::fmt::Write;

use resvg::tiny_skia::{Color, Pixmap, PixmapPaint, Transform};
use resvg::usvg::roxmltree::{Document, Node, NodeId, ParsingOptions};
use resvg::usvg::{Group, ImageHrefResolver, Node as Drawn, Options, Tree};

use super::format::{Alphabet, Body, EM, Item, Letter, Paint, Picture};

/// Maximum length of a body, in bytes.
const MAX_BODY: usize = 64 << 10;
/// Maximum work of drawing a body: bytes of attributes, and [`ELEMENT`] for each element, after its references have been
/// followed. References in references would otherwise multiply without bound.
const MAX_WORK: u64 = 512 << 10;
/// The same for all items of a picture together.
const MAX_PICTURE: u64 = 4 * MAX_WORK;
/// What an element counts besides its attributes.
const ELEMENT: u64 = 128;
/// What a step of a filter counts: it visits all pixels of its picture.
const FILTER: u64 = 2_000;
/// Maximum magnitude of coordinates and stroke widths.
const MAX_NUMBER: f32 = 1e6;
/// The shortest repeated part of dashes, as a part of the longer side of their path.
const MIN_DASH: f32 = 1e-3;
/// Maximum number of nodes of a document: more than a body of elements of the shortest kind has.
const MAX_NODES: u32 = 32 << 10;
/// Maximum nesting of elements, those in references included. Drawing uses the stack and, for some elements, a picture
/// for each level.
const MAX_DEPTH: usize = 48;
/// The elements that bodies may contain: none that names a file, and no filter whose effort depends on a number.
const ELEMENTS: [&str; 31] = [
    "svg",
    "g",
    "defs",
    "use",
    "symbol",
    "path",
    "rect",
    "circle",
    "ellipse",
    "line",
    "polyline",
    "polygon",
    "linearGradient",
    "radialGradient",
    "stop",
    "clipPath",
    "mask",
    "title",
    "desc",
    "filter",
    "feFlood",
    "feBlend",
    "feOffset",
    "feColorMatrix",
    "feComposite",
    "feGaussianBlur",
    "feMerge",
    "feMergeNode",
    "animate",
    "animateTransform",
    "set",
];

type Told<T> = std::result::Result<T, String>;

/// The canvas of `picture` at `width` x `height` pixels.
pub(super) fn draw(
    picture: &Picture,
    alphabets: &[Alphabet],
    bodies: &[Body],
    (width, height): (usize, usize),
) -> Told<Vec<u8>> {
    // The libraries are written not to panic; if one does, only this picture is lost.
    std::panic::catch_unwind(|| rgb(picture, alphabets, bodies, (width, height)))
        .unwrap_or_else(|_| Err("cannot be drawn".into()))
}

fn rgb(
    picture: &Picture,
    alphabets: &[Alphabet],
    bodies: &[Body],
    (width, height): (usize, usize),
) -> Told<Vec<u8>> {
    let mut canvas = pixmap(width, height)?;
    let Paint([r, g, b]) = picture.background;
    canvas.fill(Color::from_rgba8(r, g, b, 255));
    let scale = [width as f64 / picture.size[0] as f64, height as f64 / picture.size[1] as f64];
    let mut work = 0;
    for item in &picture.items {
        if work > MAX_PICTURE {
            return Err(too_much());
        }
        match item {
            Item::Icon { body, at, paint } => {
                let body = bodies.get(*body).ok_or("a body is missing")?;
                // Rounding the ends, not the lengths, keeps the box inside the canvas.
                let end = |at: usize, scale: f64| (at as f64 * scale).round() as usize;
                let (left, top) = (end(at[0], scale[0]), end(at[1], scale[1]));
                let right = end(at[0].saturating_add(at[2]), scale[0]).max(left + 1);
                let bottom = end(at[1].saturating_add(at[3]), scale[1]).max(top + 1);
                let icon = icon(body, *paint, right - left, bottom - top, &mut work)?;
                // In a picture of its own, so that what lies outside of the view box is cut off.
                let (left, top) = (left as i32, top as i32);
                let plain = PixmapPaint::default();
                canvas.draw_pixmap(left, top, icon.as_ref(), &plain, Transform::identity(), None);
            }
            Item::Text { alphabet, text, at, em, paint } => {
                let alphabet = alphabets.get(*alphabet).ok_or("an alphabet is missing")?;
                let svg = line(alphabet, text, *at, *em, *paint, picture.size, &mut work)?;
                let document = Document::parse(&svg).map_err(|e| e.to_string())?;
                let tree = tree(&document)?;
                let transform = Transform::from_scale(scale[0] as f32, scale[1] as f32);
                resvg::render(&tree, transform, &mut canvas.as_mut());
            }
        }
    }
    Ok(canvas.data().chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect())
}

fn pixmap(width: usize, height: usize) -> Told<Pixmap> {
    let sides = u32::try_from(width).ok().zip(u32::try_from(height).ok());
    sides
        .and_then(|(w, h)| Pixmap::new(w, h))
        .ok_or_else(|| format!("{width} x {height} pixels are too many to draw"))
}

fn icon(body: &Body, paint: Paint, width: usize, height: usize, all: &mut u64) -> Told<Pixmap> {
    let named = |e: String| format!("{}: {e}", body.name);
    if body.svg.len() > MAX_BODY {
        return Err(named(format!("has {} bytes, wanted at most {MAX_BODY}", body.svg.len())));
    }
    let [left, top, w, h] = body.view;
    let svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" xmlns:xlink=\"http://www.w3.org/1999/xlink\" width=\"{width}\" \
         height=\"{height}\" viewBox=\"{left} {top} {w} {h}\" color=\"{paint}\">{}</svg>",
        body.svg
    );
    // Entities could be declared only in front of the root, where a body cannot write.
    let limited = ParsingOptions { allow_dtd: false, nodes_limit: MAX_NODES, ..Default::default() };
    let document = Document::parse_with_options(&svg, limited).map_err(|e| named(e.to_string()))?;
    spend(all, check(&document).map_err(named)?)?;
    let tree = tree(&document).map_err(named)?;
    check_paths(tree.root()).map_err(named)?;
    let mut icon = pixmap(width, height)?;
    resvg::render(&tree, Transform::identity(), &mut icon.as_mut());
    Ok(icon)
}

fn tree(document: &Document) -> Told<Tree> {
    let nothing =
        ImageHrefResolver { resolve_data: Box::new(|_, _, _| None), resolve_string: Box::new(|_, _| None) };
    let options = Options { image_href_resolver: nothing, ..Options::default() };
    Tree::from_xmltree(document, &options).map_err(|e| e.to_string())
}

fn too_much() -> String {
    "takes too much work to draw all of its items".into()
}

/// Adds the work of an item to that of the items before it.
fn spend(all: &mut u64, work: u64) -> Told<()> {
    *all += work;
    if *all > MAX_PICTURE { Err(too_much()) } else { Ok(()) }
}

/// A line of text as an SVG document of the size of the canvas.
fn line(
    alphabet: &Alphabet,
    text: &str,
    [x, y]: [f32; 2],
    em: f32,
    paint: Paint,
    [width, height]: [usize; 2],
    all: &mut u64,
) -> Told<String> {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\"><g fill=\"{paint}\" \
         transform=\"translate({x} {y}) scale({})\">",
        em / EM
    );
    let mut pen = 0.0;
    for c in text.chars() {
        let Some(Letter(advance, outline)) = alphabet.letters.get(&c) else {
            return Err(format!("the alphabet {:?} has no {c:?}", alphabet.name));
        };
        if !outline.is_empty() {
            spend(all, ELEMENT + outline.len() as u64)?;
            let _ = write!(svg, "<path transform=\"translate({pen})\" d=\"{outline}\"/>");
        }
        pen += advance;
    }
    svg.push_str("</g></svg>");
    Ok(svg)
}

/// Refuses elements and references that bodies do not need, and work without bound.
fn check(document: &Document) -> Told<u64> {
    let mut ids = HashMap::new();
    for node in document.descendants().filter(Node::is_element) {
        let name = node.tag_name().name();
        if !ELEMENTS.contains(&name) || (name == "svg" && node != document.root_element()) {
            return Err(format!("contains <{name}>, which is not drawn from files"));
        }
        if let Some(id) = node.attribute("id") {
            ids.entry(id).or_insert(node);
        }
    }
    let mut known = HashMap::new();
    let work = work(document.root_element(), &ids, &mut known, 0)?.0;
    match work <= MAX_WORK {
        true => Ok(work),
        false => Err("takes too much work to draw through its references".into()),
    }
}

/// Refuses paths whose strokes would take memory and time without bound.
fn check_paths(group: &Group) -> Told<()> {
    for node in group.children() {
        match node {
            Drawn::Group(group) => check_paths(group)?,
            Drawn::Path(path) => {
                let bounds = path.data().bounds();
                let width = path.stroke().map_or(0.0, |s| s.width().get());
                let ends = [bounds.left(), bounds.top(), bounds.right(), bounds.bottom(), width];
                if ends.iter().any(|x| x.abs() > MAX_NUMBER) {
                    return Err(far());
                }
                let dashes = path.stroke().and_then(|s| s.dasharray());
                let least = bounds.width().max(bounds.height()) * MIN_DASH;
                if dashes.is_some_and(|d| d.iter().sum::<f32>() < least) {
                    return Err("has dashes shorter than a thousandth of their path".into());
                }
            }
            _ => {}
        }
        let mut below = Ok(());
        node.subroots(|group| below = below.clone().and_then(|()| check_paths(group)));
        below?;
    }
    Ok(())
}

fn far() -> String {
    format!("has coordinates or stroke widths of more than {MAX_NUMBER}")
}

/// Whether the coordinates in an attribute are far too large. Flags of arcs may stand in front of a number without a
/// space, so that two digits more are allowed here; the paths made of it are checked again.
fn is_far(name: &str, value: &str) -> bool {
    matches!(name, "d" | "points" | "stroke-width")
        && value.split(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | 'e' | 'E' | '+' | '-'))).any(
            |part| {
                // A sign ends the number before it, except in an exponent.
                let starts = part
                    .char_indices()
                    .filter(|&(i, c)| i == 0 || matches!(c, '+' | '-') && !part[..i].ends_with(['e', 'E']));
                let starts: Vec<usize> = starts.map(|(i, _)| i).chain([part.len()]).collect();
                starts.windows(2).any(|w| {
                    let number = part[w[0]..w[1]].parse::<f32>();
                    number.is_ok_and(|x| x.abs() > 100.0 * MAX_NUMBER)
                })
            },
        )
}

/// The work of drawing a node and everything that it refers to, and how deeply that is nested.
fn work<'a, 'i>(
    node: Node<'a, 'i>,
    ids: &HashMap<&'a str, Node<'a, 'i>>,
    known: &mut HashMap<NodeId, Option<(u64, usize)>>,
    depth: usize,
) -> Told<(u64, usize)> {
    let too_deep = || Err(format!("is nested more than {MAX_DEPTH} deep"));
    if depth > MAX_DEPTH {
        return too_deep();
    }
    match known.get(&node.id()) {
        Some(Some((_, below))) if depth + below > MAX_DEPTH => return too_deep(),
        Some(Some(done)) => return Ok(*done),
        Some(None) => return Err("refers to itself".into()),
        None => known.insert(node.id(), None),
    };
    let step = node.tag_name().name().starts_with("fe");
    let (mut sum, mut below) = (if step { FILTER } else { ELEMENT }, 0);
    let mut add = |other, known: &mut _| -> Told<()> {
        let (more, deep) = work(other, ids, known, depth + 1)?;
        sum = (sum + more).min(MAX_WORK + 1);
        below = below.max(deep + 1);
        Ok(())
    };
    for child in node.children().filter(Node::is_element) {
        add(child, known)?;
    }
    for attribute in node.attributes() {
        if is_far(attribute.name(), attribute.value()) {
            return Err(far());
        }
        for id in references(attribute.name(), attribute.value())? {
            if let Some(target) = ids.get(id) {
                add(*target, known)?;
            }
        }
    }
    sum += node.attributes().map(|a| a.value().len() as u64).sum::<u64>();
    known.insert(node.id(), Some((sum, below)));
    Ok((sum, below))
}

/// The ids that an attribute refers to; anything outside of the document is refused.
fn references<'a>(name: &str, value: &'a str) -> Told<Vec<&'a str>> {
    let outside = || format!("refers to {value:?}, but only parts of the same body can be used");
    if name == "href" {
        return Ok(vec![value.trim().strip_prefix('#').ok_or_else(outside)?]);
    }
    value
        .split("url(")
        .skip(1)
        .map(|rest| {
            let inside = rest.split(')').next().unwrap_or_default();
            let inside = inside.trim_matches(|c: char| c.is_whitespace() || c == '"' || c == '\'');
            inside.strip_prefix('#').ok_or_else(outside)
        })
        .collect()
}
