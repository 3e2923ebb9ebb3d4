//! Which pages were dirty, one row a snapshot: for the terminal, and as SVG.

use std::path::Path;

use dirty_bitmap::DirtyBitmap;
use indicatif::BinaryBytes;
use svg::Document;
use svg::node::element::{Group, Line, Rectangle, Text, Title};

/// Slices of the RAM across the SVG; each terminal cell shows [`PER_CELL`] of them.
const SLICES: usize = 512;
const PER_CELL: usize = 8;

/// The dirty shares that the SVG explains the colors of.
const SCALE: [f64; 4] = [0.01, 0.1, 0.5, 1.0];

/// The dirty pages of all snapshots of a guest.
#[derive(Debug)]
pub(crate) struct Picture {
    ram: u64,
    /// Where the RAM goes on above a hole in the guest's addresses, as an offset into the RAM.
    gap: Option<u64>,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    name: String,
    /// The dirty share of each slice, from 0 to 1.
    shares: Vec<f64>,
}

impl Picture {
    pub(crate) fn new(ram: u64, gap: Option<u64>) -> Self {
        Self {
            ram,
            gap,
            rows: Vec::new(),
        }
    }

    /// Adds the row of one snapshot.
    pub(crate) fn add<K>(&mut self, name: &str, dirty: &DirtyBitmap<K>) {
        let mut bytes = vec![0; SLICES];
        for run in dirty.runs() {
            let mut at = run.start;
            while at < run.end {
                let slice = self.slice_of(at);
                let end = run.end.min(self.start_of(slice + 1));
                bytes[slice] += end - at;
                at = end;
            }
        }
        let share = |(slice, bytes): (usize, &u64)| {
            *bytes as f64 / (self.start_of(slice + 1) - self.start_of(slice)) as f64
        };
        let shares = bytes.iter().enumerate().map(share).collect();
        let name = name.to_owned();
        self.rows.push(Row { name, shares });
    }

    /// The first byte of a slice: rounded up, so that `slice_of` is its inverse.
    fn start_of(&self, slice: usize) -> u64 {
        (u128::from(self.ram) * slice as u128).div_ceil(SLICES as u128) as u64
    }

    fn slice_of(&self, offset: u64) -> usize {
        (u128::from(offset) * SLICES as u128 / u128::from(self.ram)) as usize
    }

    /// The rows for a terminal: a cell's height is the share of dirty pages in it.
    pub(crate) fn text(&self) -> String {
        let names = self.rows.iter().map(|row| row.name.len());
        let margin = names.max().unwrap_or(0);
        let mut text = String::new();
        for Row { name, shares } in &self.rows {
            let cells: String = shares.chunks(PER_CELL).map(cell).collect();
            text += &format!("{name:>margin$} │{cells}│\n");
        }
        let (end, width) = (BinaryBytes(self.ram).to_string(), SLICES / PER_CELL);
        let mut axis = format!("{:margin$} 0{end:>width$}", "");
        if let Some(gap) = self.gap {
            let cell = self.slice_of(gap) / PER_CELL;
            axis += &format!(
                "\n{:margin$}  {:cell$}╵ hole in the guest's addresses",
                "", ""
            );
        }
        text + &axis
    }

