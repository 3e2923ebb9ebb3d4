//! The guest's work rate over time: for the terminal, and as SVG.

use std::path::Path;
use std::time::Duration;

use indicatif::{BinaryBytes, HumanCount};
use svg::Document;
use svg::node::element::{Group, Polygon, Rectangle, Text};

use super::capture::{Capture, Times};
use super::table::microseconds;

/// The columns of the terminal's chart, and the lines of each method.
const COLUMNS: u32 = 72;
const LINES: usize = 3;

/// What the guest and the snapshot do at a time: the sign below the chart, the color in the SVG,
/// and what both mean.
const PHASES: [(char, &str, &str); 4] = [
    ('·', "#ffffff", "the guest works"),
    ('p', "#fde9c8", "the snapshot is prepared"),
    ('X', "#d9534f", "the guest is paused"),
    ('w', "#d3e8f8", "the image is written"),
];

/// Returns the index in [`PHASES`] of what happens between two times. A pause is always shown.
fn phase(times: Times, from: Duration, to: Duration) -> usize {
    if from <= times.resumed && to > times.stopped {
        2
    } else if to <= times.begun || from > times.durable {
        0
    } else if to <= times.stopped {
        1
    } else {
        3
    }
}

/// The scale that all methods share.
struct Scale {
    /// The time of a column.
    column: Duration,
    /// The rate at the top.
    top: f64,
}

impl Scale {
    fn new(captures: &[Capture], columns: u32) -> Self {
        let longest = captures.iter().map(|it| it.samples.end()).max();
        let column = (longest.unwrap_or_default() / columns).max(Duration::from_millis(1));
        let mut scale = Self { column, top: 1.0 };
        let rates = captures.iter().flat_map(|capture| scale.rates(capture));
        scale.top = rates.fold(1.0, f64::max);
        scale
    }

    /// Returns the times at which the columns of a capture begin and end.
    fn columns(&self, capture: &Capture) -> impl Iterator<Item = (Duration, Duration)> + use<> {
        let (column, end) = (self.column, capture.samples.end());
        (0..)
            .map(move |number| (column * number, column * (number + 1)))
            .take_while(move |(_, to)| *to <= end)
    }

    fn rates(&self, capture: &Capture) -> Vec<f64> {
        let columns = self.columns(capture);
        columns
            .map(|(from, to)| capture.samples.rate(from, to))
            .collect()
    }
}

/// Returns the chart for a terminal.
pub(super) fn text(captures: &[Capture]) -> String {
    const LEVELS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let scale = Scale::new(captures, COLUMNS);
    let mut text = format!(
        "Work rate of the guest; a column is {} ms, the full height {} ledger entries per second.\n",
        scale.column.as_millis(),
        HumanCount(scale.top as u64)
    );
    for (sign, _, meaning) in PHASES {
        text += &format!("{sign} {meaning}  ");
    }
    for capture in captures {
        text += &format!(
            "\n{} (pause {})\n",
            capture.report.method,
            microseconds(capture.pause)
        );
        let rates = scale.rates(capture);
        for line in (0..LINES).rev() {
            let cell = |rate: &f64| {
                let eighths = (rate / scale.top * (LINES * 8) as f64).round() as usize;
                LEVELS[eighths.saturating_sub(line * 8).min(8)]
            };
            text += &format!("│{}│\n", rates.iter().map(cell).collect::<String>());
        }
        let signs = scale.columns(capture);
        let signs = signs.map(|(from, to)| PHASES[phase(capture.times, from, to)].0);
        text += &format!(" {}", signs.collect::<String>());
    }
    text
}

const LEFT: u32 = 20;
const TOP: u32 = 60;
/// The columns of the SVG, of a pixel each.
const WIDTH: u32 = 900;
const HEIGHT: f64 = 100.0;
const PANEL: u32 = 150;

/// Writes the chart as SVG.
pub(super) fn save(captures: &[Capture], ram: u64, path: &Path) -> std::io::Result<()> {
    // A column of the terminal is the mean of many samples; a pixel would be noise.
    let scale = Scale::new(captures, WIDTH / 4);
    let pixels = f64::from(WIDTH) / scale.column.as_secs_f64() / f64::from(WIDTH / 4);
    let x = |time: Duration| f64::from(LEFT) + time.as_secs_f64() * pixels;
    let title = format!(
        "Work rate of a KVM guest with {} of RAM during live snapshots (full height: {} ledger entries per second)",
        BinaryBytes(ram),
        HumanCount(scale.top as u64)
    );
    let mut all = Group::new()
        .set("font-family", "sans-serif")
        .set("font-size", 12)
        .add(label(title, LEFT.into(), 20.0));
    for (at, (_, color, meaning)) in (0_u32..).zip(PHASES).skip(1) {
        let left = LEFT + (at - 1) * 200;
        let swatch = rectangle(left.into(), 32.0, 16.0, 10.0, color);
        all = all
            .add(swatch)
            .add(label(meaning.into(), f64::from(left) + 22.0, 41.0));
    }
    for (number, capture) in (0_u32..).zip(captures) {
        let top = f64::from(TOP + number * PANEL);
        let base = top + 20.0 + HEIGHT;
        let times = capture.times;
        let spans = [
            (times.begun, times.stopped, 1),
            (times.resumed, times.durable, 3),
            (times.stopped, times.resumed, 2),
        ];
        let name = format!(
            "{}: pause {}",
            capture.report.method,
            microseconds(capture.pause)
        );
        all = all.add(label(name, LEFT.into(), top + 12.0));
        for (from, to, phase) in spans {
            let width = (x(to) - x(from)).max(1.0);
            all = all.add(rectangle(
                x(from),
                top + 20.0,
                width,
                HEIGHT,
                PHASES[phase].1,
            ));
        }
        let mut points = format!("{LEFT},{base}");
        let mut last = Duration::ZERO;
        for ((from, to), rate) in scale.columns(capture).zip(scale.rates(capture)) {
            let y = base - rate / scale.top * HEIGHT;
            points += &format!(" {:.1},{y:.1} {:.1},{y:.1}", x(from), x(to));
            last = to;
        }
        points += &format!(" {:.1},{base}", x(last));
        let area = Polygon::new().set("points", points);
        let line = rectangle(LEFT.into(), base, WIDTH.into(), 1.0, "#808080");
        all = all
            .add(area.set("fill", "#0072b2").set("fill-opacity", 0.55))
            .add(line);
        let end = format!("{:.1} s", capture.samples.end().as_secs_f64());
        all = all.add(label(end, x(capture.samples.end()) - 24.0, base + 14.0));
    }
    let (width, height) = (LEFT * 2 + WIDTH, TOP + PANEL * captures.len() as u32);
    let document = Document::new()
        .set("viewBox", (0, 0, width, height))
        .set("width", width)
        .set("style", "background: white")
        .add(all);
    svg::save(path, &document)
}

fn label(content: String, x: f64, y: f64) -> Text {
    Text::new(content).set("x", x).set("y", y)
}

fn rectangle(x: f64, y: f64, width: f64, height: f64, color: &str) -> Rectangle {
    Rectangle::new()
        .set("x", x)
        .set("y", y)
        .set("width", width)
        .set("height", height)
        .set("fill", color)
}
