//! The map as text.

use console::{Term, style};

use crate::verbs::map::PageMap;
use crate::verbs::map::cells::{Cell, Picture, visible};

/// The most lines of one image.
const LINES: u64 = 16;
/// The columns without a terminal.
const COLUMNS: usize = 80;
/// The characters for the levels of a cell.
const LEVELS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// The colors for the levels, from pale yellow to red, of the 256 colors of terminals.
const COLORS: [u8; 9] = [230, 229, 222, 216, 215, 209, 203, 197, 196];
const ZERO: char = '·';
/// A steel blue.
const ZERO_COLOR: u8 = 67;

pub(super) fn text(maps: &[PageMap], width: Option<usize>) -> String {
    let terminal = || Term::stdout().size_checked();
    let width = width.or_else(|| Some(terminal()?.1.into()));
    let picture = fit(maps, width.unwrap_or(COLUMNS));
    let margin = margin(&picture);
    let mut text = String::new();
    for line in &picture.lines {
        let cells = row(&line.cells);
        let blank = " ".repeat(picture.columns() - line.cells.len());
        text += &format!("{:>margin$} │{cells}{blank}│\n", line.label);
    }
    let zero = style(ZERO).color256(ZERO_COLOR);
    let levels = LEVELS.iter().zip(COLORS).skip(1);
    let levels: String = levels
        .map(|(level, color)| style(level).color256(color).to_string())
        .collect();
    text + &format!(
        "{:margin$}  {}\n{:margin$}  {} a page to all present, {zero} zero (raw: a hole), blank clean",
        "",
        picture.title(),
        "",
        levels
    )
}

/// Draws as many cells as fit beside the labels.
fn fit(maps: &[PageMap], width: usize) -> Picture {
    let picture = |columns: usize| match maps {
        // A power of two, so that lines begin at round numbers.
        [one] => Picture::of_one(one, 1 << columns.ilog2(), LINES),
        several => Picture::of_several(several, columns as u64),
    };
    let room = |margin: usize| width.saturating_sub(margin + 3).max(8);
    // The labels depend on the cells, but their width hardly does.
    let labels = margin(&picture(room(10)));
    picture(room(labels))
}

fn margin(picture: &Picture) -> usize {
    let labels = picture.lines.iter().map(|line| line.label.chars().count());
    labels.max().unwrap_or(0)
}

/// Returns the character and color of a cell: its share of present pages, or a mark for zeros.
fn glyph(cell: &Cell) -> (char, Option<u8>) {
    if cell.present > 0.0 {
        // Rounded up: one page of a terabyte shows.
        let level = (visible(cell.present) * 8.0).ceil() as usize;
        return (LEVELS[level], Some(COLORS[level]));
    }
    match cell.zero > 0.0 {
        true => (ZERO, Some(ZERO_COLOR)),
        false => (' ', None),
    }
}

fn row(cells: &[Cell]) -> String {
    let glyphs: Vec<_> = cells.iter().map(glyph).collect();
    let same_color = glyphs.chunk_by(|a, b| a.1 == b.1);
    let piece = |same: &[(char, Option<u8>)]| {
        let text: String = same.iter().map(|(glyph, _)| glyph).collect();
        match same[0].1 {
            Some(color) => style(text).color256(color).to_string(),
            None => text,
        }
    };
    same_color.map(piece).collect()
}
