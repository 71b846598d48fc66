//! Plots of a run's losses, and grids of pictures with text.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde::Deserialize;

use crate::data::{Image, grid, save_png};
use crate::error::{Error, Result};

/// Size of a panel of curves in pixels; NAMES is the width of its legend.
const PANEL: (u32, u32) = (880, 420);
const NAMES: u32 = 170;
/// The moving average spans one in this many of a curve's points.
const SMOOTH: usize = 40;
/// Ratio of the largest to the smallest value above which an axis is logarithmic.
const DECADES: f64 = 100.0;
/// Width of a cell in pixels, unless its picture is wider; smaller pictures are enlarged towards it.
const CELL: usize = 168;
const GAP: usize = 14;
/// Text size of captions, and the distance of their lines.
const TEXT: u32 = 14;
const LINE: usize = 18;
const COLOURS: [RGBColor; 14] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(255, 127, 14),
    RGBColor(148, 103, 189),
    RGBColor(23, 160, 175),
    RGBColor(140, 86, 75),
    RGBColor(227, 119, 194),
    RGBColor(127, 127, 127),
    RGBColor(172, 173, 34),
    RGBColor(20, 60, 110),
    RGBColor(120, 20, 30),
    RGBColor(20, 90, 40),
    RGBColor(90, 50, 120),
];

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
type Painted<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;
/// Values by step.
type Curve = BTreeMap<u64, f64>;

/// The fields of a line of `metrics.jsonl` that are plotted.
#[derive(Deserialize)]
struct Line {
    stage: String,
    step: u64,
    #[serde(default)]
    loss: BTreeMap<String, serde_json::Value>,
    #[serde(default)]
    eval: BTreeMap<String, serde_json::Value>,
}

/// The curves of one stage.
struct Panel {
    stage: String,
    last: u64,
    loss: BTreeMap<String, Curve>,
    eval: BTreeMap<String, Curve>,
}

/// Plots the losses of a metrics file to `losses.png`; if that fails, logs a warning.
pub(crate) fn plot(metrics: &Path, out: &Path) {
    let path = out.join("losses.png");
    if let Err(e) = loss_curves(metrics, &path) {
        tracing::warn!("{} could not be drawn: {e}", path.display());
    }
}

/// Plots the losses of a `metrics.jsonl` over the steps to a PNG, with one panel per stage: every value in a light
/// colour, and the moving average in a strong one. Values of `eval` are marked with circles.
///
/// Axes are logarithmic if values span more than two decades. Non-finite values and lines that are not metrics are
/// ignored; a file without any stage is an error.
pub fn loss_curves(metrics: &Path, out: &Path) -> Result<()> {
    let text = std::fs::read_to_string(metrics).map_err(Error::io(metrics))?;
    let panels = panels(&text);
    if panels.is_empty() {
        return Err(Error::data(metrics, "holds no step of any stage; name the metrics.jsonl of a run"));
    }
    let names: BTreeSet<&String> = panels.iter().flat_map(|p| p.loss.keys().chain(p.eval.keys())).collect();
    let colours: BTreeMap<&String, RGBColor> = names.into_iter().zip(COLOURS.into_iter().cycle()).collect();
    let columns = panels.len().min(2);
    let rows = panels.len().div_ceil(columns);
    let (width, height) = (PANEL.0 as usize * columns, PANEL.1 as usize * rows);
    paint(Image::filled(height, width, 1.0), out, |root| {
        for (panel, area) in panels.iter().zip(root.split_evenly((rows, columns))) {
            panel.draw(&area, &colours)?;
        }
        Ok(())
    })
}