    /// Writes the rows as SVG.
    pub(crate) fn save(&self, path: &Path) -> std::io::Result<()> {
        const LEFT: usize = 90;
        const TOP: usize = 40;
        const CELL: usize = 2;
        const ROW: usize = 18;
        let (right, bottom) = (LEFT + SLICES * CELL, TOP + self.rows.len() * ROW);
        let text = |content: String, x: usize, y: usize, anchor: &str| {
            Text::new(content)
                .set("x", x)
                .set("y", y)
                .set("text-anchor", anchor)
        };
        let mut all = Group::new()
            .set("font-family", "sans-serif")
            .set("font-size", 12)
            .add(text(
                "Dirty pages of each snapshot, by their place in the RAM. The color is the share that is dirty:".into(),
                LEFT,
                24,
                "start",
            ))
            .add(text("0".into(), LEFT, bottom + 18, "start"))
            .add(text(
                BinaryBytes(self.ram).to_string(),
                right,
                bottom + 18,
                "end",
            ));
        for (number, share) in SCALE.into_iter().enumerate() {
            let x = right - (SCALE.len() - number) * 64;
            let swatch = Rectangle::new().set("x", x).set("y", 15).set("width", 16);
            all = all
                .add(swatch.set("height", 10).set("fill", color(share)))
                .add(text(format!("{:.0} %", share * 100.0), x + 22, 24, "start"));
        }
        for (number, row) in self.rows.iter().enumerate() {
            let y = TOP + number * ROW;
            let rectangle = |x: usize, width: usize, fill: String| {
                Rectangle::new()
                    .set("x", x)
                    .set("y", y)
                    .set("width", width)
                    .set("height", ROW - 2)
                    .set("fill", fill)
            };
            all = all
                .add(text(row.name.clone(), LEFT - 8, y + 12, "end"))
                .add(rectangle(LEFT, SLICES * CELL, "#f2f2f2".into()));
            let mut x = LEFT;
            for same in row.shares.chunk_by(|a, b| a == b) {
                let width = same.len() * CELL;
                if same[0] > 0.0 {
                    let share = Title::new(format!("{:.1} % dirty", same[0] * 100.0));
                    all = all.add(rectangle(x, width, color(same[0])).add(share));
                }
                x += width;
            }
        }
        if let Some(gap) = self.gap {
            let x = LEFT + self.slice_of(gap) * CELL;
            let line = Line::new()
                .set("x1", x)
                .set("x2", x)
                .set("y1", TOP - 6)
                .set("y2", bottom + 2)
                .set("stroke", "black")
                .set("stroke-dasharray", 3);
            all = all.add(line);
            all = all.add(text("hole".into(), x, bottom + 18, "middle"));
        }
        let document = Document::new()
            .set("viewBox", (0, 0, right + 20, bottom + 30))
            .set("width", right + 20)
            .set("style", "background: white")
            .add(all);
        svg::save(path, &document)
    }
}

/// The square root, so that a few pages are seen beside many.
fn visible(share: f64) -> f64 {
    share.sqrt()
}

fn cell(shares: &[f64]) -> char {
    const LEVELS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let share = shares.iter().sum::<f64>() / shares.len() as f64;
    // Rounded up: one page of a terabyte shows.
    LEVELS[(visible(share) * 8.0).ceil() as usize]
}

/// From a light orange to a dark red.
fn color(share: f64) -> String {
    let strength = visible(share);
    let fade = |from: f64, to: f64| from + (to - from) * strength;
    let (red, green, blue) = (fade(255.0, 150.0), fade(215.0, 10.0), fade(160.0, 20.0));
    format!("rgb({red:.0},{green:.0},{blue:.0})")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(gap: Option<u64>, dirty: &[(u64, u64)]) -> Picture {
        let bitmap = DirtyBitmap::new(0, 8 << 20, 4096).unwrap();
        for (start, len) in dirty {
            bitmap.mark_range(*start, *len).unwrap();
        }
        let mut picture = Picture::new(8 << 20, gap);
        picture.add("round 1", &bitmap);
        picture
    }

    #[test]
    fn a_single_dirty_page_is_seen_and_a_clean_slice_is_blank() {
        let text = picture(None, &[(0, 1), (4 << 20, 4 << 20)]).text();
        let row = text.lines().next().unwrap();
        let expected = format!("round 1 │▂{}{}│", " ".repeat(31), "█".repeat(32));
        assert_eq!(row, expected);
    }

    #[test]
    fn the_svg_shows_every_row_and_the_hole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dirty.svg");
        picture(Some(6 << 20), &[(0, 1)]).save(&path).unwrap();
        let mut content = String::new();
        let parsed = svg::open(&path, &mut content).unwrap();
        assert!(
            !parsed
                .into_iter()
                .any(|event| matches!(event, svg::parser::Event::Error(_)))
        );
        assert!(content.contains("round 1") && content.contains("hole"));
        assert!(content.contains("% dirty"));
        for share in SCALE {
            assert!(content.contains(&color(share)), "{share} is explained");
        }
    }
}
