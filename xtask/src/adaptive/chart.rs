//! The comparison as a bar chart.

use anyhow::anyhow;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::report::{POLICIES, Report};

const SIZE: (u32, u32) = (960, 480);
/// Bars of a trace, and the room between traces.
const GROUP: f64 = POLICIES.len() as f64 + 1.0;
/// Colours that also differ in lightness (Okabe and Ito).
const COLOURS: [RGBColor; POLICIES.len()] = [
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(150, 150, 150),
    RGBColor(0, 114, 178),
];

/// An SVG: each trace's costs as shares of the dearest policy's, faults in a lighter shade on top of writing.
pub fn of(report: &Report) -> anyhow::Result<String> {
    let mut svg = String::new();
    draw(report, &mut svg).map_err(|error| anyhow!("can't draw: {error}"))?;
    Ok(svg)
}

fn draw(report: &Report, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let width = GROUP * report.rows.len() as f64;
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .margin_top(24)
        .x_label_area_size(32)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..width, 0.0..1.35)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_labels(6)
        .y_label_formatter(&|share| format!("{:.0} %", share * 100.0))
        .y_desc("time, the dearest = 100 % (dark: writing, light: faults)")
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (policy, (name, _)) in POLICIES.iter().enumerate() {
        let colour = COLOURS[policy];
        let bars = report.rows.iter().enumerate().flat_map(|(at, row)| {
            let dearest = row.costs.iter().map(|cost| cost.total()).max();
            let share =
                |time: std::time::Duration| time.div_duration_f64(dearest.unwrap_or_default());
            let cost = &row.costs[policy];
            let (writing, total) = (share(cost.writing), share(cost.total()));
            let left = GROUP * at as f64 + policy as f64 + 0.5;
            [
                Rectangle::new([(left, 0.0), (left + 0.9, writing)], colour.filled()),
                Rectangle::new(
                    [(left, writing), (left + 0.9, total)],
                    colour.mix(0.45).filled(),
                ),
            ]
        });
        chart
            .draw_series(bars)?
            .label(*name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], colour.filled()));
    }
    let below = Pos::new(HPos::Center, VPos::Top);
    let style = ("sans-serif", 15).into_font().color(&BLACK).pos(below);
    for (at, row) in report.rows.iter().enumerate() {
        let middle = GROUP * (at as f64 + 0.5);
        let at = chart.backend_coord(&(middle, 0.0));
        area.draw(&Text::new(
            row.name.clone(),
            (at.0, at.1 + 8),
            style.clone(),
        ))?;
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