/// Draws rows of pictures to a PNG, each enlarged by a whole factor if it is small, with its text below. The text is
/// wrapped and keeps its line breaks.
pub fn labelled_grid(rows: &[Vec<(Image, String)>], out: &Path) -> Result<()> {
    let images = || rows.iter().flatten().map(|(image, _)| image);
    images().try_for_each(|image| image.check("labelled_grid"))?;
    let largest = images().map(|i| i.height.max(i.width)).max();
    let Some(largest) = largest else {
        return Err(Error::arg("labelled_grid", "rows", "empty", "at least one picture"));
    };
    let factor = (CELL / largest).max(1);
    let width = CELL.max(largest * factor);
    register()?;
    let mut cells: Vec<Vec<Image>> = Vec::new();
    let mut lines: Vec<(usize, usize, String)> = Vec::new();
    let mut top = GAP;
    for row in rows {
        let below = row.iter().map(|(image, _)| image.height * factor).max().unwrap_or(0);
        let texts: Vec<Vec<String>> = row.iter().map(|(_, text)| wrap(text, width)).collect();
        let deepest = texts.iter().map(Vec::len).max().unwrap_or(0);
        let height = below + 8 + deepest * LINE;
        for (column, text) in texts.into_iter().enumerate() {
            let left = GAP + column * (width + GAP);
            lines.extend(text.into_iter().enumerate().map(|(i, t)| (left, top + below + 8 + i * LINE, t)));
        }
        cells.push(row.iter().map(|(image, _)| enlarged(image, factor, height, width)).collect());
        top += height + GAP;
    }
    let cells: Vec<Vec<&Image>> = cells.iter().map(|row| row.iter().collect()).collect();
    paint(grid(&cells, GAP)?, out, |root| {
        for (x, y, line) in &lines {
            root.draw(&Text::new(line.as_str(), (*x as i32, *y as i32), font(TEXT)))?;
        }
        Ok(())
    })
}

/// A white picture with `image`, enlarged by `factor`, at its top left.
fn enlarged(image: &Image, factor: usize, height: usize, width: usize) -> Image {
    let mut out = Image::filled(height, width, 1.0);
    for y in 0..image.height * factor {
        for x in 0..image.width * factor {
            let from = ((y / factor) * image.width + x / factor) * 3;
            out.pixels[(y * width + x) * 3..][..3].copy_from_slice(&image.pixels[from..from + 3]);
        }
    }
    out
}

/// Wraps text to `width` pixels, between words, or inside words that are wider on their own.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let fits = |line: &str| {
        let size = ("sans-serif", TEXT).into_font().box_size(line);
        size.is_ok_and(|(w, _)| w as usize <= width)
    };
    let mut lines = Vec::new();
    for paragraph in text.trim_end().lines() {
        let mut line = String::new();
        for word in paragraph.split_whitespace() {
            let longer = if line.is_empty() { word.into() } else { format!("{line} {word}") };
            if fits(&longer) {
                line = longer;
                continue;
            }
            if !line.is_empty() {
                lines.push(std::mem::take(&mut line));
            }
            for letter in word.chars() {
                line.push(letter);
                if line.len() > letter.len_utf8() && !fits(&line) {
                    line.pop();
                    lines.push(std::mem::replace(&mut line, letter.into()));
                }
            }
        }
        lines.push(line);
    }
    lines
}

/// Registers the font with the plotting library.
fn register() -> Result<()> {
    register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| Error::arg("plots", "font", "DejaVu Sans", "a font that can be read"))
}

fn font(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&RGBColor(40, 40, 40))
}

/// Draws on a picture and saves it.
fn paint(on: Image, out: &Path, draw: impl FnOnce(&Area) -> Painted) -> Result<()> {
    register()?;
    let mut rgb = on.to_u8();
    let size = (on.width as u32, on.height as u32);
    let root = BitMapBackend::with_buffer(&mut rgb, size).into_drawing_area();
    draw(&root)
        .and_then(|()| Ok(root.present()?))
        .map_err(|e| Error::data(out, format!("this picture cannot be drawn ({e})")))?;
    drop(root);
    save_png(out, &Image::from_u8(on.height, on.width, &rgb)?)
}

/// The stages of a metrics file in order. A stage that starts again gets another panel; for repeated steps, the last
/// values count.
fn panels(text: &str) -> Vec<Panel> {
    let mut panels: Vec<Panel> = Vec::new();
    for line in text.lines().filter_map(|l| serde_json::from_str::<Line>(l).ok()) {
        let goes_on = panels.last().is_some_and(|p| p.stage == line.stage && (line.step > 0 || p.last == 0));
        if !goes_on {
            let (loss, eval) = (BTreeMap::new(), BTreeMap::new());
            panels.push(Panel { stage: line.stage.clone(), last: 0, loss, eval });
        }
        let Some(panel) = panels.last_mut() else { continue };
        panel.last = line.step;
        for (curves, values) in [(&mut panel.loss, &line.loss), (&mut panel.eval, &line.eval)] {
            for (name, value) in values {
                if let Some(value) = value.as_f64().filter(|v| v.is_finite()) {
                    curves.entry(name.clone()).or_default().insert(line.step, value);
                }
            }
        }
    }
    panels
}

