//! Bar charts as SVG.

use anyhow::anyhow;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const SIZE: (u32, u32) = (960, 480);
/// Colors that also differ in lightness (Okabe and Ito).
const COLORS: [RGBColor; 4] = [
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(150, 150, 150),
    RGBColor(0, 114, 178),
];

/// Groups of bars, a bar of each series in a group.
#[derive(Debug)]
pub struct Bars {
    /// What the axis says.
    pub axis: String,
    /// Where bars are cut, with their value above.
    pub most: f64,
    /// The names of the series, at most four.
    pub series: Vec<String>,
    /// The groups, from left to right.
    pub groups: Vec<Group>,
}

/// Bars side by side.
#[derive(Debug)]
pub struct Group {
    /// Its name on the axis; a line break begins a second line.
    pub name: String,
    /// For each series, the parts of its bar from the bottom up; the second is lighter. A bar
    /// without parts is not drawn.
    pub bars: Vec<Vec<f64>>,
}

impl Bars {
    /// Draws the chart as SVG.
    ///
    /// # Errors
    /// Fails where the drawing library does.
    pub fn svg(&self) -> anyhow::Result<String> {
        let mut svg = String::new();
        self.draw(&mut svg)
            .map_err(|error| anyhow!("can't draw: {error}"))?;
        Ok(svg)
    }

    fn draw(&self, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
        let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        // The bars of a group, and the room between groups.
        let width = self.series.len() as f64 + 1.0;
        let mut chart = ChartBuilder::on(&area)
            .margin(12)
            .margin_top(24)
            .x_label_area_size(32)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..width * self.groups.len() as f64, 0.0..self.most * 1.5)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .disable_x_axis()
            .y_labels(6)
            .y_label_formatter(&|value| format!("{value:.1}"))
            .y_desc(&self.axis)
            .light_line_style(TRANSPARENT)
            .draw()?;
        for (series, name) in self.series.iter().enumerate() {
            let color = COLORS[series % COLORS.len()];
            let mut bars = Vec::new();
            let mut cut = Vec::new();
            for (at, group) in self.groups.iter().enumerate() {
                let left = width * at as f64 + series as f64 + 0.5;
                let mut from = 0.0;
                for (part, value) in group.bars[series].iter().enumerate() {
                    let corners = [from, from + value].map(|y: f64| y.min(self.most));
                    let shade = if part == 0 { 1.0 } else { 0.45 };
                    bars.push(Rectangle::new(
                        [(left, corners[0]), (left + 0.9, corners[1])],
                        color.mix(shade).filled(),
                    ));
                    from += value;
                }
                if from > self.most {
                    cut.push(((left + 0.45, self.most), format!("{from:.0} x")));
                }
            }
            chart.draw_series(bars)?.label(name).legend(move |(x, y)| {
                Rectangle::new([(x, y - 5), (x + 14, y + 5)], color.filled())
            });
            let above = Pos::new(HPos::Center, VPos::Bottom);
            let style = ("sans-serif", 13).into_font().color(&BLACK).pos(above);
            for (top, label) in cut {
                let at = chart.backend_coord(&top);
                area.draw(&Text::new(label, (at.0, at.1 - 4), style.clone()))?;
            }
        }
        let below = Pos::new(HPos::Center, VPos::Top);
        let style = ("sans-serif", 13).into_font().color(&BLACK).pos(below);
        for (at, group) in self.groups.iter().enumerate() {
            let at = chart.backend_coord(&(width * (at as f64 + 0.5), 0.0));
            for (line, text) in (0..).zip(group.name.split('\n')) {
                let at = (at.0, at.1 + 6 + 15 * line);
                area.draw(&Text::new(text.to_owned(), at, style.clone()))?;
            }
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE)
            .label_font(("sans-serif", 14))
            .draw()?;
        area.present()?;
        Ok(())
    }
}
