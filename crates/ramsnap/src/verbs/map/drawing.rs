//! The map as SVG and PNG.

use svg::Document;
use svg::node::element::{Group, Rectangle, Text, Title};

use crate::verbs::map::PageMap;
use crate::verbs::map::cells::{Cell, Picture, visible};

/// The cells in a line, and the lines of one image.
const COLUMNS: u64 = 256;
const LINES: u64 = 64;
/// The size of a cell and of the gap below a line, in pixels.
const WIDTH: usize = 4;
const HEIGHT: usize = 12;
const GAP: usize = 2;
/// The margins of a drawing with labels.
const LEFT: usize = 130;
const TOP: usize = 48;
const BELOW: usize = 16;

type Color = [u8; 3];
const CLEAN: Color = [242, 242, 242];
const ZERO: Color = [190, 210, 232];
/// The colors of a cell with a few pages, and with all pages.
const FEW: Color = [255, 215, 160];
const ALL: Color = [150, 10, 20];

pub(super) fn fit(maps: &[PageMap]) -> Picture {
    match maps {
        [one] => Picture::of_one(one, COLUMNS, LINES),
        several => Picture::of_several(several, COLUMNS),
    }
}

pub(super) fn svg(picture: &Picture) -> anyhow::Result<Vec<u8>> {
    let right = LEFT + picture.columns() * WIDTH;
    let text = |content: &str, x: usize, y: usize| Text::new(content).set("x", x).set("y", y);
    let title = format!("Pages by their place in the RAM: {}", picture.title());
    let mut all = Group::new()
        .set("font-family", "sans-serif")
        .set("font-size", 11)
        .add(text(&title, LEFT, 16));
    for (number, (name, cell)) in legend().into_iter().enumerate() {
        let x = LEFT + number * 130;
        all = all
            .add(rectangle(x, 24, 16, 10, color(&cell)))
            .add(text(name, x + 22, 33));
    }
    for (number, line) in picture.lines.iter().enumerate() {
        let y = TOP + number * (HEIGHT + GAP);
        let label = text(&line.label, LEFT - 8, y + HEIGHT - 2);
        all = all.add(label.set("text-anchor", "end"));
        let mut at = 0;
        for same in line.cells.chunk_by(|a, b| a == b) {
            let Cell { present, zero } = same[0];
            let (present, zero) = (present * 100.0, zero * 100.0);
            let what = Title::new(format!("{present:.1} % present, {zero:.1} % zero"));
            let (x, width) = (LEFT + at * WIDTH, same.len() * WIDTH);
            all = all.add(rectangle(x, y, width, HEIGHT, color(&same[0])).add(what));
            at += same.len();
        }
    }
    let bottom = TOP + picture.lines.len() * (HEIGHT + GAP) + BELOW;
    // The legend may be wider than the RAM.
    let right = right.max(LEFT + legend().len() * 130) + BELOW;
    let document = Document::new()
        .set("viewBox", (0, 0, right, bottom))
        .set("width", right)
        .set("style", "background: white")
        .add(all);
    let mut bytes = Vec::new();
    svg::write(&mut bytes, &document)?;
    Ok(bytes)
}

fn legend() -> [(&'static str, Cell); 5] {
    let cell = |present, zero| Cell { present, zero };
    [
        ("all present", cell(1.0, 0.0)),
        ("a tenth present", cell(0.1, 0.0)),
        ("a page or two", cell(0.001, 0.0)),
        ("zero, or a raw hole", cell(0.0, 1.0)),
        ("clean", cell(0.0, 0.0)),
    ]
}

fn rectangle(x: usize, y: usize, width: usize, height: usize, color: Color) -> Rectangle {
    let [red, green, blue] = color;
    Rectangle::new()
        .set("x", x)
        .set("y", y)
        .set("width", width)
        .set("height", height)
        .set("fill", format!("rgb({red},{green},{blue})"))
}

/// Draws the cells as PNG, without text.
pub(super) fn png(picture: &Picture) -> anyhow::Result<Vec<u8>> {
    let width = picture.columns() * WIDTH;
    let height = picture.lines.len() * (HEIGHT + GAP);
    let mut pixels = vec![255; width * height * 3];
    for (number, line) in picture.lines.iter().enumerate() {
        for y in 0..HEIGHT {
            let row = (number * (HEIGHT + GAP) + y) * width;
            for (column, cell) in line.cells.iter().enumerate() {
                let at = (row + column * WIDTH) * 3;
                let cell = color(cell).repeat(WIDTH);
                pixels[at..at + cell.len()].copy_from_slice(&cell);
            }
        }
    }
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish()?;
    Ok(bytes)
}

fn color(cell: &Cell) -> Color {
    if cell.present > 0.0 {
        return blend(FEW, ALL, visible(cell.present));
    }
    blend(CLEAN, ZERO, visible(cell.zero))
}

fn blend(from: Color, to: Color, share: f64) -> Color {
    let fade = |index: usize| {
        let (from, to) = (f64::from(from[index]), f64::from(to[index]));
        (from + (to - from) * share).round() as u8
    };
    [fade(0), fade(1), fade(2)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_states_have_different_colors_and_one_page_is_visible() {
        let colors = legend().map(|(_, cell)| color(&cell));
        for (index, one) in colors.iter().enumerate() {
            assert!(!colors[index + 1..].contains(one), "{one:?}");
        }
        assert_eq!((colors[0], colors[4]), (ALL, CLEAN));
    }
}