impl Panel {
    fn draw(&self, area: &Area, colours: &BTreeMap<&String, RGBColor>) -> Painted {
        let (left, right) = area.split_horizontally(PANEL.0 - NAMES);
        let curves = || self.loss.values().chain(self.eval.values());
        let steps = || curves().flat_map(|c| c.keys().copied());
        let Some(y) = Axis::new(curves().flat_map(|c| c.values().copied()).collect()) else {
            let middle = ((PANEL.0 / 2) as i32, (PANEL.1 / 2) as i32);
            let centred = font(18).pos(Pos::new(HPos::Center, VPos::Center));
            let text = format!("stage {}: no losses", self.stage);
            return Ok(area.draw(&Text::new(text, middle, centred))?);
        };
        let (first, last) = (steps().min().unwrap_or(0) as f64, steps().max().unwrap_or(0) as f64);
        let apart = if first < last { 0.0 } else { 1.0 };
        let x = Axis { scale: Scale::Steps, low: first - apart, high: last + apart };
        let label = if y.scale == Scale::Log { "loss, logarithmic" } else { "loss" };

        let mut chart = ChartBuilder::on(&left)
            .caption(format!("stage {}", self.stage), font(20))
            .margin(10)
            .x_label_area_size(46)
            .y_label_area_size(72)
            .build_cartesian_2d(x, y)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(RGBColor(225, 225, 225))
            .axis_style(RGBColor(120, 120, 120))
            .label_style(font(14))
            .axis_desc_style(font(15))
            .x_desc("step")
            .y_desc(label)
            .draw()?;
        let colour = |name: &String| colours.get(name).copied().unwrap_or(BLACK);
        let points =
            |curve: &Curve| -> Vec<(f64, f64)> { curve.iter().map(|(&step, &v)| (step as f64, v)).collect() };
        for (name, curve) in &self.loss {
            chart.draw_series(LineSeries::new(points(curve), colour(name).mix(0.3)))?;
        }
        for (name, curve) in &self.loss {
            let points = points(&smooth(curve));
            match points.len() {
                1 => chart.draw_series(points.iter().map(|&p| Circle::new(p, 3, colour(name).filled())))?,
                _ => chart.draw_series(LineSeries::new(points, colour(name).stroke_width(2)))?,
            };
        }
        for (name, curve) in &self.eval {
            let points = points(curve);
            chart.draw_series(LineSeries::new(points.iter().copied(), colour(name).mix(0.5)))?;
            chart.draw_series(points.iter().map(|&p| Circle::new(p, 4, colour(name).stroke_width(2))))?;
        }

        let held_out = self.eval.keys().map(|name| (name, true));
        for (i, (name, held_out)) in self.loss.keys().map(|n| (n, false)).chain(held_out).enumerate() {
            let y = 52 + 22 * i as i32;
            if held_out {
                right.draw(&Circle::new((14, y), 4, colour(name).stroke_width(2)))?;
            } else {
                right.draw(&Rectangle::new([(4, y - 1), (24, y + 1)], colour(name).filled()))?;
            }
            let name = if held_out { format!("{name}, held out") } else { name.clone() };
            let name = wrap(&name, NAMES as usize - 36).into_iter().next().unwrap_or_default();
            right.draw(&Text::new(name, (32, y), font(14).pos(Pos::new(HPos::Left, VPos::Center))))?;
        }
        Ok(())
    }
}

/// The moving average of a curve; the window is shorter at its ends.
fn smooth(curve: &Curve) -> Curve {
    let values: Vec<f64> = curve.values().copied().collect();
    let half = values.len() / SMOOTH / 2;
    let average = |i: usize| {
        let near = &values[i.saturating_sub(half)..(i + half + 1).min(values.len())];
        near.iter().sum::<f64>() / near.len() as f64
    };
    curve.keys().enumerate().map(|(i, &step)| (step, average(i))).collect()
}

/// How an axis maps values.
#[derive(Clone, Copy, PartialEq)]
enum Scale {
    /// Linear; ticks are whole numbers from 0.
    Steps,
    Linear,
    Log,
}

/// An axis. Its ends are values, or their decimal logarithms if the axis is logarithmic.
struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
}

impl Axis {
    /// An axis that shows all values, except for a few extreme ones if there are many; `None` without values.
    fn new(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let spare = values.len() / 200;
        let (low, high) = (*values.get(spare)?, *values.get(values.len() - 1 - spare)?);
        let log = values[0] > 0.0 && high / low > DECADES;
        let (low, high) = if log { (low.log10(), high.log10()) } else { (low, high) };
        let pad = match high > low {
            true => 0.05 * (high - low),
            false => 0.1 * high.abs().max(0.1),
        };
        let scale = if log { Scale::Log } else { Scale::Linear };
        Some(Axis { scale, low: low - pad, high: high + pad })
    }

    /// The value at a position of the axis.
    fn value(&self, place: f64) -> f64 {
        if self.scale == Scale::Log { 10f64.powf(place) } else { place }
    }

    /// Round values for ticks.
    fn ticks(&self) -> Vec<f64> {
        match self.scale {
            Scale::Linear => return ticks(self.low, self.high),
            Scale::Steps => {
                let whole = |v: &f64| *v >= 0.0 && v.fract() == 0.0;
                return ticks(self.low, self.high).into_iter().filter(whole).collect();
            }
            Scale::Log => {}
        }
        let decades = self.low.floor() as i32..=self.high.ceil() as i32;
        let within: &[f64] = if self.high - self.low < 4.0 { &[1.0, 3.0] } else { &[1.0] };
        let places = decades.flat_map(|d| within.iter().map(move |m| f64::from(d) + m.log10()));
        places.filter(|p| (self.low..=self.high).contains(p)).map(|p| self.value(p)).collect()
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    /// Values beyond an end are clamped to it.
    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let place = if self.scale == Scale::Log { value.log10() } else { *value }.clamp(self.low, self.high);
        let share = (place - self.low) / (self.high - self.low);
        from + (f64::from(to - from) * share).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks() }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.value(self.low)..self.value(self.high)
    }
}

impl ValueFormatter<f64> for Axis {
    fn format(value: &f64) -> String {
        number(*value)
    }
}

/// About five round numbers in an interval.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let unit = 10f64.powf(rough.log10().floor());
    let step = unit
        * match rough / unit {
            r if r < 1.5 => 1.0,
            r if r < 3.5 => 2.0,
            r if r < 7.5 => 5.0,
            _ => 10.0,
        };
    let (first, last) = ((low / step).ceil(), (high / step).floor());
    // Close to the largest floats there may be no such steps.
    let count = if (last - first).is_finite() { (last - first) as usize + 1 } else { 0 };
    (0..count).map(|i| (first + i as f64) * step).collect()
}

/// The label of a number.
fn number(v: f64) -> String {
    match v.abs() {
        a if a != 0.0 && !(1e-4..1e6).contains(&a) => format!("{v:.0e}"),
        _ => format!("{}", (v * 1e6).round() / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Philox;

    struct Folder(std::path::PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("ett-plots-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&dir);
            std::fs::create_dir_all(&dir).unwrap();
            Folder(dir)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn curves(dir: &Folder, text: &str) -> Result<Image> {
        let (metrics, out) = (dir.0.join("metrics.jsonl"), dir.0.join("out.png"));
        std::fs::write(&metrics, text).unwrap();
        loss_curves(&metrics, &out)?;
        Image::open(out)
    }

    /// Number of pixels with exactly this colour.
    fn count(image: &Image, colour: RGBColor) -> usize {
        image.to_u8().chunks(3).filter(|p| *p == [colour.0, colour.1, colour.2]).count()
    }

    fn line(stage: &str, step: usize, rest: &str) -> String {
        format!("{{\"stage\": \"{stage}\", \"step\": {step}, {rest}}}\n")
    }

    #[test]
    fn every_stage_has_a_panel_and_every_loss_a_curve() {
        let dir = Folder::new("stages");
        let mut rng = Philox::new(1, 0);
        let mut text = String::from("not a line of metrics\n{\"other\": 1}\n");
        for step in 0..300 {
            let falling = 30.0 * (-0.03 * step as f64).exp() + 0.01;
            let noise = 1.0 + 0.2 * rng.normal();
            let loss = format!("\"loss\": {{\"cap\": {}, \"rec\": {}}}", falling * noise, 0.3 * noise);
            text += &line("semantic", step, &loss);
            if step % 100 == 99 {
                text += &line("semantic", step, "\"eval\": {\"cap first\": 0.7}");
            }
        }
        let one = curves(&dir, &text).unwrap();
        assert_eq!((one.width, one.height), (880, 420));
        // The names in order: cap, cap first, rec.
        for colour in &COLOURS[..3] {
            assert!(count(&one, *colour) > 40, "{colour:?} has {} pixels", count(&one, *colour));
        }
        text += &line("chat", 0, "\"loss\": {\"cap\": 1.5}");
        text += &line("align", 0, "\"loss\": {}");
        let three = curves(&dir, &text).unwrap();
        assert_eq!((three.width, three.height), (2 * 880, 2 * 420));
    }

    #[test]
    fn few_or_strange_values_are_drawn_too() {
        let dir = Folder::new("few");
        let one = curves(&dir, &line("text", 0, "\"loss\": {\"cap\": 2.0}")).unwrap();
        assert!(count(&one, COLOURS[0]) > 20, "one point is not seen");
        let none = curves(&dir, &line("text", 0, "\"loss\": {\"cap\": null}")).unwrap();
        assert_eq!(count(&none, COLOURS[0]), 0);
        for losses in ["0.0", "-3.5", "1e300", "1e-300", "null", "\"x\""] {
            let lines = [losses, "1.0", losses, "2.0"].map(|v| format!("\"loss\": {{\"cap\": {v}}}"));
            let text: String = lines.iter().enumerate().map(|(i, l)| line("text", i, l)).collect();
            assert!(count(&curves(&dir, &text).unwrap(), COLOURS[0]) > 20, "{losses}");
        }
        let e = curves(&dir, "nothing\n").unwrap_err().to_string();
        assert!(e.contains("metrics.jsonl: holds no step of any stage"), "{e}");
        assert!(loss_curves(&dir.0.join("absent"), &dir.0.join("out.png")).is_err());
    }

    #[test]
    fn a_stage_that_begins_anew_is_another_and_repeated_steps_are_replaced() {
        let text: String =
            [("text", 0, 1.0), ("text", 1, 2.0), ("text", 1, 3.0), ("text", 2, 4.0), ("text", 0, 5.0)]
                .map(|(stage, step, v)| line(stage, step, &format!("\"loss\": {{\"cap\": {v}}}")))
                .concat();
        let all = panels(&text);
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].loss["cap"], Curve::from([(0, 1.0), (1, 3.0), (2, 4.0)]));
        assert_eq!(all[1].loss["cap"], Curve::from([(0, 5.0)]));
    }

    #[test]
    fn axes_are_round_and_logarithmic_where_values_span_decades() {
        assert_eq!(ticks(0.0, 10.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(-0.1, 0.35).len(), 5);
        let axis = Axis::new(vec![0.01, 5.0, 0.5]).unwrap();
        assert!(axis.scale == Scale::Log);
        for values in [vec![0.01, 0.9], vec![-0.01, 5.0]] {
            assert!(Axis::new(values).unwrap().scale == Scale::Linear);
        }
        let labels: Vec<String> = axis.ticks().into_iter().map(number).collect();
        assert_eq!(labels, ["0.01", "0.03", "0.1", "0.3", "1", "3"]);
        assert_eq!((number(0.0), number(2e7), number(-0.25)), ("0".into(), "2e7".into(), "-0.25".into()));
        assert!(Axis::new(vec![]).is_none());
        let flat = Axis::new(vec![2.0]).unwrap();
        assert!(flat.low < 2.0 && flat.high > 2.0);
        let average = smooth(&(0..400).map(|i| (i, f64::from(i as u32 % 2))).collect());
        assert!(average.values().skip(5).take(390).all(|v| (v - 0.5).abs() < 0.1));
    }

    #[test]
    fn pictures_stand_above_their_wrapped_text() {
        let dir = Folder::new("grid");
        let out = dir.0.join("out.png");
        let long =
            "three small purple triangles on the left, said twice: three small purple triangles on the left";
        let rows = vec![
            vec![
                (Image::filled(32, 32, -0.5), long.to_string()),
                (Image::filled(16, 24, 0.0), String::new()),
            ],
            vec![(Image::filled(32, 32, 0.5), "held out\nsaid: a".to_string())],
        ];
        labelled_grid(&rows, &out).unwrap();
        let image = Image::open(&out).unwrap();
        assert_eq!(image.width, GAP + 2 * (CELL + GAP));
        // 32 pixels are enlarged to 160, by a factor of five.
        let dark = image.to_u8().chunks(3).filter(|p| *p == [64, 64, 64]).count();
        assert!((160 * 160..160 * 160 + 500).contains(&dark), "{dark}");
        let lines = wrap(long, CELL);
        assert!(lines.len() >= 4, "{lines:?}");
        assert_eq!(lines.join(" "), long);
        assert!(wrap(&"w".repeat(100), CELL).len() > 3);
        assert_eq!(wrap("a\n\nb", CELL), ["a", "", "b"]);
        assert!(labelled_grid(&[], &out).unwrap_err().to_string().contains("at least one picture"));
        let broken = Image { pixels: vec![0.0; 2], ..Image::filled(4, 4, 0.0) };
        assert!(labelled_grid(&[vec![(broken, String::new())]], &out).is_err());
    }
}
